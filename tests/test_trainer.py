"""One rank in this process: what a run writes, and its errors."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import VOCAB, clean_environment, make_group, make_model, run_together, write_groups
from fed_run import wait_until
from safetensors.torch import load_file

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.errors import UserError
from wsft.trainer import TrainingDiverged

pytestmark = pytest.mark.usefixtures("alone")
FP32 = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 3}}
KEYS = (
    "step", "loss", "grad_norm", "learning_rate", "tokens/trained", "tokens/total", "advantage/mean", "advantage/std",
    "logp/positive", "logp/negative", "entropy", "data/rejected", "time/step", "time/wait",
)  # fmt: skip


@pytest.fixture
def settings(tiny_model, tmp_path, rng):
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14]) for _ in range(3)])
    return dict(model_name=tiny_model, data=data, batch_size=2, device="cpu", output_dir=str(tmp_path / "run"), deepspeed=FP32)


def train(settings, **changes):
    trainer = WeightedSFTTrainer(WeightedSFTConfig(**settings | changes))
    return trainer.train(), [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").open()]


def test_a_run_leaves_config_metrics_and_a_model_that_loads(settings, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final, steps = train(settings, learning_rate=0.1)
    assert [s["step"] for s in steps] == [1, 2, 3] and all(key in s for s in steps for key in KEYS)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["learning_rate"] == 0.1 and config["micro_batch_tokens"] == 8192
    WeightedSFTConfig(**config)
    model, trained = AutoModelForCausalLM.from_pretrained(final), load_file(final / "model.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(param, trained[name])
    assert len(AutoTokenizer.from_pretrained(final)) == VOCAB
    start = load_file(f"{settings['model_name']}/model.safetensors")
    assert all(not torch.equal(trained[name], start[name]) for name in start)


def test_metrics_are_what_the_dense_model_says(settings, tiny_model, tmp_path, rng):
    from transformers import AutoModelForCausalLM

    group = make_group(rng, [10, 14, 7])
    _, (values,) = train(settings, data=write_groups(tmp_path / "one.jsonl", [group]), batch_size=3, temperature=0.7)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    logps, entropies, advantages = [], [], []
    for tokens, row in zip(group["tokens"], group["advantages"], strict=True):
        logp = (model(torch.tensor([tokens])).logits[0].detach().double() / 0.7).log_softmax(-1)
        logps += [logp[t - 1, tokens[t]].item() for t in range(2, len(tokens))]
        entropies += [-(logp[t - 1].exp() * logp[t - 1]).sum().item() for t in range(2, len(tokens))]
        advantages += row[2:]
    a, logp = torch.tensor(advantages).double(), torch.tensor(logps).double()
    wanted = {
        "loss": -(a * logp).mean(), "logp/positive": logp[a > 0].mean(), "logp/negative": logp[a < 0].mean(),
        "entropy": sum(entropies) / len(a), "advantage/mean": a.mean(), "advantage/std": a.std(correction=0),
        "tokens/trained": 25, "tokens/total": 31,
    }  # fmt: skip
    assert {key: values[key] for key in wanted} == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"max_staleness": 0}, "data/stale"),
        ({"mask_truncated": True}, "data/cut_off"),
        ({"mismatch_mask": [100.0, 200.0]}, "mismatch/token_masked"),
    ],
)
def test_a_batch_without_any_weight_changes_nothing_and_is_counted(changes, name, settings, tiny_model, tmp_path, rng, capfd):
    """All stale (at the second step), all cut off, all masked."""
    group = make_group(rng, [10, 14], generation_params={"weight_version": 0, "finish_reason": "length"})
    group["inference_logprobs"] = [[-3.0] * len(row) for row in group["tokens"]]
    data = write_groups(tmp_path / "without_weight.jsonl", [group] * 2)
    final, steps = train(settings, data=data, learning_rate=0.1, **changes)
    assert steps[1][name] > 0 and steps[1]["steps/without_signal"] == (1 if name == "data/stale" else 2)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(*(load_file(f"{f}/model.safetensors").values() for f in (final, tiny_model)), strict=True)
    ]
    assert any(moved) == (name == "data/stale")
    assert "no token has a weight: parameters, optimizer and schedule stay as they are" in capfd.readouterr().err


def test_updates_on_data_that_is_stale_already_are_said_once(settings, tmp_path, rng, capfd):
    groups = [make_group(rng, [6, 7], generation_params={"weight_version": 0}) for _ in range(6)]
    data = write_groups(tmp_path / "old.jsonl", groups)
    _, steps = train(settings, data=data, batch_size=4, updates_per_batch=2, training_steps=6)
    assert [step["data/staleness_max"] for step in steps] == [0, 1, 2, 3, 4, 5]
    words = capfd.readouterr().err
    assert words.count("step 3: the batch holds tokens that are 2 steps old, and updates_per_batch 2 adds up to 1") == 1
    assert "step 5: the batch" not in words
    with pytest.raises(ValueError, match="training_steps 3 is no multiple of updates_per_batch 2"):
        WeightedSFTConfig(**settings, updates_per_batch=2, training_steps=3)


def test_the_three_optimizer_schedules_follow_their_course(settings):
    courses = {}
    for name in ("constant", "linear", "cosine"):
        _, steps = train(
            settings, lr_scheduler=name, warmup_steps=1, training_steps=3, learning_rate=0.1, overwrite_output_dir=True
        )
        courses[name] = [s["learning_rate"] for s in steps]
    assert courses == {
        "constant": pytest.approx([0.05, 0.1, 0.1]),
        "linear": pytest.approx([0.05, 0.1, 0.05]),
        "cosine": pytest.approx([0.05, 0.1, 0.05]),
    }


def test_a_last_smaller_batch_is_trained_and_training_steps_ends_first(settings):
    _, steps = train(settings, batch_size=4)
    assert [s["data/sequences"] for s in steps] == [4, 2]
    _, steps = train(settings, training_steps=2, overwrite_output_dir=True)
    assert len(steps) == 2


def test_a_broken_line_is_named_and_the_others_are_trained(settings, tmp_path, rng, capfd):
    path = tmp_path / "broken.jsonl"
    unscored = make_group(rng, [6, 7], advantages=None) | {"scores": [float("nan"), 1.0]}
    lines = [json.dumps(make_group(rng, [6, 7])), '{"tokens": [[1,', json.dumps(make_group(rng, [6, 7])), json.dumps(unscored)]
    path.write_text("\n".join(lines) + "\n\n")
    _, steps = train(settings, data=str(path), batch_size=8)
    assert steps[0]["data/sequences"] == 5 and steps[0]["data/rejected"] == 2
    assert "line 2 of" in capfd.readouterr().err


def test_token_ids_outside_the_vocabulary_are_left_out_and_logged(settings, tmp_path, rng, capfd):
    bad = make_group(rng, [6])
    bad["tokens"][0][3] = bad["masks"][0][3] = VOCAB
    path = write_groups(tmp_path / "vocabulary.jsonl", [bad, make_group(rng, [6])])
    _, steps = train(settings, data=path)
    assert steps[0]["data/rejected"] == 1
    assert f"found {VOCAB}, expected 0 to {VOCAB - 1}" in capfd.readouterr().err


def test_data_without_one_usable_sequence_is_an_error(settings, tmp_path, rng):
    path = write_groups(tmp_path / "useless.jsonl", [make_group(rng, [6], masks=None)])
    with pytest.raises(UserError, match="no usable sequence"):
        train(settings, data=path)


def test_another_runs_results_are_kept_unless_asked(settings, tmp_path):
    _, first = train(settings)
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"not empty .*--overwrite_output_dir"):
        train(settings)
    _, second = train(settings, overwrite_output_dir=True, training_steps=1)
    assert len(first) == 3 and len(second) == 1 and mine.read_text() == "mine"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_that_are_not_finite_are_skipped_shouted_and_end_the_run(stage, settings, tiny_model, tmp_path, rng, capfd):
    good, huge = make_group(rng, [6]), make_group(rng, [8], advantages=[[0.0, 0.0] + [3e38] * 6])
    path = write_groups(tmp_path / "huge.jsonl", [huge, good, huge, huge, huge])
    ds = FP32 | {"zero_optimization": {"stage": stage}}
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        train(settings, data=path, batch_size=1, deepspeed=ds, reduction="sum")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [s["grad_norm"] is None for s in steps] == [True, False, True, True, True]
    assert [s["steps/not_finite"] for s in steps] == [1, 1, 2, 3, 4]
    assert capfd.readouterr().err.count("the step was skipped") == 4
    # the step after the skipped one starts from the untouched parameters
    _, (alone,) = train(
        settings, data=write_groups(tmp_path / "good.jsonl", [good]), batch_size=1, deepspeed=ds, reduction="sum",
        overwrite_output_dir=True,
    )  # fmt: skip
    assert steps[1]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(model_name="no/such/folder"), "no model in 'no/such/folder'"),
        (dict(data="absent.jsonl"), "absent.jsonl"),
        (dict(device="cuda"), "finds no CUDA device"),
        (dict(deepspeed="absent.json"), "absent.json cannot be read"),
        (dict(data=None, atropos_url="localhost:8000"), "http://localhost:8000"),
        (dict(data=None, atropos_url="http://127.0.0.1:9", atropos_timeout=1), "unreachable"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(changes, sentence, settings):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=sentence):
        train(settings, **changes)


def test_an_output_dir_that_cannot_be_is_a_sentence(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        train(settings, output_dir=str(tmp_path / "file"))


COMPILE = """
import sys, time
from torch.utils import cpp_extension
from wsft.distributed.op_compilation import compiling_ops
cpp_extension._write_ninja_file_and_build_library = lambda **_: print("compiles", flush=True) or time.sleep(float(sys.argv[1]))
cpp_extension._import_module_from_library = lambda *_: None
with compiling_ops():
    cpp_extension.load("op", ["op.cpp"], build_directory=sys.argv[2])
print("continues", flush=True)
"""


def test_a_start_that_is_killed_while_it_compiles_holds_up_no_other(tmp_path):
    """Neither those that wait for it, nor a later one, nor with what torch's own lock has left."""
    (tmp_path / "op.cpp").touch()
    (tmp_path / "lock").touch()

    def start(seconds):
        command = [sys.executable, "-c", COMPILE, str(seconds), str(tmp_path)]
        return subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, text=True)

    first = start(600)
    assert first.stdout.readline() == "compiles\n"
    waiting = [start(0), start(0)]
    first.kill()
    for process in [*waiting, start(0)]:
        assert process.communicate(timeout=100)[0] == "compiles\ncontinues\n"


def test_a_byte_order_mark_costs_no_line(settings, tmp_path, rng):
    path = tmp_path / "bom.jsonl"
    path.write_text(json.dumps(make_group(rng, [6, 7])) + "\r\n" + json.dumps(make_group(rng, [8, 9])), encoding="utf-8-sig")
    _, steps = train(settings, data=str(path), batch_size=4)
    assert steps[0]["data/sequences"] == 4


def test_train_py_ends_with_the_sentence_and_no_traceback(settings):
    command = [sys.executable, "train.py", "--model_name=no/such/folder", "--device=cpu"]
    ((code, output),) = run_together([command], [clean_environment()])
    assert code == 1 and "train.py: error: no model in 'no/such/folder'" in output and "Traceback" not in output
    assert "starting" not in output  # and compiling an op


@pytest.mark.parametrize("packing", [True, False])
def test_a_tokenizer_needs_no_pad_token_nor_one_that_the_model_embeds(packing, settings, tmp_path):
    from transformers import AutoTokenizer

    without, beyond = make_model(tmp_path / "without", pad_token=False), make_model(tmp_path / "beyond")
    tokenizer = AutoTokenizer.from_pretrained(beyond)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(beyond)
    assert tokenizer.pad_token_id == VOCAB  # of VOCAB rows
    finals = []
    for model in (without, beyond, settings["model_name"]):
        # rows of several lengths, and steps of fewer sequences than ranks would have: both need filling
        final, _ = train(settings, model_name=model, packing=packing, overwrite_output_dir=True)
        finals.append(load_file(final / "model.safetensors"))
        assert AutoTokenizer.from_pretrained(final).pad_token == AutoTokenizer.from_pretrained(model).pad_token
    assert all(torch.equal(finals[0][name], finals[i][name]) for name in finals[0] for i in (1, 2))


def test_a_model_with_unknown_arithmetic_before_its_logits_is_refused(settings, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.abs()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="does something between its hidden states and its logits"):
        train(settings)


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_other_families_train(family, settings, tmp_path):
    changes = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8} if family == "gemma" else {}
    model = make_model(tmp_path / family, family=family, **changes)
    _, steps = train(settings, model_name=model)
    assert len(steps) == 3


def make_mamba():
    """A state-space model: it carries its state over every border."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0))


def make_falcon_h1():
    """Attention, which can be kept apart, beside a state that cannot; freshly made, it leaks less than 1e-3 into the logps."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    return FalconH1ForCausalLM(
        FalconH1Config(**shape, num_key_value_heads=2, mamba_chunk_size=8, mamba_d_state=8, pad_token_id=0)
    )


def make_gpt_oss():
    """Its attention has sinks, which packed attention does not know."""
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    return GptOssForCausalLM(GptOssConfig(**shape, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("make, stage", [(make_mamba, 2), (make_falcon_h1, 2), (make_gpt_oss, 3), (make_gpt_oss, 2)])
def test_a_model_that_cannot_keep_packed_sequences_apart_is_padded(make, stage, settings, tmp_path, capfd):
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(settings["model_name"]).save_pretrained(tmp_path / "model")
    settings |= dict(model_name=str(tmp_path / "model"), deepspeed=FP32 | {"zero_optimization": {"stage": stage}})
    _, steps = train(settings)
    assert "cannot keep packed sequences apart: they are padded instead" in capfd.readouterr().err
    _, alone = train(settings, micro_batch_tokens=2, overwrite_output_dir=True)
    assert steps[0]["plan/padding"] > 0 == alone[0]["plan/padding"]
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in alone], rel=1e-4)


def test_rollouts_without_weight_are_not_run_and_count_all_the_same(settings, tmp_path, rng):
    equal = make_group(rng, [12, 9], advantages=None, scores=[1.0, 1.0])
    zero = make_group(rng, [7, 8], overrides=[{"set_advantage_to_zero": True}, None])
    data = write_groups(tmp_path / "zero_weight.jsonl", [equal, zero])
    moved, printed = [], []
    for skip in (True, False):
        final, (step,) = train(
            settings, data=data, batch_size=4, skip_zero_weight=skip, learning_rate=1.0, overwrite_output_dir=True
        )
        moved.append(load_file(final / "model.safetensors"))
        printed.append(step)
    assert [step["plan/skipped"] for step in printed] == [3, 0] and printed[0]["loss"] == pytest.approx(
        printed[1]["loss"], rel=1e-6
    )
    assert [step["tokens/trained"] for step in printed] == [10 + 7 + 5 + 6] * 2
    assert printed[0]["weight/mean_abs"] == pytest.approx(printed[1]["weight/mean_abs"], rel=1e-6)
    assert printed[0]["data/no_behavior_logp"] == printed[1]["data/no_behavior_logp"] == 28
    for name, value in moved[1].items():
        torch.testing.assert_close(moved[0][name], value, rtol=1e-5, atol=1e-6)
    _, (step,) = train(settings, data=data, batch_size=4, entropy_coef=0.1, overwrite_output_dir=True)
    assert step["plan/skipped"] == 0  # each of them has entropy


def compiles(name):
    """DeepSpeed's Adam for the CPU takes a minute to compile."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["zero3", "zero3_hpz", compiles("zero3_offload"), compiles("zero3_offload_optimizer"), "zero2", "zero3_cpu"]
)
def test_each_shipped_deepspeed_config_trains(name, settings):
    _, steps = train(settings, deepspeed=f"ds_configs/{name}.json", learning_rate=1e-3)
    assert len(steps) == 3 and steps[-1]["grad_norm"] > 0


def test_states_in_the_hosts_memory_train_alike(settings):
    """With torch's Adam, which needs no compiling: DeepSpeed's is in the shipped configs."""
    adam, cpu = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}, {"device": "cpu"}
    losses = []
    for offload in ({}, {"offload_optimizer": cpu}, {"offload_optimizer": cpu, "offload_param": cpu}):
        ds = {"optimizer": adam, "zero_optimization": {"stage": 3} | offload, "zero_allow_untested_optimizer": True}
        _, steps = train(settings, deepspeed=ds, learning_rate=1e-2, overwrite_output_dir=True)
        losses.append([step["loss"] for step in steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32_at_every_stage(stage, settings):
    """AdamW, whose first steps would show a step that was counted twice."""
    moves, start = {}, load_file(f"{settings['model_name']}/model.safetensors")
    for bf16 in (False, True):
        ds = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}
        final, _ = train(settings, deepspeed=ds, learning_rate=1e-2, weight_decay=0.1, overwrite_output_dir=True)
        trained = load_file(final / "model.safetensors")
        moves[bf16] = torch.cat([(trained[name].float() - start[name]).flatten() for name in start])
    assert (moves[True] - moves[False]).norm() < 0.2 * moves[False].norm()


@pytest.mark.parametrize(
    "ds, named",
    [
        ({"optimizer": {"type": "NoSuch", "params": {}}}, "NoSuch"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
    ],
)
def test_what_deepspeed_refuses_is_a_sentence(ds, named, settings):
    with pytest.raises(UserError, match=f"(?s)DeepSpeed cannot start.*{named}"):
        train(settings, deepspeed=ds)


@pytest.mark.parametrize("stage", [3, *[pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)]])
def test_many_micro_batches_in_bf16_have_the_gradient_of_one(stage, settings, tmp_path, rng):
    settings["model_name"] = make_model(tmp_path / "model", num_hidden_layers=1)
    group = make_group(rng, [12])
    many = {name: value * 400 if isinstance(value, list) else value for name, value in group.items()}
    norms = []
    for record in (group, many):
        _, (step,) = train(
            settings, data=write_groups(tmp_path / "data.jsonl", [record]), batch_size=len(record["tokens"]),
            micro_batch_tokens=12, share_prefixes=False, overwrite_output_dir=True, gradient_checkpointing=False,
            deepspeed={"bf16": {"enabled": True}, "optimizer": {"type": "SGD"}, "zero_optimization": {"stage": stage}},
        )  # fmt: skip
        norms.append(step["grad_norm"])
    assert step["plan/micro_batches"] == 400 and norms[1] == pytest.approx(norms[0], rel=0.01)


ADAM = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}


@pytest.mark.parametrize(
    "at, stage",
    [
        (0, 0),
        (1, 3),
        *[pytest.param(*setup, marks=pytest.mark.slow) for setup in [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 0)]],
    ],
)
def test_a_step_without_any_weight_changes_nothing(at, stage, settings, tmp_path, rng, capfd):
    """Neither parameters nor Adam's state nor the schedule: what comes after is as if it had not been."""
    first, last = (make_group(rng, [10, 14]) for _ in range(2))
    all_clipped = make_group(
        rng, [10, 14], advantages=[2.0, 3.0], inference_logprobs=[[-50.0] * 10, [-50.0] * 14]
    )  # all clipped
    changes = {"deepspeed": {"optimizer": ADAM, "zero_optimization": {"stage": stage}}, "objective": "ppo_clip"}
    changes |= {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "overwrite_output_dir": True}
    finals, steps = [], []
    for groups in ([first, last], [*[first, last][:at], all_clipped, *[first, last][at:]]):
        final, lines = train(settings, data=write_groups(tmp_path / "data.jsonl", groups), **changes)
        finals.append(load_file(final / "model.safetensors"))
        steps.append(lines)
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    (skipped,) = [step for step in steps[1] if step["ratio/clipped"] == 1]
    assert (skipped["step"], skipped["grad_norm"], skipped["steps/not_finite"]) == (at + 1, 0, 0)
    assert [step["steps/without_signal"] for step in steps[1]] == [int(i >= at) for i in range(3)]
    others = [step for step in steps[1] if step is not skipped]
    assert [s["learning_rate"] for s in others] == [s["learning_rate"] for s in steps[0]]
    assert f"step {at + 1}: no token has a weight" in capfd.readouterr().err


def test_norms_do_not_decay(settings):
    ds = {"optimizer": ADAM, "zero_optimization": {"stage": 3}}
    final, _ = train(settings, deepspeed=ds, learning_rate=1e-3, weight_decay=100)
    start, trained = (load_file(f"{folder}/model.safetensors") for folder in (settings["model_name"], final))
    for name in start:  # three steps, each of which takes a tenth from what decays; Adam moves by 0.001 or so
        if "norm" in name:
            assert (trained[name] - start[name]).abs().max() < 0.005, name
        else:
            assert trained[name].norm() < 0.9 * start[name].norm(), name


def test_weight_decay_0_does_not_decay(settings):
    """Where neither the run nor its JSON names it, it is not torch's 0.01. An eps so large leaves nothing of Adam's moves."""
    adam = {"type": "AdamW", "params": {"torch_adam": True, "eps": 1e6}}
    ds = {"optimizer": adam, "zero_optimization": {"stage": 3}}
    final, _ = train(settings, deepspeed=ds, learning_rate=0.5)
    start, trained = (load_file(f"{folder}/model.safetensors") for folder in (settings["model_name"], final))
    assert all(torch.allclose(start[name], trained[name], rtol=0, atol=1e-5) for name in start)


def test_an_optimizer_with_other_values_than_asked_for_is_refused(settings):
    """OneCycle takes momentum from parameters of its own."""
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 0}}
    adam = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "torch_adam": True}}
    ds = {"optimizer": adam, "scheduler": cycle, "zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"optimizer.params.betas .* is \[0.9, 0.95\], but the optimizer has \(0.8, 0.99\)"):
        train(settings, deepspeed=ds)
    cycle["params"]["cycle_momentum"] = False
    assert len(train(settings, deepspeed=ds, overwrite_output_dir=True)[1]) == 3


def test_the_rate_of_a_scheduler_in_the_json_peaks_at_the_runs(settings, tmp_path, rng):
    data = write_groups(tmp_path / "many.jsonl", [make_group(rng, [10, 14]) for _ in range(6)])
    for kind, params in {"WarmupLR": {}, "WarmupDecayLR": {}, "WarmupCosineLR": {}, "OneCycle": {"cycle_min_lr": 0}}.items():
        if kind == "OneCycle":
            params |= {"cycle_first_step_size": 3, "cycle_momentum": False}
        ds = FP32 | {"scheduler": {"type": kind, "params": params}}
        _, steps = train(settings, deepspeed=ds, data=data, training_steps=6, learning_rate=1e-4, overwrite_output_dir=True)
        rates = [step["learning_rate"] for step in steps]
        assert max(rates) == pytest.approx(1e-4, rel=0.2) and max(rates) <= 1e-4 * (1 + 1e-6), (kind, rates)


@pytest.mark.parametrize("truncated", [True, False])
def test_a_run_that_trains_no_token_ends_with_an_error(truncated, settings, tmp_path, rng):
    """By its masks, or since it is cut off before the first trained token."""
    group = make_group(rng, [20, 24], prompt=18)
    changes = {"max_token_len": 12, "overlong": "truncate"}
    if not truncated:
        group["masks"], changes = [[-100] * 20, [-100] * 24], {}
    data = write_groups(tmp_path / "none.jsonl", [group] * 4)
    with pytest.raises(UserError, match=r"3 batches in a row held no usable sequence \(left out: .*'no token is trained': 6"):
        train(settings, data=data, **changes)
    data = write_groups(tmp_path / "one.jsonl", [group])
    with pytest.raises(UserError, match="nothing was trained"):
        train(settings, data=data, **changes, overwrite_output_dir=True)


def test_batches_and_sequences_without_a_trained_token_are_passed_over(settings, tmp_path, rng):
    whole, half, none = (make_group(rng, [10, 14]) for _ in range(3))
    half["masks"][0], none["masks"] = [-100] * 10, [[-100] * 10, [-100] * 14]
    _, steps = train(settings, data=write_groups(tmp_path / "some.jsonl", [whole, none, none, half]))
    assert [step["data/rejected"] for step in steps] == [0, 4]
    assert [step["tokens/trained"] for step in steps] == [20, 12] and steps[1]["data/sequences"] == 2


def test_wandb_gets_the_same_offline(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(settings, wandb_project="tests", wandb_group="g", wandb_run_name="n")
    logged = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    wait_until(lambda: b"logp/positive" in logged[0].read_bytes())  # which W&B's own process writes
