"""Loading of tokenizer and model (under ZeRO-3 partitioned while loading), and which models are refused."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import re
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig

from wsft.config import WeightedSFTConfig
from wsft.device import device_type
from wsft.errors import UserError, first_line
from wsft.model.attention import PACKED, register
from wsft.model.causal_lm import WeightedSFTModel, noise_in
from wsft.model.kernels import find_kernels
from wsft.model.meta_passes import FEW, STOPS, Passes
from wsft.model.packing import Layout, VarlenMetadata
from wsft.model.rotary import position_reaches, stop_growth
from wsft.model.row_layouts import not_causal
from wsft.model.small import small_copies
from wsft.model.weight_files import differing, files_of, loading_as_without_zero3, made_of

# tables of learned position embeddings
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)(\.|$)")

log = logging.getLogger(__name__)
# its table of missing, mismatched or unexpected parameters: `require_complete` reports them
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


def load_tokenizer(config: WeightedSFTConfig) -> PreTrainedTokenizerBase:
    name = config.tokenizer_name or config.model_name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer in {name!r}: give --tokenizer_name a folder or hub name ({first_line(error)})"
        ) from error
    return tokenizer


def end_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: that of the tokenizer, and all of the model's generation_config."""
    found = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a model without one
        ids = GenerationConfig.from_pretrained(name).eos_token_id
        found |= set(ids if isinstance(ids, list) else [ids])
    return frozenset(found - {None})


def load_model_config(name: str, config: WeightedSFTConfig) -> Any:
    """The model's config. UserError if there is none, or none of a language model."""
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no model in {name!r}: expected a Hugging Face folder or hub name ({first_line(error)})") from error
    lacking = [key for key in ("hidden_size", "vocab_size") if not hasattr(found.get_text_config(), key)]
    if lacking:
        raise UserError(
            f"{type(found).__name__} of {name!r} has no {' and no '.join(lacking)}: wsft trains decoder-only language models"
        )
    return found


def class_for(config: PretrainedConfig) -> type:
    """The auto class of transformers for the class that the checkpoint was saved from: of a multimodal model the whole, not
    only its text part, so that the exported model can replace it."""
    saved_as = getattr(config, "architectures", None) or []
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if whole and (whole.__name__ in saved_as or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def empty_model(config: PretrainedConfig, trust_remote_code: bool, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device, with names and shapes but without memory, and a config of its own. UserError if there is no
    such model."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and not getattr(config, "auto_map", None):
        raise UserError(
            f"transformers has no causal language model for {type(config).__name__} (model_type {config.model_type}): wsft "
            f"trains decoder-only language models"
        )
    try:
        with torch.device("meta"):
            return class_for(config).from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise UserError(f"a model of {type(config).__name__} cannot be made: {first_line(error)}") from error


def require_trainable(model: PreTrainedModel, config: WeightedSFTConfig) -> None:
    """UserError if the model cannot be trained, judged by classes and shapes. It may be on the meta device."""
    name = type(model).__name__
    for part, has in (("linear lm_head", _has_linear_head), ("token embedding", _has_embedding)):
        if not has(model):
            raise UserError(f"{name} has no {part}: wsft trains decoder-only language models")
    quantization = getattr(model.config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"the checkpoint in {model.config.name_or_path!r} is quantized ({method}; quantization_config in its config.json): "
            f"wsft trains weights in bf16 or float32; take one that is not, or save it dequantized (transformers can do some)"
        )
    tables = [*model.named_parameters(), *model.named_buffers()]
    has_table = any(_POSITION_TABLE.search(key) and tensor.ndim == 2 for key, tensor in tables)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if has_table and positions and config.max_token_len > positions:
        raise UserError(
            f"{name} has embeddings for {positions} positions, and max_token_len is {config.max_token_len}: set max_token_len "
            f"to {positions} at most"
        )
    grow_from = [
        reach for reach in position_reaches(model.config.get_text_config(), {"dynamic"}) if reach < config.max_token_len
    ]
    if grow_from:
        raise UserError(
            f"the logits of {name} depend on sequences that were run before, since its rotary embeddings (rope_type dynamic) "
            f"grow with the longest: set max_token_len to {min(grow_from)}, from which on they do"
        )


def _has_linear_head(model: PreTrainedModel) -> bool:
    return isinstance(model.get_output_embeddings(), torch.nn.Linear)


def _has_embedding(model: PreTrainedModel) -> bool:
    try:
        return model.get_input_embeddings() is not None
    except NotImplementedError:  # raised by transformers if it finds none
        return False


def passes_of(config: PretrainedConfig, trust_remote_code: bool, longest: int, dtype: torch.dtype) -> Passes:
    """Passes of the empty model on the meta device, for sequences of up to `longest` tokens. UserError if it cannot be trained
    with parameters of that type."""
    # first in bf16, since on the meta device grouped matrix products (experts) exist in bf16 only
    for tried, by_text_model in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        passes = _passes_in(tried, by_text_model, config, trust_remote_code, longest)
        if not passes.failure:
            if dtype == torch.bfloat16 and (passes.mixes_types or tried != dtype):
                raise UserError(
                    f"{type(passes.model).__name__} does not run with all its parameters in bf16, as DeepSpeed has them (its "
                    f'code expects some in float32): train it in float32 (bf16 {{"enabled": false}} in the DeepSpeed JSON)'
                )
            return passes
        failure = f"{type(passes.failure).__name__}: {first_line(passes.failure)}"
    raise UserError(
        f"{type(passes.model).__name__} does not run on a sequence of tokens alone, in this version of transformers "
        f"({failure}): wsft cannot train it"
    )


def _passes_in(
    dtype: torch.dtype, by_text_model: bool, config: PretrainedConfig, trust_remote_code: bool, longest: int
) -> Passes:
    """With the first attention that runs: packed, the model's own, eager (which is given a mask)."""
    empty = empty_model(config, trust_remote_code).to(dtype)
    model, given = WeightedSFTModel(empty), empty.config._attn_implementation
    model.scored_by_text_model = by_text_model

    def loss(tokens: int, packing: VarlenMetadata | None = None) -> torch.Tensor:
        row, trained = torch.zeros(1, tokens, dtype=torch.int64, device="meta"), torch.arange(1, tokens, device="meta")
        return model(row, trained, torch.ones(tokens - 1, device="meta"), packing).loss

    def look(packed: bool) -> Passes:
        packing = VarlenMetadata.of(Layout.of([4, 4])).to("meta")
        passes = Passes(empty, loss, (lambda: loss(FEW, packing)) if packed else None, longest)
        row = torch.zeros(1, FEW, dtype=torch.int64, device="meta")
        head = passes.head_arithmetic(lambda: model(row, None, None))
        if head and head.unknown:
            raise UserError(
                f"{type(empty).__name__} does something between its hidden states and its logits that wsft does not know "
                f"({some(head.unknown)}): train another model, or have loss.head.LossHead do it too"
            )
        if passes.whole and passes.sees_later:
            raise not_causal(empty)
        passes.logit_options, passes.scored_by_text_model = head.options() if head else {}, by_text_model
        return passes

    # on the meta device only attention that goes through transformers' interface is seen
    if not type(empty)._can_set_attn_implementation() and not _is_causal_in_small(empty):
        raise not_causal(empty)
    for attention in (PACKED, given, "eager"):
        if model.attend_by(attention) and (passes := look(attention == PACKED)).whole:
            return passes
    model.attend_by(given)
    return look(packed=False)


def _is_causal_in_small(empty: PreTrainedModel) -> bool:
    """Whether a small copy of the model gives the same logits whatever the later tokens are. True if none runs."""
    tokens = torch.arange(FEW, 2 * FEW).unsqueeze(0)
    other = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], dim=1)
    for small in small_copies(empty, torch.device("cpu"), empty.config._attn_implementation):
        with contextlib.suppress(*STOPS), torch.no_grad():
            found, wanted = (small(input_ids=row, use_cache=False).logits[:, :-1] for row in (other, tokens))
            return torch.allclose(found, wanted, atol=1e-3 * wanted.std())
    return True


def freeze_unreached(model: PreTrainedModel, passes: Passes) -> set[str]:
    """Freeze parameters that are not reached from text, such as those of a vision tower. Returns their names."""
    frozen = passes.unreached()
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
    if frozen:
        log.info("%d parameters are not reached from text (%s): they stay as they are", len(frozen), some(sorted(frozen)))
    return frozen


def require_complete(name: str, config: WeightedSFTConfig, dtype: torch.dtype) -> None:
    """UserError if the checkpoint lacks parameters of the model, which transformers would initialize at random, or has them in
    other shapes. Logs which ones transformers would keep in float32. Reads names and shapes only."""
    try:
        model, info = class_for(load_model_config(name, config)).from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the model in {name!r} cannot be loaded: {first_line(error)}") from error
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    there = f"{len(others)} that are not of the model ({some(others)})"
    if missing:
        raise UserError(
            f"the checkpoint in {name!r} lacks {len(missing)} of the parameters of {type(model).__name__} ({some(missing)}), "
            f"which would be random{f'; it has {there}' if others else ''}: save it whole, under the model's own names"
        )
    if info["mismatched_keys"]:
        shapes = [f"{key}: {list(found)}, expected {list(wanted)}" for key, found, wanted in sorted(info["mismatched_keys"])]
        raise UserError(f"the checkpoint in {name!r} has {len(shapes)} parameters of other shapes ({some(shapes)})")
    wider = [key for key, param in model.named_parameters() if param.dtype != dtype and param.is_floating_point()]
    if wider:
        log.info(
            "transformers keeps %d parameters in float32 (%s); DeepSpeed has all in bf16, the optimizer its own in float32",
            len(wider), some(wider),
        )  # fmt: skip
    if others:
        log.info("not used of the checkpoint in %s: %s", name, there)


def some(names: list[str]) -> str:
    """The first three, for a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def load_model(name: str, config: WeightedSFTConfig, ds: dict[str, Any]) -> WeightedSFTModel:
    """The model with the chunked head. Under ZeRO-3 each parameter is partitioned when it is created."""
    register()
    dtype = torch.bfloat16 if ds["bf16"]["enabled"] else torch.float32
    empty = empty_model(load_model_config(name, config), config.trust_remote_code, dtype)
    require_trainable(empty, config)
    find_kernels(empty, config, device_type(config.device) == "cuda")
    require_complete(name, config, dtype)
    passes = passes_of(empty.config, config.trust_remote_code, config.max_token_len, dtype)
    # from_pretrained finds this object by a global weak reference, and partitions while loading
    zero3 = HfDeepSpeedConfig(ds) if ds["zero_optimization"]["stage"] == 3 else None
    try:
        with loading_as_without_zero3(empty):
            model, info = class_for(empty.config).from_pretrained(
                name,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"the model in {name!r} cannot be loaded: {first_line(error)}") from error
    files = files_of(name)
    made, others = made_of(empty, files)
    lost = sorted(info["missing_keys"]) or (differing(model, files, made) if zero3 else [])
    if lost:
        raise UserError(
            f"transformers did not load {len(lost)} parameters of {type(model).__name__} as they are in {name!r} "
            f"({some(lost)}): they would be random; another version of transformers may load them, or another ZeRO stage"
        )
    del zero3
    stop_growth(model)  # beyond their reach they were refused
    untrained = freeze_unreached(model, passes)
    noise = ", ".join(f"{key} {value}" for key, value in noise_in(model.config.to_dict()).items())
    if noise:
        log.info("trained without dropout and other noise (the model's config has %s)", noise)
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False) and getattr(text_config, "router_aux_loss_coef", 0):
        coefficient = text_config.router_aux_loss_coef
        log.info("the load-balancing loss that the model's config asks for (router_aux_loss_coef %s) is not added", coefficient)
    wrapped = WeightedSFTModel(model)
    if passes.attention == "eager" and not config.attn_implementation:
        wrapped.attend_by("eager")  # its own attention needs a mask
    wrapped.routed, wrapped.takes_packed_rows = passes.routed, passes.takes_packed_rows()
    wrapped.layers = passes.layers
    wrapped.shortest, wrapped.logit_options = passes.shortest, passes.logit_options
    wrapped.scored_by_text_model = passes.scored_by_text_model
    wrapped.untrained, wrapped.not_loaded = untrained, len(others)
    if config.gradient_checkpointing:
        wrapped.recompute_activations()
    return wrapped.train()


def load_reference(config: WeightedSFTConfig, ds: dict[str, Any], vocab_size: int) -> WeightedSFTModel:
    """The frozen reference model, which scores the same tokens."""
    size = load_model_config(config.ref_model_name, config).get_text_config().vocab_size
    if size < vocab_size:
        raise UserError(
            f"the reference model {config.ref_model_name!r} has a vocabulary of {size}, the model one of {vocab_size}: "
            f"it must know the same tokens"
        )
    return load_model(config.ref_model_name, config, ds).requires_grad_(False).eval()
