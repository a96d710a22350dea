"""The plan by which ranks share a batch: rollouts -> micro-batches -> ranks. Pure and deterministic: every rank makes it for
itself, from the same lengths, and all make the same.

Under ZeRO-3 the ranks go through each micro-batch in lockstep: what counts is not that their sums are equal but that in each
round no one waits for another. So the micro-batches are made equal in cost, and the ranks get neighbours in cost each round.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

import numpy as np

from wsft.model.packing import Prefixes

Bin = list[int]  # the rollouts of one micro-batch


@dataclass(frozen=True)
class Cost:
    """What it costs to run a sequence forward and backward, in floating point operations or any other unit.

    Args:
        per_token: in the model's matrices.
        per_pair: in attention, per pair of a token with one up to it; counted as T^2 for a sequence of T.
    """

    per_token: float = 1.0
    per_pair: float = 0.0

    def of(self, lengths: np.ndarray) -> np.ndarray:
        return lengths * (self.per_token + self.per_pair * lengths)


@dataclass(frozen=True)
class Load:
    """The rollouts of a batch as work. Args: lengths: [R] tokens. cost: of each."""

    lengths: np.ndarray
    cost: Cost
    prefixes: Prefixes

    def tokens(self, rows: Bin) -> int:
        """That are run, if these rollouts stand in one micro-batch."""
        return int(self.lengths[rows].sum() - self._again(rows).sum())

    def of(self, rows: Bin) -> float:
        """What these rollouts cost in one micro-batch."""
        return float(self.cost.of(self.lengths[rows]).sum() - self.cost.of(self._again(rows)).sum())

    def _again(self, rows: Bin) -> np.ndarray:
        """Lengths of the prefixes that need not be run again: of all in a cluster but the first."""
        rows = np.asarray(rows, dtype=np.int64)
        first = np.unique(self.prefixes.clusters[rows], return_index=True)[1]
        return np.delete(self.prefixes.lengths[rows], first)

    def bundles(self, rows: Bin, most: int) -> list[Bin]:
        """The rollouts in bundles of a cluster, each of `most` tokens at most or of one rollout."""
        bundles: list[Bin] = []
        size: dict[int, tuple[int, Bin]] = {}  # of the bundle that a cluster fills
        for i in rows:
            cluster, prefix, length = self.prefixes.clusters[i], self.prefixes.lengths[i], self.lengths[i]
            tokens, bundle = size.get(cluster, (most, []))
            if tokens + length - prefix > most:
                tokens, bundle = prefix, []
                bundles.append(bundle)
            bundle.append(i)
            size[cluster] = tokens + length - prefix, bundle
        return bundles


def assign_rollouts(load: Load, rows: Bin, num_ranks: int, micro_batch_tokens: int, packed: bool) -> list[list[Bin]]:
    """shares[rank][round] = those of the rollouts `rows` in one forward pass; as many rounds on every rank, the dearest first.

    A micro-batch has at most `micro_batch_tokens` tokens: packed their sum, prefixes counted once, else the longest times
    their number. A longer rollout goes alone. Where micro-batches are too few for all ranks, some are empty, and still run:
    ZeRO-3 needs all ranks in every forward.
    """
    # large bundles share most, small ones are shared out most evenly: what takes least time is tried out
    sizes = [micro_batch_tokens * k // 8 for k in (8, 6, 4, 3, 2)] if packed and load.prefixes.lengths[rows].any() else []
    plans = [_plan(load, load.bundles(rows, most), num_ranks, micro_batch_tokens, packed) for most in (*sizes, 0)]
    return min(plans, key=lambda shares: _time(shares, load))


def _plan(load: Load, bundles: list[Bin], num_ranks: int, budget: int, packed: bool) -> list[list[Bin]]:
    tokens, costs = [load.tokens(bundle) for bundle in bundles], [load.of(bundle) for bundle in bundles]
    order = sorted(range(len(bundles)), key=lambda k: -tokens[k])
    make = _packed if packed else _padded
    bins = [sorted(i for k in chosen for i in bundles[k]) for chosen in make(order, tokens, costs, num_ranks, budget)]
    bins += [[] for _ in range(-len(bins) % num_ranks or (0 if bins else num_ranks))]
    bins.sort(key=lambda chosen: -load.of(chosen))
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _time(shares: list[list[Bin]], load: Load) -> float:
    """Until all ranks are through: in each round they wait for the slowest."""
    return sum(max(map(load.of, bins)) for bins in zip(*shares, strict=True))


def imbalance(shares: list[list[Bin]], load: Load) -> float:
    """The share of the ranks' time that is spent waiting for the slowest of each round, as far as the costs tell: 0 to 1."""
    slowest = _time(shares, load) * len(shares)
    return 1 - sum(load.of(rows) for share in shares for rows in share) / slowest if slowest else 0.0


def _packed(order: list[int], lengths: list[int], costs: list[float], num_ranks: int, budget: int) -> list[Bin]:
    """The fewest rounds for which the longest-first rule finds a place for all, in bins of about equal cost."""
    alone = [[i] for i in order if lengths[i] > budget]
    shared = order[len(alone) :]
    fewest = -(-sum(lengths[i] for i in shared) // budget)
    rounds = max(1, -(-(len(alone) + fewest) // num_ranks))
    while True:
        room = max(1, rounds * num_ranks - len(alone))
        for place in (_evenly, _tightly):
            bins = place(shared, lengths, costs, room, budget)
            if bins is not None:
                return alone + bins
        rounds += 1


def _evenly(order: list[int], lengths: list[int], costs: list[float], room: int, budget: int) -> list[Bin] | None:
    """Each to the cheapest bin that can hold it; None if one finds no place."""
    heap = [(0.0, 0, k) for k in range(room)]  # cost, tokens, number
    bins = [[] for _ in range(room)]
    for i in order:
        full = []
        while heap and heap[0][1] + lengths[i] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, tokens, k = heap[0]
        bins[k].append(i)
        heapq.heapreplace(heap, (cost + costs[i], tokens + lengths[i], k))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _tightly(order: list[int], lengths: list[int], costs: list[float], room: int, budget: int) -> list[Bin] | None:
    """Each to the fullest bin that can hold it; None if one finds no place."""
    bins, left = [[] for _ in range(room)], np.full(room, budget)
    for i in order:
        fits = np.flatnonzero(left >= lengths[i])
        if not len(fits):
            return None
        k = fits[np.argmin(left[fits])]
        bins[k].append(i)
        left[k] -= lengths[i]
    return bins


def _padded(order: list[int], lengths: list[int], costs: list[float], num_ranks: int, budget: int) -> list[Bin]:
    """Neighbours in length, so that little is padded; in bins no larger than the number of rounds asks for."""

    def fill(size: int) -> list[Bin]:
        bins: list[Bin] = []
        for i in order:
            if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= size:  # the first is the longest
                bins[-1].append(i)
            else:
                bins.append([i])
        return bins

    most = -(-len(fill(budget)) // num_ranks) * num_ranks
    return fill(bisect.bisect_left(range(budget), True, key=lambda size: len(fill(size)) <= most))
