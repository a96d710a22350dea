"""Start of a rank: its device, its process group, settings of torch and DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed

from wsft.config import WeightedSFTConfig
from wsft.device import device_type
from wsft.distributed.deepspeed_files import trust_no_pickle
from wsft.distributed.op_compilation import compiling_ops, tolerate_missing_shared_memory_op
from wsft.distributed.world import World, file_timeout_s, ranks_on_this_host, tasks_of_step
from wsft.errors import UserError

log = logging.getLogger(__name__)

# Size of oneDNN's cache of kernels. On a CPU it compiles one per size of a bf16 matrix product, and micro-batches hardly ever
# have the same size twice; its default of 1,024 takes 0.3 GiB and more
KERNELS_KEPT = "128"


def start_ranks(config: WeightedSFTConfig) -> World:
    """Join the process group (gloo on CPU, NCCL on CUDA) and take this rank's device."""
    kind = device_type(config.device)
    threads = threads_of_rank(os.environ, len(os.sched_getaffinity(0)), ranks_on_this_host())
    if threads:
        torch.set_num_threads(threads)
    if kind == "cuda":
        local_rank = gpu_of_this_rank(os.environ, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads this, too
        set_for_gpus(os.environ)
        torch.cuda.set_device(local_rank)
    else:
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, KERNELS_KEPT)
    once = " (the first start on a machine compiles an op for it: a minute or two)" if kind == "cpu" else ""
    log.info("starting %s rank(s) on %s%s", os.environ["WORLD_SIZE"], kind, once)
    os.environ["DS_ACCELERATOR"] = kind
    import deepspeed

    # cuDNN's attention gives NaN gradients with a mask on H100 and H200, up to torch 2.14 (pytorch#196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    deepspeed.logger.setLevel(logging.WARNING)
    _use_zero_at_stage_1()
    tolerate_missing_shared_memory_op()
    trust_no_pickle()
    # DeepSpeed uses deprecated names of torch's collectives, and prints a line per op that it loads: nothing that a user
    # can fix
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(io.StringIO()), compiling_ops():
        backend, timeout = "nccl" if kind == "cuda" else "gloo", collective_timeout(file_timeout_s(config.step_timeout))
        _meet_anew(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    set_seed(config.seed)
    return World(torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu"), config.step_timeout)


def threads_of_rank(env: Mapping[str, str], cores: int, ranks_here: int) -> int | None:
    """Threads on the CPU, which also runs offloaded optimizers; None where the user has set them. `cores`: those that this
    process may use, which it shares with the other ranks of this host unless each is a task of srun."""
    own_choice = env.get("OMP_NUM_THREADS")
    if own_choice and not (own_choice == "1" and "TORCHELASTIC_RUN_ID" in env):  # torchrun sets 1 where there is none
        return None
    if "SLURM_CPUS_PER_TASK" in env and tasks_of_step(env) == env["WORLD_SIZE"]:
        return min(cores, int(env["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // ranks_here)


def set_for_gpus(env: MutableMapping[str, str]) -> None:
    """Variables that torch reads once it uses the GPU, where the user has not set them."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the older is that of torch 2.11
    if not any(name in env for name in names):
        # micro-batches differ in size, and fixed segments would be left with holes
        env |= dict.fromkeys(names, "expandable_segments:True")
    # few kernels are compiled, for which torch would start up to 32 processes on every rank
    env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # torch's default is in /tmp, which many clusters make anew for each job
    caches = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "wsft" / "torchinductor"))


def _meet_anew(backend: str, timeout: timedelta) -> None:
    """The rendezvous store, with a prefix per attempt: torchrun keeps it when it restarts ranks (--max_restarts), and they must
    not find addresses of processes that have ended."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def gpu_of_this_rank(env: Mapping[str, str], num_gpus: int) -> int:
    """The index of this rank's GPU among those it can see; with SLURM's --gpus-per-task=1 each task sees only its own.
    UserError if there is none."""
    local_rank = int(env["LOCAL_RANK"])
    if local_rank < num_gpus:
        return local_rank
    if num_gpus == 1 and "SLURM_PROCID" in env and int(env.get("SLURM_GPUS_ON_NODE", "1")) != 1:
        return 0
    raise UserError(f"local rank {local_rank} has no GPU of its own, {num_gpus} are visible: start fewer ranks")


def collective_timeout(timeout_s: float) -> timedelta:
    """Timeout after which a collective aborts the process: later than the watchdog, which logs why (watchdog.py)."""
    return timedelta(seconds=timeout_s + 60)


def _use_zero_at_stage_1() -> None:
    """For stage 1 in bf16 with float32 gradient accumulation, DeepSpeed would choose an optimizer whose checkpoints its own
    `zero_to_fp32` cannot read, and which keeps whole gradients on every rank. Its ZeRO optimizer supports this, too."""
    from deepspeed.runtime import engine

    choose = engine.DeepSpeedEngine._do_optimizer_sanity_check
    if choose.__name__ == "choose_zero":
        return

    def choose_zero(self: Any, basic_optimizer: torch.optim.Optimizer) -> str | None:
        chosen = choose(self, basic_optimizer)
        return engine.ZERO_OPTIMIZATION if chosen == engine.BFLOAT16 else chosen

    engine.DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
