"""What is written of a step: numbers from its global batch, and from what its tokens did. Means are exact over all ranks, for
they are made of sums and counts. Knows nothing of ranks, models or sinks."""

from __future__ import annotations

import math

import numpy as np

from wsft.distributed.load_balancing import Load, imbalance
from wsft.loss.advantages import Override
from wsft.rollouts.batch import Batch
from wsft.rollouts.decoder import MENDED, REJECTED


def of_batch(batch: Batch, step: int) -> dict[str, float | int]:
    """The batch that the optimizer step after `step` others trains."""
    advantages, rejected = batch.advantages[batch.loss_mask], batch.rejected
    known_age = batch.weight_versions[~np.isnan(batch.weight_versions)]
    values = {
        "tokens/trained": batch.num_trained,
        "tokens/total": len(batch.tokens),
        "advantage/mean": _mean(advantages),
        "advantage/std": _std(advantages),
        "data/sequences": len(batch.lengths),
        "data/rejected": sum(n for reason, n in rejected.items() if reason in REJECTED),
        "data/truncated": rejected.get("truncated to max_token_len", 0),
        "data/mended": sum(n for reason, n in rejected.items() if reason in MENDED[1:]),
        "data/staleness": _mean(step - known_age),
        "data/no_behavior_logp": int(np.isnan(batch.behavior_logp[batch.loss_mask]).sum()),
    }
    scored = np.isfinite(batch.scores)
    of_envs = {f"env_{i}/": scored & (batch.env_ids == i) for i in np.unique(batch.env_ids) if i >= 0}
    for name, chosen in ({"": scored} | of_envs).items():
        values |= {f"score/{name}mean": _mean(batch.scores[chosen]), f"score/{name}std": _std(batch.scores[chosen])}
    return values


def of_tokens(sums: dict[str, float], maxima: dict[str, float], trained: int) -> dict[str, float | int]:
    """The trained tokens, from what `terms.TokenTerms.sums` says of those that were run. The others of `trained` weigh 0."""

    def mean(name: str, count: str) -> float:
        return sums[name] / sums[count] if sums[count] else math.nan

    known = sums["behavior"]
    values = {
        "logp/positive": mean("logp_positive", "positive"),
        "logp/negative": mean("logp_negative", "negative"),
        "entropy": mean("entropy", "tokens"),
        "weight/mean": sums["weight"] / trained if trained else math.nan,
        "weight/mean_abs": sums["weight_abs"] / trained if trained else math.nan,
        "ratio/mean": mean("ratio", "behavior"),
        "ratio/max": maxima["ratio"] if known else math.nan,
        "ratio/clipped": mean("clipped", "behavior"),
        "kl/behavior_k1": mean("k1", "behavior"),
        "kl/behavior_k3": mean("k3", "behavior"),
    }
    if "reference" in sums:
        values["kl/reference"] = mean("kl_reference", "reference")
        values["data/no_ref_logp"] = int(sums["tokens"] - sums["reference"])
    if "teacher" in sums:
        values["kl/teacher"] = mean("divergence", "teacher")
        values["data/no_teacher"] = int(sums["tokens"] - sums["teacher"])
    return values


def of_plan(shares: list[list[list[int]]], load: Load, packed: bool) -> dict[str, float | int]:
    """How the batch was shared: see load_balancing.py."""
    bins = [rows for share in shares for rows in share if rows]
    all_tokens, run = sum(int(load.lengths[rows].sum()) for rows in bins), sum(map(load.tokens, bins))
    room = run if packed else sum(len(rows) * int(load.lengths[rows].max()) for rows in bins)
    return {
        "plan/micro_batches": len(shares[0]),
        "plan/padding": 1 - run / room if room else 0.0,
        "plan/imbalance": imbalance(shares, load),
        "plan/shared": 1 - run / all_tokens if all_tokens else 0.0,
        "plan/skipped": len(load.lengths) - sum(map(len, bins)),
    }


def of_speed(tokens: int, flops: float, spent: float, wait: float, num_ranks: int, rated: float | None) -> dict[str, float]:
    """A step of `spent` seconds, `wait` of them for its batch. `flops` are of all ranks; MFU is their share of what the cards
    are rated at, over the whole of the step, and left out where that is not known."""
    per_rank = flops / spent / num_ranks
    values = {"time/step": spent, "time/wait": wait, "tokens/per_second": tokens / spent}
    values["compute/tflops_per_rank"] = per_rank / 1e12
    return values | ({"compute/mfu": per_rank / rated} if rated else {})


def missing(batch: Batch, needs_behavior: bool) -> dict[str, str]:
    """What the loss needs and no trained token of the batch brings: name of the field -> what becomes of the loss instead."""
    if not batch.num_trained:
        return {}
    free = batch.loss_mask & (np.repeat(batch.overrides, batch.lengths) == Override.NONE)
    absent = {}
    if needs_behavior and free.any() and np.isnan(batch.behavior_logp[free]).all():
        absent["inference_logprobs"] = "every ratio is 1"
    if len(batch.ref_logp) and np.isnan(batch.ref_logp[batch.loss_mask]).all():
        absent["ref_logprobs"] = "there is no KL term"
    if len(batch.teacher_sizes) and not len(batch.teacher_ids):
        absent["distill_token_ids"] = "there is no distillation term"
    return absent


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _std(values: np.ndarray) -> float:
    """Population deviation."""
    return float(values.std()) if len(values) else math.nan
