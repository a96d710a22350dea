"""Runs that are killed again and again end bitwise where the untouched run does."""

import contextlib
import os
import random
import signal
import subprocess

import psutil
import pytest
import torch
from atropos_server import free_port
from conftest import ROOT, clean_environment
from fed_run import STEPS, assert_bitwise_equal, fed, flags, make_groups, make_settings, state_of, steps_of, train, untouched
from safetensors.torch import load_file

PLACES = ("fetch", "append", "fsync", "appended", "step", "save", "finish", "prune", "export")


@pytest.fixture
def groups(rng):
    return make_groups(rng)


@pytest.fixture
def settings(tiny_model, tmp_path):
    return make_settings(tiny_model, tmp_path)


def test_kills_at_exact_places_change_nothing(settings, groups, tmp_path):
    folder, said = tmp_path / "run", {}
    with fed(folder, groups) as (server, feeder):
        settings |= {"atropos_url": server.url, "output_dir": folder}
        for place in PLACES:
            at = "2@0" if place in ("fetch", "append", "fsync", "appended", "step") else "1"
            said[place] = train(settings, script=f"tests/kill_at.py {place} {at}", codes=(1, -signal.SIGKILL))
            assert state_of(folder)["state"] != "finished"
            feeder.the_run_is_dead()
        train(settings)
    assert "is lost" in said["fsync"] and "bytes off the end of" in said["fsync"]
    assert_bitwise_equal(folder, untouched(settings, groups, tmp_path / "untouched"))


def end_at_random(settings, groups, folder, most, dice):
    """A run under the deepspeed launcher. A rank, the launcher, or all of it is killed at random moments, at most so often,
    and started again. How often that was."""
    kills = 0
    with fed(folder, groups) as (server, feeder):
        command = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port"]
        while True:
            run = psutil.Popen(
                [*command, str(free_port()), "train.py", *flags(settings, atropos_url=server.url, output_dir=folder)],
                env=clean_environment(), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                moment = 6 + 9 * dice.random() if kills < most else 240  # it trains from about the eighth second on
                with contextlib.suppress(psutil.TimeoutExpired):
                    assert run.wait(moment) == 0
                    assert state_of(folder)["state"] == "finished"
                    return kills
                family = run.children(recursive=True)
                kill_one_of(run, family, dice.choice(["rank 0", "rank 1", "runner", "launch", "all"]))
                kills += 1
                run.wait(60)
                _, alive = psutil.wait_procs(family, timeout=60)
                assert not alive
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
            feeder.the_run_is_dead()


def kill_one_of(run, family, whom):
    ranks = [process for process in family if "train.py" in process.cmdline()[-40:] and "launch" not in str(process.cmdline())]
    launch = [process for process in family if "deepspeed.launcher.launch" in process.cmdline()]
    victims = {"rank 0": ranks[:1], "rank 1": ranks[1:], "runner": [run], "launch": launch, "all": [*family, run]}[whom]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])])
def test_kills_at_random_moments_change_nothing(kills, settings, groups, tmp_path):
    wanted = untouched(settings, groups, tmp_path / "untouched")
    dice, done, run = random.Random(kills), 0, 0
    while done < kills:
        run += 1
        done += end_at_random(settings, groups, tmp_path / f"run{run}", min(8, kills - done), dice)
        assert_bitwise_equal(tmp_path / f"run{run}", wanted)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fetch_mode": "rank0", "num_ranks": 1}])
def test_ranks_that_fetch_for_themselves_lose_nothing(changes, settings, groups, tmp_path):
    folder = tmp_path / "run"
    with fed(folder, groups, parts=2) as (server, feeder):
        settings |= {"atropos_url": server.url, "output_dir": folder, "fetch_mode": "per_rank"}
        for place in ("appended 2@0", "fetch 2@1", "appended 1@1"):
            train(settings, script=f"tests/kill_at.py {place}", codes=(1, -signal.SIGKILL))
            feeder.the_run_is_dead()
        safe = [sum(map(len, piece["tokens"])) for piece in feeder.pieces[: feeder.arrived()]]
        if not changes:
            train(settings)
    if changes:  # what the two had fetched is trained, the rest comes to one
        with fed(folder, groups * 2) as (server, _):
            train(settings | {"atropos_url": server.url}, **changes)
    trained = [s["tokens/total"] for s in steps_of(folder)]
    assert len(trained) == STEPS
    replayed = (len(safe) + 1) // 2
    assert len(safe) > 2 and (sum(trained[:replayed]) == sum(safe) or not changes)
    if not changes:
        assert trained == [sum(map(len, group["tokens"])) for group in groups]
        settings |= {"fetch_mode": "rank0"}
        ours, theirs = (
            load_file(f / "final" / "model.safetensors") for f in (folder, untouched(settings, groups, tmp_path / "u"))
        )
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
