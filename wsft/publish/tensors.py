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
        self._empty, self._gathered = empty, gathered
        files = files_of(name)
        # of weights in other formats than safetensors nothing can be copied: all that the model has is published
        self._params = {key: param for key, param in model.named_parameters() if param.requires_grad or not files}
        self._buffers = {} if files else {k: b for k, b in model.named_buffers() if k in model.state_dict()}
        made, others = made_of(model, files)
        tied = model.state_dict().keys() - dict(model.named_parameters()).keys() - dict(model.named_buffers()).keys()
        changed = self._params.keys() | tied
        kept = [each for each in made if not changed & set(each.targets)]
        self.unchanged = {key: files[key] for key in (*others, *(key for each in kept for key in each.sources))}
        self.buckets = list(self._fill(_joined(self._params, (each.targets for each in made)), bucket_bytes))

    def _fill(self, groups: list[list[str]], bucket_bytes: int) -> Iterator[list[str]]:
        bucket: list[str] = []
        for group in groups:
            if bucket and self._bytes_of(bucket) + self._bytes_of(group) > bucket_bytes:
                yield bucket
                bucket = []
            bucket = bucket + group
        yield bucket

    def _bytes_of(self, names: list[str]) -> int:
        params = (self._params[name] for name in names)
        # under ZeRO-3 numel() is that of the partition, mostly 0
        return sum(getattr(param, "ds_numel", param.numel()) * param.element_size() for param in params)

    @torch.no_grad()
    def bucket(self, names: list[str], wanted: bool) -> dict[str, torch.Tensor]:
        """The tensors of a bucket on the CPU, empty unless `wanted` on this rank. A collective under ZeRO-3."""
        params = [self._params[name] for name in names]
        with self._gathered(params):
            if not wanted:
                return {}
            whole = {name: param.detach().to("cpu", copy=True) for name, param in zip(names, params, strict=True)}
        if names == self.buckets[0]:
            whole |= {name: buffer.to("cpu", copy=True) for name, buffer in self._buffers.items()}
        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self._empty, whole).items()}


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
