"""What ranks run for a batch: all of it once, and the same plan wherever it is made."""

import numpy as np
import pytest

from benchmarks.host import make_batch
from wsft import WeightedSFTConfig
from wsft.loss.advantages import Shaping
from wsft.model.flops import StepFlops
from wsft.planning import Planner, RowSettings, with_proximal

RANKS = 3


def plan(rank, batch, packs=True, **settings):
    config = WeightedSFTConfig(model_name="none", max_token_len=8192, **settings)
    rows = RowSettings(packs=packs, shares=packs, micro_batch_tokens=8192, shortest=2, pad_token_id=0)
    return Planner(config, rows, StepFlops(6.0, 0.0, 3.0), Shaping("none", None, 1.0), False, rank, RANKS, pins=False)(batch, 5)


@pytest.fixture(scope="module")
def batch():
    return make_batch(32)


@pytest.mark.parametrize("packs", [True, False])
def test_every_trained_token_is_run_on_one_rank(packs, batch):
    plans = [plan(rank, batch, packs, skip_zero_weight=False).plans[0] for rank in range(RANKS)]
    assert len({len(p.training.micro_batches) for p in plans}) == 1 and len({repr(p.metrics) for p in plans}) == 1
    at = np.concatenate([at for p in plans for at in p.training.positions])
    assert sorted(at) == np.flatnonzero(batch.loss_mask).tolist()
    for p in plans:
        for mb, at in zip(p.training.micro_batches, p.training.positions, strict=True):
            assert mb.tokens_BT.flatten()[mb.trained_N].tolist() == batch.tokens[at].tolist()
            assert (mb.packing is not None) == packs


def test_updates_after_the_first_are_scored_at_the_start_of_the_batch(batch):
    first, second = plan(0, batch, updates_per_batch=2).plans
    assert first.at_start is None and first.metrics["data/staleness"] == 5 and second.metrics["data/staleness"] == 6
    assert first.flops == first.training.flops + second.at_start.flops / 3 and second.flops == second.training.flops
    known = np.random.default_rng(0).normal(size=second.training.num_tokens).astype(np.float32)
    for mb, at in zip(with_proximal(second.training, known).micro_batches, second.training.positions, strict=True):
        assert mb.terms.prox_logp_N.tolist() == known[at].tolist()


def test_a_batch_without_a_trained_token_has_no_plan(batch):
    from dataclasses import replace

    assert not plan(0, replace(batch, loss_mask=np.zeros_like(batch.loss_mask))).plans
