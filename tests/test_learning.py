"""Learning from off-policy data: the short form of benchmarks/learning.py, through train.py and a real Atropos server."""

import pytest
from conftest import RANK_VARIABLES, clean_environment

from benchmarks.learning import BY_STEP, TARGET, Plan, first_reached, learn_all


def slow(*values):
    return pytest.param(values, marks=pytest.mark.slow)


FEW = 24  # steps, in which the reward doubles


@pytest.fixture(
    scope="module",
    params=[("importance_sampling", FEW), slow("importance_sampling", BY_STEP), slow("ppo_clip", BY_STEP)],
    ids=lambda plan: f"{plan[0]}-{plan[1]}",
)
def run(request, tmp_path_factory):
    objective, steps = request.param
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("PATH", clean_environment()["PATH"])
        (learned,) = learn_all([Plan(objective, 0, steps, tmp_path_factory.mktemp("learning"))], parallel=1)
        return learned


def test_the_stated_reward_is_reached_in_the_stated_steps(run):
    assert run["reward"][0] < 0.2 < TARGET
    if run["steps"][-1] < BY_STEP:
        assert run["reward"][-1] > 2 * run["reward"][0], run["reward"]
    else:
        assert first_reached(run) is not None and first_reached(run) <= BY_STEP, run["reward"]


def test_the_metrics_say_how_stale_the_data_was_arranged_to_be(run):
    assert run["data/staleness"] == [0, 1, 2, 3] + [4, 5, 6, 7] * (run["steps"][-1] // 4 - 1)


def test_the_sampler_and_the_trainer_agree_on_logps(run):
    """The ratio is 1 on data of the very weights, through JSON and at the record's temperature; not on stale data."""
    assert run["ratio/max"][0] == pytest.approx(1, abs=1e-5)
    assert run["kl/behavior_k3"][0] < 1e-9
    assert min(run["kl/behavior_k3"][1:]) > 1e-4
