"""Reasons to end a run early: a signal, or a launcher that has ended. Knows nothing of ranks, steps or checkpoints.

Python runs signal handlers in the main thread only, between two byte codes, and that thread may be in a collective for a
minute. A second Ctrl-C is therefore handled by a thread, which the C-level handler wakes through a file descriptor.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
LAUNCHER_GONE = 99  # not the number of a signal
_LOOK_S = 1.0
_early: list[int] = []  # signals received before the first `Stop`
_early_launchers: dict[int, int] = {}  # at the start, since one that has ended cannot be found later


def note_signals() -> None:
    """From now on SIGTERM, SIGUSR1 and SIGHUP are recorded for the first `Stop`: importing libraries takes seconds, and a run
    that is asked to stop meanwhile must still end as `preempted`. At exit they are ignored: Python restores the default
    handlers while it shuts down, and a signal then would make a run that has saved look like a failure."""
    _early_launchers.update(_launchers())
    for number in _heard(set(SIGNALS) - {signal.SIGINT}):
        signal.signal(number, lambda number, _: _early.append(number))
        atexit.register(signal.signal, number, signal.SIG_IGN)


def _heard(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """The signals to handle: not SIGHUP where it is ignored, as by nohup."""
    return [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


def name_of(code: int) -> str:
    return "its launcher is gone" if code == LAUNCHER_GONE else f"{signal.Signals(code).name} received"


class Stop:
    """A context in which SIGTERM, SIGUSR1, SIGHUP (the terminal was closed) and the first SIGINT only set `code`. A second
    SIGINT ends the process at once.

    Attributes:
        code: 0, or the signal's number, or LAUNCHER_GONE.
    """

    def __init__(self):
        self.code = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            return self  # used from a thread of another program, which owns its signals
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._start(self._listen, reader)
        self._restore.callback(writer.close)  # which ends it
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False))
        for number in _heard(SIGNALS):
            self._restore.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        launchers, over = _early_launchers or _launchers(), threading.Event()
        if launchers:
            self._start(self._watch, launchers, over)
            self._restore.callback(over.set)
        if _early:
            self._ask(_early.pop())
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._restore.callback(thread.join)  # a daemon thread that wakes while Python shuts down may abort the process

    def _listen(self, reader: socket.socket) -> None:
        interrupts = 0
        while numbers := reader.recv(1):
            interrupts += numbers[0] == signal.SIGINT
            if interrupts > 1:
                log.warning("interrupted again: ending at once, without a checkpoint")
                os._exit(128 + signal.SIGINT)
            if numbers[0] in SIGNALS:
                self._ask(numbers[0])

    def _watch(self, launchers: dict[int, int], over: threading.Event) -> None:
        """Without its launcher a rank would keep running as an orphan, next to whatever is started then."""
        while not over.wait(_LOOK_S):
            if any(_parent_of(child) != parent for child, parent in launchers.items()):
                return self._ask(LAUNCHER_GONE)

    def _ask(self, code: int) -> None:
        if not self.code:
            self.code = code
            again = "; Ctrl-C again ends at once" if code == signal.SIGINT else ""
            log.warning("%s: finishing the step, then saving%s", name_of(code), again)


def _launchers() -> dict[int, int]:
    """Child -> parent, for the launcher processes whose end means that nobody waits for this rank any more: those of torchrun
    or deepspeed (which has two, one the parent of the other), or of launch/common.sh (WSFT_LAUNCHER_PID). Empty without a
    launcher, or without /proc."""
    me, parent = os.getpid(), int(os.environ.get("WSFT_LAUNCHER_PID", os.getppid()))  # it may have ended already
    launched = "LOCAL_WORLD_SIZE" in os.environ or "LOCAL_SIZE" in os.environ
    if not launched or _parent_of(me) is None:
        return {}
    chain = {me: parent}
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            chain[parent] = _parent_of(parent)
    return chain


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
