"""`train.py --dry_run`: checks the settings and estimates memory and disk. It loads no weights, fetches no rollouts and writes
nothing.

Knows nothing of process groups: one process estimates for any number of ranks, with or without a GPU.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wsft.config import WeightedSFTConfig
from wsft.device import device_type, free_host_memory, has_native_matmul, memory_bytes
from wsft.distributed import deepspeed_config
from wsft.distributed.engine import check_json
from wsft.errors import UserError
from wsft.inspect.checks import run_checks
from wsft.inspect.view import batch_view, take
from wsft.logs import configure_logging
from wsft.loss.head import tokens_of_chunk
from wsft.model.attention import register
from wsft.model.causal_lm import WeightedSFTModel, largest_layer, vocab_size_of
from wsft.model.kernels import find_kernels
from wsft.model.loading import (
    empty_model,
    freeze_unreached,
    load_model_config,
    load_tokenizer,
    passes_of,
    require_complete,
    require_trainable,
)
from wsft.model.lora import Adapters
from wsft.model.memory import Needs, Work, needs, with_publishing, with_reference, work_of
from wsft.model.meta_passes import STOPS
from wsft.rollouts.sources import client_of, fetching_ranks, processor_of
from wsft.run.metrics import require_wandb

GPUS_A_HOST = 8  # where the run is planned for another machine
# GPU memory that is not available to tensors: CUDA context, libraries, NCCL, fragmentation
RESERVED_BYTES, RESERVED_SHARE = 1.5 * 2**30, 0.05
MOST_RANKS = 1024


@dataclass(frozen=True)
class Machine:
    num_ranks: int
    ranks_here: int  # on one host
    gpu_bytes: float | None  # None: there is no GPU, and everything is in host memory
    host_bytes: float | None  # None: another host, whose memory is not known
    libraries: int  # host memory of one rank: Python, torch and their libraries

    @classmethod
    def of(cls, config: WeightedSFTConfig) -> Machine:
        if not config.gpu_memory_gib:
            device_type(config.device)  # raises if there is a GPU that torch cannot use
        gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
        ranks = config.ranks or int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", gpus or 1)))
        libraries = _memory_of_this_process()
        if config.gpu_memory_gib:
            return cls(ranks, min(ranks, GPUS_A_HOST), config.gpu_memory_gib * 2**30, None, libraries)
        here = min(ranks, gpus) if gpus else ranks
        return cls(ranks, here, memory_bytes(torch.device("cuda", 0)) if gpus else None, free_host_memory(), libraries)

    def shortage(self, need: Needs) -> str:
        """What there is not enough of, as a sentence; empty if it fits."""
        host, gib = self.on_host(need), 2**30
        if self.gpu_bytes is not None and need.peak > self.usable:
            return f"a GPU has {self.usable / gib:.1f} GiB for tensors, {need.peak / gib:.1f} are needed"
        if self.host_bytes is not None and host > self.host_bytes:
            free, ranks = self.host_bytes / gib, self.ranks_here
            return f"this machine has {free:.1f} GiB of memory free, its {ranks} rank(s) need {host / gib:.1f}"
        return ""

    @property
    def usable(self) -> float:
        return self.gpu_bytes * (1 - RESERVED_SHARE) - RESERVED_BYTES

    def on_host(self, need: Needs) -> int:
        """Memory that all ranks of a host take of it."""
        return self.ranks_here * (self.libraries + sum(need.host.values()) + (need.peak if self.gpu_bytes is None else 0))


class _Run:
    """The run that the settings describe, and its memory. Estimates are cached, since variations share most of them."""

    def __init__(self, config: WeightedSFTConfig, machine: Machine):
        self.config, self.machine = config, machine
        require_wandb(config)
        self.shape = load_model_config(config.model_name, config)
        native = config.device != "cpu" if machine.gpu_bytes else has_native_matmul(torch.device("cpu"), torch.bfloat16)
        layer = largest_layer(empty_model(self.shape, config.trust_remote_code))
        sizes = deepspeed_config.ModelSizes(self.shape.get_text_config().hidden_size, layer)
        self.config, self.ds = deepspeed_config.resolve(config, machine.num_ranks, machine.ranks_here, sizes, native)
        check_json(self.ds)
        self.dtype = torch.bfloat16 if self.ds["bf16"]["enabled"] else torch.float32
        self.model = empty_model(self.shape, config.trust_remote_code, self.dtype)
        require_trainable(self.model, config)
        if not config.gpu_memory_gib:  # else that is another machine
            find_kernels(self.model, config, machine.gpu_bytes is not None)
        if any(Path(config.model_name).glob("*.safetensors*")):  # weights are not needed for the estimate
            require_complete(config.model_name, config, self.dtype)
        self.passes = passes_of(self.shape, config.trust_remote_code, config.max_token_len, self.dtype)
        unreached, self.adapters = freeze_unreached(self.model, self.passes), None
        if config.lora_rank:
            self.adapters = Adapters.for_model(self.model, unreached, config)
            self.adapters.put_into(self.model, config.seed)
        self.reference = None
        if config.ref_model_name:
            reference = load_model_config(config.ref_model_name, config)
            self.reference = empty_model(reference, config.trust_remote_code, self.dtype)

    @functools.cache  # noqa: B019 (there is one object, for the life of the process)
    def work(self, tokens: int, checkpointing: bool) -> Work:
        try:
            return self._work_in(self.dtype, tokens, checkpointing)
        except (RuntimeError, NotImplementedError):
            if self.dtype == torch.bfloat16:
                raise
            # on the meta device, grouped matrix products (experts) exist in bf16 only
            return self._work_in(torch.bfloat16, tokens, checkpointing).times(2)

    def _work_in(self, dtype: torch.dtype, tokens: int, checkpointing: bool) -> Work:
        model = WeightedSFTModel(empty_model(self.shape, self.config.trust_remote_code, dtype)).train()
        if self.adapters:
            self.adapters.put_into(model.model, self.config.seed)
        if checkpointing:
            model.recompute_activations()
        model.attend_by("eager" if self.config.attn_implementation == "eager" else self.passes.attention)
        vocab_size = self.shape.get_text_config().vocab_size
        with self.passes.standing_for_routed():
            return work_of(model, tokens, tokens_of_chunk(vocab_size, self.machine.gpu_bytes))

    def needs(self, config: WeightedSFTConfig, ds: dict[str, Any], machine: Machine) -> Needs:
        # a sequence longer than micro_batch_tokens is a micro-batch of its own
        work = self.work(max(config.micro_batch_tokens, config.max_token_len), config.gradient_checkpointing)
        need = needs(self.model, ds, machine.num_ranks, work, machine.gpu_bytes is not None, self.adapters is not None)
        if config.publish_folder or config.publish_to:
            # with auto the servers, which are not asked here, may have it
            over_nccl = config.publish_transport == "nccl" or (config.publish_transport == "auto" and not config.publish_folder)
            bucket_bytes = config.publish_bucket_mib * 2**20
            with_publishing(need, self.model, ds, machine.num_ranks, bucket_bytes, over_nccl and machine.gpu_bytes is not None)
        if self.reference is not None:
            with_reference(need, self.reference, ds, machine.num_ranks)
        return need

    def remedies(self) -> Iterator[str]:
        """Single changes that make it fit, the smallest first."""
        config, ds, machine = self.config, self.ds, self.machine

        def fits(ds: dict = ds, machine: Machine = machine, **changes: Any) -> bool:
            return not machine.shortage(self.needs(config.model_copy(update=changes), ds, machine))

        tokens = config.micro_batch_tokens
        while (tokens := tokens // 2) >= config.max_token_len:
            if fits(micro_batch_tokens=tokens):
                yield f"--micro_batch_tokens {tokens}"
                break
        if not config.gradient_checkpointing and fits(gradient_checkpointing=True):
            yield "--gradient_checkpointing true"
        tokens = config.max_token_len
        while (tokens := tokens // 2) >= 512:
            if fits(micro_batch_tokens=tokens, max_token_len=tokens):
                yield f"--max_token_len {tokens} --micro_batch_tokens {tokens}"
                break
        if machine.gpu_bytes is None:
            return  # more ranks on this host share its memory
        for change, zero in _offloads(ds["zero_optimization"]):
            if fits(ds=ds | {"zero_optimization": zero}):
                yield change
                break
        ranks = machine.num_ranks
        while (ranks := 2 * ranks) <= MOST_RANKS:
            if fits(machine=replace(machine, num_ranks=ranks, ranks_here=min(ranks, GPUS_A_HOST))):
                yield f"{ranks} ranks"
                break


def _offloads(zero: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sections zero_optimization that need less memory, each with its description."""
    cpu = {"device": "cpu", "pin_memory": True}
    if zero["stage"] < 3:
        yield "zero_optimization.stage 3 in the DeepSpeed JSON", zero | {"stage": 3}
    if "offload_optimizer" not in zero:
        zero = zero | {"stage": 3, "offload_optimizer": cpu}
        yield "offload_optimizer to the CPU, in the DeepSpeed JSON", zero
    if "offload_param" not in zero:
        yield "offload_optimizer and offload_param to the CPU (ds_configs/zero3_offload.json)", zero | {"offload_param": cpu}


def dry_run(config: WeightedSFTConfig) -> bool:
    """Print what the run will need. Returns whether the settings are valid and the run fits; raises UserError where nothing
    can be estimated."""
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))):
        return True  # rank 0 prints it
    configure_logging(0)
    register()
    run = _Run(config, Machine.of(config))
    found, wrong = _look_at_source(run)
    print(f"data        {found}\n")
    try:
        need = run.needs(run.config, run.ds, run.machine)
        print(_table(run, need))
    except STOPS as error:
        what = str(error).strip() or type(error).__name__
        print(
            f"memory      the activations of {type(run.model).__name__} cannot be estimated: it does not run "
            f"without values ({what.splitlines()[0]}); train 2 steps, and read memory/peak_gib in metrics.jsonl"
        )
        for sentence in wrong:
            print(f"wrong: {sentence}")
        return not wrong
    wrong += _look_at_disk(run, need)
    shortage = run.machine.shortage(need)
    for sentence in wrong:
        print(f"wrong: {sentence}")
    if shortage:
        print(f"It does not fit: {shortage}.\n{_advice(list(run.remedies()))}")
    elif not wrong and run.machine.host_bytes is None:
        print(f"It fits, on hosts with {run.machine.on_host(need) / 2**30:.1f} GiB of memory to give.")
    elif not wrong:
        print("It fits.")
    return not (wrong or shortage)


def _advice(remedies: list[str]) -> str:
    if not remedies:
        return (
            "No single change makes it fit: take a smaller model, or several of micro_batch_tokens, offload and ranks at once."
        )
    first, *others = remedies
    return f"The smallest change with which it does: {first}." + (f" Or: {'; '.join(others)}." if others else "")


def _look_at_source(run: _Run) -> tuple[str, list[str]]:
    """What the data source is, and what is wrong with it. Reads the first batch of a file; takes nothing from a server."""
    config, tokenizer = run.config, load_tokenizer(run.config)
    try:
        fetching = fetching_ranks(config, run.machine.num_ranks)
        if config.data is None:
            message, good = client_of(config, fetching, registers=False).look()
            return message, [] if good else [message]
        processor = processor_of(config, vocab_size_of(run.model, run.passes.logit_options), tokenizer)
        view = batch_view(take(config.data, 0, config, processor), config, processor, tokenizer)
    except UserError as error:
        return str(config.data or config.atropos_url), [str(error)]
    if not view.rollouts:
        return config.data, [f"data {config.data} holds no usable sequence: expected JSONL, one Atropos group a line"]
    lengths = view.batch.lengths
    lines = [f"{config.data}: {len(lengths)} sequences in the first batch, the longest of {lengths.max()} tokens"]
    return "\n".join(lines + [f"looks wrong: {finding.describe(view.names)}" for finding in run_checks(view)]), []


def _look_at_disk(run: _Run, need: Needs) -> list[str]:
    """Too little disk for keep_checkpoints and the one being written, and for the model, which exporting holds twice."""
    wanted = (run.config.keep_checkpoints + 1) * need.checkpoint + 2 * need.model
    place = Path(run.config.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if run.machine.host_bytes is None or free >= wanted:
        return []
    return [
        f"{place} has {free / 2**30:.1f} GiB free; {run.config.keep_checkpoints} checkpoints, the next one and the exported "
        f"model take {wanted / 2**30:.1f}: set keep_checkpoints lower, or output_dir to another disk"
    ]


def _table(run: _Run, need: Needs) -> str:
    config, machine, zero = run.config, run.machine, run.ds["zero_optimization"]
    tokens = max(config.micro_batch_tokens, config.max_token_len)
    place = f"GPU of {machine.gpu_bytes / 2**30:.1f} GiB" if machine.gpu_bytes else "CPU"
    recomputed = "checkpointed" if config.gradient_checkpointing else "kept"
    billions = sum(p.numel() for p in run.model.parameters()) / 1e9
    lines = [
        f"model       {config.model_name}: {billions:.2f} B parameters in {str(run.dtype).removeprefix('torch.')}"
        + (f"; {run.adapters.describe(run.model)}" if run.adapters else ""),
        f"ranks       {machine.num_ranks}, {machine.ranks_here} a host, each on a {place}; ZeRO stage {zero['stage']}",
        f"batch       micro-batches of {tokens} tokens, activations {recomputed}", "",
        f"{'GiB of a rank':<44}{'GPU' if machine.gpu_bytes else 'memory':>10}",
    ]  # fmt: skip
    sections = {
        "": need.states,
        f"while {tokens} tokens run": need.passes,
        "in the optimizer's step": need.update,
        "while weights are published": need.publishing,
    }
    for title, rows in sections.items():
        lines += [f"{title}:"] if title and rows else []
        lines += [_row(name, size) for name, size in rows.items()]
    lines += [_row("the most at a time", need.peak)]
    lines += ["", f"{'GiB of a host':<44}{'memory':>10}", _row("Python and libraries", machine.ranks_here * machine.libraries)]
    lines += [_row(name, machine.ranks_here * size) for name, size in need.host.items()]
    lines += [_row("of all its ranks", machine.on_host(need))]
    if config.background_save:
        share = machine.ranks_here / machine.num_ranks if zero["stage"] else 1
        lines += [_row("copy of a checkpoint, if there is room", need.checkpoint * share)]
    lines += ["", f"{'GiB on disk':<44}", _row("a checkpoint", need.checkpoint), _row("the exported model", need.model), ""]
    return "\n".join(lines)


def _row(name: str, size: float) -> str:
    return f"  {name:<42}{size / 2**30:>10.2f}"


def _memory_of_this_process() -> int:
    status = Path("/proc/self/status")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0
