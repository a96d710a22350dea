"""Python scripts in processes forked from one that has imported torch, transformers and DeepSpeed: two thirds of what a tiny
run costs are these imports.

    process = fork_server().start(["train.py", *flags], env)             # or ["-m", "wsft.inspect", *flags]

Each process has its own environment, arguments, output, signals, exit code and interpreter shutdown. What the C library and
OpenMP read when a process begins is the server's: a test of memory, or of the imports themselves, starts a new interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# beside wsft.trainer: what DeepSpeed and transformers import when they are first used
IMPORTED_LATE = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers.models.llama.modeling_llama")


class ForkServer:
    def __init__(self):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._server = subprocess.Popen(command, env=env, cwd=ROOT, pass_fds=[theirs.fileno()])

    def start(self, command: list[str], env: dict[str, str]) -> ForkedProcess:
        """As subprocess.Popen([sys.executable, *command]) in the project's folder; output and errors come together."""
        output, output_end = os.pipe()
        status, status_end = os.pipe()
        request = json.dumps({"command": [str(word) for word in command], "env": env}).encode()
        socket.send_fds(self._control, [request], [output_end, status_end])
        os.close(output_end)
        os.close(status_end)
        return ForkedProcess(output, status)


class ForkedProcess:
    """What tests use of subprocess.Popen, for a process that is not a child of this one."""

    def __init__(self, output: int, status: int):
        self._output, self._status, self._ended = os.fdopen(output, errors="replace"), os.fdopen(status), threading.Event()
        self.pid, self.returncode = int(self._status.readline()), None
        threading.Thread(target=self._await_end, daemon=True).start()

    def _await_end(self) -> None:
        with self._status:
            self.returncode = int(self._status.readline())
        self._ended.set()

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, None]:
        with self._output:
            output = self._output.read()
        self.wait()
        return output, None


@functools.cache
def fork_server() -> ForkServer:
    """The one of this process; it ends with it."""
    return ForkServer()


def serve(control: socket.socket) -> None:
    """Fork for each request until the other end closes. Returns in the forked processes, which then have the request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole process group
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch the forked processes
    while True:
        request, descriptors, *_ = socket.recv_fds(control, 2**20, 2)
        if not request:
            sys.exit()
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return fork_and_watch(json.loads(request), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def fork_and_watch(request: dict, output: int, status: int) -> None:
    """Returns in the process of the script; the other reports its pid and, once it has ended, its exit code."""
    pid = os.fork()
    if pid:
        os.close(output)
        with open(status, "w", buffering=1) as report:
            print(pid, file=report)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                print(code, file=report)
        os._exit(0)
    os.close(status)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["command"]


def run(argv: list[str]) -> None:
    if argv[0] == "-m":
        sys.path[0] = os.getcwd()
        del argv[0]
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # what is missing is for the script to meet
        for name in ("wsft.trainer", *IMPORTED_LATE):
            __import__(name)
    gc.freeze()  # else each process's first collection copies the pages that it shares with this one
    serve(socket.socket(fileno=int(sys.argv[1])))
    run(sys.argv)  # down here, so that it ends as a script of its own does
