"""A model cut down to a few layers, with random weights in float32, to see what its code does where bf16 would hide it."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from wsft.model.meta_passes import STOPS

MOST_PARAMETERS = 2**30
VOCAB, WIDTH, EXPERTS = 256, 128, 16  # at most

_WIDTHS = re.compile(r"(\w+_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|n_inner)")
_EXPERTS = re.compile(r"(n|num|moe_num)_(routed_|local_)?experts")
_INDEX = re.compile(r"idx|index|layer_(id|number|num)")

log = logging.getLogger(__name__)


def small_copies(model: PreTrainedModel, device: torch.device, attention: str) -> Iterator[PreTrainedModel]:
    """Models of the same class and settings, but with fewer layers (of each kind at least one), tokens and experts and narrower
    MLPs, where its code allows it; at last the whole, if it is small. Some may fail to run. All ranks get the same.

    Args:
        attention: name of the attention that the copies use.
    """
    layers = _layers_needed(type(model), model.config)
    for layers_kept, narrow in ((layers, True), (layers, False), (None, False)):
        config = copy.deepcopy(model.config)
        try:
            for part in {id(part): part for part in (config, config.get_text_config())}.values():
                _cut(part, layers_kept, narrow)
            with torch.device("meta"):
                made = type(model)._from_config(copy.deepcopy(config), dtype=torch.float32)
            if sum(param.numel() for param in made.parameters()) > MOST_PARAMETERS:
                continue
            on_gpus = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices=on_gpus), torch.device(device):
                torch.manual_seed(0)
                made = type(model)._from_config(config, dtype=torch.float32, attn_implementation=attention)
                made = _with_strong_weights(made).eval()
        except (ArithmeticError, *STOPS) as error:
            log.debug("no copy of %s with %s layers: %s", type(model).__name__, layers_kept, error)
            continue
        yield made


def _cut(config: PretrainedConfig, layers: int | None, narrow: bool) -> None:
    if layers is None:
        return
    before, values = config.num_hidden_layers, config.to_dict()
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == before:
            value = value[:layers]
            setattr(config, name, value)
        if narrow and _WIDTHS.fullmatch(name):
            setattr(config, name, _at_most(value, WIDTH))
        if narrow and _EXPERTS.fullmatch(name):
            setattr(config, name, _at_most(value, EXPERTS))
        if name.endswith("token_id") and isinstance(value, int) and value >= VOCAB:
            setattr(config, name, None)
    config.num_hidden_layers, config.vocab_size = layers, min(config.vocab_size, VOCAB)


def _at_most(value: Any, most: int) -> Any:
    if isinstance(value, list | tuple):
        return [_at_most(each, most) for each in value]
    return min(value, most) if isinstance(value, int) else value


def _layers_needed(model_class: type[PreTrainedModel], config: PretrainedConfig) -> int | None:
    """The number of layers, from the first, among which there is each kind of layer, and two at least. None if unknown."""
    number = getattr(config.get_text_config(), "num_hidden_layers", None)
    try:
        with torch.device("meta"):  # a new model, since DeepSpeed numbers the modules of one that it trains
            whole = model_class._from_config(copy.deepcopy(config))
    except (ArithmeticError, *STOPS):
        return None
    for module in whole.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            kinds = [_kind_of(layer) for layer in module]
            return max(2, 1 + max(map(kinds.index, kinds)))
    return None


def _kind_of(layer: torch.nn.Module) -> list[Any]:
    """The classes of its modules, and their switches and windows."""
    found = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | str | None)}
        found.append((name, type(module), {key: value for key, value in plain.items() if not _INDEX.search(key)}))
    return found


def _with_strong_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which every layer changes the logits: what one token does to another must show."""
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(0, 1.5 / math.sqrt(param.shape[-1]))
    return model
