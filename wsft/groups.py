"""Atropos records -> validated rollouts. What is malformed is left out, counted and named; it never ends a run.

NumPy only: no torch, no HTTP, no ranks. The record format and every fault handled here were seen on the real server.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from wsft.advantages import Override, from_scores

log = logging.getLogger(__name__)

IGNORED = -100  # the label of an untrained token in Atropos masks
_FLOAT32_MAX = float(np.finfo(np.float32).max)

# Why a sequence is left out (all but "truncated": that one is trained, shortened).
REASONS = (
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
    "longer than max_token_len",
    "line is not JSON",
    "truncated",
)


def parse_json(text: bytes) -> Any:
    """JSON as producers of records write it: also NaN and integers of any size, which orjson refuses. ValueError otherwise."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            return json.loads(text)
        except RecursionError as error:  # orjson's limit is 1,024 levels, this one's about the same
            raise ValueError("the JSON is nested too deeply") from error


@dataclass(frozen=True)
class Rollout:
    """One sequence. All arrays are [T] and stand at the token's own position; position 0 is never trained."""

    tokens: np.ndarray  # int64
    loss_mask: np.ndarray  # bool
    advantages: np.ndarray  # float64, 0 where untrained; neither normalised over the batch nor overridden yet
    override: Override


@dataclass
class Decoder:
    """The rules by which records become rollouts, and the count of what they left out.

    Args:
        max_token_len: longest sequence; None for any.
        overlong: "drop" or "truncate" what is longer.
        score_advantages: "group_norm", "group_center" or "raw" (see `advantages.from_scores`).
        vocab_size: token ids must be below it; None for no limit.
    """

    max_token_len: int | None = None
    overlong: str = "drop"
    score_advantages: str = "group_norm"
    vocab_size: int | None = None
    rejected: Counter = field(default_factory=Counter)  # reason -> sequences, since it was last taken
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first place it was met

    def group(self, group: Any, place: str) -> list[Rollout]:
        """The good sequences of one record. `place` names the record in messages ("group 3", "line 17")."""
        if not isinstance(group, dict) or not isinstance(group.get("tokens"), list):
            self.reject("record is not a group", place, f"expected an object with a list of tokens, found {_short(group)}")
            return []
        overrides = [_override(group, i) for i in range(len(group["tokens"]))]
        scores = _scores(group, len(overrides))
        counted = np.isfinite(scores) & np.array([kind is Override.NONE for kind in overrides], dtype=bool)
        advantages = from_scores(scores, counted, self.score_advantages)
        rollouts = []
        for i, kind in enumerate(overrides):
            try:
                rollouts.append(self._rollout(group, i, kind, advantages[i], f"{place}, sequence {i}"))
            except _Malformed as fault:
                self.reject(fault.reason, f"{place}, sequence {i}", fault.detail)
        return rollouts

    def reject(self, reason: str, place: str, detail: str) -> None:
        assert reason in REASONS, reason
        self.rejected[reason] += 1
        self.examples.setdefault(reason, f"{place}: {detail}")

    def take_counts(self) -> np.ndarray:
        """Counts [len(REASONS)] int64 since the last call; each reason is logged once with its first example."""
        for reason, count in self.rejected.items():
            verb = "truncated to max_token_len" if reason == "truncated" else f"left out: {reason}"
            log.warning("%d sequence(s) %s (first: %s)", count, verb, self.examples[reason])
        counts = np.array([self.rejected[reason] for reason in REASONS], dtype=np.int64)
        self.forget()
        return counts

    def forget(self) -> None:
        self.rejected.clear()
        self.examples.clear()

    def _rollout(self, group: dict, i: int, kind: Override | None, score_advantage: float, place: str) -> Rollout:
        tokens = _tokens(group["tokens"][i], self.vocab_size)
        loss_mask = _loss_mask(_row(group, "masks", i), tokens)
        if kind is None:
            raise _Malformed("override is neither true nor false", "set_advantage_to_zero and sft must be true, false or null")
        advantages = _advantages(_row(group, "advantages", i), score_advantage, loss_mask, kind)
        limit = self.max_token_len
        if limit is not None and len(tokens) > limit:
            detail = f"{len(tokens)} tokens, max_token_len {limit}"
            if self.overlong == "drop":
                raise _Malformed("longer than max_token_len", detail)
            self.reject("truncated", place, detail)
        return Rollout(tokens[:limit], loss_mask[:limit], advantages[:limit], kind)


class _Malformed(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _row(group: dict, name: str, i: int) -> Any:
    """Entry i of a per-sequence field; None where the field is null, empty, shorter, or no list."""
    rows = group.get(name)
    return rows[i] if isinstance(rows, list) and i < len(rows) else None


def _short(value: Any) -> str:
    """A value in at most 60 characters; reprlib, because the whole may be huge or nested too deeply for repr."""
    text = reprlib.repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _array(values: Any, types: set[type], dtype: type) -> np.ndarray | None:
    """A flat list of numbers of these types as an array; None if it is anything else.

    The types are looked at first: left to itself NumPy makes 1 of a true among integers, and of one long string among
    thousands of numbers an array of as many such strings.
    """
    if not isinstance(values, list) or not types.issuperset(map(type, values)):
        return None
    try:
        return np.array(values, dtype)
    except OverflowError:  # an integer too large
        return None


def _tokens(values: Any, vocab_size: int | None) -> np.ndarray:
    tokens = _array(values, {int}, np.int64)
    if tokens is None:
        raise _Malformed("tokens are not a list of integers", f"found {_short(values)}")
    if len(tokens) < 2:
        raise _Malformed("fewer than two tokens", f"found {len(tokens)}: nothing predicts the first token of a sequence")
    limit = vocab_size if vocab_size is not None else 2**31
    if tokens.min() < 0 or tokens.max() >= limit:
        bad = tokens[(tokens < 0) | (tokens >= limit)][0]
        raise _Malformed(
            "token id outside the vocabulary",
            f"found {bad}, expected 0 to {limit - 1}: environments must use the tokenizer of the model",
        )
    return tokens


def _loss_mask(values: Any, tokens: np.ndarray) -> np.ndarray:
    """Labels (-100, or the token id itself) or 0/1 -> bool, False at position 0."""
    if values is None:
        raise _Malformed("no mask", "expected one value per token")
    mask = _array(values, {int, float, bool}, np.float64)  # exact for token ids
    if mask is None:
        raise _Malformed("mask is neither labels nor 0/1", f"found {_short(values)}")
    if len(mask) != len(tokens):
        raise _Malformed("mask length differs from tokens", f"{len(mask)} mask values, {len(tokens)} tokens")
    ignored = mask == IGNORED
    if not ignored.any() and np.isin(mask, (0, 1)).all():
        trained = mask == 1
    else:
        wrong = np.flatnonzero(~ignored & (mask != tokens))
        if len(wrong):
            found = f"found {_short(values[wrong[0]])} at position {wrong[0]}, where the token is {tokens[wrong[0]]}"
            raise _Malformed("mask is neither labels nor 0/1", found)
        trained = ~ignored
    trained[0] = False
    return trained


def _scores(group: dict, size: int) -> np.ndarray:
    """Scores [size] float64, NaN where there is no finite number."""
    scores = np.full(size, np.nan)
    for i in range(size):
        score = _row(group, "scores", i)
        if isinstance(score, int | float) and not isinstance(score, bool) and _finite(score):
            scores[i] = score
    return scores


def _finite(value: Any) -> Any:
    """Whether a number, or each of an array, is finite in float32, which the loss is computed in. NaN compares false."""
    return abs(value) <= _FLOAT32_MAX


def _advantages(row: Any, score_advantage: float, loss_mask: np.ndarray, kind: Override) -> np.ndarray:
    """Advantages [T] float64, 0 where untrained: the token-level row, one number for the sequence, or from its score."""
    if kind is not Override.NONE:
        return np.zeros(len(loss_mask))
    if row is None or row == []:
        if not _finite(score_advantage):
            raise _Malformed("no finite score and no advantages", "a sequence needs one of the two")
        values = np.array([score_advantage])
    else:
        values = _array(row if isinstance(row, list) else [row], {int, float}, np.float64)
        if values is None or len(values) not in (1, len(loss_mask)):
            raise _Malformed("advantages do not fit the tokens", f"found {_short(row)}, expected {len(loss_mask)} numbers")
    values = np.broadcast_to(values, loss_mask.shape)
    if not _finite(values[loss_mask]).all():
        raise _Malformed("advantage of a trained token is not finite", f"found {values[loss_mask & ~_finite(values)][0]}")
    return np.where(loss_mask, values, 0.0)


def _override(group: dict, i: int) -> Override | None:
    """The sequence's own override, else its group's; set_advantage_to_zero wins over sft. None for a "false" in quotes."""
    own, shared = _row(group, "overrides", i), group.get("group_overrides")
    said = {**(shared if isinstance(shared, dict) else {}), **(own if isinstance(own, dict) else {})}
    zero, sft = said.get("set_advantage_to_zero"), said.get("sft")
    if any(flag not in (None, False, True) for flag in (zero, sft)):  # 0 and 1 are equal to them
        return None
    if zero:
        return Override.ZERO
    return Override.SFT if sft else Override.NONE
