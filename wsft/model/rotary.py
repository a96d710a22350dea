"""Rotary position embeddings that change with the longest position."""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection

import torch
from transformers import PretrainedConfig, PreTrainedModel


def position_reaches(config: PretrainedConfig, types: Collection[str] = ("dynamic", "longrope")) -> list[int]:
    """Sequence lengths from which rotary embeddings change, for the types that depend on the longest position."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(value for value in rope.values() if isinstance(value, dict)),
    ]  # for all layers, or per type of layer
    grows = [kind for kind in kinds if kind.get("rope_type") in types]
    names = ("original_max_position_embeddings", "max_position_embeddings")
    found = [[place.get(name) for name in names for place in (kind, config.to_dict())] for kind in grows]
    return [next(filter(None, reaches), 0) for reaches in found]


def stop_growth(model: PreTrainedModel) -> None:
    """For embeddings of type dynamic, if no sequence is long enough to change them: leave out that each forward pass looks for
    the longest position, for which a GPU would be waited for. (transformers decorates `forward` with that.)"""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        forward = inspect.unwrap(type(module).forward)
        if forward is not type(module).forward and "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.forward = types.MethodType(torch.no_grad()(forward), module)
