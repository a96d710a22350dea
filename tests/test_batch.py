"""Flat batches, padded and packed rows."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_group

from wsft import AtroposBatchProcessor
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients, LossSettings
from wsft.rollouts.batch import Batch, pack, pad, token_terms


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


def test_terms_of_some_rollouts_are_theirs_in_their_order():
    """Three sequences of 2, 1 and 2 trained tokens; the third, then the first are asked for."""
    complete = dict(
        tokens=[[1, 5, 6], [1, 2, 7], [1, 8, 9]],
        masks=[[-100, 5, 6], [-100, -100, 7], [-100, 8, 9]],
        advantages=[[0, 0.5, -0.5], [0, 0, 3.0], [0, 2.0, 9.0]],
        inference_logprobs=[[1.0, -0.5, 1.0], [1.0, 1.0, -3.0], [1.0, -2.0, -4.0]],
        ref_logprobs=[[1.0, -1.5, -2.5], [1.0, 1.0, -3.5], [1.0, 1.0, -4.5]],
        overrides=[None, None, {"sft": True, "temperature": 0.5}],
        distill_token_ids=[[[], [5, 4], []], [[], [], [7]], [[], [8], [1, 2, 3]]],
        distill_logprobs=[[[], [0.0, -np.inf], []], [[], [], [-1.0]], [[], [-1.0], [-2.0, -2.0, -2.0]]],
    )
    batch = AtroposBatchProcessor(reads_reference=True, reads_teacher=True).process_atropos_batch([complete])
    scales = batch.scales("sequence_mean", 10)
    assert scales.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 6])  # of three sequences' means
    for renormalize in (False, True):
        coefficients = Coefficients(kl=0.1, distill=0.5, renormalize=renormalize)
        terms = token_terms(batch, [2, 0], scales, LossSettings(Objective("ppo_clip"), coefficients, 0.9))
        wanted = {
            "scale_N": [1 / 6] * 4,
            "advantages_N": [1, 1, 0.5, -0.5],
            "behavior_logp_N": [-2, -4, -0.5, np.nan],
            "fixed_weights_N": [1, 1, np.nan, np.nan],
            "temperature_N": [0.5, 0.5, 0.9, 0.9],
            "ref_logp_N": [np.nan, -4.5, -1.5, -2.5],
        }
        for name, values in wanted.items():
            assert getattr(terms, name).tolist() == pytest.approx(values, nan_ok=True), name
        assert terms.sequence_N.tolist() == [1, 1, 0, 0]  # the same number for a sequence's tokens, whatever it is
        assert terms.teacher_ids_NK.tolist() == [[8, 0, 0], [1, 2, 3], [5, 4, 0], [0, 0, 0]]
        output = [1, 1 / 3, 1, 0] if renormalize else [np.exp(-1), np.exp(-2), 1, 0]
        probs = [[output[0], 0, 0], [output[1]] * 3, [output[2], 0, 0], [output[3]] * 3]
        assert np.allclose(terms.teacher_probs_NK.numpy(), probs)


def test_terms_of_no_rollout_are_empty_and_of_the_same_kinds():
    """What a rank has that only runs along."""
    record = dict(tokens=[[1, 5, 6]], masks=[[-100, 5, 6]], scores=[1.0], ref_logprobs=[[1.0, -1.0, -1.0]])
    batch = AtroposBatchProcessor(reads_reference=True, reads_teacher=True).process_atropos_batch([record])
    some, none = (
        token_terms(batch, rows, batch.scales("mean", 10), LossSettings(Objective("gspo"), Coefficients(kl=0.1, distill=0.5)))
        for rows in ([0], [])
    )
    for field in dataclasses.fields(some):
        one, other = getattr(some, field.name), getattr(none, field.name)
        assert (type(one), getattr(one, "dtype", None)) == (type(other), getattr(other, "dtype", None)), field.name
    weights, clipped = none.weigh(torch.zeros(0))
    assert len(none.scale_N) == len(weights) == len(clipped) == 0


def test_joined_parts_have_every_field_of_the_whole(rng):
    """As ranks join what each of them fetched."""

    def complete(lengths, env_id):
        entries = [[[int(i) for i in rng.integers(0, 96, k)] for k in rng.integers(0, 3, n)] for n in lengths]
        logps = [[[-1.0 - k for k in range(len(row))] for row in rows] for rows in entries]
        sampled = [rng.normal(-2, 1, n).clip(max=-0.1).tolist() for n in lengths]
        more = dict(distill_token_ids=entries, distill_logprobs=logps, inference_logprobs=sampled, ref_logprobs=sampled)
        return make_group(rng, lengths, env_id=env_id, generation_params={"temperature": 0.5, "weight_version": env_id}, **more)

    groups = [
        complete([6, 9], 0),
        complete([7, 5], 1),
        make_group(rng, [4], masks=None),
        complete([8], 2),
        make_group(rng, [5]),
    ]
    processor = AtroposBatchProcessor(reads_reference=True, reads_teacher=True)
    whole = processor.decode(groups)
    joined = Batch.joined(
        [processor.decode(groups[:1]), Batch.empty(), processor.decode(groups[1:2]), processor.decode(groups[2:])]
    )
    for field in dataclasses.fields(Batch):
        one, other = getattr(whole, field.name), getattr(joined, field.name)
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f"), field.name
    assert len(whole.teacher_ids) == whole.teacher_sizes.sum() > 10


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_minibatches_are_disjoint_of_whole_groups_and_even(number, rng):
    groups = [make_group(rng, rng.integers(5, 9, n).tolist(), 3, alike=True, env_id=n) for n in (2, 1, 4, 3, 2)]
    whole, rows = groups.pop(2), ("tokens", "masks", "advantages")
    for part in (slice(3), slice(3, 4)):  # in two records
        groups.append(whole | {name: whole[name][part] for name in rows} | {"group_overrides": {"group_size": 4}})
    groups[0]["distill_token_ids"] = [[[5, 6]] * len(row) for row in groups[0]["tokens"]]
    groups[0]["distill_logprobs"] = [[[-1.0, -2.0]] * len(row) for row in groups[0]["tokens"]]
    batch = AtroposBatchProcessor(reads_teacher=True).process_atropos_batch([*groups, {"tokens": [[1]]}])
    parts = batch.minibatches(number)
    assert len(parts) == number and [sum(part.counts) for part in parts] == [1] + [0] * (number - 1)
    assert max(len(part.lengths) for part in parts) - min(len(part.lengths) for part in parts) <= 3
    key = lambda b, i: (b.tokens[b.spans()[i]].tolist(), b.loss_mask[b.spans()[i]].tolist(), int(b.env_ids[i]))  # noqa: E731
    found = [key(part, i) for part in parts for i in range(len(part.lengths))]
    assert sorted(found) == sorted(key(batch, i) for i in range(len(batch.lengths)))
    of_group = [{int(group) for group in part.groups} for part in parts]
    assert sum(map(len, of_group)) == len(set.union(*of_group)) == 5
    assert sum(len(part.teacher_ids) for part in parts) == len(batch.teacher_ids) > 0
    for part in parts:
        assert len(part.teacher_ids) == part.teacher_sizes.sum() and len(part.tokens) == part.lengths.sum()


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
    assert filler["tokens"].tolist() == [[3, 3]] and not filler["loss_masks"].any()


def of_groups(groups):
    return AtroposBatchProcessor().process_atropos_batch(groups)


def test_rollouts_of_a_prompt_share_all_but_its_last_token(rng):
    """Which each needs for itself: what comes after it differs."""
    batch = of_groups([make_group(rng, [15, 20], 12, alike=True), make_group(rng, [30, 31, 33], 25, alike=True)])
    prefixes = batch.prefixes(range(5))
    assert prefixes.clusters.tolist() == [0, 0, 2, 2, 2] and prefixes.lengths.tolist() == [11, 11, 24, 24, 24]
    prefixes = batch.prefixes([1, 2, 4])  # of those that are run
    assert len(set(prefixes.clusters[[1, 2]])) == 2 and prefixes.lengths.tolist() == [0, 0, 24, 0, 24]


def test_a_template_that_all_prompts_begin_with_costs_no_group_its_prompt(rng):
    groups = [make_group(rng, [40, 45, 41], 30, alike=True) for _ in range(3)]
    for group in groups:
        group["tokens"] = [groups[0]["tokens"][0][:10] + row[10:] for row in group["tokens"]]
    prefixes = of_groups(groups).prefixes(range(9))
    assert prefixes.clusters.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6] and set(prefixes.lengths) == {29}


def test_nothing_is_shared_from_the_first_trained_token_on(rng):
    group = make_group(rng, [20, 20], 18, alike=True)
    group["masks"][1] = [-100] * 10 + group["tokens"][1][10:]
    group["advantages"][1] = [1.0] * 20
    assert of_groups([group]).prefixes([0, 1]).lengths.tolist() == [9, 9]
    group["masks"][1] = group["tokens"][1]  # trained from its second token on
    assert of_groups([group]).prefixes([0, 1]).lengths.tolist() == [0, 0]


def test_a_row_holds_what_rollouts_share_once(rng):
    batch = of_groups([make_group(rng, [15, 20], 12, alike=True), make_group(rng, [5])])
    tokens_1T, trained_N, layout = pack(batch, [0, 1, 2], 0, batch.prefixes(range(3)))
    assert layout.lengths == (11, 4, 9, 5) and layout.parents == (-1, 0, 0, -1)
    first, second, third = (batch.tokens[span] for span in batch.spans())
    assert tokens_1T[0].tolist() == [*first, *second[11:], *third]
    assert trained_N.tolist() == [12, 13, 14, *range(16, 24), 26, 27, 28]
    assert pack(batch, [1, 2], 0, batch.prefixes(range(3)))[2].lengths == (20, 5)  # alone in its row
    assert pack(batch, [], 0, batch.prefixes(range(3)))[2].lengths == (2,)


def test_a_rank_without_rollouts_runs_tokens_of_the_batch(rng):
    """Not pad tokens, whose embedding may be 0, where a model's derivatives need not be finite."""
    batch = of_groups([make_group(rng, [5, 4])])
    tokens_1T, trained_N, _ = pack(batch, [], 3, batch.prefixes(range(2)))
    assert tokens_1T.tolist() == [batch.tokens[:2].tolist()] and not len(trained_N)
    filler = pad(batch, [], 3, shortest=11)
    assert filler["tokens"].tolist() == [[*batch.tokens.tolist(), 3, 3]]
    assert not filler["loss_masks"].any() and not filler["attention_mask"].any()
