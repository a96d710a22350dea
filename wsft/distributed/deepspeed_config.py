"""Resolves the user's DeepSpeed JSON: "auto" is filled in from the run's settings, contradictions are errors.

Pure: no torch, no DeepSpeed; of the ranks only their number.
"""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from wsft.config import WeightedSFTConfig
from wsft.errors import UserError
from wsft.settings_files import parse_json

log = logging.getLogger(__name__)

DEFAULT = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "fused": True}},
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3},
}

_SECTIONS = (
    *("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "data_types", "gradient_clipping", "train_batch_size"),
    *("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "communication_data_type", "activation_checkpointing"),
    *("zero_allow_untested_optimizer", "prescale_gradients", "gradient_predivide_factor", "steps_per_print"),
)

_IMPLEMENTATION = ("torch_adam", "fused", "foreach")  # parameters of an optimizer
_WITHOUT_WEIGHT_DECAY = ("rprop", "lbfgs", "sparseadam")  # optimizers without this parameter

# scheduler -> those of its parameters that are settings of the run, too; torch's schedulers scale the optimizer's rate
_SCHEDULERS = {
    "WarmupLR": {"warmup_max_lr": "learning_rate", "warmup_num_steps": "warmup_steps"},
    "WarmupDecayLR": {
        "warmup_max_lr": "learning_rate",
        "warmup_num_steps": "warmup_steps",
        "total_num_steps": "training_steps",
    },
    "WarmupCosineLR": {"warmup_num_steps": "warmup_steps", "total_num_steps": "training_steps"},
    "OneCycle": {"cycle_max_lr": "learning_rate"},
}
_OF_OTHER_RATES = ("LRRangeTest", "CyclicLR", "OneCycleLR", "ReduceLROnPlateau")

LARGEST_BUCKET = 250_000_000  # parameters: 0.5 GB in bf16; a guess, until it is measured with GPUs


class ModelSizes(NamedTuple):
    """Of the model, for what is "auto" in the JSON: its hidden size, and the parameters of its largest layer."""

    hidden: int
    layer: int


def resolve(
    config: WeightedSFTConfig, num_ranks: int, ranks_a_host: int, sizes: ModelSizes, native_bf16: bool
) -> tuple[WeightedSFTConfig, dict[str, Any]]:
    """The run's config and the resolved DeepSpeed JSON.

    A value in the JSON is adopted where the run has the default (also in the returned config). Two values that were both set
    and differ are a UserError naming both. bf16 "auto" becomes bf16 if the device supports it (`native_bf16`), else fp32. Any
    other "auto" that is left is an error.
    """
    ds = _load(config.deepspeed)
    agree = _Agreement(config)
    params = _section(_section(ds, "optimizer", DEFAULT["optimizer"]), "params", {})
    agree.on(params, "lr", "optimizer.params.lr", "learning_rate", fill=True)
    decays = ds["optimizer"].get("type", "").lower() not in _WITHOUT_WEIGHT_DECAY
    # filled in where the JSON lacks it, since the default of torch's AdamW is 0.01
    agree.on(params, "weight_decay", "optimizer.params.weight_decay", "weight_decay", fill=decays or config.weight_decay > 0)
    agree.on(ds, "gradient_clipping", "gradient_clipping", "max_grad_norm", fill=True)
    agree.on(ds, "train_batch_size", "train_batch_size", "batch_size")
    for name, auto in {"betas": [0.9, 0.999], "eps": 1e-8}.items():
        if params.get(name) == "auto":
            params[name] = auto
    _precision(ds, native_bf16)
    _micro_batches(ds, num_ranks)
    _scheduler(ds, agree)
    zero = _section(ds, "zero_optimization", {"stage": 0})
    if zero.setdefault("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage is {zero['stage']!r}, expected 0, 1, 2 or 3")
    if ds["bf16"]["enabled"]:
        _accumulate_in_float32(ds, zero)
    for name, size in _automatic(sizes, config.lora_rank is not None).items():
        if zero.get(name) == "auto":
            zero[name] = size
    _hierarchy(zero, num_ranks, ranks_a_host)
    if zero.get("stage3_gather_16bit_weights_on_model_save") == "auto":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    ds.setdefault("steps_per_print", 2**31 - 1)  # wsft logs its own progress
    ds.setdefault("zero_allow_untested_optimizer", True)  # allows any optimizer of torch
    _refuse_auto(ds)
    return agree.config(), ds


def _automatic(sizes: ModelSizes, adapters: bool) -> dict[str, int]:
    """A layer is gathered and reduced as a whole (engine.py), so buckets hold one. Gradients of adapters are smaller: for their
    bucket, and for the parameters that stay on every rank, the formulas of the DeepSpeed guide of transformers are used."""
    layer = min(LARGEST_BUCKET, max(sizes.layer, sizes.hidden**2))
    return {
        "reduce_bucket_size": sizes.hidden**2 if adapters else layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": 10 * sizes.hidden,
    }


def what_learns(ds: dict[str, Any]) -> dict[str, Any]:
    """The part of the resolved JSON that a checkpoint restores: parameters of the optimizer, whichever implementation runs it,
    and of the scheduler."""
    params = {name: value for name, value in ds["optimizer"].get("params", {}).items() if name not in _IMPLEMENTATION}
    return {"optimizer": {"params": params}, "scheduler": ds.get("scheduler", {})}


def for_reference(ds: dict[str, Any]) -> dict[str, Any]:
    """The resolved JSON for a frozen model: sharded and offloaded as the trained one, without an optimizer, and without hpZ's
    secondary partition, which is for backward passes."""
    idle = ("offload_optimizer", "zero_hpz_partition_size")
    zero = {k: v for k, v in ds["zero_optimization"].items() if k not in idle}
    idle = ("optimizer", "scheduler", "gradient_clipping", "zero_optimization", "checkpoint")
    return {k: v for k, v in ds.items() if k not in idle} | {"zero_optimization": zero}


def _load(source: str | dict | None) -> dict[str, Any]:
    try:
        text = json.dumps(DEFAULT if source is None else source) if not isinstance(source, str) else Path(source).read_text()
        ds = parse_json(text)
    except OSError as error:
        raise UserError(f"the DeepSpeed JSON {source} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"the DeepSpeed JSON {source} is not JSON: {error}") from error
    except ValueError as error:
        raise UserError(f"the DeepSpeed JSON {source}: {error}") from error
    if not isinstance(ds, dict):
        raise UserError(f"the DeepSpeed JSON {source} holds a {type(ds).__name__}, expected an object")
    for key in ds:  # DeepSpeed silently ignores unknown sections
        near = difflib.get_close_matches(key, _SECTIONS, n=1, cutoff=0.85)
        if near and key not in _SECTIONS:
            raise UserError(f"the DeepSpeed JSON has {key!r}: did you mean {near[0]!r}?")
    return ds


def _section(parent: dict, name: str, default: dict) -> dict:
    section = parent.setdefault(name, json.loads(json.dumps(default)))
    if not isinstance(section, dict):
        raise UserError(f"{name} in the DeepSpeed JSON is {section!r}, expected an object")
    return section


class _Agreement:
    """Settings that both the run's config and the DeepSpeed JSON name."""

    def __init__(self, config: WeightedSFTConfig):
        self.run, self.adopted = config, {}

    def on(self, section: dict, key: str, path: str, setting: str, *, fill: bool = False) -> None:
        """Reconcile section[key] with the run's setting; with `fill`, add the key where the JSON lacks it."""
        mine, theirs = getattr(self.run, setting), section.get(key)
        if theirs == "auto" or (theirs is None and fill):
            section[key] = mine
        elif theirs is None:
            return
        elif isinstance(theirs, bool) or not isinstance(theirs, int | float):
            raise UserError(f'{path} in the DeepSpeed JSON is {theirs!r}, expected a number or "auto"')
        elif theirs != mine and setting in self.run.model_fields_set:
            raise UserError(
                f"{path} in the DeepSpeed JSON is {theirs!r}, but {setting} of the run is {mine!r}: "
                f'make them equal, or write "auto" in the JSON'
            )
        elif theirs != mine:
            self.adopted[setting] = theirs

    def config(self) -> WeightedSFTConfig:
        if not self.adopted:
            return self.run
        return WeightedSFTConfig(**{**self.run.model_dump(include=self.run.model_fields_set), **self.adopted})


def _precision(ds: dict, native_bf16: bool) -> None:
    if _section(ds, "fp16", {"enabled": False}).get("enabled"):
        raise UserError(
            "fp16.enabled is set in the DeepSpeed JSON: wsft trains in bf16 or fp32, whose gradients need no loss scaling; "
            'write "bf16": {"enabled": true}, or leave both out for fp32'
        )
    del ds["fp16"]
    if "bfloat16" in ds:  # DeepSpeed's old name, which it reads only if there is no "bf16"
        ds.setdefault("bf16", ds.pop("bfloat16"))
    bf16 = _section(ds, "bf16", {"enabled": False})
    if bf16.setdefault("enabled", False) == "auto":
        bf16["enabled"] = native_bf16


def _accumulate_in_float32(ds: dict, zero: dict) -> None:
    """Sum gradients over micro-batches and over ranks in float32, unless the JSON sets another type.

    DeepSpeed's default is the model's type. In bf16, with a mantissa of 8 bits, a sum stops growing once the addend is below
    1/256 of it: 512 equal micro-batches gave 0.73 of their gradient.
    """
    types = _section(ds, "data_types", {})
    if types.get("grad_accum_dtype") in (None, "auto"):
        types["grad_accum_dtype"] = "fp32"
    if ds.get("communication_data_type") in (None, "auto"):
        ds["communication_data_type"] = "fp32" if types["grad_accum_dtype"] == "fp32" else "bf16"
    if types["grad_accum_dtype"] != "fp32":
        log.info(
            "data_types.grad_accum_dtype in the DeepSpeed JSON is %s: sums of many micro-batches lose digits (of 512 equal "
            "ones 0.73 is left); fp32 takes 2 bytes a parameter more, of a rank's share",
            types["grad_accum_dtype"],
        )
    elif zero["stage"] == 0:
        zero["stage"] = 1
        log.info("ZeRO stage 0 sums gradients in bf16 only: stage 1, which sums them in float32, is used instead")


def _micro_batches(ds: dict, num_ranks: int) -> None:
    """Micro-batches are assigned by micro_batch_tokens, and their number varies: DeepSpeed must not count them."""
    for key, allowed in {"gradient_accumulation_steps": (1,), "train_micro_batch_size_per_gpu": ()}.items():
        if ds.get(key, "auto") not in ("auto", *allowed):
            raise UserError(
                f"{key} in the DeepSpeed JSON is {ds[key]!r}, but micro_batch_tokens and batch_size of the run decide the "
                f'micro-batches: write "auto", or leave it out'
            )
    ds |= {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1, "train_batch_size": num_ranks}


def _hierarchy(zero: dict, num_ranks: int, ranks_a_host: int) -> None:
    """hpZ (Wang et al. 2023, "ZeRO++"): the backward pass gathers from a secondary partition within a host. Of no use on one
    host, where the primary partition is local, too."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size == "auto":
        size = zero["zero_hpz_partition_size"] = ranks_a_host if ranks_a_host < num_ranks else 1
    if size and num_ranks % size:
        raise UserError(
            f"zero_hpz_partition_size is {size}, but {num_ranks} rank(s) cannot be split into groups of {size}: start as many "
            f"ranks on every host, or take it out of the DeepSpeed JSON"
        )


def _scheduler(ds: dict, agree: _Agreement) -> None:
    """A scheduler in the JSON takes precedence; without one, the run's lr_scheduler is used (engine.py)."""
    if "scheduler" not in ds:
        return
    if "lr_scheduler" in agree.run.model_fields_set:
        raise UserError(
            f"the DeepSpeed JSON has a scheduler ({ds['scheduler'].get('type')}) and the run sets lr_scheduler "
            f"{agree.run.lr_scheduler}: keep one of the two"
        )
    scheduler = _section(ds, "scheduler", {})
    kind, params = scheduler.get("type"), _section(scheduler, "params", {})
    if kind in _OF_OTHER_RATES:
        raise UserError(
            f"scheduler.type in the DeepSpeed JSON is {kind!r}, whose rates are not those of the run: write one of "
            f"{', '.join(_SCHEDULERS)} or leave the scheduler out, and set lr_scheduler and learning_rate"
        )
    for name, setting in _SCHEDULERS.get(kind, {}).items():  # filled in where absent, since DeepSpeed has its own defaults
        agree.on(params, name, f"scheduler.params.{name}", setting, fill=True)
    if params.get("warmup_num_steps") == 0:  # 0 is an error in DeepSpeed
        params["warmup_num_steps"] = 1
    if params.get("warmup_min_lr") == "auto":
        params["warmup_min_lr"] = 0


def _refuse_auto(node: Any, path: str = "") -> None:
    if node == "auto":
        raise UserError(f'{path} in the DeepSpeed JSON is "auto", which the run has no value for: write the value')
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        _refuse_auto(child, f"{path}.{key}".lstrip("."))
