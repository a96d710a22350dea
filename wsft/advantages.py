"""Advantages: from scores, normalised over a batch, overridden per sequence. NumPy float64; no torch, no HTTP.

The order is fixed: token-level advantages or scores -> `normalize` over the global batch -> `override`. An overridden
sequence stays out of every statistic, and what an override says is final.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

EPS = 1e-8


class Override(IntEnum):
    """What an Atropos record may say of one sequence's advantages."""

    NONE = 0
    ZERO = 1  # set_advantage_to_zero
    SFT = 2  # advantage 1 on every trained token


def from_scores(scores: np.ndarray, counted: np.ndarray, method: str) -> np.ndarray:
    """One advantage per sequence of an item, from its scores.

    group_norm is (s - mean) / max(population std, 1e-8), as in GRPO (Shao et al. 2024, arXiv:2402.03300); group_center is
    s - mean, as in Dr. GRPO (Liu et al. 2025, arXiv:2503.20783); raw is s. An item of one sequence keeps its score.

    Args:
        scores: [S] float64, one per sequence of the item.
        counted: [S] bool, the sequences that enter mean and deviation: finite scores, no override.
    Returns:
        [S] float64; meaningless where the score itself is not finite.
    """
    if method == "raw" or len(scores) == 1 or not counted.any():
        return scores
    centred = _centred(scores, counted)
    return centred if method == "group_center" else centred / max(centred[counted].std(), EPS)


def normalize(advantages: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Advantages [N] shifted and scaled so that the counted tokens have mean 0 and population deviation 1 (eps 1e-8)."""
    if not counted.any():
        return advantages
    centred = _centred(advantages, counted)
    return centred / max(centred[counted].std(), EPS)


def _centred(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Values [N] minus the mean of the counted ones, after one of them is taken from all.

    So equal values give 0 at any size. The plain mean of many is off by a rounding, which for values beyond 1e8 exceeds
    EPS: divided by a deviation that is nothing else, it would become an advantage of 1.
    """
    shifted = values - values[counted][0]
    return shifted - shifted[counted].mean()


def override(advantages: np.ndarray, overrides: np.ndarray) -> np.ndarray:
    """Advantages [N] with each token's `Override` [N] applied."""
    return np.select([overrides == Override.ZERO, overrides == Override.SFT], [0.0, 1.0], advantages)
