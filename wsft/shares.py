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


def plan_shares(lengths: np.ndarray, num_ranks: int, micro_batch_tokens: int, cost: Cost, packed: bool) -> list[list[Bin]]:
    """shares[rank][round] = the rollouts of one forward pass; as many rounds on every rank, the dearest first.

    A micro-batch has at most `micro_batch_tokens` tokens: packed their sum, else the longest times their number. A longer
    rollout goes alone. Where micro-batches are too few for all ranks, some are empty, and still run: ZeRO-3 needs all ranks in
    every forward.
    """
    costs = cost.of(lengths)
    order = np.argsort(-lengths, kind="stable").tolist()
    make = _packed if packed else _padded
    bins = make(order, lengths.tolist(), costs.tolist(), num_ranks, micro_batch_tokens)
    bins += [[] for _ in range(-len(bins) % num_ranks or (0 if bins else num_ranks))]
    bins.sort(key=lambda chosen: -costs[chosen].sum())
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def imbalance(shares: list[list[Bin]], lengths: np.ndarray, cost: Cost) -> float:
    """The share of the ranks' time that is spent waiting for the slowest of each round, as far as the costs tell: 0 to 1."""
    costs = cost.of(lengths)
    rounds = np.array([[costs[chosen].sum() for chosen in share] for share in shares])
    slowest = rounds.max(axis=0).sum() * len(shares)
    return float(1 - rounds.sum() / slowest) if slowest else 0.0


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
