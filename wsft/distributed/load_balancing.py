"""Load balancing across data-parallel ranks: which rollouts each rank runs, in which micro-batch. Pure and deterministic: every
rank computes the same assignment for itself, from the same lengths.

Under ZeRO-3 the ranks go through each micro-step in lockstep: what counts is not that their sums are equal but that in each
micro-step no one waits for another. So micro-batches are made equal in cost, and ranks get neighbours in cost each micro-step.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass

import numpy as np

from wsft.model.packing import Prefixes

Rows = list[int]  # the rollouts of one micro-batch


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

    def tokens(self, rows: Rows) -> int:
        """That are run, if these rollouts stand in one micro-batch."""
        return int(self.lengths[rows].sum() - self._again(rows).sum())

    def of(self, rows: Rows) -> float:
        """What these rollouts cost in one micro-batch."""
        return float(self.cost.of(self.lengths[rows]).sum() - self.cost.of(self._again(rows)).sum())

    def _again(self, rows: Rows) -> np.ndarray:
        """Lengths of the prefixes that need not be run again: of all in a cluster but the first."""
        rows = np.asarray(rows, dtype=np.int64)
        first = np.unique(self.prefixes.clusters[rows], return_index=True)[1]
        return np.delete(self.prefixes.lengths[rows], first)

    def bundles(self, rows: Rows, most: int) -> list[Rows]:
        """The rollouts in bundles of a cluster, each of `most` tokens at most or of one rollout."""
        bundles: list[Rows] = []
        size: dict[int, tuple[int, Rows]] = {}  # of the bundle that a cluster fills
        for i in rows:
            cluster, prefix, length = self.prefixes.clusters[i], self.prefixes.lengths[i], self.lengths[i]
            tokens, bundle = size.get(cluster, (most, []))
            if tokens + length - prefix > most:
                tokens, bundle = prefix, []
                bundles.append(bundle)
            bundle.append(i)
            size[cluster] = tokens + length - prefix, bundle
        return bundles


def assign_rollouts(load: Load, rows: Rows, num_ranks: int, micro_batch_tokens: int, packed: bool) -> list[list[Rows]]:
    """assignment[rank][micro-step]: those of the rollouts `rows` in one forward pass, the most expensive first. All ranks have
    equally many micro-steps.

    A micro-batch has at most `micro_batch_tokens` tokens: packed their sum, prefixes counted once, else the longest times
    their number. A longer rollout goes alone. Where micro-batches are too few for all ranks, some are empty, and still run:
    ZeRO-3 needs all ranks in every forward.
    """
    # large bundles share most prefixes, small ones are distributed most evenly: that which takes least time is chosen
    sizes = [micro_batch_tokens * k // 8 for k in (8, 6, 4, 3, 2)] if packed and load.prefixes.lengths[rows].any() else []
    plans = [_plan(load, load.bundles(rows, most), num_ranks, micro_batch_tokens, packed) for most in (*sizes, 0)]
    return min(plans, key=lambda assignment: _time(assignment, load))


def _plan(load: Load, bundles: list[Rows], num_ranks: int, budget: int, packed: bool) -> list[list[Rows]]:
    tokens, costs = [load.tokens(bundle) for bundle in bundles], [load.of(bundle) for bundle in bundles]
    order = sorted(range(len(bundles)), key=lambda k: -tokens[k])
    make = _packed if packed else _padded
    micro_batches = [sorted(i for k in chosen for i in bundles[k]) for chosen in make(order, tokens, costs, num_ranks, budget)]
    micro_batches += [[] for _ in range(-len(micro_batches) % num_ranks or (0 if micro_batches else num_ranks))]
    micro_batches.sort(key=lambda chosen: -load.of(chosen))
    return [micro_batches[rank::num_ranks] for rank in range(num_ranks)]


def _time(assignment: list[list[Rows]], load: Load) -> float:
    """Until all ranks are done: in each micro-step they wait for the slowest."""
    return sum(max(map(load.of, micro_batches)) for micro_batches in zip(*assignment, strict=True))


def imbalance(assignment: list[list[Rows]], load: Load) -> float:
    """The fraction of the ranks' time spent waiting for the slowest of each micro-step, by estimated cost: 0 to 1."""
    slowest = _time(assignment, load) * len(assignment)
    return 1 - sum(load.of(rows) for of_rank in assignment for rows in of_rank) / slowest if slowest else 0.0


def _packed(order: list[int], lengths: list[int], costs: list[float], num_ranks: int, budget: int) -> list[Rows]:
    """The fewest micro-steps for which longest-processing-time-first finds a place for all, at about equal cost."""
    alone = [[i] for i in order if lengths[i] > budget]
    shared = order[len(alone) :]
    fewest = -(-sum(lengths[i] for i in shared) // budget)
    micro_steps = max(1, -(-(len(alone) + fewest) // num_ranks))
    while True:
        room = max(1, micro_steps * num_ranks - len(alone))
        for place in (_longest_first, _best_fit):
            micro_batches = place(shared, lengths, costs, room, budget)
            if micro_batches is not None:
                return alone + micro_batches
        micro_steps += 1


def _longest_first(order: list[int], lengths: list[int], costs: list[float], room: int, budget: int) -> list[Rows] | None:
    """Each to the cheapest micro-batch that has room; None if there is none. Longest processing time first (Graham 1969)."""
    heap = [(0.0, 0, k) for k in range(room)]  # cost, tokens, number
    micro_batches = [[] for _ in range(room)]
    for i in order:
        full = []
        while heap and heap[0][1] + lengths[i] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, tokens, k = heap[0]
        micro_batches[k].append(i)
        heapq.heapreplace(heap, (cost + costs[i], tokens + lengths[i], k))
        for entry in full:
            heapq.heappush(heap, entry)
    return micro_batches


def _best_fit(order: list[int], lengths: list[int], costs: list[float], room: int, budget: int) -> list[Rows] | None:
    """Each to the fullest micro-batch that has room; None if there is none."""
    micro_batches, left = [[] for _ in range(room)], np.full(room, budget)
    for i in order:
        fits = np.flatnonzero(left >= lengths[i])
        if not len(fits):
            return None
        k = fits[np.argmin(left[fits])]
        micro_batches[k].append(i)
        left[k] -= lengths[i]
    return micro_batches


def _padded(order: list[int], lengths: list[int], costs: list[float], num_ranks: int, budget: int) -> list[Rows]:
    """Neighbours in length, so that little is padded; in micro-batches no larger than the number of micro-steps asks for."""

    def fill(size: int) -> list[Rows]:
        micro_batches: list[Rows] = []
        for i in order:
            if (
                micro_batches and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= size
            ):  # the first is the longest
                micro_batches[-1].append(i)
            else:
                micro_batches.append([i])
        return micro_batches

    most = -(-len(fill(budget)) // num_ranks) * num_ranks
    return fill(bisect.bisect_left(range(budget), True, key=lambda size: len(fill(size)) <= most))
