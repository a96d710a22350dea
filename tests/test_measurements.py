"""The metrics of a step, counted by hand."""

import math

import numpy as np
import pytest
from atropos_server import group

from wsft import AtroposBatchProcessor
from wsft.distributed.load_balancing import Cost, Load
from wsft.model.packing import Prefixes
from wsft.run.measurements import missing, of_batch, of_plan, of_tokens

NAN = math.nan
LOGPS = [1.0, 1.0, -0.5, -0.25, 1.0, -2.0]  # 1.0 stands where there is none


def process(*records, **rules):
    return AtroposBatchProcessor(**rules).process_atropos_batch(list(records))


def one(**fields):
    """A group of one sequence: six tokens, of which four are trained, and score 0."""
    return group(size=1) | fields


def test_what_is_written_of_a_batch_is_what_one_counts():
    """Seven sequences come, six are trained."""
    pair = group() | {"env_id": 0, "generation_params": {"weight_version": 3}}  # scores 0 and 1
    pair["inference_logprobs"] = [LOGPS, LOGPS]  # which lack that of one trained token each
    lone = one(scores=[5.0], env_id=4, generation_params={"weight_version": "5"})  # keeps its score as advantage
    complete = one(
        scores=[None], advantages=[[9, 9, 0.5, 0.5, -0.5, -0.5]], inference_logprobs=[[-1.0] * 5]
    )  # one logp too few
    chosen = one(overrides=[{"sft": True, "temperature": 0}])  # which is no temperature
    long = one(tokens=[[8] * 9], masks=[[-100, -100, *[8] * 7]], scores=[2.0], env_id=4)  # and another prompt
    bad = one(tokens=[[1, 2, 3, 4, 5, -6]])
    values = of_batch(process(pair, lone, complete, chosen, long, bad, max_token_len=6, overlong="truncate"), step=7)
    # of the long one four are trained, too; advantages: 4 times -1, 1, 5 and 2, twice 0.5 and -0.5, and 1 by override
    advantages = [-1] * 4 + [1] * 4 + [5] * 4 + [0.5, 0.5, -0.5, -0.5] + [1] * 4 + [2] * 4
    assert values == pytest.approx(
        {
            "tokens/trained": 24,
            "tokens/total": 36,
            "advantage/mean": 32 / 24,
            "advantage/std": math.sqrt((4 + 4 + 100 + 1 + 4 + 16) / 24 - (32 / 24) ** 2),
            "data/sequences": 6,
            "data/rejected": 1,
            "data/truncated": 1,
            "data/repaired": 2,  # the logps that do not fit, the temperature
            "data/zero_weight_groups": 0,
            "data/cut_off": 0,
            "data/staleness": (8 * 4 + 4 * 2) / 12,  # of the trained tokens where it is known
            "data/staleness_max": 4,
            "data/staleness/env_0": 4,
            "data/staleness/env_4": 2,
            "data/no_version": 12,
            "data/no_behavior_logp": 2 + 16,
            "data/no_behavior_sequences": 4,
            "score/mean": (0 + 1 + 5 + 0 + 2) / 5,
            "score/std": math.sqrt((1 + 25 + 4) / 5 - (8 / 5) ** 2),
            "score/env_0/mean": 0.5,
            "score/env_0/std": 0.5,
            "score/env_4/mean": 3.5,
            "score/env_4/std": 1.5,
        }
    )
    assert np.std(advantages) == pytest.approx(values["advantage/std"]) and sum(advantages) == 32
    assert all(type(value) in (int, float) for value in values.values())  # as JSON takes them


def test_of_what_nobody_says_nothing_is_written_but_nan():
    values = of_batch(process(one(scores=None, advantages=[0.5], env_id=3)), step=0)
    unknown = {"data/staleness", "data/staleness_max", "data/staleness/env_3"}
    unknown |= {"score/mean", "score/std", "score/env_3/mean", "score/env_3/std"}
    assert {name for name, value in values.items() if math.isnan(value)} == unknown
    values = of_batch(process(), step=0)
    assert values["tokens/trained"] == values["data/sequences"] == 0 and math.isnan(values["advantage/mean"])


SUMS = {
    "tokens": 8.0, "positive": 4.0, "logp_positive": -6.0, "negative": 2.0, "logp_negative": -5.0, "entropy": 12.0,
    "weight": 3.0, "weight_abs": 7.0, "behavior": 5.0, "ratio": 6.0, "ratio_squared": 9.0, "clipped": 2.0,
    "k1": 0.5, "k3": 0.25,
}  # fmt: skip


def test_means_over_tokens_are_sums_over_their_counts():
    """Of 10 trained tokens 8 were run; 5 of them have a sampler's logp."""
    assert of_tokens(SUMS, {"ratio": 3.5}, trained=10) == pytest.approx(
        {
            "logp/positive": -6 / 4,
            "logp/negative": -5 / 2,
            "entropy": 12 / 8,
            "weight/mean": 3 / 10,
            "weight/mean_abs": 7 / 10,
            "ratio/mean": 6 / 5,
            "ratio/ess": 6**2 / (5 * 9),
            "ratio/max": 3.5,
            "ratio/clipped": 2 / 5,
            "kl/behavior_k1": 0.5 / 5,
            "kl/behavior_k3": 0.25 / 5,
        }
    )


def test_reference_and_teacher_are_written_of_where_the_loss_has_them():
    sums = SUMS | {"reference": 6.0, "kl_reference": 1.5, "teacher": 2.0, "divergence": 5.0}
    more = of_tokens(sums, {"ratio": 3.5}, trained=8)
    assert (more["kl/reference"], more["data/no_ref_logp"]) == (1.5 / 6, 2)
    assert (more["kl/teacher"], more["data/no_teacher"]) == (5 / 2, 6)
    assert set(more) - set(of_tokens(SUMS, {"ratio": 3.5}, trained=8)) == {
        *("kl/reference", "data/no_ref_logp", "kl/teacher", "data/no_teacher")
    }


def test_shares_that_corrections_mask_are_of_the_tokens_that_they_concern():
    sums = SUMS | {"corrected": 4.0, "factor": 3.0, "factor_squared": 3.0, "capped": 1.0, "geometric_masked": 2.0}
    values = of_tokens(sums, {"ratio": 3.5}, trained=8)
    assert {name: x for name, x in values.items() if name.startswith("mismatch/")} == {
        "mismatch/ess": 9 / (4 * 3), "mismatch/capped": 0.25, "mismatch/geometric_masked": 0.5,
    }  # fmt: skip


def test_means_over_no_tokens_are_nan():
    nothing = dict.fromkeys(SUMS, 0.0) | {"reference": 0.0, "kl_reference": 0.0, "teacher": 0.0, "divergence": 0.0}
    values = of_tokens(nothing, {"ratio": 0.0}, trained=0)
    counts = {"data/no_ref_logp", "data/no_teacher"}
    assert {name for name, value in values.items() if math.isnan(value)} == set(values) - counts
    assert all(values[name] == 0 for name in counts)


def test_the_plan_is_written_as_its_rows_are_filled():
    """Rows of 6 + 4 and of 3 + 2 tokens, one for each rank: packed nothing is filled up, padded 2 and 1 are. The second rank
    waits for half of the first's 10."""
    load, shares = Load(np.array([6, 4, 3, 2, 9]), Cost(), Prefixes.none(5)), [[[0, 1]], [[2, 3]]]
    assert of_plan(shares, load, packed=True) == {
        "plan/micro_batches": 1,
        "plan/padding": 0.0,
        "plan/imbalance": pytest.approx(1 - 15 / 20),
        "plan/shared": 0.0,
        "plan/skipped": 1,
    }
    assert of_plan(shares, load, packed=False)["plan/padding"] == pytest.approx(3 / 18)
    assert of_plan([[[]], [[]]], load, packed=True)["plan/padding"] == 0.0
    alike = Prefixes(np.array([0, 0, 2, 2, 4]), np.array([3, 3, 0, 0, 0]))
    assert of_plan(shares, Load(load.lengths, Cost(), alike), packed=True)["plan/shared"] == pytest.approx(3 / 15)


FULL = {
    "inference_logprobs": [LOGPS],
    "ref_logprobs": [LOGPS],
    "distill_token_ids": [[[5]] * 6],
    "distill_logprobs": [[[-1.0]] * 6],
}
BARE = dict.fromkeys(FULL)
READING = {"reads_reference": True, "reads_teacher": True}
SAYS = {
    "inference_logprobs": "every ratio is 1",
    "ref_logprobs": "there is no KL term",
    "distill_token_ids": "there is no distillation term",
}


def test_what_is_missing_is_what_no_trained_token_has():
    assert missing(process(one(**FULL), **READING), needs_behavior=True) == {}
    assert missing(process(one(**BARE), **READING), needs_behavior=True) == SAYS
    assert missing(process(one(**BARE), one(**FULL), **READING), needs_behavior=True) == {}  # some have it
    assert missing(process(one(**BARE)), needs_behavior=False) == {}  # what nobody asked for is not missing


@pytest.mark.parametrize(
    "fields, names",
    [
        ({"inference_logprobs": [[1.0] * 6]}, ["inference_logprobs"]),
        ({"inference_logprobs": [[-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]]}, ["inference_logprobs"]),  # of the prompt only
        ({"inference_logprobs": []}, ["inference_logprobs"]),
        ({"inference_logprobs": [[-1.0] * 5]}, ["inference_logprobs"]),
        ({"ref_logprobs": [[1.0] * 6]}, ["ref_logprobs"]),
        ({"distill_token_ids": [[[]] * 6], "distill_logprobs": [[[]] * 6]}, ["distill_token_ids"]),
        ({"distill_token_ids": [[[5]] * 2 + [[]] * 4], "distill_logprobs": [[[-1.0]] * 2 + [[]] * 4]}, ["distill_token_ids"]),
    ],
)
def test_placeholders_empty_rows_and_what_the_prompt_has_are_missing(fields, names):
    found = missing(process(one(**FULL | fields), **READING), needs_behavior=True)
    assert found == {name: SAYS[name] for name in names}


def test_overridden_sequences_need_no_sampler():
    for override in ({"sft": True}, {"set_advantage_to_zero": True}):
        overridden = one(overrides=[override])
        assert missing(process(overridden), needs_behavior=True) == {}
        assert "inference_logprobs" in missing(process(overridden, one()), needs_behavior=True)


def test_a_batch_that_trains_nothing_misses_nothing():
    """Sequences that are all masked occur: under `strict` they must not end a run."""
    masked = {"masks": [[-100] * 6]}
    assert missing(process(one(**FULL | masked), **READING), needs_behavior=True) == {}
