"""The tokenizer and the model, loaded (partitioned at once under ZeRO-3), with the chunked head put in.

Knows nothing of Atropos, advantages or objectives: it is given weights.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig

from wsft.attention import PACKED, kernel, keywords, register
from wsft.config import UserError, WeightedSFTConfig
from wsft.device import fuses
from wsft.ds_config import for_reference
from wsft.layout import Layout
from wsft.loss_head import HeadOutput, LossHead, TokenLoss
from wsft.shares import Cost

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # they keep packed sequences apart themselves

log = logging.getLogger(__name__)


class WeightedSFTModel(torch.nn.Module):
    """What DeepSpeed trains: a causal language model whose forward pass ends in the weighted loss, never in logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.logit_options = _logit_options(model.config.get_text_config())
        # ZeRO-3 gathers a module's parameters around its forward: the arithmetic must be the forward of their owner
        model.get_output_embeddings().__class__ = LossHead
        self.packs = self.shares = False  # until `check_packing` saw it

    def forward(
        self,
        tokens_BT: torch.Tensor,
        trained_N: torch.Tensor,
        weights: torch.Tensor | TokenLoss,
        layout: Layout | None = None,
        **options: Any,
    ) -> HeadOutput:
        """The loss of the trained tokens, as `loss_head.head_loss` has it.

        Args:
            tokens_BT: [B, T] int64 rows, padded on the right. No attention mask: under a causal one nothing sees the padding.
            layout: of the sequences that are packed in the one row; None: every row is one sequence.
            trained_N: [N] flat positions in [B, T] of the trained tokens; never the first of a row, or of a piece of the
                layout. N may be 0.
            weights, options: as there, for the N tokens.
        """
        packing = keywords(layout, tokens_BT.device) if layout else {}
        hidden_BTH = self.model.base_model(input_ids=tokens_BT, use_cache=False, **packing).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1)[trained_N - 1]  # the one shift: position t-1 scores token t
        targets_N = tokens_BT.flatten()[trained_N]
        return self.model.get_output_embeddings()(hidden_NH, targets_N, weights, **options, **self.logit_options)

    @torch.no_grad()
    def check_head(self, device: torch.device) -> None:
        """Hold the head against the model's own logits on a few tokens: a model may do more between the two than we know."""
        if fuses(device):
            log.info("making the kernels of the head (the first time on a machine: up to a minute)")
        vocab = self.model.config.get_text_config().vocab_size
        tokens = (torch.arange(8, device=device) * 7919 % vocab).unsqueeze(0)
        trained = torch.arange(1, 8, device=device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1]
        theirs = logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
        ours = self(tokens, trained, torch.zeros(7, device=device)).logp_N
        tolerance = 1e-3 if logits.dtype == next(self.model.parameters()).dtype else 0.1
        if not torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance):
            raise UserError(
                f"{type(self.model).__name__} does something between its hidden states and its logits that wsft does not know: "
                f"log-probabilities differ by up to {(ours - theirs).abs().max():.3g}; train another model, or add it to "
                f"model._logit_options"
            )

    @property
    def attention(self) -> str:
        """What attends, in words."""
        name, param = self.model.config._attn_implementation, next(self.model.parameters())
        return kernel(param.device, param.dtype) if name == PACKED else name

    @torch.no_grad()
    def check_packing(self, device: torch.device) -> bool:
        """Try packed rows: sequences in one row must get the logps that each has alone, with the model's own attention.

        Where they do, `packs` is set, and packed attention stays; else the model's own, and rows are to be padded. `shares` is
        set where the same holds of sequences that share the piece in which they begin.
        """
        own, mode = self.model.config._attn_implementation, self.training
        vocab = self.model.config.get_text_config().vocab_size
        pieces = begun, first, other, second = (torch.arange(22, device=device) * 7919 % vocab).split([6, 5, 8, 3])
        sequences = [torch.cat([begun, first]), other, torch.cat([begun, second])]

        def logps(row: list[torch.Tensor], layout: Layout | None = None, scored: slice = slice(None)) -> torch.Tensor:
            """Of the scored pieces of the row, from the second token of each."""
            ends = list(itertools.accumulate(map(len, row)))
            at = torch.cat(
                [torch.arange(end - len(piece) + 1, end) for end, piece in list(zip(ends, row, strict=True))[scored]]
            )
            return self(torch.cat(row).unsqueeze(0), at.to(device), torch.zeros(len(at), device=device), layout).logp_N

        self.eval()
        alone = [logps([sequence]) for sequence in sequences]
        # of what differs from token to token anyway: rounding is far below it, a sequence that sees another is not
        tolerance = torch.cat(alone).std() * (1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1)

        def fits(found: torch.Tensor, wanted: list[torch.Tensor]) -> bool:
            return bool((found - torch.cat(wanted)).abs().max() < tolerance)  # not where one is NaN

        # asked beforehand: ZeRO-3 does not survive an exception in the middle of a forward pass
        if self._takes_positions() and self.attend_by(PACKED if own not in FLASH else own):
            self.packs = fits(logps(sequences, Layout.of([11, 8, 9])), alone)
        if self.packs and own not in FLASH:
            found = logps(list(pieces), Layout((6, 5, 8, 3), (-1, 0, -1, 0)), slice(1, None))
            self.shares = fits(found, [alone[0][-4:], alone[1], alone[2][-2:]])
        if not self.packs:
            self.attend_by(own)
        self.train(mode)
        return self.packs

    def _takes_positions(self) -> bool:
        parameters = inspect.signature(self.model.base_model.forward).parameters
        return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def attend_by(self, name: str) -> bool:
        try:
            self.model.set_attn_implementation(name)
        except ValueError:  # a model whose attention cannot be chosen
            return False
        return True


def _logit_options(config: Any) -> dict[str, float | None]:
    """What lies between lm_head and softmax, under the names that transformers' model configs give it."""
    multipliers = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere; Muse; Falcon-H1
    scale = next((getattr(config, name) for name in multipliers if getattr(config, name, None) is not None), None)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
        scale = scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    return {"logit_scale": scale, "final_logit_softcapping": getattr(config, "final_logit_softcapping", None)}


def load_tokenizer(config: WeightedSFTConfig) -> PreTrainedTokenizerBase:
    name = config.tokenizer_name or config.model_name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer in {name!r}: give --tokenizer_name a folder or hub name ({_first_line(error)})"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name!r} has neither a pad nor an eos token: add one of them to it")
        tokenizer.pad_token = tokenizer.eos_token
        log.info("the tokenizer has no pad token: eos (%r) pads instead; padding is never trained", tokenizer.eos_token)
    return tokenizer


def load_model_config(name: str, config: WeightedSFTConfig) -> Any:
    """The model's own config: its shape is needed before its weights."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no model in {name!r}: expected a Hugging Face folder or hub name ({_first_line(error)})") from error


def empty_model(config: PretrainedConfig, trust_remote_code: bool, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """On the meta device: classes, names and shapes, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def cost_of(model: PreTrainedModel) -> tuple[Cost, float]:
    """FLOPs of a training step, 6 per parameter and token (Chowdhery et al. 2022, "PaLM", appendix B): those of a sequence
    below lm_head, and of a trained token in it.

    2 of the 6 are the forward pass, 4 the backward; what is computed anew for checkpointed activations is not counted. Causal
    attention is half a square. Of experts, those count that a token is sent to.
    """
    config, used = model.config.get_text_config(), 0.0
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    experts = getattr(config, "num_experts_per_tok", None)
    for param in model.base_model.parameters():
        if param.ndim > 1 and id(param) not in embeddings:
            used += param.numel() * (experts / len(param) if experts and param.ndim == 3 else 1)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    return Cost(6.0 * used, 6.0 * config.num_hidden_layers * width), 6.0 * model.get_output_embeddings().weight.numel()


def load_model(name: str, config: WeightedSFTConfig, ds: dict[str, Any]) -> WeightedSFTModel:
    """A model with its head put in. Under ZeRO-3 each parameter is partitioned as it is made."""
    # from_pretrained looks for this object (a weak global reference) to partition while it loads
    zero3 = HfDeepSpeedConfig(ds) if ds["zero_optimization"]["stage"] == 3 else None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.bfloat16 if ds["bf16"]["enabled"] else torch.float32,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"the model in {name!r} cannot be loaded: {_first_line(error)}") from error
    del zero3
    register()
    model.train()
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear lm_head: wsft trains decoder-only language models")
    return WeightedSFTModel(model)


def load_reference(config: WeightedSFTConfig, ds: dict[str, Any], vocab_size: int) -> WeightedSFTModel:
    """The frozen reference model, which scores the same tokens."""
    size = load_model_config(config.ref_model_name, config).get_text_config().vocab_size
    if size < vocab_size:
        raise UserError(
            f"the reference model {config.ref_model_name!r} has a vocabulary of {size}, the model one of {vocab_size}: "
            f"it must know the same tokens"
        )
    return load_model(config.ref_model_name, config, for_reference(ds)).requires_grad_(False).eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
