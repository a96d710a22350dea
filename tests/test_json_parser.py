"""The parser of records beside `json`, on texts whose rows it may cut out and on texts where it must not."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsft.rollouts import json_parser as parser
from wsft.rollouts.json_parser import ROWS, parse_json

NUMBERS = [0, -0.0, -100, 7, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 0.1, -1.5e-7, 5e-324, 1.7976931348623157e308]
OTHERS = [2**64, 10**400, math.nan, math.inf, None, True, [], [5], [1, [2], [], 3], {"a": [1, 2], "b": [[1, 2]]}]
OTHERS += ["", "text", "[1,2,3]", '":[[1,2,3]', '],[1,2]","']


@pytest.fixture(autouse=True)
def every_row_is_long(monkeypatch):
    monkeypatch.setattr(parser, "LONG", 1)


def plain(value):
    """With lists for arrays, and their numbers."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


def same(text):
    """Whether both read the same; a 1 is a 1.0, for an array has one type, and integers beyond 64 bits are as floats."""
    found, wanted = plain(parse_json(text.encode())), json.loads(text)
    return repr(floats(found)) == repr(floats(wanted))


def floats(value):
    if isinstance(value, dict):
        return {name: floats(part) for name, part in value.items()}
    if isinstance(value, list):
        return [floats(part) for part in value]
    return float(value) if type(value) is int and abs(value) < 10**300 else value


rows = st.lists(st.sampled_from(NUMBERS), max_size=6) | st.lists(st.sampled_from(NUMBERS + OTHERS), max_size=6)
fields = st.lists(rows | st.sampled_from(NUMBERS + OTHERS), max_size=4) | st.sampled_from(NUMBERS + OTHERS)
groups = st.dictionaries(st.sampled_from([*ROWS, "scores", "messages", "distill_token_ids"]), fields) | fields


@settings(max_examples=500, deadline=None)
@given(st.lists(groups, max_size=3), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", " : ")]), st.booleans())
def test_what_is_parsed_is_what_json_reads(batch, separators, whole):
    value = {"batch": batch} if whole else batch[0] if batch else batch
    assert same(json.dumps(value, separators=separators))


@pytest.mark.parametrize(
    "text",
    [
        '{"tokens":[[1,2,3]],"tokens":[[4,5,6]]}',  # the last one counts
        '{"tokens":[[1,2,3]],"tokens":5}',
        '{"tokens":[[1,2,3]],"batch":[{"tokens":[[4,5]]}]}',
        '{"batch":[{"tokens":[[1,2,3]],"messages":"],[1,2,3]"}]}',
        '{"batch":[{"tokens":[[1,2,3]],"messages":[[1,2,3]]}]}',
        '{"tokens":[[1,2,3]],"messages":["\\",[1,2,3]\\"", "\\\\", "],[1,2,3],["]}',
        '{"tokens":[["[1,2,3]","[4]"],[1,2,3]]}',
        '{"tokens":[[[1,2],[3,4]],[[1],[2]],[5,6]],"scores":[1,2],"distill_token_ids":[[[1,2],[3]]]}',
        '[[1,2,3],[[4,5]]]',
        '{"tokens":{"masks":[[1,2,3]]}}',
    ],
)  # fmt: skip
def test_text_that_looks_like_a_row_is_unchanged(text):
    assert same(text)


@pytest.mark.parametrize(
    "text", [b'{"tokens":[[1,2,3]', b'{"tokens":[[01,2]]}', b'["],[1,2,3]', b"[1,2]]", b'[1,2] "', b"[{{{[1,2]"]
)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_long_rows_of_a_groups_fields_are_arrays_and_other_lists_are_lists(monkeypatch):
    monkeypatch.setattr(parser, "LONG", 2048)
    group = {name: [[5] * 2000, [5] * 10, [0.5] * 1999 + [2], [None] * 2000] for name in ROWS} | {"scores": [0.5] * 2000}
    for read in (parse_json(json.dumps(group).encode()), parse_json(json.dumps({"batch": [group]}).encode())["batch"][0]):
        for name in ROWS:
            assert [getattr(row, "dtype", None) for row in read[name]] == [np.int64, None, np.float64, None]
