"""The ranks of a run: their environment, control messages between them, and that all end when one fails.

Imports torch.distributed only. Control messages go over gloo (channel.py), and a rank that waits in a collective which another
never enters is noticed (`fail_together`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from wsft.distributed.channel import Channel, from_message, to_message
from wsft.distributed.watchdog import Watchdog
from wsft.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

_FAILURE = "wsft/failure"  # key in the rendezvous store, per attempt: the message of the rank that failed first
_SLURM_INTERACTIVE_STEP = 0xFFFFFFFA  # the shell of salloc; the step ids of batch scripts and externs are larger
_LOOK_S = 1.0  # interval at which the store is polled
# to download, load, save or export a model: at least so many seconds or times step_timeout, plus bytes at this rate
FILES_S, FILES_TIMES, SLOWEST_DISK = 600.0, 10.0, 10 * 2**20
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's error messages
_RANK_0_GONE = "rank 0: gone without a message (killed, or out of memory?)"  # the store lives there


class PeerFailed(RuntimeError):
    """Another rank failed; carries its message."""


def ranks_from_environment() -> int:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun and deepspeed do, where they are missing:
    from SLURM_* under `srun`, to a single rank for a plain `python train.py`. Returns this process's rank."""
    env = os.environ
    if "RANK" not in env:
        _take_ranks_from_slurm(env) if _is_of_a_step(env) else _be_alone(env)
    env.setdefault("LOCAL_RANK", "0")
    return int(env["RANK"])


def _is_of_a_step(env: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of several tasks. The shell of an allocation has the variables of a step, too,
    but is a single task, whatever the size of the job."""
    step = int(env.get("SLURM_STEP_ID", _SLURM_INTERACTIVE_STEP))
    return step < _SLURM_INTERACTIVE_STEP and int(tasks_of_step(env)) > 1


def tasks_of_step(env: Mapping[str, str]) -> str:
    return env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))


def _take_ranks_from_slurm(env: MutableMapping[str, str]) -> None:
    env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": tasks_of_step(env), "LOCAL_RANK": env["SLURM_LOCALID"]}
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    # several steps of one job may run at the same time
    port = 20000 + (int(env["SLURM_JOB_ID"]) + 1009 * int(env["SLURM_STEP_ID"])) % 20000
    env.setdefault("MASTER_PORT", str(port))


def first_host(nodelist: str) -> str:
    """The first host of SLURM's "gpu[03-05,9]-ib,login1". Parsed here, since containers have no scontrol."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _be_alone(env: MutableMapping[str, str]) -> None:
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    """A port on loopback that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks_on_this_host() -> int:
    """From the variables of torchrun, deepspeed or srun; 1 without them."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def file_timeout_s(step_timeout: float, size: int = 0) -> float:
    """Time limit in seconds for work on files of that size in bytes."""
    return max(FILES_S, FILES_TIMES * step_timeout) + size / SLOWEST_DISK


class World:
    """This rank and its communication with the others. Created after the process group (process_start.py).

    Args:
        step_timeout: seconds without progress after which the run counts as hanging (watchdog.py).
    """

    def __init__(self, device: torch.device, step_timeout: float):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self._control = Channel()
        self._step_timeout, self._watchdog = step_timeout, Watchdog(step_timeout)
        self.timeout_s = file_timeout_s(step_timeout)
        self._failed: Callable[[str], None] = lambda _: None
        self._dying = threading.Lock()

    def new_channel(self) -> Channel:
        """For another thread of each rank. A collective."""
        return Channel()

    def broadcast(self, arrays: T | None, like: type[T], source: int) -> T:
        """Broadcast a dataclass `like` of 1-D NumPy arrays: its size, then one message."""
        message = to_message(arrays) if self.rank == source else None
        size = self._control.all_gather_ints(len(message) if message is not None else 0)[source][0]
        return from_message(self._control.broadcast(message, size, source), like)

    def all_gather_int(self, value: int) -> list[int]:
        """One integer of each rank, on every rank."""
        return [value for (value,) in self.all_gather_ints(value)]

    def all_gather_ints(self, *values: int) -> list[list[int]]:
        """Integers of each rank, on every rank."""
        if self._dying.locked():
            threading.Event().wait()  # another thread is ending this process
        self._watchdog.alive()
        return self._control.all_gather_ints(*values)

    def all_true(self, yes: bool) -> bool:
        """Whether it is true on every rank."""
        return min(self.all_gather_int(int(yes))) == 1

    def reduce(
        self, sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The sum over ranks of some scalars, and the maximum of others, in float64: one message. NaN is the maximum of what
        has one."""
        mine = torch.stack([x.detach().double() for x in (*sums.values(), *maxima.values())]).cpu().numpy()
        found = self._control.all_gather(mine)
        summed, highest = found[:, : len(sums)].sum(0).tolist(), found[:, len(sums) :].max(0).tolist()
        return dict(zip(sums, summed, strict=True)), dict(zip(maxima, highest, strict=True))

    def sum_arrays(self, array: np.ndarray) -> np.ndarray:
        """The element-wise sum over ranks of arrays of one shape."""
        summed = torch.from_numpy(array.copy())
        dist.all_reduce(summed, group=self._control.group)
        return summed.numpy()

    def broadcast_text(self, text: str) -> str:
        """The text of rank 0, on every rank."""
        mine = _Text(np.frombuffer(text.encode(), dtype=np.uint8).copy()) if self.rank == 0 else None
        return bytes(self.broadcast(mine, _Text, 0).text).decode()

    def raise_on_all_ranks(self, error: BaseException | None) -> None:
        """Raise on every rank if any has an error: its own exception where it happened, `PeerFailed` elsewhere."""
        failed = [rank for rank, word in enumerate(self.all_gather_int(int(error is not None))) if word]
        if not failed:
            return
        text = np.array(list(_sentence(error).encode() if error else b""), dtype=np.uint8)
        message = self.broadcast(_Text(text) if self.rank == failed[0] else None, _Text, failed[0])
        raise error or PeerFailed(f"rank {failed[0]}: {bytes(message.text).decode()}")

    def run_on_all_ranks(self, action: Callable[[], T] | None) -> T | None:
        """Run the action (None: nothing to do on this rank). An exception on any rank is then raised on all."""
        result = error = None
        try:
            result = action() if action else None
        except Exception as failure:
            error = failure
        self.raise_on_all_ranks(error)
        return result

    def on_rank_0(self, action: Callable[[], T]) -> T | None:
        return self.run_on_all_ranks(action if self.rank == 0 else None)

    @contextlib.contextmanager
    def extended_timeout(self) -> Iterator[None]:
        """For work on the files of a whole model, which may take longer than a step: inside, the run counts as hanging after
        `timeout_s` only. A collective."""
        self.all_gather_int(0)
        before, self._watchdog.allowed = self._watchdog.allowed, self.timeout_s
        yield
        self.all_gather_int(0)
        self._watchdog.allowed = before

    def expect_files(self, size: int) -> None:
        """Extend the timeout for files of that size in bytes, also that of the enclosing context."""
        self.timeout_s = self._watchdog.allowed = file_timeout_s(self._step_timeout, size)

    @contextlib.contextmanager
    def fail_together(self, failed: Callable[[str], None]) -> Iterator[None]:
        """Inside, an exception on one rank ends all ranks within seconds with that rank's message; so does a rank that hangs.

        The others may be in a collective that will never complete, so the message cannot be sent by a collective. The
        failing rank writes it into the rendezvous store, which a thread of every rank polls, and waits so that they read it
        before its sockets close. `failed` is called with the message on one rank, before it ends.
        """
        self._failed, peers = failed, self._peers()
        self._watchdog.alive()
        self._watchdog.watch(peers, self._die)
        try:
            yield from self._alone() if self.size == 1 else self._with_others()
        finally:
            self._watchdog.off()

    def _alone(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._failed(_sentence(error))
            raise

    def _with_others(self) -> Iterator[None]:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # that rank 0 is stopped (SIGSTOP) is for the watchdog to notice, not for a store that does not answer
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._step_timeout + 60))
        # torchrun keeps its store when it restarts ranks: the next attempt must not read keys of one that failed
        store = dist.PrefixStore(str(self.all_gather_int(secrets.randbits(62))[0]), store)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(store, over), daemon=True)
        watch.start()
        try:
            yield
        except BaseException as error:
            self._die(self._first_failure(store, error))
        over.set()
        watch.join()
        dist.barrier(group=self._control.group)  # the store is on rank 0, which must not end while another rank still polls it

    def _peers(self) -> list[int]:
        """Process ids of the other ranks on this host."""
        namespace = f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid') if os.path.exists('/proc/self/ns') else ''}"
        pids, hosts = self.all_gather_int(os.getpid()), self.all_gather_int(zlib.crc32(namespace.encode()))
        return [pid for pid, host in zip(pids, hosts, strict=True) if host == hosts[self.rank] and pid != os.getpid()]

    def _first_failure(self, store: dist.TCPStore, mine: BaseException) -> BaseException:
        """Write this rank's message to the store; returns it, or the message of the rank whose failure caused this one."""
        lost_peer = isinstance(mine, RuntimeError) and any(phrase in str(mine) for phrase in _LOST_PEER)
        follows = lost_peer or isinstance(mine, PeerFailed)
        if lost_peer:
            time.sleep(_LOOK_S)  # the message of the rank that failed may still be on its way
        try:
            if store.check([_FAILURE]):
                return PeerFailed(store.get(_FAILURE).decode()) if follows else mine
            if lost_peer:
                mine = PeerFailed("another rank: gone without a message (killed, or out of memory?)")
            store.set(_FAILURE, str(mine) if follows else f"rank {self.rank}: {_sentence(mine)}")
        except dist.DistError:
            return PeerFailed(_RANK_0_GONE) if lost_peer else mine
        return mine

    def _watch(self, store: dist.TCPStore, over: threading.Event) -> None:
        while not over.wait(_LOOK_S):
            try:
                if not store.check([_FAILURE]):
                    continue
                message = store.get(_FAILURE).decode()
            except dist.DistError:
                message = _RANK_0_GONE
            if not over.is_set():
                self._die(PeerFailed(message))

    def _die(self, error: BaseException) -> NoReturn:
        """Log why and end this process at once: a normal exit would wait for threads and collectives that never end."""
        if not self._dying.acquire(blocking=False):
            threading.Event().wait()  # another thread of this process is logging it
        telling = threading.Thread(target=self._tell, args=(error,), daemon=True)
        telling.start()
        telling.join(5 * _LOOK_S)  # a file system that hangs must not keep the process alive
        if isinstance(error, PeerFailed):
            log.error("ended by %s", error)
        elif not isinstance(error, SystemExit | KeyboardInterrupt):
            text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
            log.error("%s", text)
        with contextlib.suppress(OSError):  # stderr may be closed
            sys.stdout.flush()
            sys.stderr.flush()
        if self.rank == 0 or not isinstance(error, PeerFailed):
            time.sleep(3 * _LOOK_S)  # so that the other ranks can still read the message from the store on rank 0
        os._exit(1)

    def _tell(self, error: BaseException) -> None:
        """The first rank that is still alive records why."""
        if self.rank == (1 if _RANK_0_GONE in str(error) else 0):
            with contextlib.suppress(OSError):  # a full disk
                self._failed(_sentence(error))


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclasses.dataclass(frozen=True)
class _Text:
    text: np.ndarray  # [bytes] uint8
