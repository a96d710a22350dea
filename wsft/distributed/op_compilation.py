"""DeepSpeed compiles ops at their first use: here one process at a time does; if that fails, those of torch are used."""

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
    """A context for everything that may compile an op of DeepSpeed. The lock of torch before 2.14 is a file: a process that is
    killed leaves it, and all others would wait for ever. Inside, it is a lock that the kernel releases with its process."""
    if not hasattr(cpp_extension, "FileBaton"):
        yield
        return
    before, cpp_extension.FileBaton = cpp_extension.FileBaton, _FileLock
    try:
        yield
    finally:
        cpp_extension.FileBaton = before


class _FileLock:
    """Replaces torch's lock. The next process compiles what is not yet compiled, which is mostly nothing."""

    def __init__(self, path: str, *_: Any, **__: Any):
        self._path, self._held = f"{path}.held", contextlib.ExitStack()

    def try_acquire(self) -> bool:
        with contextlib.suppress(OSError):  # the file system has no locks, or is read-only
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._held.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that compiles an op of DeepSpeed")
                fcntl.flock(file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._held.close()


def tolerate_missing_shared_memory_op() -> None:
    """DeepSpeed compiles an op for all-reduce through shared memory between ranks on one CPU. Without it, gloo is used."""
    backend = importlib.import_module("deepspeed.comm.torch")  # in `deepspeed.comm`, `torch` is the attribute of this name
    build = backend.build_shm_op
    if build.__name__ == "build_if_possible":
        return

    def build_if_possible() -> Any:
        try:
            return build()
        except Exception as error:  # many types: no compiler, no ninja, no Python headers
            log.info(
                "DeepSpeed's op for shared memory cannot be compiled (%s): gloo is used, which is slower", _last_line(error)
            )
            return None

    backend.build_shm_op = build_if_possible


def choose_adam(ds: dict[str, Any], world: World) -> None:
    """Set torch's fused Adam in the resolved JSON where DeepSpeed's own would be used and a rank cannot compile it: without a
    compiler, or without a CUDA toolkit of torch's version."""
    from deepspeed.accelerator import get_accelerator

    params = ds["optimizer"].setdefault("params", {})
    if ds["optimizer"].get("type", "").lower() not in ("adam", "adamw") or params.get("torch_adam"):
        return
    offloaded = ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    builder, error = "CPUAdamBuilder" if offloaded else "FusedAdamBuilder", None
    try:
        with compiling_ops():
            get_accelerator().create_op_builder(builder).load(verbose=False)
    except Exception as failure:  # many types, from ninja's to DeepSpeed's own
        error = failure
    if world.all_true(error is None):
        return
    params |= {"torch_adam": True, "fused": True}
    reason = _last_line(error) if error else "see another rank"
    log.warning("DeepSpeed's Adam cannot be compiled here (%s): torch's fused Adam is used, which computes the same", reason)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
