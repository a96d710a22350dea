"""Capabilities of a device, its peak memory, and free memory of the host. Knows nothing of models, batches or ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import logging
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wsft.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

NVIDIA_CARDS = "/dev/nvidia[0-9]*"  # device files of the driver


def device_type(asked: str) -> str:
    """ "cuda" or "cpu" for the run's `device`. UserError where it asks for a GPU, or there is one, that torch cannot use."""
    if asked == "cpu" or torch.cuda.is_available():
        return "cpu" if asked == "cpu" else "cuda"
    cuda = torch.version.cuda
    reason = f"a driver too old for CUDA {cuda}, or none?" if cuda else "this torch is built without CUDA"
    if asked == "cuda":
        raise UserError(f"device is cuda, but torch finds no CUDA device ({reason}): use --device auto or cpu, or fix that")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    cards = [] if hidden else glob.glob(NVIDIA_CARDS)
    if cards:
        raise UserError(
            f"there are {len(cards)} NVIDIA GPU(s) here ({min(cards)}), but torch cannot use them ({reason}): fix that, or "
            f"train on the CPU with --device cpu"
        )
    return "cpu"


class Movable:
    """A dataclass whose tensors are copied together, those of its fields of this kind included."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._with_each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy from pageable memory to a GPU would wait for all work that is queued there."""
        return self._with_each(lambda x: x.pin_memory())

    def _with_each(self, change: Callable[[Any], Any]) -> Self:
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: change(x) for name, x in found.items() if isinstance(x, torch.Tensor | Movable)}
        return dataclasses.replace(self, **moved)


@functools.cache
def has_native_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for matrix products of this type. On a CPU without them, half precision is 5 to 100
    times slower than float32."""
    if device.type == "meta":  # nothing is computed there
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    native = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in native or bool(getattr(torch.ops.mkldnn, native[dtype])())


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether to use torch.compile on the device. On a CPU it gained nothing and took 20 s to compile. The first call must be
    outside of a forward pass: ZeRO-3 cannot recover from an exception inside one."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as error:  # any error of Triton, or of the C compiler that it calls
        log.warning(
            "the head's kernels cannot be compiled (%s): it runs without, and slower; they need gcc and Python's headers "
            "(Debian: apt-get install gcc python3-dev)",
            str(error).strip().splitlines()[-1:],
        )
        return False
    return True


def memory_bytes(device: torch.device) -> int:
    """Total memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


class PeakMemory:
    """Peak memory since the last call of `gib`: on a GPU that of tensors, else that of the whole process."""

    def __init__(self, device: torch.device):
        self._device = device
        self.gib()

    def gib(self) -> float:
        """Peak in GiB; resets it."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak / 2**30
        try:
            status = Path("/proc/self/status").read_text()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
        except (OSError, TypeError):  # not Linux: the peak since the process started
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_host_memory(proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Free bytes of this machine's memory, within the limits of this process's control group (as of a container or a SLURM job)
    and of those above it; None where nothing can be read."""
    free = []
    with contextlib.suppress(OSError, TypeError):
        free.append(int(re.search(r"MemAvailable:\s+(\d+)", (proc / "meminfo").read_text())[1]) * 1024)
    own = ""
    with contextlib.suppress(OSError):
        own = (proc / "self" / "cgroup").read_text()
    kinds = (
        (control_groups, r"^0::/(.*)$", "memory.max", "memory.current"),
        (control_groups / "memory", r"^\d+:[^:]*\bmemory\b[^:]*:/(.*)$", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for root, line, limit, used in kinds:
        found = re.search(line, own, re.MULTILINE)
        group = root / (found[1] if found else "")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # such as "max", which is no limit
                free.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
            if folder == root:
                break
    return min(free, default=None)
