"""Batches of rollouts as flat arrays, and their rows of tensors, padded or packed. Pure and deterministic.

Knows nothing of ranks, networks or models.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wsft.loss.advantages import NORMALIZATIONS, ZEROS, Override, Shaping, override
from wsft.loss.corrections import Corrections
from wsft.loss.objectives import Objective
from wsft.loss.terms import LossSettings, TokenTerms
from wsft.model.packing import Layout, Prefixes
from wsft.rollouts.decoder import REASONS, Decoder, Rollout

_OF_ROLLOUTS = ("lengths", "overrides", "temperatures", "scores", "env_ids", "groups")
REDUCTIONS = ("mean", "sequence_mean", "constant", "sum")


@dataclass(frozen=True)
class Batch:
    """R rollouts with N tokens in total, concatenated. The same on every rank; each field is sent as one message."""

    tokens: np.ndarray  # [N] int64
    loss_mask: np.ndarray  # [N] bool
    advantages: np.ndarray  # [N] float64
    behavior_logp: np.ndarray  # [N] float32, NaN where there is none
    ref_logp: np.ndarray  # [N] float32, NaN where there is none; [0] if not read
    weight_versions: np.ndarray  # [N] float64, the step whose weights sampled it; NaN if unknown
    teacher_sizes: np.ndarray  # [N] int64, number of the teacher's entries per token; [0] if not read
    teacher_ids: np.ndarray  # [sum of teacher_sizes] int64
    teacher_logp: np.ndarray  # [sum of teacher_sizes] float32
    lengths: np.ndarray  # [R] int64
    overrides: np.ndarray  # [R] int64, advantages.Override
    temperatures: np.ndarray  # [R] float64, NaN where the record has none
    scores: np.ndarray  # [R] float64, NaN where the record has none
    env_ids: np.ndarray  # [R] int64, -1 where the record has none
    groups: np.ndarray  # [R] int64, those of one group have the same number
    counts: np.ndarray  # [len(decoder.REASONS)] int64, sequences left out before

    @classmethod
    def of(cls, rollouts: list[Rollout], counts: np.ndarray) -> Batch:
        def flat(name: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.zeros(0, dtype), *(getattr(r, name) for r in rollouts)])

        def each(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(r, name) for r in rollouts], dtype=dtype)

        return cls(
            tokens=flat("tokens", np.int64),
            loss_mask=flat("loss_mask", np.bool_),
            advantages=flat("advantages", np.float64),
            behavior_logp=flat("behavior_logp", np.float32),
            ref_logp=flat("ref_logp", np.float32),
            weight_versions=flat("weight_versions", np.float64),
            teacher_sizes=flat("teacher_sizes", np.int64),
            teacher_ids=flat("teacher_ids", np.int64),
            teacher_logp=flat("teacher_logp", np.float32),
            lengths=np.array([len(r.tokens) for r in rollouts], dtype=np.int64),
            overrides=each("override", np.int64),
            temperatures=each("temperature", np.float64),
            scores=each("score", np.float64),
            env_ids=each("env_id", np.int64),
            groups=np.unique(each("group", np.int64), return_inverse=True)[1].astype(np.int64),
            counts=counts,
        )

    @classmethod
    def empty(cls) -> Batch:
        return cls.of([], np.zeros(len(REASONS), dtype=np.int64))

    @classmethod
    def joined(cls, parts: Iterable[Batch]) -> Batch:
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        fields = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(cls)}
        counts = sum(fields.pop("counts"))
        numbers = np.cumsum([0, *(part.groups.max(initial=-1) + 1 for part in parts)])
        fields["groups"] = [part.groups + first for part, first in zip(parts, numbers, strict=False)]
        return cls(counts=counts, **{name: np.concatenate(arrays) for name, arrays in fields.items()})

    @property
    def num_trained(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def rejected(self) -> dict[str, int]:
        """Sequences left out (or truncated), by reason."""
        return {reason: int(n) for reason, n in zip(REASONS, self.counts, strict=True) if n}

    def spans(self) -> list[slice]:
        """Slices of the rollouts in the flat arrays."""
        return self._spans

    @functools.cached_property
    def _spans(self) -> list[slice]:
        ends = np.cumsum(self.lengths)
        return [slice(*span) for span in zip((ends - self.lengths).tolist(), ends.tolist(), strict=True)]

    @functools.cached_property
    def trained_tokens(self) -> np.ndarray:
        """Trained tokens of each rollout, [R] int64."""
        before_N = np.concatenate([[0], np.cumsum(self.loss_mask)])
        ends_R = np.cumsum(self.lengths)
        return before_N[ends_R] - before_N[ends_R - self.lengths]

    def trained_positions(self, rows: list[int]) -> np.ndarray:
        """Indices in the flat arrays of the trained tokens of these rollouts, in their order, int64."""
        spans = self.spans()
        at = [spans[i].start + np.flatnonzero(self.loss_mask[spans[i]]) for i in rows]
        return np.concatenate([np.zeros(0, np.int64), *at])

    def minibatches(self, number: int) -> list[Batch]:
        """This batch in disjoint parts of whole groups and about as many sequences. Its counts are those of the first part."""
        if number == 1:
            return [self]
        ids, sizes = np.unique(self.groups, return_counts=True)
        part_of, filled = {}, np.zeros(number, dtype=np.int64)
        for i in np.argsort(-sizes, kind="stable"):  # the largest first
            part_of[ids[i]] = filled.argmin()
            filled[part_of[ids[i]]] += sizes[i]
        part_R = np.array([part_of[group] for group in self.groups], dtype=np.int64)
        parts = [self._of_rows(part_R == part) for part in range(number)]
        none = np.zeros_like(self.counts)
        return [dataclasses.replace(part, counts=self.counts if i == 0 else none) for i, part in enumerate(parts)]

    def _of_rows(self, chosen_R: np.ndarray) -> Batch:
        chosen_N = np.repeat(chosen_R, self.lengths)
        chosen_entries = np.repeat(chosen_N, self.teacher_sizes) if len(self.teacher_sizes) else chosen_N[:0]
        chosen = dict.fromkeys(_OF_ROLLOUTS, chosen_R) | dict.fromkeys(("teacher_ids", "teacher_logp"), chosen_entries)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(
            **{name: x[chosen.get(name, chosen_N)] if len(x) and name != "counts" else x for name, x in fields.items()}
        )

    def prefixes(self, rows: Iterable[int]) -> Prefixes:
        """Common prefixes of these rollouts."""
        return Prefixes.of(self.tokens, self.loss_mask, self.lengths, rows)

    def stale(self, step: int, max_staleness: int | None) -> np.ndarray | None:
        """Bool [N]: tokens sampled more than `max_staleness` optimizer steps before `step`; not those of unknown version.
        None if there is no limit."""
        return None if max_staleness is None else step - self.weight_versions > max_staleness

    def of_weight(self, objective: Objective, corrections: Corrections, stale_N: np.ndarray | None) -> Batch:
        """This batch with the loss mask cleared where the weight is certainly 0. Does not change the loss if called after
        `scales` and with final advantages."""
        sft_N = np.repeat(self.overrides == Override.SFT, self.lengths)
        zero_weight_N = np.repeat(np.isin(self.overrides, ZEROS), self.lengths)
        if stale_N is not None:
            zero_weight_N = zero_weight_N | (stale_N & ~sft_N)
        if objective.zero_weight_without_advantage:
            zero_weight_N = zero_weight_N | (self.advantages == 0)
        left = dataclasses.replace(self, loss_mask=self.loss_mask & ~zero_weight_N)
        if objective.of_sequences or corrections.of_sequences:  # they need all trained tokens of a sequence, or none
            whole_N = np.repeat(left.trained_tokens > 0, self.lengths)
            left = dataclasses.replace(self, loss_mask=self.loss_mask & whole_N)
        return left

    def with_final_advantages(self, shaping: Shaping) -> Batch:
        """Advantages shaped over the trained, not overridden tokens of this whole batch, then overridden."""
        overrides = np.repeat(self.overrides, self.lengths)
        advantages = shaping.apply(self.advantages, self.loss_mask & (overrides == Override.NONE))
        advantages = np.where(self.loss_mask, override(advantages, overrides), 0.0)
        return dataclasses.replace(self, advantages=advantages)

    def scales(self, reduction: str, max_token_len: int) -> np.ndarray:
        """Factor of the loss of each rollout's tokens, [R] float64. S is the number of rollouts with trained tokens. Rollouts
        that were cut off (`Override.CUT_OFF`) do not count, and have factor 0.

        mean: 1 / trained tokens of the batch. sequence_mean: 1 / (S * the rollout's trained tokens), the mean of the rollouts'
        means, as in GRPO. constant: 1 / (S * max_token_len), as in Dr. GRPO (arXiv:2503.20783). sum: 1.
        """
        counts = self.overrides != Override.CUT_OFF
        trained = np.where(counts, self.trained_tokens, 0)
        sequences = max(int((trained > 0).sum()), 1)
        divisors = {
            "mean": max(int(trained.sum()), 1),
            "sequence_mean": sequences * np.maximum(trained, 1),
            "constant": sequences * max_token_len,
            "sum": 1,
        }
        return np.where(counts, 1 / np.asarray(divisors[reduction], dtype=np.float64), 0.0)


class AtroposBatchProcessor:
    """Turns what `GET /batch` returns into tensors.

    Args:
        pad_token_id: pads rows to the longest one. Any valid id will do, since padding is neither trained nor attended to. 0 is
            valid in every model; a tokenizer's pad token may be outside of the model's embedding.
        advantage_normalization, advantage_clip, negative_advantage_scale: see `advantages.Shaping`; over the trained tokens
            of the whole batch.
        decoding: see `decoder.Decoder`.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        advantage_normalization: str = "none",
        advantage_clip: float | None = None,
        negative_advantage_scale: float = 1.0,
        **decoding: Any,
    ):
        if advantage_normalization not in NORMALIZATIONS:
            expected = ", ".join(NORMALIZATIONS)
            raise ValueError(f"advantage_normalization is {advantage_normalization!r}, expected one of {expected}")
        self.pad_token_id = pad_token_id
        self.shaping = Shaping(advantage_normalization, advantage_clip, negative_advantage_scale)
        self.decoder = Decoder(**decoding)

    def process_atropos_batch(self, groups: list[dict]) -> Batch:
        """Decode and validate groups; advantages are final. Malformed sequences are left out and counted in `.rejected`.

        Raises:
            ValueError: if `groups` is not a list (None from `{"batch": null}` means: poll again).
        """
        if not isinstance(groups, list):
            raise ValueError(f"expected the list under 'batch' of GET /batch, found {type(groups).__name__}")
        return self.decode(groups).with_final_advantages(self.shaping)

    def decode(self, groups: list[dict]) -> Batch:
        """Like `process_atropos_batch`, but without shaping and overrides, which need the global batch."""
        return Batch.of(self.decoder.batch(groups), self.decoder.take_counts())

    def to_tensors(self, processed: Batch, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Padded rows, all [B, T]: tokens int64, loss_masks bool, advantages float32, attention_mask bool, and
        inference_logprobs float32, NaN where there is none."""
        rows = range(len(processed.lengths))
        return {name: tensor.to(device) for name, tensor in pad(processed, rows, self.pad_token_id).items()}


def pad(batch: Batch, rows: Iterable[int], pad_token_id: int, shortest: int = 2) -> dict[str, torch.Tensor]:
    """The given rollouts as right-padded rows, all [B, T]. Without rollouts, one untrained row, see `_untrained`.

    T is at least `shortest`: some models treat an input of one token as a step of generation."""
    spans = batch.spans()
    spans = [spans[i] for i in rows] or [slice(0, 0)]
    shape = len(spans), max(shortest, *(s.stop - s.start for s in spans))
    padded = {
        "tokens": torch.full(shape, pad_token_id, dtype=torch.int64),
        "loss_masks": torch.zeros(shape, dtype=torch.bool),
        "advantages": torch.zeros(shape, dtype=torch.float32),
        "inference_logprobs": torch.full(shape, math.nan, dtype=torch.float32),
        "attention_mask": torch.zeros(shape, dtype=torch.bool),
    }
    if spans == [slice(0, 0)]:
        padded["tokens"][0] = _untrained(batch, shape[1], pad_token_id)
    for b, span in enumerate(spans):
        n = span.stop - span.start
        padded["tokens"][b, :n] = torch.from_numpy(batch.tokens[span])
        padded["loss_masks"][b, :n] = torch.from_numpy(batch.loss_mask[span])
        padded["advantages"][b, :n] = torch.from_numpy(batch.advantages[span])
        padded["inference_logprobs"][b, :n] = torch.from_numpy(batch.behavior_logp[span])
        padded["attention_mask"][b, :n] = True
    return padded


def _untrained(batch: Batch, length: int, pad_token_id: int) -> torch.Tensor:
    """Tokens for a rank that has no rollouts: the first of the batch. The embedding of a pad token may be 0, where the
    derivative of a norm is infinite: times a gradient of 0 it would be NaN (Gemma 3n)."""
    tokens = torch.full((length,), pad_token_id, dtype=torch.int64)
    first = torch.from_numpy(batch.tokens[:length])
    tokens[: len(first)] = first
    return tokens


def pack(batch: Batch, rows: list[int], pad_token_id: int, prefixes: Prefixes) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    """The given rollouts in one row: tokens [1, T] int64, flat positions of the trained ones [N], the layout.

    Neighbours of one cluster share a prefix segment. Without rollouts, two untrained tokens.
    """
    spans, segments, parents = batch.spans(), [], []
    for _, neighbours in itertools.groupby(rows, key=lambda i: prefixes.clusters[i]):
        cluster, parent = list(neighbours), -1
        n = int(prefixes.lengths[cluster[0]]) if len(cluster) > 1 else 0
        if n:
            parent, start = len(segments), spans[cluster[0]].start
            segments.append(slice(start, start + n))
            parents.append(-1)
        segments += [slice(spans[i].start + n, spans[i].stop) for i in cluster]
        parents += [parent] * len(cluster)
    if not segments:
        return _untrained(batch, 2, pad_token_id).unsqueeze(0), torch.zeros(0, dtype=torch.int64), Layout.of([2])
    tokens, trained = (np.concatenate([field[segment] for segment in segments]) for field in (batch.tokens, batch.loss_mask))
    layout = Layout(tuple(segment.stop - segment.start for segment in segments), tuple(parents))
    return torch.from_numpy(tokens).unsqueeze(0), torch.from_numpy(np.flatnonzero(trained)), layout


def token_terms(
    batch: Batch,
    rows: list[int],
    scales_R: np.ndarray,
    settings: LossSettings,
    stale_N: np.ndarray | None = None,
    prox_logp_N: np.ndarray | None = None,
) -> TokenTerms:
    """Loss inputs of the trained tokens of the given rollouts, in order.

    Args:
        stale_N: bool for each token of the batch, see `Batch.stale`; None: none is.
        prox_logp_N: for each token of the batch its logprob at the start of the batch; None: the current one.
    """
    at_N = batch.trained_positions(rows)
    row_N = np.repeat(np.array(rows, dtype=np.int64), batch.trained_tokens[rows])

    def float32(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))

    fixed_R = np.select([np.isin(batch.overrides, ZEROS), batch.overrides == Override.SFT], [0.0, 1.0], np.nan)
    temperatures_R = np.where(np.isnan(batch.temperatures), settings.temperature, batch.temperatures)
    coefficients = settings.coefficients
    terms = TokenTerms(
        objective=settings.objective,
        coefficients=coefficients,
        scale_N=float32(scales_R[row_N]),
        advantages_N=float32(batch.advantages[at_N]),
        behavior_logp_N=float32(batch.behavior_logp[at_N]),
        fixed_weights_N=float32(fixed_R[row_N]),
        temperature_N=float32(temperatures_R[row_N]),
        sequence_N=torch.from_numpy(np.unique(row_N, return_inverse=True)[1].astype(np.int64)),
        corrections=settings.corrections,
        stale_N=None if stale_N is None else torch.from_numpy(stale_N[at_N]),
        prox_logp_N=None if prox_logp_N is None else float32(prox_logp_N[at_N]),
    )
    if coefficients.kl and len(batch.ref_logp):  # else computed by a reference model
        terms = dataclasses.replace(terms, ref_logp_N=float32(batch.ref_logp[at_N]))
    if coefficients.distill:
        ids_NK, probs_NK = _teacher(batch, at_N, coefficients.renormalize)
        terms = dataclasses.replace(terms, teacher_ids_NK=torch.from_numpy(ids_NK), teacher_probs_NK=float32(probs_NK))
    return terms


def _teacher(batch: Batch, at_N: np.ndarray, renormalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's entries at the given flat positions: ids and probabilities [N, K], padded with probability 0."""
    sizes_N = batch.teacher_sizes[at_N]
    K = max(1, sizes_N.max(initial=0))
    there_NK = np.arange(K) < sizes_N[:, None]
    starts_N = (np.cumsum(batch.teacher_sizes) - batch.teacher_sizes)[at_N]
    from_NK = (starts_N[:, None] + np.arange(K))[there_NK]
    ids_NK, probs_NK = np.zeros(there_NK.shape, np.int64), np.zeros(there_NK.shape)
    ids_NK[there_NK], probs_NK[there_NK] = batch.teacher_ids[from_NK], np.exp(batch.teacher_logp[from_NK].astype(np.float64))
    if renormalize:
        probs_NK /= np.maximum(probs_NK.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    return ids_NK, probs_NK
