"""Thousands of mutated groups, decoded as in training and compared with an oracle in plain Python.

A body is generated from its number: `check(number)` repeats one. The oracle (`judge` and the functions above it) parses the
body with `json.loads` and calls nothing of wsft. For every sequence it lists the valid reasons to leave it out (any one of
them may be counted), and for a valid one each field to the last bit, except advantages, which are compared up to rounding. It
does not check messages and the log.
"""

import json
import math
import random
import re
import struct
import time
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB, make_group

from wsft.loss.advantages import Shaping
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients, LossSettings
from wsft.rollouts import json_parser as parser
from wsft.rollouts.answers import decode
from wsft.rollouts.batch import AtroposBatchProcessor, token_terms
from wsft.rollouts.decoder import CUT_OFF, NO_MEAN_ABOVE_0, NOT_RENDERED, REASONS

SECONDS = 5.0  # for one body
LONG = (1, 2048)  # characters from which on a row is parsed apart, by turns: nearly all rows, and those of the rare bodies
BODIES = [path.read_bytes() for path in sorted((Path(__file__).parent / "bodies").glob("*.json"))]
RECORDED = [json.dumps(group) for body in BODIES for group in json.loads(body)["batch"]]
NONE, ZERO, SFT = range(3)
# of a file; of a batch; of a setting that is not tried here
NEVER_MET = {"line is not JSON", "no token is trained", NO_MEAN_ABOVE_0, CUT_OFF, NOT_RENDERED}

# -- the mutator: of Python values; some words become JSON that `json.dumps` does not write ---------------------------

DEEP = '"<deep>"'
WORDS = {'"<1e999>"': "1e999", '"<-1e999>"': "-1e999", '"<1E1>"': "1E1", "<again>": ""}  # a key <again> stands twice
ROWS = ["tokens", "masks", "advantages"]
LOGPS = ["inference_logprobs", "ref_logprobs"]
TEACHER = ["distill_token_ids", "distill_logprobs"]
SAYING = ["overrides", "generation_params", "group_overrides"]  # in this order: who is heard
FIELDS = [*ROWS, *LOGPS, *TEACHER, *SAYING, "scores", "messages", "env_id"]
IDS = [0, 1, 4, 95, 96, 49151, 49152, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**80, 10**400, -1, -100, -(2**63), -(2**63) - 1]
FLOATS = [3.0, 3.5, 0.0, -0.0, 1e-9, 5e-324, -2.5, 3e38, -3e38, 3.5e38, 1e300, -1e300, 2.0**53, 1.5e9 + 0.1]
FLOATS += [math.nan, math.inf, -math.inf, "<1e999>", "<-1e999>", "<1E1>"]
JUNK = [None, True, False, "", "7", "text", "NaN", "\ud800", "\0\U0001f600", "x" * 5000, {}, {"a": 1}, [], [5], [[5, 6]], [[]]]
JUNK += [[None], [True], {"tokens": [[5, 6]]}, "<deep>"]
FLAGS = [True, False, None, 1, 0, 1.0, "false", "true", "", 2, -1, math.nan, [], {}]
TEMPERATURES = [1.0, 0.7, 2, 0.05, 0, -0.0, -1, 3e38, 3.5e38, 1e300, 10**400, math.nan, math.inf, "<1e999>"]
TEMPERATURES += [5e-324, 1e-40, 1e-7, "hot", "0.7", None, [], {}, True, False]
VERSIONS = [
    0,
    7,
    2**53 - 1,
    2**53,
    2**80,
    -1,
    3.0,
    3.5,
    math.nan,
    "12",
    "007",
    "default",
    "",
    "-1",
    " 5",
    "1.0",
    "\u0663",
    "\u00b2",
]
VERSIONS += ["9" * 15, "9" * 16, True, None, []]
A_LOGP = [1.0, 1, 0, 0.0, -0.0, -1, 5e-4, 1e-3, 0.0011, 0.5, 5e-324, -5e-324, -1e-46, -104.5, -3e38, -3.5e38, -1e300, -(2**80)]
A_LOGP += [10**400, -(10**400), math.nan, math.inf, -math.inf, "<-1e999>", None, True, "-0.5", [-0.5], {}]
MUTATIONS, RARE = [], []


def mutation(function):
    MUTATIONS.append(function)
    return function


def rare(function):
    RARE.append(function)
    return function


def anything(rng):
    return rng.choice(rng.choice([IDS, FLOATS, JUNK]))


def place(rng, row):
    return rng.randrange(len(row))


@mutation
def an_element_becomes_anything(rng, group):
    row = rng.choice(group[rng.choice([*ROWS, *LOGPS, *TEACHER])])
    row[place(rng, row)] = anything(rng)


@mutation
def a_row_becomes_anything(rng, group):
    rows = group[rng.choice([*ROWS, *LOGPS, *TEACHER, "scores"])]
    rows[place(rng, rows)] = anything(rng)


@mutation
def a_field_becomes_anything(rng, group):
    group[rng.choice(FIELDS)] = anything(rng)


@mutation
def a_field_is_missing(rng, group):
    del group[rng.choice(FIELDS)]


@mutation
def images_come(rng, group):
    some = [rng.choice(["a.png", b"\x89".hex(), ["b.png"], None, [], ""]) for _ in group["tokens"][:3]]
    group["images"] = rng.choice([None, [], "", "a.png", {}, {"a": 1}, some, [None] * 3, [[], ["a.png"]]])


@mutation
def a_field_is_absent(rng, group):
    group[rng.choice(FIELDS)] = rng.choice([None, []])


@mutation
def a_field_stands_twice(rng, group):
    name, other = rng.choices(FIELDS, k=2)
    group[f"{name}<again>"] = rng.choice([anything(rng), group[other]])


@mutation
def two_fields_change_places(rng, group):
    one, other = rng.choices(FIELDS, k=2)
    group[one], group[other] = group[other], group[one]


@mutation
def a_row_is_ragged(rng, group):
    row = rng.choice(group[rng.choice([*ROWS, *LOGPS, *TEACHER])])
    rng.choice([row.pop, row.clear, lambda: row.append(row[-1]), lambda: row.pop(0), lambda: row.insert(0, row[0])])()


@mutation
def rows_are_too_few_or_too_many(rng, group):
    rows = group[rng.choice([*ROWS, *LOGPS, *TEACHER, "scores"])]
    rng.choice([rows.pop, lambda: rows.append(rows[0]), lambda: rows.insert(0, None), lambda: rng.shuffle(rows)])()


@mutation
def a_sequence_is_short(rng, group):
    i, n = place(rng, group["tokens"]), rng.randrange(4)
    for name in [*ROWS, *LOGPS, *TEACHER]:
        if group[name]:
            group[name][i] = group[name][i][:n]


@mutation
def a_token_and_its_label_are_an_odd_id(rng, group):
    i = place(rng, group["tokens"])
    t = place(rng, group["tokens"][i])
    group["tokens"][i][t] = rng.choice([*IDS, True, 3.0])
    group["masks"][i][t] = rng.choice([group["tokens"][i][t], -100])


@mutation
def tokens_are_numbers_of_another_kind(rng, group):
    i = place(rng, group["tokens"])
    row = group["tokens"][i]
    kinds = [[float(v) for v in row], [v + 0.5 for v in row], [v > 50 for v in row], [str(v) for v in row], [[v] for v in row]]
    group["tokens"][i] = rng.choice(kinds)


@mutation
def a_mask_is_of_another_kind(rng, group):
    i = place(rng, group["tokens"])
    row = group["tokens"][i]
    bits = [rng.random() < 0.6 for _ in row]
    kinds = [bits, [int(b) for b in bits], [float(b) for b in bits], [0] * len(row), [1] * len(row), [-100] * len(row), row[:]]
    kinds += [[v if b else -100 for v, b in zip(row, bits, strict=True)] for _ in range(2)]
    kinds += [[float(v) if b else -100.0 for v, b in zip(row, bits, strict=True)], [1 if b else -100 for b in bits]]
    kinds += [[v if b else 0 for v, b in zip(row, bits, strict=True)], rng.sample(row, len(row)), [[b] for b in bits]]
    group["masks"][i] = rng.choice(kinds)


@mutation
def tokens_are_0_and_1_as_masks_are(rng, group):
    i = place(rng, group["tokens"])
    row = group["tokens"][i] = [rng.randrange(2) for _ in group["tokens"][i]]
    group["masks"][i] = rng.choice([row[:], [-100, *row[1:]], [1 - v for v in row], [-100, *(1 - v for v in row[1:])]])


@mutation
def advantages_are_of_another_form(rng, group):
    i = place(rng, group["tokens"])
    n, value = len(group["tokens"][i]), rng.choice(FLOATS)
    forms = [value, [value], [value] * n, [rng.choice(FLOATS) for _ in range(n)], [[value] * n], [value] * (n + 1), None, []]
    forms += [[rng.gauss(0, 1) for _ in range(n)], [2**80] * n, [True] * n, [0.5, *[True] * (n - 1)], [None] * n, ["1"] * n]
    group["advantages"][i] = rng.choice(forms)


@mutation
def advantages_come_from_scores(rng, group):
    n = len(group["tokens"])
    large = rng.choice([0.1, 132409.24332971507, 1.5e9 + 0.1, 3e38, 2**70])  # in a mean of equals a rounding shows
    group["scores"] = rng.choice([[large] * n, [rng.gauss(0, 1) for _ in range(n)], [rng.choice(FLOATS) for _ in range(n)]])
    group["advantages"] = rng.choice([None, [], [None] * n, [[]] * n, [[0.5]], 5])


@mutation
def overrides_are_anything(rng, group):
    def one():
        output = {name: rng.choice(FLAGS[: rng.choice([3, len(FLAGS)])]) for name in ("set_advantage_to_zero", "sft")}
        output = {name: flag for name, flag in output.items() if rng.random() < 0.5}
        return rng.choice([output, output, None, anything(rng)])

    group["overrides"] = [one() for _ in range(len(group["tokens"]) + rng.randint(-1, 1))]
    if rng.random() < 0.3:
        group["group_overrides"] = one()


def some_spans(rng):
    bounds = [sorted(rng.choices(range(7), k=2)) for _ in range(rng.randint(1, 3))]
    spans = [{"version": rng.choice(VERSIONS), "start": start, "end": end} for start, end in bounds]
    if rng.random() < 0.3:
        rng.choice(spans)[rng.choice(["start", "end"])] = rng.choice([-1, 99, True, "2", 1.0, None])
    return rng.choice([spans, spans, spans, [*spans, rng.choice([None, 5, "5", [], {}])]])


@mutation
def temperature_and_version_are_said_in_several_places(rng, group):
    def one():
        temperature = rng.choice(TEMPERATURES[: rng.choice([4, len(TEMPERATURES)])])  # of the first four each is good
        output = {"temperature": temperature, "weight_version": rng.choice(VERSIONS)}
        output["weight_versions"] = rng.choice([None, 5, [], *([some_spans(rng)] * 3)])
        return {name: value for name, value in output.items() if rng.random() < 0.6}

    for name in rng.sample(SAYING, rng.randint(1, 3)):
        own = [rng.choice([one(), one(), None, 5]) for _ in range(len(group["tokens"]) + rng.randint(-1, 1))]
        group[name] = rng.choice([own if name == "overrides" else one()] * 6 + [None, [], {}, [one()], "hot"])


@mutation
def logps_are_of_another_form(rng, group):
    rows = group[rng.choice(LOGPS)]
    i = place(rng, rows)
    n = len(rows[i])
    numbers, odd = ([rng.choice(values) for _ in range(n)] for values in (A_LOGP[:19], A_LOGP))
    rows[i] = rng.choice([None, [], [None] * n, [1.0] * n, rows[i][:-1], [*rows[i], -1.0], -0.5, "text", numbers, odd])


@mutation
def a_logp_is_odd(rng, group):
    row = rng.choice(group[rng.choice(LOGPS)])
    row[place(rng, row)] = rng.choice(A_LOGP)


@mutation
def a_teacher_is_of_another_form(rng, group):
    i, kind = place(rng, group["tokens"]), rng.choice(TEACHER)
    n, entries = len(group["tokens"][i]), [None, [], 0, False, "", {}, "text", [5], [None], [[5]], [-1.0]]
    match rng.randrange(3):
        case 0:
            group[kind] = rng.choice([None, []])  # one of the two without the other
        case 1:
            group[kind][i] = rng.choice([*entries, [[]] * n, [None] * n, [[-1.0]] * n, [[5]] * (n + 1)])
        case 2:
            group[kind][i][rng.randrange(n)] = rng.choice(entries)


@mutation
def a_teachers_entry_is_odd(rng, group):
    ids = [*IDS, *[VOCAB, 49152] * 5, True, 3.0, None, "7"]
    kind, odd = rng.choice([("distill_token_ids", ids), ("distill_logprobs", A_LOGP)])
    row = rng.choice([row for row in rng.choice(group[kind]) if row])
    row[place(rng, row)] = rng.choice(odd)


@mutation
def messages_are_junk(rng, group):
    group["messages"] = [[{"role": "user", "content": rng.choice(JUNK)}, anything(rng)]] * len(group["tokens"])


@rare
def a_sequence_is_very_long(rng, group):
    n = rng.choice([4000, 50_000])
    group["tokens"][0] = [5, *[rng.randrange(4, VOCAB) for _ in range(9)]] * (n // 10)
    group["masks"][0] = rng.choice([[-100, *group["tokens"][0][1:]], [0, 1] * (n // 2)])
    group["advantages"][0] = rng.choice([0.5, [0.25, -1.5] * (n // 2), [0.0] * (n - 1)])


@rare
def a_group_is_huge(rng, group):
    group["tokens"] = [[5, 6, 7][: rng.randrange(4)] for _ in range(5_000)]
    group["masks"] = [rng.choice([row, [0, 1, 1][: len(row)], [-100, -100, -100], None]) for row in group["tokens"]]
    group["scores"] = [rng.randrange(3) for _ in group["tokens"]]
    group["advantages"] = rng.choice([None, [[0, 1.5, -0.5]] * 2_500])


@rare
def a_string_is_very_long(rng, group):
    row = rng.choice(group[rng.choice(ROWS)])
    row[place(rng, row)] = "x" * 300_000


def sampled(rng, rows):
    """What samplers, reference models and teachers tell of good tokens; 1.0 stands where there is no logp."""

    def logp():
        return 1.0 if rng.random() < 0.1 else -rng.expovariate(1)

    fields = {name: [[1.0, 1.0, *(logp() for _ in row[2:])] for row in rows] for name in LOGPS}
    sizes = [[rng.choice([0, 1, 3]) for _ in row] for row in rows]  # a teacher's entries differ from token to token
    fields["distill_token_ids"] = [[[rng.randrange(VOCAB) for _ in range(k)] for k in row] for row in sizes]
    fields["distill_logprobs"] = [[[-rng.expovariate(1) for _ in range(k)] for k in row] for row in sizes]
    fields["generation_params"] = {"temperature": rng.choice([1.0, 0.7]), "weight_version": rng.randrange(9)}
    return {name: value for name, value in fields.items() if name in TEACHER or rng.random() < 0.8}


def in_parts_as_released(rng, group, applied):
    """The records that a group becomes where it was posted in parts: mostly of one prompt and environment, and neighbours."""
    if type(group) is not dict or type(group.get("tokens")) is not list or rng.random() < 0.7:
        return [group]
    with suppress(TypeError, LookupError):
        for row, mask in zip(group["tokens"][1:], group["masks"][1:], strict=False):
            if rng.random() < 0.9:
                row[:2], mask[:2] = group["tokens"][0][:2], group["masks"][0][:2]
    cuts = sorted(rng.randrange(len(group["tokens"]) + 1) for _ in range(rng.choice([1, 1, 2])))
    spans = [slice(*ends) for ends in zip([0, *cuts], [*cuts, None], strict=True)]
    group["env_id"] = rng.choice([0] * 9 + [3, 2**63 - 1, 2**63, None, -1, True, 0.0, "0"])
    if rng.random() < 0.9:  # it says how large a whole one is, mostly truly
        size, shared = len(group["tokens"]), group.get("group_overrides")
        size = rng.choice([size] * 12 + [size + 1, 1, 0, -1, True, None, str(size), float(size)])
        group["group_overrides"] = (shared if type(shared) is dict else {}) | {"group_size": size}
    parts = [{name: rows[span] if type(rows) is list else rows for name, rows in group.items()} for span in spans]
    if rng.random() < 0.1:
        parts[-1]["env_id"] = rng.choice([0, 1, None])
    if rng.random() < 0.1:
        parts.insert(1, rng.choice([None, 5, group | {"env_id": None}, group | {"tokens": []}]))
    applied["in parts"] += 1
    return parts


def mutated(rng, applied):
    """A group after one to four mutations, counted by name in `applied`; seldom something else."""
    if rng.random() < 0.02:
        return anything(rng)
    lengths = [rng.randint(2, 12) for _ in range(rng.randint(1, 6))]
    group = make_group(np.random.default_rng(rng.getrandbits(32)), lengths)
    if rng.random() < 0.03:
        group = json.loads(rng.choice(RECORDED))
    elif rng.random() < 0.7:
        group |= sampled(rng, group["tokens"])
    if rng.random() < 0.2:
        group["advantages"] = None
    for mutate in rng.choices(MUTATIONS, k=rng.randint(1, 4)) + ([rng.choice(RARE)] if rng.random() < 0.003 else []):
        # an earlier mutation may have left nothing to bite on
        with suppress(TypeError, LookupError, AttributeError, ValueError, OverflowError):
            mutate(rng, group)
            applied[mutate.__name__] += 1
    return group


def written(rng, groups):
    """The text of a body, words not yet replaced."""
    text = json.dumps({"batch": groups}, ensure_ascii=rng.random() < 0.5, separators=(",", ":"))
    for word, raw in WORDS.items():
        text = text.replace(word, raw)
    return text


# -- the oracle -------------------------------------------------------------------------------------------------------

LARGEST = 2.0**128 - 2.0**104  # of float32
TRUNCATED = "truncated to max_token_len"
NO_TEMPERATURE = "trained at the run's temperature: its own is not a number above 0"
NO_LOGPS = {name: f"trained without {name}: they do not fit the tokens" for name in LOGPS}
NO_VERSIONS = "trained without weight_versions: they do not fit the tokens"
REPAIRED = {TRUNCATED, NO_TEMPERATURE, NO_VERSIONS, *NO_LOGPS.values()}
WIDEST = dict(vocab_size=None, max_token_len=None, overlong="truncate")  # rules by which most is good
WIDEST |= dict(record_temperature=False, reads_reference=False, reads_teacher=False)


@dataclass
class Verdict:
    """Of one sequence: every reason to leave it out, or (if there is none) what is trained."""

    reasons: set = field(default_factory=set)
    tokens: list = field(default_factory=list)
    trained: list = field(default_factory=list)  # of bools
    advantages: list = field(default_factory=list)  # by the record, 0 where untrained
    logps: dict = field(default_factory=dict)  # name -> one per token, NaN where there is none
    teacher: list = field(default_factory=list)  # per token its entries [(id, logp)]
    override: int = NONE
    temperature: float = math.nan
    score: float = math.nan
    env_id: int = -1
    weight_versions: list = field(default_factory=list)
    repaired: set = field(default_factory=set)
    error: float = 1e-9  # of an advantage, absolute


def is_number(value):
    return type(value) in (int, float)


def is_score(value):
    return type(value) is bool or (is_number(value) and is_finite(value))


def is_finite(value):
    return -LARGEST <= value <= LARGEST


def is_beyond_floats(value):
    """Which JSON knows, and no array of floats holds."""
    return type(value) is int and abs(value) > 1e308


def float32(value):
    """The nearest one of a number that is finite in float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def entry(group, name, i):
    rows = group.get(name)
    return rows[i] if type(rows) is list and i < len(rows) else None


def standardised(values, divided=True):
    """Each distinct value -> its difference from the mean, divided by the population deviation. Exact but for the end."""
    counts = Counter(map(Fraction, values))
    n = sum(counts.values())
    mean = sum(value * count for value, count in counts.items()) / n
    variance = sum((value - mean) ** 2 * count for value, count in counts.items()) / n
    deviation = max(math.sqrt(variance), 1e-8) if divided else 1.0
    if divided and math.sqrt(variance) <= 1e-5 * max(map(abs, values)):
        return dict.fromkeys(map(float, values), 0.0)
    return {float(value): float(value - mean) / deviation for value in counts}


def override_of(group, i):
    """NONE, ZERO, SFT; None if the value is neither true nor false."""
    own, shared = entry(group, "overrides", i), group.get("group_overrides")
    own, shared = (output if type(output) is dict else {} for output in (own, shared))
    names = ("set_advantage_to_zero", "sft")
    flags = [own.get(name) if own.get(name) is not None else shared.get(name) for name in names]
    for flag in flags:
        if not (flag is None or type(flag) is bool or (is_number(flag) and flag in (0, 1))):
            return None
    return ZERO if flags[0] else SFT if flags[1] else NONE


def advantages_of_scores(scores, overrides, method):
    """One per sequence, None without a finite score."""
    scores = [float(s) if is_score(s) else None for s in scores]
    counted = [s for s, override in zip(scores, overrides, strict=True) if s is not None and override == NONE]
    if method == "raw" or len(scores) == 1 or not counted:
        return scores
    new = standardised(counted, divided=method == "group_norm")
    if method == "rloo":  # the mean of the others is off by n / (n - 1) of the mean of all
        new = {s: a * len(counted) / max(len(counted) - 1, 1) for s, a in new.items()}
    return [None if s is None else new.get(s, 0.0) for s in scores]  # overridden ones do not matter


def read_mask(mask, tokens):
    """Trained or not, per token; None if it is neither 0/1 nor labels."""
    if all(value in (0, 1) for value in mask):
        trained = [value == 1 for value in mask]
    elif all(value in (-100, token) for value, token in zip(mask, tokens, strict=True)):
        trained = [value != -100 for value in mask]
    else:
        return None
    return [False, *trained[1:]]


def output(group, i, name):
    """By the first who says it, a null being no word."""
    places = [entry(group, "overrides", i), group.get("generation_params"), group.get("group_overrides")]
    return next((place[name] for place in places if type(place) is dict and place.get(name) is not None), None)


def read_temperature(value):
    """(temperature, whether it had to be set aside)"""
    if value is None:
        return math.nan, False
    good = is_number(value) and value >= 0.01 and is_finite(value)
    return (float(value) if good else math.nan), not good


def read_version(value):
    if type(value) is str and re.fullmatch(r"\d{1,15}", value):
        return float(int(value))
    return float(value) if type(value) is int and 0 <= value < 2**53 else math.nan


def read_versions(spans, version, length):
    """(one per token, whether the spans had to be set aside)"""
    versions = [read_version(version)] * length
    for span in spans if type(spans) is list else [] if spans is None else [spans]:
        start, end = (span.get(name) if type(span) is dict else None for name in ("start", "end"))
        if type(start) is not int or type(end) is not int or start < 0 or end < start or end > length:
            return [math.nan] * length, True
        versions = [read_version(span.get("version")) if start <= t < end else versions[t] for t in range(length)]
    return versions, False


def read_logps(row, trained, lowest):
    """(one per token, whether the row had to be set aside)"""
    unknown = [math.nan] * len(trained)
    if row is None or row == []:
        return unknown, False
    if type(row) is not list or len(row) != len(trained):
        return unknown, True
    if any(is_beyond_floats(value) or not (value is None or is_number(value)) for value in row):
        return unknown, True
    known = [t and value is not None and lowest <= value <= 1e-3 for value, t in zip(row, trained, strict=True)]
    return [float32(min(value, 0)) if k else math.nan for value, k in zip(row, known, strict=True)], False


def read_teacher(ids, logps, trained, vocab_size):
    """(entries per token, reasons). What is empty says nothing."""
    if not ids and not logps:
        return [[] for _ in trained], set()
    if not (type(ids) is type(logps) is list and len(ids) == len(logps) == len(trained)):
        return [], {"teacher does not fit the tokens"}
    rows = [(a or [], b or []) if t else ([], []) for a, b, t in zip(ids, logps, trained, strict=True)]
    if not all(type(a) is type(b) is list and len(a) == len(b) for a, b in rows):
        return [], {"teacher does not fit the tokens"}
    entries = [list(zip(a, b, strict=True)) for a, b in rows]
    reasons = set()
    for token, logp in (pair for row in entries for pair in row):
        if type(token) is not int or not -(2**63) <= token < 2**63 or not is_number(logp) or not logp <= 1e-3:
            reasons.add("teacher does not fit the tokens")
        if is_number(token) and not 0 <= token < (vocab_size or 2**31):
            reasons.add("token id outside the vocabulary")
        if is_beyond_floats(logp):
            reasons.add("teacher does not fit the tokens")
    if reasons:
        return [], reasons
    return [[(token, float32(min(max(logp, -LARGEST), 0))) for token, logp in row] for row in entries], set()


def is_group(record):
    return type(record) is dict and type(record.get("tokens")) is list


def environment_of(group):
    """-1 where the group names none."""
    env_id = group.get("env_id")
    return env_id if type(env_id) is int and 0 <= env_id < 2**63 else -1


def prompt_of(record):
    """What parts of one group have in common: environment, and first sequence up to its first trained token. Else None."""
    if not is_group(record) or environment_of(record) == -1 or not record["tokens"]:
        return None
    first = judge_one(record, 0, ZERO, None, WIDEST)
    border = first.trained.index(True) if True in first.trained else 0
    return (record["env_id"], *first.tokens[:border]) if border > 1 else None  # at 1 stands what begins every text


def whole_size_of(record, records):
    """How many sequences a whole group of the record's environment has; inf where nothing tells."""
    shared = record.get("group_overrides")
    output = shared.get("group_size") if type(shared) is dict else None
    if type(output) is int and output >= 1:
        return output
    alike = [r for r in records if is_group(r) and environment_of(r) == environment_of(record)]
    largest = max(len(r["tokens"]) for r in alike)
    return math.inf if largest == 1 else largest


def groups_in(records):
    """Numbers of the records of each group: those of one prompt, each smaller than a group, are parts of one as long as they
    make up no more than one."""
    groups = []  # [prompt, numbers of records, how many more sequences it has room for]
    for i, record in enumerate(records):
        prompt = prompt_of(record)
        size = len(record["tokens"]) if is_group(record) else 0
        room = math.nan if prompt is None else whole_size_of(record, records) - size
        same = [group for group in groups if group[0] == prompt]
        if prompt is not None and room > 0 and same and same[-1][2] > 0 and size <= same[-1][2]:
            same[-1][1].append(i)
            same[-1][2] -= size
        elif prompt is not None and room > 0:
            groups.append([prompt, [i], room])
        else:
            groups.append([object(), [i], 0])
    return [numbers for _, numbers, _ in groups]


def judge_all(records, rules):
    """A `Verdict` per sequence of a batch, in its order."""
    verdicts = {}
    for parts in groups_in(records):
        of_all = iter(judge([records[j] for j in parts], rules))
        sizes = {j: len(records[j]["tokens"]) if is_group(records[j]) else 1 for j in parts}
        verdicts |= {j: [next(of_all) for _ in range(size)] for j, size in sizes.items()}
    return [verdict for i in range(len(records)) for verdict in verdicts[i]]


def judge(parts, rules):
    """A `Verdict` per sequence of the records, which are one group; one for what is no group."""
    if not is_group(parts[0]):
        return [Verdict({"record is not a group"})]
    places = [(group, i) for group in parts for i in range(len(group["tokens"]))]
    overrides = [override_of(*place) for place in places]
    scores = [entry(group, "scores", i) for group, i in places]
    from_scores = advantages_of_scores(scores, overrides, rules["score_advantages"])
    known = zip(places, overrides, from_scores, strict=True)
    verdicts = [judge_one(*place, override, advantage, rules) for place, override, advantage in known]
    if rules["score_advantages"] in ("group_center", "rloo"):  # 0 less the mean of 3e38 and 1 is right to many digits of 3e38
        largest = max([1.0, *(abs(advantage) for advantage in from_scores if advantage is not None)])
        for verdict in verdicts:
            verdict.error *= largest
    return verdicts


def judge_one(group, i, override, score_advantage, rules):
    tokens, mask, advantages = (entry(group, name, i) for name in ROWS)
    reasons, trained = set(), None
    if type(tokens) is not list:
        return Verdict({"tokens are not a list of integers"})
    if any(type(token) is not int or not -(2**63) <= token < 2**63 for token in tokens):
        reasons.add("tokens are not a list of integers")
    if any(is_number(token) and not 0 <= token < (rules["vocab_size"] or 2**31) for token in tokens):
        reasons.add("token id outside the vocabulary")
    if len(tokens) < 2:
        reasons.add("fewer than two tokens")
    if rules["overlong"] == "drop" and len(tokens) > (rules["max_token_len"] or math.inf):
        reasons.add("longer than max_token_len")
    if mask is None:
        reasons.add("no mask")
    elif type(mask) is not list or not all(is_number(value) or type(value) is bool for value in mask):
        reasons.add("mask is neither labels nor 0/1")
    elif len(mask) != len(tokens):
        reasons.add("mask length differs from tokens")
    elif not (trained := read_mask(mask, tokens)):
        reasons.add("mask is neither labels nor 0/1")
    if type(mask) is list and any(map(is_beyond_floats, mask)):
        reasons.add("mask is neither labels nor 0/1")
    images = group.get("images")
    if entry(group, "images", i) if type(images) is list else images:
        reasons.add("has images")
    if override is None:
        reasons.add("override is neither true nor false")
    elif override == NONE:
        advantages, more = judge_advantages(advantages, score_advantage, trained or [False] * len(tokens))
        reasons |= more
    teacher = []
    if trained and rules["reads_teacher"]:
        teacher, more = read_teacher(*(entry(group, name, i) for name in TEACHER), trained, rules["vocab_size"])
        reasons |= more
    if reasons:
        return Verdict(reasons)
    values = (
        [0.0] * len(tokens) if override != NONE else [float(a) if t else 0.0 for a, t in zip(advantages, trained, strict=True)]
    )
    n = rules["max_token_len"]
    verdict = Verdict(set(), tokens[:n], trained[:n], values[:n], teacher=teacher[:n], override=override)
    if len(tokens) > (n or math.inf):
        verdict.repaired.add(TRUNCATED)
    add_what_is_mended(verdict, group, i, trained, rules)
    return verdict


def add_what_is_mended(verdict, group, i, trained, rules):
    """What a sequence may lack, or have wrong, and is trained all the same."""
    for name in LOGPS if rules["reads_reference"] else LOGPS[:1]:
        logps, set_aside = read_logps(entry(group, name, i), trained, -103.5 if name == "inference_logprobs" else -1000)
        verdict.logps[name] = logps[: rules["max_token_len"]]
        if set_aside:
            verdict.repaired.add(NO_LOGPS[name])
    if rules["record_temperature"]:
        verdict.temperature, set_aside = read_temperature(output(group, i, "temperature"))
        if set_aside:
            verdict.repaired.add(NO_TEMPERATURE)
    score = entry(group, "scores", i)
    verdict.score = float(score) if is_score(score) else math.nan
    verdict.env_id = environment_of(group)
    told = (output(group, i, name) for name in ("weight_versions", "weight_version"))
    versions, set_aside = read_versions(*told, len(trained))
    verdict.weight_versions = versions[: rules["max_token_len"]]
    if set_aside:
        verdict.repaired.add(NO_VERSIONS)


def judge_advantages(row, score_advantage, trained):
    """(one per token, reasons)"""
    if row is None or row == []:
        if score_advantage is None or not is_finite(score_advantage):
            return [], {"no finite score and no advantages"}
        return [score_advantage] * len(trained), set()
    row = row if type(row) is list else [row]
    if not all(map(is_number, row)) or len(row) not in (1, len(trained)):
        return [], {"advantages do not fit the tokens"}
    row = row if len(row) == len(trained) else row * len(trained)
    reasons = set()
    if any(map(is_beyond_floats, row)):
        reasons |= {"advantages do not fit the tokens", "advantage of a trained token is not finite"}
    if any(t and not is_finite(value) for value, t in zip(row, trained, strict=True)):
        reasons.add("advantage of a trained token is not finite")
    return row, reasons


# -- the two held against each other ----------------------------------------------------------------------------------


def assert_counts_can_be(counted, verdicts):
    """Whether each bad sequence can be given one of its own reasons so that every count is used up (Hall's theorem)."""
    kinds = Counter(frozenset(verdict.reasons) for verdict in verdicts if verdict.reasons)
    assert sum(counted.values()) == sum(kinds.values()), (counted, kinds)
    known = set(counted).union(*kinds)
    for size in range(1, len(known) + 1):
        for some in map(frozenset, combinations(known, size)):
            assert sum(counted.get(reason, 0) for reason in some) >= sum(n for kind, n in kinds.items() if kind <= some), kinds


def final(batch, normalization, clip, negative_scale):
    """Advantages of a batch (which are those of the record), shaped over all that is trained, then overridden."""
    overrides = [
        override for override, n in zip(batch.overrides.tolist(), batch.lengths.tolist(), strict=True) for _ in range(n)
    ]
    tokens = list(zip(batch.advantages.tolist(), batch.loss_mask.tolist(), overrides, strict=True))
    free = [advantage for advantage, trained, override in tokens if trained and override == NONE]
    new = {advantage: advantage for advantage in free}
    if normalization != "none" and free:
        new = standardised(free, divided=normalization == "batch")
    if clip is not None:
        new = {old: min(max(advantage, -clip), clip) for old, advantage in new.items()}
    new = {old: negative_scale * advantage if advantage < 0 else advantage for old, advantage in new.items()}
    fields = {ZERO: lambda _: 0.0, SFT: lambda _: 1.0, NONE: new.get}
    return [fields[override](advantage) if trained else 0.0 for advantage, trained, override in tokens]


def close(found, expected, error=1e-9):
    return len(found) == len(expected) and np.allclose(found, expected, rtol=1e-9, atol=error)


def drawn(number):
    """Of body `number`: its text, the rules it is decoded by, the mutations it has."""
    rng, applied = random.Random(number), Counter()
    groups = [mutated(rng, applied) for _ in range(rng.randint(1, 4))]
    text = written(rng, [part for group in groups for part in in_parts_as_released(rng, group, applied)])
    rules = dict(
        max_token_len=rng.choice([None, None, 6, 900]),
        overlong=rng.choice(["drop", "truncate"]),
        score_advantages=rng.choice(["group_norm", "group_center", "rloo", "raw"]),
        vocab_size=rng.choice([None, VOCAB, VOCAB, 49152]),
        record_temperature=rng.random() < 0.9,
        reads_reference=rng.random() < 0.7,
        reads_teacher=rng.random() < 0.7,
    )
    return text, rules, applied


OBJECTIVE = Objective("ppo_clip")
# normalisation, clip, scale of negative ones
SHAPINGS = [("none", None, 1.0), ("batch", None, 1.0), ("batch", 1.2, 2.0), ("batch_center", 0.7, 0.5), ("none", 1.5, 0.0)]


def assert_is(batch, good, rules):
    """Whether a batch holds what the good sequences are, each field as it stands there."""

    def flat(rows):
        return [value for row in rows for value in row]

    assert batch.lengths.tolist() == [len(verdict.tokens) for verdict in good]
    assert batch.tokens.tolist() == flat(verdict.tokens for verdict in good)
    assert batch.loss_mask.tolist() == flat(verdict.trained for verdict in good)
    assert batch.overrides.tolist() == [verdict.override for verdict in good]
    assert batch.env_ids.tolist() == [verdict.env_id for verdict in good]
    for name in ("temperature", "score"):
        assert same(getattr(batch, f"{name}s"), [getattr(verdict, name) for verdict in good]), name
    assert same(batch.weight_versions, flat(verdict.weight_versions for verdict in good))
    assert same(batch.behavior_logp, flat(verdict.logps["inference_logprobs"] for verdict in good))
    references = flat(verdict.logps["ref_logprobs"] for verdict in good) if rules["reads_reference"] else []
    assert same(batch.ref_logp, references)
    teacher = flat(verdict.teacher for verdict in good)  # no token has one if nobody asked
    assert batch.teacher_sizes.tolist() == [len(entries) for entries in teacher]
    assert batch.teacher_ids.tolist() == [token for entries in teacher for token, _ in entries]
    assert same(batch.teacher_logp, [logp for entries in teacher for _, logp in entries])
    errors = np.repeat([verdict.error for verdict in good], batch.lengths)
    assert close(batch.advantages, flat(verdict.advantages for verdict in good), errors)


def same(found, expected):
    """To the last bit; NaN is NaN."""
    return len(found) == len(expected) and np.array_equal(found, np.array(expected, found.dtype), equal_nan=True)


def assert_terms_are(batch, good, rules, rows):
    """Whether the terms of some rollouts have, token by token, what the good sequences say, and the run's where they do not."""
    coefficients = Coefficients(kl=float(rules["reads_reference"]), distill=float(rules["reads_teacher"]))
    terms = token_terms(batch, rows, np.ones(len(good)), LossSettings(OBJECTIVE, coefficients, 0.9))
    tokens = [(good[i], t, n) for n, i in enumerate(rows) for t, trained in enumerate(good[i].trained) if trained]
    assert terms.sequence_N.tolist() == dense([n for _, _, n in tokens])
    assert same(terms.behavior_logp_N.numpy(), [verdict.logps["inference_logprobs"][t] for verdict, t, _ in tokens])
    assert same(
        terms.fixed_weights_N.numpy(), [{ZERO: 0.0, SFT: 1.0}.get(verdict.override, math.nan) for verdict, _, _ in tokens]
    )
    temperatures = [0.9 if math.isnan(verdict.temperature) else verdict.temperature for verdict, _, _ in tokens]
    assert same(terms.temperature_N.numpy(), temperatures) and (terms.temperature_N > 0).all()
    if rules["reads_reference"]:
        assert same(terms.ref_logp_N.numpy(), [verdict.logps["ref_logprobs"][t] for verdict, t, _ in tokens])
    if rules["reads_teacher"]:
        entries = [verdict.teacher[t] for verdict, t, _ in tokens]
        K = max([1, *map(len, entries)])  # what is missing is filled up with probability 0
        filled = [[*row, *[(0, -math.inf)] * (K - len(row))] for row in entries]
        assert terms.teacher_ids_NK.tolist() == [[token for token, _ in row] for row in filled]
        probs = [math.exp(logp) for row in filled for _, logp in row]
        assert np.allclose(terms.teacher_probs_NK.flatten().numpy(), probs, rtol=1e-6, atol=1e-37)


@pytest.fixture(autouse=True)
def long_as_ever_afterwards(monkeypatch):
    monkeypatch.setattr(parser, "LONG", parser.LONG)


def dense(numbers):
    """The numbers, which rise, without gaps."""
    places = {number: place for place, number in enumerate(sorted(set(numbers)))}
    return [places[number] for number in numbers]


def check(number):
    """(groups of body `number` that held, what was met); no groups if no parser reads so deep a body."""
    text, rules, met = drawn(number)
    body = text.replace(DEEP, "[" * 1000 + "]" * 1000).encode("utf-8", "surrogatepass")
    parser.LONG = LONG[number % 2]
    start = time.perf_counter()
    try:
        groups = decode(body)
    except ValueError:
        assert DEEP in text  # orjson reads 1,024 levels, but not what else is in this body; json reads fewer
        return 0, met
    batch = AtroposBatchProcessor(**rules).decode(groups)
    shaping = SHAPINGS[number % len(SHAPINGS)]
    advantages = batch.with_final_advantages(Shaping(*shaping)).advantages
    assert time.perf_counter() - start < SECONDS

    records = json.loads(text.replace(DEEP, "[[[[]]]]"))["batch"]
    verdicts = judge_all(records, rules)
    good = [verdict for verdict in verdicts if not verdict.reasons]
    repaired = Counter(reason for verdict in good for reason in verdict.repaired)
    assert {reason: n for reason, n in batch.rejected.items() if reason in REPAIRED} == repaired
    counted = {reason: n for reason, n in batch.rejected.items() if reason not in REPAIRED}
    assert len(batch.lengths) + sum(counted.values()) == len(verdicts)
    assert_counts_can_be(counted, verdicts)
    assert_is(batch, good, rules)
    error = 1e-9 * max([1.0, *abs(batch.advantages)]) if shaping[0] == "batch_center" else 1e-9
    assert close(advantages, final(batch, *shaping), error) and not advantages[~batch.loss_mask].any()
    rows = sorted(random.Random(number).sample(range(len(good)), min(len(good), 5)))
    if rows:
        assert_terms_are(batch, good, rules, rows)
    found = Counter(good=len(good), joined=len(records) - len(groups_in(records)))
    found |= Counter(logps=int((~np.isnan(batch.behavior_logp)).sum()), teacher=len(batch.teacher_ids))
    return len(records), met + Counter(batch.rejected) + found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wanted", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_groups_are_trained_as_an_oracle_reads_them_or_left_out_with_a_true_reason(wanted, caplog):
    met = Counter()
    number = held = passed_over = 0
    while held < wanted:
        try:
            groups, more = check(number)
        except Exception as fault:
            text, rules, _ = drawn(number)
            raise AssertionError(f"body {number} by {rules}: {text[:3000]}") from fault
        met.update(more)
        held, passed_over, number = held + groups, passed_over + (groups == 0), number + 1
        caplog.clear()
    assert passed_over < number / 20
    assert min(met[mutate.__name__] for mutate in MUTATIONS) > wanted / 50
    assert wanted < 10_000 or all(met[mutate.__name__] for mutate in RARE)
    assert min(met[reason] for reason in {*REASONS} - NEVER_MET) > wanted / 250 and met["good"] > wanted / 2
    assert met["joined"] > wanted / 50 and min(met["logps"], met["teacher"]) > wanted


def test_a_long_string_among_the_tokens_takes_no_memory():
    body = json.dumps({"batch": [{"tokens": [[5] * 4096 + ["x" * 20_000]], "masks": [[1] * 4097], "scores": [1.0]}]}).encode()
    tracemalloc.start()
    try:
        assert AtroposBatchProcessor().decode(decode(body)).rejected == {"tokens are not a list of integers": 1}
        assert tracemalloc.get_traced_memory()[1] < 2**23  # an array of strings would take 2**28
    finally:
        tracemalloc.stop()


# -- bodies that are not what they were -------------------------------------------------------------------------------


def assert_a_list_or_a_value_error(body):
    start = time.perf_counter()
    try:
        groups = decode(body)
    except ValueError:
        groups = []
    assert type(groups) is list
    batch = AtroposBatchProcessor(vocab_size=49152, reads_reference=True, reads_teacher=True).decode(groups)
    assert all(not (logps > 0).any() and not np.isinf(logps).any() for logps in (batch.behavior_logp, batch.ref_logp))
    assert ((batch.tokens >= 0) & (batch.tokens < 49152)).all() and np.isfinite(batch.advantages).all()
    assert time.perf_counter() - start < SECONDS


@pytest.mark.timeout(300)
def test_a_body_of_damaged_bytes_is_a_list_or_a_value_error(caplog):
    for number in range(3000):
        rng, parser.LONG = random.Random(number), LONG[number % 2]
        text, _, _ = drawn(number)
        small = text.replace(DEEP, "[" * 1030 + "]" * 1030).encode("utf-8", "surrogatepass")
        body = bytearray(BODIES[number % len(BODIES)] if number % 20 == 0 else small[:50_000])
        for _ in range(rng.randint(1, 4)):
            i, n = rng.randrange(len(body) + 1), rng.choice([1, 1, 2, 20, 1000])
            flipped = bytes(b ^ 1 << rng.randrange(8) for b in body[i : i + n])
            body[i : i + n] = rng.choice(
                [flipped, b"", 2 * body[i : i + n], rng.randbytes(1), bytes([rng.choice(b'[]{},:"-0eN')])]
            )
        try:
            assert_a_list_or_a_value_error(bytes(body))
        except Exception as fault:
            raise AssertionError(f"body {number}: {bytes(body)[:3000]}") from fault
        caplog.clear()


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"\0", b"\xff", b"\xef\xbb\xbf", b"[", b"{", b"null", b"[]", b"5", b"NaN", b'"batch"', b"{}",
        b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"batch":' * 100_000, b'{"batch":[' + b"[" * 100_000,
        b'{"batch":[' + b"[" * 1020 + b"]" * 1020 + b"]}", b'{"batch":[' + b'{"tokens":' * 1000 + b"0" + b"}" * 1000 + b"]}",
        b'{"batch":[' + b"[" * 990 + b"NaN" + b"]" * 990 + b"]}", b'{"batch":[' + b"9" * 100_000 + b"]}",
        b'{"batch":null}', b'{"batch":[]}', b'{"batch":[1e999,NaN,"\\ud800",null]}', b'{"batch":[],"batch":[5]}',
        '{"batch":[5]}'.encode("utf-16"), '{"batch":[5]}'.encode("utf-32-be"),
        b'{"batch":["\xed\xa0\x80"]}', b'{"batch":["\xff"]}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_body_of_odd_json_is_a_list_or_a_value_error(body):
    assert_a_list_or_a_value_error(body)


@pytest.mark.parametrize("batch", [5, True, 1.5, "text", {"tokens": []}])
def test_a_batch_that_is_no_list_is_a_value_error(batch):
    assert_a_list_or_a_value_error(json.dumps({"batch": batch}).encode())
