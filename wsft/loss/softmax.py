"""The softmax over a block of logits, in place, and its derivative. Used by the chunked head (head.py).

Letters: R rows of a block, V vocabulary, J entries of a row that are needed (the target, entries of a teacher).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from wsft.device import can_compile


class LogitShape(NamedTuple):
    """The operations between the products hidden @ lm_head.T + bias and the softmax."""

    temperature: float | torch.Tensor  # one number, or [N]
    scale: float
    softcap: float | None

    def of_rows(self, rows: slice) -> LogitShape:
        if not isinstance(self.temperature, torch.Tensor):
            return self
        # a copy: compiled functions would be specialized to a view of a tensor of as many rows, and compiled again for others
        return self._replace(temperature=self.temperature[rows, None].clone())

    @property
    def logit_scale(self) -> float | torch.Tensor:
        return self.scale / self.temperature

    def apply_(self, z: torch.Tensor) -> torch.Tensor:
        """Apply them to products [R, any], in place."""
        if self.softcap is None:
            return z.mul_(self.logit_scale)
        return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def derivative(self, z: torch.Tensor) -> torch.Tensor | float:
        """Derivative of the result of `apply_` with respect to the products."""
        return self.logit_scale * (1 - (z * self.temperature / self.softcap).square()) if self.softcap else self.logit_scale


class Softmax(NamedTuple):
    """Of R rows of logits, overwritten with exp(z - max z), and of J of their entries."""

    exp_RV: torch.Tensor
    peak_R1: torch.Tensor  # max z
    total_R1: torch.Tensor  # the sum of exp
    mean_z_R1: torch.Tensor  # of z - max z
    z_RJ: torch.Tensor  # - max z
    logp_RJ: torch.Tensor

    @classmethod
    def of_(cls, logits_RV: torch.Tensor, ids_RJ: torch.Tensor, shape: LogitShape) -> Softmax:
        exact = torch.promote_types(logits_RV.dtype, torch.float32)
        z_RJ = shape.apply_(logits_RV.gather(1, ids_RJ).to(exact))
        peak_R1, total_R1, mean_z_R1 = _fused(_exponentiate_, logits_RV)(logits_RV, shape)
        z_RJ -= peak_R1
        return cls(logits_RV, peak_R1, total_R1, mean_z_R1, z_RJ, z_RJ - total_R1.log())


def _exponentiate_(logits_RV: torch.Tensor, shape: LogitShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Overwrites logits with exp(z - max z). Returns max z, the sum of exp, and the mean of z - max z, [R, 1] each."""
    z = shape.apply_(logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)))
    peak_R1 = z.amax(1, keepdim=True)
    exp = z.sub_(peak_R1).exp()
    total_R1 = exp.sum(1, keepdim=True)
    mean_z_R1 = z.mul_(exp).sum(1, keepdim=True) / total_R1
    logits_RV.copy_(exp)
    return peak_R1, total_R1, mean_z_R1


def differentiate_(
    softmax: Softmax,
    ids_RJ: torch.Tensor,
    mass_R1: torch.Tensor,
    onehot_RJ: torch.Tensor,
    bonus_R1: torch.Tensor | None,
    shape: LogitShape,
) -> None:
    """Overwrites exp with derivative * (p * (mass + bonus * z) - onehot), where onehot is nonzero at `ids`.

    The entries at `ids` are written directly: subtracting 1 from p in the buffer's type would lose precision.
    """
    exp_RV, peak_R1, total_R1, _, z_RJ, logp_RJ = softmax
    at_ids_RJ = logp_RJ.exp() * (mass_R1 if bonus_R1 is None else mass_R1 + bonus_R1 * z_RJ) - onehot_RJ
    bonus = None if bonus_R1 is None else bonus_R1 / total_R1
    _fused(_spread_, exp_RV)(exp_RV, mass_R1 / total_R1, bonus, peak_R1, shape)
    exp_RV.scatter_(1, ids_RJ, (shape.derivative(z_RJ + peak_R1) * at_ids_RJ).to(exp_RV.dtype))


def _spread_(
    exp_RV: torch.Tensor, mass_R1: torch.Tensor, bonus_R1: torch.Tensor | None, peak_R1: torch.Tensor, shape: LogitShape
) -> None:
    """Overwrites exp with derivative * exp * (mass + bonus * z)."""
    if bonus_R1 is None and shape.softcap is None:
        exp_RV.mul_(shape.logit_scale * mass_R1)
        return
    exp = exp_RV.to(mass_R1.dtype)
    z = exp.clamp_min(torch.finfo(exp.dtype).tiny).log_()
    exp = exp * (mass_R1 if bonus_R1 is None else mass_R1 + bonus_R1 * z)
    exp_RV.copy_(exp.mul_(shape.derivative(z + peak_R1)))


_compiled = functools.cache(functools.partial(torch.compile, dynamic=True))


def _fused(function: Callable, like: torch.Tensor) -> Callable:
    """The function, compiled to one kernel if the device of `like` can."""
    return _compiled(function) if can_compile(like.device) else function


def sum_of_equal_ids(ids_RJ: torch.Tensor, values_RJ: torch.Tensor) -> torch.Tensor:
    """Replace each entry by the sum over the entries of its row with the same id."""
    pairs = zip(ids_RJ.split(1, dim=1), values_RJ.split(1, dim=1), strict=True)
    return sum((ids_RJ == id_R1) * value_R1 for id_R1, value_R1 in pairs)
