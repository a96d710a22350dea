"""Publishes the weights of a run: as a folder, and to running inference servers, which load that folder or receive broadcasts.

Rank 0 talks to the servers. A server that fails is tried again for `publish_timeout` seconds, since loading a version twice is
safe. After that the run ends, or continues without the server (`publish_failures`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.publish.broadcast import Broadcast
from wsft.publish.folder import PublishFolder
from wsft.publish.servers import Each, Server, ServerFailed, connect
from wsft.publish.tensors import TrainedTensors
from wsft.publish.verification import Verification, WeightsDiffer

log = logging.getLogger(__name__)

API_KEY = "WSFT_PUBLISH_API_KEY"
RETRY_S = 2.0
ROUNDING_SAID = 0.1  # share from which a warning is logged


class Publisher:
    """
    Args:
        path: of the folder of versions, if any is written.
        stopping: whether the run was asked to end; then nothing is tried again.
    """

    def __init__(
        self,
        config: WeightedSFTConfig,
        tensors: TrainedTensors,
        path: Path,
        base_files: dict[str, bytes] | None,
        verification: Verification,
        stopping: Callable[[], bool],
        world: World,
    ):
        self._config, self._verification, self._stopping, self._world = config, verification, stopping, world
        self._last = 0  # version
        urls = [url.strip() for url in (config.publish_to or "").split(",") if url.strip()]
        self._to_servers = bool(urls)
        self._servers: list[Server] = world.on_rank_0(lambda: [self._connect(url) for url in urls]) or []
        self._tensors, self._warned_of_rounding = tensors, False
        if world.broadcast_text("float32" if any(server.dtype() == "float32" for server in self._servers) else ""):
            tensors.dtype = torch.float32  # in which sums with adapters lose nothing
        manifest = tensors.manifest
        backend = world.broadcast_text(world.on_rank_0(lambda: self._choose_transport(manifest)) or "")
        writes = config.publish_folder is not None or not backend
        self._folder = PublishFolder(path, config.publish_keep, tensors, base_files, world) if writes else None
        self._broadcast = Broadcast(tensors, world, backend, config.publish_timeout) if backend else None

    def _connect(self, url: str) -> Server:
        deadline, waits = time.monotonic() + self._config.publish_timeout, False
        while True:
            try:
                return connect(url, self._config.publish_timeout, os.environ.get(API_KEY), self._config.publish_pause)
            except ServerFailed as error:
                if time.monotonic() > deadline or self._stopping():
                    raise
                if not waits:
                    log.info("waiting up to %g s: %s", self._config.publish_timeout, error)
                waits = True
                time.sleep(RETRY_S)

    def _choose_transport(self, manifest: list[list[tuple[str, str, list[int]]]]) -> str:
        """Backend of the broadcasts; empty if the servers load a folder. UserError if a server has other tensors, or cannot
        receive what was asked for."""
        for server in self._servers:
            _compare(server, {name: shape for bucket in manifest for name, _, shape in bucket})
        asked = self._config.publish_transport
        if not self._servers or asked == "disk" or (asked == "auto" and self._config.publish_folder is not None):
            return ""
        ours = {"nccl", "gloo"} if self._world.device.type == "cuda" else {"gloo"}
        of_servers = {server: server.backends() & ours for server in self._servers}
        if asked == "auto":
            common = set.intersection(*of_servers.values())
            chosen = next((backend for backend in ("nccl", "gloo") if backend in common), "")
            log.info("weights go to the inference servers by %s", chosen or "a folder that they load (publish_folder)")
            return chosen
        unable = next((server for server, backends in of_servers.items() if asked not in backends), None)
        if unable:
            raise UserError(
                f"publish_transport is {asked}, and {unable} cannot receive weights from this trainer by it (possible: "
                f"{', '.join(sorted(of_servers[unable])) or 'none'}): it needs wsft's plugin (wsft/publish/README.md), and "
                f"for nccl GPUs on both sides; or set publish_transport disk"
            )
        return asked

    def publish(self, step: int) -> tuple[dict[str, float], str]:
        """Publish the weights after `step` optimizer steps. Returns metrics, and why the run must end (empty: it need not).
        A collective."""
        values: dict[str, float] = {"publish/version": step}
        start = time.monotonic()
        self._tensors.take_lost()
        if self._folder:
            values |= self._folder.publish(step)
        elif self._broadcast:
            values["publish/gib"] = self._broadcast.gib
        if not self._to_servers:
            return values | self._rounding(), ""
        self._last = step
        self._verification.begin_version(self._servers)
        found, failures = self._send(self._servers, self._verification.verify)
        return values | found | self._rounding() | {"publish/seconds": time.monotonic() - start}, failures

    def _rounding(self) -> dict[str, float]:
        """The share of the adapters' changes that is lost where they are added to weights. A collective with LoRA."""
        if not self._tensors.adapted:
            return {}
        sums = self._world.reduce_sum(dict(zip(("lost", "wanted"), map(torch.tensor, self._tensors.take_lost()), strict=True)))
        share = (sums["lost"] / sums["wanted"]) ** 0.5 if sums["wanted"] else 0.0
        if share > ROUNDING_SAID and not self._warned_of_rounding:
            log.warning(
                "rounding loses %.0f %% of what the adapters add to the published weights (publish/rounding_lost): serve the "
                "model in float32 if that stays so", 100 * share,
            )  # fmt: skip
            self._warned_of_rounding = True
        return {"publish/rounding_lost": share}

    def reload_restarted(self, step: int) -> tuple[dict[str, float], str]:
        """Between two versions: servers that restarted have the weights that they were started with, and load the last
        version again; without a folder of it, all servers receive the weights after `step`. Returns what `publish` does. A
        collective."""
        if not self._to_servers:
            return {}, ""
        restarted = self._world.on_rank_0(self._restarted) or []
        if not self._world.broadcast_text("; ".join(map(str, restarted))):
            return {}, ""
        return self.publish(step) if self._broadcast else self._send(restarted, lambda server, version: {})

    def _restarted(self) -> list[Server]:
        restarted = [server for server in self._servers if not self._serves_last(server)]
        for server in restarted:
            log.warning("%s does not serve version %d any more: did it restart? Loading it again", server, self._last)
        return restarted

    def _serves_last(self, server: Server) -> bool:
        try:
            return server.version() == str(self._last)
        except ServerFailed:
            return False

    def _send(self, servers: list[Server], verify: Callable[[Server, str], dict[str, float]]) -> tuple[dict[str, float], str]:
        """Have the servers load the last version, all at the same time, and those that fail again until the timeout. Returns
        metrics, and why the run must end. A collective."""
        attempts, version = _Attempts(servers, self._config.publish_timeout), str(self._last)
        while True:
            if self._broadcast:
                results = self._broadcast.send(attempts.left, version)
            else:
                results = self._world.on_rank_0(lambda: self._have_loaded(attempts.left)) or []
            again = self._world.on_rank_0(lambda results=results: attempts.judge(results, version, verify))
            if not self._world.broadcast_text("again" if again and not self._stopping() else ""):
                break
            time.sleep(RETRY_S)
        return attempts.values, self._world.broadcast_text(self._world.on_rank_0(lambda: self._failure(attempts)) or "")

    def _have_loaded(self, servers: list[Server]) -> list[float | ServerFailed]:
        folder, version = self._folder.path.absolute() / f"step_{self._last}", str(self._last)
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            each = Each(servers, pool)
            each.run(lambda server: server.load(folder, version))
        return each.results(servers)

    def _failure(self, attempts: _Attempts) -> str:
        failed = {server: attempts.failures[server] for server in self._servers if server in attempts.failures}
        if not failed or self._config.publish_failures == "stop":
            return "; ".join(failed.values())
        for failure in failed.values():
            log.warning("%s; continuing without it", failure)
        self._servers = [server for server in self._servers if server not in failed]
        return "" if self._servers else "no inference server is left to publish to"


class _Attempts:
    """Of several servers to load a version, until they succeed or the timeout is over.

    Attributes:
        left: servers that have not succeeded, nor failed for good.
        failures: why others failed for good.
        values: metrics, the worst of the servers.
    """

    def __init__(self, servers: list[Server], timeout: float):
        self.left, self.failures, self.values = list(servers), {}, {}
        self._timeout, self._deadline, self._warned = timeout, time.monotonic() + timeout, set()

    def judge(
        self, results: list[float | ServerFailed], version: str, verify: Callable[[Server, str], dict[str, float]]
    ) -> bool:
        """Take the results of an attempt, and verify servers that succeeded. Returns whether to try again with those left."""
        servers, self.left = self.left, []
        for server, result in zip(servers, results, strict=True):
            try:
                if isinstance(result, ServerFailed):
                    raise result
                found = {"publish/pause_seconds": result} | verify(server, version)
                self.values |= {name: max(value, self.values.get(name, value)) for name, value in found.items()}
            except WeightsDiffer as error:
                self.failures[server] = str(error)
            except ServerFailed as error:
                self._take_failure(server, error)
        return bool(self.left)

    def _take_failure(self, server: Server, error: ServerFailed) -> None:
        if time.monotonic() > self._deadline:
            self.failures[server] = f"{error} (tried for {self._timeout:g} s)"
            return
        if server not in self._warned:
            log.warning("%s; trying again for %g s", error, self._timeout)
        self._warned.add(server)
        self.left.append(server)


def _compare(server: Server, ours: dict[str, list[int]]) -> None:
    """UserError if the server's model has not the tensors that would be sent: it would fail in the middle of loading them."""
    theirs = server.shapes()
    different = [name for name in ours if theirs and theirs.get(name) != ours[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{server} serves another model: {len(different)} of {len(ours)} trained tensors are not in its files with that "
            f"shape, such as {name}, {ours[name]} here and {theirs.get(name, 'missing')} there. Start it with the run's base "
            f"model"
        )
