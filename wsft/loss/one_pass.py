"""The gradient of the logits in one Triton kernel: each row is read from memory once and written once (softmax.py: read twice).

For losses whose weights do not depend on the logp that it computes. One program runs over a row twice, and the second time
finds it in the GPU's L2 cache: 132 rows of 131,072 entries in bf16 are 33 MiB. Needs triton. Used on GPUs of
`head.ONE_PASS_ON`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wsft.loss.softmax import Factors, LogitShape, Softmax, write_at_ids_

BLOCK, WARPS = 8192, 16  # entries of a row at a time


def differentiate_(products_RV: torch.Tensor, factors: Factors, shape: LogitShape) -> Softmax:
    """The softmax of products in float32 or a smaller type, which are overwritten as by `softmax.differentiate_`."""
    (R, V), (ids_RJ, _, mass_R1, bonus_R1) = products_RV.shape, factors
    z_RJ = shape.apply(products_RV.gather(1, ids_RJ))
    # z = outer * (tanh(inner * product) or product)
    inner = shape.scale / shape.softcap if shape.softcap else 1.0
    outer_R = (torch.ones_like(mass_R1) * ((shape.softcap or shape.scale) / shape.temperature)).squeeze(1)
    found_3R = torch.empty(3, R, dtype=torch.float32, device=products_RV.device)
    mass_R, bonus_R = mass_R1.squeeze(1), (mass_R1 if bonus_R1 is None else bonus_R1).squeeze(1)
    options = {"HAS_BONUS": bonus_R1 is not None, "HAS_CAP": bool(shape.softcap), "BLOCK": BLOCK, "num_warps": WARPS}
    _kernel[(R,)](products_RV, products_RV.stride(0), outer_R, mass_R, bonus_R, found_3R, R, V, inner, **options)
    peak_R1, total_R1, mean_z_R1 = found_3R.unsqueeze(2)
    z_RJ -= peak_R1
    softmax = Softmax(peak_R1, total_R1, mean_z_R1, z_RJ, z_RJ - total_R1.log())
    write_at_ids_(products_RV, softmax, factors, shape)
    return softmax


@triton.jit
def _z(row, columns, V, outer, inner, HAS_CAP: tl.constexpr):
    """z of a block of a row, and its derivative with respect to the products; 0 beyond the row."""
    z = tl.load(row + columns, mask=columns < V, other=0.0).to(tl.float32)
    derivative = outer
    if HAS_CAP:
        z = 2 * tl.sigmoid(2 * inner * z) - 1  # tanh
        derivative = outer * inner * (1 - z * z)
    return z * outer, derivative


@triton.jit
def _kernel(
    products, stride, outers, masses, bonuses, found, R, V, inner,
    HAS_BONUS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites a row of products with its gradient, and its column of found [3, R] with max z, the sum of exp(z - max z), and
    the mean of z - max z."""
    index = tl.program_id(0)
    row = products + index.to(tl.int64) * stride
    outer, mass, bonus = tl.load(outers + index), tl.load(masses + index), tl.load(bonuses + index)
    # sums over the blocks so far, relative to their maximum (Milakov and Gimelshein 2018, arXiv:1805.02867)
    peak, total, sum_z = tl.full((), -1e38, tl.float32), tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _ = _z(row, columns, V, outer, inner, HAS_CAP)
        higher = tl.maximum(peak, tl.max(tl.where(columns < V, z, -1e38), 0))
        exp = tl.where(columns < V, tl.exp(z - higher), 0.0)
        shrink = tl.exp(peak - higher)
        sum_z = shrink * (sum_z + (peak - higher) * total) + tl.sum(exp * (z - higher), 0)
        total = shrink * total + tl.sum(exp, 0)
        peak = higher
    mean_z = sum_z / total
    tl.store(found + index, peak)
    tl.store(found + R + index, total)
    tl.store(found + 2 * R + index, mean_z)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, derivative = _z(row, columns, V, outer, inner, HAS_CAP)
        factor = mass
        if HAS_BONUS:
            factor = mass + bonus * (z - peak - mean_z)
        gradient = tl.exp(z - peak) / total * factor * derivative
        tl.store(row + columns, gradient.to(products.dtype.element_ty), mask=columns < V)
