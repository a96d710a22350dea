"""One optimizer step by DeepSpeed over any number of micro-batches of different sizes.

DeepSpeed divides by a fixed number of accumulation steps and averages over ranks. The loss of wsft is a sum whose weights are
already divided by the *global* token count, and the number of micro-batches varies: both divisions are undone here, and nowhere
else. Knows nothing of Atropos or advantages; only `TokenTerms` knows the objective.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wsft.config import WeightedSFTConfig
from wsft.device import Movable, PeakMemory
from wsft.distributed.deepspeed_files import quietly, saved_names
from wsft.distributed.op_compilation import choose_adam, compiling_ops
from wsft.distributed.process_start import collective_timeout
from wsft.distributed.state_writer import StateWriter
from wsft.distributed.world import World, ranks_on_this_host
from wsft.errors import UserError
from wsft.loss.terms import TokenTerms
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.lora import switched_off
from wsft.model.packing import VarlenMetadata

log = logging.getLogger(__name__)


# deepspeed is imported inside functions: it selects its accelerator on import, which start_ranks must set before


def check_json(ds: dict[str, Any]) -> None:
    """UserError if DeepSpeed would reject the resolved JSON. Needs no other rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(ds | {"train_batch_size": 1})  # without a process group it counts one rank
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"DeepSpeed refuses its JSON: {error}") from error
    name = ds["optimizer"].get("type", "")
    if name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        raise UserError(f"optimizer.type in the DeepSpeed JSON is {name!r}: neither DeepSpeed nor torch has it; write AdamW")


@dataclass(frozen=True)
class MicroBatch(Movable):
    """Inputs of one forward pass: rows [B, T], flat positions [N] of the trained tokens (see causal_lm.py), loss terms."""

    tokens_BT: torch.Tensor
    trained_N: torch.Tensor
    terms: TokenTerms
    packing: VarlenMetadata | None  # of sequences packed in one row; None: each row is a sequence


@dataclass
class StepResult:
    """Result of an optimizer step, the same on every rank."""

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool  # False: parameters, optimizer and schedule are unchanged
    signal: bool  # whether any token had a weight; with one, `applied` is False only if gradients were not finite
    without_gradient: list[str]  # parameters without a gradient on any rank; in the first step with a signal only
    sums: dict[str, float]  # over all trained tokens of the global batch, under the names of `TokenTerms.sums`
    maxima: dict[str, float]
    peak_gib: float  # peak memory since the last step, of the rank with the highest
    saved: bool  # whether all ranks have written what `Engine.save` began


class Engine:
    def __init__(self, config: WeightedSFTConfig, ds: dict[str, Any], model: WeightedSFTModel, world: World):
        import deepspeed
        from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

        self.world, self.stage, self.model = world, ds["zero_optimization"]["stage"], model
        self._saves_trained_only = config.lora_rank is not None
        self._peak = PeakMemory(world.device)
        choose_adam(ds, world)
        if self.stage == 3:
            _set_leaf_modules(model)
        schedule = None if "scheduler" in ds else lambda optimizer: _schedule(config, optimizer)
        try:
            with compiling_ops():
                self._engine, *_ = deepspeed.initialize(
                    model=model,
                    model_parameters=parameter_groups(model, ds["optimizer"].get("params", {}).get("weight_decay", 0)),
                    config=ds,
                    lr_scheduler=schedule,
                    dist_init_required=False,
                )
        except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
            raise UserError(f"DeepSpeed cannot start with its JSON as it stands: {type(error).__name__}: {error}") from error
        model.run = self._engine.__call__
        _require_rates(self._engine, ds)
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # private before torch 2.14
        for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed's own have NCCL's default of 10 minutes
            set_timeout(collective_timeout(world.timeout_s), group)
        if isinstance(self._engine.optimizer, FP16_UnfusedOptimizer):
            _undo_warm_up(self._engine.optimizer)
        self._without_gradient = _note_gradients(model)
        self._writer = StateWriter(config.background_save, ranks_on_this_host())
        # DeepSpeed has no public way to choose how a file is written, nor to leave its recovery script out
        self._engine.checkpoint_engine.save = self._writer.add
        self._engine._copy_recovery_script = lambda folder: None

    def step(self, micro_batches: list[MicroBatch], reference: Reference | BaseReference | None = None) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step. All ranks pass equally many.

        A reference scores the tokens for the KL term that have no ref_logp. There are two messages between ranks beside
        DeepSpeed's: the results before the optimizer step, which must know whether any token has a weight, and what is known
        at its end.
        """
        engine, found = self._engine, []
        for i, micro_batch in enumerate(micro_batches):
            mb = micro_batch.to(self.world.device, non_blocking=True)
            terms = mb.terms
            if reference:
                scored_N = reference.logp(mb.tokens_BT, mb.trained_N, terms.temperature_N, mb.packing)
                known_N = terms.ref_logp_N
                terms = replace(terms, ref_logp_N=scored_N if known_N is None else known_N.where(~known_N.isnan(), scored_N))
            engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            out = engine(mb.tokens_BT, mb.trained_N, terms, mb.packing, **terms.head_options())
            engine.backward(out.loss * self.world.size)  # DeepSpeed averages over ranks; the loss is a share of a sum
            sums, maxima = terms.sums(out)
            found.append(({"loss": out.loss.detach().double()} | sums, maxima | {"signal": terms.has_signal(sums)}))
        sums, maxima = ({name: torch.stack([x[name] for x in each]) for name in each[0]} for each in zip(*found, strict=True))
        sums, maxima = self.world.reduce(
            {name: x.sum() for name, x in sums.items()}, {name: x.amax() for name, x in maxima.items()}
        )
        learning_rate, signal = engine.get_lr()[0], maxima.pop("signal") > 0
        grad_norm, applied = self._apply(signal)
        _, at_end = self.world.reduce({}, {"gib": torch.tensor(self._peak.gib()), "busy": torch.tensor(self._writer.busy)})
        return StepResult(
            loss=sums.pop("loss"),
            grad_norm=float(grad_norm) if applied or not signal else math.nan,
            learning_rate=learning_rate,
            applied=applied,
            signal=signal,
            without_gradient=self._parameters_without_gradient() if signal else [],
            sums=sums,
            maxima=maxima,
            peak_gib=at_end["gib"],
            saved=not at_end["busy"],
        )

    @torch.no_grad()
    def logprobs(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """Logprobs [N] of the trained tokens of each, without gradients. All ranks pass equally many."""
        found = []
        for micro_batch in micro_batches:
            mb = micro_batch.to(self.world.device, non_blocking=True)
            temperature_N = mb.terms.temperature_N
            zeros_N = torch.zeros_like(temperature_N)
            found.append(self._engine(mb.tokens_BT, mb.trained_N, zeros_N, mb.packing, temperature=temperature_N).logp_N)
        return found

    def _parameters_without_gradient(self) -> list[str]:
        if not self._without_gradient:
            return []
        found, self._without_gradient = self._without_gradient, {}
        _, had = self.world.reduce({}, {name: torch.tensor(not missing) for name, missing in found.items()})
        return [name for name in found if not had[name]]

    def _apply(self, signal: bool) -> tuple[float | torch.Tensor, bool]:
        """The optimizer step. Returns the gradient norm before clipping, and whether the step was applied: it is skipped if the
        gradient is not finite or no token had a weight, since Adam's momentum and weight decay would still move parameters.

        Stages 1 to 3 check for non-finite gradients themselves and skip the step without a message; stage 0 does not.
        """
        engine = self._engine
        if self.stage > 0:
            with contextlib.nullcontext() if signal else _without_update(engine):
                engine.step()
            return engine.get_global_grad_norm(), signal and engine.was_step_applied()
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
        applied = signal and math.isfinite(norm)
        if applied:
            engine.step()
        else:
            engine.optimizer.zero_grad()
            engine.zero_grad()
        return norm, applied

    @contextlib.contextmanager
    def gathered(self, params: list[torch.nn.Parameter]) -> Iterator[None]:
        """Inside, these parameters are whole on every rank. A collective under ZeRO-3."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(params, enabled=self.stage == 3):
            yield

    def save(self, folder: Path, waits: bool) -> None:
        """Save the sharded parameters (with LoRA those of the adapters), optimizer and schedule into a new folder. A
        collective, after which training can go on: `wait_saved` says how it ended. `waits`: it does not go on, so that nothing
        needs to be copied."""
        self._writer.at_once = waits
        frozen = {"exclude_frozen_parameters": self._saves_trained_only}
        quietly(self._engine.save_checkpoint, str(folder.parent), tag=folder.name, save_latest=False, **frozen)
        self._writer.start()

    def wait_saved(self) -> tuple[int, Exception | None]:
        """Wait until this rank has written what `save` began; the bytes that it wrote, and its error, if any."""
        return self._writer.wait()

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, or `convert` made of it. A collective, called before the first step.

        Raises:
            UserError: it holds other trained parameters than the model.
        """
        strict = not self._saves_trained_only
        if not strict:  # DeepSpeed would pass over a parameter that is missing, too
            trained = {name for name, param in self._engine.module.named_parameters() if param.requires_grad}
            different = sorted(trained ^ saved_names(folder))
            if different:
                raise UserError(
                    f"{folder} holds other parameters than those that are trained ({len(different)} differ, such as "
                    f"{different[0]}): resume with the lora_target of the run"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path, _ = quietly(self._engine.load_checkpoint, str(folder.parent), tag=folder.name, load_module_strict=strict)
        assert path is not None, folder
        optimizer = self._engine.basic_optimizer
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for param, state in optimizer.state.items():
            # from a converted checkpoint, DeepSpeed gives all parameters the same step tensor, which each would increment
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].to(param.device if on_device else "cpu", copy=True)


class BaseReference:
    """The base of a model with adapters, which are switched off while it scores tokens."""

    def __init__(self, engine: Engine):
        self._engine = engine

    @torch.no_grad()
    def logp(
        self, tokens_BT: torch.Tensor, trained_N: torch.Tensor, temperature_N: torch.Tensor, packing: VarlenMetadata | None
    ) -> torch.Tensor:
        """As that of `Reference`."""
        with switched_off(self._engine.model):
            return self._engine.model.run(
                tokens_BT, trained_N, torch.zeros_like(temperature_N), packing, temperature=temperature_N
            ).logp_N


class Reference:
    """A frozen model that scores tokens, sharded like the trained one."""

    def __init__(self, ds: dict[str, Any], model: WeightedSFTModel, world: World):
        import deepspeed

        self.model = model
        if ds["zero_optimization"]["stage"] == 3:
            _set_leaf_modules(model)
            self._model, *_ = deepspeed.initialize(model=model, config=ds, dist_init_required=False)
            model.run = self._model.__call__
        else:
            self._model = model.to(world.device)
        model.check_head(world.device)

    @torch.no_grad()
    def logp(
        self, tokens_BT: torch.Tensor, trained_N: torch.Tensor, temperature_N: torch.Tensor, packing: VarlenMetadata | None
    ) -> torch.Tensor:
        """Logprobs [N] of the trained tokens; see `WeightedSFTModel.forward`. A collective under ZeRO-3."""
        silence_N = torch.zeros_like(temperature_N)
        return self._model(tokens_BT, trained_N, silence_N, packing, temperature=temperature_N).logp_N


def _undo_warm_up(optimizer: Any) -> None:
    """At stage 0 in bf16, DeepSpeed takes an optimizer step on zero gradients to allocate the state. Adam would count it, and
    weight decay would be applied once more than it should."""
    optimizer.optimizer.state.clear()
    for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            master.data.copy_(param.data)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[Any]:
    """Parameter groups: weight decay for matrices and embeddings, none for norms and biases, as in transformers' Trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not weight_decay:
        return trained
    kept = {
        id(param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if "norm" in type(module).__name__.lower()
        or name.endswith("bias")
        or len(getattr(param, "ds_shape", param.shape)) < 2  # under ZeRO-3 the parameter itself is a flat partition
    }
    decayed, others = ([p for p in trained if (id(p) in kept) == keep] for keep in (False, True))
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def _set_leaf_modules(model: WeightedSFTModel) -> None:
    """Choose the leaf modules of ZeRO-3, whose parameters are gathered together.

    Modules that route by data, such as mixtures of experts: else an expert is gathered on the ranks with tokens for it only,
    and the others do not enter that collective. And layers: else each matrix is gathered by itself, twice in a backward pass
    that recomputes activations. Not those that run several times in a pass, with which DeepSpeed 0.19.8 fails.
    """
    from deepspeed.utils import set_z3_leaf_module

    routed = [module for module in model.modules() if type(module) in model.routed]
    for module in [*routed, *map(model.model.get_submodule, model.layers)]:
        set_z3_leaf_module(module, True)
    # DeepSpeed reduces a leaf's gradients once that of its input is there: with a frozen embedding, too, it must have one
    model.model.get_input_embeddings().register_forward_hook(
        lambda _, __, states: states.requires_grad_() if torch.is_grad_enabled() and states.is_leaf else states
    )


def _require_rates(engine: Any, ds: dict[str, Any]) -> None:
    """UserError if the created optimizer or scheduler has other values than the resolved JSON."""
    wanted, schedule = ds["optimizer"].get("params", {}), engine.lr_scheduler
    peaks = getattr(schedule, "max_lrs", None) or getattr(schedule, "org_lrs", None)
    for i, group in enumerate(engine.basic_optimizer.param_groups):
        found = group | {"lr": peaks[i] if peaks else group.get("initial_lr", group["lr"])}
        for name in wanted.keys() & found.keys() - ({"weight_decay"} if i else set()):  # it is 0 for norms and biases
            if _plain(found[name]) != _plain(wanted[name]):
                raise UserError(
                    f"optimizer.params.{name} in the DeepSpeed JSON, or the run's setting of it, is {wanted[name]}, but the "
                    f"optimizer has {found[name]}: something else in the JSON sets it, as a scheduler may"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else float(value) if isinstance(value, torch.Tensor) else value


def _note_gradients(model: WeightedSFTModel) -> dict[str, bool]:
    """For each trained parameter, whether it has not had a gradient yet; updated by hooks."""
    missing = {}

    def note(name: str, param: torch.nn.Parameter) -> None:
        def noted(_: torch.Tensor) -> None:
            missing[name] = False
            hook.remove()

        hook = param.register_post_accumulate_grad_hook(noted)

    for name, param in model.model.named_parameters():
        if param.requires_grad:
            missing[name] = True
            note(name, param)
    return missing


@contextlib.contextmanager
def _without_update(engine: Any) -> Iterator[None]:
    """Inside, a step clears the accumulated gradients and leaves parameters, optimizer and schedule unchanged."""
    optimizer, schedule, sharded = engine.basic_optimizer, engine.lr_scheduler, engine.optimizer
    step, linked = optimizer.step, getattr(sharded, "_hp_optimizer_states_linked", None)
    optimizer.step, engine.lr_scheduler = lambda *_, **__: None, None
    try:
        yield
    finally:
        optimizer.step, engine.lr_scheduler = step, schedule
        if linked is False:  # private: links to optimizer states, which only a real step creates
            sharded._hp_optimizer_states_linked = False


def _schedule(config: WeightedSFTConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate schedule. No step has rate 0, unlike the first of the usual schedules: batches are expensive."""
    warmup, total = config.warmup_steps, config.training_steps

    def factor(step: int) -> float:  # for the update number `step`, from 0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(0, total - step) / (total - warmup)
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.lr_scheduler]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
