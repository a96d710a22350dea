"""Off-policy data teaches: the short form of benchmarks/learning.py, through train.py and a real Atropos server."""

import pytest
from conftest import RANK_VARIABLES, clean_environment

from benchmarks.learning import BY_STEP, TARGET, Plan, first_reached, learn_all

CORRECTED = ("importance_sampling", "ppo_clip")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each objective, side by side."""
    plans = [Plan(objective, 0, BY_STEP, tmp_path_factory.mktemp(objective)) for objective in CORRECTED]
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("PATH", clean_environment()["PATH"])
        return {run["objective"]: run for run in learn_all(plans, parallel=2)}


@pytest.mark.parametrize("objective", CORRECTED)
def test_the_stated_reward_is_reached_in_the_stated_steps(runs, objective):
    run = runs[objective]
    assert run["reward"][0] < 0.2 < TARGET
    assert first_reached(run) is not None and first_reached(run) <= BY_STEP, run["reward"]


@pytest.mark.parametrize("objective", CORRECTED)
def test_the_metrics_say_how_stale_the_data_was_arranged_to_be(runs, objective):
    stale = runs[objective]["data/staleness"]
    assert stale == [0, 1, 2, 3] + [4, 5, 6, 7] * (BY_STEP // 4 - 1)


@pytest.mark.parametrize("objective", CORRECTED)
def test_the_sampler_and_the_trainer_agree_on_logps(runs, objective):
    """The ratio is 1 on data of the very weights, through JSON and at the record's temperature; not on stale data."""
    assert runs[objective]["ratio/max"][0] == pytest.approx(1, abs=1e-5)
    assert runs[objective]["kl/behavior_k3"][0] < 1e-9
    assert min(runs[objective]["kl/behavior_k3"][1:]) > 1e-4
