"""Fields of records: recorded bodies by hand, every combination through the server, and into a run's metrics."""

import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from math import exp
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from atropos_server import atropos_server, group, post_group, register_env
from conftest import RANK_VARIABLES, make_group, write_groups
from fed_run import split, wait_until

from wsft import AtroposBatchProcessor, WeightedSFTConfig, WeightedSFTTrainer
from wsft.errors import UserError
from wsft.loss.objectives import Objective
from wsft.loss.terms import LossSettings
from wsft.rollouts.answers import decode
from wsft.rollouts.batch import token_terms
from wsft.rollouts.client import AtroposClient

BODIES = Path(__file__).parent / "bodies"
NAN = math.nan


def read(name, **decoding):
    processor = AtroposBatchProcessor(**decoding)
    return processor.process_atropos_batch(json.loads((BODIES / name).read_text())["batch"])


def test_the_weights_of_a_recorded_body_are_those_one_reads_off_it():
    """PPO with eps_low 0.1 and eps_high 0.05, where the policy gives every token the logp -0.4."""
    batch = read("token_level_advantages.json")
    objective = Objective("ppo_clip", {"eps_low": 0.1, "eps_high": 0.05})
    terms = token_terms(batch, [0, 1, 2, 3], batch.scales("mean", 100), LossSettings(objective, temperature=0.8))
    assert terms.behavior_logp_N.tolist() == pytest.approx([-0.5, -0.1, -1.5, -0.7, -0.2, NAN, NAN, NAN, NAN], nan_ok=True)
    assert terms.temperature_N.tolist() == pytest.approx([1.0] * 5 + [0.8] * 4)  # the second and third record have none
    weights, clipped = terms.weigh(torch.full((9,), -0.4))
    wanted = [
        0,  # A 0.75, ratio exp(-0.4 + 0.5) = 1.105 > 1.05: clipped
        0.5 * exp(-0.4 + 0.1),  # A 0.5, ratio 0.741: too small already, and the clip holds only from above
        -0.25 * exp(-0.4 + 1.5),  # A -0.25, ratio 3.0: held only from below
        -0.5 * exp(-0.4 + 0.7),
        0,  # A -0.5, ratio exp(-0.4 + 0.2) = 0.819 < 0.9: clipped
        *(1, 1),  # the sft override
        *(0.5, 0.5),  # a lone sequence keeps its score 0.5, and has no logps: ratio 1
    ]
    assert weights.tolist() == pytest.approx(wanted) and clipped.tolist() == [i in (0, 4) for i in range(9)]
    assert terms.scale_N.tolist() == pytest.approx([1 / 9] * 9)


# The policy gives every token the logp -1. The first sequence's behavior logps are -0.5 and -0.1: ratios exp(-0.5) = 0.607 and
# exp(-0.9) = 0.407, of mean exponent -0.7. The second's are -1.5, -0.7 and -0.2: exp(0.5) = 1.649, exp(-0.3) = 0.741 and
# exp(-0.8) = 0.449, of mean exponent -0.2. Of the third an override says 1; the fourth's has no sampler: ratio 1.
FIRST, SECOND = (0.75, 0.5), (-0.25, -0.5, -0.5)  # their advantages
WEIGHTS = [
    ("weighted_sft", {}, [*FIRST, *SECOND], [0.5, 0.5]),
    ("sft", {}, [1] * 5, [1, 1]),
    ("dft", {}, [exp(-1)] * 5, [exp(-1)] * 2),
    (
        "importance_sampling",
        {},
        [0.75 * exp(-0.5), 0.5 * exp(-0.9), -0.25 * exp(0.5), -0.5 * exp(-0.3), -0.5 * exp(-0.8)],
        [0.5, 0.5],
    ),
    ("importance_sampling", {"cap": 0.6}, [0.75 * 0.6, 0.5 * exp(-0.9), -0.25 * 0.6, -0.5 * 0.6, -0.5 * exp(-0.8)], [0.3, 0.3]),
    # favoured tokens are held only above 1.2, disfavoured ones only below 0.8: there they weigh 0
    ("ppo_clip", {}, [0.75 * exp(-0.5), 0.5 * exp(-0.9), -0.25 * exp(0.5), 0, 0], [0.5, 0.5]),
    ("ppo_clip", {"dual_clip": 1.5}, [0.75 * exp(-0.5), 0.5 * exp(-0.9), 0, 0, 0], [0.5, 0.5]),  # and disfavoured above 1.5
    (
        "cispo",
        {"eps_low": 0.5, "eps_high": 0.4},
        [0.75 * exp(-0.5), 0.5 * 0.5, -0.25 * 1.4, -0.5 * exp(-0.3), -0.5 * 0.5],
        [0.5, 0.5],
    ),
    ("gspo", {"eps_low": 0.2}, [0.75 * exp(-0.7), 0.5 * exp(-0.7), *(A * exp(-0.2) for A in SECOND)], [0.5, 0.5]),
    ("gspo", {"eps_low": 0.1}, [0.75 * exp(-0.7), 0.5 * exp(-0.7), 0, 0, 0], [0.5, 0.5]),  # exp(-0.2) = 0.819 < 0.9
]


@pytest.mark.parametrize("name, args, sampled, lone", WEIGHTS)
def test_every_objective_weighs_a_recorded_body_as_its_rule_says(name, args, sampled, lone):
    batch = read("token_level_advantages.json")
    terms = token_terms(batch, [0, 1, 2, 3], batch.scales("sum", 100), LossSettings(Objective(name, args)))
    assert terms.fixed_weights_N.tolist() == pytest.approx([NAN] * 5 + [1.0, 1.0] + [NAN] * 2, nan_ok=True)
    weights, _ = terms.weigh(torch.full((9,), -1.0))
    assert weights.tolist() == pytest.approx([*sampled, 1, 1, *lone])
    loss, pull = terms(torch.full((9,), -1.0), slice(None))  # the reduction "sum" multiplies by 1
    assert loss.tolist() == weights.tolist() == pull.tolist()  # weight times 1, which is -logp


def test_two_real_environments_give_what_their_scores_and_samplers_say():
    batch = read("two_envs.json", vocab_size=49_152)
    assert batch.rejected == {} and batch.env_ids.tolist() == [1] * 4 + [0] * 4
    advantages = [batch.advantages[span][batch.loss_mask[span]] for span in batch.spans()]
    # of -1, -1, -1, -1 nothing is left; of -1, -1, 1, -1 the mean is -1/2 and the deviation sqrt(3)/2
    wanted = [0] * 4 + [-1 / math.sqrt(3), -1 / math.sqrt(3), math.sqrt(3), -1 / math.sqrt(3)]
    for found, value in zip(advantages, wanted, strict=True):
        assert len(found) and found == pytest.approx([value] * len(found))
    known = [~np.isnan(batch.behavior_logp[span]) for span in batch.spans()]
    assert not any(row.any() for row in known[:4])  # the first environment sends none
    for span, row in list(zip(batch.spans(), known, strict=True))[4:]:
        assert (row == batch.loss_mask[span]).all()  # 1.0 stands at the prompt
    assert batch.behavior_logp[batch.spans()[4]][-1] == pytest.approx(-9.608060836791992)
    terms = token_terms(batch, [4, 6, 0], batch.scales("sum", 100), LossSettings(Objective("cispo"), temperature=0.9))
    weights, clipped = terms.weigh(torch.full((48 + 18 + 7,), -1.0))  # so many are trained
    assert weights[0].item() == pytest.approx(-5 / math.sqrt(3)) and clipped[0]  # exp(-1 + 8.456663) = 1,731, held at 5
    assert weights[48].item() == pytest.approx(math.sqrt(3) * exp(-1 + 2.456662893)) and not clipped[48]  # 4.29
    assert not weights[66:].any() and terms.temperature_N.tolist() == pytest.approx([0.9] * 73)  # nobody says another one


def through_the_server(records, environments=(0,)):
    """Each record as GET /batch delivers it. `environments` post them in turn, each under its env_id; None is unregistered."""
    with atropos_server() as server:
        client = AtroposClient(server.url, batch_size=2, max_token_len=64, num_steps=1000, timeout=60)
        assert client.poll() is None
        registered = [register_env(server.url, 2) for env_id in environments if env_id is not None]
        assert registered == [env_id for env_id in environments if env_id is not None]
        for record, env_id in zip(records, itertools.cycle(environments), strict=False):
            assert post_group(server.url, env_id, record) == "received"
        return [client.poll() for _ in records][::-1]  # the newest comes first


def every_combination(**choices):
    """A group for each, with these fields."""
    return [group() | dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def test_every_combination_of_logps_and_overrides_comes_through_the_real_server():
    logps, ids = [1.0, 1.0, -0.5, -0.25, 1.0, -2.0], [[], [], [5, 6], [], [7], [8, 9]]
    records = every_combination(
        inference_logprobs=[None, [], [logps, logps], [logps]],
        ref_logprobs=[None, [], [logps, [1.0] * 6]],
        generation_params=[None, {}, {"temperature": 0.7, "weight_version": 3}],
        overrides=[None, [], [{}, {"temperature": 0.5}], [{"sft": True}, {}]],
        distill_token_ids=[None, [], [ids, ids]],
    )
    for record in records:
        record["distill_logprobs"] = [[[-1.0] * len(row) for row in rows] for rows in record["distill_token_ids"] or []]
    batch_of = AtroposBatchProcessor(reads_reference=True, reads_teacher=True).process_atropos_batch
    for record, body in zip(records, through_the_server(records), strict=True):
        batch = batch_of(decode(body))
        assert batch.rejected == {} and batch.env_ids.tolist() == [0, 0]
        row = [NAN, NAN, -0.5, -0.25, NAN, -2.0]
        sampled, ref = (record[name] or [] for name in ("inference_logprobs", "ref_logprobs"))
        wanted = [row if i < len(sampled) else [NAN] * 6 for i in range(2)]
        assert np.array_equal(batch.behavior_logp, np.concatenate(wanted).astype(np.float32), equal_nan=True)
        wanted = [row if ref and i == 0 else [NAN] * 6 for i in range(2)]
        assert np.array_equal(batch.ref_logp, np.concatenate(wanted).astype(np.float32), equal_nan=True)
        params, output = record["generation_params"] or {}, [entry or {} for entry in record["overrides"] or [None] * 2]
        temperatures = [own.get("temperature", params.get("temperature", NAN)) for own in output]
        assert batch.temperatures.tolist() == pytest.approx(temperatures, nan_ok=True)
        assert batch.weight_versions.tolist() == pytest.approx([params.get("weight_version", NAN)] * 12, nan_ok=True)
        assert batch.overrides.tolist() == [2 if own.get("sft") else 0 for own in output]
        there = bool(record["distill_token_ids"])
        assert batch.teacher_ids.tolist() == [5, 6, 7, 8, 9] * 2 * there and batch.teacher_logp.tolist() == [-1.0] * 10 * there
        assert batch.teacher_sizes.tolist() == [0, 0, 2 * there, 0, 1 * there, 2 * there] * 2


def test_every_field_comes_through_the_real_server_as_it_was_posted():
    """Those of many groups of three environments, one of which did not register; absent ones as null."""
    row, output = [0.0, 0.0, 0.5, 0.25, -1.5, 2.0], [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    records = every_combination(
        advantages=[None, [], [row, row], [row]],
        group_overrides=[None, {}, {"temperature": 0.5, "group_size": 2}, {"sft": True, "weight_version": "7"}],
        generation_params=[None, {"temperature": 2.0}],
        messages=[None, [], [output, output]],
        images=[None, [], [None, []]],
    )
    environments = (0, None, 1)
    absent = ("ref_logprobs", "inference_logprobs", "overrides", "distill_token_ids", "distill_logprobs")
    for k, body in enumerate(through_the_server(records, environments)):
        record, env_id = records[k], environments[k % 3]
        assert json.loads(body)["batch"] == [dict.fromkeys(absent) | record | {"env_id": env_id}]
        batch = AtroposBatchProcessor().process_atropos_batch(decode(body))
        assert batch.rejected == {} and batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 7]
        assert batch.env_ids.tolist() == [-1 if env_id is None else env_id] * 2 and batch.scores.tolist() == [0.0, 1.0]
        # a sequence without a row of advantages has that of its score: 0 and 1 become -1 and 1
        rows = [
            *(record["advantages"] or []),
            *[[0, 0, score, score, score, score] for score in (-1, 1)][len(record["advantages"] or []) :],
        ]
        shared, params = record["group_overrides"] or {}, record["generation_params"] or {}
        wanted = [[0, 0, 1, 1, 1, 1]] * 2 if shared.get("sft") else rows
        assert batch.advantages.reshape(2, 6).tolist() == wanted
        temperature = params.get("temperature", shared.get("temperature", NAN))
        assert batch.temperatures.tolist() == pytest.approx([temperature] * 2, nan_ok=True)
        assert batch.weight_versions.tolist() == pytest.approx([7.0 if shared.get("sft") else NAN] * 12, nan_ok=True)


def test_partial_groups_of_one_prompt_are_compared_as_one_and_of_two_prompts_are_not():
    halves = [group(size=1) | {"scores": [score]} for score in (0.0, 1.0)]
    others = [halves[0], halves[1] | {"tokens": [[3, 3, 3, 4, 5, 6]], "masks": [[-100, -100, 3, 4, 5, 6]]}]
    for parts, wanted in ((halves, [-1.0, 1.0]), (others, [0.0, 1.0])):
        with atropos_server() as server:
            client = AtroposClient(server.url, batch_size=2, max_token_len=64, num_steps=10, timeout=60)
            assert client.poll() is None
            env_id = register_env(server.url, 2)
            assert [post_group(server.url, env_id, part) for part in parts] == ["buffered", "buffered"]
            batch = AtroposBatchProcessor().process_atropos_batch(decode(client.poll()))
        assert [batch.advantages[span][2] for span in batch.spans()] == pytest.approx(wanted)


def test_parts_of_two_groups_that_arrive_by_turns_are_compared_with_their_own():
    """An environment works on several prompts at once: the server releases their parts in the order in which they came."""
    first, second = group(size=1), group(size=1) | {"tokens": [[9, 9, 3, 4, 5, 6]]}
    scores = [0.0, 5.0, 1.0, 7.0]
    with atropos_server() as server:
        client = AtroposClient(server.url, batch_size=4, max_token_len=64, num_steps=10, timeout=60)
        assert client.poll() is None
        env_id = register_env(server.url, 4)
        for part, score in zip([first, second] * 2, scores, strict=True):
            assert post_group(server.url, env_id, part | {"scores": [score]}) == "buffered"
        batch = AtroposBatchProcessor().process_atropos_batch(decode(client.poll()))
    assert batch.scores.tolist() == scores
    assert [batch.advantages[span][2] for span in batch.spans()] == pytest.approx([-1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"distill_token_ids": [[[5]] * 5]}, "teacher does not fit the tokens"),
        ({"distill_logprobs": [[[-1.0]] * 7]}, "teacher does not fit the tokens"),
        ({"distill_logprobs": [[[-1.0, -2.0]] * 6]}, "teacher does not fit the tokens"),
        ({"distill_logprobs": [[[0.5]] * 6]}, "teacher does not fit the tokens"),
        ({"distill_logprobs": [[[NAN]] * 6]}, "teacher does not fit the tokens"),
        ({"distill_logprobs": None}, "teacher does not fit the tokens"),
        ({"distill_token_ids": [[[True]] * 6]}, "teacher does not fit the tokens"),
        ({"distill_token_ids": [[[96]] * 6]}, "token id outside the vocabulary"),
        ({"distill_token_ids": [[[-1]] * 6]}, "token id outside the vocabulary"),
    ],
)
def test_a_teacher_that_cannot_be_is_left_out_and_counted(fields, reason):
    record = group(size=1) | {"distill_token_ids": [[[5]] * 6], "distill_logprobs": [[[-1.0]] * 6]}
    processor = AtroposBatchProcessor(reads_teacher=True, vocab_size=96)
    assert processor.process_atropos_batch([record]).rejected == {}
    assert processor.process_atropos_batch([record | fields]).rejected == {reason: 1}
    assert AtroposBatchProcessor(vocab_size=96).process_atropos_batch([record | fields]).rejected == {}  # nobody asked


@pytest.mark.parametrize("row", [[-1.0] * 5, "text", [[-1.0]] * 6, [True] * 6])
def test_logprobs_that_do_not_fit_are_set_aside_and_counted(row):
    batch = AtroposBatchProcessor().process_atropos_batch([group(size=1) | {"inference_logprobs": [row]}])
    assert batch.rejected == {"trained without inference_logprobs: they do not fit the tokens": 1}
    assert len(batch.lengths) == 1 and np.isnan(batch.behavior_logp).all()


@pytest.mark.parametrize("temperature", [0, -1.0, NAN, "0.7", True, 1e300])
def test_a_temperature_that_cannot_be_is_set_aside_and_counted(temperature):
    record = group(size=1) | {"generation_params": {"temperature": temperature}, "group_overrides": {"temperature": 0.5}}
    batch = AtroposBatchProcessor().process_atropos_batch([record])
    assert batch.rejected == {"trained at the run's temperature: its own is not a number above 0": 1}
    assert np.isnan(batch.temperatures).all()
    assert AtroposBatchProcessor(record_temperature=False).process_atropos_batch([record]).rejected == {}


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-40])
def test_a_temperature_that_no_float32_can_be_divided_by_is_set_aside_and_counted(temperature):
    """As float32 it is 0, or so small that logits over it are infinite. It must neither end a run nor spoil others' step."""
    record = group(size=1) | {"generation_params": {"temperature": temperature}}
    batch = AtroposBatchProcessor().process_atropos_batch([record])
    assert len(batch.rejected) == 1 and np.isnan(batch.temperatures).all()


@pytest.fixture
def settings(tiny_model, tmp_path, monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield {"model_name": tiny_model, "batch_size": 4, "device": "cpu", "output_dir": str(tmp_path / "run")}
    if torch.distributed.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def train(settings, **changes):
    WeightedSFTTrainer(WeightedSFTConfig(**settings | changes)).train()
    return [json.loads(line) for line in (Path(settings["output_dir"]) / "metrics.jsonl").open()]


def post_batches(url, batches):
    """Posts each batch when the one before it was taken; of its two groups the second in parts of one sequence."""
    complete_by, without_logps_by = register_env(url, 2), register_env(url, 2)
    for complete, without_logps in batches:
        assert post_group(url, complete_by, complete) == "received"
        assert [post_group(url, without_logps_by, part) for part in split(without_logps, 2)] == ["buffered", "buffered"]
        wait_until(lambda: requests.get(f"{url}/status", timeout=60).json()["queue_size"] == 0)


@pytest.mark.parametrize("source", ["file", "server"])
def test_a_run_says_what_its_records_brought(source, settings, tmp_path, rng):
    """Two environments in one batch: one sends all fields, the other scores only, and through a server in parts."""
    lengths = [8, 6]
    complete = make_group(
        rng, lengths, env_id=0, scores=[1.0, 0.0], generation_params={"temperature": 0.7, "weight_version": 0}
    )
    complete["inference_logprobs"] = [[1.0, 1.0] + [-3.0] * (n - 3) + [1.0] for n in lengths]  # the last one's is not known
    complete["ref_logprobs"] = [[-4.0] * n for n in lengths]
    complete["distill_token_ids"] = [[[5, 6]] * n for n in lengths]
    complete["distill_logprobs"] = [[[-1.0, -2.0]] * n for n in lengths]
    without_logps = make_group(rng, [7, 5], env_id=1, scores=[4.0, 2.0], advantages=[])
    without_logps["tokens"][1][:2] = without_logps["tokens"][0][:2]  # the prompt, by which its parts are known
    complete["advantages"] = None
    settings |= dict(objective="ppo_clip", kl_coef=0.1, distill_coef=0.5, entropy_coef=0.01)
    if source == "file":
        steps = train(settings, data=write_groups(tmp_path / "data.jsonl", [complete, without_logps] * 2))
    else:
        with atropos_server() as server, ThreadPoolExecutor() as pool:
            posting = pool.submit(post_batches, server.url, [(complete, without_logps)] * 2)
            steps = train(settings, atropos_url=server.url, training_steps=2)
            posting.result()
    assert len(steps) == 2
    for step in steps:
        assert step["tokens/trained"] == (6 + 4) + (5 + 3)
        assert step["data/no_behavior_logp"] == 2 + (5 + 3)  # the last tokens' of those that tell
        assert step["data/no_ref_logp"] == step["data/no_teacher"] == 5 + 3
        assert (step["score/mean"], step["score/env_0/mean"], step["score/env_1/mean"]) == (1.75, 0.5, 3.0)
        assert (step["score/env_0/std"], step["score/env_1/std"]) == (0.5, 1.0)
        # in each group one sequence has advantage 1 and the other -1
        assert step["advantage/mean"] == pytest.approx((6 - 4 + 5 - 3) / 18)
        assert step["advantage/std"] == pytest.approx(math.sqrt(1 - (4 / 18) ** 2))
        assert step["kl/reference"] > 0 and step["kl/teacher"] > 0
        assert step["ratio/max"] >= step["ratio/mean"] > 0 and 0 <= step["ratio/clipped"] < 1
        assert (step["data/rejected"], step["data/repaired"], step["data/sequences"]) == (0, 0, 4)
    assert [step["data/staleness"] for step in steps] == [0.0, 1.0]


def test_placeholders_and_empty_lists_are_no_inference_logprobs(settings, tmp_path, rng, capfd):
    """Everything else is there."""
    lengths = [8, 6]
    full = {"ref_logprobs": [[-4.0] * n for n in lengths], "distill_token_ids": [[[5, 6]] * n for n in lengths]}
    full["distill_logprobs"] = [[[-1.0, -2.0]] * n for n in lengths]
    absent = [None, [], [[1.0] * n for n in lengths], [[None] * n for n in lengths]]
    groups = [make_group(rng, lengths, inference_logprobs=logps, **full) for logps in absent]
    settings |= dict(data=write_groups(tmp_path / "data.jsonl", groups), objective="ppo_clip", kl_coef=0.1, distill_coef=0.5)
    with pytest.raises(
        UserError, match="the batch of step 1 has no inference_logprobs on any trained token, and strict is set"
    ):
        train(settings, strict=True)
    steps = train(settings, overwrite_output_dir=True)
    assert [step["data/no_behavior_logp"] for step in steps] == [2 * (6 + 4)] * 2
    assert all(step["data/no_ref_logp"] == step["data/no_teacher"] == 0 and step["ratio/mean"] is None for step in steps)
    output = capfd.readouterr().err
    assert output.count("no trained token of the batch has inference_logprobs: every ratio is 1") == 1
    assert "has ref_logprobs" not in output and "has distill_token_ids" not in output


@pytest.mark.parametrize(
    "changes, field",
    [
        (dict(objective="gspo"), "inference_logprobs"),
        (dict(kl_coef=0.1), "ref_logprobs"),
        (dict(distill_coef=0.1), "distill_token_ids"),
    ],
)
def test_a_batch_without_what_the_loss_needs_is_a_warning_or_under_strict_an_error(
    changes, field, settings, tmp_path, rng, capfd
):
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [8, 6]) for _ in range(4)])
    with pytest.raises(UserError, match=f"the batch of step 1 has no {field} on any trained token, and strict is set"):
        train(settings, data=data, strict=True, **changes)
    assert len(train(settings, data=data, overwrite_output_dir=True, **changes)) == 2
    assert capfd.readouterr().err.count(f"no trained token of the batch has {field}") == 1


def test_a_reference_model_of_another_vocabulary_is_refused(settings, tmp_path, rng):
    from conftest import make_model

    small = make_model(tmp_path / "small", vocab_size=50)
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [8, 6])])
    with pytest.raises(UserError, match="has a vocabulary of 50, the model one of 96"):
        train(settings, data=data, kl_coef=0.1, ref_model_name=small)


def test_the_servers_latest_example_is_a_record_like_the_others():
    with atropos_server() as server:
        client = AtroposClient(server.url, batch_size=2, max_token_len=64, num_steps=10, timeout=60)
        assert client.poll() is None
        post_group(server.url, register_env(server.url, 2), group())
        latest = requests.get(f"{server.url}/latest_example", timeout=60).json()
    assert AtroposBatchProcessor().process_atropos_batch([latest]).lengths.tolist() == [6, 6]
