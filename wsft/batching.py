"""Batches as flat arrays, padded rows, and the plan by which ranks share them. Pure and deterministic.

Knows nothing of ranks (it takes their number and returns every share), of networks, of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from wsft import advantages as adv
from wsft.groups import REASONS, Decoder, Rollout


@dataclass(frozen=True)
class Batch:
    """R rollouts of N tokens in all, end to end. The same on every rank; each field travels as one message."""

    tokens: np.ndarray  # [N] int64
    loss_mask: np.ndarray  # [N] bool
    advantages: np.ndarray  # [N] float64
    lengths: np.ndarray  # [R] int64
    overrides: np.ndarray  # [R] int64, advantages.Override
    counts: np.ndarray  # [len(groups.REASONS)] int64, what was left out on the way here

    @classmethod
    def of(cls, rollouts: list[Rollout], counts: np.ndarray) -> Batch:
        def flat(name: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.zeros(0, dtype), *(getattr(r, name) for r in rollouts)])

        return cls(
            tokens=flat("tokens", np.int64),
            loss_mask=flat("loss_mask", np.bool_),
            advantages=flat("advantages", np.float64),
            lengths=np.array([len(r.tokens) for r in rollouts], dtype=np.int64),
            overrides=np.array([r.override for r in rollouts], dtype=np.int64),
            counts=counts,
        )

    @classmethod
    def empty(cls) -> Batch:
        return cls.of([], np.zeros(len(REASONS), dtype=np.int64))

    @classmethod
    def joined(cls, parts: Iterable[Batch]) -> Batch:
        parts = list(parts)
        fields = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(cls)}
        counts = sum(fields.pop("counts"))
        return cls(counts=counts, **{name: np.concatenate(arrays) for name, arrays in fields.items()})

    @property
    def num_trained(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def rejected(self) -> dict[str, int]:
        """Sequences left out (or truncated), by reason."""
        return {reason: int(n) for reason, n in zip(REASONS, self.counts, strict=True) if n}

    def spans(self) -> list[slice]:
        """Where each rollout lies in the flat arrays."""
        ends = np.cumsum(self.lengths)
        return [slice(int(end - n), int(end)) for end, n in zip(ends, self.lengths, strict=True)]

    def with_final_advantages(self, normalization: str) -> Batch:
        """Advantages normalised over the trained, not overridden tokens of this whole batch, then overridden."""
        overrides = np.repeat(self.overrides, self.lengths)
        advantages = self.advantages
        if normalization == "batch":
            advantages = adv.normalize(advantages, self.loss_mask & (overrides == adv.Override.NONE))
        advantages = np.where(self.loss_mask, adv.override(advantages, overrides), 0.0)
        return dataclasses.replace(self, advantages=advantages)


class AtroposBatchProcessor:
    """Turns what `GET /batch` returns into tensors.

    Args:
        pad_token_id: fills rows to the longest one.
        max_token_len, overlong, score_advantages, vocab_size: see `groups.Decoder`.
        advantage_normalization: "none", or "batch": over the trained tokens of the whole batch.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        max_token_len: int | None = None,
        overlong: str = "drop",
        score_advantages: str = "group_norm",
        advantage_normalization: str = "none",
        vocab_size: int | None = None,
    ):
        for name, value, known in (
            ("overlong", overlong, ("drop", "truncate")),
            ("score_advantages", score_advantages, ("group_norm", "group_center", "raw")),
            ("advantage_normalization", advantage_normalization, ("none", "batch")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        if max_token_len is not None and max_token_len < 2:
            raise ValueError(f"max_token_len is {max_token_len}, expected at least 2, or None for any length")
        self.pad_token_id = pad_token_id
        self.advantage_normalization = advantage_normalization
        self.decoder = Decoder(max_token_len, overlong, score_advantages, vocab_size)

    def process_atropos_batch(self, groups: list[dict]) -> Batch:
        """Validated rollouts with final advantages. Malformed sequences are left out and counted in `.rejected`.

        Raises:
            ValueError: if `groups` is no list of groups at all (the server's `{"batch": null}` gives None: poll again).
        """
        if not isinstance(groups, list):
            raise ValueError(f"expected the list under 'batch' of GET /batch, found {type(groups).__name__}")
        return self.decode(groups).with_final_advantages(self.advantage_normalization)

    def decode(self, groups: list[dict]) -> Batch:
        """As `process_atropos_batch`, without normalisation and overrides, which need the global batch."""
        rollouts = [r for i, group in enumerate(groups) for r in self.decoder.group(group, f"group {i}")]
        return Batch.of(rollouts, self.decoder.take_counts())

    def to_tensors(self, processed: Batch, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Padded rows, all [B, T]: tokens int64, loss_masks bool, advantages float32, attention_mask bool."""
        rows = range(len(processed.lengths))
        return {name: tensor.to(device) for name, tensor in pad(processed, rows, self.pad_token_id).items()}


def pad(batch: Batch, rows: Iterable[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The given rollouts as right-padded rows, all [B, T]; no rollout gives one row of one pad token, trained nowhere."""
    spans = batch.spans()
    spans = [spans[i] for i in rows] or [slice(0, 0)]
    shape = len(spans), max(1, *(s.stop - s.start for s in spans))
    padded = {
        "tokens": torch.full(shape, pad_token_id, dtype=torch.int64),
        "loss_masks": torch.zeros(shape, dtype=torch.bool),
        "advantages": torch.zeros(shape, dtype=torch.float32),
        "attention_mask": torch.zeros(shape, dtype=torch.bool),
    }
    for b, span in enumerate(spans):
        n = span.stop - span.start
        padded["tokens"][b, :n] = torch.from_numpy(batch.tokens[span])
        padded["loss_masks"][b, :n] = torch.from_numpy(batch.loss_mask[span])
        padded["advantages"][b, :n] = torch.from_numpy(batch.advantages[span])
        padded["attention_mask"][b, :n] = True
    return padded


def plan_shares(lengths: np.ndarray, num_ranks: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """shares[rank][micro_batch] = the rollouts of one forward pass; the same number of micro-batches on every rank.

    Rollouts go, longest first, to the rank with the fewest tokens so far; within a rank neighbours in length share a
    micro-batch of at most `micro_batch_tokens` tokens, padding included. A longer rollout goes alone. Ranks that end up
    with fewer micro-batches get empty ones, which still run (zero weight), for ZeRO-3 needs all ranks in every forward.
    """
    loads, shares = np.zeros(num_ranks, dtype=np.int64), [[] for _ in range(num_ranks)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        rank = int(np.argmin(loads))
        loads[rank] += lengths[i]
        micro_batches = shares[rank]
        # the first rollout of a micro-batch is its longest
        if micro_batches and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= micro_batch_tokens:
            micro_batches[-1].append(i)
        else:
            micro_batches.append([i])
    most = max(1, *map(len, shares))
    return [share + [[]] * (most - len(share)) for share in shares]
