"""JSON of records -> Python values, the long rows of numbers as arrays: no Python object is made of their millions of numbers.

A batch is megabytes of numbers and a little structure. The rows are cut out of the text and go to simdjson, one at a time, so
that the thread that trains meanwhile gets its turn; what is left goes to a parser of everything. A row that is no flat array of
64-bit integers, or of finite numbers, stays where it is. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
import simdjson

ROWS = ("tokens", "masks", "advantages", "inference_logprobs", "ref_logprobs")  # the fields whose rows become arrays
LONG = 2048  # characters of a row that is worth it
_MARK = secrets.token_hex(8)  # stands where a row was; no record can say it


def parse_json(text: bytes) -> Any:
    """JSON as producers of records write it: also NaN and integers of any size. ValueError otherwise.

    In a group, or the groups of a batch, the long rows of the fields ROWS are arrays, int64 or float64.
    """
    rest, rows = _cut(text)
    if rows:
        with suppress(ValueError):  # where a row was cut out of a string
            value = _parse(rest)
            _put_back(value, rows)
            if not rows:  # else one is not of those fields, or its field stands twice
                return value
    return _parse(text)


def _parse(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # it knows no NaN and no integers of any size
        try:
            return json.loads(text)
        except RecursionError as error:  # orjson's limit is 1,024 levels, this one's about the same
            raise ValueError("the JSON is nested too deeply") from error


def _cut(text: bytes) -> tuple[bytes, dict[str, np.ndarray]]:
    """The text with a mark in the place of each long row of numbers, and the rows by their marks."""
    parser, pieces, rows, done, at = simdjson.Parser(), [], {}, 0, 0
    while (end := text.find(b"]", at + LONG)) >= 0:  # only what ends there can be long and begin behind `at`
        start, at = text.rfind(b"[", at, end), end + 1
        before = text[max(0, start - 20) : start].translate(None, b" \t\r\n")
        among_rows = 0 <= start <= end - LONG and before.endswith((b'":[', b"],"))  # neither scores nor most lists in texts
        row = _numbers(parser, text[start:at]) if among_rows else None
        if row is not None:
            mark = f"{_MARK} {len(rows)}"
            rows[mark] = row
            pieces += text[done:start], b'"%b"' % mark.encode()
            done = at
    return b"".join([*pieces, text[done:]]), rows


def _numbers(parser: simdjson.Parser, text: bytes) -> np.ndarray | None:
    try:
        found = parser.parse(text)
    except (ValueError, RuntimeError):  # the latter of what it has no better name for
        return None
    for of_type, dtype in (("i", np.int64), ("d", np.float64)):
        try:
            return np.frombuffer(found.as_buffer(of_type=of_type), dtype)
        except (TypeError, ValueError):  # of another type; too large
            continue
    return None


def _put_back(value: Any, rows: dict[str, np.ndarray]) -> None:
    """Takes those rows from `rows` that stand in a group's fields."""
    groups = value.get("batch") if isinstance(value, dict) and "batch" in value else [value]
    for group in groups if isinstance(groups, list) else []:
        for found in (group.get(name) for name in ROWS) if isinstance(group, dict) else []:
            if isinstance(found, list):
                found[:] = [rows.pop(row, row) if isinstance(row, str) else row for row in found]
