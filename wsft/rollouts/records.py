"""The fields of an Atropos record, each read and validated by one function, which raises `Malformed`.

NumPy only: no torch, no HTTP, no ranks. The format and every fault handled here were observed with the real server.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import numpy as np

from wsft.loss.advantages import Override

IGNORED = -100  # the label of an untrained token in Atropos masks
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_COLDEST = 0.01  # lowest temperature: below it sampling is greedy, and gradients are that much larger
_LOGP_ROUNDING = 1e-3  # logps up to this are rounding in bf16
# Lower values are sentinels for unknown logps: vLLM writes -9999.0 for -inf and NaN. The logarithm of the smallest float32 is
# -103.3, and a sampler does not draw a token of probability 0. A reference model scores tokens that it did not draw.
_LOWEST_LOGP = {"inference_logprobs": -103.5, "ref_logprobs": -1000.0}


class Malformed(Exception):
    """A field is invalid: one of `decoder.REASONS`, and what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def short(value: Any) -> str:
    """A value in at most 60 characters, by reprlib, since it may be huge or nested too deeply for repr."""
    text = reprlib.repr(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
    return text if len(text) < 60 else f"{text[:57]}..."


def is_group(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("tokens"), list)


# -- of the whole record --------------------------------------------------------------------------------------------------


def env_id(group: dict) -> int:
    """-1 if there is none."""
    value = group.get("env_id")
    return value if type(value) is int and 0 <= value < 2**63 else -1


def group_size(record: dict) -> int | None:
    """Completions per prompt of its environment, if set in group_overrides."""
    overrides = record.get("group_overrides")
    value = overrides.get("group_size") if isinstance(overrides, dict) else None
    return value if type(value) is int and value > 0 else None


def prompt(record: Any) -> tuple[int, bytes] | None:
    """(env_id, prompt tokens of the first sequence), which parts of one group have in common. None if the prompt is only a
    beginning-of-sequence token."""
    if not is_group(record) or not record["tokens"] or env_id(record) < 0:
        return None
    try:
        first = tokens(record, 0, None)
        mask = loss_mask(record, 0, first)
    except Malformed:
        return None
    return (env_id(record), first[: mask.argmax()].tobytes()) if mask.argmax() > 1 else None


# -- of sequence i --------------------------------------------------------------------------------------------------------


def tokens(group: dict, i: int, vocab_size: int | None) -> np.ndarray:
    """[T] int64."""
    values = group["tokens"][i]
    ids = _array(values, {int}, np.int64)
    if ids is None:
        raise Malformed("tokens are not a list of integers", f"found {short(values)}")
    if len(ids) < 2:
        raise Malformed("fewer than two tokens", f"found {len(ids)}: nothing predicts the first token of a sequence")
    _require_in_vocabulary(ids, vocab_size, "environments must use the tokenizer of the model")
    return ids


def loss_mask(group: dict, i: int, ids: np.ndarray) -> np.ndarray:
    """[T] bool from labels (-100, or the token id itself) or 0/1. False at position 0: nothing predicts it."""
    values = _row(group, "masks", i)
    if values is None:
        raise Malformed("no mask", "expected one value per token")
    mask = _array(values, {int, float, bool}, np.float64)  # exact for token ids
    if mask is None:
        raise Malformed("mask is neither labels nor 0/1", f"found {short(values)}")
    if len(mask) != len(ids):
        raise Malformed("mask length differs from tokens", f"{len(mask)} mask values, {len(ids)} tokens")
    ignored = mask == IGNORED
    if not ignored.any() and np.isin(mask, (0, 1)).all():
        trained = mask == 1
    else:
        wrong = np.flatnonzero(~ignored & (mask != ids))
        if len(wrong):
            found = f"found {short(values[wrong[0]])} at position {wrong[0]}, where the token is {ids[wrong[0]]}"
            raise Malformed("mask is neither labels nor 0/1", found)
        trained = ~ignored
    trained[0] = False
    return trained


def score(group: dict, i: int) -> float:
    """NaN if it is not a finite number; true and false are 1 and 0."""
    value = _row(group, "scores", i)
    return float(value) if isinstance(value, int | float) and _finite(value) else math.nan


def advantages(group: dict, i: int, from_score: float, trained: np.ndarray) -> np.ndarray:
    """[T] float64, 0 where untrained: token-level advantages, one number for the sequence, or the advantage from its score."""
    row = _row(group, "advantages", i)
    if _absent(row):
        if not _finite(from_score):
            raise Malformed("no finite score and no advantages", "a sequence needs one of the two")
        values = np.array([from_score])
    else:
        values = _array(row if isinstance(row, list | np.ndarray) else [row], {int, float}, np.float64)
        if values is None or len(values) not in (1, len(trained)):
            raise Malformed("advantages do not fit the tokens", f"found {short(row)}, expected {len(trained)} numbers")
    values = np.broadcast_to(values, trained.shape)
    if not _finite(values[trained]).all():
        raise Malformed("advantage of a trained token is not finite", f"found {values[trained & ~_finite(values)][0]}")
    return np.where(trained, values, 0.0)


def is_absent(group: dict, i: int, name: str) -> bool:
    return _absent(_row(group, name, i))


def is_cut_off(group: dict, i: int, ids: np.ndarray, trained: np.ndarray, end_tokens: frozenset[int]) -> bool:
    """Whether the sampler stopped before the policy did: by its `finish_reason` (see `_setting`), or without a known one, since
    the last token is trained and no end token."""
    reason = _setting(group, i, "finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    if reason in ("length", "abort", "stop", "tool_calls"):  # of OpenAI's API, vLLM and SGLang
        return reason in ("length", "abort")
    return bool(trained[-1]) and bool(end_tokens) and int(ids[-1]) not in end_tokens


def cuts_vocabulary(group: dict, i: int) -> str:
    """The sampling setting by which tokens are drawn from a part of the vocabulary, such as "top_p 0.9"; else empty."""
    limits = {"top_p": lambda p: p < 1, "top_k": lambda k: k > 0, "min_p": lambda p: p > 0}
    found = {name: _setting(group, i, name) for name in limits}
    return ", ".join(f"{name} {x}" for name, x in found.items() if _is_number(x) and limits[name](x))


def has_images(group: dict, i: int) -> bool:
    """Entry i, or a value that is not a list and applies to all sequences."""
    images = group.get("images")
    own = _row(group, "images", i) if isinstance(images, list) else images
    return len(own) > 0 if isinstance(own, np.ndarray) else bool(own)


def override(group: dict, i: int) -> Override | None:
    """Of the sequence, else of its group; set_advantage_to_zero precedes sft. None if invalid, like a "false" in quotes."""
    own, shared = _row(group, "overrides", i), group.get("group_overrides")
    places = [place for place in (own, shared) if isinstance(place, dict)]
    zero, sft = (
        next((place[name] for place in places if place.get(name) is not None), None)  # null means unset
        for name in ("set_advantage_to_zero", "sft")
    )
    if any(flag not in (None, False, True) for flag in (zero, sft)):  # 0 and 1 compare equal to them
        return None
    if zero:
        return Override.ZERO
    return Override.SFT if sft else Override.NONE


def temperature(group: dict, i: int) -> float:
    """See `_setting`; NaN if unset."""
    value = _setting(group, i, "temperature")
    if value is None:
        return math.nan
    if not (_is_number(value) and value >= _COLDEST and _finite(value)):
        raise Malformed("trained at the run's temperature: its own is not a number above 0", f"found {short(value)}")
    return float(value)


def weight_versions(group: dict, i: int, length: int) -> np.ndarray:
    """The trainer step whose weights sampled each token, [T] float64; NaN where it is unknown.

    `weight_versions`: spans {"version", "start", "end"} of positions start <= t < end, as vLLM and SGLang report them. Tokens
    outside of all spans have the sequence's `weight_version`. Both see `_setting`, since Atropos's server delivers only the
    fields that it knows.
    """
    versions = np.full(length, _version(_setting(group, i, "weight_version")))
    spans = _setting(group, i, "weight_versions")
    for span in [] if spans is None else spans if isinstance(spans, list) else [spans]:
        bounds = [span.get("start"), span.get("end")] if isinstance(span, dict) else [None]
        if any(type(bound) is not int for bound in bounds) or not 0 <= bounds[0] <= bounds[1] <= length:
            detail = f"found {short(span)}, expected version, start and end, in {length} tokens"
            raise Malformed("trained without weight_versions: they do not fit the tokens", detail)
        versions[bounds[0] : bounds[1]] = _version(span.get("version"))
    return versions


def _version(value: Any) -> float:
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:  # servers write it as a string
        value = int(value)
    return float(value) if type(value) is int and 0 <= value < 2**53 else math.nan


def logps(group: dict, i: int, name: str, trained: np.ndarray) -> np.ndarray:
    """`inference_logprobs` or `ref_logprobs` [T] float32 of the trained tokens. NaN where there is none: for the placeholder
    1.0 and other values that are not logps (`_LOWEST_LOGP`)."""
    row = _row(group, name, i)
    if _absent(row):
        return np.full(len(trained), np.nan, dtype=np.float32)
    values = _array(row, {int, float, type(None)}, np.float64)  # null becomes NaN
    if values is None or len(values) != len(trained):
        found = f"found {short(row)}, expected {len(trained)} numbers"
        raise Malformed(f"trained without {name}: they do not fit the tokens", found)
    known = trained & (values <= _LOGP_ROUNDING) & (values >= _LOWEST_LOGP[name])
    return np.where(known, values.clip(max=0), np.nan).astype(np.float32)


def teacher(group: dict, i: int, trained: np.ndarray, vocab_size: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """distill_token_ids and distill_logprobs: entries per token [T], 0 where untrained; ids and logps of all entries."""
    ids, logps = _row(group, "distill_token_ids", i), _row(group, "distill_logprobs", i)
    sizes, reason = np.zeros(len(trained), np.int64), "teacher does not fit the tokens"
    if not ids and not logps:
        return sizes, np.zeros(0, np.int64), np.zeros(0, np.float32)
    for name, rows in {"distill_token_ids": ids, "distill_logprobs": logps}.items():
        if not isinstance(rows, list) or len(rows) != len(trained):
            raise Malformed(reason, f"{name} is {short(rows)}, expected a list for each of {len(trained)} tokens")
    entries = [(t, ids[t] or [], logps[t] or []) for t in np.flatnonzero(trained).tolist()]
    for t, row_ids, row_logps in entries:
        if not isinstance(row_ids, list) or not isinstance(row_logps, list) or len(row_ids) != len(row_logps):
            raise Malformed(reason, f"found {short(row_ids)} and {short(row_logps)} at position {t}, expected equally many")
    flat_ids = _array([x for _, row, _ in entries for x in row], {int}, np.int64)
    flat_logps = _array([x for _, _, row in entries for x in row], {int, float}, np.float64)
    if flat_ids is None or flat_logps is None or not (flat_logps <= _LOGP_ROUNDING).all():
        raise Malformed(reason, "expected integers in distill_token_ids, and numbers up to 0 in distill_logprobs")
    _require_in_vocabulary(flat_ids, vocab_size, "those of distill_token_ids must be the model's own")
    sizes[trained] = [len(row) for _, row, _ in entries]
    return sizes, flat_ids, flat_logps.clip(-_FLOAT32_MAX, 0).astype(np.float32)


# -- what they share ------------------------------------------------------------------------------------------------------


def _row(group: dict, name: str, i: int) -> Any:
    """Entry i of a per-sequence field; None if the field is null, empty, shorter, or not a list."""
    rows = group.get(name)
    return rows[i] if isinstance(rows, list) and i < len(rows) else None


def _absent(row: Any) -> bool:
    """Null and empty both occur."""
    return row is None or (isinstance(row, list | np.ndarray) and not len(row))


def _setting(group: dict, i: int, name: str) -> Any:
    """From overrides[i], else generation_params, else group_overrides: the precedence of Atropos' example trainer."""
    levels = (_row(group, "overrides", i), group.get("generation_params"), group.get("group_overrides"))
    return next((d[name] for d in levels if isinstance(d, dict) and d.get(name) is not None), None)


def _array(values: Any, types: set[type], dtype: type) -> np.ndarray | None:
    """A flat list of numbers of these types as an array; None for anything else. Long rows are arrays already (json_parser.py).

    Types are checked first: NumPy converts a true among integers to 1, and with one long string among thousands of numbers
    makes all of them strings of that length.
    """
    if isinstance(values, np.ndarray):
        return values.astype(dtype, copy=False) if {"i": int, "f": float}.get(values.dtype.kind) in types else None
    if not isinstance(values, list) or not types.issuperset(map(type, values)):
        return None
    try:
        return np.array(values, dtype)
    except OverflowError:  # integer out of range
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    """Whether a number, or each of an array, is finite in float32, in which the loss is computed. False for NaN."""
    return abs(value) <= _FLOAT32_MAX


def _require_in_vocabulary(ids: np.ndarray, vocab_size: int | None, hint: str) -> None:
    limit = vocab_size if vocab_size is not None else 2**31
    outside = ids[(ids < 0) | (ids >= limit)]
    if len(outside):
        raise Malformed("token id outside the vocabulary", f"found {outside[0]}, expected 0 to {limit - 1}: {hint}")
