"""The softmax over a block of logits, and its derivative, in place. Used by the chunked head (head.py).

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

    def apply(self, products: torch.Tensor) -> torch.Tensor:
        """z of products [R, any], in float32 or a larger type; the products themselves if they are that."""
        z, factor = products.to(_exact(products)), self.logit_scale
        if self.softcap is None:
            return z if isinstance(factor, float) and factor == 1 else z * factor
        return (z * (self.scale / self.softcap)).tanh_().mul_(self.softcap / self.temperature)

    def derivative(self, z: torch.Tensor) -> torch.Tensor | float:
        """Derivative of the result of `apply` with respect to the products."""
        return self.logit_scale * (1 - (z * self.temperature / self.softcap).square()) if self.softcap else self.logit_scale


class Softmax(NamedTuple):
    """Of R rows of logits z, and of J of their entries."""

    peak_R1: torch.Tensor  # max z
    total_R1: torch.Tensor  # the sum of exp(z - max z)
    mean_z_R1: torch.Tensor  # of z - max z
    z_RJ: torch.Tensor  # - max z
    logp_RJ: torch.Tensor

    @classmethod
    def of(cls, products_RV: torch.Tensor, ids_RJ: torch.Tensor, shape: LogitShape) -> Softmax:
        z_RJ = shape.apply(products_RV.gather(1, ids_RJ))
        peak_R1, total_R1, mean_z_R1 = _fused(_statistics, products_RV)(products_RV, shape)
        z_RJ -= peak_R1
        return cls(peak_R1, total_R1, mean_z_R1, z_RJ, z_RJ - total_R1.log())


def _exact(like: torch.Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _statistics(products_RV: torch.Tensor, shape: LogitShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """max z, the sum of exp(z - max z), and the mean of z - max z, [R, 1] each."""
    z = shape.apply(products_RV)
    peak_R1 = z.amax(1, keepdim=True)
    z = z - peak_R1
    exp = z.exp()
    total_R1 = exp.sum(1, keepdim=True)
    return peak_R1, total_R1, z.mul_(exp).sum(1, keepdim=True) / total_R1


class Factors(NamedTuple):
    """Of the gradient of R losses with respect to z: p * (mass + bonus * (z - mean z)) - onehot."""

    ids_RJ: torch.Tensor  # where onehot is not 0
    onehot_RJ: torch.Tensor
    mass_R1: torch.Tensor
    bonus_R1: torch.Tensor | None


def differentiate_(products_RV: torch.Tensor, softmax: Softmax, factors: Factors, shape: LogitShape) -> None:
    """Overwrites products with the gradient with respect to them."""
    peak_R1, total_R1, mean_z_R1, *_ = softmax
    # quotients are copies of what may be views, see LogitShape.of_rows
    bonus = None if factors.bonus_R1 is None else factors.bonus_R1 / total_R1
    _fused(_spread_, products_RV)(products_RV, peak_R1, mean_z_R1, factors.mass_R1 / total_R1, bonus, shape)
    write_at_ids_(products_RV, softmax, factors, shape)


def write_at_ids_(gradient_RV: torch.Tensor, softmax: Softmax, factors: Factors, shape: LogitShape) -> None:
    """Write the entries where onehot is not 0. Subtracting it from p in the type of the gradient would lose precision."""
    peak_R1, _, mean_z_R1, z_RJ, logp_RJ = softmax
    ids_RJ, onehot_RJ, mass_R1, bonus_R1 = factors
    factor_RJ = mass_R1 if bonus_R1 is None else mass_R1 + bonus_R1 * (z_RJ - mean_z_R1)
    at_ids_RJ = shape.derivative(z_RJ + peak_R1) * (logp_RJ.exp() * factor_RJ - onehot_RJ)
    gradient_RV.scatter_(1, ids_RJ, at_ids_RJ.to(gradient_RV.dtype))


def _spread_(
    products_RV: torch.Tensor,
    peak_R1: torch.Tensor,
    mean_z_R1: torch.Tensor,
    mass_R1: torch.Tensor,
    bonus_R1: torch.Tensor | None,
    shape: LogitShape,
) -> None:
    """Overwrites products with derivative * exp(z - max z) * (mass + bonus * (z - mean z))."""
    z = shape.apply(products_RV)
    factor, derivative = mass_R1, shape.derivative(z)
    z = z.sub_(peak_R1)  # may overwrite products
    if bonus_R1 is not None:
        factor = factor + bonus_R1 * (z - mean_z_R1)
    products_RV.copy_(z.exp_().mul_(factor * derivative))


_compiled = functools.cache(functools.partial(torch.compile, dynamic=True))


def _fused(function: Callable, like: torch.Tensor) -> Callable:
    """The function, compiled to one kernel if the device of `like` can."""
    return _compiled(function) if can_compile(like.device) else function


def sum_of_equal_ids(ids_RJ: torch.Tensor, values_RJ: torch.Tensor) -> torch.Tensor:
    """Replace each entry by the sum over the entries of its row with the same id."""
    pairs = zip(ids_RJ.split(1, dim=1), values_RJ.split(1, dim=1), strict=True)
    return sum((ids_RJ == id_R1) * value_R1 for id_R1, value_R1 in pairs)
