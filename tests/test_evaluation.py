"""Held-out records: their loss and logprobs are those of the dense model, and training is as without them."""

import json

import pytest
import torch
from conftest import make_group, run_ranks, write_groups
from fed_run import flags, steps_of
from safetensors.torch import load_file

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.errors import UserError


@pytest.fixture
def held_out(rng):
    return [make_group(rng, [12, 30, 7], advantages=None, scores=[0.0, 1.0, 5.0]) for _ in range(3)]


@pytest.fixture
def settings(tiny_model, tmp_path, rng, held_out):
    ds = tmp_path / "ds.json"
    ds.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 3}}))
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14]) for _ in range(4)])
    eval_data = write_groups(tmp_path / "held_out.jsonl", held_out)
    return dict(
        model_name=tiny_model, data=data, eval_data=eval_data, eval_steps=2, batch_size=2, device="cpu", deepspeed=str(ds),
        learning_rate=0.1, output_dir=str(tmp_path / "run"), micro_batch_tokens=32, max_token_len=64,
    )  # fmt: skip


def dense(folder, groups):
    """Loss by mean over tokens, and the mean logps of favoured and disfavoured ones."""
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), []
    for group in groups:
        scores = torch.tensor(group["scores"], dtype=torch.float64)
        advantages = (scores - scores.mean()) / scores.std(correction=0)
        for tokens, A in zip(group["tokens"], advantages.tolist(), strict=True):
            logp = model(torch.tensor([tokens])).logits[0].detach().log_softmax(-1)
            rows += [(A, logp[t - 1, tokens[t]].item()) for t in range(2, len(tokens))]
    positive, negative = ([logp for A, logp in rows if (A > 0) == favoured] for favoured in (True, False))
    return {
        "eval/loss": -sum(A * logp for A, logp in rows) / len(rows),
        "eval/logp_positive": sum(positive) / len(positive),
        "eval/logp_negative": sum(negative) / len(negative),
    }


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_held_out_metrics_are_those_of_the_dense_model_and_change_nothing(stage, settings, held_out, tmp_path):
    ds = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": {"stage": stage}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    for code, output in run_ranks(["train.py", *flags(settings)], 2):
        assert code == 0, output
    steps = steps_of(tmp_path / "run")
    assert [("eval/loss" in step) for step in steps] == [False, True, False, True]
    for name, value in dense(tmp_path / "run" / "final", held_out).items():
        assert steps[-1][name] == pytest.approx(value, rel=1e-4), name
    without = {name: value for name, value in settings.items() if not name.startswith("eval")}
    for code, output in run_ranks(["train.py", *flags(without, output_dir=tmp_path / "without")], 2):
        assert code == 0, output
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("alone")
def test_held_out_records_without_a_trained_token_are_refused(settings, tmp_path, rng):
    empty = write_groups(tmp_path / "empty.jsonl", [make_group(rng, [4], masks=None)])
    with pytest.raises(
        UserError, match=r"eval_data .*empty.jsonl holds no sequence with a trained token \(left out: .*no mask"
    ):
        WeightedSFTTrainer(WeightedSFTConfig(**settings | {"eval_data": empty})).train()
