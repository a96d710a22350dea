"""The weights of a model as they stand in its files: which parameters transformers makes of them, and whether it did."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils
from transformers.integrations import deepspeed as deepspeed_integration

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_AT_ONCE = 2**24  # numbers that are summed at once: in float64 they take 128 MiB
# of transformers' conversions, those that put the same values in another order
_KEEPING = {"Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose", "PermuteForRope"}


def files_of(name: str) -> dict[str, Path]:
    """Name of a tensor -> the file that has it, of a Hugging Face folder or of what is in the cache of a hub name. Empty where
    the weights are in other files than safetensors."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors*"], local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            return {}
    if (folder / _INDEX).is_file():
        named = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {tensor: folder / file for tensor, file in named.items()}
    if not (folder / _SINGLE).is_file():
        return {}
    with safe_open(folder / _SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


@dataclass(frozen=True)
class Made:
    """Tensors of the files, and the parameters or buffers that are made of them, of the same values if it `keeps` them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    keeps: bool


def made_of(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[Made], list[str]]:
    """What transformers makes of tensors of those names; and those of which nothing of the model is made. The model may be on
    the meta device."""
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, core_model_loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, sources, kinds, others = model.state_dict(), {}, {}, []
    for name in sorted(names):
        first, pattern = _rename(name, renamings, converters, model.base_model_prefix, own)
        converter = by_pattern.get(pattern)
        ends = converter.target_patterns if converter else [first]
        targets = tuple(first.replace(ends[0], end) for end in ends)
        if own.keys() & set(targets):
            sources.setdefault(targets, []).append(name)
            kinds[targets] = {type(each).__name__ for each in converter.operations} if converter else set()
        else:
            others.append(name)
    return [Made(tuple(given), targets, kinds[targets] <= _KEEPING) for targets, given in sources.items()], others


_transformers_rename = core_model_loading.rename_source_key


def _rename(
    name: str,
    renamings: list[Any],
    converters: list[Any],
    base_model_prefix: str | None = None,
    meta_state_dict: dict[str, torch.Tensor] | None = None,
    **more: Any,
) -> tuple[str, str | None]:
    """As transformers does it, but for a name that is the model's own where renaming it would make one that is not."""
    found = _transformers_rename(name, renamings, converters, base_model_prefix, meta_state_dict, **more)
    own = meta_state_dict or {}
    if found[0] not in own and name in own:
        return _transformers_rename(name, [], [], base_model_prefix, meta_state_dict, **more)
    return found


@contextlib.contextmanager
def loading_as_without_zero3(empty: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers' loader under ZeRO-3 does as its other loader does, where it would not (seen with 5.24):

    - a name that is the model's own is kept (else the last norm of DeepSeek V4 is lost, and becomes random);
    - conversions that split a tensor by the sizes of parameters find them, in an empty model (of Sarvam, Lara);
    - buffers are of the types that they have in an empty model: DeepSpeed gives what a constructor makes the type of the
      parameters, so that what is loaded or computed in float32 would be rounded, or not rounded (of LFM2-MoE, RecurrentGemma);
    - modules all of whose tensors were loaded are not initialized: the code that does it expects whole parameters (xLSTM's).
    """
    load, convert = (
        modeling_utils._load_state_dict_into_zero3_model,
        deepspeed_integration._apply_weight_conversions_to_state_dict,
    )
    initialize = PreTrainedModel._initialize_missing_keys
    types = {name: buffer.dtype for name, buffer in empty.named_buffers()}

    def load_into_buffers_of_their_types(model: PreTrainedModel, *args: Any) -> Any:
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(types.get(name, buffer.dtype))
        return load(model, *args)

    def initialize_others(model: PreTrainedModel, *args: Any) -> None:
        for module in model.modules():
            tensors = [*module.parameters(), *module.buffers()]
            if all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                module._is_hf_initialized = True
        initialize(model, *args)

    with (
        patch.object(core_model_loading, "rename_source_key", _rename),
        patch.object(deepspeed_integration, "_apply_weight_conversions_to_state_dict", lambda _, *args: convert(empty, *args)),
        patch.object(modeling_utils, "_load_state_dict_into_zero3_model", load_into_buffers_of_their_types),
        patch.object(PreTrainedModel, "_initialize_missing_keys", initialize_others),
    ):
        yield


def differing(model: PreTrainedModel, files: dict[str, Path], made: list[Made]) -> list[str]:
    """Parameters under ZeRO-3 whose values are not those in the model's files, by a sum over each. A collective: each rank
    reads its share of the files."""
    params = dict(model.named_parameters())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    partitioned = [param for param in params.values() if hasattr(param, "ds_tensor")]
    in_memory = all(param.ds_tensor.numel() * ranks >= param.ds_numel for param in partitioned)  # not on NVMe
    made = [each for each in made if each.keeps and params.keys() >= set(each.targets)]
    if not made or not in_memory:
        return []
    sums = torch.zeros(len(made), 3, dtype=torch.float64)  # in the files, of the parameters, and how large what was summed is
    for i, each in enumerate(made):
        parts = [_part_of(params[target]) for target in each.targets]
        if i % ranks == rank:
            tensors = (read(files[source], source).to(parts[0].dtype) for source in each.sources)
            sums[i, 0], sums[i, 2] = (sum(pair) for pair in zip(*map(_sums, tensors), strict=True))
        sums[i, 1] = sum(_sums(part)[0] for part in parts)
    device = next(iter(params.values())).device
    summed = sums.to(device)
    dist.all_reduce(summed)
    in_files, of_model, size = summed.cpu().T
    wrong = ~((in_files - of_model).abs() <= 1e-9 * size + 1e-30)
    return [target for each, bad in zip(made, wrong.tolist(), strict=True) if bad for target in each.targets]


def _part_of(param: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter that is partitioned, without what fills the last part; of one that is not yet, as of
    a model within a model, rank 0 has all."""
    if not hasattr(param, "ds_tensor"):
        return param.detach().flatten()[: param.numel() if dist.get_rank() == 0 else 0]
    part = param.ds_tensor.detach().flatten()
    return part[: max(0, param.ds_numel - dist.get_rank() * part.numel())]


def read(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file, mapped."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    """Of the numbers, and of their sizes."""
    total = size = 0.0
    for piece in tensor.flatten().split(_AT_ONCE):
        total += piece.double().sum().item()
        size += piece.double().abs().sum().item()
    return total, size
