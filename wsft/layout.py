"""How sequences stand in a packed row, and which of them share what they begin with. Sizes only: no tokens, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How sequences stand in one packed row: as pieces, end to end.

    Attributes:
        lengths: tokens of each piece.
        after: for each piece the earlier one that comes before it in its sequence; -1 where it begins one.
    """

    lengths: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, lengths: list[int]) -> Layout:
        """Sequences that share nothing."""
        return cls(tuple(lengths), (-1,) * len(lengths))


@dataclass(frozen=True)
class Prefixes:
    """Which rollouts begin alike, and may share the piece in which they do.

    Attributes:
        clusters: [R] those with the same number share.
        lengths: [R] the tokens that all of the rollout's cluster share; 0 where it is alone.
    """

    clusters: np.ndarray
    lengths: np.ndarray

    @classmethod
    def none(cls, rollouts: int) -> Prefixes:
        return cls(np.arange(rollouts), np.zeros(rollouts, dtype=np.int64))
