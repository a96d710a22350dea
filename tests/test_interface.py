"""A loop of one's own, a source and callbacks of one's own: exact as train.py."""

import functools
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import make_group, run_ranks, write_groups
from fed_run import flags, state_of, steps_of
from safetensors.torch import load_file

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.errors import UserError
from wsft.rollouts.sources import group_of_rows

STEPS = 4


@pytest.fixture
def batches(rng):
    made = [[make_group(rng, [10, 14], env_id=0), make_group(rng, [6, 9], env_id=1)] for _ in range(STEPS)]
    made[1][0]["tokens"][1] = [5, -6, 7]  # is left out
    return made


@pytest.fixture
def settings(tiny_model, tmp_path, batches, monkeypatch):
    write_groups(tmp_path / "batches.jsonl", batches)
    monkeypatch.setenv("WSFT_BATCHES", str(tmp_path / "batches.jsonl"))
    ds = tmp_path / "ds.json"
    adam = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    ds.write_text(json.dumps({"optimizer": adam, "zero_optimization": {"stage": 3}}))
    return {
        "model_name": tiny_model, "deepspeed": ds, "batch_size": 4, "device": "cpu", "learning_rate": 1e-2, "save_steps": 2,
        "training_steps": STEPS, "lr_scheduler": "linear", "resume": True, "step_timeout": 120,
    }  # fmt: skip


def loop(settings, tmp_path, out, codes=(0,), **changes):
    """Run tests/own_loop.py on two ranks; returns rank 0's output."""
    command = ["tests/own_loop.py", tmp_path / "batches.jsonl", out, *flags(settings, **changes)]
    results = run_ranks([str(word) for word in command], 2)
    assert all(code in codes for code, _ in results), results
    return results


def trained(settings, tmp_path, name, **changes):
    (code, output), _ = run_ranks(["train.py", *flags(settings, output_dir=tmp_path / name, **changes)], 2)
    assert code == 0, output
    return tmp_path / name / "final"


def assert_same(folder, wanted):
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, wanted))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_own_loop_and_an_own_source_train_as_train_py_does(settings, batches, tmp_path, monkeypatch):
    """Stopped by a signal to rank 1, the loop saves, and goes on where it was; an error on rank 1 ends both."""
    monkeypatch.setenv("WSFT_EVENTS", str(tmp_path / "events"))
    more = {"source": "tests.own_loop:batches_of", "callbacks": "tests.own_loop:Events", "publish_folder": tmp_path / "out"}
    wanted = trained(settings, tmp_path, "by_source", publish_steps=2, **more)
    steps = steps_of(tmp_path / "by_source")
    assert [step["data/rejected"] for step in steps] == [0, 1, 0, 0]
    events = [(tmp_path / f"events{rank}").read_text().split("\n") for rank in (0, 1)]
    of_steps = {step["step"]: f"step {step['step']} {step['loss']:.6f}" for step in steps}
    assert events[0] == events[1] == [
        "publish 0", of_steps[1], "publish 2", of_steps[2], "save step_2", of_steps[3], "publish 4", of_steps[4], "save step_4",
        "end final", "",
    ]  # fmt: skip

    monkeypatch.setenv("WSFT_TEST", "stop 3@1")
    results = loop(settings, tmp_path, tmp_path / "model", output_dir=tmp_path / "own")
    assert state_of(tmp_path / "own")["state"] == "preempted" and state_of(tmp_path / "own")["step"] == 3
    assert all("from 0" in output and "metrics" not in output for _, output in results)
    monkeypatch.setenv("WSFT_TEST", "raise 3@1")
    results = loop(settings, tmp_path, tmp_path / "model", output_dir=tmp_path / "own", codes=(1,))
    assert "ended by rank 1: ValueError: my own mistake" in results[0][1] and "my own mistake" in results[1][1]
    assert state_of(tmp_path / "own")["state"] == "failed"
    monkeypatch.delenv("WSFT_TEST")
    results = loop(settings, tmp_path, tmp_path / "model", output_dir=tmp_path / "own")
    assert_same(tmp_path / "model", wanted)
    assert state_of(tmp_path / "own")["state"] == "finished" and all("from 3" in output for _, output in results)
    printed = [json.loads(output.rsplit("metrics ", 1)[1].split("\n")[0]) for _, output in results]
    assert printed[0]["loss"] == printed[1]["loss"] == steps[-1]["loss"]
    assert [step["loss"] for step in steps_of(tmp_path / "own")] == [step["loss"] for step in steps]

    from transformers import AutoModelForCausalLM

    model, logps = AutoModelForCausalLM.from_pretrained(wanted), json.loads((tmp_path / "model" / "logps.json").read_text())
    rows = [row for group in batches[0] for row in group["tokens"]]
    for tokens, found in zip(rows, itertools.chain(*logps), strict=True):
        logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        assert all(math.isnan(x) for x in found[:2]) and len(found) == len(tokens)
        assert found[2:] == pytest.approx([logp[t - 1, tokens[t]].item() for t in range(2, len(tokens))], abs=1e-5)


@pytest.mark.usefixtures("alone")
def test_rows_of_tensors_train_as_their_group_does_and_what_is_missing_is_said(settings, batches, tmp_path):
    group, runs = make_group(np.random.default_rng(0), [10, 7]), []
    settings["model_name"] = str(shutil.copytree(settings["model_name"], tmp_path / "model"))
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}<bos> {{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}<bos> {% endif %}"
    )
    T = 12
    rows = {
        "tokens": torch.tensor([row + [0] * (T - len(row)) for row in group["tokens"]]),
        "loss_masks": torch.tensor([[label != -100 for label in row] + [False] * (T - len(row)) for row in group["masks"]]),
        "advantages": torch.tensor([row + [0.0] * (T - len(row)) for row in group["advantages"]], dtype=torch.float64),
    }
    assert group_of_rows(rows)["tokens"] == group["tokens"] and group_of_rows(rows)["advantages"] == group["advantages"]
    for given, name in (([group], "group"), (rows, "rows")):
        config = WeightedSFTConfig(**settings | {"output_dir": str(tmp_path / name), "deepspeed": str(settings["deepspeed"])})
        with WeightedSFTTrainer(config) as trainer:
            assert trainer.step([group | {"masks": None}]) == {} and trainer.step_number == 0
            runs.append(trainer.step(given))
            assert trainer.save() == trainer.folder.checkpoints / "step_1" and trainer.step_number == 1
            with pytest.raises(UserError, match=r"publish\(\) needs publish_to"):
                trainer.publish()
            said = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
            as_group = {"tokens": [[1, 5, 6, 2, 1, 7, 8, 2]], "masks": [[-100] * 5 + [7, 8, 2]], "scores": [1.0]}
            empty, chat, wrong, pair, row, none = trainer.logprobs(
                [{}, {"messages": said}, group | {"masks": None}, group, as_group, 5]
            )
            assert empty == none == [] and wrong == [None, None] and [len(row) for row in pair] == [10, 7]
            close = functools.partial(np.allclose, atol=1e-5, equal_nan=True)
            assert close(chat, row) and np.isfinite(chat).sum() == 3
            (one,), two = trainer.logprobs([{}, as_group])[1:], trainer.logprobs(rows)[0]
            assert close(one, row) and close(two[0], pair[0])
            assert trainer.logprobs([{}]) == [[]]
    assert runs[0]["loss"] == runs[1]["loss"] and state_of(tmp_path / "rows")["state"] == "finished"
    with pytest.raises(UserError, match="was given NoneType, expected a list"), WeightedSFTTrainer(config) as trainer:
        trainer.step(None)
    with pytest.raises(UserError, match="cannot be saved as JSON"), WeightedSFTTrainer(config) as trainer:
        trainer.state["array"] = np.zeros(2)
        trainer.step([group])
    assert state_of(tmp_path / "rows")["state"] == "failed"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"callbacks": "math:nothing"}, "callbacks 'math:nothing' cannot be imported"),
        ({"callbacks": "test_interface:Wrong"}, "have on_batch: there are on_step, on_save, on_publish, on_end"),
        ({"source": "math:nothing"}, "source 'math:nothing' cannot be imported"),
        ({"source": "test_interface:tuples"}, "yielded a tuple, expected a list of groups"),
        ({"source": "test_interface:arrays"}, "yielded what is not JSON"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_code_of_ones_own_that_cannot_be_used_is_a_sentence(changes, says, settings, tmp_path):
    settings = settings | {"deepspeed": str(settings["deepspeed"]), "output_dir": str(tmp_path / "run")} | changes
    with pytest.raises(UserError, match=says):
        WeightedSFTTrainer(WeightedSFTConfig(**settings)).train()


@pytest.mark.parametrize("other", [{"data": "x.jsonl"}, {"fetch_mode": "per_rank"}])
def test_a_source_beside_another_is_refused(other):
    with pytest.raises(ValueError, match=r"source m:f gives the batches, but .* drop one of the two"):
        WeightedSFTConfig(model_name="m", source="m:f", **other)


class Wrong:
    def on_batch(self):
        pass


def tuples(config, number):
    yield ({},)


def arrays(config, number):
    yield [{"tokens": np.zeros(3)}]
