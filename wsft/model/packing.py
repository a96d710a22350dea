"""Packed rows: several sequences in one row, each of which attends to itself only. Sequences with a common prefix may share its
segment, which is computed once. Knows nothing of batches, models or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from wsft.device import Movable

MIN_SHARED_PREFIX = 8  # tokens; for shorter prefixes the overhead exceeds the saving


@dataclass(frozen=True)
class Layout:
    """The segments of a packed row, in order.

    Attributes:
        lengths: tokens of each segment.
        parents: for each segment, the index of the segment that precedes it in its sequence; -1 for the first of a sequence.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def of(cls, lengths: list[int]) -> Layout:
        """Sequences without shared prefixes."""
        return cls(tuple(lengths), (-1,) * len(lengths))


@dataclass(frozen=True)
class Prefixes:
    """Common prefixes of R sequences.

    Attributes:
        clusters: [R] int64, the same number for sequences that share a prefix.
        lengths: [R] int64, tokens of the prefix that the sequence's cluster shares; 0 if it shares none.
    """

    clusters: np.ndarray
    lengths: np.ndarray

    @classmethod
    def none(cls, sequences: int) -> Prefixes:
        return cls(np.arange(sequences), np.zeros(sequences, dtype=np.int64))

    @classmethod
    def of(cls, tokens_N: np.ndarray, loss_mask_N: np.ndarray, lengths_R: np.ndarray, rows: Iterable[int]) -> Prefixes:
        """Find common prefixes of neighbours among the sequences `rows`, such as those of one group.

        A shared prefix ends before the token that precedes the first trained one, whose hidden state each sequence needs for
        itself.
        """
        ends_R = np.cumsum(lengths_R)
        starts_R = ends_R - lengths_R
        trained_N = np.append(np.flatnonzero(loss_mask_N), len(loss_mask_N))
        firsts_R = trained_N[np.searchsorted(trained_N, starts_R)]  # its own, or that of a later sequence

        def common(i: int, k: int, limit: int) -> int:
            """Length of the common prefix of these sequences, at most `limit`."""
            ours, theirs = (tokens_N[start : start + limit] for start in starts_R[[i, k]])
            differ = np.flatnonzero(ours != theirs)
            return int(differ[0]) if len(differ) else limit

        found, cluster, shared = cls.none(len(lengths_R)), [], 0  # tokens that all of the cluster have in common
        for i in rows:
            own = int(min(firsts_R[i], ends_R[i]) - starts_R[i]) - 1
            n = common(cluster[0], i, min(shared, own)) if cluster else 0
            # else a template common to all prompts would join groups, and lose their longer common prompts
            needed = max(MIN_SHARED_PREFIX, (shared if len(cluster) > 1 else min(shared, own)) / 2)
            if cluster and n >= needed:
                cluster, shared = [*cluster, i], n
                found.clusters[i], found.lengths[cluster] = cluster[0], n
            else:
                cluster, shared = [i], own
        return found


@dataclass(frozen=True)
class VarlenMetadata(Movable):
    """A layout as a model takes it.

    Attributes:
        position_ids_1T: int64, of each token in its sequence.
        cu_seqlens_q, cu_seqlens_k: int32, cumulative lengths of the segments (queries) and of their sequences (keys), from 0.
        max_seqlen_q, max_seqlen_k: the longest of each, in tokens.
        key_indices: [keys] int64, the position in the row of each key; None if keys are the tokens of the row in order.
    """

    layout: Layout
    position_ids_1T: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_indices: torch.Tensor | None

    @classmethod
    def of(cls, layout: Layout) -> VarlenMetadata:
        """On the CPU."""
        lengths, parents = np.array(layout.lengths), np.array(layout.parents)
        prefixes = np.where(parents < 0, 0, lengths[parents])  # tokens of the sequence that are in the parent segment
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(starts[-1]) + np.repeat(prefixes - starts[:-1], lengths)
        whole, key_indices = lengths + prefixes, None
        k_starts = np.concatenate([[0], np.cumsum(whole)])
        if prefixes.any():
            # position of each key in its sequence: those below `prefixes` are in the parent segment, the others in their own
            in_sequence = np.arange(k_starts[-1]) - np.repeat(k_starts[:-1], whole)
            in_own = in_sequence + np.repeat(starts[:-1] - prefixes, whole)
            in_parent = in_sequence + np.repeat(starts[parents], whole)
            key_indices = torch.from_numpy(np.where(in_sequence < np.repeat(prefixes, whole), in_parent, in_own))
        cu_seqlens_q, cu_seqlens_k = (torch.from_numpy(x.astype(np.int32)) for x in (starts, k_starts))
        longest, position_ids_1T = int(lengths.max()), torch.from_numpy(positions).unsqueeze(0)
        return cls(layout, position_ids_1T, cu_seqlens_q, cu_seqlens_k, longest, int(whole.max()), key_indices)

    def kwargs(self) -> dict[str, object]:
        """Keyword arguments for a transformers model: position_ids, `wsft_varlen` for packed attention and, if no prefix is
        shared, those of transformers' flash attention."""
        kwargs = {"position_ids": self.position_ids_1T, "wsft_varlen": self}
        if self.key_indices is None:
            kwargs |= {"cu_seq_lens_q": self.cu_seqlens_q, "cu_seq_lens_k": self.cu_seqlens_k}
            kwargs |= {"max_length_q": self.max_seqlen_q, "max_length_k": self.max_seqlen_k}
        return kwargs
