"""Fused kernels of liger-kernel in the place of a model's own code for RMSNorm, gated MLPs and rotary embeddings.

They are used if a small copy of the model in float32 has the same logits and gradients with them. Its losses are not used.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from wsft.config import WeightedSFTConfig
from wsft.errors import UserError
from wsft.model.small import small_copies

# What is tried, one after the other. Rotary embeddings and gated MLPs, above all those of experts, are not right for all types.
WITHOUT = [set(), {"rope"}, {"rope", "swiglu", "geglu"}]
TOLERANCE = 1e-4  # of logits and gradients in float32, relative to their norm

log = logging.getLogger(__name__)


def find_kernels(model: PreTrainedModel, config: WeightedSFTConfig, on_gpu: bool) -> Callable[..., None] | None:
    """The function of liger-kernel that changes a model of this type; None where the model's own code is to be run.

    Raises:
        UserError: `kernels` is liger, and it cannot be used.
    """
    if config.kernels == "none":
        return None
    found, reason = None, "there is no GPU to run them"
    if on_gpu:
        try:
            from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

            found, reason = known.get(model.config.model_type), f"it has none for models of type {model.config.model_type!r}"
        except ImportError as error:
            reason = f"liger-kernel cannot be imported ({error}): pip install liger-kernel"
    if found is None and config.kernels == "liger":
        raise UserError(f"kernels is liger, but {reason}. Fix that, or leave kernels at auto")
    return found


def fuse(
    model: PreTrainedModel, config: WeightedSFTConfig, device: torch.device, all_true: Callable[[bool], bool] = bool
) -> None:
    """Change this model, and no other of its class, to use the kernels that `config.kernels` asks for. Call it after loading.

    Rotary embeddings are a function that all models of a family share: those of the kernels are left out if there is a
    reference model, which is loaded after this one.

    Args:
        all_true: reduces a bool over ranks, which must all run the same code.
    Raises:
        UserError: `kernels` is liger, and it gives other results than the model's own code.
    """
    change = find_kernels(model, config, device.type == "cuda")
    if change is None:
        return
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    for without in WITHOUT if config.ref_model_name is None else WITHOUT[1:]:
        apply = functools.partial(_apply, change, without)
        if all_true(_is_right(model, device, apply, modules)):
            break
    else:
        said = f"the kernels of liger-kernel for {type(model).__name__} give other results than its own code, or do not run"
        if config.kernels == "liger":
            raise UserError(f"{said}: leave kernels at auto")
        return log.warning("%s: they are not used", said)
    before, forward = _contents(modules), {module: vars(module).get("forward") for module in model.modules()}
    apply(model)
    _restore(before, lambda value: isinstance(value, type))
    fused = Counter(type(module).__name__ for module, own in forward.items() if vars(module).get("forward") is not own)
    shown = [f"{name} ({count})" for name, count in sorted(fused.items())] + ["rotary embeddings"] * ("rope" not in without)
    log.info("kernels of liger-kernel %s for %s", version("liger-kernel"), ", ".join(shown) or "nothing")


def _apply(change: Callable[..., None], without: set[str], model: PreTrainedModel) -> None:
    options = {"rope": True} | dict.fromkeys({"cross_entropy", "fused_linear_cross_entropy", *without}, False)
    known = inspect.signature(change).parameters
    change(model=model, **{name: value for name, value in options.items() if name in known})


def _is_right(
    model: PreTrainedModel, device: torch.device, change: Callable[[PreTrainedModel], None], modules: set[ModuleType]
) -> bool:
    """Whether a small copy of the model has the same logits and gradients after the change. False if none runs."""
    for copy in small_copies(model, device, model.config._attn_implementation):
        before = _contents(modules)
        try:
            own = _results(copy)
            change(copy)
            pairs = zip(_results(copy), own, strict=True)
            return all((found - wanted).norm() <= TOLERANCE * wanted.norm() for found, wanted in pairs)
        except Exception as error:  # those of Triton are of many types
            log.debug("a copy of %s with fused kernels does not run: %s", type(model).__name__, error)
        finally:
            _restore(before, lambda value: True)
    return False


def _results(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of a few tokens, and the gradients of a function of them."""
    params = [param for param in model.parameters() if param.requires_grad]
    tokens = torch.arange(1, 33, device=model.device).unsqueeze(0)
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
        gradients = torch.autograd.grad(logits.log_softmax(-1)[..., ::7].sum(), params, allow_unused=True)
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _contents(modules: set[ModuleType]) -> dict[ModuleType, dict[str, Any]]:
    return {module: dict(vars(module)) for module in modules}


def _restore(before: dict[ModuleType, dict[str, Any]], which: Callable[[Any], bool]) -> None:
    """liger-kernel also replaces names in the modules that define models, for those created later."""
    for module, contents in before.items():
        for name, value in contents.items():
            if vars(module)[name] is not value and which(value):
                setattr(module, name, value)
