"""Corrections for tokens that another policy sampled: a factor of each token's weight, under any objective.

rho = pi / mu, with pi the policy at the start of the batch (with one optimizer step per batch the current one), and mu the
sampler. No gradient flows through rho. Every mask looks at the original tokens, and all are multiplied. Statistics of a
sequence are over its trained tokens whose mu is known; a token without has rho 1, and is touched by factors of whole sequences
only. Pure functions of tensors; does not import torch.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from wsft.loss.objectives import LOG_RATIO_LIMIT, sum_of

if TYPE_CHECKING:
    from torch import Tensor

Bounds = tuple[float, float]

SEQUENCE_MASKS: dict[str, Bounds] = {  # kind -> the bounds by default
    "product": (0.5, 2.0),
    "geometric": (0.99, 1.01),
    "any_token": (1e-4, 100.0),
    "k3": (0.0, 0.01),
}


class Factors(NamedTuple):
    """What corrections make of N tokens."""

    factor_N: Tensor  # of the weight, in the dtype of the logps; 0 where masked
    masked_N: Tensor  # bool: by any mask
    hits: dict[str, Tensor]  # kind -> bool [N], where it masks or caps


@dataclass(frozen=True)
class Corrections:
    """Args:
    token_mask: weight 0 where rho is outside of these bounds.
    cap: min(rho, cap), truncated importance sampling (Yao et al. 2025).
    cap_level: "token", or "sequence": rho is the product over the sequence, for all of its tokens.
    icepop: rho, and 0 where it is outside of these bounds (IcePop, arXiv:2510.18855).
    sequence_mask: kind -> bounds. Weight 0 on all tokens of a sequence whose statistic is outside: `product` of rho,
        `geometric` mean of rho, `any_token`: the smallest and the largest rho, `k3`: mean of rho - 1 - log rho, which
        estimates KL(mu || pi).
    off_policy_mask: weight 0 where A < 0 and the mean of -log rho over the sequence is above it (arXiv:2512.02556, eq. 9).
    """

    token_mask: Bounds | None = None
    cap: float | None = None
    cap_level: str = "token"
    icepop: Bounds | None = None
    sequence_mask: dict[str, Bounds] = field(default_factory=dict)
    off_policy_mask: float | None = None

    def __bool__(self) -> bool:
        return self.reweighs or self.of_sequences or self.token_mask is not None

    @property
    def reweighs(self) -> bool:
        """Whether rho is a factor. Then the objective's own ratio must be to the policy at the start of the batch: a ratio to
        the sampler would count the mismatch twice."""
        return self.cap is not None or self.icepop is not None

    @property
    def of_sequences(self) -> bool:
        """Whether rho of whole sequences is needed for any of their tokens."""
        by_cap = self.cap is not None and self.cap_level == "sequence"
        return by_cap or bool(self.sequence_mask) or self.off_policy_mask is not None

    def __call__(self, log_rho_N: Tensor, known_N: Tensor, advantages_N: Tensor, sequence_N: Tensor) -> Factors:
        """Args:
        log_rho_N: log rho, of all tokens of whole sequences if `of_sequences`; 0 where mu is unknown.
        known_N: bool, whether mu is known.
        """
        log_rho_N = log_rho_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        rho_N, masks, capped = log_rho_N.exp(), {}, {}
        factor_N = log_rho_N.new_ones(len(log_rho_N))
        if self.token_mask:
            masks["token_masked"] = outside(rho_N, self.token_mask) & known_N
        if self.icepop:
            masks["icepop_masked"] = outside(rho_N, self.icepop) & known_N
            factor_N = rho_N
        if self.cap is not None:
            of_sequence = self.cap_level == "sequence"
            rho_N = product_of(log_rho_N, sequence_N) if of_sequence else rho_N
            capped["capped"] = (rho_N > self.cap) & (known_N | of_sequence)
            factor_N = rho_N.masked_fill(capped["capped"], self.cap)
        for kind, bounds in self.sequence_mask.items():
            masks[f"{kind}_masked"] = sequence_outside(kind, log_rho_N, known_N, sequence_N, bounds)
        if self.off_policy_mask is not None:
            masks["off_policy_masked"] = off_policy(log_rho_N, known_N, advantages_N, sequence_N, self.off_policy_mask)
        masked_N = functools.reduce(operator.or_, masks.values(), log_rho_N.new_zeros(len(log_rho_N), dtype=bool))
        return Factors(factor_N.masked_fill(masked_N, 0), masked_N, masks | capped)


NO_CORRECTIONS = Corrections()


def outside(values_N: Tensor, bounds: Bounds) -> Tensor:
    """Bool [N]; the bounds belong to the inside."""
    return (values_N < bounds[0]) | (values_N > bounds[1])


def product_of(log_rho_N: Tensor, sequence_N: Tensor) -> Tensor:
    """For each token the product of rho over its sequence, held within exp(+-20)."""
    return sum_of(log_rho_N, sequence_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_outside(kind: str, log_rho_N: Tensor, known_N: Tensor, sequence_N: Tensor, bounds: Bounds) -> Tensor:
    """Bool [N]: whether the statistic of the token's sequence is outside of the bounds. False for a sequence without a known
    mu."""
    count_N = sum_of(known_N.to(log_rho_N.dtype), sequence_N)
    if kind == "product":
        out_N = outside(product_of(log_rho_N, sequence_N), bounds)
    elif kind == "geometric":
        out_N = outside((sum_of(log_rho_N, sequence_N) / count_N).exp(), bounds)
    elif kind == "any_token":
        out_N = sum_of((outside(log_rho_N.exp(), bounds) & known_N).to(log_rho_N.dtype), sequence_N) > 0
    else:
        k3_N = log_rho_N.expm1() - log_rho_N
        out_N = outside(sum_of(k3_N, sequence_N) / count_N, bounds)
    return out_N & (count_N > 0)


def off_policy(log_rho_N: Tensor, known_N: Tensor, advantages_N: Tensor, sequence_N: Tensor, delta: float) -> Tensor:
    """Bool [N]: A < 0, and the mean of -log rho over the sequence is above delta."""
    count_N = sum_of(known_N.to(log_rho_N.dtype), sequence_N)
    return (advantages_N < 0) & (-sum_of(log_rho_N, sequence_N) > delta * count_N) & (count_N > 0)
