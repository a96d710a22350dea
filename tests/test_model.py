"""What a model does in training: nothing random, the same for a sequence in any layout; and which models are refused."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make_group, make_model, save_model, write_groups
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import config_of

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.dry_run import dry_run
from wsft.errors import UserError
from wsft.model.attention import PACKED, register
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.loading import empty_model, load_model_config, passes_of, require_trainable
from wsft.model.rotary import stop_growth
from wsft.model.row_layouts import RowLayouts, find_row_layouts
from wsft.model.small import small_copies

pytestmark = pytest.mark.usefixtures("alone")
CPU = torch.device("cpu")
FP32 = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 3}}
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
NOISY = {  # as transformers makes them by default, but for their size
    "gpt2": SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "phimoe": SHAPE | MOE | {"attention_dropout": 0.3, "input_jitter_noise": 0.1},
}


def train(model, tmp_path, groups, **changes):
    settings = dict(model_name=model, batch_size=len(groups[0]["tokens"]), device="cpu", deepspeed=FP32, learning_rate=0.1)
    settings |= dict(output_dir=str(tmp_path / "run"), overwrite_output_dir=True, max_token_len=64)
    data = write_groups(tmp_path / "data.jsonl", groups)
    trainer = WeightedSFTTrainer(WeightedSFTConfig(**settings | {"data": data} | changes))
    trainer.train()
    return [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").open()]


def logps(folder, rows):
    """Of each token but the first, by the model in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logp = [model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows]
    return [x.gather(1, torch.tensor(row[1:])[:, None]).squeeze(1) for x, row in zip(logp, rows, strict=True)]


@pytest.mark.parametrize(
    "kind, recomputed",
    [
        ("gpt2", True),
        ("opt", True),
        pytest.param("opt", False, marks=pytest.mark.slow),
        pytest.param("phimoe", False, marks=pytest.mark.slow),
    ],
)
def test_nothing_random_happens_in_training(kind, recomputed, tmp_path, rng, capfd):
    folder = save_model(tmp_path / "model", AutoConfig.for_model(kind, **NOISY[kind]))
    group = make_group(rng, [10, 14, 7])
    group["inference_logprobs"] = [[1.0, *row.tolist()] for row in logps(folder, group["tokens"])]
    found = {}
    for seed in (1, 2):
        capfd.readouterr()
        (found[seed],) = train(folder, tmp_path, [group], seed=seed, gradient_checkpointing=recomputed)
        assert capfd.readouterr().err.count("trained without dropout") == 1
    for step in found.values():
        assert step["ratio/mean"] == pytest.approx(1, abs=1e-5) and step["ratio/max"] == pytest.approx(1, abs=1e-5)
    assert found[1]["loss"] == found[2]["loss"] and found[1]["grad_norm"] == found[2]["grad_norm"]


@pytest.mark.parametrize("share, said", [(0.9, 1), (1.0, 0)])
def test_logprobs_of_another_distribution_are_said_on_fresh_data(share, said, tmp_path, rng, capfd):
    """As those of a sampler that drew from tokens that together have 0.9."""
    folder = make_model(tmp_path / "model")
    group = make_group(rng, [60] * 5)
    group["inference_logprobs"] = [[1.0, *(row - math.log(share)).tolist()] for row in logps(folder, group["tokens"])]
    train(folder, tmp_path, [group] * 2, objective="ppo_clip", learning_rate=0.0)
    assert capfd.readouterr().err.count("step 1: the ratio to the sampler's logprobs is 0.900 on average") == said


def test_recomputed_layers_are_recomputed(tmp_path):
    """In evaluation mode, too: the layer runs once forward, once in the backward pass."""
    folder = save_model(tmp_path / "model", AutoConfig.for_model("opt", **NOISY["opt"]))
    model, calls = WeightedSFTModel(AutoModelForCausalLM.from_pretrained(folder)), []
    model.recompute_activations()
    model.train()
    layer = model.model.model.decoder.layers[0]
    layer.fc1.register_forward_hook(lambda *_: calls.append(layer.training))
    tokens, trained = torch.arange(8).unsqueeze(0), torch.arange(1, 8)
    model(tokens, trained, torch.ones(7)).loss.backward()
    assert calls == [False, False] and layer.training
    model.eval()
    model(tokens, trained, torch.ones(7)).loss.backward()
    assert calls == [False] * 3


STRONG = 8.0  # so that it matters what attends to what: a random model's attention is nearly uniform
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2, 3, 4.0]}
LONGROPE |= {"original_max_position_embeddings": 24}
LLAMA4 = {"head_dim": 8, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]}
LLAMA4 |= {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
MASKED = {  # kind -> config, and whether rows can be packed, or at least padded
    "phimoe": (SHAPE | MOE | {"sliding_window": 8}, True, True),
    "mistral": (SHAPE | {"sliding_window": 8}, True, True),
    "llama4_text": (
        SHAPE | LLAMA4 | {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
        True,
        True,
    ),
    "gpt_oss": (SHAPE | MOE | {"head_dim": 8, "sliding_window": 8}, False, True),  # attention sinks
    "phi3": (SHAPE | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}, False, False),
}


@pytest.mark.parametrize("kind", MASKED)
def test_what_restricts_attention_holds_in_every_layout(kind, tmp_path, rng):
    """Windows, chunks and sinks, and rotary embeddings that look at the longest position: beyond 24 tokens all matter."""
    config, packs, pads = MASKED[kind]
    folder = save_model(tmp_path / "model", AutoConfig.for_model(kind, **config), scale=STRONG)
    rows = make_group(rng, [40, 14, 31, 7])
    wanted = [logps(folder, [row])[0][1:] for row in rows["tokens"]]
    wanted = sum(-(torch.tensor(a[2:]) * logp).sum() for a, logp in zip(rows["advantages"], wanted, strict=True)).item()
    register()
    for packing in (True, False):
        (step,) = train(folder, tmp_path, [rows], reduction="sum", packing=packing)
        assert step["loss"] == pytest.approx(wanted, rel=1e-4)
        model = WeightedSFTModel(AutoModelForCausalLM.from_pretrained(folder))
        found = find_row_layouts(model, CPU, 64, packing)
        assert (found.packs, found.pads) == (packs and packing, pads)
        assert (model.model.config._attn_implementation == PACKED) == found.packs


@pytest.mark.parametrize("kind, config, packs, pads", [
    ("lfm2", SHAPE | {"num_hidden_layers": 6, "full_attn_idxs": [0, 1, 2, 3, 5]}, False, True),
    ("phi3", MASKED["phi3"][0], False, False),
    ("llama", SHAPE, True, True),
])  # fmt: skip
def test_rounding_in_bf16_hides_nothing_of_a_layout(kind, config, packs, pads, tmp_path):
    """A convolution over the end of the sequence before, or factors of the longest, move logprobs by less than bf16 rounds."""
    register()
    folder = save_model(tmp_path / "model", AutoConfig.for_model(kind, **config))
    model = WeightedSFTModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    found = find_row_layouts(model, CPU, 64)
    assert (found.packs, found.shares, found.pads) == (packs, packs, pads)
    assert (model.model.config._attn_implementation == PACKED) == packs


def test_a_small_copy_has_each_kind_of_layer():
    settings = {"hidden_size": 512, "intermediate_size": 14336, "vocab_size": 128_000, "num_hidden_layers": 12}
    settings |= {"num_attention_heads": 4, "pad_token_id": 127_999}
    layer_types = ["full_attention"] * 4 + ["sliding_attention"] * 2 + ["full_attention"] * 6
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo3", **settings, layer_types=layer_types))
    for number, layer in enumerate(model.model.layers):
        layer.ds_id = number  # as DeepSpeed numbers modules: it makes no kind of its own
    copy = next(small_copies(model, CPU, "sdpa"))
    assert copy.config.layer_types == layer_types[:5] and len(copy.model.layers) == 5
    assert sum(param.numel() for param in copy.parameters()) < 2**23 and model.config.num_hidden_layers == 12
    with torch.no_grad():
        assert copy(torch.arange(8).unsqueeze(0)).logits.std() > 0.1


def test_a_window_that_no_sequence_reaches_restricts_nothing(tmp_path):
    folder = save_model(tmp_path / "model", AutoConfig.for_model("mistral", **MASKED["mistral"][0] | {"sliding_window": 64}))
    register()
    model = WeightedSFTModel(AutoModelForCausalLM.from_pretrained(folder))
    for longest, window in ((64, None), (65, 64)):
        find_row_layouts(model, CPU, longest)
        assert {layer.self_attn.wsft_mask.window for layer in model.model.model.layers} == {window}


def test_rotary_embeddings_that_remember_the_longest_sequence_are_refused(tmp_path, rng):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = SHAPE | {"max_position_embeddings": 16, "rope_parameters": rope}
    folder = save_model(tmp_path / "model", AutoConfig.for_model("llama", **config), scale=STRONG)
    with pytest.raises(UserError, match=r"depend on sequences that were run before.*set max_token_len to 16"):
        train(folder, tmp_path, [make_group(rng, [10, 14])])
    (step,) = train(folder, tmp_path, [make_group(rng, [10, 14])], max_token_len=16)
    assert step["tokens/trained"] == 20


def test_rotary_embeddings_that_may_grow_are_not_looked_at():
    """On the meta device nothing can be."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = AutoConfig.for_model("llama", **SHAPE | {"max_position_embeddings": 16, "rope_parameters": rope})
    model, tokens = AutoModelForCausalLM.from_config(config), torch.arange(3, 19).unsqueeze(0)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    before, at = model(tokens).logits, (torch.zeros(1, device="meta"), torch.arange(16, device="meta").unsqueeze(0))
    with pytest.raises(RuntimeError, match="meta"):
        empty.model.rotary_emb(*at)
    for each in (model, empty):
        stop_growth(each)
    assert torch.equal(model(tokens).logits, before) and empty.model.rotary_emb(*at)[0].shape == (1, 16, 8)


@pytest.mark.parametrize("stage", [1, 3])
def test_parts_of_a_model_that_text_never_reaches_stay_as_they_are(stage, tmp_path, rng, capfd):
    """A vision tower is not decayed, and is saved with the rest."""
    text = SHAPE | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folder = save_model(tmp_path / "model", config)
    adam = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    ds = {"optimizer": adam, "zero_optimization": {"stage": stage}}
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    train(folder, tmp_path, [make_group(rng, [10, 14])] * 2, deepspeed=ds, weight_decay=1.0, learning_rate=1e-2)
    start, trained = (tensors_of(path) for path in (folder, tmp_path / "run" / "final"))
    assert start.keys() == trained.keys() and (tmp_path / "run" / "final" / "processor_config.json").exists()
    kept = {name for name in start if torch.equal(start[name], trained[name])}
    assert kept == {name for name in start if "vision" in name or "multi_modal" in name} and len(kept) > 10
    assert f"{len(kept)} parameters are not reached from text" in capfd.readouterr().err


REMOTE = """
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class Mlp(LlamaMLP):
    def forward(self, x):
        {looks}
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class Kept(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp.__class__ = Mlp
"""


@pytest.mark.parametrize("looks", [False, True])
def test_code_that_keeps_gradients_from_parameters_is_found(looks, tmp_path, rng, capfd):
    """As some mixtures of experts do in evaluation mode. Where code looks at values, it is known after a step."""
    folder = make_model(tmp_path / "model")
    (tmp_path / "model" / "kept.py").write_text(REMOTE.format(looks="x.sum().item()" if looks else ""))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "kept.Kept"}}))
    if looks:
        ds = FP32 | {"zero_optimization": {"stage": 1}}
        train(folder, tmp_path, [make_group(rng, [10])] * 2, trust_remote_code=True, deepspeed=ds)
        words, names = capfd.readouterr().err, [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        assert words.count(f"4 parameters ({', '.join(names)}, ...) had no gradient on any rank") == 1
        return
    output = r"Kept detaches 4 parameters \(model.layers.1.mlp.down_proj.weight, .*\) in evaluation mode"
    with pytest.raises(UserError, match=output):
        train(folder, tmp_path, [make_group(rng, [10])], trust_remote_code=True)
    with pytest.raises(UserError, match=output):
        dry_run(WeightedSFTConfig(model_name=folder, trust_remote_code=True, device="cpu", output_dir=str(tmp_path / "run")))


def test_logits_that_bf16_rounds_are_no_reason_to_refuse_a_model(tmp_path):
    """A unit in the last place of a logit of 20 is 0.125."""
    model = WeightedSFTModel(AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", tied=False)).bfloat16())
    model.model.lm_head.weight.data.mul_(100)
    model.check_head(CPU)
    with torch.no_grad():
        assert model.model(torch.arange(8).unsqueeze(0)).logits.abs().max() > 20
    model.logit_options["final_logit_softcapping"] = 30.0
    with pytest.raises(UserError, match="does something between its hidden states and its logits"):
        model.check_head(CPU)


def test_what_one_rank_finds_wrong_of_a_layout_no_rank_takes(tmp_path):
    """Each decides what is run next, which is a collective."""
    register()
    model = WeightedSFTModel(AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model")))
    asked = []

    def all_true(mine):
        asked.append(mine)
        return len(asked) > 1  # to the first question another rank says no

    found = find_row_layouts(model, CPU, 64, all_true=all_true)
    assert asked == [True, True] and found == RowLayouts(packs=False, shares=False, pads=True)


def tensors_of(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def write_tensors(folder, tensors):
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def without_a_layer(tensors):
    return {name: value for name, value in tensors.items() if ".layers.1." not in name}


def without_a_head(tensors):
    return {name: value for name, value in tensors.items() if name != "lm_head.weight"}


def compiled(tensors):
    return {f"_orig_mod.{name}": value for name, value in tensors.items()}


def narrower(tensors):
    return tensors | {"model.norm.weight": torch.ones(16)}


@pytest.mark.parametrize(
    "change, output",
    [
        (without_a_layer, r"lacks 9 of the parameters of LlamaForCausalLM \(model.layers.1.input_layernorm.weight, .*\.\.\.\)"),
        (without_a_head, r"lacks 1 of the parameters of LlamaForCausalLM \(lm_head.weight\)"),
        (compiled, r"lacks 21 of the parameters .*it has 21 that are not of the model \(_orig_mod\."),
        (narrower, r"has 1 parameters of other shapes \(model\.norm\.weight: \[16\], expected \[32\]\)"),
    ],
)
def test_a_checkpoint_that_lacks_parameters_is_refused_by_run_and_dry_run(change, output, tmp_path, rng, capfd):
    folder = make_model(tmp_path / "model", tied=False)
    write_tensors(folder, change(tensors_of(folder)))
    with pytest.raises(UserError, match=f"(?s){output}"):
        train(folder, tmp_path, [make_group(rng, [10])])
    with pytest.raises(UserError, match=f"(?s){output}"):
        dry_run(WeightedSFTConfig(model_name=folder, device="cpu", output_dir=str(tmp_path / "run")))


def test_unused_tensors_of_a_checkpoint_are_logged(tmp_path, rng, capfd):
    folder = make_model(tmp_path / "model")
    write_tensors(folder, tensors_of(folder) | {"model.extra.weight": torch.ones(2)})
    train(folder, tmp_path, [make_group(rng, [10])])
    assert "1 that are not of the model (model.extra.weight)" in capfd.readouterr().err


def test_a_load_balancing_loss_that_is_not_added_is_logged(tmp_path, rng, capfd):
    config = AutoConfig.for_model("mixtral", **SHAPE | MOE, output_router_logits=True, router_aux_loss_coef=0.5)
    train(save_model(tmp_path / "model", config), tmp_path, [make_group(rng, [10])])
    assert "(router_aux_loss_coef 0.5) is not added" in capfd.readouterr().err


def test_sequences_beyond_a_table_of_positions_are_refused_by_run_and_dry_run(tmp_path, rng):
    folder = save_model(tmp_path / "model", AutoConfig.for_model("gpt2", **NOISY["gpt2"]))
    output = "GPT2LMHeadModel has embeddings for 128 positions, and max_token_len is 129: set max_token_len to 128 at most"
    with pytest.raises(UserError, match=output):
        train(folder, tmp_path, [make_group(rng, [10])], max_token_len=129)
    with pytest.raises(UserError, match=output):
        dry_run(WeightedSFTConfig(model_name=folder, device="cpu", max_token_len=129, output_dir=str(tmp_path / "run")))
    (step,) = train(folder, tmp_path, [make_group(rng, [10, 128, 129])], max_token_len=128)
    assert step["data/rejected"] == 1 and step["tokens/total"] == 138


def test_a_quantized_checkpoint_is_refused_by_run_and_dry_run(tmp_path, rng):
    folder = make_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}  # as gpt-oss comes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model' is quantized \(mxfp4; .*; take one that is not"):
        train(folder, tmp_path, [make_group(rng, [10])])
    with pytest.raises(UserError, match="is quantized"):
        dry_run(WeightedSFTConfig(model_name=folder, device="cpu", output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(
    "name, dtype, output",
    [
        ("xlnet", torch.float32, "tokens attend to later tokens"),  # by attention of its own
        ("inkling2_loop_text", torch.bfloat16, "not run with all its parameters in bf16, .*: train it in float32"),
        ("pp_formulanet", torch.float32, "has no token embedding"),
        ("reformer", torch.float32, "does not run on a sequence of tokens alone"),
        ("dory", torch.float32, r"between its hidden states and its logits that wsft does not know \(mul\)"),  # in its head
    ],
)
def test_what_cannot_be_trained_is_refused_without_its_weights(name, dtype, output):
    config = config_of(name)
    with pytest.raises(UserError, match=output):
        require_trainable(empty_model(config, False), WeightedSFTConfig(model_name=name, max_token_len=32))
        passes_of(config, False, 32, dtype)


def test_a_config_that_names_no_width_is_refused(tmp_path):
    config_of("pi0").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no hidden_size and no vocab_size: wsft trains decoder-only"):
        load_model_config(str(tmp_path), WeightedSFTConfig(model_name="model"))


def test_parameters_that_transformers_keeps_in_float32_are_logged(tmp_path, rng, capfd):
    config = AutoConfig.for_model("deepseek_v3", **SHAPE | MLA | {"first_k_dense_replace": 1})
    ds = FP32 | {"bf16": {"enabled": True}}
    train(save_model(tmp_path / "model", config), tmp_path, [make_group(rng, [10])], deepspeed=ds)
    assert "keeps 1 parameters in float32 (model.layers.1.mlp.gate.weight); DeepSpeed has all in bf16" in capfd.readouterr().err


def test_code_that_asks_for_values_and_raises_is_no_reason_to_refuse_a_model(monkeypatch):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaMLP.forward
    checking = """def forward(self, x):
        if x.isnan().any():
            raise ValueError("not finite")
        return inner(self, x)"""
    for code, refused in ((checking, False), ("def forward(self, x): raise ValueError('needs an image')", True)):
        names = {"inner": forward}
        exec(code, names)
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", names["forward"])
        with pytest.raises(UserError, match="needs an image") if refused else contextlib.nullcontext():
            passes_of(AutoConfig.for_model("llama", **SHAPE), False, 64, torch.float32)


MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2}


@pytest.mark.parametrize("kind, config", [("gpt2", NOISY["gpt2"]), ("deepseek_v3", SHAPE | MLA)])
def test_a_dry_run_supports_learned_positions_and_values_narrower_than_queries(kind, config, tmp_path, rng, capfd):
    folder = save_model(tmp_path / "model", AutoConfig.for_model(kind, **config))
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10])])
    asked = dict(model_name=folder, device="cpu", max_token_len=128, data=data, output_dir=str(tmp_path / "run"))
    assert dry_run(WeightedSFTConfig(**asked)) and "It fits" in capfd.readouterr().out
