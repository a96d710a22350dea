"""How a model's sequences can be batched: packed, with shared prefixes, or padded. Tried on a few tokens before training; in
each layout a sequence must get the logprobs that it has alone with the model's own attention.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from wsft.errors import UserError
from wsft.model.attention import PACKED, learn_masks
from wsft.model.causal_lm import WeightedSFTModel, body_of
from wsft.model.meta_passes import STOPS
from wsft.model.packing import Layout, VarlenMetadata
from wsft.model.rotary import position_reaches
from wsft.model.small import small_copies

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # they support packed sequences themselves


class Tolerance(NamedTuple):
    """By how much logprobs of the same tokens may differ: of each sequence the largest or the median difference, as a share of
    their spread over tokens. What one sequence does to another is often below what bf16 rounds; where rounding changes the
    experts of a token, its logprob is another."""

    share: float
    of: Callable[[torch.Tensor], torch.Tensor]


EXACT, IN_BF16, ROUGHLY_IN_BF16 = Tolerance(1e-3, torch.amax), Tolerance(0.1, torch.amax), Tolerance(0.1, torch.median)

_SPAN = re.compile(r"window|chunk|block|budget|top_?k")

log = logging.getLogger(__name__)


@dataclass
class RowLayouts:
    """Layouts that give right logprobs.

    Attributes:
        packs: several sequences in one row.
        shares: packed sequences that share a prefix.
        pads: several rows, padded on the right.
    """

    packs: bool = False
    shares: bool = False
    pads: bool = False


@torch.no_grad()
def find_row_layouts(
    model: WeightedSFTModel,
    device: torch.device,
    max_token_len: int,
    packing: bool = True,
    all_true: Callable[[bool], bool] = bool,
) -> RowLayouts:
    """Try the layouts. Afterwards the model uses packed attention if it packs, else its own. A collective under ZeRO-3.

    In bf16, rounding may be larger than what one sequence does to another. What the model's code does is then found with a
    small copy in float32; the model itself must agree roughly.

    Args:
        max_token_len: length of the longest sequence in training.
        packing: whether to try packed rows.
        all_true: reduces a bool over ranks. Forward passes are collectives, so all ranks must decide alike.
    Raises:
        UserError: the logprobs of a sequence depend on sequences that were run before it, or on later tokens.
    """
    if next(model.parameters()).dtype == torch.float32:
        return _find(model, device, max_token_len, packing, all_true, EXACT)
    of_copy = _of_small_copy(model, device, max_token_len, packing)
    if not all_true(of_copy is not None):
        return _find(model, device, max_token_len, packing, all_true, IN_BF16)
    found = _find(model, device, max_token_len, all_true(packing and of_copy.packs), all_true, ROUGHLY_IN_BF16)
    if of_copy.packs > found.packs or of_copy.pads > found.pads:
        log.warning(
            "the code of %s keeps sequences of a micro-batch apart in float32, but with its weights in bf16 their logprobs "
            "change: a kernel may be wrong, or rounding unusually large",
            type(model.model).__name__,
        )
    return RowLayouts(found.packs, found.shares and of_copy.shares, found.pads and of_copy.pads)


def _of_small_copy(model: WeightedSFTModel, device: torch.device, max_token_len: int, packing: bool) -> RowLayouts | None:
    """What small copies of the model can do; None if there is none that runs. Not a collective."""
    own = model.model.config._attn_implementation
    for made in small_copies(model.model, device, "eager" if own in FLASH else own):
        copied = WeightedSFTModel(made)
        copied.takes_packed_rows, copied.scored_by_text_model = model.takes_packed_rows, model.scored_by_text_model
        try:
            return _find(copied, device, max_token_len, packing, bool, EXACT)
        except UserError:
            raise
        except STOPS as error:
            log.debug("a copy of %s does not run: %s", type(made).__name__, error)
    return None


def _find(
    model: WeightedSFTModel,
    device: torch.device,
    max_token_len: int,
    packing: bool,
    all_true: Callable[[bool], bool],
    tolerance: Tolerance,
) -> RowLayouts:
    own, mode, config = model.model.config._attn_implementation, model.training, model.model.config.get_text_config()
    model.eval()
    packed, masks_reach = PACKED if own not in FLASH else own, []
    growing = [reach for reach in position_reaches(config) if reach < max_token_len]
    # checked before, since ZeRO-3 cannot recover from an exception inside a forward pass
    tries_packed = packing and model.takes_packed_rows and _takes_positions(model) and model.attend_by(packed)
    if tries_packed and packed == PACKED:
        few = torch.arange(8, device=device)
        run = functools.partial(model.run, few.unsqueeze(0) % model.vocab_size, few[1:], torch.zeros(7, device=device))
        masks_reach = learn_masks(model.model, run, max_token_len, device)
        model.attend_by(own)
    elif own in FLASH and getattr(config, "sliding_window", None):
        masks_reach = [min(config.sliding_window, max_token_len)]
    probe = _Probe(
        model, device, max_token_len, [*growing, *masks_reach, *_spans_in(config.to_dict(), max_token_len)], tolerance
    )
    probe.run_alone([*growing, *masks_reach], all_true)
    found = RowLayouts()
    if tries_packed:
        model.attend_by(packed)
        found.packs = all_true(probe.fits_packed())
    if found.packs and packed == PACKED:
        found.shares = all_true(probe.fits_shared())
    if not found.packs:
        model.attend_by(own)
    found.pads = found.packs or all_true(probe.fits_padded())
    model.train(mode)
    return found


class _Probe:
    """Three sequences, of which the first and the last have a common prefix. The first is longer than all `reaches`: windows of
    the model's masks, and lengths from which its position encodings change."""

    def __init__(
        self, model: WeightedSFTModel, device: torch.device, max_token_len: int, reaches: list[int], tolerance: Tolerance
    ):
        self._model, self._max_token_len, self._tolerance = model, max_token_len, tolerance
        longest = max(11, min(max([*reaches, 31]) + 9, max_token_len))
        self._lengths = [6, longest - 6, 8, 3]
        tokens = torch.arange(sum(self._lengths), device=device) * 7919 % model.vocab_size
        tokens[3::4] = tokens[:-3:4][: len(tokens[3::4])]  # repeated tokens: ties in top-k may depend on the row
        self._segments = prefix, first, other, second = tokens.split(self._lengths)
        self._sequences = [torch.cat([prefix, first]), other, torch.cat([prefix, second])]

    def run_alone(self, reaches: list[int], all_true: Callable[[bool], bool]) -> None:
        """Run each sequence by itself. UserError if logprobs depend on sequences that were run before, or on later tokens."""
        shorter, other = self._sequences[0][:-4], self._sequences[1]
        at_first = self._logps([shorter]) if reaches else None
        self._alone = [self._logps([sequence]) for sequence in reversed(self._sequences)][::-1]  # the longest last
        self._spread = torch.cat(self._alone).std()
        if reaches and not all_true(self._agree(self._logps([shorter]), [at_first])):
            raise UserError(
                f"the logits of {type(self._model.model).__name__} depend on sequences that were run before, as with rotary "
                f"embeddings that grow with the longest: set max_token_len to {min(reaches)}, from which on they do"
            )
        if not self._agree(self._logps([other[:-3]]), [self._alone[1][:-3]]):
            raise not_causal(self._model.model)

    def fits_packed(self) -> bool:
        return self._agree(self._logps(self._sequences, Layout.of(list(map(len, self._sequences)))), self._alone)

    def fits_shared(self) -> bool:
        found = self._logps(list(self._segments), Layout(tuple(self._lengths), (-1, 0, -1, 0)), slice(1, None))
        first, other, second = self._alone
        return self._agree(found, [first[-self._lengths[1] + 1 :], other, second[-self._lengths[3] + 1 :]])

    def fits_padded(self) -> bool:
        """All rows are padded, also the longest."""
        rows = torch.nn.utils.rnn.pad_sequence(self._sequences, batch_first=True)
        rows = torch.nn.functional.pad(rows, (0, max(0, min(9, self._max_token_len - rows.shape[1]))))
        trained = torch.zeros_like(rows, dtype=torch.bool)
        for row, sequence in zip(trained, self._sequences, strict=True):
            row[1 : len(sequence)] = True
        at = trained.flatten().nonzero().squeeze(1)
        return self._agree(self._model.run(rows, at, torch.zeros(len(at), device=rows.device)).logp_N, self._alone)

    def _logps(self, row: list[torch.Tensor], layout: Layout | None = None, scored: slice = slice(None)) -> torch.Tensor:
        """Logprobs of the scored segments of a row, from the second token of each."""
        ends = list(itertools.accumulate(map(len, row)))
        pairs = list(zip(ends, row, strict=True))[scored]
        at = torch.cat([torch.arange(end - len(segment) + 1, end) for end, segment in pairs]).to(row[0].device)
        packing = VarlenMetadata.of(layout).to(at.device) if layout else None
        return self._model.run(torch.cat(row).unsqueeze(0), at, torch.zeros(len(at), device=at.device), packing).logp_N

    def _agree(self, found: torch.Tensor, wanted: list[torch.Tensor]) -> bool:
        found = found.split([len(sequence) for sequence in wanted])
        differences = [self._tolerance.of((one - other).abs()) for one, other in zip(found, wanted, strict=True)]
        return bool(torch.stack(differences).max() < self._tolerance.share * self._spread)  # False for NaN


def _takes_positions(model: WeightedSFTModel) -> bool:
    parameters = inspect.signature(body_of(model.model).forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def not_causal(model: PreTrainedModel) -> UserError:
    return UserError(
        f"in {type(model).__name__} tokens attend to later tokens: wsft trains causal language models (if its config has "
        f"is_decoder, set it to true)"
    )


def _spans_in(config: dict[str, Any], most: int) -> list[int]:
    """Windows, chunks and the like below `most` tokens in a model's config, beyond which its attention may change."""
    named = {name: value for name, value in config.items() if _SPAN.search(str(name))}
    return [value for value in named.values() if type(value) is int and value < most]
