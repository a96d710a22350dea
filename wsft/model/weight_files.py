"""The weight files of a model: which parameters transformers makes of their tensors, and whether it loaded them right."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils
from transformers.integrations import deepspeed as deepspeed_integration

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_AT_ONCE = 2**24  # numbers summed at once: 128 MiB in float64
# conversions of transformers that only rearrange values
_KEEPING = {"Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "SplitModulelist", "Transpose", "PermuteForRope"}


def files_of(name: str) -> dict[str, Path]:
    """Tensor name -> safetensors file, for a Hugging Face folder or a hub name in the cache. Empty for other formats."""
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
    """Tensors of the files, and the parameters or buffers made of them; `keeps`: of the same values, in some order."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    keeps: bool


def made_of(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[Made], list[str]]:
    """What transformers makes of tensors with those names, and the names that it does not use. The model may be on the meta
    device."""
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
    """transformers' renaming, except that a name of the model is kept if it would be renamed to one that is not."""
    found = _transformers_rename(name, renamings, converters, base_model_prefix, meta_state_dict, **more)
    own = meta_state_dict or {}
    if found[0] not in own and name in own:
        return _transformers_rename(name, [], [], base_model_prefix, meta_state_dict, **more)
    return found


@contextlib.contextmanager
def loading_as_without_zero3(empty: PreTrainedModel) -> Iterator[None]:
    """Patches transformers' loader under ZeRO-3 where its result differs from that without (seen with 5.24):

    - a name of the model is kept (else the last norm of DeepSeek V4 is lost, and initialized at random);
    - conversions that split a tensor by sizes of parameters read them from an empty model (Sarvam, Lara);
    - buffers get the types that they have in an empty model: DeepSpeed creates them in the type of the parameters, which
      would round values that are loaded or computed in float32 (LFM2-MoE, RecurrentGemma);
    - modules whose tensors were all loaded are not initialized, since that code expects whole parameters (xLSTM).
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
        _replaced(core_model_loading, "rename_source_key", _rename),
        _replaced(deepspeed_integration, "_apply_weight_conversions_to_state_dict", lambda _, *args: convert(empty, *args)),
        _replaced(modeling_utils, "_load_state_dict_into_zero3_model", load_into_buffers_of_their_types),
        _replaced(PreTrainedModel, "_initialize_missing_keys", initialize_others),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def differing(model: PreTrainedModel, files: dict[str, Path], made: list[Made]) -> list[str]:
    """Names of the parameters under ZeRO-3 whose sum differs from that in the model's files. A collective, in which each rank
    reads a share of the files."""
    params = dict(model.named_parameters())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    partitioned = [param for param in params.values() if hasattr(param, "ds_tensor")]
    in_memory = all(param.ds_tensor.numel() * ranks >= param.ds_numel for param in partitioned)  # else they are on NVMe
    made = [each for each in made if each.keeps and params.keys() >= set(each.targets)]
    if not made or not in_memory:
        return []
    sums = torch.zeros(len(made), 3, dtype=torch.float64)  # sum in the files, sum of the parameters, sum of absolute values
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
    """This rank's partition of a parameter, without padding. A parameter that is not partitioned counts on rank 0 only."""
    if not hasattr(param, "ds_tensor"):
        return param.detach().flatten()[: param.numel() if dist.get_rank() == 0 else 0]
    part = param.ds_tensor.detach().flatten()
    return part[: max(0, param.ds_numel - dist.get_rank() * part.numel())]


def read(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file, memory-mapped."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    """The sum of the values, and of their absolute values."""
    total = size = 0.0
    for piece in tensor.flatten().split(_AT_ONCE):
        total += piece.double().sum().item()
        size += piece.double().abs().sum().item()
    return total, size
