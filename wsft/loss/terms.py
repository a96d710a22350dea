"""The terms of the loss of one micro-batch: the objective, KL to a reference, entropy, distillation from a teacher.

    loss = sum_n scale_n * (weight_n * -logp_n  +  kl_coef * k3_n  -  entropy_coef * entropy_n  +  distill_coef * divergence_n)

The head (head.py) evaluates them a chunk at a time; `sums` then gives the sums behind the metrics. Knows nothing of batches or
ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from wsft.device import Movable
from wsft.loss.corrections import NO_CORRECTIONS, Corrections, Factors
from wsft.loss.head import HeadOutput, Teacher
from wsft.loss.objectives import LOG_RATIO_LIMIT, Objective


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of the terms other than the objective."""

    kl: float = 0.0
    entropy: float = 0.0
    distill: float = 0.0
    renormalize: bool = False  # normalize the probabilities of the teacher's entries to sum to 1

    @property
    def concern_every_token(self) -> bool:
        """Whether tokens without a weight of the objective may add to the loss."""
        return bool(self.kl or self.entropy or self.distill)


@dataclass(frozen=True)
class LossSettings:
    """What a run's loss is, for all its tokens.

    Args:
        temperature: of rollouts without their own.
    """

    objective: Objective
    coefficients: Coefficients = Coefficients()
    temperature: float = 1.0
    corrections: Corrections = NO_CORRECTIONS


@dataclass(frozen=True)
class TokenTerms(Movable):
    """Inputs of the loss for N trained tokens, float32 unless noted, on one device. NaN means unknown."""

    objective: Objective
    coefficients: Coefficients
    scale_N: torch.Tensor  # of the reduction: factor of all terms of a token
    advantages_N: torch.Tensor
    behavior_logp_N: torch.Tensor  # NaN: ratio 1
    fixed_weights_N: torch.Tensor  # weight set by the record (an override); NaN where the objective gives it
    temperature_N: torch.Tensor
    sequence_N: torch.Tensor  # int64: index of the token's sequence, from 0 without gaps
    ref_logp_N: torch.Tensor | None = None  # NaN: no KL term
    teacher_ids_NK: torch.Tensor | None = None  # int64
    teacher_probs_NK: torch.Tensor | None = None
    corrections: Corrections = NO_CORRECTIONS
    prox_logp_N: torch.Tensor | None = None  # of the policy at the start of the batch; None: the current one
    stale_N: torch.Tensor | None = None  # bool: too old, weight 0

    @property
    def of_sequences(self) -> bool:
        return self.objective.of_sequences or (self.corrections.of_sequences and self.prox_logp_N is None)

    @functools.cached_property
    def weights_N(self) -> torch.Tensor | None:
        """Weights with the factor of the reduction, where they do not depend on logp."""
        if not self.objective.is_constant or self.coefficients.kl or self.corrections:
            return None
        return self(torch.zeros_like(self.scale_N), slice(None))[1]

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, -d loss / d logp) of some tokens, see `head.TokenLoss`."""
        weights, _ = self.weigh(logp, rows)
        loss = weights * -logp
        if self.coefficients.kl:
            log_ratio = self._to_reference(logp, rows)
            loss = loss + self.coefficients.kl * _k3(log_ratio)
            weights = weights + self.coefficients.kl * log_ratio.expm1()  # -d k3 / d logp
        scale = self.scale_N[rows].to(logp.dtype)
        return scale * loss, scale * weights

    def weigh(self, logp: torch.Tensor, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, whether it is clipped) of some tokens, before the factor of the reduction."""
        behavior, advantages = (x[rows].to(logp.dtype) for x in (self.behavior_logp_N, self.advantages_N))
        if self.prox_logp_N is not None:
            prox = self.prox_logp_N[rows].to(logp.dtype)
            behavior = prox if self.corrections.reweighs else behavior.where(~behavior.isnan(), prox)
        elif self.corrections.reweighs:
            behavior = logp
        weights, clipped = self.objective(logp, behavior, advantages, self.sequence_N[rows])
        if self.corrections:
            factors = self.factors(logp, rows)
            weights = (weights * factors.factor_N).masked_fill(factors.masked_N, 0)
        if self.stale_N is not None:
            weights = weights.masked_fill(self.stale_N[rows], 0)
        fixed = self.fixed_weights_N[rows].to(logp.dtype)
        return torch.where(fixed.isnan(), weights, fixed), clipped & fixed.isnan()

    def factors(self, logp: torch.Tensor, rows: slice = slice(None)) -> Factors:
        """What the corrections make of some tokens."""
        if self.prox_logp_N is not None:
            factor_N, masked_N, hits = self._proximal_factors
            return Factors(factor_N[rows].to(logp.dtype), masked_N[rows], {kind: hit[rows] for kind, hit in hits.items()})
        behavior, advantages, sequence = self.behavior_logp_N[rows], self.advantages_N[rows], self.sequence_N[rows]
        return self._correct(logp.detach(), behavior.to(logp.dtype), advantages, sequence)

    @functools.cached_property
    def _proximal_factors(self) -> Factors:
        """Of all tokens, which are known before the step."""
        return self._correct(self.prox_logp_N, self.behavior_logp_N, self.advantages_N, self.sequence_N)

    def _correct(self, logp: torch.Tensor, behavior: torch.Tensor, advantages: torch.Tensor, sequence: torch.Tensor) -> Factors:
        known = ~behavior.isnan()
        return self.corrections((logp - behavior).masked_fill(~known, 0), known, advantages, sequence)

    def head_options(self) -> dict[str, torch.Tensor | Teacher | None]:
        """The head's other arguments."""
        entropy, distill = self.coefficients.entropy, self.coefficients.distill
        teacher = None
        if distill and self.teacher_ids_NK is not None:
            teacher = Teacher(self.teacher_ids_NK, self.teacher_probs_NK, distill * self.scale_N)
        bonus_N = entropy * self.scale_N if entropy else None
        return {"temperature": self.temperature_N, "entropy_weights_N": bonus_N, "teacher": teacher}

    def sums(self, out: HeadOutput) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums and maxima over the tokens, float64 scalars: for each mean its sum and its count."""
        logp_N, N = out.logp_N, len(out.logp_N)
        weights_N, clipped_N = self.weigh(logp_N)
        advantages_N, known_N = self.advantages_N, ~self.behavior_logp_N.isnan()
        log_ratio_N = (logp_N - self.behavior_logp_N.where(known_N, logp_N)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio_N = log_ratio_N.exp()
        sums = {
            "tokens": torch.ones_like(logp_N),
            "positive": advantages_N > 0,
            "logp_positive": logp_N.where(advantages_N > 0, 0),
            "negative": advantages_N < 0,
            "logp_negative": logp_N.where(advantages_N < 0, 0),
            "entropy": out.entropy_N,
            "weight": weights_N,
            "weight_abs": weights_N.abs(),
            "behavior": known_N,
            "ratio": ratio_N * known_N,
            "ratio_squared": ratio_N.double() ** 2 * known_N,
            "clipped": clipped_N & known_N,
            "k1": -log_ratio_N,
            "k3": _k3(log_ratio_N),
        }
        if self.ref_logp_N is not None:
            sums |= {"reference": ~self.ref_logp_N.isnan(), "kl_reference": _k3(self._to_reference(logp_N, slice(None)))}
        if self.teacher_probs_NK is not None:
            sums |= {"teacher": self.teacher_probs_NK.sum(1) > 0, "divergence": out.divergence_N}
        if self.corrections:
            factor_N, _, hits = self.factors(logp_N)
            free_N = known_N & self.fixed_weights_N.isnan()
            sums |= {"corrected": free_N, "factor": factor_N * free_N, "factor_squared": factor_N**2 * free_N}
            sums |= {kind: hit_N & free_N for kind, hit_N in hits.items()}
        highest = ratio_N.where(known_N, 0).amax() if N else logp_N.new_zeros(())
        return {name: x.double().sum() for name, x in sums.items()}, {"ratio": highest.double()}

    def has_signal(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whether any token adds to the gradient, given the result of `sums`; also if a sum is NaN."""
        return sums["tokens" if self.coefficients.concern_every_token else "weight_abs"] != 0

    def _to_reference(self, logp: torch.Tensor, rows: slice) -> torch.Tensor:
        """log(reference / policy) of some tokens; 0 without a reference logp."""
        log_ratio = self.ref_logp_N[rows].to(logp.dtype) - logp
        return log_ratio.nan_to_num(0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """k3 = r - 1 - log r with r = q/p: an unbiased, non-negative estimate of KL(p || q) from samples of p (Schulman 2020,
    "Approximating KL divergence")."""
    return log_ratio.expm1() - log_ratio
