"""The model that DeepSpeed trains: transformers' own, with the chunked head put in, and looked at before it is trusted.

Knows nothing of Atropos, advantages or objectives: it is given weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from wsft.device import can_compile
from wsft.errors import UserError
from wsft.loss.head import HeadOutput, LossHead, TokenLoss
from wsft.model.attention import PACKED, kernel, learn_masks
from wsft.model.packing import Layout, varlen_kwargs

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # they keep packed sequences apart themselves

LARGE_LOGITS = 300.0  # beyond any bound that a model puts on them

_SPAN = re.compile(r"window|chunk|block|budget|top_?k")

log = logging.getLogger(__name__)


class WeightedSFTModel(torch.nn.Module):
    """What DeepSpeed trains: a causal language model whose forward pass ends in the weighted loss, never in logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        # ZeRO-3 gathers a module's parameters around its forward: the arithmetic must be the forward of their owner
        model.get_output_embeddings().__class__ = LossHead
        # how sequences may be laid out, until `check_layouts` saw it: in one row, with a piece that several share, in rows of
        # one batch
        self.packs = self.shares = self.pads = False
        # what an empty model has told (meta_passes.py): which classes of modules run other modules by what their input is, and
        # whether a packed row may be tried at all
        self.routed: set[type[torch.nn.Module]] = set()
        self.takes_packed_rows = True
        # tokens that a row has at least, for all its modules to be run: where a rank ran others, ZeRO-3 would wait for ever
        self.shortest = 2
        # whether logits are asked of the language model in it, for its own pass does not run (Llama 4 in transformers 5.24)
        self.scored_by_text_model = False
        # what lies between hidden states and logits: options of the head
        self.logit_options: dict[str, float | int] = {}
        # names of parameters that no text reaches, and how many tensors of the files are not of the model
        self.untrained: set[str] = set()
        self.not_loaded = 0
        # what runs `forward` for the looks below: DeepSpeed's engine, once there is one, for it alone gathers a parameter that
        # is read outside of its own module
        self.run: Callable[..., Any] = self.__call__
        self._recomputing: list[torch.nn.Module] = []  # the modules that recompute activations, where they train
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # asks the device for values, to warn that there is no attention mask
                module.warn_if_padding_and_no_attention_mask = lambda *_: None

    @property
    def vocab_size(self) -> int:
        """Tokens that have an embedding and a logit."""
        return vocab_size_of(self.model, self.logit_options)

    def train(self, mode: bool = True) -> WeightedSFTModel:
        """The model stays in evaluation mode: no dropout, router noise or layer drop, so that its logps are those of the policy
        that samples, and do not depend on how a batch is split. Only modules that recompute activations ask whether they
        train."""
        super().train(False)
        self.training = mode
        for module in self._recomputing:
            module.training = mode
        return self

    def recompute_activations(self) -> None:
        """In the backward pass, of each layer, where its code knows how to."""
        if not self.model.supports_gradient_checkpointing:
            log.info("%s knows no recomputing of activations: all are held (gradient_checkpointing)", type(self.model).__name__)
            return
        self.model.activation_checkpointing_enable({"use_reentrant": False})
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
        layout: Layout | None = None,
        **options: Any,
    ) -> HeadOutput | torch.Tensor:
        """The loss of the trained tokens, as `head.head_loss` has it.

        Args:
            tokens_BT: [B, T] int64 rows, padded on the right. No attention mask: under a causal one nothing sees the padding.
            layout: of the sequences that are packed in the one row; None: every row is one sequence.
            trained_N: [N] flat positions in [B, T] of the trained tokens; never the first of a row, or of a piece of the
                layout. N may be 0.
            weights, options: as there, for the N tokens. Without weights, the model's own logits [B, T, V] are returned.
        """
        if weights is None:
            model = text_model_in(self.model) if self.scored_by_text_model else self.model
            return model(input_ids=tokens_BT, use_cache=False).logits
        packing = varlen_kwargs(layout, tokens_BT.device) if layout else {}
        hidden_BTH = body_of(self.model)(input_ids=tokens_BT, use_cache=False, **packing).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1)[trained_N - 1]  # the one shift: position t-1 scores token t
        targets_N, head = tokens_BT.flatten()[trained_N], self.model.get_output_embeddings()
        return head(hidden_NH.to(head.weight.dtype), targets_N, weights, **options, **self.logit_options)

    @torch.no_grad()
    def check_head(self, device: torch.device) -> None:
        """Hold the head against the model's own logits on a few tokens: a model may do more between the two than we know."""
        if can_compile(device):
            log.info("making the kernels of the head (the first time on a machine: up to a minute)")
        tokens = (torch.arange(8, device=device) * 7919 % self.vocab_size).unsqueeze(0)
        trained, mode = torch.arange(1, 8, device=device), self.training
        self.eval()
        options = {"temperature": torch.ones(7, device=device)}  # as in training, whose kernels are made here
        before = self._sum_of_parameters()
        scale = 1.0
        for _ in range(2):  # as they are, and so large that a bound on them shows
            with self._scaled_states(scale):
                logits = self.run(tokens, trained, None)[0, :-1]
                ours = self.run(tokens, trained, torch.zeros(7, device=device), **options).logp_N
            theirs = logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
            largest = float(logits.abs().max())
            # products of hidden states may differ by roundings of their size; what a model does with logits is far more
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
        """Of what this rank has of them."""
        return sum(float(getattr(param, "ds_tensor", param).sum(dtype=torch.float64)) for param in self.parameters())

    @contextlib.contextmanager
    def _scaled_states(self, scale: float) -> Iterator[None]:
        """Inside, the hidden states that the head is given are so many times as large."""
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0] * scale, *given[1:]))
        try:
            yield
        finally:
            hook.remove()

    @property
    def attention(self) -> str:
        """What attends, in words."""
        name, param = self.model.config._attn_implementation, next(self.model.parameters())
        return kernel(param.device, param.dtype) if name == PACKED else name

    @torch.no_grad()
    def check_layouts(
        self, device: torch.device, max_token_len: int, packing: bool = True, all_true: Callable[[bool], bool] = bool
    ) -> None:
        """Try packed and padded rows: sequences must get the logps that each has alone, with the model's own attention.

        Where they do in one row, `packs` is set, and packed attention stays; else the model's own. `shares` is set where the
        same holds of sequences that share the segment in which they begin, `pads` where it does of rows of one batch. One
        sequence is longer than any window of the model's masks, and than what its position encodings treat alike.

        Args:
            max_token_len: of the longest sequence in training.
            packing: whether to try packed rows.
            all_true: whether all ranks say so: forward passes are collectives, and what is found decides which come next.
        Raises:
            UserError: the logps of a sequence depend on those that were run before it, or on tokens after them.
        """
        own, mode = self.model.config._attn_implementation, self.training
        self.eval()
        vocab, config = self.vocab_size, self.model.config.get_text_config()
        reaches = [reach for reach in position_reaches(config) if reach < max_token_len]
        # asked beforehand: ZeRO-3 does not survive an exception in the middle of a forward pass
        takes_packed = packing and self.takes_packed_rows and self._takes_positions()
        takes_packed = takes_packed and self.attend_by(PACKED if own not in FLASH else own)
        if takes_packed and own not in FLASH:
            few = torch.arange(8, device=device)
            run = functools.partial(self.run, few.unsqueeze(0) % vocab, few[1:], torch.zeros(7, device=device))
            reaches += learn_masks(self.model, run, max_token_len, device)
            self.attend_by(own)
        elif own in FLASH and getattr(config, "sliding_window", None):
            reaches.append(min(config.sliding_window, max_token_len))
        spans = [*reaches, *_spans_in(config.to_dict(), max_token_len)]
        longest = max(11, min(max([*spans, 31]) + 9, max_token_len))
        sizes = [6, longest - 6, 8, 3]
        tokens = torch.arange(sum(sizes), device=device) * 7919 % vocab
        # half of them are of four, as some are again and again in texts: a code that picks among equals is shown by rows
        half = torch.arange(len(tokens[1::2]), device=device)
        tokens[1::2] = tokens[half**2 // 3 % 4]
        pieces = begun, first, other, second = tokens.split(sizes)
        sequences = [torch.cat([begun, first]), other, torch.cat([begun, second])]

        def logps(row: list[torch.Tensor], layout: Layout | None = None, scored: slice = slice(None)) -> torch.Tensor:
            """Of the scored pieces of the row, from the second token of each."""
            ends = list(itertools.accumulate(map(len, row)))
            at = torch.cat(
                [torch.arange(end - len(piece) + 1, end) for end, piece in list(zip(ends, row, strict=True))[scored]]
            )
            return self.run(torch.cat(row).unsqueeze(0), at.to(device), torch.zeros(len(at), device=device), layout).logp_N

        shorter = sequences[0][:-4]
        at_first = logps([shorter]) if reaches else None
        alone = [logps([sequence]) for sequence in reversed(sequences)][::-1]  # the longest last
        # of what differs from token to token anyway: rounding is far below it, a sequence that sees another is not
        tolerance = torch.cat(alone).std() * (1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1)

        def agree(found: torch.Tensor, wanted: list[torch.Tensor]) -> bool:
            return bool((found - torch.cat(wanted)).abs().max() < tolerance)  # not where one is NaN

        def fits(found: torch.Tensor, wanted: list[torch.Tensor]) -> bool:
            return all_true(agree(found, wanted))

        if reaches and not fits(logps([shorter]), [at_first]):
            raise UserError(
                f"what {type(self.model).__name__} makes of a sequence depends on those that it was given before, as where "
                f"rotary embeddings grow with the longest: set max_token_len to {min(reaches, default=0)}, where they begin to"
            )
        if not agree(logps([other[:-3]]), [alone[1][:-3]]):
            raise not_causal(self.model)
        if takes_packed:
            self.attend_by(PACKED if own not in FLASH else own)
            self.packs = fits(logps(sequences, Layout.of(list(map(len, sequences)))), alone)
        if self.packs and own not in FLASH:
            found = logps(list(pieces), Layout(tuple(sizes), (-1, 0, -1, 0)), slice(1, None))
            self.shares = fits(found, [alone[0][-len(first) + 1 :], alone[1], alone[2][-2:]])
        if not self.packs:
            self.attend_by(own)
        self.pads = self.packs or fits(self._padded_logps(sequences, max_token_len), alone)
        self.train(mode)

    def _padded_logps(self, sequences: list[torch.Tensor], max_token_len: int) -> torch.Tensor:
        """Of rows that are padded all, the longest too."""
        rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        rows = torch.nn.functional.pad(rows, (0, max(0, min(9, max_token_len - rows.shape[1]))))
        trained = torch.zeros_like(rows, dtype=torch.bool)
        for row, sequence in zip(trained, sequences, strict=True):
            row[1 : len(sequence)] = True
        at = trained.flatten().nonzero().squeeze(1)
        return self.run(rows, at, torch.zeros(len(at), device=rows.device)).logp_N

    def _takes_positions(self) -> bool:
        parameters = inspect.signature(body_of(self.model).forward).parameters
        return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def attend_by(self, name: str) -> bool:
        try:
            self.model.set_attn_implementation(name)
        except ValueError:  # a model whose attention cannot be chosen
            return False
        return True


def vocab_size_of(model: PreTrainedModel, logit_options: dict[str, float | int]) -> int:
    """The smallest of what its config, its head and its code say."""
    sizes = model.config.get_text_config().vocab_size, model.get_output_embeddings().out_features
    return int(min(*sizes, logit_options.get("vocab_size", sizes[0])))


def not_causal(model: PreTrainedModel) -> UserError:
    return UserError(
        f"in {type(model).__name__} a token sees those after it: wsft trains causal language models (if its config has "
        f"is_decoder, it may be one with true)"
    )


def _spans_in(config: dict[str, Any], most: int) -> list[int]:
    """Numbers of tokens below `most` that a model's config names, beyond which its code may treat them otherwise."""
    named = {name: value for name, value in config.items() if _SPAN.search(str(name))}
    return [value for value in named.values() if type(value) is int and value < most]


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """What makes the hidden states that the head is given."""
    body, head, embedding = model, model.get_output_embeddings(), model.get_input_embeddings()
    while _holds(body, head):
        named = getattr(body, "base_model", body)
        # Llama 4's text model has the name that its multimodal one is known by
        body = named if named is not body else next(child for child in body.children() if _holds(child, embedding))
    return body


def text_model_in(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that has both embedding and head: of a multimodal one, its language model may be."""
    parts = model.get_output_embeddings(), model.get_input_embeddings()
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [inner for inner in models if all(_holds(inner, part) for part in parts)][-1]


def _holds(module: torch.nn.Module, part: torch.nn.Module) -> bool:
    return any(each is part for each in module.modules())


def _recompute(layer: torch.nn.Module, checkpoint: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint the layer's forward pass, in which the layer itself is in evaluation mode, too."""

    def evaluate(*args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    return checkpoint(evaluate, *args)


def noise_in(config: dict[str, Any]) -> dict[str, float]:
    """What a model's config says of randomness in training: the names that transformers gives it, and their values."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= noise_in(value)
        elif ("drop" in str(name) or "jitter" in str(name)) and isinstance(value, float) and value > 0:
            found[name] = value
    return found


def position_reaches(config: PretrainedConfig, types: Collection[str] = ("dynamic", "longrope")) -> list[int]:
    """The lengths from which on rotary embeddings of a type that looks at the longest position are others."""
    said = getattr(config, "rope_parameters", None) or {}
    kinds = [said, *(value for value in said.values() if isinstance(value, dict))]  # one of all layers, or one of each type
    grows = [kind for kind in kinds if kind.get("rope_type") in types]
    names = ("original_max_position_embeddings", "max_position_embeddings")
    found = [[place.get(name) for name in names for place in (kind, config.to_dict())] for kind in grows]
    return [next(filter(None, reaches), 0) for reaches in found]
