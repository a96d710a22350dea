"""Attention over packed rows: each sequence of a row attends to itself only, at the cost of the sum of squared lengths, not of
the squared length of the row. Sequences with a common prefix may share its segment, which is computed once.

Registered with transformers as `PACKED`. The layout is passed as a keyword argument and, if no prefix is shared, also as those
of transformers' flash attention (`cu_seq_lens_q`, ...). Without them a row is one sequence. Knows nothing of batches, losses or
ranks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from wsft.model.packing import VarlenMetadata

PACKED = "wsft_packed"
_PROBED = "wsft_packed_probed"  # the same, while `learn_masks` records which mask each layer is given
# tensor arguments that do not change the result; any other (sinks, biases, block tables) must not be ignored
_UNREAD = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True)
class Mask:
    """Which keys a query attends to, by position in the sequence.

    Attributes:
        window: the last so many keys, the query's own position included; None: all up to it.
        allows: instead of a window, transformers' mask function (batch, head, query, key) -> bool, broadcast over tensors.
        known: False for masks that packed attention cannot apply.
    """

    window: int | None = None
    allows: Callable[..., torch.Tensor] | None = None
    known: bool = True

    @classmethod
    def of(cls, allows: Callable[..., torch.Tensor], length: int, device: torch.device) -> Mask:
        """The mask that a mask function gives in sequences of up to `length` tokens."""
        keys = torch.arange(length, device=device)

        def row(query: int) -> torch.Tensor:
            return allows(0, 0, torch.tensor(query, device=device), keys).expand(length)

        try:
            seen = row(length - 1).nonzero()
            window = length - int(seen[0]) if len(seen) else 0
            queries = {*range(8), window - 1, window, window + 1, 2 * window, length // 2, length - 2, length - 1}
            rows = {q: row(q) for q in queries if 0 <= q < length}
        except (RuntimeError, IndexError, TypeError):  # a model's own function, which does not broadcast
            return cls(known=False)
        if all(torch.equal(found, (keys <= q) & (keys > q - window)) for q, found in rows.items()):
            return cls(None if window == length else window)
        return cls(allows=allows, known=not any(found[keys > q].any() for q, found in rows.items()))


def register() -> None:
    """Register `PACKED` as an `attn_implementation`. It gets no [T, T] masks: `learn_masks` examines them once instead."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(_PROBED, _probed_attention)
    AttentionMaskInterface.register(_PROBED, _probed_mask)


# Used by `learn_masks` only. Storage of a mask -> the mask (kept so that its storage is not reused), its function, its window;
# attention layer -> storages of the masks that it was given, None for no mask
_masks: dict[int, tuple[torch.Tensor, Callable[..., torch.Tensor], int | None]] = {}
_layers: dict[torch.nn.Module, set[int | None]] = {}


def learn_masks(model: PreTrainedModel, run: Callable[[], object], length: int, device: torch.device) -> list[int]:
    """Store in each attention layer, as `module.wsft_mask`, the mask that the model gives it in sequences of up to `length`
    tokens; `packed_attention` applies it. Returns the lengths beyond which a mask differs from the causal one.

    Args:
        run: a forward pass of a few tokens.
    """
    model.set_attn_implementation(_PROBED)
    run()
    model.set_attn_implementation(PACKED)
    found = {key: Mask.of(allows, length, device) for key, (_, allows, _) in _masks.items()}
    for layer, keys in _layers.items():
        masks = [Mask() if key is None else found.get(key, Mask(known=False)) for key in keys]
        layer.wsft_mask = masks[0] if len(masks) == 1 else Mask(known=False)
    reaches = [mask.window or _masks[key][2] or length for key, mask in found.items() if mask != Mask()]
    _masks.clear()
    _layers.clear()
    return [reach for reach in reaches if reach < length]


_SKIPS = (
    "allow_is_causal_skip",
    "allow_is_bidirectional_skip",
)  # would leave masks out


def _probed_mask(*args: object, mask_function: Callable, local_size: int | None = None, **kwargs: object) -> torch.Tensor:
    mask = sdpa_mask(*args, mask_function=mask_function, local_size=local_size, **kwargs | dict.fromkeys(_SKIPS, False))
    _masks[mask.data_ptr()] = mask, mask_function, local_size
    return mask


def _probed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    _layers.setdefault(module, set()).add(None if attention_mask is None else attention_mask.data_ptr())
    return packed_attention(module, query, key, value, None, **kwargs)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    wsft_varlen: VarlenMetadata | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention [B, T, heads, D] of query [B, heads, T, D], key and value [B, kv_heads, T, D].

    On a GPU in half precision it is one call of torch's variable-length flash attention, else one call of SDPA per sequence, in
    float32 on a CPU. Unsupported arguments give NaN, since ZeRO-3 cannot recover from an exception here: the caller tries a few
    tokens first (row_layouts.py). On the meta device, which has no NaN, they raise a ValueError.
    """
    mask = getattr(module, "wsft_mask", Mask(sliding_window))
    more = any(isinstance(value, torch.Tensor) and name not in _UNREAD for name, value in others.items())
    causal = others.get("is_causal") is not False and getattr(module, "is_causal", True)
    if more or attention_mask is not None or not causal or not mask.known:
        if query.device.type == "meta":
            raise ValueError("packed attention does not support these arguments")
        return query.new_full((*query.shape[:-1], value.shape[-1]), torch.nan).transpose(1, 2).contiguous(), None
    dtype = query.dtype
    if query.device.type == "cpu":  # as fast as bf16, faster for short sequences, and oneDNN compiles no kernel for each length
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    if wsft_varlen is None:
        return _sequence(query, key, value, scaling, dropout, mask, softcap).transpose(1, 2).to(dtype).contiguous(), None
    fits_flash = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    if _is_flash(query.device, dtype) and fits_flash and softcap is None and not dropout and not mask.allows:
        varlen_attn, takes_groups = _varlen_attn()
        window = (-1 if mask.window is None else mask.window - 1, 0)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if wsft_varlen.key_indices is not None:
            k, v = k[wsft_varlen.key_indices], v[wsft_varlen.key_indices]
        options = {"enable_gqa": q.shape[1] != k.shape[1]} if takes_groups else {}
        found = varlen_attn(
            q, k, v, wsft_varlen.cu_seqlens_q, wsft_varlen.cu_seqlens_k, wsft_varlen.max_seqlen_q, wsft_varlen.max_seqlen_k,
            scale=scaling, window_size=window, **options,
        )  # fmt: skip
        return found.unsqueeze(0).contiguous(), None
    # split, since the gradient of a slice is as large as the row
    qs, ks, vs = (x.split(wsft_varlen.layout.lengths, dim=2) for x in (query, key, value))
    parts = []
    for i, parent in enumerate(wsft_varlen.layout.parents):
        k, v = (x[i] if parent < 0 else torch.cat([x[parent], x[i]], dim=2) for x in (ks, vs))
        parts.append(_sequence(qs[i], k, v, scaling, dropout, mask, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2).to(dtype).contiguous(), None


@functools.cache
def _varlen_attn() -> tuple[Callable[..., torch.Tensor], bool]:
    """Torch's variable-length attention, and whether fewer heads of keys than of queries must be announced: torch 2.11 takes
    them without."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that `packed_attention` calls, for the log."""
    return "variable-length flash attention of torch" if _is_flash(device, dtype) else "torch's SDPA, sequence by sequence"


def _is_flash(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    mask: Mask,
    softcap: float | None,
) -> torch.Tensor:
    """Attention [B, heads, T, D] of the last T tokens of sequences, given the keys and values of all their tokens."""
    if query.device.type == "meta":
        return _Fused.apply(query, key, value)
    T, S, grouped = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    seen = None
    if softcap is not None or T < S or (mask.window or S) < S or mask.allows:
        places = torch.arange(S, device=query.device)
        queries = places[S - T :, None]
        seen = (places <= queries) & (places > queries - (mask.window or S))
        if mask.allows:
            seen = seen & mask.allows(0, 0, queries, places)
    if grouped and (softcap is not None or not _groups_heads(query.device, query.dtype, masked=seen is not None)):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, seen, dropout, is_causal=seen is None, scale=scaling, enable_gqa=grouped
        )
    scores = softcap * torch.tanh(query @ key.mT * (scaling or query.shape[-1] ** -0.5) / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _groups_heads(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether SDPA has a fused kernel for fewer heads of keys than of queries. On a GPU without cuDNN only flash attention has,
    which takes neither a mask nor float32; the others would materialize the scores."""
    return device.type != "cuda" or (not masked and dtype in (torch.bfloat16, torch.float16))


class _Fused(torch.autograd.Function):
    """Stands for fused attention on the meta device: it saves what a fused kernel saves for backward, where SDPA on that device
    would allocate the [T, T] scores (see memory.py)."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
