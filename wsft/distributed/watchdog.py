"""Ends a run that hangs, with the stacks of all threads in the log.

If one rank does not enter a collective, the others wait in it for ever, without an exception or output. Each rank reports
progress by `alive`; a thread of its own checks the time since.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


class Hung(RuntimeError):
    """No progress for longer than step_timeout."""


class Watchdog:
    """Args: timeout: seconds without a call of `alive` after which the run counts as hanging."""

    def __init__(self, timeout: float):
        self._timeout, self._last, self._off = timeout, time.monotonic(), threading.Event()
        self.allowed = timeout  # seconds; longer for work on files

    def alive(self) -> None:
        self._last = time.monotonic()

    def off(self) -> None:
        self._off.set()
        self._thread.join()  # a daemon thread that wakes while Python shuts down may abort the process

    def watch(self, peers: list[int], end: Callable[[Hung], None]) -> None:
        """Start the thread. When the run hangs, the stacks are logged and `end` is called. Ranks of this host (`peers`, their
        pids) that are stopped and so cannot check the time are continued, to log their own stacks and end.
        """
        # in C, before the continued process does anything else; of the main thread alone, since reading the frames of threads
        # that run may crash
        faulthandler.register(signal.SIGUSR2, all_threads=False)

        def look() -> None:
            while not self._off.wait(min(1.0, self._timeout / 4)):
                if time.monotonic() - self._last > self.allowed:
                    break
            if self._off.is_set():
                return
            message = (
                f"no progress for {self.allowed:.0f} s ({'--step_timeout' if self.allowed == self._timeout else 'on files'})"
            )
            log.error("%s. Stacks of this rank:\n%s", message, _stacks())
            for pid in filter(_is_stopped, peers):
                os.kill(pid, signal.SIGUSR2)
                os.kill(pid, signal.SIGCONT)
            end(Hung(f"{message}; the stacks of all ranks are in the log"))

        self._thread = threading.Thread(target=look, daemon=True)
        self._thread.start()


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:  # faulthandler writes to a descriptor only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
