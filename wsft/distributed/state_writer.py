"""Writes the files of a checkpoint in a thread, from copies in host memory, so that training waits for the copies only."""

from __future__ import annotations

import copy
import logging
import os
import threading
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from wsft.device import free_host_memory

log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.5  # of the host's free memory, which copies of all its ranks may take


class StateWriter:
    """Of one rank.

    Args:
        in_background: False, or too little free memory: files are written at once.
        ranks_here: on this host, which copy at the same time.
    """

    def __init__(self, in_background: bool, ranks_here: int):
        self.at_once = False  # for the files that are added next: nothing is trained meanwhile
        self._in_background, self._ranks_here = in_background, ranks_here
        self._copies: list[tuple[Any, str]] = []
        self._pinned: list[torch.Tensor] = []  # kept, since it takes long to make them; the first `_taken` hold copies
        self._taken = 0
        self._thread: threading.Thread | None = None
        self._written, self._error = 0, None

    def add(self, state_dict: Any, path: str) -> None:
        """A file of the checkpoint. Takes the place of torch.save in DeepSpeed; raises nothing, which between DeepSpeed's
        barriers would leave other ranks waiting. See `wait`."""
        if not self._copy(state_dict, path):
            self._write(state_dict, path)

    def start(self) -> None:
        """All files are added: write the copies."""
        if not self._copies:
            return
        if self._pinned:
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write_all, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> tuple[int, Exception | None]:
        """Until all is written; the number of bytes, and the first error."""
        if self._thread:
            self._thread.join()
        found = self._written, self._error
        self._thread, self._written, self._error, self._taken = None, 0, None, 0
        return found

    def _copy(self, state: Any, path: str) -> bool:
        """Whether there was room for a copy."""
        try:
            if self.at_once or not self._in_background or not self._fits(state):
                return False
            self._copies.append((self._copied(state), path))
        except (MemoryError, RuntimeError) as error:  # there was less after all
            log.warning("training waits while checkpoints are written: they cannot be copied (%s)", error)
            self._in_background = False
            return False
        return True

    def _fits(self, state: Any) -> bool:
        if self._pinned:
            return True
        memories = (x.untyped_storage() for x in _tensors(state))
        size = sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())
        free = free_host_memory()
        fits = free is None or size * self._ranks_here <= SHARE_OF_FREE * free
        if not fits:
            log.warning(
                "training waits while checkpoints are written: their copies on %d rank(s) of this host would take %.1f GiB, "
                "and %.1f are free", self._ranks_here, size * self._ranks_here / 2**30, free / 2**30,
            )  # fmt: skip
            self._in_background = False
        return fits

    def _copied(self, state: Any) -> Any:
        """In host memory. Tensors that share memory do so in the copy, as torch.save writes that once."""
        memories: dict[int, torch.UntypedStorage] = {}

        def copied(value: torch.Tensor) -> torch.Tensor:
            value = value.detach()
            memory = value.untyped_storage()
            if memory.data_ptr() not in memories:
                whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(memory)
                memories[memory.data_ptr()] = self._on_host(whole).untyped_storage()
            out, memory = torch.empty(0, dtype=value.dtype), memories[memory.data_ptr()]
            return out.set_(memory, value.storage_offset(), value.shape, value.stride())

        return copy.deepcopy(state, {id(x): copied(x) for x in _tensors(state)})

    def _on_host(self, source: torch.Tensor) -> torch.Tensor:
        if not source.is_cuda:
            return source.clone()
        taken, self._taken = self._taken, self._taken + 1
        if taken == len(self._pinned) or len(self._pinned[taken]) != len(source):
            self._pinned[taken : taken + 1] = [torch.empty(len(source), dtype=torch.uint8, pin_memory=True)]
        return self._pinned[taken].copy_(source, non_blocking=True)

    def _write_all(self) -> None:
        for state, path in self._copies:
            self._write(state, path)
        self._copies = []

    def _write(self, state: Any, path: str) -> None:
        """With fsync."""
        try:
            with open(path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
                self._written += file.tell()
        except Exception as error:
            self._error = self._error or error


def _tensors(state: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
