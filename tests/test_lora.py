"""LoRA: adapters against a dense float64 reference that adds B A to the weights; checkpoints, exports, the base as the
reference."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_group, run_ranks, run_script, save_model, write_groups
from fed_run import flags
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig
from zoo import config_of

from wsft import WeightedSFTConfig
from wsft.errors import UserError
from wsft.model.loading import empty_model
from wsft.model.lora import Adapters, as_if_trained, switched_off

RANK, ALPHA, LEARNING_RATE, CLIP, KL, STEPS, BATCH_SIZE = 3, 6.0, 1.0, 0.3, 0.2, 5, 6
LORA = dict(lora_rank=RANK, lora_alpha=ALPHA)
SETTINGS = dict(device="cpu", batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, max_grad_norm=CLIP, max_token_len=64, **LORA)
PREFIX = "base_model.model."


def sgd(stage):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": zero, "gradient_clipping": "auto"}


def batches(rng):
    """Uneven rollouts, some of which share prompts."""
    return [[make_group(rng, [9, 25, 14], 5, alike=True), make_group(rng, [31, 4, 12])] for _ in range(STEPS)]


def reference(model_name, batches, initial, kl=0.0, dtype=torch.float64):
    """Adapters after SGD in float64, one rollout at a time: `initial` is the run's A, name of the file -> matrix."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, attn_implementation="eager")
    weights = dict(model.named_parameters())
    A = {name: value.to(dtype) for name, value in initial.items()}
    B = {name: torch.zeros(outputs_of(weights, name), RANK, dtype=dtype) for name in A}
    for groups in batches:
        rows = [row for g in groups for row in zip(g["tokens"], g["masks"], g["advantages"], strict=True)]
        total = sum(m != -100 for _, mask, _ in rows for m in mask[1:])
        for each in (*A.values(), *B.values()):
            each.requires_grad_(True)
        loss = 0.0
        for tokens, mask, advantages in rows:
            changes = {name: ALPHA / RANK * (B[name] @ A[name]) for name in A}
            adapted = {name: weights[name] + (x.T if transposed(name) else x) for name, x in changes.items()}
            logp = functional_call(model, weights | adapted, (torch.tensor([tokens]),)).logits[0].log_softmax(-1)
            base = model(torch.tensor([tokens])).logits[0].log_softmax(-1).detach()
            for t in range(1, len(tokens)):
                if mask[t] != -100:
                    ratio = base[t - 1, tokens[t]] - logp[t - 1, tokens[t]]
                    loss = loss - advantages[t] * logp[t - 1, tokens[t]] + kl * (ratio.exp() - 1 - ratio)
        trained = [*A.values(), *B.values()]
        gradients = torch.autograd.grad(loss / total, trained)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 1.1 * CLIP
        with torch.no_grad():
            moved = [x - LEARNING_RATE * g * min(1.0, CLIP / norm.item()) for x, g in zip(trained, gradients, strict=True)]
        A, B = dict(zip(A, moved[: len(A)], strict=True)), dict(zip(B, moved[len(A) :], strict=True))
    return A, B


def outputs_of(weights, name):
    return weights[name].shape[1 if transposed(name) else 0]


def transposed(name):
    """GPT-2's Conv1D."""
    return ".c_" in name


def adapter_of(folder):
    """A and B of an adapter's file, by names of the base's parameters."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith(PREFIX) and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    pairs = [
        {
            name.removeprefix(PREFIX).replace(f".lora_{matrix}", ""): tensor
            for name, tensor in tensors.items()
            if f"lora_{matrix}" in name
        }
        for matrix in "AB"
    ]
    return pairs


def initial_of(model_name):
    """What a run starts with."""
    config = WeightedSFTConfig(model_name=model_name, **LORA)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    Adapters.for_model(empty_model(model.config, False), (), config).put_into(model, config.seed)
    return {name.replace(".lora_A", ".weight"): p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}


def error_of(found, wanted):
    return max(((found[name].double() - value).norm() / value.norm()).item() for name, value in wanted.items())


SETUPS = list(itertools.product(range(3), (0, 2, 3)))  # of models and stages
SOME = [(0, 0), (1, 3), (2, 2), (0, 3)]


@pytest.mark.parametrize(
    "num_ranks, setups",
    [(2, SOME), *(pytest.param(n, SETUPS, marks=pytest.mark.slow) for n in (1, 2))],
    ids=["2", "1-all", "2-all"],
)
def test_adapters_are_those_of_a_dense_reference(num_ranks, setups, tmp_path, rng):
    """At ZeRO stages 0, 2 and 3, packed and padded, with and without shared prefixes and KL to the base, tied and untied."""
    models = [llama(tmp_path / "tied", True), llama(tmp_path / "untied", False), gpt2(tmp_path / "gpt2")]
    groups = batches(rng)
    data = write_groups(tmp_path / "data.jsonl", [group for batch in groups for group in batch])
    runs = []
    for i, (number, stage) in enumerate(setups):
        model = models[number]
        packs = (i + num_ranks) % 2 == 0
        runs.append(
            SETTINGS
            | dict(
                model_name=model, data=data, deepspeed=sgd(stage), output_dir=str(tmp_path / f"run{i}"), packing=packs,
                share_prefixes=i % 4 < 2, kl_coef=KL * (i % 2), gradient_checkpointing=i % 3 > 0,
                micro_batch_tokens=(32, 1000)[i % 2],
            )
        )  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], num_ranks, timeout=400):
        assert code == 0, output[-4000:]
    kinds = {(run["model_name"], run["kl_coef"]) for run in runs}
    wanted = {(model, kl): reference(model, groups, initial_of(model), kl) for model, kl in kinds}
    for (model, _), (A, _) in wanted.items():
        start = initial_of(model)
        assert all((A[name] - start[name]).norm() / A[name].norm() > 3e-4 for name in A)
    for i, run in enumerate(runs):
        for found, exact in zip(
            adapter_of(tmp_path / f"run{i}" / "final"), wanted[run["model_name"], run["kl_coef"]], strict=True
        ):
            assert found.keys() == exact.keys() and error_of(found, exact) < 1e-5, run


def llama(folder, tied):
    """With matrices so large that gradients of A and B are, too."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, **shape)
    return save_model(folder, config, scale=5.0)


def gpt2(folder):
    shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=96, bos_token_id=1, eos_token_id=2)
    return save_model(folder, GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape), scale=5.0)


@pytest.fixture
def trains(tmp_path, rng):
    """Trains on some batches; returns the output, and leaves the run in tmp_path / name."""
    groups = [group for batch in batches(rng) for group in batch]
    data = write_groups(tmp_path / "data.jsonl", groups)
    (tmp_path / "ds.json").write_text(json.dumps(sgd(3)))

    def train(model, name="run", ranks=2, codes=(0,), **changes):
        settings = SETTINGS | dict(model_name=model, data=data, deepspeed=tmp_path / "ds.json", output_dir=tmp_path / name)
        settings = {key: value for key, value in (settings | changes).items() if value is not None}
        results = run_ranks(["train.py", *flags(settings)], ranks)
        assert all(code in codes for code, _ in results), results[0][1]
        return results[0][1]

    return train


def test_a_resumed_run_is_the_same_and_checkpoints_hold_no_base(trains, tmp_path):
    model = llama(tmp_path / "model", False)
    adam = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "fused": True}}
    (tmp_path / "ds.json").write_text(json.dumps(sgd(3) | {"optimizer": adam}))
    common = dict(model=model, kl_coef=KL, learning_rate=1e-2, save_steps=2, keep_checkpoints=9)
    output = trains(**common)
    assert "LoRA of rank 3 trains" in output and "parameters (" in output
    whole = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    files = json.loads((tmp_path / "run" / "checkpoints" / "step_2" / "checkpoint.json").read_text())["files"]
    adapters = sum(tensor.numel() for tensor in whole.values())
    size_of_base = (Path(model) / "model.safetensors").stat().st_size
    assert sum(size for name, size in files.items() if "deepspeed" in name) < 12 * adapters + 60_000 < size_of_base + 60_000
    for ranks, tolerance in ((2, 0), (1, 1e-6)):
        trains(**common, name=f"again{ranks}", ranks=ranks, resume=tmp_path / "run" / "checkpoints" / "step_2")
        again = load_file(tmp_path / f"again{ranks}" / "final" / "adapter_model.safetensors")
        assert all((again[name] - whole[name]).abs().max() <= tolerance for name in whole)


def test_a_base_with_other_weights_is_refused_on_resume(trains, tmp_path):
    model = llama(tmp_path / "model", True)
    trains(model, ranks=1, training_steps=2)
    output = trains(model, ranks=1, resume=True, codes=(1,), lora_target="q_proj,v_proj")
    assert "lora_target is 'q_proj,v_proj' and was 'attention-mlp'" in output
    path = tmp_path / "run" / "checkpoints" / "step_2" / "checkpoint.json"
    metadata = path.read_text()
    path.write_text(metadata.replace("attention-mlp", "q_proj,v_proj"))
    output = trains(model, ranks=1, resume=True, codes=(1,), lora_target="q_proj,v_proj")
    assert "holds other parameters than those that are trained" in output and "Traceback" not in output
    path.write_text(metadata)
    moved = shutil.copytree(model, tmp_path / "moved")
    trains(moved, ranks=1, resume=True, training_steps=3)  # the same weights at another place
    tensors = load_file(moved / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    output = trains(moved, ranks=1, resume=True, training_steps=4, codes=(1,))
    assert "to which the adapters belong, have changed" in output and "Traceback" not in output


def test_the_base_is_the_reference_without_a_copy_of_it(tmp_path, rng):
    """Bit for bit that of naming it, and for tokens only that have no ref_logprobs."""
    model = llama(tmp_path / "model", True)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    groups = [group for batch in batches(rng) for group in batch]
    plain = write_groups(tmp_path / "plain.jsonl", groups)
    for i, group in enumerate(groups):
        group["ref_logprobs"] = [scored_by(base, tokens) if i % 2 else None for tokens in group["tokens"]]
    mixed = write_groups(tmp_path / "mixed.jsonl", groups)
    for group in groups:
        group["ref_logprobs"] = [[logp - 0.5 for logp in scored_by(base, tokens)] for tokens in group["tokens"]]
    others = write_groups(tmp_path / "others.jsonl", groups)
    common = SETTINGS | dict(model_name=model, deepspeed=sgd(3), kl_coef=KL)
    runs = {
        "implied": dict(data=plain), "named": dict(data=plain, ref_model_name=model), "mixed": dict(data=mixed),
        "others": dict(data=others),
    }  # fmt: skip
    settings = [common | changes | dict(output_dir=str(tmp_path / name)) for name, changes in runs.items()]
    (tmp_path / "runs.json").write_text(json.dumps(settings))
    for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], 2):
        assert code == 0, output[-4000:]
    found = {name: load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in runs}
    assert all(torch.equal(found["implied"][name], tensor) for name, tensor in found["named"].items())
    implied = {name: tensor.double() for name, tensor in found["implied"].items()}
    assert error_of(found["mixed"], implied) < 1e-5 and error_of(found["others"], implied) > 1e-4


def scored_by(model, tokens):
    logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [-1.0, *(logp[t - 1, tokens[t]].item() for t in range(1, len(tokens)))]


@pytest.mark.parametrize("make", [gpt2, lambda folder: llama(folder, True)], ids=["gpt2", "llama"])
def test_what_is_exported_is_loaded_by_peft_and_merged_file_by_file(make, trains, tmp_path):
    model = make(tmp_path / "model")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(sharded, max_shard_size="40KB")
    for path in Path(model).glob("*token*"):
        shutil.copy(path, sharded)
    trains(sharded, ranks=1)
    final, rows = tmp_path / "run" / "final", torch.tensor([[5, 9, 33, 70, 8]])
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = base(rows).logits
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sharded) and config["target_modules"] == sorted(config["target_modules"])
    adapted = PeftModel.from_pretrained(base, final)(rows).logits
    assert (adapted - before).abs().max() > 0.01 * before.abs().max()
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    code, output = run_script("-m", "wsft.export", checkpoint, tmp_path / "merged", "--merge")
    assert code == 0 and "rounding lost 0.0% of what the adapter adds" in output, output
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(rows).logits
    assert torch.allclose(merged, adapted, atol=1e-5 * before.abs().max().item())
    code, output = run_script("-m", "wsft.export", checkpoint, tmp_path / "bf16", "--merge", "--merge_dtype", "bfloat16")
    assert code == 0 and 1 < float(re.search(r"rounding lost ([\d.]+)%", output)[1]) < 5, output
    assert {tensor.dtype for path in (tmp_path / "bf16").glob("*.safetensors") for tensor in load_file(path).values()} == {
        torch.bfloat16
    }


def test_a_run_without_adapters_has_none_to_merge(tiny_model, trains, tmp_path):
    trains(tiny_model, ranks=1, training_steps=1, lora_rank=None, lora_alpha=None)
    code, output = run_script("-m", "wsft.export", tmp_path / "run" / "checkpoints" / "step_1", tmp_path / "out", "--merge")
    assert code == 1 and "has no adapter to merge" in output and not (tmp_path / "out").exists()


def test_a_is_drawn_from_the_seed_and_the_name_alone(tmp_path):
    model = llama(tmp_path / "model", True)
    every, some = (drawn(model, seed=7, lora_target=target) for target in ("attention-mlp", "v_proj,layers.1.mlp.up_proj"))
    assert len(some) == 3 and all(torch.equal(every[name], some[name]) for name in some)
    other = drawn(model, seed=8)
    assert not any(torch.equal(every[name], other[name]) for name in every)
    bf16 = drawn(model, seed=7, dtype=torch.bfloat16)
    assert all(torch.equal(every[name].bfloat16(), bf16[name]) for name in every)


def drawn(model_name, seed, dtype=torch.float32, **changes):
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
    config = WeightedSFTConfig(model_name=model_name, **LORA, **changes)
    torch.rand(seed)  # other draws before
    Adapters.for_model(empty_model(model.config, False), (), config).put_into(model, seed)
    return {name: param.detach() for name, param in model.named_parameters() if "lora_A" in name}


ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]
SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MOE = dict(num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
TARGETS = {  # model type, further settings -> ends of the adapted modules, what is left out
    "qwen3_moe": (MOE, ATTENTION, ["experts"]),
    "qwen2_moe": (MOE | dict(shared_expert_intermediate_size=24), [*ATTENTION, *MLP], ["experts", "routers"]),
    "qwen3_next": (
        MOE | LINEAR | dict(shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"]),
        [*ATTENTION, *MLP, "in_proj_ba", "in_proj_qkvz", "out_proj"],
        ["experts", "routers"],
    ),
    "hunyuan_v1_moe": (
        dict(num_key_value_heads=2, head_dim=8, num_experts=8, moe_topk=2),
        [*ATTENTION, *MLP],
        ["experts", "routers"],
    ),
    "falcon_h1": (
        dict(num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
        [*ATTENTION, *MLP],
        ["state-space and convolution blocks"],
    ),
    "opt": (dict(ffn_dim=48, word_embed_proj_dim=16), ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"], []),
    "falcon": ({}, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], []),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_attention_and_mlp_projections_are_adapted_whatever_the_architecture(kind):
    more, ends, left_out = TARGETS[kind]
    model = empty_model(AutoConfig.for_model(kind, **SHAPE | more), False)
    found = Adapters.for_model(model, (), WeightedSFTConfig(model_name="m", lora_rank=3))
    assert sorted({name.rpartition(".")[2] for name in found.modules}) == sorted(ends)
    assert sorted(found.left_out) == left_out


@pytest.mark.parametrize("name, left_out", [
    ("longcat_flash", "routers"), ("zaya", "routers"), ("gemma3n_text", "AltUp"),
])  # fmt: skip
def test_routers_of_any_size_are_not_adapted(name, left_out):
    model = empty_model(config_of(name), False)
    found = Adapters.for_model(model, (), WeightedSFTConfig(model_name="m", lora_rank=3))
    assert left_out in found.left_out and not any("router" in module or "altup" in module for module in found.modules)


@pytest.mark.parametrize(
    "target, message",
    [
        ("qproj", "lora_target 'qproj' is no linear module of the model: expected attention-mlp or some of"),
        ("lm_head", "lora_target 'lm_head' names outside of the decoder layers"),
        ("gate", "names routers"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused(target, message):
    more, _, _ = TARGETS["hunyuan_v1_moe"]
    model = empty_model(AutoConfig.for_model("hunyuan_v1_moe", **SHAPE | more), False)
    target = "wg" if target == "gate" else target
    with pytest.raises(UserError, match=message):
        Adapters.for_model(model, (), WeightedSFTConfig(model_name="m", lora_rank=3, lora_target=target))


def test_a_model_without_such_projections_is_refused():
    model = empty_model(AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8), False)
    with pytest.raises(UserError, match="MambaForCausalLM has no attention or MLP projections"):
        Adapters.for_model(model, (), WeightedSFTConfig(model_name="m", lora_rank=3))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lora_alpha=8), "lora_rank is not set"),
        (dict(load_in_4bit=True), "load_in_4bit is not supported: under ZeRO-3 each rank would hold the whole"),
        (dict(lora_rank=4, lora_dropout=0.1), "with dropout the trained policy is not that of the sampler"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightedSFTConfig(model_name="m", **settings)


def test_checks_at_the_start_run_with_adapters_that_do_something(tmp_path):
    """B is 0 then."""
    name, rows = llama(tmp_path / "model", True), torch.tensor([[5, 9, 33]])
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    before = model(rows).logits
    config = WeightedSFTConfig(model_name=name, **LORA)
    Adapters.for_model(empty_model(model.config, False), (), config).put_into(model, 0)
    assert torch.equal(model(rows).logits, before)
    with as_if_trained(model):
        assert (model(rows).logits - before).abs().max() > 0.01 * before.abs().max()
        with switched_off(model):
            assert torch.equal(model(rows).logits, before)
    assert torch.equal(model(rows).logits, before)


def test_a_low_learning_rate_is_warned_of(trains, tmp_path):
    output = trains(llama(tmp_path / "model", True), ranks=1, training_steps=1, learning_rate=1e-6)
    assert "LoRA learns at about 10 times that" in output


def test_a_run_in_bf16_follows_its_twin_in_float32(tmp_path, rng):
    """What the adapters add to the weights, over all matrices: the base, the copies of adapters in the forward pass and the
    gradients are rounded to 8 bits."""
    model, groups = llama(tmp_path / "model", False), batches(rng)
    data, added = write_groups(tmp_path / "data.jsonl", [group for batch in groups for group in batch]), {}
    runs = [
        SETTINGS
        | dict(model_name=model, data=data, deepspeed=sgd(3) | {"bf16": {"enabled": on}}, output_dir=str(tmp_path / name))
        for name, on in (("bf16", True), ("fp32", False))
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], 2):
        assert code == 0, output[-4000:]
    for name in ("bf16", "fp32"):
        A, B = adapter_of(tmp_path / name / "final")
        added[name] = torch.cat([(B[matrix] @ A[matrix]).flatten() for matrix in sorted(A)])
    error = ((added["bf16"] - added["fp32"]).norm() / added["fp32"].norm()).item()
    print(f"relative difference {error:.4f}")
    assert 0 < error < 0.05
