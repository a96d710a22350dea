"""Operations between a model's hidden states and its logits besides lm_head, found by tracing a pass on the meta device."""

from __future__ import annotations

import math
import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

_MOVING = re.compile(
    "slice|select|index|view|_unsafe_view|reshape|unsqueeze|squeeze|expand|permute|transpose|t|alias|clone|detach|_to_copy"
)

_LINEAR = {"linear", "addmm", "mm", "matmul", "bmm"}  # the head itself; "add" too if it has a bias


class HeadArithmetic(TorchDispatchMode):
    """A context that traces the operations on hidden states before the head, and on logits after it.

    Attributes:
        scale: the product of all factors on hidden states and logits, up to a tanh (soft cap) if there is one.
        bound: the product of the factors after the tanh, the cap; None without a tanh.
        vocab_size: the number of logits that are kept, counted from the first; None: all.
        unknown: names of other operations, which the chunked head cannot reproduce (views and copies are left out).
    """

    def __init__(self, model: PreTrainedModel, tokens: int):
        super().__init__()
        self._tokens = tokens
        head = model.get_output_embeddings()
        self._linear = _LINEAR | ({"add"} if head.bias is not None else set())
        self._hooks = [
            *(module.register_forward_hook(lambda _, __, made: self._leave_body(made)) for module in model.modules()),
            head.register_forward_pre_hook(lambda _, given: self._enter_head(given[0])),
            head.register_forward_hook(lambda _, __, logits: self._leave_head(logits)),
        ]
        self._followed: dict[int, torch.Tensor] = {}
        self._in_head = self._are_logits = False
        self.vocab_size = None
        self._forget()

    def _forget(self) -> None:
        self.scale, self.bound = 1.0, None
        self.unknown: list[str] = []
        self._followed.clear()

    def _follow(self, tensor: torch.Tensor) -> None:
        self._followed[tensor.untyped_storage()._cdata] = tensor

    def _follows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._followed

    def _leave_body(self, made: object) -> None:
        """Called for nested modules from the inside out: the outermost with hidden states counts."""
        hidden = getattr(made, "last_hidden_state", None)
        if hidden is not None and not self._are_logits:
            self._forget()
            self._follow(hidden)

    def _enter_head(self, hidden: torch.Tensor) -> None:
        if (self._followed and not self._follows(hidden)) or hidden.shape[:-1].numel() != self._tokens:
            self.unknown.append("other hidden states than the last")
        self._followed.clear()
        self._follow(hidden)
        self._in_head = True

    def _leave_head(self, logits: torch.Tensor) -> None:
        self._in_head, self._are_logits = False, True
        self._follow(logits)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given, tensors = tree_flatten((args, kwargs or {}))[0], lambda tree: filter(torch.is_tensor, tree_flatten(tree)[0])
        if any(map(self._follows, tensors(given))):
            name = operation._schema.name.partition("::")[2]
            self._note(name.removesuffix("_"), given)
            for tensor in tensors(made):
                self._follow(tensor)
        return made

    def _note(self, name: str, given: list[object]) -> None:
        factor = _factor(name, given)
        if factor is not None and self.bound is None:
            self.scale *= factor
        elif factor is not None:
            self.bound *= factor
        elif name == "tanh" and self._are_logits and self.bound is None:
            self.bound = 1.0
        elif not _MOVING.fullmatch(name) and not (self._in_head and name in self._linear):
            self.unknown.append(name)

    def options(self) -> dict[str, float | int]:
        """As options of `LossHead`: bound * tanh(scale * logits / bound)."""
        scale = self.scale if self.bound is None else self.scale * self.bound
        found = {
            "logit_scale": None if math.isclose(scale, 1) else scale,
            "final_logit_softcapping": self.bound,
            "vocab_size": self.vocab_size,
        }
        return {name: value for name, value in found.items() if value is not None}

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()


def _factor(name: str, given: list[object]) -> float | None:
    """The number by which an operation multiplies a tensor; None for other operations and factors that are tensors."""
    numbers = [x for x in given if isinstance(x, int | float) or (torch.is_tensor(x) and x.ndim == 0 and not x.is_meta)]
    if name not in ("mul", "div") or len(numbers) != 1 or len(given) != 2:
        return None
    return float(numbers[0]) if name == "mul" else 1 / float(numbers[0])
