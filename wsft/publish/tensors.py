"""The trained parameters as tensors under the names of the model's files, gathered one bucket at a time.

Knows nothing of Atropos, objectives or optimizers, nor of who receives the tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

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
        buckets: names of the parameters of each bucket. The same on every rank.
        unchanged: tensor -> file of the base model, for those of its tensors that no trained parameter is saved as.
    """

    def __init__(self, model: PreTrainedModel, empty: PreTrainedModel, name: str, gathered: Gathered, bucket_bytes: int):
        self._empty, self._gathered, self.bucket_bytes = empty, gathered, bucket_bytes
        files = files_of(name)
        # of weights in other formats than safetensors nothing can be copied: all that the model has is published
        self._params = {key: param for key, param in model.named_parameters() if param.requires_grad or not files}
        self._buffers = {} if files else {k: b for k, b in model.named_buffers() if k in model.state_dict()}
        made, others = made_of(model, files)
        tied = model.state_dict().keys() - dict(model.named_parameters()).keys() - dict(model.named_buffers()).keys()
        changed = self._params.keys() | tied
        kept = [each for each in made if not changed & set(each.targets)]
        self.unchanged = {key: files[key] for key in (*others, *(key for each in kept for key in each.sources))}
        self.buckets = list(self._fill(_joined(self._params, (each.targets for each in made))))

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
        return sum(getattr(param, "ds_numel", param.numel()) * param.element_size() for param in params)

    @torch.no_grad()
    def bucket(self, names: list[str], wanted: bool, device: torch.device = _CPU) -> dict[str, torch.Tensor]:
        """A copy of the tensors of a bucket, in the order of `manifest`; empty unless `wanted` on this rank. A collective under
        ZeRO-3."""
        params = [self._params[name] for name in names]
        with self._gathered(params):
            if not wanted:
                return {}
            whole = {name: param.detach().to(device, copy=True) for name, param in zip(names, params, strict=True)}
        return self._as_saved(names, whole | {name: buffer.to(device, copy=True) for name, buffer in self._first(names)})

    @property
    def manifest(self) -> list[list[tuple[str, str, list[int]]]]:
        """Name, dtype ("bfloat16") and shape of the tensors of each bucket."""

        def meta(tensor: torch.Tensor) -> torch.Tensor:
            # under ZeRO-3 a parameter that is not gathered has no elements
            return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")

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
