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

import torch

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.publish.adapters import AdapterFolder
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
        folder: writes versions, if any are to be written.
        adapters: the same for LoRA adapters, where servers take them.
        stopping: whether the run was asked to end; then nothing is tried again.
    """

    def __init__(
        self,
        config: WeightedSFTConfig,
        tensors: TrainedTensors,
        folder: PublishFolder,
        adapters: AdapterFolder | None,
        verification: Verification,
        stopping: Callable[[], bool],
        world: World,
    ):
        self._config, self._verification, self._stopping, self._world = config, verification, stopping, world
        self._last, self._names = 0, []  # version; names of adapters
        urls = [url.strip() for url in (config.publish_to or "").split(",") if url.strip()]
        self._to_servers = bool(urls)
        self._servers: list[Server] = world.on_rank_0(lambda: [self._connect(url) for url in urls]) or []
        self._tensors, self._warned_of_rounding = tensors, False
        self._folder = self._broadcast = None
        as_adapters = adapters and world.broadcast_text(world.on_rank_0(self._choose_adapters) or "")
        self._adapters = adapters if as_adapters else None
        if self._adapters:
            verification.samples = True
            return
        if tensors.adapted and world.broadcast_text(world.on_rank_0(self._dtype_of_sums) or ""):
            tensors.dtype = torch.float32
        manifest = tensors.manifest
        backend = world.broadcast_text(world.on_rank_0(lambda: self._choose_transport(manifest)) or "")
        if config.publish_folder is not None or not backend:
            self._folder = folder
        if backend:
            self._broadcast = Broadcast(tensors, world, backend, config.publish_timeout)

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

    def _dtype_of_sums(self) -> str:
        """Returns "float32" if a server has it, in which sums of weights and adapters lose nothing; else empty."""
        return "float32" if any(server.dtype() == "float32" for server in self._servers) else ""

    def _choose_adapters(self) -> str:
        """Returns "adapter" if adapters are published under names of their own; empty if they are added to the weights.
        UserError if a server cannot take them, and must."""
        asked = self._config.publish_lora
        refusals = [server.refuses_adapters(self._config.lora_rank) for server in self._servers] if asked != "merged" else []
        why_not = next(filter(None, refusals), "")
        if why_not and asked == "adapter":
            raise UserError(f"publish_lora is adapter, and {why_not}; or set publish_lora merged")
        if asked == "merged" or why_not:
            log.info("adapters are added to the published weights%s", f": {why_not}" if why_not else "")
            return ""
        log.info("adapters are published under a name of its own for each version")
        return "adapter"

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
        if self._adapters:
            values |= self._adapters.publish(step)
        elif self._folder:
            values |= self._folder.publish(step)
        elif self._broadcast:
            values["publish/gib"] = self._broadcast.gib
        self._last = step
        if not self._to_servers:
            self._world.on_rank_0(self._retire_adapters)
            return values | self._rounding(), ""
        self._verification.begin_version(self._servers)
        found, failures = self._send(self._servers, verifies=True)
        self._world.on_rank_0(self._retire_adapters)
        return values | found | self._rounding() | {"publish/seconds": time.monotonic() - start}, failures

    def _retire_adapters(self) -> None:
        """Unload and delete those that no request runs on; without servers all but the newest."""
        if not self._adapters:
            return
        self._names = [*self._names, self._adapters.name(self._last)][-self._config.publish_keep :]
        kept = {self._names[-1]} if self._to_servers else set(self._names)
        try:
            for server in self._servers:
                kept |= server.unload_adapters(self._adapters.prefix, self._names[-1])
        except ServerFailed as error:  # it is noticed at the next version, if it stays so
            log.warning("old adapters are kept: %s", error)
        else:
            self._adapters.delete_all_but(kept)

    def _rounding(self) -> dict[str, float]:
        """The share of the adapters' changes that is lost where they are added to weights. A collective with LoRA."""
        if not self._tensors.adapted or self._adapters:
            return {}
        lost = dict(zip(("lost", "wanted"), map(torch.tensor, self._tensors.take_lost()), strict=True))
        sums, _ = self._world.reduce(lost, {})
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
        return self.publish(step) if self._broadcast else self._send(restarted, verifies=False)

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

    def _send(self, servers: list[Server], verifies: bool) -> tuple[dict[str, float], str]:
        """Have the servers load the last version, all at the same time, and those that fail again until the timeout. Verifies
        them if the model still has those weights. Returns metrics, and why the run must end. A collective."""
        verify = self._verification.verify if verifies else lambda server, version: {}
        attempts, version = _Attempts(servers, self._config.publish_timeout), str(self._last)
        while True:
            if self._broadcast:
                results = self._broadcast.send(attempts.left, version)
            else:
                results = self._world.on_rank_0(lambda: self._have_loaded(attempts.left)) or []
            if verifies:
                pairs = zip(attempts.left, results, strict=True)
                self._verification.collect([server for server, result in pairs if not isinstance(result, ServerFailed)])
            again = self._world.on_rank_0(lambda results=results: attempts.judge(results, version, verify))
            if not self._world.broadcast_text("again" if again and not self._stopping() else ""):
                break
            time.sleep(RETRY_S)
        return attempts.values, self._world.broadcast_text(self._world.on_rank_0(lambda: self._failure(attempts)) or "")

    def _have_loaded(self, servers: list[Server]) -> list[float | ServerFailed]:
        version = str(self._last)
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            each = Each(servers, pool)
            if self._adapters:
                folder = self._adapters.path.absolute() / self._adapters.name(self._last)
                each.run(lambda server: server.load_adapter(folder, version))
            else:
                folder = self._folder.path.absolute() / f"step_{self._last}"
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
