"""Weighted SFT from logits: the dense interface, and the reference that the chunked head is tested against.

    loss = reduce over trained tokens of  advantage * -log_softmax(logits / temperature)[token]

Knows nothing of HTTP, DeepSpeed or the run's config. It needs the full [B, T, V] logits; training uses `wsft.loss.head`, which
never materializes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from wsft.loss.advantages import NORMALIZATIONS, Shaping

REDUCTIONS = ("mean", "sequence_mean", "constant", "sum", "none")


class WeightedSFTInterface:
    """Loss-masked, advantage-weighted cross-entropy of next tokens.

    Mask and advantage are at the token's own position: logits at t-1 score token t, so position 0 is never trained. A token is
    trained if its mask is 1 and it is not `ignore_index`.

    Args:
        reduction: "mean" divides the sum by the number of trained tokens (also those of advantage 0; the loss is 0 if there are
            none); "sequence_mean" is the mean, over sequences with trained tokens, of their means; "constant" is the mean of
            their sums divided by `max_token_len`; "sum"; "none" returns [B, T], 0 where untrained.
        advantage_normalization: of the advantages of the trained tokens, in float64: see `advantages.Shaping`.
        temperature: one number, or one per sequence [B].
        ignore_index: a token that is never trained.
        max_token_len: the divisor of "constant".
    Raises:
        ValueError: an unknown name, or a temperature that is not above 0.
    """

    def __init__(
        self,
        reduction: str = "mean",
        advantage_normalization: str = "none",
        temperature: float | Sequence[float] | torch.Tensor = 1.0,
        ignore_index: int = -100,
        max_token_len: int | None = None,
    ):
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
        if (reduction == "constant") != (max_token_len is not None):
            raise ValueError(
                f"max_token_len is {max_token_len} with reduction {reduction!r}; expected a number with 'constant' only"
            )
        if advantage_normalization not in NORMALIZATIONS:
            expected = ", ".join(NORMALIZATIONS)
            raise ValueError(f"advantage_normalization is {advantage_normalization!r}; expected one of {expected}")
        self.temperature = torch.as_tensor(temperature, dtype=torch.float64).detach()
        if self.temperature.ndim > 1 or not ((self.temperature > 0) & self.temperature.isfinite()).all():
            raise ValueError(f"temperature is {temperature}; expected a finite number above 0, or one per sequence [B]")
        self.reduction = reduction
        self.advantage_normalization = advantage_normalization
        self.ignore_index = ignore_index
        self.max_token_len = max_token_len

    def compute_weighted_loss(
        self, logits: torch.Tensor, tokens: torch.Tensor, loss_masks: torch.Tensor, advantages: torch.Tensor
    ) -> dict[str, torch.Tensor | int]:
        """The loss of one batch, computed in float32, or in float64 where the logits are.

        Args:
            logits: [B, T, V], of any floating type. Those that score no trained token may hold anything, NaN included.
            tokens: [B, T] integers.
            loss_masks: [B, T] of bool or 0/1.
            advantages: [B, T]; or [B] or [B, 1], one per sequence (a 1-D tensor always is, even where B == T). Constants: no
                gradient flows to them.
        Returns:
            loss: a scalar, or [B, T] with reduction "none"; connected to the logits even where nothing is trained.
            num_tokens: the number of trained tokens, an int.
            token_logprobs: [B, T] detached log-probabilities under softmax(logits / temperature), 0 where untrained.
        Raises:
            ValueError: what was found and what was expected.
        """
        _check(logits, tokens, loss_masks, advantages, self.temperature)
        (B, T, V), dtype = logits.shape, torch.promote_types(logits.dtype, torch.float32)
        tokens = tokens.long()
        trained = loss_masks.bool() & (tokens != self.ignore_index)
        trained[:, :1] = False
        at = rows, columns = trained.nonzero(as_tuple=True)

        targets = tokens[at]
        _require((targets >= 0) & (targets < V), "tokens", targets, at, f"a token id in [0, {V})")
        advantages = advantages.detach().unsqueeze(1) if advantages.ndim == 1 else advantages.detach()
        weights = advantages.expand(B, T)[at]
        _require(weights.to(dtype).isfinite(), "advantages", weights, at, f"a finite {dtype} on every trained token")
        if self.advantage_normalization != "none":
            values_N = weights.double().cpu().numpy()
            shaped_N = Shaping(self.advantage_normalization).apply(values_N, np.ones(len(values_N), dtype=bool))
            weights = torch.from_numpy(shaped_N).to(weights.device)
        temperature = self.temperature.to(logits.device, dtype).expand(B)[rows]

        # The only shift. Computed for trained tokens only: a NaN elsewhere would reach the gradient as 0 * NaN.
        logits_NV = logits[rows, columns - 1].to(dtype) / temperature.unsqueeze(1)
        logprobs = logits_NV.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        terms = weights.to(dtype) * -logprobs

        zeros = torch.zeros(B, T, dtype=dtype, device=logits.device)
        loss = zeros.index_put(at, terms) if self.reduction == "none" else (terms / self._divisors(trained)[rows]).sum()
        return {"loss": loss, "num_tokens": len(terms), "token_logprobs": zeros.index_put(at, logprobs.detach())}

    def _divisors(self, trained: torch.Tensor) -> torch.Tensor:
        """The divisor of each sequence's tokens [B]."""
        tokens_B = trained.sum(1).clamp(min=1)
        sequences = trained.any(1).sum().clamp(min=1)
        match self.reduction:
            case "mean":
                return trained.sum().clamp(min=1).expand(len(trained))
            case "sequence_mean":
                return sequences * tokens_B
            case "constant":
                return (sequences * self.max_token_len).expand(len(trained))
        return torch.ones_like(tokens_B)


def _check(
    logits: torch.Tensor, tokens: torch.Tensor, loss_masks: torch.Tensor, advantages: torch.Tensor, temperature: torch.Tensor
) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits are {list(logits.shape)} of {logits.dtype}; expected [B, T, V] of a floating type")
    B, T, _ = logits.shape
    for name, tensor in {"tokens": tokens, "loss_masks": loss_masks}.items():
        if tensor.shape != (B, T):
            raise ValueError(f"{name} have shape {list(tensor.shape)}; expected [{B}, {T}], as logits {list(logits.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are of {tokens.dtype}; expected integers")
    if advantages.shape not in {(B, T), (B,), (B, 1)}:
        raise ValueError(f"advantages have shape {list(advantages.shape)}; expected [{B}, {T}], or [{B}] or [{B}, 1]")
    if temperature.ndim and len(temperature) != B:
        raise ValueError(f"there are {len(temperature)} temperatures; expected one number, or one for each of {B} sequences")
    neither = (loss_masks != 0) & (loss_masks != 1)
    if neither.any():
        raise ValueError(
            f"loss_masks hold {loss_masks[neither][0].item()}; expected bool, or 0 and 1 only. Labels (-100 or the token's "
            f"id, as Atropos sends them) are made into masks by AtroposBatchProcessor"
        )


def _require(good_N: torch.Tensor, name: str, values_N: torch.Tensor, at: tuple[torch.Tensor, ...], expected: str) -> None:
    if not good_N.all():
        i = int((~good_N).nonzero()[0])
        raise ValueError(f"{name}[{at[0][i]}, {at[1][i]}] is {values_N[i].item()}; expected {expected}")
