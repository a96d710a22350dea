"""Records of every form that the real server was observed to deliver, and every fault that it passed on."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from wsft.loss.advantages import Override
from wsft.rollouts.decoder import CUT_OFF, NO_MEAN_ABOVE_0, REASONS, Decoder

TOKENS = [5, 6, 7, 8]
LABELS = [-100, -100, 7, 8]


def one(**fields):
    """A group of one valid sequence with changes."""
    return dict(tokens=[TOKENS], masks=[LABELS], scores=[0.5], advantages=None) | fields


def decode(group, **rules):
    decoder = Decoder(**rules)
    rollouts = decoder.batch([group])
    return rollouts, dict(decoder.rejected)


def test_label_masks_and_zero_one_masks_say_the_same():
    for mask in (LABELS, [0, 0, 1, 1], [False, False, True, True], [0.0, 0.0, 1.0, 1.0]):
        (rollout,), _ = decode(one(masks=[mask]))
        assert rollout.loss_mask.tolist() == [False, False, True, True]


def test_label_masks_over_token_ids_0_and_1_are_labels():
    (rollout,), _ = decode(one(tokens=[[5, 0, 1, 0]], masks=[[-100, 0, 1, 0]]))
    assert rollout.loss_mask.tolist() == [False, True, True, True]


def test_a_mask_may_interleave_over_several_turns():
    (rollout,), _ = decode(one(masks=[[-100, 6, -100, 8]]))
    assert rollout.loss_mask.tolist() == [False, True, False, True]


def test_the_first_token_is_never_trained():
    (rollout,), _ = decode(one(masks=[TOKENS]))
    assert rollout.loss_mask.tolist() == [False, True, True, True]


def test_token_sequence_and_absent_advantages_mix():
    group = one(
        tokens=[TOKENS] * 5, masks=[LABELS] * 5, scores=[1.0, 0.0, 0.0, 0.0, 4.0],
        advantages=[[0, 0, 0.25, -1], 2.5, [3.5], None],
    )  # fmt: skip
    rollouts, rejected = decode(group, score_advantages="group_center")
    assert not rejected
    assert [r.advantages[2:].tolist() for r in rollouts] == [[0.25, -1], [2.5] * 2, [3.5] * 2, [-1.0] * 2, [3.0] * 2]


@pytest.mark.parametrize("absent", [None, []])
def test_absent_fields_are_null_or_empty(absent):
    names = ["advantages", "overrides", "group_overrides", "inference_logprobs", "generation_params", "messages"]
    (rollout,), rejected = decode(one(**dict.fromkeys(names, absent)))
    assert rollout.advantages.tolist() == [0, 0, 0.5, 0.5] and not rejected


def test_scores_become_group_norm_center_or_raw():
    group = one(tokens=[TOKENS] * 3, masks=[LABELS] * 3, scores=[1.0, 2.0, 6.0])
    deviation = np.sqrt((4 + 1 + 9) / 3)
    wanted = dict(group_norm=np.array([-2, -1, 3]) / deviation, group_center=[-2, -1, 3], raw=[1, 2, 6])
    for method, values in wanted.items():
        rollouts, _ = decode(group, score_advantages=method)
        assert np.allclose([r.advantages[3] for r in rollouts], values)


def test_a_group_without_variance_has_no_advantage():
    rollouts, _ = decode(one(tokens=[TOKENS] * 2, masks=[LABELS] * 2, scores=[0.7, 0.7]))
    assert [r.advantages.tolist() for r in rollouts] == [[0] * 4] * 2


@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0, 1e6])
def test_scores_that_differ_by_rounding_have_no_advantage(size):
    def advantages(difference):
        scores = [size * (1 + difference), size]
        rollouts, _ = decode(one(tokens=[TOKENS] * 2, masks=[LABELS] * 2, scores=scores))
        return [r.advantages[3] for r in rollouts]

    assert advantages(1.9e-5) == [0, 0]  # the population standard deviation is half of it
    assert advantages(1e-7 / 0.3) == [0, 0]
    if size > 1e-3:  # below, what is divided by is at least 1e-8
        assert advantages(2.1e-5) == pytest.approx([1, -1])


def test_overrides_stay_out_of_the_groups_statistics():
    group = one(tokens=[TOKENS] * 4, masks=[LABELS] * 4, scores=[1.0, 3.0, 100.0, None])
    group["overrides"] = [None, {}, {"set_advantage_to_zero": True}, {"sft": True}]
    rollouts, rejected = decode(group)
    assert [r.override for r in rollouts] == [Override.NONE, Override.NONE, Override.ZERO, Override.SFT]
    assert [r.advantages[3] for r in rollouts[:2]] == [-1, 1] and not rejected


def parts(*scores, **fields):
    """Records of one environment and prompt, one for each list of scores."""
    return [one(tokens=[TOKENS] * len(s), masks=[LABELS] * len(s), scores=s, env_id=3) | fields for s in scores]


def advantages_in(records, size=None, **rules):
    """Of the records' sequences, in an environment of that group size: it sent a whole group before."""
    decoder = Decoder(**rules)
    if size:
        decoder.batch([one(tokens=[[9, 9, 9, 9]] * size, masks=[[-100, -100, 9, 9]] * size, scores=[0] * size, env_id=3)])
    return [rollout.advantages[3] for rollout in decoder.batch(records)]


@pytest.mark.parametrize(
    "method, wanted",
    [
        ("group_center", [-3, -2, 0, 5]),  # the mean is 3
        ("group_norm", np.array([-3, -2, 0, 5]) / np.sqrt((9 + 4 + 0 + 25) / 4)),
        ("rloo", [-4, -8 / 3, 0, 20 / 3]),  # less the mean of the other three: 0 - 12 / 3, 1 - 11 / 3, 3 - 9 / 3, 8 - 4 / 3
        ("maxrl", [-1, -2 / 3, 0, 5 / 3]),
        ("raw", [0, 1, 3, 8]),
    ],
)
def test_parts_of_one_group_are_scored_as_the_group(method, wanted):
    for split in ([[0, 1, 3, 8]], [[0, 1], [3, 8]], [[0], [1, 3], [8]], [[0], [1], [3], [8]], [[], [0, 1, 3], [8]]):
        whole = [part for part in parts(*split) if part["tokens"]]  # what holds no sequence has no prompt
        assert np.allclose(advantages_in(whole, size=4, score_advantages=method), wanted)


def test_maxrl_gives_nothing_to_a_group_without_a_success_and_says_so_once(caplog):
    decoder = Decoder(score_advantages="maxrl")
    own = {"advantages": [[0, 0, 2.0, 2.0]] * 2}
    groups = [*parts([0, 0], [-1, 0.5]), *parts([0, 0], **own), *parts([1, 0])]
    groups += parts([1], [None, 0, 0])
    found = decoder.batch([group | {"env_id": 10 * i} for i, group in enumerate(groups)])
    assert [rollout.advantages[3] for rollout in found] == [0, 0, 0, 0, 2, 2, 1, -1, 0, 0, 0]
    counts = decoder.take_counts()
    assert counts[REASONS.index(NO_MEAN_ABOVE_0)] == 2 + 2 + 1 + 2
    assert counts[REASONS.index("no finite score and no advantages")] == 1
    assert "made for scores of 0 and 1" in caplog.text and "found -1 in group 1, sequence 0" in caplog.text
    assert f"7 sequence(s) {NO_MEAN_ABOVE_0}; further ones are only counted (first: group 0, sequence 0" in caplog.text
    caplog.clear()
    decoder.batch(parts([0, 0], [2, 5]))
    assert decoder.take_counts().sum() == 2 and not caplog.text


def test_sequences_that_the_sampler_cut_off_weigh_nothing_and_count_in_their_group(caplog):
    """TOKENS end with 8."""
    multi_turn = [-100, 6, 7, -100]
    fields = dict(
        masks=[LABELS, LABELS, LABELS, multi_turn, LABELS, LABELS],
        scores=[0, 1, 2, 3, 4, 14],
        overrides=[
            {},
            {"finish_reason": "length"},
            {"finish_reason": {"type": "stop"}},
            {},
            {"finish_reason": "why"},
            {"sft": True},
        ],
    )
    (group,) = parts([0] * 6, **fields)
    for ends, cut in ((frozenset({8, 2}), [1]), (frozenset({3}), [0, 1, 4]), (frozenset(), [1]), (None, [])):
        decoder = Decoder(score_advantages="group_center", end_tokens=ends)
        found = decoder.batch([group])
        assert [n for n, rollout in enumerate(found) if rollout.override is Override.CUT_OFF] == cut
        assert [rollout.advantages[2] for rollout in found[:5]] == [-2, -1, 0, 1, 2]  # the overridden one is not counted
        assert decoder.take_counts()[REASONS.index(CUT_OFF)] == len(cut)
    assert (
        "the sampler cut them off; further ones are only counted (first: group 0, sequence 1: ends with token 8" in caplog.text
    )


@pytest.mark.parametrize("setting, says", [({"top_p": 0.9}, "top_p 0.9"), ({"top_k": 40, "min_p": 0.1}, "top_k 40, min_p 0.1")])
def test_logps_of_a_part_of_the_vocabulary_are_said_once(setting, says, caplog):
    group = one(inference_logprobs=[[1.0, -1.0, -1.0, -1.0]], generation_params=setting)
    for decoder, times in ((Decoder(reads_behavior=True), 1), (Decoder(), 0)):
        caplog.clear()
        decoder.batch([group, group])
        assert caplog.text.count(f"was sampled with {says}: if its inference_logprobs") == times
    caplog.clear()
    whole = group | {"generation_params": {"top_p": 1.0, "top_k": -1, "min_p": 0}}
    Decoder(reads_behavior=True).batch([whole, one(generation_params=setting)])
    assert not caplog.text


def test_what_is_no_part_of_the_group_is_scored_alone():
    """A lone sequence keeps its score; two of them would be 1 apart from their mean."""
    (first, second), deviation = parts([0], [2]), {"score_advantages": "group_center"}
    assert advantages_in([first, second], **deviation) == [-1, 1]
    others = [
        second | {"env_id": 4},
        second | {"tokens": [[5, 9, 7, 8]]},  # another prompt
        second | {"masks": [[-100, 6, 7, 8]]},  # a shorter one
    ]
    for other in others:
        assert advantages_in([first, other], **deviation) == [0, 2]
    for env_id in (None, -1, True, "3", 3.0):  # of no environment, or none that can be
        assert advantages_in(parts([0], [2], env_id=env_id), **deviation) == [0, 2]
    assert [r.advantages[3] for part in (first, second) for r in Decoder(**deviation).batch([part])] == [0, 2]


@pytest.mark.parametrize("scores, wanted", [([[1, 0], [3, 2]], [1, -1, 1, -1]), ([[0, 0], [1, 1]], [0, 0, 0, 0])])
def test_two_whole_groups_of_one_prompt_are_two(scores, wanted):
    assert advantages_in(parts(*scores)) == wanted
    assert advantages_in(parts(*scores), size=2) == wanted


def test_parts_make_up_no_more_than_a_group():
    pairs = parts([0, 1], [2, 3], [10, 11], [12, 13])
    centred = {"score_advantages": "group_center"}
    assert advantages_in(pairs, size=4, **centred) == [-1.5, -0.5, 0.5, 1.5] * 2
    triples = parts([0, 1, 2], [3, 4, 8])  # of two groups of four, each lacks one
    assert advantages_in(triples, size=4, **centred) == [-1, 0, 1, -2, -1, 3]


def test_the_size_of_a_group_is_what_its_overrides_say_or_the_largest_record_so_far():
    centred = {"score_advantages": "group_center"}
    assert advantages_in(parts([0, 1], [2, 3], group_overrides={"group_size": 4}), **centred) == [-1.5, -0.5, 0.5, 1.5]
    assert advantages_in(parts([0], [2], group_overrides={"group_size": 1}), **centred) == [0, 2]
    for nonsense in (0, -1, True, "4", 4.0, None):
        assert advantages_in(parts([0, 1], [2, 3], group_overrides={"group_size": nonsense}), **centred) == [-0.5, 0.5] * 2
    later = one(tokens=[[9, 9, 9, 9]] * 4, masks=[[-100, -100, 9, 9]] * 4, scores=[0] * 4, env_id=3)
    assert advantages_in([*parts([0, 1], [2, 3]), later], **centred) == [-1.5, -0.5, 0.5, 1.5, 0, 0, 0, 0]
    assert advantages_in([*parts([0, 1], [2, 3]), later | {"env_id": 4}], **centred)[:4] == [-0.5, 0.5] * 2


def test_overridden_and_rejected_sequences_of_a_part_are_those_of_the_group():
    first, second, third = parts([0, 100], [2, None], [4])
    first["overrides"] = [None, {"set_advantage_to_zero": True}]
    third["tokens"] = [[*TOKENS[:3], -1]]  # its prompt cannot be read
    decoder = Decoder(score_advantages="group_center", group_sizes={3: 5})
    assert [r.advantages[3] for r in decoder.batch([first, second, third])] == [-1, 0, 1]
    assert decoder.rejected == {"no finite score and no advantages": 1, "token id outside the vocabulary": 1}


def test_groups_without_a_prompt_of_their_own_are_not_parts_of_one():
    """Where every token is trained, all that two texts have in common is the token that begins every text."""
    for masks in ([1, 1, 1, 1], [0, 1, 1, 1]):
        texts = [
            one(tokens=[[1, p, 7, 8], [1, p, 8, 7]], masks=[masks] * 2, scores=s, env_id=3)
            for p, s in ((5, [0, 2]), (6, [4, 8]))
        ]
        assert advantages_in(texts, score_advantages="group_center") == [-1, 1, -2, 2]


@pytest.mark.parametrize(
    "places, wanted",
    [
        (([{"temperature": 0.5}], {"temperature": 0.6}, {"temperature": 0.7}), 0.5),
        (([{}], {"temperature": 0.6}, {"temperature": 0.7}), 0.6),
        (([{"temperature": None}], {"temperature": None}, {"temperature": 0.7}), 0.7),
        ((None, None, {"temperature": 2}), 2.0),
        (([None], [], []), np.nan),
        ((["x"], "y", 5), np.nan),
        (([], {}, {}), np.nan),
    ],
)
def test_the_temperature_is_that_of_the_nearest_who_says_it(places, wanted):
    (rollout,), rejected = decode(one(**dict(zip(("overrides", "generation_params", "group_overrides"), places, strict=True))))
    assert rollout.temperature == pytest.approx(wanted, nan_ok=True) and not rejected


@pytest.mark.parametrize(
    "output, wanted",
    [(0, 0), (12, 12), ("12", 12), (2**53 - 1, 2**53 - 1)]
    + [(value, np.nan) for value in (None, "default", "", -1, 1.5, True, 2**53, 2**80, [], "1" * 16)],
)
def test_a_weight_version_is_a_step_or_not_known(output, wanted):
    (rollout,), rejected = decode(one(generation_params={"weight_version": output}))
    assert rollout.weight_versions.tolist() == pytest.approx([wanted] * 4, nan_ok=True, rel=0) and not rejected


def span(version, start, end):
    return {"version": version, "start": start, "end": end}


def test_tokens_of_one_sequence_may_be_of_several_weights():
    spans = [span("4", 1, 2), span(5, 2, 3), span("default", 3, 4)]
    (rollout,), rejected = decode(one(overrides=[{"weight_versions": spans}], generation_params={"weight_version": 1}))
    assert rollout.weight_versions.tolist() == pytest.approx([1, 4, 5, np.nan], nan_ok=True) and not rejected


@pytest.mark.parametrize(
    "bad", [span(4, 2, 5), span(4, -1, 3), span(4, 3, 2), span(4, "2", 3), span(4, True, 3), 4, [4], {}, None]
)
def test_spans_that_do_not_fit_are_counted_and_not_used(bad):
    (rollout,), rejected = decode(one(overrides=[{"weight_versions": [span(4, 0, 4), bad], "weight_version": 3}]))
    assert np.isnan(rollout.weight_versions).all()
    assert rejected == {"trained without weight_versions: they do not fit the tokens": 1}


def test_logps_are_those_of_trained_tokens_and_placeholders_are_none():
    rows = {
        (-3.0, -2.0, -1.0, -0.5): [-1.0, -0.5],
        (1.0, 1.0, 1.0, -0.5): [np.nan, -0.5],
        (1, 1, 0, -2): [0.0, -2.0],
        (None, None, None, -0.5): [np.nan, -0.5],
        (np.nan, 1.0, -np.inf, 0.5): [np.nan, np.nan],
        (1.0, 1.0, 0.001, 0.0011): [0.0, np.nan],  # a rounding above 0 is 0
        (1.0, 1.0, -103.0, 0.0): [-103.0, 0.0],
        (1.0, 1.0, -9999.0, -9999.0): [np.nan, np.nan],  # what vLLM writes for -inf and NaN
        (1.0, 1.0, -1e300, -3e38): [np.nan, np.nan],
    }
    for row, wanted in rows.items():
        record = one(inference_logprobs=[list(row)], ref_logprobs=[list(row)])
        (rollout,), rejected = decode(record, reads_reference=True)
        for found in (rollout.behavior_logp, rollout.ref_logp):
            assert np.array_equal(found, np.array([np.nan, np.nan, *wanted], np.float32), equal_nan=True)
        assert not rejected


def test_what_no_sampler_draws_a_reference_model_may_say():
    rows = [[1.0, 1.0, -104.0, -500.0]]
    (rollout,), _ = decode(one(inference_logprobs=rows, ref_logprobs=rows), reads_reference=True)
    assert np.isnan(rollout.behavior_logp).all() and rollout.ref_logp[2:].tolist() == [-104.0, -500.0]


def test_a_teacher_is_read_where_a_token_is_trained_and_cut_with_the_sequence():
    record = one(distill_token_ids=[[[9], "x", [5, 6], [7]]], distill_logprobs=[[[-1], None, [-1, -2.5], [0.0005]]])
    for limit, sizes, ids, logp in ((None, [0, 0, 2, 1], [5, 6, 7], [-1, -2.5, 0]), (3, [0, 0, 2], [5, 6], [-1, -2.5])):
        (rollout,), _ = decode(record, reads_teacher=True, max_token_len=limit, overlong="truncate")
        assert (rollout.teacher_sizes.tolist(), rollout.teacher_ids.tolist(), rollout.teacher_logp.tolist()) == (
            sizes,
            ids,
            logp,
        )
    (rollout,), _ = decode(record)
    assert len(rollout.teacher_sizes) == len(rollout.teacher_ids) == len(rollout.ref_logp) == 0  # nobody asked


@pytest.mark.parametrize(
    "overrides, group_overrides, wanted",
    [
        (None, {"sft": True}, Override.SFT),
        ([], {"set_advantage_to_zero": True}, Override.ZERO),
        ([{"sft": False}], {"sft": True}, Override.NONE),
        ([{"set_advantage_to_zero": True}, {"sft": True}, None], {"sft": True}, Override.ZERO),
        (["x"], "y", Override.NONE),
    ],
)
def test_overrides_of_any_length_and_form(overrides, group_overrides, wanted):
    (rollout,), _ = decode(one(overrides=overrides, group_overrides=group_overrides))
    assert rollout.override == wanted


@pytest.mark.parametrize(
    "fields, reason",
    [
        (dict(tokens=[[]], masks=[[]]), "fewer than two tokens"),
        (dict(tokens=[[5]], masks=[[5]]), "fewer than two tokens"),
        (dict(tokens=[[5, -1, 7, 8]]), "token id outside the vocabulary"),
        (dict(tokens=[[5, 96, 7, 8]]), "token id outside the vocabulary"),
        (dict(tokens=[[5, 2**63 - 1, 7, 8]]), "token id outside the vocabulary"),
        (dict(tokens=[[5, 2**63, 7, 8]]), "tokens are not a list of integers"),
        (dict(tokens=[[5, 2**80, 7, 8]]), "tokens are not a list of integers"),
        (dict(tokens=[[5, 6.5, 7, 8]]), "tokens are not a list of integers"),
        (dict(tokens=[[5, None, 7, 8]]), "tokens are not a list of integers"),
        (dict(tokens=["text"]), "tokens are not a list of integers"),
        (dict(tokens=[[[5], [6]]]), "tokens are not a list of integers"),
        (dict(tokens=[[5, [6], 7, 8]]), "tokens are not a list of integers"),
        (dict(tokens=[None]), "tokens are not a list of integers"),
        (dict(masks=None), "no mask"),
        (dict(masks=[]), "no mask"),
        (dict(masks=[None]), "no mask"),
        (dict(masks=[[-100, 6]]), "mask length differs from tokens"),
        (dict(masks=[[-100, -100, 9, 8]]), "mask is neither labels nor 0/1"),
        (dict(masks=[[0, 0, 2, 1]]), "mask is neither labels nor 0/1"),
        (dict(masks=["1111"]), "mask is neither labels nor 0/1"),
        (dict(advantages=[[1.0, 2.0]]), "advantages do not fit the tokens"),
        (dict(advantages=[["a"] * 4]), "advantages do not fit the tokens"),
        (dict(advantages=[{}]), "advantages do not fit the tokens"),
        (dict(advantages=[[0, 0, float("nan"), 1]]), "advantage of a trained token is not finite"),
        (dict(advantages=[[0, 0, 1e300, 1]]), "advantage of a trained token is not finite"),
        (dict(advantages=[float("inf")]), "advantage of a trained token is not finite"),
        (dict(scores=None), "no finite score and no advantages"),
        (dict(scores=[None]), "no finite score and no advantages"),
        (dict(scores=[float("nan")]), "no finite score and no advantages"),
        (dict(scores=[10**400]), "no finite score and no advantages"),
        (dict(scores=["high"]), "no finite score and no advantages"),
        (dict(images=[["a.png"]]), "has images"),
        (dict(images="a.png"), "has images"),
        (dict(tokens=5), "record is not a group"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_left_out_with_its_reason(fields, reason):
    rollouts, rejected = decode(one(**fields), vocab_size=96)
    assert rollouts == [] and rejected == {reason: 1}


@pytest.mark.parametrize("images", [None, [], [None, None], [[], None]])
def test_fields_of_images_without_any_are_fields_of_none(images):
    rollouts, rejected = decode(one(tokens=[TOKENS] * 2, masks=[LABELS] * 2, scores=[True, False], images=images))
    assert [r.advantages[3] for r in rollouts] == [1, -1] and not rejected  # and scores that are true or false are 1 or 0


@pytest.mark.parametrize("group", [None, 3, "text", [], {}, {"tokens": None}])
def test_what_is_no_group_is_left_out(group):
    assert decode(group) == ([], {"record is not a group": 1})


def test_not_finite_advantages_of_untrained_tokens_do_not_matter():
    (rollout,), rejected = decode(one(advantages=[[float("nan"), float("inf"), 1, 2]]))
    assert rollout.advantages.tolist() == [0, 0, 1, 2] and not rejected


def test_a_group_loses_only_what_is_bad():
    group = one(tokens=[TOKENS, [5, -6, 7, 8], TOKENS], masks=[LABELS] * 3, scores=[1.0, 2.0, 3.0])
    rollouts, rejected = decode(group)
    assert [round(r.advantages[3], 3) for r in rollouts] == [-1.225, 1.225]
    assert rejected == {"token id outside the vocabulary": 1}


def test_overlong_sequences_are_dropped_or_truncated_and_counted():
    assert decode(one(), max_token_len=3) == ([], {"longer than max_token_len": 1})
    (rollout,), rejected = decode(one(), max_token_len=3, overlong="truncate")
    assert rollout.tokens.tolist() == [5, 6, 7] and rollout.loss_mask.tolist() == [False, False, True]
    assert rejected == {"truncated to max_token_len": 1}


def test_each_reason_is_logged_once_with_its_place(caplog):
    decoder = Decoder()
    decoder.batch([one(tokens=[TOKENS] * 3, masks=None)], ["group 7"])
    counts = decoder.take_counts()
    assert counts[REASONS.index("no mask")] == 3 and decoder.take_counts().sum() == 0
    assert caplog.text.count("no mask") == 1 and "group 7, sequence 0" in caplog.text


@pytest.mark.parametrize("name, sizes", [("two_envs", 8), ("token_level_advantages", 4)])
def test_bodies_of_the_real_server_lose_nothing(name, sizes):
    body = json.loads((Path(__file__).parent / "bodies" / f"{name}.json").read_text())
    decoder = Decoder(vocab_size=49152)
    rollouts = decoder.batch(body["batch"])
    assert len(rollouts) == sizes and not decoder.rejected
    assert all(r.loss_mask.any() and not r.loss_mask[0] for r in rollouts)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)
fields = st.sampled_from(["tokens", "masks", "scores", "advantages", "overrides", "group_overrides"])


@given(fields, anything, st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_no_record_ends_a_run_or_trains_a_bad_token(field, value, seed):
    group = make_group(np.random.default_rng(seed), [5, 6, 7]) | {field: value}
    for rollout in decode(group, vocab_size=96)[0]:
        shape = rollout.tokens.shape
        assert rollout.loss_mask.shape == rollout.advantages.shape == shape and not rollout.loss_mask[0]
        assert ((rollout.tokens >= 0) & (rollout.tokens < 96)).all() and np.isfinite(rollout.advantages).all()
