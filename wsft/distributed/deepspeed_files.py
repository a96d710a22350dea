"""The files of DeepSpeed's checkpoints: reading without running code from them, and resharding to other numbers of ranks."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from wsft.device import free_host_memory
from wsft.errors import UserError

MOST_WORKERS = 16


def trust_no_pickle() -> None:
    """From now on torch.load unpickles tensors, plain containers and three classes of DeepSpeed only, so that it runs no code
    from a file, also where DeepSpeed asks for weights_only=False."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def convert(folder: Path, out: Path) -> None:
    """Convert a checkpoint to DeepSpeed's "universal checkpoint", which any number of ranks can load. Called by one rank.

    Runs in processes of their own, since each takes the memory of a rank or more.
    """
    workers = num_workers(max(path.stat().st_size for path in folder.glob("*.pt")))
    code = (  # forked, so that they trust no pickle either
        "import multiprocessing; multiprocessing.set_start_method('fork')\n"
        "from wsft.distributed.deepspeed_files import trust_no_pickle; trust_no_pickle()\n"
        "from deepspeed.checkpoint.ds_to_universal import main, parse_arguments; main(parse_arguments())"
    )
    arguments = {"input_folder": folder, "output_folder": out, "num_extract_workers": workers, "num_merge_workers": workers}
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-c", code, *flags, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    if done.returncode:
        raise UserError(
            f"DeepSpeed cannot convert {folder} to another number of ranks (it knows Adam's state only): resume on as many "
            f"ranks as saved it. Its last line: {done.stderr.strip().splitlines()[-1:]}"
        )


def num_workers(largest_file: int) -> int:
    """Processes that convert a checkpoint side by side: one per core of the job, as far as memory goes. One loads the file of
    a rank (bytes) and holds what it makes of it."""
    free = free_host_memory()
    room = MOST_WORKERS if free is None else int(free // (3 * largest_file))
    return max(1, min(room, MOST_WORKERS, len(os.sched_getaffinity(0))))


def saved_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> whole tensor, of everything that `Engine.save` wrote; trained parameters as their float32 masters. Under ZeRO-3 a
    tensor is assembled from memory-mapped files when `.contiguous()` is called."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils import zero_to_fp32

    zero_to_fp32.tqdm = lambda items, **_: items
    trust_no_pickle()
    whole = folder / "mp_rank_00_model_states.pt"
    if not any(folder.glob("*optim_states.pt")):  # stage 0: nothing is sharded
        state = torch.load(whole, map_location="cpu", mmap=True)["module"]
    else:
        state = quietly(
            zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint, str(folder.parent), tag=folder.name, lazy_mode=True
        )
        if whole.exists():  # stages 1 and 2: frozen parameters have no masters
            state = torch.load(whole, map_location="cpu", mmap=True)["module"] | state
    return {name.removeprefix("model."): value for name, value in state.items()}


def saved_names(folder: Path) -> set[str]:
    """Names of the parameters that `Engine.save` wrote, or that `convert` made of it."""
    if (folder / "zero").is_dir():
        return {path.name for path in (folder / "zero").iterdir() if path.is_dir()}
    state = torch.load(min(folder.glob("*model_states.pt")), map_location="cpu", mmap=True)
    shapes = state.get("param_shapes")  # of trained parameters, for each parameter group; None at stage 0
    return set().union(*shapes) if shapes else set(state["module"])


def quietly(action: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of DeepSpeed without what it prints to stdout. (Not stderr, to which the watchdog logs.)"""
    with contextlib.redirect_stdout(io.StringIO()):
        return action(*args, **kwargs)
