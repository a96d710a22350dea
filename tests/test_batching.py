"""Flat batches, padded rows, shares."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_group

from wsft import AtroposBatchProcessor
from wsft.batching import Batch, pad


def test_a_recorded_body_becomes_the_tensors_one_reads_off_it():
    body = json.loads((Path(__file__).parent / "bodies" / "token_level_advantages.json").read_text())
    processor = AtroposBatchProcessor(pad_token_id=9)
    tensors = processor.to_tensors(processor.process_atropos_batch(body["batch"]), device="cpu")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "tokens": ((4, 6), torch.int64),
        "loss_masks": ((4, 6), torch.bool),
        "advantages": ((4, 6), torch.float32),
        "inference_logprobs": ((4, 6), torch.float32),
        "attention_mask": ((4, 6), torch.bool),
    }
    assert tensors["tokens"][0].tolist() == [1, 4093, 198, 28, 2, 9]
    assert tensors["advantages"].tolist() == [
        [0, 0, 0, 0.75, 0.5, 0],
        [0, 0, 0, -0.25, -0.5, -0.5],
        [0, 0, 0, 1, 1, 0],  # sft override
        [0, 0, 0, 0.5, 0.5, 0],  # a lone sequence keeps its score
    ]
    assert tensors["loss_masks"].sum().item() == 9


def test_normalisation_is_over_the_whole_batch_and_leaves_overrides_out(rng):
    groups = [make_group(rng, [6, 9]), make_group(rng, [7, 5], overrides=[{"set_advantage_to_zero": True}, {"sft": True}])]
    batch = AtroposBatchProcessor(advantage_normalization="batch").process_atropos_batch(groups)
    values = [batch.advantages[s][batch.loss_mask[s]] for s in batch.spans()]
    free = np.concatenate(values[:2])
    assert abs(free.mean()) < 1e-12 and abs(free.std() - 1) < 1e-12
    assert (values[2] == 0).all() and (values[3] == 1).all()
    assert batch.num_trained == 4 + 7 + 5 + 3  # overridden tokens still count
    assert (batch.advantages[~batch.loss_mask] == 0).all()


def test_normalisation_of_equal_or_no_advantages_is_finite(rng):
    processor = AtroposBatchProcessor(advantage_normalization="batch")
    for row in ([0, 0, 2.5, 2.5], [0, 0, 0, 0]):
        group = make_group(rng, [4], advantages=[row])
        assert (processor.process_atropos_batch([group]).advantages == 0).all()
    masked = make_group(rng, [4], masks=[[-100] * 4])
    assert processor.process_atropos_batch([masked]).num_trained == 0


def test_null_from_the_server_is_a_clear_error():
    with pytest.raises(ValueError, match="found NoneType"):
        AtroposBatchProcessor().process_atropos_batch(None)


@pytest.mark.parametrize("setting", ["overlong", "score_advantages", "advantage_normalization"])
def test_an_unknown_choice_names_the_known_ones(setting):
    with pytest.raises(ValueError, match=f"{setting} is 'x', expected one of"):
        AtroposBatchProcessor(**{setting: "x"})


def test_an_empty_batch_is_rows_of_nothing():
    batch = AtroposBatchProcessor().process_atropos_batch([])
    assert batch.num_trained == 0
    filler = pad(batch, [], pad_token_id=3)
    assert filler["tokens"].tolist() == [[3]] and not filler["loss_masks"].any()


def test_joined_parts_are_the_whole(rng):
    groups = [make_group(rng, [6, 9]), make_group(rng, [7, 5]), make_group(rng, [4], masks=None)]
    processor = AtroposBatchProcessor()
    whole = processor.decode(groups)
    joined = Batch.joined([processor.decode(groups[:1]), processor.decode(groups[1:])])
    for name in ("tokens", "loss_mask", "advantages", "lengths", "overrides", "counts"):
        assert np.array_equal(getattr(whole, name), getattr(joined, name))
    assert joined.rejected == {"no mask": 1}
