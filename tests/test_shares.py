"""The plan by which ranks share a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsft.shares import Cost, imbalance, plan_shares

COST = Cost(1, 1 / (12 * 576))


def plan(lengths, num_ranks=2, budget=100, packed=True, cost=COST):
    return plan_shares(np.array(lengths, dtype=np.int64), num_ranks, budget, cost, packed)


@given(st.lists(st.integers(2, 60), max_size=40), st.integers(1, 5), st.integers(2, 200), st.booleans())
def test_shares_hold_every_rollout_once_within_the_budget(lengths, num_ranks, budget, packed):
    shares = plan(lengths, num_ranks, budget, packed)
    assert len(shares) == num_ranks and len({len(share) for share in shares}) == 1 and shares[0]
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(len(lengths)))
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        sizes = [lengths[i] for i in rows]
        assert (sum(sizes) if packed else len(rows) * max(sizes)) <= budget
    assert shares == plan(lengths, num_ranks, budget, packed)
    assert 0 <= imbalance(shares, np.array(lengths, dtype=np.int64), COST) < 1


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 5), st.integers(60, 200))
def test_packing_takes_no_more_rounds_than_padding(lengths, num_ranks, budget):
    assert len(plan(lengths, num_ranks, budget, True)[0]) <= len(plan(lengths, num_ranks, budget, False)[0])


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_lognormal_lengths_are_shared_without_waste(num_ranks):
    lengths = np.random.default_rng(0).lognormal(np.log(120), 0.8, 256).clip(32, 512).astype(int)
    shares = plan(lengths, num_ranks, 2048)
    assert len(shares[0]) == -(-lengths.sum() // (2048 * num_ranks))  # no fewer can be
    assert imbalance(shares, lengths, COST) < 0.01
    costs = [COST.of(lengths[rows]).sum() for rows in shares[0]]
    assert costs == sorted(costs, reverse=True)


def test_attention_counts_where_it_costs():
    lengths = [3000] + [100] * 40
    cheap, dear = (plan(lengths, 2, 8000, cost=Cost(1, per_pair)) for per_pair in (0, 1e-3))
    with_the_long_one = [next(len(share[0]) for share in shares if 0 in share[0]) for shares in (cheap, dear)]
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
