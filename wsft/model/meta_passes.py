"""Forward and backward passes of a model on the meta device, where tensors have shapes but no values: they show what its code
does before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from transformers import PretrainedConfig, PreTrainedModel

from wsft.errors import UserError
from wsft.model.causal_lm import layers_of
from wsft.model.head_arithmetic import HeadArithmetic

# exceptions of code that needs values, or does not support the given arguments
STOPS = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)


# names in configs: the number of experts, and of those that a token is routed to
_EXPERTS = re.compile(r"(n|num|moe_num)_(routed_|local_)?experts")
_CHOSEN = re.compile(r"(num_)?experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k|num_selected_experts")


_PRODUCTS = {linear, torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}


class OneSequence(TorchFunctionMode):
    """Inside, bool(tensor) is True on the meta device: transformers checks by it whether positions are those of one sequence.

    Attributes:
        mixes_types: whether there was a matrix product of different types, which other devices reject.
        sees_later: whether self-attention was called without a causal or other mask.
        askers: code that called bool(tensor), whose behaviour afterwards proves nothing.
    """

    def __init__(self):
        super().__init__()
        self.mixes_types, self.sees_later, self.askers = False, False, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            itself = given["query"].shape[-2] == given["key"].shape[-2] > 1
            self.sees_later |= itself and given.get("attn_mask") is None and not given.get("is_causal")
        self.mixes_types |= function in _PRODUCTS and len({x.dtype for x in args[:2]}) > 1
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            self.askers.add(sys._getframe(1).f_code)
            return True
        return function(*args, **(kwargs or {}))


LENGTHS = 2, 8, 16, 32, 64, 136  # tokens of a sequence; the longest exceeds the blocks of compressed attention
FEW = 8


@dataclass(frozen=True)
class _Pass:
    """Names of the parameters without a gradient after backward, and how often each module was run."""

    unreached: set[str]
    ran: Counter[torch.nn.Module]


@dataclass
class Passes:
    """What passes of an empty model show. `run(T)` runs one sequence of T tokens, `run_packed()` two in one row (None if the
    model does not use packed attention).

    Attributes:
        longest: tokens of the longest sequence in training.
        whole: whether the model runs, with stand-ins for the modules in `routed`.
        routed: classes of modules that route by data, such as mixtures of experts with a loop over the experts that have
            tokens: which of their children run depends on values.
        mixes_types, sees_later: see `OneSequence`.
        layers: names of the layers that run once in every pass; none if the model does not run.
        shortest: the number of tokens from which a sequence runs all modules that sequences of up to `longest` run.
        failure: an exception of the model's code that is not due to missing values.
        scored_by_text_model: see `WeightedSFTModel`.
        logit_options: scale, soft cap and vocabulary of its logits, as options of `LossHead`.
    """

    model: PreTrainedModel
    run: Callable[[int], torch.Tensor]
    run_packed: Callable[[], torch.Tensor] | None
    longest: int
    whole: bool = False
    routed: set[type[torch.nn.Module]] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)
    shortest: int = LENGTHS[0]
    mixes_types: bool = False
    sees_later: bool = False
    logit_options: dict[str, float | int] = field(default_factory=dict)
    failure: Exception | None = None
    scored_by_text_model: bool = False

    def __post_init__(self) -> None:
        self.model.eval()
        self._share_of_experts = _share_of_experts(self.model.config)
        if self._pass(FEW) is None:
            self._find_routed()
        first = self._pass(FEW)
        self.whole = first is not None
        if self.whole or self.routed:  # a stand-in may return other shapes than the real module
            self.failure = None
        # long sequences take seconds in a recurrence that loops over tokens: backward only if it can change the result
        found = [first, *(self._pass(length, backward=bool(first.unreached)) for length in self._others)] if first else []
        passes = [each for each in found if each]
        self._unreached = set.intersection(*(each.unreached for each in passes)) if self.whole else self._not_of_the_decoder()
        if self.whole:
            named = {module: name for name, module in self.model.named_modules()}
            once = [layer for layer in layers_of(self.model) if all(each.ran[layer] == 1 for each in passes)]
            self.layers = [named[layer] for layer in once]
        while passes and self.shortest < self._others[-1] and passes[-1].ran.keys() - passes[1].ran.keys():
            self.shortest = min(length for length in (*LENGTHS, self._others[-1]) if length > self.shortest)
            passes[1] = self._pass(self.shortest, backward=False) or passes[-1]

    @property
    def attention(self) -> str:
        """The name of its attention implementation."""
        return self.model.config._attn_implementation

    @property
    def _others(self) -> tuple[int, ...]:
        return LENGTHS[0], max(LENGTHS[0], min(LENGTHS[-1], self.longest))

    def _pass(self, length: int, backward: bool = True) -> _Pass | None:
        """Forward and, if asked for, backward; without backward `unreached` is empty. None if the model does not run."""
        ran: Counter[torch.nn.Module] = Counter()
        hooks = [module.register_forward_pre_hook(lambda module, _: ran.update([module])) for module in self.model.modules()]
        self.model.zero_grad()
        try:
            with self.standing_for_routed(), torch.set_grad_enabled(backward):
                loss = self.run(length).sum()
                if backward:
                    loss.backward()
        except STOPS as error:
            self._note_failure(error)
            return None
        finally:
            for hook in hooks:
                hook.remove()
        unreached = {name for name, param in self.model.named_parameters() if backward and param.grad is None}
        return _Pass(unreached, ran)

    def _note_failure(self, error: Exception) -> None:
        """Set `failure`, unless the exception is due to missing values: torch's own, or of code that called bool(tensor)."""
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        wants_values = _looks_at_values(error) or frame.f_code in self._askers
        self.failure = None if wants_values else error

    def _find_routed(self) -> None:
        """Fill `routed` until the model runs, or stops at a module that does not route by data."""
        while True:
            stopped, looked = self._where_it_stops()
            if stopped is None or not looked or type(stopped) in self.routed or self._holds_layers(stopped):
                return
            self.routed.add(type(stopped))

    def _where_it_stops(self) -> tuple[torch.nn.Module | None, bool]:
        """The innermost module with parameters in which a pass stops (None: it does not), and whether it stops for values."""
        within: list[torch.nn.Module] = []
        hooks = []
        for module in self.model.modules():
            hooks.append(module.register_forward_pre_hook(lambda module, _: within.append(module)))
            hooks.append(module.register_forward_hook(lambda *_: within.pop() and None))
        try:
            with self.standing_for_routed(), torch.no_grad():
                self.run(FEW)
            return None, False
        except STOPS as error:
            stopped = next((module for module in reversed(within) if any(True for _ in module.parameters())), self.model)
            return stopped, _looks_at_values(error)
        finally:
            for hook in hooks:
                hook.remove()

    def _holds_layers(self, module: torch.nn.Module) -> bool:
        embedding = self.model.get_input_embeddings()
        return any(child is embedding for child in module.modules()) or module is self.model

    @contextlib.contextmanager
    def standing_for_routed(self) -> Iterator[None]:
        """Inside, modules of the classes in `routed`, of any model, are replaced by stand-ins that allocate the same memory."""
        forwards = {cls: cls.forward for cls in self.routed}
        for cls in self.routed:
            cls.forward = functools.partialmethod(_stand_in, self._share_of_experts)
        try:
            with OneSequence() as mode:
                self._askers = mode.askers
                yield
            self.mixes_types, self.sees_later = self.mixes_types | mode.mixes_types, self.sees_later | mode.sees_later
        finally:
            for cls, forward in forwards.items():
                cls.forward = forward

    def head_arithmetic(self, logits: Callable[[], torch.Tensor]) -> HeadArithmetic | None:
        """The operations around the head in a pass of `FEW` tokens to the logits; None if it does not run."""
        try:
            with self.standing_for_routed(), torch.no_grad(), HeadArithmetic(self.model, FEW) as head:
                kept = logits().shape[-1]
                head.vocab_size = kept if kept < len(self.model.get_output_embeddings().weight) else None
            return head
        except STOPS as error:
            if self.whole:  # between hidden states and logits
                self._note_failure(error)
            return None

    def takes_packed_rows(self) -> bool:
        """Whether packed rows may be tried: False if its code raises, or if it does not run here, since ZeRO-3 cannot recover
        from an exception. Whether the result is right is tested on logprobs (row_layouts.py)."""
        if not self.whole or self.run_packed is None or self.shortest > LENGTHS[0]:
            return False
        try:
            with self.standing_for_routed(), torch.no_grad():
                self.run_packed()
            return True
        except STOPS:
            return False

    def unreached(self) -> set[str]:
        """Names of the parameters that are not reached from text, such as those of a vision tower: those without a gradient
        after backward or, if the model does not run, those outside the text decoder of a multimodal model.

        Raises:
            UserError: the model's code detaches parameters in evaluation mode, in which it is trained.
        """
        model, found = self.model, self._unreached
        if not found:
            return found
        model.train()  # as it would be trained elsewhere
        in_training = [each.unreached for each in map(self._pass, (FEW, *self._others)) if each]
        kept = sorted(found - set.intersection(*in_training)) if in_training else []
        model.eval()
        if kept:
            raise UserError(
                f"{type(model).__name__} detaches {len(kept)} parameters ({', '.join(kept[:3])}, ...) in evaluation mode, in "
                f"which wsft trains so that nothing is random: they would learn nothing; change its code"
            )
        return found

    def _not_of_the_decoder(self) -> set[str]:
        model = self.model
        if model.config.get_text_config() is model.config:
            return set()
        of_text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
        kept = {id(param) for module in of_text for param in module.parameters()}
        return {name for name, param in model.named_parameters() if id(param) not in kept}


def _looks_at_values(error: Exception) -> bool:
    """Whether it is torch's exception for tensors without values."""
    return isinstance(error, NotImplementedError) or "meta" in str(error)


def _share_of_experts(config: PretrainedConfig) -> float:
    """The share of the experts that a token is routed to; 1 if the config does not say."""
    chosen, experts = (max(_numbers_named(pattern, config), default=0) for pattern in (_CHOSEN, _EXPERTS))
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def numbers_of_experts(config: PretrainedConfig) -> list[int]:
    """All that the config names."""
    return _numbers_named(_EXPERTS, config)


def _numbers_named(pattern: re.Pattern, config: PretrainedConfig) -> list[int]:
    named = {**config.to_dict(), **config.get_text_config().to_dict()}
    named |= {name: value for within in list(named.values()) if isinstance(within, dict) for name, value in within.items()}
    return [value for name, value in named.items() if pattern.fullmatch(str(name)) and isinstance(value, int)]


def _stand_in(module: torch.nn.Module, share: float, *args: object, **kwargs: object) -> torch.Tensor:
    """Stands for a mixture of experts: saves for backward the inputs and outputs of the matrix products of each token's
    experts. All its inputs, such as routing weights, get a gradient."""
    params, (x, *others) = list(module.parameters()), filter(torch.is_tensor, tree_flatten((args, kwargs))[0])
    width = sum(sum(p.shape[-2:]) * (len(p) if p.ndim > 2 else 1) for p in params if p.ndim > 1)
    return _Holding.apply(x, int(share * width) * (x.numel() // x.shape[-1]), *params, *others)


class _Holding(torch.autograd.Function):
    """Output of the shape of its first input; saves `held` numbers for backward."""

    @staticmethod
    def forward(ctx, x, held, *others):
        ctx.save_for_backward(x.new_empty(held))
        ctx.others = others
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        gradients = (torch.empty_like(other) if other.is_floating_point() else None for other in ctx.others)
        return torch.empty_like(grad), None, *gradients
