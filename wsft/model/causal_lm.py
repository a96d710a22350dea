"""The model that DeepSpeed trains: that of transformers with the chunked head, verified before training.

Knows nothing of Atropos, advantages or objectives: it is given token weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from wsft.device import can_compile
from wsft.errors import UserError
from wsft.loss.head import HeadOutput, LossHead, TokenLoss
from wsft.model.attention import PACKED, kernel
from wsft.model.packing import VarlenMetadata

LARGE_LOGITS = 300.0  # beyond any soft cap


log = logging.getLogger(__name__)


class WeightedSFTModel(torch.nn.Module):
    """A causal language model whose forward pass returns the weighted loss and never materializes the logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        # ZeRO-3 gathers parameters around the forward of the module that owns them, so the loss is computed in that forward
        head = model.get_output_embeddings()
        # logits by its own code where its class has some, which the passes on the meta device then see
        plain = type(head).forward in (torch.nn.Linear.forward, LossHead.forward)
        head.__class__ = LossHead if plain else type(f"Loss{type(head).__name__}", (LossHead, type(head)), {})
        # found on the meta device (meta_passes.py): classes of modules that route by data, names of layers that run once in a
        # pass, and whether to try packed rows
        self.routed: set[type[torch.nn.Module]] = set()
        self.layers: list[str] = []
        self.takes_packed_rows = True
        # rows are padded to so many tokens, so that all modules run on every rank: else ZeRO-3's collectives would not match
        self.shortest = 2
        # whether to get logits from its language model, since its own forward fails (Llama 4 in transformers 5.24)
        self.scored_by_text_model = False
        # scale, soft cap and vocabulary of the logits, as options of the head
        self.logit_options: dict[str, float | int] = {}
        # names of parameters that are not reached from text; the number of tensors in its files that are not part of the model
        self.untrained: set[str] = set()
        self.not_loaded = 0
        # runs `forward` in the checks below: DeepSpeed's engine once it exists, since only the engine gathers parameters that
        # are read outside of their own module
        self.run: Callable[..., Any] = self.__call__
        self._recomputing: list[torch.nn.Module] = []  # modules that checkpoint activations
        for module in model.modules():
            if isinstance(
                module, PreTrainedModel
            ):  # it warns of a missing attention mask, and synchronizes with the device to do so
                module.warn_if_padding_and_no_attention_mask = lambda *_: None

    @property
    def vocab_size(self) -> int:
        """Number of tokens with an embedding and a logit."""
        return vocab_size_of(self.model, self.logit_options)

    def train(self, mode: bool = True) -> WeightedSFTModel:
        """Keep the model in evaluation mode, without dropout, router noise or layer drop: its logprobs are those of the
        sampling policy, and do not depend on how a batch is split. Only modules that checkpoint activations are in training
        mode, which they check."""
        super().train(False)
        self.training = mode
        for module in self._recomputing:
            module.training = mode
        return self

    def recompute_activations(self) -> None:
        """Turn on activation checkpointing, layer by layer, if the model supports it."""
        if not self.model.supports_gradient_checkpointing:
            log.info(
                "%s does not support activation checkpointing: all activations are kept (gradient_checkpointing)",
                type(self.model).__name__,
            )
            return
        # nothing in it is random (see `train`), so no state of random generators is to be kept for each layer
        self.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        asking = [module for module in self.model.modules() if getattr(module, "gradient_checkpointing", False)]
        layers = [module for module in asking if isinstance(module, GradientCheckpointingLayer)]
        self._recomputing = layers or asking
        for layer in layers:
            layer._gradient_checkpointing_func = functools.partial(_recompute, layer, layer._gradient_checkpointing_func)
        self.train(self.training)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        trained_N: torch.Tensor,
        weights: torch.Tensor | TokenLoss | None,
        packing: VarlenMetadata | None = None,
        **options: Any,
    ) -> HeadOutput | torch.Tensor:
        """The loss of the trained tokens, see `head.head_loss`.

        Args:
            tokens_BT: [B, T] int64 rows, padded on the right. There is no attention mask: in a causal model no token attends
                to the padding after it.
            packing: of the sequences packed in the one row; None: each row is a sequence.
            trained_N: [N] flat positions in [B, T] of the trained tokens; never the first token of a row, or of a segment of
                the packing. N may be 0.
            weights, options: as in `head_loss`, for the N tokens. With weights None, returns the model's logits [B, T, V].
        """
        if weights is None:
            model = text_model_in(self.model) if self.scored_by_text_model else self.model
            return model(input_ids=tokens_BT, use_cache=False).logits
        kwargs = packing.kwargs() if packing else {}
        hidden_BTH = body_of(self.model)(input_ids=tokens_BT, use_cache=False, **kwargs).last_hidden_state
        # the one shift: position t-1 scores token t. By index_select, whose backward pass does not sort the indices
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, trained_N - 1)
        targets_N, head = tokens_BT.flatten()[trained_N], self.model.get_output_embeddings()
        dtype = next(head.parameters()).dtype  # not head.weight: ZeRO-3 would from now on gather it for this whole pass
        return head(hidden_NH.to(dtype), targets_N, weights, **options, **self.logit_options)

    @torch.no_grad()
    def check_head(self, device: torch.device) -> None:
        """Compare the chunked head with the model's own logits on a few tokens: UserError if they differ."""
        if can_compile(device):
            log.info("compiling the kernels of the head (the first time on a machine: up to a minute)")
        tokens = (torch.arange(8, device=device) * 7919 % self.vocab_size).unsqueeze(0)
        trained, mode = torch.arange(1, 8, device=device), self.training
        self.eval()
        options = {"temperature": torch.ones(7, device=device)}  # as in training, whose kernels are compiled here
        before = self._sum_of_parameters()
        scale = 1.0
        for _ in range(2):  # also with logits so large that a soft cap shows
            with self._scaled_states(scale):
                logits = self.run(tokens, trained, None)[0, :-1]
                ours = self.run(tokens, trained, torch.zeros(7, device=device), **options).logp_N
            theirs = logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
            largest = float(logits.abs().max())
            # logits may differ by rounding relative to their size; an unknown operation on them changes them far more
            tolerance = max(1e-3, 2 * torch.finfo(next(self.model.parameters()).dtype).eps * largest)
            if not torch.allclose(ours, theirs, atol=tolerance, rtol=1e-3):
                raise UserError(
                    f"{type(self.model).__name__} does something between its hidden states and its logits that wsft does not "
                    f"know: log-probabilities differ by up to {(ours - theirs).abs().max():.3g}; train another model"
                )
            scale = LARGE_LOGITS / max(largest, 1e-6)
        if self._sum_of_parameters() != before:
            raise UserError(
                f"{type(self.model).__name__} changes its parameters in a forward pass in evaluation mode, in which it is "
                f"trained: they would be exported so; turn that off in its config (RWKV: rescale_every 0)"
            )
        self.train(mode)

    def _sum_of_parameters(self) -> float:
        """Sum over this rank's partition of the parameters, in pieces, since torch copies to float64 what it sums in that."""
        partitions = (getattr(param, "ds_tensor", param).flatten() for param in self.parameters())
        return sum(float(piece.sum(dtype=torch.float64)) for partition in partitions for piece in partition.split(2**24))

    @contextlib.contextmanager
    def _scaled_states(self, scale: float) -> Iterator[None]:
        """Inside, hidden states are multiplied by `scale` before the head."""
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0] * scale, *given[1:]))
        try:
            yield
        finally:
            hook.remove()

    @property
    def attention(self) -> str:
        """The name of the attention kernel, for the log."""
        name, param = self.model.config._attn_implementation, next(self.model.parameters())
        return kernel(param.device, param.dtype) if name == PACKED else name

    def attend_by(self, name: str) -> bool:
        try:
            self.model.set_attn_implementation(name)
        except ValueError:  # a model without a choice of attention
            return False
        return True


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Its layers, those of encoders beside the language model included."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inner]


def largest_layer(model: torch.nn.Module) -> int:
    """Parameters of the largest of its layers."""
    return max((sum(param.numel() for param in layer.parameters()) for layer in layers_of(model)), default=0)


def vocab_size_of(model: PreTrainedModel, logit_options: dict[str, float | int]) -> int:
    """The smallest of the sizes in its config, its head and its code."""
    sizes = model.config.get_text_config().vocab_size, model.get_output_embeddings().out_features
    return int(min(*sizes, logit_options.get("vocab_size", sizes[0])))


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The module whose output is the input of the head."""
    body, head, embedding = model, model.get_output_embeddings(), model.get_input_embeddings()
    while _holds(body, head):
        named = getattr(body, "base_model", body)
        # in Llama 4's text model, base_model_prefix is the name of another attribute
        body = named if named is not body else next(child for child in body.children() if _holds(child, embedding))
    return body


def text_model_in(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that has both embedding and head, such as the language model of a multimodal one."""
    parts = model.get_output_embeddings(), model.get_input_embeddings()
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [inner for inner in models if all(_holds(inner, part) for part in parts)][-1]


def _holds(module: torch.nn.Module, part: torch.nn.Module) -> bool:
    return any(each is part for each in module.modules())


def _recompute(layer: torch.nn.Module, checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint the layer's forward pass, inside of which the layer is in evaluation mode."""

    def evaluate(*args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    return checkpoint(evaluate, *args)


def noise_in(config: dict[str, Any]) -> dict[str, float]:
    """Settings of a model's config for dropout, jitter and the like that are not 0: name -> value."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= noise_in(value)
        elif ("drop" in str(name) or "jitter" in str(name)) and isinstance(value, float) and value > 0:
            found[name] = value
    return found
