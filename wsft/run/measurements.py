"""The metrics of a step, from its global batch and from sums over its tokens. Means over all ranks are exact, since they are
computed from sums and counts. Knows nothing of ranks, models or sinks."""

from __future__ import annotations

import math

import numpy as np

from wsft.distributed.load_balancing import Load, imbalance
from wsft.loss.advantages import Override
from wsft.loss.corrections import SEQUENCE_MASKS
from wsft.rollouts.batch import Batch
from wsft.rollouts.decoder import CUT_OFF, NO_MEAN_ABOVE_0, REJECTED, REPAIRED

CORRECTED = ("token_masked", "icepop_masked", "capped", *(f"{kind}_masked" for kind in (*SEQUENCE_MASKS, "off_policy")))

# name of a metric, or several -> description; `env_N`: one per environment
METRICS = {
    "step": "optimizer steps so far, including this one",
    "loss": "loss of the global batch, after the reduction",
    "grad_norm": "norm of the global gradient before clipping; null if not finite",
    "learning_rate": "of this step",
    "steps/not_finite": "steps of the run whose loss or gradient was not finite; they are skipped, three in a row end the run",
    "steps/without_signal": "steps of the run in which no token had a weight: nothing is updated",
    "tokens/trained": "trained tokens of the batch",
    "tokens/total": "all tokens of the batch",
    "tokens/per_second": "all tokens per second of the step",
    "advantage/mean advantage/std": "of trained tokens, as used in the objective",
    "score/mean score/std score/env_N/mean score/env_N/std": "of sequences with a score",
    "data/sequences": "in the batch",
    "data/rejected": "sequences left out as malformed",
    "data/repaired": "sequences trained without an invalid optional field",
    "data/truncated": "sequences truncated to max_token_len",
    "data/zero_weight_groups": "sequences of weight 0 with maxrl: alone in their group, or its mean score is not above 0",
    "data/cut_off": "sequences of weight 0 with mask_truncated: the sampler cut them off",
    "data/staleness data/staleness_max data/staleness/env_N": "optimizer steps since the weights that sampled, of trained "
    "tokens whose version is known: mean, maximum, mean of each environment",
    "data/no_version": "trained tokens whose version is unknown",
    "data/stale": "trained tokens of weight 0 since they are older than max_staleness",
    "data/no_behavior_sequences": "sequences without a behavior logp on any trained token: no sequence_mask touches them",
    "data/no_behavior_logp data/no_ref_logp data/no_teacher": "trained tokens without this field",
    "data/possibly_lost_batches": "batches of the run that may have been lost between server and trainer",
    "logp/positive logp/negative": "mean logp of trained tokens with positive and with negative advantage",
    "entropy": "entropy of the model's distribution over the vocabulary, in nats",
    "weight/mean weight/mean_abs": "weights of trained tokens from the objective",
    "ratio/mean ratio/max ratio/clipped": "exp(logp - behavior logp), and the share that the objective clips, over tokens that "
    "were run and have a behavior logp",
    "ratio/ess": "effective sample size of these ratios, as a share of their number",
    " ".join(f"mismatch/{kind}" for kind in CORRECTED): "share of tokens that each correction masks or caps, over those that "
    "were run, have a behavior logp and no override",
    "mismatch/ess": "effective sample size of the factors of all corrections",
    "kl/behavior_k1 kl/behavior_k3": "estimates of the KL divergence from the sampling policy",
    "kl/reference": "k3 estimate of the KL divergence from the reference, with kl_coef",
    "kl/teacher": "KL divergence from the teacher, with distill_coef",
    "plan/micro_batches": "forward passes of each rank",
    "plan/padding": "share of padding in the rows",
    "plan/imbalance": "share of the ranks' time spent waiting for the slowest of each micro-batch, by estimated cost",
    "plan/shared": "share of tokens that are not computed again, since they are in a shared prefix",
    "plan/skipped": "rollouts that are skipped, since all their tokens have weight 0",
    "time/step time/wait": "seconds of the step, and the part spent waiting for its batch",
    "time/at": "Unix time at which the line was written",
    "run/starts": "starts of the run that have written lines, including this one",
    "compute/tflops_per_rank compute/mfu": "6 FLOPs per parameter and computed token, plus attention; as a share of the GPU's "
    "peak, if known",
    "memory/peak_gib": "peak since the last step, of the rank with the highest: GPU tensors, or else the process",
    "journal/gib": "size of the fetched batches kept on disk",
    "eval/loss": "of the sequences in eval_data, as one batch, by the objective alone",
    "eval/logp_positive eval/logp_negative": "mean logp of their tokens with positive and with negative advantage",
    "eval/seconds": "time of the evaluation",
    "publish/version": "step of the weights published after this step",
    "publish/seconds": "time to publish them",
    "publish/gib": "size of the published tensors",
    "publish/pause_seconds": "time for which a server was paused, the longest",
    "publish/difference_mean publish/difference_max": "|server - trainer| of logprobs of fixed texts, in nats",
    "publish/rounding_lost": "with LoRA: share of what adapters add to the published weights that rounding takes away",
    "publish/difference_base": "with adapters: mean |server - trainer without its adapter|, of sampled tokens",
    "publish/cache_difference": "mean |sampled - in a prompt| of a server's logprobs behind a repeated prompt, in nats",
}


def of_batch(batch: Batch, step: int) -> dict[str, float | int]:
    """Metrics of the batch that is trained after `step` optimizer steps."""
    advantages, rejected = batch.advantages[batch.loss_mask], batch.rejected
    age, row = step - batch.weight_versions[batch.loss_mask], np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    env_ids, row = batch.env_ids[row[batch.loss_mask]], row[batch.loss_mask]  # of each trained token
    dated, sampled = ~np.isnan(age), ~np.isnan(batch.behavior_logp[batch.loss_mask])
    values = {
        "tokens/trained": batch.num_trained,
        "tokens/total": len(batch.tokens),
        "advantage/mean": _mean(advantages),
        "advantage/std": _std(advantages),
        "data/sequences": len(batch.lengths),
        "data/rejected": sum(n for reason, n in rejected.items() if reason in REJECTED),
        "data/truncated": rejected.get("truncated to max_token_len", 0),
        "data/repaired": sum(n for reason, n in rejected.items() if reason in REPAIRED[1:]),
        "data/zero_weight_groups": rejected.get(NO_MEAN_ABOVE_0, 0),
        "data/cut_off": rejected.get(CUT_OFF, 0),
        "data/staleness": _mean(age[dated]),
        "data/staleness_max": float(age[dated].max(initial=0)) if dated.any() else math.nan,
        "data/no_version": int((~dated).sum()),
        "data/no_behavior_logp": int((~sampled).sum()),
        "data/no_behavior_sequences": int((np.bincount(row) > 0).sum() - (np.bincount(row[sampled]) > 0).sum()),
    }
    scored = np.isfinite(batch.scores)
    of_envs = {f"env_{i}/": scored & (batch.env_ids == i) for i in np.unique(batch.env_ids) if i >= 0}
    values |= {f"data/staleness/env_{i}": _mean(age[dated & (env_ids == i)]) for i in np.unique(batch.env_ids) if i >= 0}
    for name, chosen in ({"": scored} | of_envs).items():
        values |= {f"score/{name}mean": _mean(batch.scores[chosen]), f"score/{name}std": _std(batch.scores[chosen])}
    return values


def of_tokens(sums: dict[str, float], maxima: dict[str, float], trained: int) -> dict[str, float | int]:
    """Metrics of trained tokens, from `terms.TokenTerms.sums` over those that were run. The rest of `trained` has weight 0."""

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
        "ratio/ess": _effective_share(sums["ratio"], sums["ratio_squared"], known),
        "ratio/max": maxima["ratio"] if known else math.nan,
        "ratio/clipped": mean("clipped", "behavior"),
        "kl/behavior_k1": mean("k1", "behavior"),
        "kl/behavior_k3": mean("k3", "behavior"),
    }
    if "corrected" in sums:
        values["mismatch/ess"] = _effective_share(sums["factor"], sums["factor_squared"], sums["corrected"])
        values |= {f"mismatch/{kind}": mean(kind, "corrected") for kind in CORRECTED if kind in sums}
    if "reference" in sums:
        values["kl/reference"] = mean("kl_reference", "reference")
        values["data/no_ref_logp"] = int(sums["tokens"] - sums["reference"])
    if "teacher" in sums:
        values["kl/teacher"] = mean("divergence", "teacher")
        values["data/no_teacher"] = int(sums["tokens"] - sums["teacher"])
    return values


def of_plan(assignment: list[list[list[int]]], load: Load, packed: bool) -> dict[str, float | int]:
    """Metrics of the assignment to ranks, see load_balancing.py."""
    micro_batches = [rows for of_rank in assignment for rows in of_rank if rows]
    all_tokens, run = sum(int(load.lengths[rows].sum()) for rows in micro_batches), sum(map(load.tokens, micro_batches))
    room = run if packed else sum(len(rows) * int(load.lengths[rows].max()) for rows in micro_batches)
    return {
        "plan/micro_batches": len(assignment[0]),
        "plan/padding": 1 - run / room if room else 0.0,
        "plan/imbalance": imbalance(assignment, load),
        "plan/shared": 1 - run / all_tokens if all_tokens else 0.0,
        "plan/skipped": len(load.lengths) - sum(map(len, micro_batches)),
    }


def of_speed(tokens: int, flops: float, spent: float, wait: float, num_ranks: int, rated: float | None) -> dict[str, float]:
    """Speed of a step of `spent` seconds, `wait` of them for its batch. `flops` is over all ranks. MFU is their share of the
    GPUs' peak over the whole step, and left out if the peak is unknown."""
    per_rank = flops / spent / num_ranks
    values = {"time/step": spent, "time/wait": wait, "tokens/per_second": tokens / spent}
    values["compute/tflops_per_rank"] = per_rank / 1e12
    return values | ({"compute/mfu": per_rank / rated} if rated else {})


def missing(batch: Batch, needs_behavior: bool, has_reference: bool = False) -> dict[str, str]:
    """Fields that the loss needs and no trained token of the batch has: name -> what is done without it. `has_reference`:
    whether a model gives the logprobs that ref_logprobs lacks."""
    if not batch.num_trained:
        return {}
    free = batch.loss_mask & (np.repeat(batch.overrides, batch.lengths) == Override.NONE)
    absent = {}
    if needs_behavior and free.any() and np.isnan(batch.behavior_logp[free]).all():
        absent["inference_logprobs"] = "every ratio is 1"
    if not has_reference and len(batch.ref_logp) and np.isnan(batch.ref_logp[batch.loss_mask]).all():
        absent["ref_logprobs"] = "there is no KL term"
    if len(batch.teacher_sizes) and not len(batch.teacher_ids):
        absent["distill_token_ids"] = "there is no distillation term"
    return absent


def _effective_share(total: float, squared: float, n: float) -> float:
    """Effective sample size of n weights as a share of n (Kish 1965); 1 if all are equal."""
    return total**2 / (n * squared) if n and squared else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _std(values: np.ndarray) -> float:
    """Population standard deviation."""
    return float(values.std()) if len(values) else math.nan
