"""Publishes the weights of a run: as a folder, from which running inference servers load them, and verifies what they serve.

Rank 0 talks to the servers. A server that fails is tried again for `publish_timeout` seconds, since loading a folder twice is
safe. After that the run ends, or continues without the server (`publish_failures`).
"""

from __future__ import annotations

import functools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.model.causal_lm import WeightedSFTModel
from wsft.publish.folder import PublishFolder
from wsft.publish.probe import TOLERANCE, Probe
from wsft.publish.servers import Server, ServerFailed, connect

log = logging.getLogger(__name__)

API_KEY = "WSFT_PUBLISH_API_KEY"
RETRY_S = 2.0


class Publisher:
    """Args: folder: where versions are written. precision: "bf16" or "fp32", of the trainer."""

    def __init__(
        self,
        config: WeightedSFTConfig,
        folder: PublishFolder,
        model: WeightedSFTModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: str,
        world: World,
    ):
        self._config, self._folder, self._world, self._precision = config, folder, world, precision
        self._model, self._tokenizer, self._published, self._last = model, tokenizer, 0, 0
        self._before: Probe | None = None  # of the version before the last, where the last is verified
        urls = [url.strip() for url in (config.publish_to or "").split(",") if url.strip()]
        self._servers: list[Server] = world.on_rank_0(lambda: [self._connect(url) for url in urls]) or []
        self._to_servers = bool(urls)

    def _connect(self, url: str) -> Server:
        deadline, waits = time.monotonic() + self._config.publish_timeout, False
        while True:
            try:
                return connect(url, self._config.publish_timeout, os.environ.get(API_KEY))
            except ServerFailed as error:
                if time.monotonic() > deadline:
                    raise
                if not waits:
                    log.info("waiting up to %g s: %s", self._config.publish_timeout, error)
                waits = True
                time.sleep(RETRY_S)

    def publish(self, step: int) -> tuple[dict[str, float], str]:
        """Publish the weights after `step` optimizer steps. Returns metrics, and why the run must end (empty: it need not).
        A collective."""
        values = self._folder.publish(step)
        if not self._to_servers:
            return values, ""
        verifies, next_does = (n % self._config.publish_verify_steps == 0 for n in (self._published, self._published + 1))
        self._published, self._last = self._published + 1, step
        probe = Probe.of(self._model, self._tokenizer, self._world.device) if verifies or next_does else None
        load = functools.partial(self._load_into, self._servers, probe if verifies else None)
        found, failures = self._world.on_rank_0(load) or ({}, "")
        self._before = probe
        return values | found, self._world.broadcast_text(failures)

    def reload_restarted(self) -> tuple[dict[str, float], str]:
        """Between two versions: servers that restarted have the weights that they were started with, and load the last version
        again. Returns what `publish` does. A collective."""
        if not self._to_servers:
            return {}, ""
        found, failures = self._world.on_rank_0(self._reload_restarted) or ({}, "")
        return found, self._world.broadcast_text(failures)

    def _reload_restarted(self) -> tuple[dict[str, float], str]:
        restarted = [server for server in self._servers if not self._serves_last(server)]
        for server in restarted:
            log.warning("%s does not serve version %d any more: did it restart? Loading it again", server, self._last)
        return self._load_into(restarted, None) if restarted else ({}, "")

    def _serves_last(self, server: Server) -> bool:
        try:
            return server.version() == str(self._last)
        except ServerFailed:
            return False

    def _load_into(self, servers: list[Server], probe: Probe | None) -> tuple[dict[str, float], str]:
        """Have the servers load the last version, all at the same time."""
        folder, version = self._folder.path.absolute() / f"step_{self._last}", str(self._last)
        with ThreadPoolExecutor(max_workers=len(servers) or 1) as pool:
            results = list(pool.map(lambda server: self._load(server, folder, version, probe), servers))
        failures = [result for result in results if isinstance(result, str)]
        values: dict[str, float] = {}
        for found in results:
            for name, value in found.items() if isinstance(found, dict) else ():
                values[name] = max(value, values.get(name, value))
        if failures and self._config.publish_failures == "ignore":
            for failure in failures:
                log.warning("%s; continuing without it", failure)
            failed = [server for server, result in zip(servers, results, strict=True) if isinstance(result, str)]
            self._servers = [server for server in self._servers if server not in failed]
            failures = [] if self._servers else ["no inference server is left to publish to"]
        return values, "; ".join(failures)

    def _load(self, server: Server, folder: Path, version: str, probe: Probe | None) -> dict[str, float] | str:
        """Metrics of one server, or why it failed."""
        deadline, warned = time.monotonic() + self._config.publish_timeout, False
        while True:
            try:
                values = {"publish/pause_seconds": server.load(folder, version, self._config.publish_pause)}
                return values | (self._verify(server, version, probe) if probe else {})
            except _Differs as error:
                return str(error)
            except ServerFailed as error:
                if time.monotonic() > deadline:
                    return f"{error} (tried for {self._config.publish_timeout:g} s)"
                if not warned:
                    log.warning("%s; trying again for %g s", error, self._config.publish_timeout)
                warned = True
                time.sleep(RETRY_S)

    def _verify(self, server: Server, version: str, probe: Probe) -> dict[str, float]:
        served = probe.scored_by(server)
        mean, most = probe.differences(served)
        if self._before and self._before.differences(served)[0] < mean / 2:
            raise _Differs(
                f"{server} still serves the version before {version}: its logprobs of fixed texts are nearer to those weights "
                f"(by {mean:.3g} nats on average). It answered, and loaded nothing: look at its log"
            )
        tolerance = self._config.publish_tolerance or TOLERANCE[self._precision]
        if not mean <= tolerance:
            raise _Differs(
                f"{server} serves other weights than version {version}: logprobs of fixed texts differ by {mean:.3g} nats on "
                f"average and {most:.3g} at most, expected up to {tolerance:g} on average. Usual causes: it runs another "
                f"model, a quantized one, or another precision (then set publish_tolerance); on a CPU, vLLM's reload of tied "
                f"embeddings needs wsft's plugin (wsft/publish/README.md)"
            )
        return {"publish/difference_mean": mean, "publish/difference_max": most}


class _Differs(Exception):
    pass
