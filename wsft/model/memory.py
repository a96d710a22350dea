"""Estimates the memory and disk that a run needs, from a model on the meta device, without weights or ranks.

What DeepSpeed keeps follows from its config. Activations are not estimated by a formula: the forward and backward pass run on
the meta device, where tensors have sizes but no contents, and the live bytes are counted.

DeepSpeed's own `estimate_zero3_model_states_mem_needs` is right for bf16 with fp32 gradients, AdamW and no offload (18 bytes
per parameter over the ranks, plus the largest layer; a test compares the two). It is not used, since it ignores fp32, other
optimizers, buckets, the optimizer step and activations, takes the largest module for all that is gathered at once, and its
`_live` form identifies parameters by address, which is 0 for all of them on the meta device. Knows nothing of batches or of
the machine.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wsft.model.causal_lm import layers_of
from wsft.model.meta_passes import OneSequence

# bytes of optimizer state per parameter, in float32
STATE_BYTES = {"adam": 8, "adamw": 8, "lamb": 8, "onebitadam": 8, "sgd": 0, "adagrad": 4, "lion": 4, "muon": 4}


@dataclass(frozen=True)
class Work:
    """Bytes of activations in the passes over one micro-batch."""

    held: int  # when the forward pass reaches the head: with checkpointing a hidden state per layer, else all activations
    layer: int  # in addition, the most in any layer's forward or backward pass
    head: int  # in addition, in the head: a chunk of logits, the gradients of lm_head and of the hidden states

    @property
    def peak(self) -> int:
        return self.held + max(self.layer, self.head)

    def times(self, factor: int) -> Work:
        return Work(factor * self.held, factor * self.layer, factor * self.head)


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages created inside. (torch's MemTracker is in a private module,
    torch.distributed._tools.)"""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def exclude(self, tensor: torch.Tensor) -> None:
        """Do not count its storage, which existed before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def work_of(model: torch.nn.Module, tokens: int, chunk_tokens: int) -> Work:
    """Run a `WeightedSFTModel` on the meta device over a row of tokens, all trained, forward and backward.

    Raises NotImplementedError or RuntimeError if its forward pass needs values, as some mixtures of experts do.
    """
    row = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    trained = torch.zeros(tokens - 1, dtype=torch.int64, device="meta")
    live, marks = _Live(), []
    for tensor in [*model.parameters(), *model.buffers()]:
        live.exclude(tensor)

    def at_head(*_: object) -> None:
        marks.append((live.now, live.peak))
        live.peak = live.now

    def release(param: torch.Tensor) -> None:
        param.grad = None  # it is copied to DeepSpeed's bucket, which is counted there

    hooks = [model.model.get_output_embeddings().register_forward_pre_hook(at_head)]
    hooks += [p.register_post_accumulate_grad_hook(release) for p in model.parameters() if p.requires_grad]
    with OneSequence(), live:
        loss = model(row, trained, torch.zeros(tokens - 1, device="meta"), chunk_tokens=chunk_tokens).loss
        (held, forward), head = marks[0], live.peak
        live.peak = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Work(held, max(forward, live.peak) - held, head - held)


@dataclass
class Needs:
    """Bytes per rank, by purpose."""

    states: dict[str, int] = field(default_factory=dict)  # always
    passes: dict[str, int] = field(default_factory=dict)  # in addition, while a micro-batch runs
    update: dict[str, int] = field(default_factory=dict)  # in addition, in the optimizer step
    publishing: dict[str, int] = field(default_factory=dict)  # in addition, while weights are published
    host: dict[str, int] = field(default_factory=dict)  # offloaded to host memory
    checkpoint: int = 0  # on disk, of all ranks
    model: int = 0  # on disk, the exported model

    @property
    def peak(self) -> int:
        """Peak on the training device: GPU memory, or without a GPU host memory in addition to `host`."""
        return sum(self.states.values()) + max(sum(x.values()) for x in (self.passes, self.update, self.publishing))


def needs(
    model: torch.nn.Module, ds: dict[str, Any], num_ranks: int, work: Work, on_gpu: bool, only_trained: bool = False
) -> Needs:
    """For DeepSpeed's resolved JSON and a model on the meta device, in the type in which it is trained. `only_trained`: whether
    checkpoints and the export hold trained parameters alone (LoRA)."""
    zero, sizes = ds["zero_optimization"], [p.numel() for p in model.parameters()]
    stage, width = zero["stage"], next(model.parameters()).element_size()
    whole, share = sum(sizes), sum(-(-n // num_ranks) for n in sizes)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    of_rank = sum(-(-n // num_ranks) for n in trained)
    updated, summed = of_rank if stage else sum(trained), of_rank if stage >= 2 else sum(trained)
    kind, options = ds["optimizer"]["type"].lower(), ds["optimizer"].get("params", {})
    state = STATE_BYTES.get(kind, 8) + (4 if kind == "sgd" and options.get("momentum") else 0)
    master = 4 if width == 2 or stage else 0  # DeepSpeed keeps a master copy of float32 parameters, too
    accumulated = 4 if stage and ds.get("data_types", {}).get("grad_accum_dtype") == "fp32" else width
    sent = 4 if ds.get("communication_data_type") == "fp32" else width
    kept = sum(trained) if only_trained else whole
    as_they_are = kept - (sum(trained) if stage == 3 else 0)  # at stage 3 only the masters are saved
    saved = sum(trained) * (state + (4 if stage == 3 else master)) + as_they_are * width
    out = Needs(checkpoint=saved, model=kept * (4 if only_trained else width))

    out.states["parameters"] = (share if stage == 3 else whole) * width
    second = zero.get("zero_hpz_partition_size", 1) if stage == 3 else 1
    if second > 1:
        out.states["secondary partition (hpZ)"] = sum(-(-n // second) for n in sizes) * width
    out.states["gradients"] = summed * accumulated
    out.states["master copy and optimizer"] = updated * (master + state)
    buffers, filled, alone = _reduction(zero, trained, on_gpu)
    out.states["reduction buckets"] = buffers * width
    # when the first bucket is full, the backward pass has freed the activations of its layers
    converted = filled * sent if sent != width else 0
    rearranged = max(0, filled * width + converted - int(work.held * filled / whole))
    out.passes["gradients being reduced"] = max(alone * width, rearranged)
    if stage == 3 and (num_ranks > 1 or _offloads(zero, "param")):  # a single rank gathers nothing
        out.passes["gathered layers"] = _gathered(model, zero, num_ranks) * width
    out.passes |= {"activations": work.held, "a layer, or the head": max(work.layer, work.head)}
    group = min(updated, int(zero.get("sub_group_size", 1e9))) if stage == 3 else updated
    if _offloads(zero, "optimizer"):
        out.states["gradients"] = 0
        out.states["master copy and optimizer"] = 0
        # the sum over micro-batches, and the float32 gradients that the optimizer reads
        out.host["offloaded gradients"] = _pinned(summed * accumulated) + -(-updated // group) * _pinned(group * 4)
        out.host["offloaded optimizer"] = updated * (master + state)
    else:
        if stage or width == 2:  # flattened, then converted to float32
            out.update["float32 gradients"] = group * (4 if accumulated == 4 else 4 + accumulated)
        out.update["its temporaries"] = group * _temporaries(kind, options, on_gpu)
    if stage == 3 and _offloads(zero, "param"):
        out.states["parameters"] = 0
        out.host["offloaded parameters"] = _pinned(share * width)
    return out


def with_publishing(
    out: Needs, model: torch.nn.Module, ds: dict[str, Any], num_ranks: int, bucket_bytes: int, on_gpu: bool
) -> None:
    """Add what publishing takes: a bucket that is gathered, and two that are written or sent, from the GPU over NCCL."""
    published = [module.weight for module in model.modules() if hasattr(module, "lora_A")]  # with adapters added
    published = published or [param for param in model.parameters() if param.requires_grad]
    sizes = [param.numel() * param.element_size() for param in published]
    bucket = min(sum(sizes), max(bucket_bytes, *sizes))
    if ds["zero_optimization"]["stage"] == 3 and num_ranks > 1:
        out.publishing["gathered parameters"] = bucket
    (out.publishing if on_gpu else out.host)["buckets to publish"] = 2 * bucket


def with_reference(out: Needs, model: torch.nn.Module, ds: dict[str, Any], num_ranks: int) -> None:
    """Add the frozen reference model. Its passes need less memory than those of the trained one."""
    zero, params = ds["zero_optimization"], list(model.parameters())
    size = sum(-(-p.numel() // num_ranks) if zero["stage"] == 3 else p.numel() for p in params) * params[0].element_size()
    offloaded = zero["stage"] == 3 and _offloads(zero, "param")
    (out.host if offloaded else out.states)["reference model"] = size


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def _pinned(size: int) -> int:
    """torch allocates page-locked memory in powers of two."""
    return 1 << (size - 1).bit_length()


def _reduction(zero: dict[str, Any], sizes: list[int], on_gpu: bool) -> tuple[int, int, int]:
    """Elements of the gradient buckets; of a full one, which is copied for the reduction; and of the largest parameter that
    does not fit into a bucket. On a CPU, memory counts once it is written to."""
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    filled = min(bucket, sum(n for n in sizes if n <= bucket))
    alone = max((n for n in sizes if n > bucket), default=0)
    buffers = 0 if zero["stage"] == 0 else 2 if zero["stage"] < 3 and zero.get("overlap_comm") else 1
    return buffers * (bucket if on_gpu else filled), filled if zero["stage"] in (0, 3) else 0, alone


def _gathered(model: torch.nn.Module, zero: dict[str, Any], num_ranks: int) -> int:
    """The most parameters that ZeRO-3 has gathered at a time: between the forward and the backward pass.

    Layers are gathered as a whole (`engine.Engine`), but for those that run several times in a pass, which need less than is
    counted here. A module's parameters are kept after its forward pass if its backward pass follows within
    `stage3_max_reuse_distance` parameters, of which those above the module count twice. Prefetched parameters come in addition,
    and the buffer into which a layer or they were gathered, until each parameter is copied out of it.
    """
    reach, above, kept = int(zero.get("stage3_max_reuse_distance", 1e9)), 0, {}
    largest, whole = 0, sum(p.numel() for p in model.parameters())
    layers = {id(layer) for layer in layers_of(model)}
    inner = {id(part) for layer in layers_of(model) for part in layer.modules()} - layers
    for module in reversed([module for module in model.modules() if id(module) not in inner]):
        own = {id(p): p.numel() for p in module.parameters(recurse=id(module) in layers)}
        largest = max(largest, sum(own.values()))
        if 2 * above < reach:
            kept |= own
        above += sum(own.values())
    ahead = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    layer = max((sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)), default=0)
    copied = min(whole, max(layer, ahead)) if num_ranks > 1 else 0
    return min(whole, max(sum(kept.values()), largest) + ahead) + copied


def _temporaries(kind: str, options: dict[str, Any], on_gpu: bool) -> int:
    """Bytes per parameter of temporaries in the optimizer step: torch's Adam computes the root of the second moment, on a CPU
    twice; fused Adam and DeepSpeed's are single kernels."""
    if kind in ("adam", "adamw") and options.get("torch_adam") and not options.get("fused"):
        return 4 if on_gpu else 8
    return 0
