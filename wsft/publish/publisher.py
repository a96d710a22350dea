"""Publishes the weights of a run: as a folder, and to running inference servers, which load that folder or receive broadcasts.
Verifies what the servers serve.

Rank 0 talks to the servers. A server that fails is tried again for `publish_timeout` seconds, since loading a version twice is
safe. After that the run ends, or continues without the server (`publish_failures`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.model.causal_lm import WeightedSFTModel
from wsft.publish.broadcast import Broadcast
from wsft.publish.folder import PublishFolder
from wsft.publish.probe import CACHE_TOLERANCE, TOLERANCE, Probe
from wsft.publish.servers import Each, Server, ServerFailed, connect
from wsft.publish.tensors import TrainedTensors

log = logging.getLogger(__name__)

API_KEY = "WSFT_PUBLISH_API_KEY"
RETRY_S = 2.0


class Publisher:
    """
    Args:
        path: of the folder of versions, if any is written.
        precision: "bf16" or "fp32", of the trainer.
        stopping: whether the run was asked to end; then nothing is tried again.
    """

    def __init__(
        self,
        config: WeightedSFTConfig,
        tensors: TrainedTensors,
        path: Path,
        base_files: dict[str, bytes] | None,
        model: WeightedSFTModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: str,
        stopping: Callable[[], bool],
        world: World,
    ):
        self._stopping = stopping
        self._config, self._world, self._precision, self._model, self._tokenizer = config, world, precision, model, tokenizer
        self._published, self._last = 0, 0
        self._before: Probe | None = None  # of the version before the last, where the last is verified
        self._prefixes: dict[Server, list[int]] = {}
        urls = [url.strip() for url in (config.publish_to or "").split(",") if url.strip()]
        self._to_servers = bool(urls)
        self._servers: list[Server] = world.on_rank_0(lambda: [self._connect(url) for url in urls]) or []
        manifest = tensors.manifest
        backend = world.broadcast_text(world.on_rank_0(lambda: self._choose_transport(manifest)) or "")
        writes = config.publish_folder is not None or not backend
        self._folder = PublishFolder(path, config.publish_keep, tensors, base_files, world) if writes else None
        self._broadcast = Broadcast(tensors, world, backend, config.publish_timeout) if backend else None

    def _connect(self, url: str) -> Server:
        deadline, waits = time.monotonic() + self._config.publish_timeout, False
        while True:
            try:
                return connect(url, self._config.publish_timeout, os.environ.get(API_KEY))
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
        if self._folder:
            values |= self._folder.publish(step)
        elif self._broadcast:
            values["publish/gib"] = self._broadcast.gib
        if not self._to_servers:
            return values, ""
        verifies, next_does = (n % self._config.publish_verify_steps == 0 for n in (self._published, self._published + 1))
        self._published, self._last = self._published + 1, step
        probe = Probe.of(self._model, self._tokenizer, self._world.device) if verifies or next_does else None
        if verifies and self._published > 1:  # at the first version a server may be paused by a run that was killed
            self._world.on_rank_0(self._fill_caches)
        found, failures = self._send(self._servers, probe if verifies else None)
        self._before = probe
        return values | found | {"publish/seconds": time.monotonic() - start}, failures

    def _fill_caches(self) -> None:
        """With the weights before, so that a cache that is not cleared is noticed."""
        for server in self._servers:
            with contextlib.suppress(ServerFailed):  # which is noticed next
                server.sample(self._prefix_for(server), 1)

    def _prefix_for(self, server: Server) -> list[int]:
        if server not in self._prefixes:
            self._prefixes[server] = Probe.prefix_for(server, self._tokenizer)
        return self._prefixes[server]

    def reload_restarted(self, step: int) -> tuple[dict[str, float], str]:
        """Between two versions: servers that restarted have the weights that they were started with, and load the last
        version again; without a folder of it, all servers receive the weights after `step`. Returns what `publish` does. A
        collective."""
        if not self._to_servers:
            return {}, ""
        restarted = self._world.on_rank_0(self._restarted) or []
        if not self._world.broadcast_text("; ".join(map(str, restarted))):
            return {}, ""
        return self.publish(step) if self._broadcast else self._send(restarted, None)

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

    def _send(self, servers: list[Server], probe: Probe | None) -> tuple[dict[str, float], str]:
        """Have the servers load the last version, all at the same time, and those that fail again until the timeout. Returns
        metrics, and why the run must end. A collective."""
        attempts = _Attempts(servers, self._config.publish_timeout)
        while True:
            if self._broadcast:
                results = self._broadcast.send(attempts.left, str(self._last), self._config.publish_pause)
            else:
                results = self._world.on_rank_0(lambda: self._have_loaded(attempts.left)) or []
            again = self._world.on_rank_0(lambda results=results: attempts.judge(results, self._verified(probe)))
            if not self._world.broadcast_text("again" if again and not self._stopping() else ""):
                break
            time.sleep(RETRY_S)
        return attempts.values, self._world.broadcast_text(self._world.on_rank_0(lambda: self._failure(attempts)) or "")

    def _have_loaded(self, servers: list[Server]) -> list[float | ServerFailed]:
        folder, version = self._folder.path.absolute() / f"step_{self._last}", str(self._last)
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            each = Each(servers, pool)
            each.run(lambda server: server.load(folder, version, self._config.publish_pause))
        return each.results(servers)

    def _failure(self, attempts: _Attempts) -> str:
        failed = {server: attempts.failures[server] for server in self._servers if server in attempts.failures}
        if not failed or self._config.publish_failures == "stop":
            return "; ".join(failed.values())
        for failure in failed.values():
            log.warning("%s; continuing without it", failure)
        self._servers = [server for server in self._servers if server not in failed]
        return "" if self._servers else "no inference server is left to publish to"

    def _verified(self, probe: Probe | None) -> Callable[[Server], dict[str, float]]:
        return lambda server: self._verify(server, str(self._last), probe) if probe else {}

    def _verify(self, server: Server, version: str, probe: Probe) -> dict[str, float]:
        """Differences of the server's logprobs. _Differs if they are those of other weights."""
        served = probe.scored_by(server)
        mean, most = probe.differences(served)
        of_cache = Probe.cache_difference(server, self._prefix_for(server))
        tolerance = self._config.publish_tolerance or TOLERANCE[self._precision]
        cache_tolerance = self._config.publish_tolerance or CACHE_TOLERANCE[self._precision]
        problem = ""
        if self._before and self._before.differences(served)[0] < mean / 2:
            problem = (
                f"{server} still serves the version before {version}: its logprobs of fixed texts are nearer to those weights "
                f"(by {mean:.3g} nats on average). It answered, and loaded nothing: look at its log"
            )
        elif not mean <= tolerance:
            problem = (
                f"{server} serves other weights than version {version}: logprobs of fixed texts differ by {mean:.3g} nats on "
                f"average and {most:.3g} at most, expected up to {tolerance:g} on average. Usual causes: it runs another "
                f"model, a quantized one, or another precision (then set publish_tolerance); on a CPU, vLLM's reload of tied "
                f"embeddings needs wsft's plugin (wsft/publish/README.md)"
            )
        elif not of_cache <= cache_tolerance:
            problem = (
                f"{server} samples with keys and values of other weights than version {version}: logprobs of sampled tokens "
                f"behind a repeated prompt differ by {of_cache:.3g} nats from those of the same tokens in a prompt, expected "
                f"up to {cache_tolerance:g}. Its prefix cache was not cleared"
            )
        if problem:
            found = server.version()
            if found != version:
                raise ServerFailed(f"{server} has weight version {found!r} after loading {version!r}: it restarted meanwhile")
            raise _Differs(problem)
        log.info("%s serves version %s: logprobs differ by %.2g nats on average, %.2g at most", server, version, mean, most)
        return {"publish/difference_mean": mean, "publish/difference_max": most, "publish/cache_difference": of_cache}


class _Differs(Exception):
    pass


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

    def judge(self, results: list[float | ServerFailed], verify: Callable[[Server], dict[str, float]]) -> bool:
        """Take the results of an attempt, and verify servers that succeeded. Returns whether to try again with those left."""
        servers, self.left = self.left, []
        for server, result in zip(servers, results, strict=True):
            try:
                if isinstance(result, ServerFailed):
                    raise result
                found = {"publish/pause_seconds": result} | verify(server)
                self.values |= {name: max(value, self.values.get(name, value)) for name, value in found.items()}
            except _Differs as error:
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
