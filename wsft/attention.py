"""Attention over packed rows: several sequences stand in one row, each sees itself alone, and the cost is the sum of their
squares, not the square of the row.

Registered with transformers as `PACKED`; where the sequences begin travels as the keywords that its flash attention takes
(`cu_seq_lens_q`, `max_length_q`). Without them a row is one sequence. Knows nothing of batches, losses or ranks.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "wsft_packed"
# what some models add to attention, and this one does not: it must not be passed over
_UNKNOWN = ("s_aux", "position_bias")


def register() -> None:
    """Make `PACKED` a name for `attn_implementation`. It wants no mask: causality and borders are its own."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def borders(lengths: list[int], device: torch.device) -> dict[str, torch.Tensor | int]:
    """The keywords that say where sequences of these lengths begin in a row of their sum, and the position of each token."""
    sizes = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    positions = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(sizes)
    starts, longest = starts.to(device), max(lengths)
    return {
        "position_ids": positions.unsqueeze(0).to(device),
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


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
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention [B, T, heads, D] of query [B, heads, T, D], key and value [B, kv_heads, T, D].

    On a GPU, in half precision, one call of torch's variable-length flash attention; else a call of SDPA per sequence. What it
    does not know gives NaN, at which whoever tries it sees that it will not do: ZeRO-3 does not survive an exception here.
    """
    if any(others.get(name) is not None for name in _UNKNOWN) or not getattr(module, "is_causal", True):
        return torch.full_like(query, torch.nan).transpose(1, 2), None
    if cu_seq_lens_q is None:
        return _sequence(query, key, value, scaling, dropout, sliding_window, softcap).transpose(1, 2), None
    if _is_flash(query.device, query.dtype) and query.shape[-1] <= 256 and softcap is None and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        found = varlen_attn(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return found.unsqueeze(0), None
    starts = cu_seq_lens_q.tolist()
    parts = [
        _sequence(*(x[:, :, a:b] for x in (query, key, value)), scaling, dropout, sliding_window, softcap)
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What `packed_attention` calls, in words."""
    return "variable-length flash attention of torch" if _is_flash(device, dtype) else "torch's SDPA, sequence by sequence"


def _is_flash(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B, heads, T, D] of whole sequences."""
    if query.device.type == "meta":
        return _Fused.apply(query, key, value)
    T, grouped = query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if softcap is not None or (sliding_window is not None and sliding_window < T):
        distance = torch.arange(T, device=query.device)[:, None] - torch.arange(T, device=query.device)
        mask = (distance >= 0) & (distance < (sliding_window or T))
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scaling or query.shape[-1] ** -0.5) / softcap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


class _Fused(torch.autograd.Function):
    """What fused attention keeps for its backward pass: where there are only sizes, SDPA would show the T x T scores of the
    unfused one (see memory.py)."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
