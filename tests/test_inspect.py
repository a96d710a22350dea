"""Faults planted in real text are found with their place, without false findings; sources; data of terminal and page."""

import json
import re
import shutil
from itertools import chain

import numpy as np
import pytest
import requests
import torch
from atropos_server import atropos_server, post_group, register_env
from conftest import ROOT, make_group, make_model, run_script, write_groups
from fed_run import fed, flags, make_groups, make_settings, steps_of, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from wsft import WeightedSFTConfig
from wsft.errors import UserError
from wsft.inspect.terminal import pieces, view_of, visible
from wsft.inspect.view import inspect
from wsft.rollouts.journal import Journal

SHARED = ROOT / "tests" / "bodies"
PLACEHOLDER = 1.0


@pytest.fixture(scope="module")
def clean(smollm2, tmp_path_factory):
    """Six groups of four answers in SmolLM2's chat template, with logps of a sampler, as text of JSON."""
    path = tmp_path_factory.mktemp("clean") / "groups.jsonl"
    command = ["-m", "wsft.environment", "--tokenizer", smollm2, "--pattern", "mixed", "--output", path]
    code, output = run_script(*command, "--groups", "6", "--group_size", "4")
    assert code == 0, output
    groups = [json.loads(line) for line in path.open()]
    for group in groups:
        group["inference_logprobs"] = [[PLACEHOLDER if m == -100 else -0.5 for m in row] for row in group["masks"]]
    return json.dumps(groups)


def findings(groups, folder, tokenizer, policy=None, **settings):
    """(message, places) of each finding."""
    data = write_groups(folder / "groups.jsonl", groups)
    config = WeightedSFTConfig(model_name=policy or tokenizer, tokenizer_name=tokenizer, device="cpu", **settings)
    return [(f.text, f.places) for f in inspect(data, None, config, policy).findings]


def first_trained(group, i):
    return next(t for t, m in enumerate(group["masks"][i]) if m != -100)


def test_a_clean_file_has_no_findings(clean, smollm2, tmp_path):
    assert findings(json.loads(clean), tmp_path, smollm2) == []


# each takes group 2 apart in its sequence 1 (rollout 9), and tells the position; None: of the whole sequence


def mask_one_early(group):
    t = first_trained(group, 1) - 1
    group["masks"][1][t] = group["tokens"][1][t]
    return t


def mask_one_late(group):
    t = first_trained(group, 1)
    group["masks"][1][t] = -100
    return t


def logps_one_early(group):
    group["inference_logprobs"][1] = [*group["inference_logprobs"][1][1:], -0.5]
    return first_trained(group, 1) - 1


def header_trained(group):
    group.pop("inference_logprobs")
    t = first_trained(group, 1) - 3
    group["masks"][1][t : t + 3] = group["tokens"][1][t : t + 3]
    return t


def user_trained(group):
    group.pop("inference_logprobs")
    t = first_trained(group, 1) - 8
    group["masks"][1][t] = group["tokens"][1][t]
    return t


def line_after_the_end_trained(group):
    newline = group["tokens"][1][first_trained(group, 1) - 1]
    for name, value in {"tokens": newline, "masks": newline, "inference_logprobs": -0.1, "advantages": 1.0}.items():
        group[name][1].append(value)
    return len(group["tokens"][1]) - 1


def no_end(group):
    for name in ("tokens", "masks", "inference_logprobs", "advantages"):
        group[name][1].pop()
    return len(group["tokens"][1]) - 1


def end_untrained(group):
    group.pop("inference_logprobs")
    group["masks"][1][-1] = -100
    return len(group["tokens"][1]) - 1


def doubled_bos(group):
    for name, value in {"tokens": None, "masks": -100, "inference_logprobs": PLACEHOLDER, "advantages": 0.0}.items():
        group[name][1].insert(0, group["tokens"][1][0] if value is None else value)
    return 1


def all_masked(group):
    group["masks"][1] = [-100] * len(group["masks"][1])
    return None


@pytest.mark.parametrize(
    "plant, output",
    [
        (mask_one_early, "the mask starts one token before the behavior logps in 1 sequence"),
        (mask_one_late, "the mask starts one token after the behavior logps in 1 sequence"),
        (logps_one_early, "the mask starts one token after the behavior logps in 1 sequence"),
        (header_trained, "tokens of the chat template are trained in 1 sequence"),
        (user_trained, "user messages are trained in 1 sequence"),
        (line_after_the_end_trained, "tokens of the chat template are trained in 1 sequence"),
        (no_end, "1 sequence(s) end without an end-of-sequence token, though they were not cut off"),
        (end_untrained, "the end-of-sequence token is not trained in 1 sequence"),
        (doubled_bos, "the beginning-of-sequence token is doubled in 1 sequence"),
        (all_masked, "no token is trained in 1 sequence"),
    ],
)
def test_a_planted_fault_is_named_with_its_place(plant, output, clean, smollm2, tmp_path):
    groups = json.loads(clean)
    position = plant(groups[2])
    found = findings(groups, tmp_path, smollm2)
    assert [places for text, places in found if output in text] == [[(9, position)]], found
    also = "tokens of the chat template" if plant is mask_one_early else output  # that token is the template's, too
    assert all(output in text or also in text for text, _ in found), found


def test_a_group_whose_prompt_is_trained_is_named(clean, smollm2, tmp_path):
    groups = json.loads(clean)
    groups[2]["masks"] = groups[2]["tokens"]
    found = dict(findings(groups, tmp_path, smollm2))
    assert found["the prompt is trained in 4 sequence(s): their groups have a common prefix, and no token is masked"] == [
        (r, 1) for r in range(8, 12)
    ]


def test_an_id_outside_the_vocabulary_is_named(clean, smollm2, tmp_path):
    groups = json.loads(clean)
    groups[2]["tokens"][1][7] = 49_152
    ((text, places),) = findings(groups, tmp_path, smollm2)
    assert "1 sequence(s) left out: token id outside the vocabulary (line 3, sequence 1: found 49152" in text and not places


def test_groups_without_variance_are_counted(clean, smollm2, tmp_path):
    groups = json.loads(clean)
    for group in groups[1:3]:
        group |= {"advantages": None, "scores": [0.5] * 4}
    assert findings(groups, tmp_path, smollm2) == [
        ("2 of 6 groups (33%) have no gradient: all their advantages are 0 (equal scores?)", [(4, None), (8, None)])
    ]
    assert findings(groups, tmp_path, smollm2, objective="sft") == []


def test_raw_rewards_are_not_centred(clean, smollm2, tmp_path):
    groups = json.loads(clean)
    for group in groups:
        group |= {"advantages": None, "scores": [1.0, 1.0, 0.0, 1.0]}
    ((text, _),) = findings(groups, tmp_path, smollm2, score_advantages="raw")
    assert "advantages are not centred: over 24 sequences their mean is 0.75, their standard deviation 0.433" in text
    assert findings(groups, tmp_path, smollm2) == []


def test_a_completion_that_was_cut_off_may_lack_its_end(clean, smollm2, tmp_path):
    groups = json.loads(clean)
    no_end(groups[2])
    groups[2]["generation_params"] = {"max_tokens": 4}
    assert findings(groups, tmp_path, smollm2) == []


# -- the policy beside the sampler -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny model that is sure of itself, so that the logps of neighbours differ."""
    return make_model(tmp_path_factory.mktemp("models") / "sure", initializer_range=0.5)


def sampled(policy, temperature=1.0):
    """Groups with the logps that the policy's own logits give."""
    rng, model = np.random.default_rng(0), AutoModelForCausalLM.from_pretrained(policy)
    groups = [make_group(rng, [14, 16, 12, 18], prompt=4, scores=[1.0, -1.0, 1.0, -1.0], advantages=None) for _ in range(4)]
    for group in groups:
        for row in [*group["tokens"], *group["masks"]]:
            row[-1] = 2  # the end
        logps = []
        for row in group["tokens"]:
            with torch.no_grad():
                z = model(torch.tensor([row])).logits[0, :-1] / temperature
            own = z.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
            logps.append([PLACEHOLDER] * 4 + own[3:])
        group["inference_logprobs"] = logps
    return groups


def test_logps_of_the_policy_itself_are_near(policy, tmp_path):
    assert findings(sampled(policy), tmp_path, policy, policy) == []


def test_shifted_logps_are_distinguished_from_those_of_other_weights(policy, tmp_path):
    groups = sampled(policy)
    for group in groups:
        group["inference_logprobs"] = [[*row[1:], -1.0] for row in group["inference_logprobs"]]
    text = findings(groups, tmp_path, policy, policy)[-1][0]
    assert re.search(r"\d\.\d\d nats on average: shifted by one to the right they match .*, 0\.00", text)
    groups = sampled(policy)
    for group in groups:
        group["inference_logprobs"] = [[PLACEHOLDER, *row[:-1]] for row in group["inference_logprobs"]]
    assert "shifted by one to the left they match" in findings(groups, tmp_path, policy, policy)[-1][0]
    other = make_model(tmp_path / "other", initializer_range=0.4)
    assert "no shift by one matches" in findings(sampled(policy), tmp_path, other, other)[-1][0]


def test_logps_that_leave_the_temperature_out_are_recognised(policy, tmp_path):
    groups = sampled(policy)
    for group in groups:
        group["generation_params"] = {"temperature": 0.4}
    assert "at temperature 1 they match: set record_temperature false" in findings(groups, tmp_path, policy, policy)[-1][0]
    groups = sampled(policy, temperature=0.4)
    for group in groups:
        group["generation_params"] = {"temperature": 0.4}
    assert findings(groups, tmp_path, policy, policy) == []


def test_what_is_shown_is_what_training_weighs(policy, tmp_path):
    """Against the objective's formula, from the logps that the record and the model have."""
    data = write_groups(tmp_path / "groups.jsonl", sampled(policy, temperature=1.3))
    settings = dict(objective="importance_sampling", objective_args={"cap": 1.1}, reduction="sequence_mean")
    found = inspect(data, None, WeightedSFTConfig(model_name=policy, device="cpu", **settings), policy)
    tokens, trained = view_of(found, policy)["tokens"], found.view.batch.loss_mask
    ratio = np.exp(tokens["logp"] - tokens["behavior_logp"])[trained]
    assert np.allclose(tokens["ratio"][trained], ratio) and ratio.std() > 0.1
    wanted = found.view.batch.advantages[trained] * ratio.clip(max=1.1)
    assert np.allclose(tokens["weight"][trained], wanted, atol=1e-5) and not tokens["weight"][~trained].any()


# -- recorded bodies, read by hand -------------------------------------------------------------------------------------------


def of_body(name, smollm2, tmp_path):
    groups = json.loads((SHARED / f"{name}.json").read_text())["batch"]
    return findings(groups, tmp_path, smollm2)


def test_two_recorded_environments(smollm2, tmp_path):
    """Taxi: each answer is `...<|im_end|>` and the line end that the template writes after it, trained: their last tokens. All
    its scores are -1. GSM8K: two answers were cut off at 48 tokens, two end with <|im_end|>: nothing is wrong."""
    assert of_body("two_envs", smollm2, tmp_path) == [
        ("tokens of the chat template are trained in 4 sequence(s)", [(0, 859), (1, 859), (2, 954), (3, 921)]),
        ("1 of 2 groups (50%) have no gradient: all their advantages are 0 (equal scores?)", [(0, None)]),
    ]


def test_recorded_groups_posted_by_hand(smollm2, tmp_path):
    """Ids 1 4093 198 28 2 read as `<|im_start|>user`, a line end, a comma and `<|im_end|>`, trained from the comma on: what a
    user says."""
    assert of_body("token_level_advantages", smollm2, tmp_path) == [
        ("user messages are trained in 4 sequence(s)", [(r, 3) for r in range(4)])
    ]


# -- sources -----------------------------------------------------------------------------------------------------------------


def run_inspect(*words, code=0):
    found, output = run_script("-m", "wsft.inspect", *words)
    assert found == code and "Traceback" not in output, output
    return output


def test_a_run_is_inspected_by_its_journal_and_settings(tiny_model, rng, tmp_path):
    groups = make_groups(rng)
    with fed(tmp_path / "run", groups) as (server, _):
        train(
            make_settings(tiny_model, tmp_path), num_ranks=1, atropos_url=server.url, output_dir=tmp_path / "run", resume=False
        )
    held = Journal(tmp_path / "run" / "journal" / "0_of_1", read_only=True).numbers
    assert held
    for number in held:
        output = run_inspect(tmp_path / "run", "--batch", number, "--show", 0)
        assert f"batch {number}" in output and "all 4 sequences" in output
    config = WeightedSFTConfig.from_args([f"--config={tmp_path}/run/config.yaml"])
    newest = inspect(str(tmp_path / "run"), None, config, None).view
    assert newest.batch.tokens.tolist() == list(chain(*groups[held[-1]]["tokens"]))
    output = run_inspect(tmp_path / "run", "--batch", 99, code=1)
    assert f"holds batches {held[0]} to {held[-1]}, not 99" in output
    shutil.rmtree(tmp_path / "run" / "journal")
    assert "holds none: it goes back to the oldest checkpoint" in run_inspect(tmp_path / "run", code=1)


def test_inspecting_a_server_takes_nothing_from_its_queue(tiny_model, rng, tmp_path):
    settings = make_settings(tiny_model, tmp_path) | {"resume": False, "training_steps": 6}
    groups = make_groups(rng)[:6]
    with atropos_server() as server:

        def feed_and_look(processes):
            env_id = register_env(server.url, 4)
            config = WeightedSFTConfig(model_name=str(tiny_model))
            for n, group in enumerate(groups):
                post_group(server.url, env_id, group)
                seen = inspect(server.url, None, config, None)
                assert seen.view.batch.tokens.tolist() == list(chain(*group["tokens"])), n
                while len(steps_of(tmp_path / "run")) <= n:
                    assert all(process.poll() is None for process in processes) or n == len(groups) - 1
                    inspect(server.url, None, config, None)

        train(settings, 1, during=feed_and_look, atropos_url=server.url, output_dir=tmp_path / "run")
        assert [step["tokens/total"] for step in steps_of(tmp_path / "run")] == [sum(map(len, g["tokens"])) for g in groups]
        assert requests.get(f"{server.url}/status", timeout=60).json()["queue_size"] == 0


def test_a_server_without_an_example_says_so(tiny_model):
    with atropos_server() as server:
        output = run_inspect(server.url, "--tokenizer", tiny_model, code=1)
        assert "has no example yet: no environment has posted since it started" in output
    assert "gives no example" in run_inspect(server.url, "--tokenizer", tiny_model, code=1)


@pytest.mark.parametrize(
    "words, output",
    [
        (["nothing.jsonl", "--tokenizer", "MODEL"], "data 'nothing.jsonl' is not a file: expected JSONL, one Atropos group"),
        (["tests", "--tokenizer", "MODEL"], "tests is a folder without config.yaml: expected the output_dir of a run"),
        (["x.jsonl"], "name the tokenizer of x.jsonl with --tokenizer FOLDER"),
        (["x.jsonl", "--tokenizer", "/nowhere"], "no tokenizer in '/nowhere'"),
        (["x.jsonl", "--tokenizer", "MODEL", "--objectiv", "sft"], "unknown setting --objectiv, did you mean --objective?"),
    ],
)
def test_what_cannot_be_inspected_is_a_sentence(words, output, tiny_model):
    code, found = run_script("-m", "wsft.inspect", *(tiny_model if w == "MODEL" else w for w in words))
    assert code in (1, 2) and output in found and "Traceback" not in found


def test_a_file_is_inspected_batch_by_batch_as_it_is_trained(tiny_model, rng, tmp_path):
    data = write_groups(tmp_path / "groups.jsonl", [make_group(rng, [5, 6, 7]) for _ in range(4)])
    config = WeightedSFTConfig(model_name=tiny_model, batch_size=5)
    lengths = [inspect(data, n, config, None).view.batch.lengths.tolist() for n in range(4)]
    assert lengths == [[5, 6, 7, 5, 6], [7, 5, 6, 7, 5], [6, 7], []]


def test_the_dry_run_prints_findings_of_the_first_batch(clean, smollm2, tiny_model, tmp_path):
    groups = json.loads(clean)
    position = no_end(groups[2])
    data = write_groups(tmp_path / "groups.jsonl", groups)
    model = make_model(tmp_path / "model", vocab_size=49_152)
    code, output = run_script("train.py", *flags(dict(model_name=model, tokenizer_name=smollm2, data=data, dry_run=True)))
    place = f"line 3, sequence 1, position {position}"
    assert f"looks wrong: 1 sequence(s) end without an end-of-sequence token, though they were not cut off ({place})" in output
    assert code == 0, output


# -- text --------------------------------------------------------------------------------------------------------------------


def test_pieces_put_together_are_the_text(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in (
        "Plain words,  two spaces\n\tand a tab.",
        "naïve 🧑\u200d🚀 שלום 你好 𝔘",
        "<script>alert(1)</script>\x00\x1b[31m",
    ):
        ids = np.array(tokenizer.encode(text))
        (found,) = pieces(tokenizer, [ids])
        assert len(found) == len(ids) and "".join(piece for piece in found if piece != "…") == text
    rocket = np.array(tokenizer.encode("🚀"))
    assert len(rocket) > 1 and pieces(tokenizer, [rocket])[0][-1] == "🚀"
    assert "\ufffd" in "".join(pieces(tokenizer, [rocket[:-1]])[0])  # what was cut off in a character stays broken


def test_a_terminal_obeys_nothing_that_a_rollout_says():
    assert visible("a\x1b[31m\x07\nb\u202e\x9b") == "a␛[31m␇\nb<U+202E><U+009B>"


def test_a_source_that_ends_early_gives_an_empty_page(tiny_model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n{]\n")
    config = WeightedSFTConfig(model_name=tiny_model)
    view = view_of(inspect(str(tmp_path / "empty.jsonl"), None, config, None), None)
    assert view["rollouts"] == [] and "line is not JSON" in view["findings"][0]["text"]
    with pytest.raises(UserError, match="is not a file"):
        inspect(str(tmp_path / "absent.jsonl"), None, config, None)
