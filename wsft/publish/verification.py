"""Verifies what inference servers serve: their logprobs of fixed texts against the trainer's, and their prefix caches.

With adapters, their logprobs of tokens that they sample: on a CPU vLLM's engine ends if it scores a prompt with an adapter
while it runs other requests (seen with 0.32).
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.lora import switched_off
from wsft.publish.probe import CACHE_TOLERANCE, SAMPLED, TOLERANCE, Probe, differences
from wsft.publish.servers import Server, ServerFailed

log = logging.getLogger(__name__)


class WeightsDiffer(Exception):
    """A server serves other weights than the version that it reports; to load them again would not help."""


@dataclass
class _Sampled:
    """Logprobs of the tokens that a server sampled: its own, the trainer's, and the trainer's without adapters."""

    served: list[float]
    trained: list[float]
    base: list[float]


class Verification:
    """Of the first version, and of every `publish_verify_steps`-th.

    Args:
        precision: "bf16" or "fp32", of the trainer.
    Attributes:
        samples: whether servers are verified by what they sample, for adapters.
    """

    def __init__(
        self,
        config: WeightedSFTConfig,
        model: WeightedSFTModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: str,
        world: World,
    ):
        self._every, self._model, self._tokenizer, self._world = config.publish_verify_steps, model, tokenizer, world
        self._tolerance = config.publish_tolerance or TOLERANCE[precision]
        self._cache_tolerance = config.publish_tolerance or CACHE_TOLERANCE[precision]
        self._versions, self._due, self.samples = 0, False, False
        self._sampled: dict[Server, _Sampled | ServerFailed] = {}
        self._probe: Probe | None = None  # of this version and of the one before, where they are needed
        self._before: Probe | None = None
        self._prefixes: dict[Server, list[int]] = {}

    def begin_version(self, servers: list[Server]) -> None:
        """Called before servers, known on rank 0, load the model's current weights. A collective."""
        self._due, next_is = (number % self._every == 0 for number in (self._versions, self._versions + 1))
        if self.samples:
            self._versions += 1
            return
        probe = Probe.of(self._model, self._tokenizer, self._world.device) if self._due or next_is else None
        self._before, self._probe = self._probe, probe
        if self._due and self._versions:  # at the first version a server may be paused by a run that was killed
            self._world.on_rank_0(lambda: self._fill_caches(servers))
        self._versions += 1

    def collect(self, servers: list[Server]) -> None:
        """Called after these servers, known on rank 0, loaded a version. A collective."""
        if not (self.samples and self._due):
            return
        sampled = self._world.on_rank_0(lambda: {server: self._sample(server) for server in servers}) or {}
        mine = [tokens for found in sampled.values() if not isinstance(found, ServerFailed) for tokens, _ in found]
        sequences = json.loads(self._world.broadcast_text(json.dumps(mine)))
        trained = Probe.score(self._model, sequences, self._world.device)
        with switched_off(self._model):
            base = Probe.score(self._model, sequences, self._world.device)
        rows = iter(zip(trained, base, strict=True))
        self._sampled = {}
        for server, found in sampled.items():
            if isinstance(found, ServerFailed):
                self._sampled[server] = found
                continue
            ends = [(logprobs, *(row[-len(logprobs) :] for row in next(rows))) for _, logprobs in found]
            self._sampled[server] = _Sampled(*([x for row in rows for x in row] for rows in zip(*ends, strict=True)))

    def _sample(self, server: Server) -> list[tuple[list[int], list[float]]] | ServerFailed:
        """Texts with the tokens that the server samples after them, and its logprobs of these."""
        found = []
        try:
            for prompt in Probe.texts(self._tokenizer):
                tokens, logprobs = server.sample(prompt, SAMPLED)
                found.append((prompt + tokens, logprobs))
        except ServerFailed as error:
            return error
        return found

    def verify(self, server: Server, version: str) -> dict[str, float]:
        """Metrics of a server that has loaded this version; none if it is not to be verified.

        Raises:
            WeightsDiffer: it serves others.
            ServerFailed: it does not answer, or restarted meanwhile.
        """
        if not self._due:
            return {}
        problem, values = (self._look_at_samples if self.samples else self._look_at_texts)(server, version)
        if problem:
            found = server.version()
            if found != version:
                raise ServerFailed(f"{server} has weight version {found!r} after loading {version!r}: it restarted meanwhile")
            raise WeightsDiffer(problem)
        log.info(
            "%s serves version %s: logprobs differ by %.2g nats on average, %.2g at most",
            server, version, values["publish/difference_mean"], values["publish/difference_max"],
        )  # fmt: skip
        return values

    def _look_at_samples(self, server: Server, version: str) -> tuple[str, dict[str, float]]:
        """What is wrong (empty: nothing), and metrics."""
        sampled, problem = self._sampled[server], ""
        if isinstance(sampled, ServerFailed):
            raise sampled
        mean, most = differences(sampled.served, sampled.trained)
        from_base, _ = differences(sampled.served, sampled.base)
        values = {"publish/difference_mean": mean, "publish/difference_max": most, "publish/difference_base": from_base}
        if from_base < mean / 2:
            problem = (
                f"{server} samples from its base model instead of the adapter of version {version}: logprobs of its samples "
                f"differ by {from_base:.3g} nats on average from those of the base, and by {mean:.3g} from the trainer's. It "
                f"answered 200, and applied nothing: look at its log"
            )
        elif not mean <= self._tolerance:
            problem = (
                f"{server} samples from another model than version {version}: logprobs of its samples differ by {mean:.3g} "
                f"nats on average and {most:.3g} at most, expected up to {self._tolerance:g} on average. Usual causes: another "
                f"base model, a quantized one, another precision (then set publish_tolerance), or an adapter of which the "
                f"server applies a part"
            )
        return problem, values

    def _look_at_texts(self, server: Server, version: str) -> tuple[str, dict[str, float]]:
        served = self._probe.scored_by(server)
        mean, most = self._probe.differences(served)
        of_cache = Probe.cache_difference(server, self._prefix_for(server))
        problem = ""
        if self._before and self._before.differences(served)[0] < mean / 2:
            problem = (
                f"{server} still serves the version before {version}: its logprobs of fixed texts are nearer to those weights "
                f"(by {mean:.3g} nats on average). It answered, and loaded nothing: look at its log"
            )
        elif not mean <= self._tolerance:
            problem = (
                f"{server} serves other weights than version {version}: logprobs of fixed texts differ by {mean:.3g} nats on "
                f"average and {most:.3g} at most, expected up to {self._tolerance:g} on average. Usual causes: it runs "
                f"another model, a quantized one, or another precision (then set publish_tolerance); on a CPU, vLLM's reload "
                f"of tied embeddings needs wsft's plugin (wsft/publish/README.md)"
            )
        elif not of_cache <= self._cache_tolerance:
            problem = (
                f"{server} samples with keys and values of other weights than version {version}: logprobs of sampled tokens "
                f"behind a repeated prompt differ by {of_cache:.3g} nats from those of the same tokens in a prompt, expected "
                f"up to {self._cache_tolerance:g}. Its prefix cache was not cleared"
            )
        found = {"publish/difference_mean": mean, "publish/difference_max": most, "publish/cache_difference": of_cache}
        return problem, found

    def _fill_caches(self, servers: list[Server]) -> None:
        """With the weights before, so that a cache that is not cleared is noticed."""
        for server in servers:
            with contextlib.suppress(ServerFailed):  # which is noticed next
                server.sample(self._prefix_for(server), 1)

    def _prefix_for(self, server: Server) -> list[int]:
        if server not in self._prefixes:
            self._prefixes[server] = Probe.prefix_for(server, self._tokenizer)
        return self._prefixes[server]
