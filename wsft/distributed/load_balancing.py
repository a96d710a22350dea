"""Load balancing across data-parallel ranks: which rollouts each rank runs, in which micro-batch. Pure and deterministic: every
rank computes the same assignment from the same lengths.

Under ZeRO-3 all ranks run each micro-step in lockstep, so equal totals are not enough: in each micro-step all wait for the
slowest. Micro-batches are therefore made equal in cost, and in each micro-step the ranks get those closest in cost.
"""

from __future__ import annotations

import bisect
import functools
import heapq
from dataclasses import dataclass

import numpy as np

from wsft.model.packing import Prefixes

Rows = list[int]  # the rollouts of one micro-batch


@dataclass(frozen=True)
class Cost:
    """Cost of the forward and backward pass over a sequence, in FLOPs or any other unit.

    Args:
        per_token: of the matrices.
        per_pair: of attention, counted T^2 times for a sequence of T tokens.
    """

    per_token: float = 1.0
    per_pair: float = 0.0

    def of(self, lengths: np.ndarray) -> np.ndarray:
        return lengths * (self.per_token + self.per_pair * lengths)


@dataclass(frozen=True)
class Load:
    """Lengths [R] in tokens, costs and shared prefixes of the rollouts of a batch."""

    lengths: np.ndarray
    cost: Cost
    prefixes: Prefixes

    def tokens(self, rows: Rows) -> int:
        """Tokens that are computed if these rollouts form one micro-batch."""
        lengths, of_prefixes = self._tokens
        return self._sum(rows, lengths, of_prefixes)

    def of(self, rows: Rows) -> float:
        """Cost of these rollouts as one micro-batch."""
        costs, of_prefixes = self._costs
        return self._sum(rows, costs, of_prefixes)

    def _sum(self, rows: Rows, whole: list, of_prefixes: list) -> float:
        """Prefixes are computed once, for the first rollout of a cluster."""
        total, seen = 0, set()
        for i in rows:
            total += whole[i]
            cluster = self._clusters[i]
            if cluster in seen:
                total -= of_prefixes[i]
            seen.add(cluster)
        return total

    # lists, since each micro-batch has few rollouts: NumPy would take several times as long

    @functools.cached_property
    def _clusters(self) -> list[int]:
        return self.prefixes.clusters.tolist()

    @functools.cached_property
    def _tokens(self) -> tuple[list[int], list[int]]:
        return self.lengths.tolist(), self.prefixes.lengths.tolist()

    @functools.cached_property
    def _costs(self) -> tuple[list[float], list[float]]:
        return self.cost.of(self.lengths).tolist(), self.cost.of(self.prefixes.lengths).tolist()

    def bundles(self, rows: Rows, most: int) -> list[Rows]:
        """Group rollouts of a cluster into bundles, each of at most `most` tokens or of one rollout."""
        bundles: list[Rows] = []
        size: dict[int, tuple[int, Rows]] = {}  # cluster -> tokens and rollouts of the bundle being filled
        lengths, prefixes = self._tokens
        for i in rows:
            cluster, prefix, length = self._clusters[i], prefixes[i], lengths[i]
            tokens, bundle = size.get(cluster, (most, []))
            if tokens + length - prefix > most:
                tokens, bundle = prefix, []
                bundles.append(bundle)
            bundle.append(i)
            size[cluster] = tokens + length - prefix, bundle
        return bundles


def assign_rollouts(load: Load, rows: Rows, num_ranks: int, micro_batch_tokens: int, packed: bool) -> list[list[Rows]]:
    """assignment[rank][micro-step] lists the rollouts of one forward pass, the most expensive micro-step first. All ranks have
    the same number of micro-steps.

    A micro-batch has at most `micro_batch_tokens` tokens: if packed, the sum of lengths with shared prefixes counted once,
    else the longest length times the number of rows. A longer rollout is a micro-batch of its own. If there are fewer
    micro-batches than ranks, some are empty and still run, since ZeRO-3 needs all ranks in every forward pass.
    """
    # large bundles share more prefixes, small ones can be distributed more evenly: try several sizes, take the fastest
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
    """Time until all ranks are done, as in each micro-step they wait for the slowest."""
    return sum(max(map(load.of, micro_batches)) for micro_batches in zip(*assignment, strict=True))


def imbalance(assignment: list[list[Rows]], load: Load) -> float:
    """The fraction of the ranks' time spent waiting for the slowest of each micro-step, by estimated cost: 0 to 1."""
    slowest = _time(assignment, load) * len(assignment)
    return 1 - sum(load.of(rows) for of_rank in assignment for rows in of_rank) / slowest if slowest else 0.0


def _packed(order: list[int], lengths: list[int], costs: list[float], num_ranks: int, budget: int) -> list[Rows]:
    """Micro-batches for the fewest micro-steps into which longest-processing-time-first fits all, at about equal cost."""
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
    """Longest processing time first (Graham 1969): each goes to the cheapest micro-batch with room. None if they do not fit."""
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
    """Best fit: each goes to the fullest micro-batch with room. None if they do not fit."""
    micro_batches, free = [[] for _ in range(room)], [(budget, k) for k in range(room)]  # sorted: tokens free, number
    for i in order:
        place = bisect.bisect_left(free, (lengths[i], -1))
        if place == room:
            return None
        left, k = free.pop(place)
        micro_batches[k].append(i)
        bisect.insort(free, (left - lengths[i], k))
    return micro_batches


def _padded(order: list[int], lengths: list[int], costs: list[float], num_ranks: int, budget: int) -> list[Rows]:
    """Rows of similar length, for little padding; as small as the smallest possible number of micro-steps allows."""

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
