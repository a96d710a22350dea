"""The only file that knows DeepSpeed: it starts the ranks, and makes one optimizer step of many uneven micro-batches.

DeepSpeed divides by a fixed number of accumulation steps and averages over ranks. wsft's loss is a sum whose weights are
already divided by the *global* count, and the number of micro-batches varies, so both are undone here and nowhere else.
Knows nothing of Atropos, advantages or objectives.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_default_build_root
from transformers import set_seed

from wsft.config import UserError, WeightedSFTConfig
from wsft.device import PeakMemory, to_device
from wsft.ds_config import for_reference
from wsft.layout import Layout
from wsft.model import WeightedSFTModel
from wsft.terms import TokenTerms
from wsft.world import World, ranks_on_this_host

log = logging.getLogger(__name__)

# By oneDNN, whose matrix products in bf16 on a CPU have a kernel for each size: of the 1,024 that it would keep, and as many
# descriptions (0.3 GiB and more), few are used again, for hardly two micro-batches are of one size
KERNELS_KEPT = "128"

# deepspeed is imported inside functions: it picks its accelerator when it is imported, and start_ranks picks it first


def start_ranks(config: WeightedSFTConfig) -> World:
    """Join the process group (gloo on CPU, NCCL on CUDA) and take this rank's device."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device: use --device auto or cpu, or mend the driver")
    kind = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if kind == "cuda":
        if local_rank >= num_gpus:
            raise UserError(f"local rank {local_rank} has no GPU of its own, {num_gpus} are visible: start fewer ranks")
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
    trust_no_pickle()
    # DeepSpeed calls collectives by names that torch has deprecated, and prints of each op that it could be loaded: nothing
    # that a user can mend
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(io.StringIO()), _compiling_ops():
        deepspeed.init_distributed(dist_backend="nccl" if kind == "cuda" else "gloo", verbose=False)
    set_seed(config.seed)
    return World(torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu"), config.step_timeout)


def trust_no_pickle() -> None:
    """From here on torch.load builds tensors, plain containers and three classes of DeepSpeed, and runs no code from a file;
    also where DeepSpeed asks it to."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def check_json(ds: dict[str, Any]) -> None:
    """UserError if DeepSpeed would refuse its resolved JSON for what it says. Needs no other rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(ds | {"train_batch_size": 1})  # alone, it counts one rank
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"DeepSpeed refuses its JSON: {error}") from error
    name = ds["optimizer"].get("type", "")
    if name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        raise UserError(f"optimizer.type in the DeepSpeed JSON is {name!r}: neither DeepSpeed nor torch has it; write AdamW")


@dataclass
class MicroBatch:
    """One forward pass: rows [B, T], flat positions of their trained tokens [N] (see model.py), what these add to the loss."""

    tokens_BT: torch.Tensor
    trained_N: torch.Tensor
    terms: TokenTerms
    layout: Layout | None  # of the sequences packed in one row; None: every row is one


@dataclass
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool  # False: gradients were not finite, parameters are as before
    sums: dict[str, float]  # over all trained tokens of the global batch, as `TokenTerms.sums` names them
    maxima: dict[str, float]
    peak_gib: float  # of memory, on the rank that took most, since the step before


class Engine:
    def __init__(self, config: WeightedSFTConfig, ds: dict[str, Any], model: WeightedSFTModel, world: World):
        import deepspeed
        from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

        self.world, self.stage = world, ds["zero_optimization"]["stage"]
        self._peak = PeakMemory(world.device)
        schedule = None if "scheduler" in ds else lambda optimizer: _schedule(config, optimizer)
        try:
            with _compiling_ops():
                self._engine, *_ = deepspeed.initialize(
                    model=model,
                    model_parameters=[p for p in model.parameters() if p.requires_grad],
                    config=ds,
                    lr_scheduler=schedule,
                    dist_init_required=False,
                )
        except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
            raise UserError(f"DeepSpeed cannot start with its JSON as it stands: {type(error).__name__}: {error}") from error
        if isinstance(self._engine.optimizer, FP16_UnfusedOptimizer):
            _undo_warm_up(self._engine.optimizer)
        self._unwritten: Exception | None = None
        self._engine.checkpoint_engine.save = self._write
        self._engine._copy_recovery_script = lambda folder: None  # no code among the data

    @property
    def queues(self) -> bool:
        """Whether what is asked of the device is done later."""
        return self.world.device.type == "cuda"

    def step(self, micro_batches: list[MicroBatch], reference: Reference | None = None) -> Callable[[], StepResult]:
        """Forward and backward over this rank's micro-batches, then one step on all. Every rank brings equally many.

        With a reference, its logps are those that the KL term compares with. What is returned tells the result; to call it is
        a collective, and waits for the device: best after the next step was given to it.
        """
        engine, found = self._engine, []
        for i, mb in enumerate(micro_batches):
            tokens_BT, trained_N, terms = (to_device(x, self.world.device) for x in (mb.tokens_BT, mb.trained_N, mb.terms))
            if reference:
                terms = replace(terms, ref_logp_N=reference.logp(tokens_BT, trained_N, terms.temperature_N, mb.layout))
            engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            out = engine(tokens_BT, trained_N, terms, mb.layout, **terms.head_options())
            engine.backward(out.loss * self.world.size)  # DeepSpeed averages over ranks; the loss is a share of a sum
            sums, maxima = terms.sums(out)
            found.append(({"loss": out.loss.detach().double()} | sums, maxima))
        learning_rate = engine.get_lr()[0]
        grad_norm, applied = self._apply()
        peak = {"gib": torch.tensor(self._peak.gib())}
        sums, maxima = ({name: torch.stack([x[name] for x in each]) for name in each[0]} for each in zip(*found, strict=True))

        def result() -> StepResult:
            all_sums = self.world.sums({name: x.sum() for name, x in sums.items()})
            highest = self.world.highest({name: x.amax() for name, x in maxima.items()})
            norm, peak_gib = float(grad_norm) if applied else math.nan, self.world.highest(peak)["gib"]
            return StepResult(all_sums.pop("loss"), norm, learning_rate, applied, all_sums, highest, peak_gib)

        return result

    def _apply(self) -> tuple[float | torch.Tensor, bool]:
        """The optimizer step; the norm of the gradient before clipping, and whether it was finite: else there was no step.

        Stages 1 to 3 look for non-finite gradients themselves and skip the step without a word; stage 0 does not look.
        """
        engine = self._engine
        if self.stage > 0:
            engine.step()
            return engine.get_global_grad_norm(), engine.was_step_applied()
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
        if math.isfinite(norm):
            engine.step()
        else:
            engine.optimizer.zero_grad()
            engine.zero_grad()
        return norm, math.isfinite(norm)

    def save(self, folder: Path) -> Exception | None:
        """DeepSpeed's sharded parameters, optimizer and schedule into a new folder. All ranks call it together, and each gets
        through; returned is what this rank's disk said."""
        _quietly(self._engine.save_checkpoint, str(folder.parent), tag=folder.name, save_latest=False)
        failure, self._unwritten = self._unwritten, None
        return failure

    def _write(self, state_dict: dict, path: str) -> None:
        """DeepSpeed's way to write a file, but durable, and without an exception between its barriers."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            self._unwritten = self._unwritten or error

    def load(self, folder: Path) -> None:
        """What `save` wrote, or what `convert` made of it. All ranks call it together, before the first step."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path, _ = _quietly(self._engine.load_checkpoint, str(folder.parent), tag=folder.name)
        assert path is not None, folder


class Reference:
    """A frozen model, sharded as the trained one is."""

    def __init__(self, ds: dict[str, Any], model: WeightedSFTModel, world: World):
        import deepspeed

        self.model = model
        if ds["zero_optimization"]["stage"] == 3:
            self._model, *_ = deepspeed.initialize(model=model, config=for_reference(ds), dist_init_required=False)
        else:
            self._model = model.to(world.device)
        model.check_head(world.device)

    @torch.no_grad()
    def logp(
        self, tokens_BT: torch.Tensor, trained_N: torch.Tensor, temperature_N: torch.Tensor, layout: Layout | None
    ) -> torch.Tensor:
        """[N] of the trained tokens; see `WeightedSFTModel.forward`. A collective under ZeRO-3."""
        silence_N = torch.zeros_like(temperature_N)
        return self._model(tokens_BT, trained_N, silence_N, layout, temperature=temperature_N).logp_N


def convert(folder: Path, out: Path) -> None:
    """A checkpoint of another number of ranks into one for any (DeepSpeed's "universal checkpoint"). One rank calls it.

    In a process of its own: it takes the memory of several ranks, and gives it back.
    """
    code = (
        "from wsft.engine import trust_no_pickle; trust_no_pickle()\n"
        "from deepspeed.checkpoint.ds_to_universal import main, parse_arguments; main(parse_arguments())"
    )
    arguments = {"input_folder": folder, "output_folder": out, "num_extract_workers": 1, "num_merge_workers": 1}
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-c", code, *flags, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    if done.returncode:
        raise UserError(
            f"DeepSpeed cannot convert {folder} to another number of ranks (it knows Adam's state only): resume on as many "
            f"ranks as saved it. It said: {done.stderr.strip().splitlines()[-1:]}"
        )


def saved_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> whole value of everything in what `save` wrote; masters in float32. Values under ZeRO-3 are put together when
    `.contiguous()` is called, out of files that are mapped, not read."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils import zero_to_fp32

    zero_to_fp32.tqdm = lambda items, **_: items
    trust_no_pickle()
    whole = folder / "mp_rank_00_model_states.pt"
    if not any(folder.glob("*optim_states.pt")):  # stage 0: nothing is sharded
        state = torch.load(whole, map_location="cpu", mmap=True)["module"]
    else:
        state = _quietly(
            zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint, str(folder.parent), tag=folder.name, lazy_mode=True
        )
    return {name.removeprefix("model."): value for name, value in state.items()}


def _quietly(action: Any, *args: Any, **kwargs: Any) -> Any:
    """DeepSpeed prints as it goes. (Its stderr stays: the watchdog's words go there, too.)"""
    with contextlib.redirect_stdout(io.StringIO()):
        return action(*args, **kwargs)


def _undo_warm_up(optimizer: Any) -> None:
    """At stage 0 in bf16, DeepSpeed's optimizer takes a step on zero gradients to make its state: Adam would count it, and
    weight decay would be applied once too often."""
    optimizer.optimizer.state.clear()
    for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            master.data.copy_(param.data)


@contextlib.contextmanager
def _compiling_ops() -> Iterator[None]:
    """Around whatever may compile an op of DeepSpeed. A start that is killed meanwhile leaves a lock file on which every later
    one would wait for ever: here each start also holds a lock that dies with its process, and who gets it alone knows that
    nobody compiles."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # in a cache that cannot be written nothing is compiled
            root.mkdir(parents=True, exist_ok=True)
            start = held.enter_context((root / "wsft.lock").open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(start, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for stale in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
                    log.info("removing %s, left by a start that was killed while it compiled", stale)
                    stale.unlink()
            fcntl.flock(start, fcntl.LOCK_SH)
        yield


def _schedule(config: WeightedSFTConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The course of the learning rate. No step has rate 0, as the usual schedules have at their first: batches are dear."""
    warmup, total = config.warmup_steps, config.training_steps

    def factor(step: int) -> float:  # of the update after `step` others
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(0, total - step) / (total - warmup)
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.lr_scheduler]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
