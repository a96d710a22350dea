"""Sends weights to running inference servers bucket by bucket, over gloo or NCCL: no file, no shared file system.

Rank 0 and the workers of a server form a process group. Each server has its own, so that one that fails does not stop the
others. While rank 0 sends a bucket, all ranks gather the next. Tensors go as bytes: nothing is pickled. Rank 0 listens on the
address by which it reaches the server.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from math import prod
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.distributed import Backend, PrefixStore, TCPStore, distributed_c10d

from wsft.distributed.world import World
from wsft.publish.servers import CONNECT_S, Each, Server, ServerFailed, group_name
from wsft.publish.tensors import TrainedTensors
from wsft.publish.vllm_plugin import process_group

_POLL_S = 0.001


class Broadcast:
    """Args: backend: "gloo" or "nccl". timeout: seconds in which a server must join, and receive a bucket.

    Attributes:
        gib: size of the tensors that a server receives.
    """

    def __init__(self, tensors: TrainedTensors, world: World, backend: str, timeout: float):
        self._tensors, self._world, self._backend, self._timeout = tensors, world, backend, timeout
        self._device = world.device if backend == "nccl" else torch.device("cpu")
        self._groups: dict[str, _Group] = {}  # by the server's URL
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._manifest = tensors.manifest
        sizes = (prod(shape) * getattr(torch, dtype).itemsize for bucket in self._manifest for _, dtype, shape in bucket)
        self.gib = sum(sizes) / 2**30

    def send(self, servers: list[Server], version: str) -> list[float | ServerFailed]:
        """Have the servers, known on rank 0, load the current parameters. Returns on rank 0 for how many seconds each was
        paused, or why it failed; such a server stays paused. A collective."""
        with ThreadPoolExecutor(max_workers=3 * len(servers) + 1) as pool:
            each = Each(servers, pool)
            for number, names in enumerate(self._tensors.buckets):
                found = self._tensors.bucket(names, self._world.rank == 0, self._device)
                if number == 0:  # servers are paused once there is something to send
                    each.run(lambda server: self._begin(server, pool))
                each.wait()  # for the bucket before, whose memory is used again
                if each.left:
                    buffer = self._as_bytes(found)
                    each.start(lambda server, buffer=buffer: self._in_group(server, lambda group: group.send(buffer)))
            each.wait()
            each.run(lambda server: self._in_group(server, lambda group: group.received()))
            each.run(lambda server: server.finish(version))
        return each.results(servers)

    def _as_bytes(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [tensor.flatten().view(torch.uint8) for tensor in tensors.values()]
        size = sum(len(part) for part in parts)
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return torch.cat(parts, out=self._buffer[:size])

    def _begin(self, server: Server, pool: ThreadPoolExecutor) -> None:
        server.pause()
        if server.url not in self._groups:
            self._groups[server.url] = _Group(server, self._backend, self._timeout)
            self._in_group(server, lambda group: group.join(pool))
        self._groups[server.url].receiving = pool.submit(server.receive, self._manifest)

    def _in_group(self, server: Server, action: Callable[[_Group], None]) -> None:
        try:
            action(self._groups[server.url])
        except (ServerFailed, OSError, RuntimeError) as error:  # the others are of sockets, the store and the backend
            self._groups.pop(server.url).close()
            if isinstance(error, ServerFailed):
                raise
            raise ServerFailed(f"weights cannot be sent to {server} over {self._backend}: {error}") from error


class _Group:
    """The process group of rank 0 and the workers of a server."""

    def __init__(self, server: Server, backend: str, timeout: float):
        self._server, self._backend, self._timeout = server, backend, timeout
        self._group: Any = None
        self.receiving: Future  # the request that has the server receive all buckets

    def join(self, pool: ThreadPoolExecutor) -> None:
        host, size = _own_address(self._server.url), 1 + self._server.workers()
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        store = TCPStore(
            host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=self._timeout),
        )  # fmt: skip
        asked = pool.submit(self._server.join, host, port, size, self._backend, self._timeout)
        form = process_group if self._server.kind == "vLLM" else _process_group_as_sglang
        formed = pool.submit(form, self._backend, host, store, 0, size, self._timeout)
        self._wait_until(formed.done, asked)
        self._group = formed.result()
        asked.result()

    def send(self, buffer: torch.Tensor) -> None:
        try:
            work = self._group.broadcast(buffer, 0)
            self._wait_until(work.is_completed, self.receiving)
            work.wait()
        except RuntimeError:
            self._fail_with_its_answer()
            raise

    def received(self) -> None:
        """Wait until the server has loaded all buckets."""
        self._wait_until(self.receiving.done, self.receiving)
        self.receiving.result()

    def close(self) -> None:
        self._group = None  # closes the connections, by which a worker that waits for a bucket notices

    def _wait_until(self, done: Callable[[], bool], request: Future) -> None:
        """ServerFailed if the server's answer is an error, or after the timeout: it would never be done then."""
        deadline = time.monotonic() + self._timeout
        while not done():
            if request.done():
                request.result()
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self._server} received nothing over {self._backend} for {self._timeout:g} s")
            time.sleep(_POLL_S)

    def _fail_with_its_answer(self) -> None:
        """A server that ended the connection says why in its answer, shortly after."""
        deadline = time.monotonic() + CONNECT_S
        while not self.receiving.done() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if self.receiving.done():
            self.receiving.result()


def _process_group_as_sglang(backend: str, host: str, store: TCPStore, rank: int, size: int, timeout_s: float) -> Any:
    """As SGLang's workers form it (its init_custom_process_group), by the same private functions of torch."""
    name = group_name(store.port)
    group, _ = distributed_c10d._new_process_group_helper(
        size, rank, [], Backend(backend), PrefixStore(name, store), group_name=name, backend_options=None,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    return group._get_backend(torch.device("cuda" if backend == "nccl" else "cpu"))


def _own_address(url: str) -> str:
    """The address of this host by which it reaches the URL."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), CONNECT_S) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise ServerFailed(f"the inference server at {url} cannot be reached ({error})") from error
