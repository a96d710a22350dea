"""DeepSpeed compiles ops at their first use: here by one process at a time; where that fails, torch's are used instead."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from torch.utils import cpp_extension

from wsft.distributed.world import World

log = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling_ops() -> Iterator[None]:
    """Around whatever may compile an op of DeepSpeed. torch takes a file for a lock; a start that is killed leaves it, and all
    that wait, or come later, would wait for ever. Here it is a lock that dies with its process."""
    before, cpp_extension.FileBaton = cpp_extension.FileBaton, _FileLock
    try:
        yield
    finally:
        cpp_extension.FileBaton = before


class _FileLock:
    """In the place of torch's: whoever comes next compiles what is not compiled yet, which is mostly nothing."""

    def __init__(self, path: str, *_: Any, **__: Any):
        self._path, self._held = f"{path}.held", contextlib.ExitStack()

    def try_acquire(self) -> bool:
        with contextlib.suppress(OSError):  # no such locks on this file system, or nothing that may be written
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._held.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process, which compiles an op of DeepSpeed")
                fcntl.flock(file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._held.close()


def tolerate_missing_shared_memory_op() -> None:
    """DeepSpeed compiles an op by which ranks on one CPU reduce through shared memory; gloo does as well, and slower."""
    backend = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm` has torch itself by that name
    build = backend.build_shm_op
    if build.__name__ == "build_if_possible":
        return

    def build_if_possible() -> Any:
        try:
            return build()
        except Exception as error:  # of many kinds: no compiler, no ninja, no Python headers
            log.info(
                "DeepSpeed's op for shared memory cannot be compiled (%s): gloo is used, which is slower", _last_line(error)
            )
            return None

    backend.build_shm_op = build_if_possible


def choose_adam(ds: dict[str, Any], world: World) -> None:
    """torch's fused Adam in the resolved JSON where it asks for DeepSpeed's own, and a rank cannot compile that: no compiler, a
    CUDA toolkit of another version than torch's, or none."""
    from deepspeed.accelerator import get_accelerator

    params = ds["optimizer"].setdefault("params", {})
    if ds["optimizer"].get("type", "").lower() not in ("adam", "adamw") or params.get("torch_adam"):
        return
    offloaded = ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    builder, error = "CPUAdamBuilder" if offloaded else "FusedAdamBuilder", None
    try:
        with compiling_ops():
            get_accelerator().create_op_builder(builder).load(verbose=False)
    except Exception as failure:  # of many kinds, from ninja's to DeepSpeed's own
        error = failure
    if world.all_true(error is None):
        return
    params |= {"torch_adam": True, "fused": True}
    reason = _last_line(error) if error else "another rank says why"
    log.warning("DeepSpeed's Adam cannot be compiled here (%s): torch's fused one is used, which computes the same", reason)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
