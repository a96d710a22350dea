"""JSON of records -> Python values, with long rows of numbers as arrays, so that no Python objects are created for millions of
numbers.

A batch is megabytes of numbers with a little structure. Rows are cut out of the text and parsed by simdjson, one at a time, so
that the training thread can run in between; the rest is parsed by a general parser. A row that is not a flat array of 64-bit
integers or finite numbers stays in the text. Knows nothing of the meaning of fields.
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
LONG = 2048  # characters from which a row is cut out
_MARK = secrets.token_hex(8)  # replaces a row; cannot occur in a record


def parse_json(text: bytes) -> Any:
    """Parse JSON as environments write it, also with NaN and integers of any size. ValueError if it is invalid.

    In a group, or the groups of a batch, the long rows of the fields ROWS are arrays, int64 or float64.
    """
    rest, rows = _cut(text)
    if rows:
        with suppress(ValueError):  # a row was cut out of a string
            value = _parse(rest)
            _put_back(value, rows)
            if not rows:  # else a row is of another field, or of a duplicate key
                return value
    return _parse(text)


def _parse(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # it rejects NaN and large integers
        try:
            return json.loads(text)
        except RecursionError as error:  # orjson's limit is 1,024 levels, Python's about the same
            raise ValueError("the JSON is nested too deeply") from error


def _cut(text: bytes) -> tuple[bytes, dict[str, np.ndarray]]:
    """The text with each long row of numbers replaced by a mark; mark -> row."""
    parser, pieces, rows, done, at = simdjson.Parser(), [], {}, 0, 0
    while (end := text.find(b"]", at + LONG)) >= 0:  # only rows that end there can be long and start after `at`
        start, at = text.rfind(b"[", at, end), end + 1
        before = text[max(0, start - 20) : start].translate(None, b" \t\r\n")
        among_rows = 0 <= start <= end - LONG and before.endswith((b'":[', b"],"))  # excludes scores and most lists in texts
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
    except (ValueError, RuntimeError):  # simdjson raises RuntimeError for other errors
        return None
    for of_type, dtype in (("i", np.int64), ("d", np.float64)):
        try:
            return np.frombuffer(found.as_buffer(of_type=of_type), dtype)
        except (TypeError, ValueError):  # of another type; too large
            continue
    return None


def _put_back(value: Any, rows: dict[str, np.ndarray]) -> None:
    """Put rows from `rows` back into the fields of a group."""
    groups = value.get("batch") if isinstance(value, dict) and "batch" in value else [value]
    for group in groups if isinstance(groups, list) else []:
        for found in (group.get(name) for name in ROWS) if isinstance(group, dict) else []:
            if isinstance(found, list):
                found[:] = [rows.pop(row, row) if isinstance(row, str) else row for row in found]
