"""Tiny random models of the architectures that transformers has.

    make("qwen3_next", folder)       # of the names in ZOO

A config has the defaults of its class with sizes as small as its code allows, so that new models of transformers need no entry
here. VARIANTS has settings that change a model's arithmetic and are off, or beyond the rollouts' lengths, by default.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import save_tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES

VOCAB = 320
SIZES = {  # of a config's attributes, wherever it has them
    320: "n_words vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len context_length max_sequence_length",
    48: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim n_inner intermediate_size_mlp dense_intermediate_size "
    "shared_intermediate_size",
    32: "hidden_size d_model n_embd word_embed_proj_dim attention_hidden_size embedding_size out_hidden_size lru_width "
    "index_n_heads projection_dim emb_dim vision_output_dim projector_input_dim projector_output_dim embed_dim "
    "text_hidden_size vision_embed_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size ffn_hidden_size "
    "expert_ffn_hidden_size moe_latent_size",
    16: "q_lora_rank kv_lora_rank index_head_dim chunk_size mamba_chunk_size block_size position_embedding_size "
    "num_position_embeddings o_lora_rank",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window attention_window_size local_attention window_size "
    "attention_chunk_size num_experts n_routed_experts num_local_experts moe_num_experts global_head_dim index_topk state_size "
    "ssm_state_size mamba_d_state mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim kv_channels "
    "mamba_n_heads mamba_num_heads hidden_size_per_layer_input query_pre_attn_scalar swa_head_dim swa_v_head_dim rotary_dim "
    "keep_window_size attention_head_dim index_kpool",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "linear_num_value_heads swa_num_attention_heads",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers depth num_key_value_heads num_kv_heads "
    "kv_n_heads num_experts_per_tok moe_k moe_topk top_k_experts moe_top_k linear_num_key_heads num_blocks mamba_expand expand "
    "swa_num_key_value_heads num_encoder_layers num_decoder_layers",
    1: "n_group topk_group n_groups mamba_n_groups first_k_dense_replace moe_layer_start_index num_dense_layers "
    "n_shared_experts moe_num_shared_experts num_shared_experts",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
UNSAID = ("head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group", "topk_group")  # None by default
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")


NEEDED: dict[str, dict[str, Any]] = {  # what the code of a kind asks for beside small sizes
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "bailing_hybrid": {"n_group": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
    },
    "dory": {"num_hidden_layers": 2, "layer_types": None},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "audio_config": {"adapter_in_dim": 32}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {f"<|extra_{i}|>": i for i in range(201)}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2": {"text_config": {"unpadded_vocab_size": 300}},
    "inkling2_loop": {"text_config": {"unpadded_vocab_size": 300}},
    "inkling2_loop_text": {"unpadded_vocab_size": 300},
    "inkling2_text": {"unpadded_vocab_size": 300},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "mistral4": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    },
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
    | {"indexer_compress_ratio": 4},
    "qwen4_exp": {
        "text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
        | {"indexer_compress_ratio": 4}
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "zamba2": {"attention_hidden_size": 64},
    "zamba": {"attention_hidden_size": 64, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip


def tiny(kind: str, **changes: Any) -> PreTrainedConfig:
    """A config of the kind with all its sizes small, but for the changes (those of a config within it by its name)."""
    return _shrunk(CONFIG_MAPPING[kind], NEEDED.get(kind, {}) | changes)


def _shrunk(cls: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    default = cls()
    given: dict[str, Any] = {}
    for name, value in (default.to_dict() | {name: getattr(default, name, None) for name in default.sub_configs}).items():
        if isinstance(value, PreTrainedConfig):
            within = changes.pop(name, {})
            given[name] = within if isinstance(within, PreTrainedConfig) else _shrunk(type(value), dict(within))
        elif name in SIZE_OF and isinstance(value, int) and not isinstance(value, bool) and value:
            given[name] = min(value, SIZE_OF[name])
        elif name in UNSAID and value is None:
            given[name] = SIZE_OF[name]
        elif name in SPECIAL:
            given[name] = SPECIAL[name]
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            given[name] = 0.0
        elif name in LAYER_TYPES and value:
            given[name] = [*dict.fromkeys(value), value[-1]][: max(2, len(set(value)))]
    types = next((given[name] for name in LAYER_TYPES if name in given and name not in changes), None)
    for name in ("num_hidden_layers", "num_layers"):
        if types and name in given:
            given[name] = len(types)
    if given.get("kv_lora_rank"):  # latent attention: as many keys as queries
        given["num_key_value_heads"] = given["num_attention_heads"]
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):  # of time, height, width
        rope = default.rope_parameters
        width = given.get("qk_rope_head_dim") or given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        given["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    given |= changes
    return cls(**given)


ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_theta": 10000.0}
LONGROPE = ROPE | {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
LONGROPE |= {"original_max_position_embeddings": 24, "partial_rotary_factor": 1.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MROPE = ROPE | {"rope_type": "default"}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
AT = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}

# name -> kind and what is not as `tiny` has it
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied_bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_llama3_rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "llama_dynamic_ntk": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama_yarn": (
        "llama",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "mistral_window": ("mistral", {"sliding_window": 8}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}),
    "qwen2_moe_window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "gemma2_caps": ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma4_text_shared": ("gemma4_text", {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "final_logit_softcapping": 3.0}
                           | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma4_text_moe": ("gemma4_text", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2}
                        | {"moe_intermediate_size": 24, "hidden_size_per_layer_input": 0}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}),
    "phi4_mini": ("phi3", {"tie_word_embeddings": True, "rope_parameters": MROPE | {"partial_rotary_factor": 0.5}}),
    "granite_scaled": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "cohere_norm": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "olmo3_window": ("olmo3", ALTERNATING),
    "exaone4_window": ("exaone4", ALTERNATING | {"sliding_window_pattern": "LG"}),
    "stablelm_bias": ("stablelm", {"use_qkv_bias": True}),
    "hyperclovax_scaled": ("hyperclovax", {"logits_scaling": 2.0}),
    "gpt2_dropout": ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    "opt_350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", {"alibi": True}),
    "mixtral_loss": ("mixtral", LOSS),
    "qwen3_moe_loss": ("qwen3_moe", LOSS),
    "qwen3_moe_64": ("qwen3_moe", {"num_experts": 64}),
    "deepseek_v3_groups": ("deepseek_v3", {"n_group": 2}),
    "granitemoehybrid_attention": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}
                                   | {"layer_types": ["attention", "attention"], "position_embedding_type": "rope"}),
    "falcon_h1_multiplied": ("falcon_h1", {"lm_head_multiplier": 0.5}),
    "llama4_chunks": ("llama4_text", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8}
                      | {"interleave_moe_layer_step": 2, "layer_types": None}),
    "inkling_text_padded_vocabulary": ("inkling_text", {"unpadded_vocab_size": 300}),
    "bert_decoder": ("bert", {"is_decoder": True}),
}  # fmt: skip

NEEDS_A_MASK = ("hy_v4",)  # and has none by SDPA, in transformers 5.24
REMOTE = "remote_list_of_experts"
LARGEST = 50_000_000  # parameters of a model to try
ZOO = [*CAUSAL, *(name for name in WITH_IMAGES if name not in CAUSAL), *VARIANTS, REMOTE]
_EXPERTS = '''
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class ListOfExperts(torch.nn.Module):
    """As remote code has it: an expert without tokens is not run."""

    def __init__(self, config):
        super().__init__()
        self.gate = torch.nn.Linear(config.hidden_size, 16, bias=False)
        self.experts = torch.nn.ModuleList([LlamaMLP(config) for _ in range(16)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero().squeeze(1)
            if len(at):
                out = out.index_add(0, at, expert(flat[at]) * weights[at, None])
        return out.view_as(x)


class ExpertsForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListOfExperts(config)
        self.post_init()
'''


def config_of(name: str) -> PreTrainedConfig:
    kind, changes = VARIANTS.get(name, (name, {}))
    return tiny(kind, **changes)


def make(name: str, folder: Path) -> PreTrainedModel:
    """Write the model in float32, with norms and biases other than 1 and 0, and layers not negligible next to the residual.
    Raises whatever transformers does if it cannot be made, and ValueError if it is too large."""
    torch.manual_seed(0)
    save_tokenizer(folder, size=VOCAB - 20)
    if name == REMOTE:
        return _make_remote(folder)
    config = config_of(name)
    with torch.device("meta"):
        size = sum(param.numel() for param in _class_of(config).from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the defaults of its class make a model of {size / 1e6:.0f} million parameters")
    model = _class_of(config).from_config(config, dtype=torch.float32)
    _stir(model)
    model.save_pretrained(folder)
    return model


def reading(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, as transformers runs it, but for the experts: those that it runs in float64."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    more = {"trust_remote_code": True}
    if not hasattr(config, "auto_map"):
        more["experts_implementation"] = "eager"
    if config.model_type in NEEDS_A_MASK:
        more["attn_implementation"] = "eager"
    model = _class_of(config).from_pretrained(folder, dtype=dtype, **more)
    with torch.device("meta"):
        made = _class_of(config).from_config(config, trust_remote_code=True)
    for param, as_made in zip(model.parameters(), made.parameters(), strict=True):
        param.requires_grad_(as_made.requires_grad)  # loading forgets it
    return model.eval()


def _class_of(config: PreTrainedConfig) -> type:
    """Of what a checkpoint of that config holds: a model with images, where transformers has one."""
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def _stir(model: PreTrainedModel) -> None:
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            delicate = any(part in name for part in ("A_log", "dt_bias", "time_", ".D"))  # of recurrences
            param.add_((0.05 if delicate else 0.1 if param.ndim < 2 else 0.15) * torch.randn(param.shape, generator=dice))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as some set it whenever they are loaded
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.add_(0.05 * torch.randn(buffer.shape, generator=dice).to(buffer.dtype))
            if "tid2eid" in name:  # zeros as they come: the same expert twice
                buffer.copy_(torch.stack([torch.randperm(8, generator=dice)[: len(row)] for row in buffer]))


def _make_remote(folder: Path) -> PreTrainedModel:
    """Llama's files with code for a list of experts beside them."""
    (folder / "experts.py").write_text(_EXPERTS)
    config = tiny("llama")
    config.auto_map = {"AutoModelForCausalLM": "experts.ExpertsForCausalLM"}
    config.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=True)
    _stir(model)
    model.save_pretrained(folder)
    output = json.loads((folder / "config.json").read_text()) | {"auto_map": config.auto_map}
    (folder / "config.json").write_text(json.dumps(output))
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return model
