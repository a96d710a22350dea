"""How a rank starts: its device, its process group, DeepSpeed as wsft wants it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed

from wsft.config import WeightedSFTConfig
from wsft.device import device_type
from wsft.distributed.deepspeed_files import trust_no_pickle
from wsft.distributed.op_compilation import compiling_ops, tolerate_missing_shared_memory_op
from wsft.distributed.world import World, file_timeout_s, ranks_on_this_host
from wsft.errors import UserError

log = logging.getLogger(__name__)

# By oneDNN, whose matrix products in bf16 on a CPU have a kernel for each size: of the 1,024 that it would keep, and as many
# descriptions (0.3 GiB and more), few are used again, for hardly two micro-batches are of one size
KERNELS_KEPT = "128"


def start_ranks(config: WeightedSFTConfig) -> World:
    """Join the process group (gloo on CPU, NCCL on CUDA) and take this rank's device."""
    kind = device_type(config.device)
    if kind == "cuda":
        local_rank = gpu_of_this_rank(os.environ, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(local_rank)  # which DeepSpeed takes for the GPU, too
        torch.cuda.set_device(local_rank)
    else:
        if "OMP_NUM_THREADS" not in os.environ:  # else each rank takes every core, and they fight for them
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_this_host()))
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, KERNELS_KEPT)
    once = " (the first start on a machine compiles an op for it: a minute or two)" if kind == "cpu" else ""
    log.info("starting %s rank(s) on %s%s", os.environ["WORLD_SIZE"], kind, once)
    os.environ["DS_ACCELERATOR"] = kind
    import deepspeed

    deepspeed.logger.setLevel(logging.WARNING)
    _use_zero_at_stage_1()
    tolerate_missing_shared_memory_op()
    trust_no_pickle()
    # DeepSpeed calls collectives by names that torch has deprecated, and prints of each op that it could be loaded: nothing
    # that a user can fix
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(io.StringIO()), compiling_ops():
        backend, timeout = "nccl" if kind == "cuda" else "gloo", collective_timeout(file_timeout_s(config.step_timeout))
        _meet_anew(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    set_seed(config.seed)
    return World(torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu"), config.step_timeout)


def _meet_anew(backend: str, timeout: timedelta) -> None:
    """Ranks that torchrun has started again (--max_restarts) meet in the store of those before them: under a name of their own
    they do not find addresses of processes that are gone."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def gpu_of_this_rank(env: Mapping[str, str], num_gpus: int) -> int:
    """Its index among those that this process sees: with SLURM's --gpus-per-task=1 each task sees one, its own. UserError if
    there is none."""
    local_rank = int(env["LOCAL_RANK"])
    if local_rank < num_gpus:
        return local_rank
    if num_gpus == 1 and "SLURM_PROCID" in env and int(env.get("SLURM_GPUS_ON_NODE", "1")) != 1:
        return 0
    raise UserError(f"local rank {local_rank} has no GPU of its own, {num_gpus} are visible: start fewer ranks")


def collective_timeout(timeout_s: float) -> timedelta:
    """After which a collective aborts the process: later than the watchdog, which can say why (watchdog.py)."""
    return timedelta(seconds=timeout_s + 60)


def _use_zero_at_stage_1() -> None:
    """For stage 1 in bf16 with gradients summed in float32, DeepSpeed takes an optimizer whose checkpoints its own
    `zero_to_fp32` does not read, and whose gradients are whole on every rank: its ZeRO optimizer does it as well."""
    from deepspeed.runtime import engine

    choose = engine.DeepSpeedEngine._do_optimizer_sanity_check
    if choose.__name__ == "choose_zero":
        return

    def choose_zero(self: Any, basic_optimizer: torch.optim.Optimizer) -> str | None:
        chosen = choose(self, basic_optimizer)
        return engine.ZERO_OPTIMIZATION if chosen == engine.BFLOAT16 else chosen

    engine.DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
