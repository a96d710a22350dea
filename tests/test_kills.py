"""Runs that are killed repeatedly end with bitwise the same parameters as the undisturbed run."""

import contextlib
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
import torch
from atropos_server import free_port
from conftest import ROOT, clean_environment, write_groups
from fed_run import (
    PATIENCE_S,
    STEPS,
    assert_bitwise_equal,
    command_of,
    fed,
    flags,
    is_rank,
    make_groups,
    make_settings,
    state_of,
    steps_of,
    train,
    untouched,
    wait_until,
)
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from wsft.run.checkpoint import all_in

VICTIMS = ("runner", "rank 1", "launch", "rank 0", "all")
PLACES = ("append", "fsync", "step", "save", "finish", "prune")
MORE_PLACES = ("fetch", "appended", "export")


@pytest.fixture
def groups(rng):
    return make_groups(rng)


@pytest.fixture
def settings(tiny_model, tmp_path):
    return make_settings(tiny_model, tmp_path)


@pytest.mark.parametrize("places", [PLACES, pytest.param(MORE_PLACES, marks=pytest.mark.slow)])
def test_kills_at_exact_places_change_nothing(places, settings, groups, tmp_path):
    folder, output = tmp_path / "run", {}
    with fed(folder, groups) as (server, feeder):
        settings |= {"atropos_url": server.url, "output_dir": folder}
        for place in places:
            at = "2@0" if place in ("fetch", "append", "fsync", "appended", "step") else "1"
            output[place] = train(settings, script=f"tests/kill_at.py {place} {at}", codes=(1, -signal.SIGKILL))
            assert state_of(folder)["state"] != "finished"
            feeder.run_is_dead()
        train(settings)
    if "fsync" in places:
        assert "is lost" in output["fsync"] and "bytes off the end of" in output["fsync"]
    assert_bitwise_equal(folder, untouched(settings, groups, tmp_path / "untouched"))


def test_training_goes_on_while_a_checkpoint_is_written(settings, groups, tmp_path):
    """Killed before anything of it is written, there is none; written two steps late, it is that of its own step."""
    settings |= {"data": write_groups(tmp_path / "data.jsonl", groups)}
    killed, late, waiting = tmp_path / "killed", tmp_path / "late", tmp_path / "waiting"
    train(settings, script="tests/kill_at.py unwritten 5@0", codes=(1, -signal.SIGKILL), output_dir=killed)
    assert not all_in(killed / "checkpoints") and len(steps_of(killed)) == 5 and state_of(killed)["step"] == 0
    output = train(settings, script="tests/kill_at.py late 2", output_dir=late, keep_checkpoints=9)
    said = [line.split("/")[0] if line.startswith("step ") else line for line in output.splitlines()]
    saved = next(i for i, line in enumerate(said) if line.startswith("saved") and "step_3:" in line)
    assert said.index("step 5") < saved < said.index("step 8")
    train(settings, output_dir=waiting, background_save=False, keep_checkpoints=9)
    train(settings, output_dir=killed)
    for folder in (killed, late):
        assert_bitwise_equal(folder, waiting)
    for ours, theirs in zip(all_in(late / "checkpoints"), all_in(waiting / "checkpoints"), strict=True):
        assert ours.step == theirs.step and ours.metadata["feed"] == theirs.metadata["feed"]
        for name in (path.name for path in (theirs.folder / "deepspeed").glob("*_states.pt")):
            a, b = (torch.load(each.folder / "deepspeed" / name, weights_only=False) for each in (ours, theirs))
            assert all(map(same, tree_leaves(a), tree_leaves(b))), name


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b)


def test_a_run_killed_between_the_updates_of_a_batch_trains_the_whole_batch_again(settings, groups, tmp_path, monkeypatch):
    """Three batches of two groups and two updates: save_steps 3 falls into the second, the last kill into the third. The
    batches of the killed run are from a generator, those of the other from a file."""
    settings |= {"batch_size": 8, "updates_per_batch": 2, "training_steps": 6, "warmup_steps": 1}
    settings |= {"objective": "ppo_clip", "mismatch_cap": 1.5}
    write_groups(tmp_path / "batches.jsonl", [groups[i : i + 2] for i in (0, 2, 4)])
    monkeypatch.setenv("WSFT_BATCHES", str(tmp_path / "batches.jsonl"))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    source = {"source": "tests.own_loop:batches_of", "output_dir": killed}
    for place in ("fetch 2@0", "step 5@0"):
        train(settings, script=f"tests/kill_at.py {place}", codes=(1, -signal.SIGKILL), **source)
    assert [c.step for c in all_in(killed / "checkpoints")] == [4] and len(steps_of(killed)) == 5
    train(settings, **source)
    train(settings, output_dir=whole, data=write_groups(tmp_path / "data.jsonl", groups[:6]))
    assert_bitwise_equal(killed, whole, num_steps=6)
    assert [step["data/sequences"] for step in steps_of(whole)] == [4] * 6


def end_at_random(settings, groups, folder, kills, dice):
    """A run under the deepspeed launcher. One of its processes, or all, is killed so often, somewhere between the start of the
    ranks and the last step, and the run started again; the others end by themselves."""
    with fed(folder, groups, released=0) as (server, feeder):
        command = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port"]
        for kill in range(kills + 1):
            run = psutil.Popen(
                [*command, str(free_port()), "train.py", *flags(settings, atropos_url=server.url, output_dir=folder)],
                env=clean_environment(), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                if kill == kills:
                    feeder.release(STEPS)
                    assert run.wait(PATIENCE_S) == 0
                    return
                wait_until(lambda run=run: len(list(filter(is_rank, run.children(recursive=True)))) == 2)
                steps = dice.randrange(STEPS)
                feeder.release(steps)  # and no more, so that it cannot end
                if dice.random() < 0.75:  # at work; else while it loads
                    wait_until(lambda steps=steps: len(steps_of(folder)) >= steps - 1)
                time.sleep(dice.random())
                family = run.children(recursive=True)
                kill_one_of(run, family, VICTIMS[kill % len(VICTIMS)])
                run.wait(PATIENCE_S)
                _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
                assert not alive
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
            feeder.run_is_dead()


def kill_one_of(run, family, whom):
    ranks = list(filter(is_rank, family))
    launch = [process for process in family if "deepspeed.launcher.launch" in command_of(process)]
    victims = {"rank 0": ranks[:1], "rank 1": ranks[1:], "runner": [run], "launch": launch, "all": [*family, run]}[whom]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kills", [1, 20])
def test_kills_at_random_moments_change_nothing(kills, settings, groups, tmp_path):
    wanted = untouched(settings, groups, tmp_path / "untouched")
    dice = random.Random(kills)
    for run in range(0, kills, 8):
        end_at_random(settings, groups, tmp_path / f"run{run}", min(8, kills - run), dice)
        assert_bitwise_equal(tmp_path / f"run{run}", wanted)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fetch_mode": "rank0", "num_ranks": 1}])
def test_ranks_that_fetch_for_themselves_lose_nothing(changes, settings, groups, tmp_path):
    folder = tmp_path / "run"
    with fed(folder, groups, parts=2) as (server, feeder):
        settings |= {"atropos_url": server.url, "output_dir": folder, "fetch_mode": "per_rank"}
        for place in ("appended 2@0", "fetch 2@1", "appended 1@1"):
            train(settings, script=f"tests/kill_at.py {place}", codes=(1, -signal.SIGKILL))
            feeder.run_is_dead()
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
