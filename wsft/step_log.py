"""What a run records of its steps, and what it warns of."""

from __future__ import annotations

import math

import numpy as np

from wsft.config import WeightedSFTConfig
from wsft.distributed.engine import StepResult
from wsft.errors import UserError
from wsft.model.loading import some
from wsft.planning import Plan
from wsft.run.measurements import of_tokens
from wsft.run.metrics import Metrics, NullMetrics

BAD_STEPS_ALLOWED = 3
RATIO_TOLERANCE, RATIO_TOKENS = 0.03, 200  # from 1, of fresh data; the fewest tokens whose mean says something
NO_COUNTS = {"not_finite": 0, "without_signal": 0, "bad": 0}  # bad: not finite in a row, up to the last step


class TrainingDiverged(UserError):
    """Loss or gradients were not finite for three steps in a row."""


class StepLog:
    """Completes and writes the metrics of each step.

    Args:
        counts: of earlier starts of the run; saved in checkpoints.
    """

    def __init__(self, config: WeightedSFTConfig, metrics: Metrics | NullMetrics, counts: dict[str, int]):
        self._config, self._metrics, self._said = config, metrics, set()
        self.counts = {name: counts[name] for name in NO_COUNTS}

    def expect(self, step: int, missing: dict[str, str], plans: list[Plan]) -> None:
        """Look at a batch before its first step, `step`. UserError if `strict` is set and something is missing.

        Args:
            missing: what no trained token has, and what is done instead.
        """
        for name, instead in missing.items():
            if self._config.strict:
                raise UserError(
                    f"the batch of step {step} has no {name} on any trained token, and strict is set: have the environments "
                    f"send them, or leave strict out ({instead}, then)"
                )
            self._warn_once(name, f"step {step}: no trained token of the batch has {name}: {instead}")
        ages = [plan.metrics["data/staleness_max"] - number for number, plan in enumerate(plans)]
        age, updates = np.nanmax([0.0, *ages]), self._config.updates_per_batch
        if updates > 1 and age > 0:
            self._warn_once(
                "updates",
                f"step {step}: the batch holds tokens that are {age:.0f} steps old, and updates_per_batch {updates} adds up to "
                f"{updates - 1}: correct for it (mismatch_cap, sequence_mask, max_staleness), or sample and train in turns",
            )

    def write(self, values: dict[str, float], result: StepResult) -> dict[str, float]:
        """Record a step; returns all of its metrics. TrainingDiverged if it was one not finite step too many."""
        finite, counts = math.isfinite(result.loss) and (result.applied or not result.signal), self.counts
        counts["bad"] = 0 if finite else counts["bad"] + 1
        counts["not_finite"] += not finite
        counts["without_signal"] += not result.signal
        of_step = {"loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
        of_run = {f"steps/{name}": counts[name] for name in ("not_finite", "without_signal")}
        of_run["memory/peak_gib"] = result.peak_gib
        of_all = of_tokens(result.sums, result.maxima, values["tokens/trained"])
        written = {"step": values["step"], **of_step, **values, **of_all, **of_run}
        self._metrics.step(written)
        self._warn(values["step"], result)
        self._look_at_ratio(written, result.sums["behavior"])
        return written

    def _look_at_ratio(self, written: dict[str, float], num_tokens: float) -> None:
        """Whether the sampler's logprobs are those of the model, on data that the current weights sampled."""
        step, staleness, mean = (written[name] for name in ("step", "data/staleness_max", "ratio/mean"))
        fresh = staleness == 0 or (step == 1 and math.isnan(staleness))
        if fresh and num_tokens >= RATIO_TOKENS and abs(mean - 1) > RATIO_TOLERANCE:
            self._warn_once(
                "ratio",
                f"step {step}: the ratio to the sampler's logprobs is {mean:.3f} on average, on data of the weights before "
                f"this step: they are of another distribution. Usual causes: top_p or top_k, another temperature "
                f"(record_temperature), another chat template or model, a quantized server",
            )

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            self._metrics.warn(text)

    def _warn(self, step: int, result: StepResult) -> None:
        if not result.signal:
            self._metrics.warn(f"step {step}: no token has a weight: parameters, optimizer and schedule stay as they are")
        if result.without_gradient:
            names = result.without_gradient
            self._metrics.warn(
                f"step {step}: {len(names)} parameters ({some(names)}) had no gradient on any rank: experts may have got no "
                f"token yet; else the model's own code detaches them, and they learn nothing"
            )
        bad = self.counts["bad"]
        if not bad:
            return
        skipped = result.signal and not result.applied
        what = "gradients are not finite, the step was skipped" if skipped else "the loss is not finite"
        self._metrics.warn(f"step {step}: {what} (loss {result.loss}, grad_norm {result.grad_norm}); {bad} in a row")
        if bad >= BAD_STEPS_ALLOWED:
            raise TrainingDiverged(
                f"{bad} steps in a row were not finite, the last at step {step}: lower learning_rate, set max_grad_norm, or "
                f"look at the advantages of the batches"
            )
