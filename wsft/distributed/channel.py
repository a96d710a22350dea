"""Messages between ranks over gloo, on the host: they need neither a stream nor device memory. Nothing is pickled."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")

_DTYPES = [np.dtype(name) for name in ("uint8", "bool", "int64", "float32", "float64")]
_ALIGNED = 8  # bytes to whose multiples arrays in a message are padded


class Channel:
    """A process group of its own, for one thread of each rank. Every method is a collective."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # a timeout is reported by the watchdog, which logs the stacks
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """Arrays [n] of one size and type, one from each rank: [ranks, n] on every rank."""
        gathered = [torch.empty(len(values), dtype=torch.from_numpy(values).dtype) for _ in range(self.size)]
        dist.all_gather(gathered, torch.from_numpy(values), group=self.group)
        return torch.stack(gathered).numpy()

    def all_gather_ints(self, *values: int) -> list[list[int]]:
        """Integers of each rank, on every rank."""
        return self.all_gather(np.array(values, dtype=np.int64)).tolist()

    def broadcast(self, message: np.ndarray | None, size: int, source: int) -> np.ndarray:
        """The message [size] uint8 of the rank `source`, on every rank."""
        message = message if self.rank == source else np.empty(size, dtype=np.uint8)
        if size:
            dist.broadcast(torch.from_numpy(message), source, group=self.group)
        return message


def to_message(arrays: object) -> np.ndarray:
    """A dataclass of 1-D arrays as one [bytes] uint8: sizes and types, then the values."""
    local = [np.ascontiguousarray(getattr(arrays, field.name)) for field in dataclasses.fields(arrays)]
    header = np.array([[len(array), _DTYPES.index(array.dtype)] for array in local], dtype=np.int64)
    parts = [header.reshape(-1).view(np.uint8)]
    for array in local:
        parts += [array.view(np.uint8), np.zeros(-array.nbytes % _ALIGNED, dtype=np.uint8)]
    return np.concatenate(parts)


def from_message(message: np.ndarray, like: type[T]) -> T:
    """What `to_message` made of an instance of `like`. The arrays are views of the message."""
    fields = [field.name for field in dataclasses.fields(like)]
    header = message[: 16 * len(fields)].view(np.int64).reshape(-1, 2).tolist()
    arrays, at = {}, 16 * len(fields)
    for name, (size, code) in zip(fields, header, strict=True):
        end = at + size * _DTYPES[code].itemsize
        arrays[name] = message[at:end].view(_DTYPES[code])
        at = end + -end % _ALIGNED
    return like(**arrays)
