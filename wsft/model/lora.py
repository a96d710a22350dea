"""LoRA (Hu et al. 2021): W + (alpha / r) B A for projections of the decoder layers; all other parameters are frozen.

Adapted modules stay in place and keep the names of their parameters, so that the model's code, the head, packed rows and the
names of files stay as they are. (peft is not used: it wraps modules, casts their inputs, and takes shared experts of
mixtures of experts for routed ones.) Knows nothing of checkpoints, ranks or records.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wsft.config import WeightedSFTConfig
from wsft.errors import UserError
from wsft.model.causal_lm import body_of
from wsft.model.meta_passes import numbers_of_experts

ATTENTION_MLP = "attention-mlp"


@dataclass(frozen=True)
class Adapters:
    """
    Attributes:
        modules: names of the adapted modules in the model, sorted.
        target_modules: the same for peft: ends of names if they name these modules only, else the whole names.
        left_out: why other projections are not adapted -> their number of parameters.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    target_modules: tuple[str, ...]
    left_out: dict[str, int]

    @classmethod
    def for_model(cls, empty: PreTrainedModel, unreached: Collection[str], config: WeightedSFTConfig) -> Adapters:
        """Choose projections of a model on the meta device, as the settings say. `unreached`: names of parameters that are not
        reached from text. UserError if there are none to adapt, or lora_target names what cannot be adapted."""
        rank, target = config.lora_rank, config.lora_target
        choice = _Choice(empty, unreached, rank)
        candidates = {
            name: choice.why_not(name, module)
            for name, module in empty.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
        if target == ATTENTION_MLP:
            chosen = [name for name, why_not in candidates.items() if not why_not]
            sizes = Counter()
            for name, why_not in candidates.items():
                if why_not and why_not not in (_NO_LAYER, _NO_TEXT):
                    sizes[why_not] += empty.get_submodule(name).weight.numel()
            sizes[_EXPERT] += sum(p.numel() for p in empty.parameters() if p.ndim == 3 and len(p) in choice.experts)
        else:
            chosen, sizes = _named(candidates, target), Counter()
        if not chosen:
            raise UserError(
                f"{type(empty).__name__} has no attention or MLP projections that LoRA can adapt: name modules with "
                f"lora_target, or train all parameters (without lora_rank)"
            )
        ends = {_end(name) for name in chosen}
        exact = {name for name in candidates if _end(name) in ends} == set(chosen)
        targets = ends if exact else chosen
        return cls(rank, config.lora_alpha, tuple(sorted(chosen)), tuple(sorted(targets)), dict(+sizes))

    def describe(self, model: PreTrainedModel) -> str:
        """A sentence about a model with these adapters."""
        trained, whole = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (False, True))
        left = "".join(f", {why} are not ({size / whole:.1%} of the model)" for why, size in self.left_out.items())
        ends = sorted({_end(name) for name in self.modules})
        return (
            f"LoRA of rank {self.rank} trains {trained / 1e6:.2f} M parameters ({trained / whole:.2%}); {len(self.modules)} "
            f"projections are adapted ({', '.join(ends)}){left}"
        )

    def put_into(self, model: PreTrainedModel, seed: int) -> None:
        """Freeze the model and add adapters to it. B is 0; A is uniform within 1 / sqrt(inputs), drawn in float32 for each
        module from its name and the seed alone, and then rounded to the model's type."""
        model.requires_grad_(False)
        for name in self.modules:
            _adapt(model.get_submodule(name), name, self.rank, self.alpha / self.rank, seed)


class _Adapted(torch.nn.Module):
    """Base of the class that an adapted Linear or Conv1D gets, with the parameters lora_A [r, inputs] and lora_B [outputs, r].

    The module keeps its place and the names of its parameters, and ZeRO-3 gathers its adapter together with its weight.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if not self.on:
            return out
        up = self._some_B() if self.as_if_trained else self.lora_B
        return out + torch.nn.functional.linear(torch.nn.functional.linear(x, self.lora_A), up) * self.scaling

    def _some_B(self) -> torch.Tensor:
        """The same at each call; adapters change outputs by some percent then."""
        outputs, rank = self.lora_B.shape
        waves = torch.arange(outputs * rank, device=self.lora_B.device, dtype=torch.float32).sin().view(outputs, rank)
        return (waves * (0.1 / self.scaling / math.sqrt(rank))).to(self.lora_B.dtype)


def _adapt(module: torch.nn.Module, name: str, rank: int, scaling: float, seed: int) -> None:
    inputs, outputs = sizes_of(module)
    weight = module.weight
    down = torch.empty(rank, inputs, dtype=weight.dtype, device=weight.device)
    if not down.is_meta:
        down.copy_(_initial(name, down.shape, seed))
    module.__class__ = type(f"Lora{type(module).__name__}", (_Adapted, type(module)), {})
    module.lora_A = torch.nn.Parameter(down)
    module.lora_B = torch.nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device))
    module.scaling, module.on, module.as_if_trained = scaling, True, False


# words in names of modules of a layer that are neither attention nor MLP
_BESIDE = {"per_layer": "per-layer inputs", "altup": "AltUp", "adapter": "the model's own adapters"}
_NO_TEXT, _NO_LAYER, _EXPERT = "what no text reaches", "outside of the decoder layers", "experts"


class _Choice:
    """Tells attention and MLP projections from other linear modules, by structure where possible."""

    def __init__(self, model: PreTrainedModel, unreached: Collection[str], rank: int):
        self._model, self._unreached, self._rank = model, unreached, rank
        self._decoder, self.experts = set(body_of(model).modules()), set(numbers_of_experts(model.config))

    def why_not(self, name: str, module: torch.nn.Module) -> str:
        """Why a module is no attention or MLP projection to adapt; empty if it is."""
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        if f"{name}.weight" in self._unreached:
            return _NO_TEXT
        inner = parts[places[0] + 1 :] if places else []
        if not inner or module not in self._decoder:
            return _NO_LAYER
        listed = any(self._lists_experts(parts[:place]) for place in places[1:])
        if listed or any("expert" in part and "shared" not in part for part in inner):
            return _EXPERT
        gates = any(part.endswith("gate") for part in inner) and len(module.weight) in {1, *self.experts}
        if gates or any("router" in part for part in inner):
            return "routers"
        for i in range(places[0] + 2, len(parts)):  # modules within the layer
            within = self._model.get_submodule(".".join(parts[:i]))
            if "att" not in parts[i - 1] and any(isinstance(each, torch.nn.Conv1d) for each in within.children()):
                return "state-space and convolution blocks"
        beside = [reason for word, reason in _BESIDE.items() if any(word in part for part in inner)]
        if beside:
            return beside[0]
        if min(sizes_of(module)) <= self._rank:
            return f"matrices of at most {self._rank} rows or columns"
        if type(module) not in (torch.nn.Linear, Conv1D) and not _is_linear(module):
            return "modules that are no plain projections"
        return ""

    def _lists_experts(self, path: list[str]) -> bool:
        """Whether the module there, within a layer, has as many children as there are experts. Several attentions and MLPs in a
        layer are listed, too (LongCat)."""
        children = list(self._model.get_submodule(".".join(path)).children())
        return "att" not in path[-1] and len(children) in self.experts


def sizes_of(module: torch.nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs of a Linear or Conv1D."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _is_linear(module: torch.nn.Module) -> bool:
    inputs, outputs = sizes_of(module)
    try:
        found = module(torch.empty(1, 3, inputs, device="meta", dtype=module.weight.dtype))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 3, outputs)


def _named(candidates: dict[str, str], target: str) -> list[str]:
    chosen = []
    for end in filter(None, (each.strip() for each in target.split(","))):
        found = [name for name in candidates if name == end or name.endswith(f".{end}")]
        if not found:
            ends = sorted({_end(name) for name, why_not in candidates.items() if not why_not})
            raise UserError(f"lora_target {end!r} is no linear module of the model: expected {ATTENTION_MLP} or some of {ends}")
        refused = sorted({candidates[name] for name in found} & {_NO_TEXT, _NO_LAYER, _EXPERT, "routers"})
        if refused:
            raise UserError(f"lora_target {end!r} names {', '.join(refused)}, which LoRA does not adapt here")
        chosen += found
    return list(dict.fromkeys(chosen))


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _initial(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def adapted_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Adapted)}


def change_of(module: torch.nn.Module) -> torch.Tensor:
    """What an adapted module adds to its weight, in float32; its parameters must be gathered."""
    change = module.scaling * (module.lora_B.float() @ module.lora_A.float())
    return change.T if isinstance(module, Conv1D) else change


@contextlib.contextmanager
def _with(model: torch.nn.Module, name: str, value: bool) -> Iterator[None]:
    adapted = adapted_modules(model).values()
    for module in adapted:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module in adapted:
            setattr(module, name, not value)


def switched_off(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the model is its base."""
    return _with(model, "on", False)


def as_if_trained(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, adapters change the model's output: with B = 0, checks at the start would not show what they do. Parameters stay
    as they are. Nothing changes in a model without adapters."""
    return _with(model, "as_if_trained", True)
