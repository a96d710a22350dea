"""The real Atropos server as a process of its own, and the smallest environment that can feed it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

START_SECONDS = 300


class AtroposServer:
    """A server on loopback that can be stopped, killed and started again on its port; a restart loses all it held."""

    def __init__(self, port: int, log_path: Path):
        self.port, self.log_path = port, log_path
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        assert self.process is None, "the server runs already"
        command = [sys.executable, "-m", "uvicorn", "atroposlib.api.server:app", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--log-level", "warning"]
        with self.log_path.open("ab") as log_file:
            self.process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the Atropos server did not start:\n{self.log_path.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, signal_number: int) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal_number)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _answers(self) -> bool:
        try:
            return requests.get(self.url, timeout=60).json() == {"message": "AtroposLib API"}
        except requests.RequestException:
            return False


@contextmanager
def atropos_server(port: int | None = None) -> Iterator[AtroposServer]:
    with tempfile.TemporaryDirectory() as folder:
        server = AtroposServer(port or free_port(), Path(folder) / "server.log")
        server.start()
        try:
            yield server
        finally:
            server.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def register_env(url: str, group_size: int, patience: float = 300.0, **fields) -> int:
    """Register as an environment; waits, as real ones do, for the trainer's first GET /batch. Returns the env_id."""
    request = {"max_token_length": 4096, "desired_name": "test", "weight": 1.0, "group_size": group_size} | fields
    deadline = time.monotonic() + patience
    while True:
        answer = requests.post(f"{url}/register-env", json=request, timeout=60).json()
        if answer["status"] == "success":
            return answer["env_id"]
        if time.monotonic() > deadline:
            raise TimeoutError(f"no trainer has asked for a batch in {patience} s: {answer}")
        time.sleep(0.05)


def post_group(url: str, env_id: int | None, group: dict) -> str:
    """Post one group; "received" or "buffered". NaN passes, as it does from real environments."""
    body = json.dumps(group | {"env_id": env_id})  # requests' own json= refuses NaN
    response = requests.post(f"{url}/scored_data", data=body, headers={"Content-Type": "application/json"}, timeout=60)
    response.raise_for_status()
    return response.json()["status"]


def group(size: int = 2, length: int = 6, **fields) -> dict:
    """A valid record: `size` sequences of `length` tokens, the first two a prompt, scores 0, 1, 2, ..."""
    tokens = [[1 + row + position for position in range(length)] for row in range(size)]
    masks = [[-100, -100, *row[2:]] for row in tokens]
    return {"tokens": tokens, "masks": masks, "scores": [float(row) for row in range(size)]} | fields
