"""The trained parameters as tensors under the names of the model's files, gathered one bucket at a time. With LoRA these are
the adapted weights, W + (alpha / r) B A, computed in float32 and rounded once.

Knows nothing of Atropos, objectives or optimizers, nor of who receives the tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from wsft.model.lora import adapted_modules, change_of
from wsft.model.weight_files import files_of, made_of

_CPU = torch.device("cpu")
# a context in which parameters are whole on every rank; under ZeRO-3 a collective
Gathered = Callable[[list[torch.nn.Parameter]], contextlib.AbstractContextManager[None]]


class TrainedTensors:
    """The trained parameters of a model, in buckets of at most `bucket_bytes` (a larger parameter is a bucket of its own).

    Args:
        empty: the same model on the meta device, not loaded from files: transformers gives its tensors the names of files.
        name: folder or hub name of the base model.
    Attributes:
        adapted: whether the model has adapters. Then `dtype`, if it is set before the first use of `buckets`, is that of the
            tensors instead of the weights'.
        wanted, lost: sums of squares of what adapters change in the buckets taken so far, and of what rounding took from that.
        unchanged: tensor -> file of the base model, for those of its tensors that no trained parameter is saved as.
    """

    def __init__(self, model: PreTrainedModel, empty: PreTrainedModel, name: str, gathered: Gathered, bucket_bytes: int):
        self._empty, self._gathered, self.bucket_bytes = empty, gathered, bucket_bytes
        files = files_of(name)
        # of weights in other formats than safetensors nothing can be copied: all that the model has is published
        params, state, (made, others) = dict(model.named_parameters()), model.state_dict().keys(), made_of(model, files)
        self._adapted = {f"{key}.weight": module for key, module in adapted_modules(model).items()}
        self.adapted, self.dtype, self.lost, self.wanted = bool(self._adapted), None, 0.0, 0.0
        trained = self._adapted.keys() or {key for key, param in params.items() if param.requires_grad}
        together = [set(each.targets) for each in made if trained & set(each.targets)]
        self._params = {key: param for key, param in params.items() if key in set().union(trained, *together) or not files}
        self._buffers = {} if files else {k: b for k, b in model.named_buffers() if k in state}
        tied = set() if self.adapted else state - params.keys() - dict(model.named_buffers()).keys()
        kept = [each for each in made if not (self._params.keys() | tied) & set(each.targets)]
        self.unchanged = {key: files[key] for key in (*others, *(key for each in kept for key in each.sources))}
        self._groups = _joined(self._params, (each.targets for each in made))

    @functools.cached_property
    def buckets(self) -> list[list[str]]:
        """Names of the parameters of each bucket. The same on every rank."""
        return list(self._fill(self._groups))

    def _fill(self, groups: list[list[str]]) -> Iterator[list[str]]:
        bucket: list[str] = []
        for group in groups:
            if bucket and self._bytes_of(bucket) + self._bytes_of(group) > self.bucket_bytes:
                yield bucket
                bucket = []
            bucket = bucket + group
        yield bucket

    def _bytes_of(self, names: list[str]) -> int:
        params = (self._params[name] for name in names)
        # under ZeRO-3 numel() is that of the partition, mostly 0
        return sum(getattr(param, "ds_numel", param.numel()) * self._type_of(param).itemsize for param in params)

    def _type_of(self, param: torch.Tensor) -> torch.dtype:
        return self.dtype if self.adapted and self.dtype else param.dtype

    @torch.no_grad()
    def bucket(self, names: list[str], wanted: bool, device: torch.device = _CPU) -> dict[str, torch.Tensor]:
        """A copy of the tensors of a bucket, in the order of `manifest`; empty unless `wanted` on this rank. A collective under
        ZeRO-3."""
        adapted = [self._adapted[name] for name in names if name in self._adapted]
        of_adapters = [param for module in adapted for param in (module.lora_A, module.lora_B)]
        with self._gathered([*(self._params[name] for name in names), *of_adapters]):
            if not wanted:
                return {}
            whole = {name: self._whole(name).to(device, copy=True) for name in names}
        return self._as_saved(names, whole | {name: buffer.to(device, copy=True) for name, buffer in self._first(names)})

    def adapters(self, wanted: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Names of the adapters' matrices, such as "model.layers.0.self_attn.q_proj.lora_A", and copies on the CPU; nothing
        unless `wanted` on this rank. Those of the weights of a bucket are gathered together. A collective under ZeRO-3."""
        for names in self.buckets:
            found = {name.removesuffix(".weight"): self._adapted[name] for name in names if name in self._adapted}
            matrices = {f"{name}.{end}": getattr(module, end) for name, module in found.items() for end in ("lora_A", "lora_B")}
            with self._gathered([*matrices.values()]):
                copies = {name: matrix.detach().to("cpu", copy=True) for name, matrix in matrices.items() if wanted}
            yield from copies.items()

    def take_lost(self) -> tuple[float, float]:
        """`lost` and `wanted` since the last call."""
        found = self.lost, self.wanted
        self.lost = self.wanted = 0.0
        return found

    def _whole(self, name: str) -> torch.Tensor:
        weight = self._params[name].detach()
        if name not in self._adapted:
            return weight.to(self._type_of(weight))
        change = change_of(self._adapted[name])
        merged = (weight.float() + change).to(self._type_of(weight))
        self.wanted += float(change.square().sum())
        self.lost += float((merged.float() - weight.float() - change).square().sum())
        return merged

    @property
    def manifest(self) -> list[list[tuple[str, str, list[int]]]]:
        """Name, dtype ("bfloat16") and shape of the tensors of each bucket."""

        def meta(tensor: torch.Tensor) -> torch.Tensor:
            # under ZeRO-3 a parameter that is not gathered has no elements
            return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=self._type_of(tensor), device="meta")

        found = []
        for names in self.buckets:
            whole = {name: meta(self._params[name]) for name in names} | {k: meta(b) for k, b in self._first(names)}
            saved = self._as_saved(names, whole)
            found.append([(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in saved.items()])
        return found

    def _first(self, names: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Buffers, which are in the first bucket."""
        return self._buffers.items() if names == self.buckets[0] else ()

    def _as_saved(self, names: list[str], whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Under the names of the files, those with the widest elements first: as bytes in a row each is aligned."""
        saved = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self._empty, whole).items()}
        return dict(sorted(saved.items(), key=lambda item: -item[1].element_size()))


def _joined(names: Iterable[str], together: Iterable[tuple[str, ...]]) -> list[list[str]]:
    """The names in groups: those that are converted to tensors of the files together are in one group."""
    group_of = {name: [name] for name in names}
    for found in together:
        groups = [group_of[name] for name in found if name in group_of]
        for other in groups[1:]:
            if other is not groups[0]:
                groups[0].extend(other)
                group_of |= dict.fromkeys(other, groups[0])
    return list({id(group): group for group in group_of.values()}.values())
