"""Packed rows: several sequences in one row, end to end, each of which attends to itself alone. Sequences that begin alike may
share the segment in which they do: it is computed once. Knows nothing of batches, models or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from wsft.device import to_device

MIN_SHARED_PREFIX = 8  # tokens: for fewer the bookkeeping costs more than it saves


@dataclass(frozen=True)
class Layout:
    """The segments of a packed row, end to end.

    Attributes:
        lengths: tokens of each segment.
        parents: for each segment, the index of the earlier one that precedes it in its sequence; -1 where it begins one.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def of(cls, lengths: list[int]) -> Layout:
        """Sequences that share nothing."""
        return cls(tuple(lengths), (-1,) * len(lengths))


@dataclass(frozen=True)
class Prefixes:
    """Which of R sequences begin alike, and may share the segment in which they do.

    Attributes:
        clusters: [R] int64, the same number for sequences that share.
        lengths: [R] int64, tokens that all of the sequence's cluster share; 0 where it is alone.
    """

    clusters: np.ndarray
    lengths: np.ndarray

    @classmethod
    def none(cls, sequences: int) -> Prefixes:
        return cls(np.arange(sequences), np.zeros(sequences, dtype=np.int64))

    @classmethod
    def of(cls, tokens_N: np.ndarray, loss_mask_N: np.ndarray, lengths_R: np.ndarray, rows: Iterable[int]) -> Prefixes:
        """Of the sequences `rows` among R that stand end to end: neighbours that begin alike, as those of one group do.

        A shared prefix ends before the last token that precedes a trained one: the hidden state of that one is needed by each
        sequence for itself.
        """
        ends_R = np.cumsum(lengths_R)
        starts_R = ends_R - lengths_R
        trained_N = np.append(np.flatnonzero(loss_mask_N), len(loss_mask_N))
        firsts_R = trained_N[np.searchsorted(trained_N, starts_R)]  # of each sequence, or of a later one

        def common(i: int, k: int, limit: int) -> int:
            """Of the first `limit` tokens of these sequences, how many are alike from the first on."""
            ours, theirs = (tokens_N[start : start + limit] for start in starts_R[[i, k]])
            differ = np.flatnonzero(ours != theirs)
            return int(differ[0]) if len(differ) else limit

        found, cluster, shared = cls.none(len(lengths_R)), [], 0  # shared: the tokens that all of the cluster have in common
        for i in rows:
            own = int(min(firsts_R[i], ends_R[i]) - starts_R[i]) - 1
            n = common(cluster[0], i, min(shared, own)) if cluster else 0
            # a template that every prompt begins with must not cost a group the prompt that it shares
            needed = max(MIN_SHARED_PREFIX, (shared if len(cluster) > 1 else min(shared, own)) / 2)
            if cluster and n >= needed:
                cluster, shared = [*cluster, i], n
                found.clusters[i], found.lengths[cluster] = cluster[0], n
            else:
                cluster, shared = [i], own
        return found


@dataclass(frozen=True)
class VarlenMetadata:
    """A layout in the form that variable-length attention takes.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32, where segments begin among queries, and their sequences among keys, with the end.
        max_seqlen_q, max_seqlen_k: tokens of the longest of each.
        key_indices: [keys] int64, the position in the row of each key; None: query i is key i.
    """

    layout: Layout
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_indices: torch.Tensor | None


def varlen_kwargs(layout: Layout, device: torch.device) -> dict[str, object]:
    """Keyword arguments for a transformers model, beside the row: position_ids [1, T], and metadata for its attention: wsft's
    own, and where no prefix is shared, those that transformers' flash attention takes."""
    lengths, parents = torch.tensor(layout.lengths), torch.tensor(layout.parents)
    prefixes = torch.where(parents < 0, 0, lengths[parents])  # tokens of the sequence that stand in the parent segment
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    T = int(starts[-1])
    positions = torch.arange(T) + (prefixes - starts[:-1]).repeat_interleave(lengths)
    kwargs = {"position_ids": to_device(positions.unsqueeze(0), device)}
    cu_seqlens_q = to_device(starts.int(), device)
    if not prefixes.any():
        longest = max(layout.lengths)
        kwargs |= {"cu_seq_lens_q": cu_seqlens_q, "cu_seq_lens_k": cu_seqlens_q}
        kwargs |= {"max_length_q": longest, "max_length_k": longest}
        return kwargs | {"wsft_varlen": VarlenMetadata(layout, cu_seqlens_q, cu_seqlens_q, longest, longest, None)}
    whole = lengths + prefixes
    k_starts = torch.nn.functional.pad(whole.cumsum(0), (1, 0))
    # position within its sequence of each key: those below `prefixes` stand in the parent segment, the others in their own
    in_sequence = torch.arange(int(k_starts[-1])) - k_starts[:-1].repeat_interleave(whole)
    in_own = in_sequence + (starts[:-1] - prefixes).repeat_interleave(whole)
    in_parent = in_sequence + starts[parents].repeat_interleave(whole)
    key_indices = torch.where(in_sequence < prefixes.repeat_interleave(whole), in_parent, in_own)
    cu_seqlens_k = to_device(k_starts.int(), device)
    return kwargs | {
        "wsft_varlen": VarlenMetadata(
            layout, cu_seqlens_q, cu_seqlens_k, max(layout.lengths), int(whole.max()), to_device(key_indices, device)
        )
    }
