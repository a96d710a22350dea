"""Advantages: from scores, normalised over a batch, overridden per sequence. NumPy float64; no torch, no HTTP.

The order is fixed: token-level advantages or scores -> `Shaping` over the global batch -> `override`. Overridden
sequences do not enter any statistic, and their values are final.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

EPS = 1e-8
# A standard deviation up to this share of the largest magnitude is rounding: rewards are mostly computed in float32, whose
# rounding error (6e-8) grows to about 1e-6 over a few operations. Dividing by it would give noise the weight of a preference.
RELATIVE_EPS = 1e-5
FROM_SCORES = ("group_norm", "group_center", "rloo", "maxrl", "raw")
NORMALIZATIONS = ("none", "batch", "batch_center")


class Override(IntEnum):
    """Overrides of a sequence's advantages, most of them from its Atropos record."""

    NONE = 0
    ZERO = 1  # set_advantage_to_zero
    SFT = 2  # advantage 1 on every trained token
    CUT_OFF = 3  # by the sampler, with mask_truncated: as ZERO, and left out of the reduction's denominator


ZEROS = (Override.ZERO, Override.CUT_OFF)


def from_scores(scores: np.ndarray, counted: np.ndarray, method: str) -> np.ndarray:
    """One advantage per sequence of an item, from its scores.

    group_norm is (s - mean) / max(population std, 1e-8), as in GRPO (Shao et al. 2024, arXiv:2402.03300), and 0 where the std
    is rounding (`RELATIVE_EPS`); group_center is s - mean, as in Dr. GRPO (Liu et al. 2025, arXiv:2503.20783); rloo is s - mean
    of the others, which is s - mean times n / (n - 1) (Ahmadian et al. 2024, arXiv:2402.14740); maxrl is (s - mean) / mean, for
    scores of 0 and 1, and 0 where the mean is not above 0 (arXiv:2602.02710); raw is s. An item of one sequence keeps its
    score, but with maxrl its advantage is 0.

    The score of a sequence that is rejected, truncated or fully masked still counts: it was sampled for the same prompt, and a
    baseline over trained sequences only would depend on why the others are not trained.

    Args:
        scores: [S] float64, one per sequence of the item.
        counted: [S] bool, the sequences that enter mean and standard deviation: finite scores, no override.
    Returns:
        [S] float64; undefined where the score is not finite.
    """
    if method == "maxrl" and not has_mean_above_0(scores, counted):
        return 0.0 * scores  # NaN stays
    if method == "raw" or len(scores) == 1 or not counted.any():
        return scores
    centred, n = _centred(scores, counted), int(counted.sum())
    match method:
        case "group_norm":
            return _scaled(centred, scores, counted)
        case "rloo":
            return centred * n / max(n - 1, 1)
        case "group_center":
            return centred
        case "maxrl":
            return centred / scores[counted].mean()
    raise ValueError(f"score_advantages is {method!r}; expected one of {', '.join(FROM_SCORES)}")


def has_mean_above_0(scores: np.ndarray, counted: np.ndarray) -> bool:
    """Whether maxrl gives an item advantages: more than one sequence, and a mean score above 0 by more than rounding."""
    if len(scores) == 1 or not counted.any():
        return False
    return bool(scores[counted].mean() > RELATIVE_EPS * np.abs(scores[counted]).max())


@dataclass(frozen=True)
class Shaping:
    """How the advantages of a global batch are transformed, in this order.

    Args:
        normalization: "batch" shifts and scales them so that those of the counted tokens have mean 0 and population standard
            deviation 1 (divided by at least 1e-8; 0 where it is rounding, see `RELATIVE_EPS`); "batch_center" shifts only.
        clip: then they are clipped to [-clip, clip].
        negative_scale: then negative ones are multiplied by it; 0 leaves positive advantages only.
    """

    normalization: str = "none"
    clip: float | None = None
    negative_scale: float = 1.0

    def apply(self, advantages: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """Transform advantages [N]; the statistics are those of the `counted` ones, [N] bool."""
        if self.normalization != "none" and counted.any():
            centred = _centred(advantages, counted)
            advantages = _scaled(centred, advantages, counted) if self.normalization == "batch" else centred
        if self.clip is not None:
            advantages = advantages.clip(-self.clip, self.clip)
        return np.where(advantages < 0, self.negative_scale * advantages, advantages)


def _centred(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Values [N] minus the mean of the counted ones, computed after subtracting one of them from all.

    So equal values give exactly 0. A plain mean has a rounding error, which for values above 1e8 exceeds EPS: divided by a
    standard deviation that is rounding, too, it would become an advantage of 1.
    """
    shifted = values - values[counted][0]
    return shifted - shifted[counted].mean()


def _scaled(centred: np.ndarray, values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Centred values [N] divided by the population standard deviation of the counted ones."""
    deviation = centred[counted].std()
    if deviation <= RELATIVE_EPS * np.abs(values[counted]).max():
        return 0.0 * centred  # NaN stays: the score is not finite
    return centred / max(deviation, EPS)


def override(advantages: np.ndarray, overrides: np.ndarray) -> np.ndarray:
    """Advantages [N] with each token's `Override` [N] applied."""
    return np.select([np.isin(overrides, ZEROS), overrides == Override.SFT], [0.0, 1.0], advantages)
