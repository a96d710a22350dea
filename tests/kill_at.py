"""Run train.py and send itself a real SIGKILL at an exact place:

    python tests/kill_at.py PLACE COUNT[@RANK] TRAIN FLAGS

A rank (or the one named) is killed the COUNT-th time that it reaches PLACE. Places: see below.
"""

import contextlib
import os
import runpy
import signal
import sys
import threading
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wsft import trainer  # noqa: E402
from wsft.distributed.state_writer import StateWriter  # noqa: E402
from wsft.rollouts import journal  # noqa: E402
from wsft.run import checkpoint  # noqa: E402
from wsft.step_log import StepLog  # noqa: E402

place, count, *flags = sys.argv[1:]
left, _, only = count.partition("@")
left = int(left)
FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # not after a restart by torchrun


def killing(function, last=lambda *args: None):
    """The function; at the end of the count `last` in its place, and then nothing."""

    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0 and only in ("", os.environ.get("RANK", "0")) and FIRST_ATTEMPT:
            last(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def filling(function):
    """The function; from the end of the count on, on a disk without room."""

    def wrapped(self, state_dict, path):
        global left
        left -= 1
        if left == 0 and only in ("", os.environ.get("RANK", "0")):
            disk = next(folder for folder in Path(path).parents if folder.is_mount())
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        return function(self, state_dict, path)

    return wrapped


def never(*args):
    threading.Event().wait()


def late(function):
    """The function; the first time once `count` more steps are in metrics.jsonl."""
    wanted, steps, note, start = [left], threading.Semaphore(0), StepLog._warn, StateWriter.start

    def noted(*args):
        steps.release()
        return note(*args)

    def started(self):
        while wanted[0] and steps.acquire(blocking=False):
            pass  # those before
        start(self)

    def wrapped(*args):
        while wanted[0]:
            assert steps.acquire(timeout=120), "training waits for the checkpoint"
            wanted[0] -= 1
        return function(*args)

    StepLog._warn, StateWriter.start = noted, started
    return wrapped


def half_written(descriptor, buffers):
    os.write(descriptor, buffers[0])
    os.write(descriptor, buffers[1][: len(buffers[1]) // 2])


Journal, os_of_journal = journal.Journal, types.SimpleNamespace(**vars(os))
match place:
    case "step":  # a step is taken and in metrics.jsonl; the checkpoint before it is complete
        StateWriter.busy = property(lambda self: bool(self._thread and self._thread.join()))
        StepLog._warn = killing(StepLog._warn)
    case "unwritten":  # a step is taken, while nothing is written of the checkpoint before it
        StateWriter._write = never
        StepLog._warn = killing(StepLog._warn)
    case "late":  # steps are taken while a checkpoint is written: no death
        StateWriter._write = late(StateWriter._write)
    case "fetch":  # a batch has come, and is not in the journal
        Journal.append = killing(Journal.append)
    case "append":  # half of a record is written
        journal.os = os_of_journal
        os_of_journal.writev = killing(os.writev, last=half_written)
    case "fsync":  # a record is written, not yet synced
        journal.os = os_of_journal
        os_of_journal.writev = killing(os.writev, last=os.writev)
    case "appended":  # a batch is in the journal, and not decoded
        Journal.append = killing(Journal.append, last=Journal.append)
    case "save":  # some files of a checkpoint are written
        StateWriter._write = killing(StateWriter._write)
    case "full":  # the disk is full: no death, an error
        StateWriter._write = filling(StateWriter._write)
    case "finish":  # all but its last
        checkpoint.atomic_write = killing(checkpoint.atomic_write)
    case "prune":  # a checkpoint is complete, the old ones are still there
        trainer.prune = killing(trainer.prune)
    case "export":  # the last checkpoint is there, the model is not
        trainer.export = killing(trainer.export)
    case _:
        sys.exit(f"unknown place {place}")

sys.argv = [str(ROOT / "train.py"), *flags]
runpy.run_path(sys.argv[0], run_name="__main__")
