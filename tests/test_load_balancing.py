"""The assignment of rollouts to ranks and micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsft.distributed.load_balancing import Cost, Load, assign_rollouts, imbalance
from wsft.model.packing import Prefixes

COST = Cost(1, 1 / (12 * 576))


def load_of(lengths, cost=COST, prefixes=None):
    return Load(np.array(lengths, dtype=np.int64), cost, prefixes or Prefixes.none(len(lengths)))


def plan(lengths, num_ranks=2, budget=100, packed=True, cost=COST, prefixes=None):
    return assign_rollouts(load_of(lengths, cost, prefixes), list(range(len(lengths))), num_ranks, budget, packed)


@given(st.lists(st.integers(2, 60), max_size=40), st.integers(1, 5), st.integers(2, 200), st.booleans())
def test_shares_hold_every_rollout_once_within_the_budget(lengths, num_ranks, budget, packed):
    shares = plan(lengths, num_ranks, budget, packed)
    assert len(shares) == num_ranks and len({len(share) for share in shares}) == 1 and shares[0]
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(len(lengths)))
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        sizes = [lengths[i] for i in rows]
        assert (sum(sizes) if packed else len(rows) * max(sizes)) <= budget
    assert shares == plan(lengths, num_ranks, budget, packed)
    assert 0 <= imbalance(shares, load_of(lengths)) < 1


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 5), st.integers(60, 200))
def test_packing_takes_no_more_rounds_than_padding(lengths, num_ranks, budget):
    assert len(plan(lengths, num_ranks, budget, True)[0]) <= len(plan(lengths, num_ranks, budget, False)[0])


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_lognormal_lengths_are_shared_without_waste(num_ranks):
    lengths = np.random.default_rng(0).lognormal(np.log(120), 0.8, 256).clip(32, 512).astype(int)
    shares = plan(lengths, num_ranks, 2048)
    assert len(shares[0]) == -(-lengths.sum() // (2048 * num_ranks))  # no fewer can be
    assert imbalance(shares, load_of(lengths)) < 0.01
    costs = [COST.of(lengths[rows]).sum() for rows in shares[0]]
    assert costs == sorted(costs, reverse=True)


def test_attention_counts_where_it_costs():
    lengths = [3000] + [100] * 40
    cheap, expensive = (plan(lengths, 2, 8000, cost=Cost(1, per_pair)) for per_pair in (0, 1e-3))
    with_the_long_one = [next(len(share[0]) for share in shares if 0 in share[0]) for shares in (cheap, expensive)]
    assert with_the_long_one[0] > 1 and with_the_long_one[1] == 1


def test_a_rollout_over_the_budget_goes_alone():
    shares = plan([500, 3, 2], 2, 100)
    assert sorted(map(sorted, (rows for share in shares for rows in share))) == [[0], [1, 2]]


def test_nothing_to_share_is_a_round_of_nothing():
    for packed in (True, False):
        assert plan([], 3, 100, packed) == [[[]], [[]], [[]]]


def test_few_rollouts_are_spread_over_the_ranks():
    for packed in (True, False):
        assert sorted(len(rows) for share in plan([9, 8, 9, 8], 4, 1000, packed) for rows in share) == [1, 1, 1, 1]


@st.composite
def clusters(draw):
    """Rollouts' lengths, and which of them share how much."""
    sizes = draw(st.lists(st.integers(1, 9), max_size=8))
    prefixes = [draw(st.integers(8, 30)) if size > 1 else 0 for size in sizes]
    lengths = [p + draw(st.integers(1, 40)) for size, p in zip(sizes, prefixes, strict=True) for _ in range(size)]
    return lengths, Prefixes(np.repeat(np.arange(len(sizes)), sizes), np.repeat(np.array(prefixes, dtype=np.int64), sizes))


@given(clusters(), st.integers(1, 4), st.integers(2, 200))
def test_shares_with_prefixes_hold_every_rollout_once_within_the_budget_and_cost_no_more(drawn, num_ranks, budget):
    lengths, prefixes = drawn
    load, shares = load_of(lengths, prefixes=prefixes), plan(lengths, num_ranks, budget, prefixes=prefixes)
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(len(lengths)))
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        run = sum({prefixes.clusters[i]: prefixes.lengths[i] for i in rows}.values())
        assert load.tokens(rows) == run + sum(lengths[i] - prefixes.lengths[i] for i in rows) <= budget
        assert rows == sorted(rows)  # so that those of a cluster are neighbours

    def time(shares):
        return sum(max(map(load.of, bins)) for bins in zip(*shares, strict=True))

    assert time(shares) <= time(plan(lengths, num_ranks, budget)) * (1 + 1e-12)
    assert 0 <= imbalance(shares, load) < 1


def test_groups_stay_together_as_far_as_the_balance_allows():
    lengths, prefixes = [60] * 16, Prefixes(np.repeat([0, 1], 8), np.full(16, 50))
    assert plan(lengths, 2, 130, prefixes=prefixes) == [[list(range(8))], [list(range(8, 16))]]
    (first,), (second,) = plan(lengths[:8], 2, 130, prefixes=Prefixes(np.zeros(8), np.full(8, 50)))
    assert len(first) == len(second) == 4  # the prompt is run twice, on two ranks at once


def test_what_a_cluster_costs_is_counted_once():
    load = load_of([10, 10, 7], Cost(1, 0.5), Prefixes(np.array([0, 0, 2]), np.array([6, 6, 0])))
    assert load.tokens([0, 1, 2]) == 21 and load.tokens([1]) == 10
    assert load.of([0, 1]) == 2 * (10 + 50) - (6 + 18)  # a token of the second sees the first six as well
