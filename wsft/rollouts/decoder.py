"""Atropos records -> validated rollouts. Malformed sequences are left out, counted and logged; they never end a run.

NumPy only: no torch, no HTTP, no ranks. `records.py` reads the fields.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from wsft.loss.advantages import FROM_SCORES, Override, from_scores, has_mean_above_0
from wsft.rollouts import records
from wsft.rollouts.chat import NOT_RENDERED, ChatRenderer, is_chat
from wsft.rollouts.records import Malformed, is_group

log = logging.getLogger(__name__)

# Why a sequence is left out.
REJECTED = (
    "record is not a group",
    "tokens are not a list of integers",
    "fewer than two tokens",
    "token id outside the vocabulary",
    "no mask",
    "mask length differs from tokens",
    "mask is neither labels nor 0/1",
    "override is neither true nor false",
    "advantages do not fit the tokens",
    "advantage of a trained token is not finite",
    "no finite score and no advantages",
    "teacher does not fit the tokens",
    "longer than max_token_len",
    "has images",
    NOT_RENDERED,
    "no token is trained",  # of a batch without other sequences
    "line is not JSON",
)
# Repairs of sequences that are trained.
REPAIRED = (
    "truncated to max_token_len",
    "trained without inference_logprobs: they do not fit the tokens",
    "trained without ref_logprobs: they do not fit the tokens",
    "trained at the run's temperature: its own is not a number above 0",
    "trained without weight_versions: they do not fit the tokens",
)
# Sequences that are as they should be, but have weight 0; said at the first.
NO_MEAN_ABOVE_0 = "of weight 0 with maxrl: alone in their group, or its mean score is not above 0"
CUT_OFF = "of weight 0 with mask_truncated: the sampler cut them off"
WITHOUT_WEIGHT = (NO_MEAN_ABOVE_0, CUT_OFF)
REASONS = REJECTED + REPAIRED + WITHOUT_WEIGHT
FAULTS_KEPT = 1000  # per reason and batch: a file may be nothing but faults


class Origin(NamedTuple):
    """Origin of a sequence: its record, the record's name in messages ("group 3", "line 17"), its index in the record."""

    record: Any
    name: str
    sequence: int | None  # None: the record itself

    def __str__(self) -> str:
        return self.name if self.sequence is None else f"{self.name}, sequence {self.sequence}"


class Fault(NamedTuple):
    origin: Origin
    detail: str  # what was found


@dataclass(frozen=True)
class Rollout:
    """One sequence. Values of [T] arrays are at the token's own position; position 0 is never trained.

    Values that the record lacks are NaN or -1; arrays of fields that the decoder does not read are empty.
    """

    tokens: np.ndarray  # [T] int64
    loss_mask: np.ndarray  # [T] bool
    advantages: np.ndarray  # [T] float64, 0 where untrained; before shaping and overrides
    behavior_logp: np.ndarray  # [T] float32, of the sampling policy
    ref_logp: np.ndarray  # [T] float32
    weight_versions: np.ndarray  # [T] float64, the trainer's step whose weights sampled the token
    teacher_sizes: np.ndarray  # [T] int64, the number of the teacher's entries
    teacher_ids: np.ndarray  # [sum of sizes] int64
    teacher_logp: np.ndarray  # [sum of sizes] float32
    override: Override
    temperature: float
    score: float
    env_id: int
    origin: Origin
    group: int = 0  # number of its group among all that were decoded


@dataclass
class Decoder:
    """Decodes records to rollouts, and counts what it leaves out.

    Args:
        max_token_len: longest sequence; None for any.
        overlong: "drop" or "truncate" longer ones.
        score_advantages: "group_norm", "group_center", "rloo", "maxrl" or "raw" (see `advantages.from_scores`).
        vocab_size: token ids must be below it; None for no limit.
        record_temperature: take a record's own temperature.
        end_tokens: sequences that the sampler cut off (see `records.is_cut_off`) have weight 0; None: they are as others.
        chat: renders records of messages without tokens; None: they are no groups.
        reads_behavior: say which records' inference_logprobs are of a part of the vocabulary only.
        reads_reference, reads_teacher: read ref_logprobs; distill_token_ids and distill_logprobs.
        group_sizes: largest record of each environment so far, see `_groups`.
    """

    max_token_len: int | None = None
    overlong: str = "drop"
    score_advantages: str = "group_norm"
    vocab_size: int | None = None
    record_temperature: bool = True
    end_tokens: frozenset[int] | None = None
    reads_behavior: bool = False
    chat: ChatRenderer | None = None
    reads_reference: bool = False
    reads_teacher: bool = False
    group_sizes: dict[int, int] = field(default_factory=dict)  # env_id -> sequences of its largest record so far
    rejected: Counter = field(default_factory=Counter, init=False)  # reason -> sequences, since it was last taken
    faults: dict[str, list[Fault]] = field(default_factory=dict, init=False)  # reason -> the first of them
    groups_so_far: int = field(default=0, init=False)  # of all batches
    said: set[str] = field(default_factory=set, init=False)  # what is logged once

    def __post_init__(self):
        for name, known in {"overlong": ("drop", "truncate"), "score_advantages": FROM_SCORES}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.max_token_len is not None and self.max_token_len < 2:
            raise ValueError(f"max_token_len is {self.max_token_len}, expected at least 2, or None for any length")

    def batch(self, found: list[Any], names: Sequence[str] | None = None) -> list[Rollout]:
        """The valid sequences of a batch of records, several of which may be parts of one group. `names` are for messages."""
        advantages = {}
        names = names or _numbered(found)
        found = self.rendered(found, names)
        groups = self._groups(found)
        for numbers in groups:
            of_group = self._score_advantages([found[n] for n in numbers], [names[n] for n in numbers])
            advantages |= zip(numbers, of_group, strict=True)
        number_of = {n: self.groups_so_far + number for number, numbers in enumerate(groups) for n in numbers}
        self.groups_so_far += len(groups)
        rows = [(n, r) for n, record in enumerate(found) for r in self._record(record, advantages[n], names[n])]
        return [replace(rollout, group=number_of[n]) for n, rollout in rows]

    def reject(self, reason: str, origin: Origin, detail: str) -> None:
        assert reason in REASONS, reason
        self.rejected[reason] += 1
        kept = self.faults.setdefault(reason, [])
        if len(kept) < FAULTS_KEPT:
            kept.append(Fault(origin, detail))

    def take_counts(self) -> np.ndarray:
        """Counts per reason, [len(REASONS)] int64, since the last call. Each reason is logged once, with its first example."""
        for reason, count in self.rejected.items():
            what = f"left out: {reason}" if reason in REJECTED else reason
            first = self.faults[reason][0]
            if reason in WITHOUT_WEIGHT:
                if reason in self.said:
                    continue
                self.said.add(reason)
                what += "; further ones are only counted"
            log.warning("%d sequence(s) %s (first: %s: %s)", count, what, first.origin, first.detail)
        counts = np.array([self.rejected[reason] for reason in REASONS], dtype=np.int64)
        self.forget()
        return counts

    def forget(self) -> None:
        self.rejected.clear()
        self.faults.clear()

    def rendered(self, found: list[Any], names: Sequence[str] | None = None) -> list[Any]:
        """The records, those of messages as groups of tokens; without any where they cannot be rendered."""
        return [self._rendered(record, name) for record, name in zip(found, names or _numbered(found), strict=True)]

    def _rendered(self, record: Any, name: str) -> Any:
        if self.chat is None or not is_chat(record):
            return record
        try:
            return self.chat.group(record)
        except Malformed as fault:
            self.reject(fault.reason, Origin(record, name, None), fault.detail)
            return {"tokens": []}

    def _groups(self, found: list[Any]) -> list[list[int]]:
        """Indices of the records of a batch, grouped: records that are parts of one group are together.

        The server holds a record that is smaller than its environment's group size until others of that environment complete
        it, and releases them together, in the order of arrival. The others may be of another prompt: parts of one group have
        the same env_id and prompt, each is smaller than a group, and together they are not larger than one. The group size is
        that in the record's group_overrides, else the largest record of the environment so far. If that is a single sequence,
        the size is unknown, and all records of one prompt in a batch are one group.
        """
        sizes = [len(record["tokens"]) if is_group(record) else 0 for record in found]
        for record, size in zip(found, sizes, strict=True):
            if size:
                env_id = records.env_id(record)
                self.group_sizes[env_id] = max(size, self.group_sizes.get(env_id, 0))
        groups: list[list[int]] = []
        incomplete: dict[Any, list[int]] = {}  # prompt -> its last group, while incomplete
        for number, (record, size) in enumerate(zip(found, sizes, strict=True)):
            prompt = records.prompt(record)
            whole = self._group_size(record) if prompt else 0
            if size >= whole:  # or without a prompt
                groups.append([number])
                continue
            group = incomplete.get(prompt, [])
            if group and sum(sizes[i] for i in group) + size <= whole:
                group.append(number)
            else:
                incomplete[prompt] = [number]
                groups.append(incomplete[prompt])
        return groups

    def _group_size(self, record: dict) -> float:
        stated, largest = records.group_size(record), self.group_sizes[records.env_id(record)]
        return stated or (largest if largest > 1 else math.inf)

    def _score_advantages(self, parts: list[Any], names: Sequence[str]) -> list[np.ndarray]:
        """For each record of one group, the advantages of its sequences, from the scores of the whole group."""
        sizes = [len(part["tokens"]) if is_group(part) else 0 for part in parts]
        places = [Origin(part, name, i) for part, name, size in zip(parts, names, sizes, strict=True) for i in range(size)]
        scores = np.array([records.score(record, i) for record, _, i in places])
        free = np.array([records.override(record, i) is Override.NONE for record, _, i in places], dtype=bool)
        counted = np.isfinite(scores) & free
        if self.score_advantages == "maxrl":
            self._look_at_maxrl(places, scores, counted)
        return np.split(from_scores(scores, counted, self.score_advantages), np.cumsum(sizes)[:-1])

    def _look_at_maxrl(self, places: list[Origin], scores: np.ndarray, counted: np.ndarray) -> None:
        """Count the sequences that get advantage 0 from their scores, and say which scores maxrl is not made for."""
        by_score = counted & [records.is_absent(record, i, "advantages") for record, _, i in places]
        if not has_mean_above_0(scores, counted):
            for n in np.flatnonzero(by_score):
                self.reject(NO_MEAN_ABOVE_0, places[n], f"found scores {records.short(scores[counted])}")
        strange = np.flatnonzero(by_score & ~np.isin(scores, (0, 1)))
        if len(strange) and "scores" not in self.said:
            self.said.add("scores")
            origin, found = places[strange[0]], scores[strange[0]]
            log.warning(
                "score_advantages maxrl is made for scores of 0 and 1 (arXiv:2602.02710), found %g in %s", found, origin
            )

    def _record(self, record: Any, score_advantages: np.ndarray, name: str) -> list[Rollout]:
        if not is_group(record):
            found = f"expected an object with a list of tokens, found {records.short(record)}"
            self.reject("record is not a group", Origin(record, name, None), found)
            return []
        rollouts = []
        for i, advantage in enumerate(score_advantages):
            origin = Origin(record, name, i)
            try:
                rollouts.append(self._rollout(origin, advantage))
            except Malformed as fault:
                self.reject(fault.reason, origin, fault.detail)
        return rollouts

    def _rollout(self, origin: Origin, score_advantage: float) -> Rollout:
        group, _, i = origin
        tokens = records.tokens(group, i, self.vocab_size)
        trained = records.loss_mask(group, i, tokens)
        if records.has_images(group, i):
            raise Malformed("has images", "wsft trains on text: their placeholder tokens alone would be trained on")
        override = records.override(group, i)
        if override is None:
            raise Malformed("override is neither true nor false", "set_advantage_to_zero and sft must be true, false or null")
        free = override is Override.NONE
        if free and self.end_tokens is not None and records.is_cut_off(group, i, tokens, trained, self.end_tokens):
            override = Override.CUT_OFF
            self.reject(CUT_OFF, origin, f"ends with token {tokens[-1]} after {len(tokens)} tokens")
        advantages = records.advantages(group, i, score_advantage, trained) if free else np.zeros(len(tokens))
        sizes, ids, logp = records.teacher(group, i, trained, self.vocab_size) if self.reads_teacher else _NO_TEACHER
        limit = len(tokens) if self.max_token_len is None else self.max_token_len
        if len(tokens) > limit:
            detail = f"{len(tokens)} tokens, max_token_len {limit}"
            if self.overlong == "drop":
                raise Malformed("longer than max_token_len", detail)
            self.reject("truncated to max_token_len", origin, detail)
        unknown = np.full(len(tokens), np.nan, dtype=np.float32)
        if self.reads_behavior and "sampling" not in self.said:
            self._look_at_sampling(origin)
        behavior_logp = self._mended(origin, unknown, records.logps, group, i, "inference_logprobs", trained)
        ref_logp = _NO_TEACHER[2]
        if self.reads_reference:
            ref_logp = self._mended(origin, unknown, records.logps, group, i, "ref_logprobs", trained)
        temperature = self._mended(origin, math.nan, records.temperature, group, i) if self.record_temperature else math.nan
        versions = self._mended(origin, unknown, records.weight_versions, group, i, len(tokens))
        entries = int(sizes[:limit].sum())
        return Rollout(
            tokens=tokens[:limit],
            loss_mask=trained[:limit],
            advantages=advantages[:limit],
            behavior_logp=behavior_logp[:limit],
            ref_logp=ref_logp[:limit],
            weight_versions=versions[:limit],
            teacher_sizes=sizes[:limit],
            teacher_ids=ids[:entries],
            teacher_logp=logp[:entries],
            override=override,
            temperature=temperature,
            score=records.score(group, i),
            env_id=records.env_id(group),
            origin=origin,
        )

    def _look_at_sampling(self, origin: Origin) -> None:
        """Say, once, that ratios are off by a factor on every token."""
        found = records.cuts_vocabulary(origin.record, origin.sequence)
        if found and not records.is_absent(origin.record, origin.sequence, "inference_logprobs"):
            self.said.add("sampling")
            log.warning(
                "%s was sampled with %s: if its inference_logprobs are those of the tokens that were left, the ratio of each "
                "token is the share of probability that they had, and a product over a long sequence is near 0. Sample without "
                "it, or leave out what uses the ratio", origin, found,
            )  # fmt: skip

    def _mended(self, origin: Origin, instead: Any, read: Callable, *args: Any) -> Any:
        """The result of `read`; if it is malformed, `instead`, and it is counted."""
        try:
            return read(*args)
        except Malformed as fault:
            self.reject(fault.reason, origin, fault.detail)
            return instead


def _numbered(found: list[Any]) -> list[str]:
    return [f"group {n}" for n in range(len(found))]


_NO_TEACHER = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
