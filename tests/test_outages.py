"""Failures of the server and the disk: no fetched batch is lost, and the run continues or can be resumed."""

import os
import subprocess
import sys

import pytest
import requests
from atropos_server import post_group, register_env
from fed_run import (
    STEPS,
    assert_bitwise_equal,
    fed,
    make_groups,
    make_settings,
    state_of,
    steps_of,
    train,
    untouched,
    wait_until,
)

ROOT_ONLY = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk: needs root")


@pytest.fixture
def groups(rng):
    return make_groups(rng)


@pytest.fixture
def settings(tiny_model, tmp_path):
    return make_settings(tiny_model, tmp_path) | {"output_dir": tmp_path / "run"}


@pytest.mark.parametrize("fetch_mode", ["rank0", pytest.param("per_rank", marks=pytest.mark.slow)])
def test_a_server_killed_restarted_and_reset_costs_nothing_that_was_fetched(fetch_mode, settings, groups, tmp_path):
    folder, parts = tmp_path / "run", 2 if fetch_mode == "per_rank" else 1
    with fed(folder, groups, parts, released=3) as (server, feeder):

        def restart():
            server.kill()
            server.start()

        def trouble(processes):
            for steps, fault in ((3, restart), (6, lambda: requests.get(f"{server.url}/reset_data", timeout=60))):
                feeder.release(steps)
                wait_until(lambda steps=steps: len(steps_of(folder)) >= steps)
                feeder.release(steps + 1)  # which may be in the server by now, on its way, or with the trainer
                feeder.server_loses_all(fault)
            feeder.release(STEPS)

        settings |= {"atropos_url": server.url, "fetch_mode": fetch_mode}
        output = train(settings, during=trouble)
        assert "registering again" in output
    wanted = untouched(settings | {"fetch_mode": "rank0"}, groups, tmp_path / "untouched")
    tokens, wanted_tokens = ([step["tokens/total"] for step in steps_of(of)] for of in (folder, wanted))
    if parts == 1:
        assert_bitwise_equal(folder, wanted)
        assert tokens == wanted_tokens
    # parts that wait together are handed out in any order, so steps may be of other groups: all of them, once
    assert len(tokens) == len(wanted_tokens) and sum(tokens) == sum(wanted_tokens)


@pytest.fixture
def small_disk(tmp_path):
    """32 MiB, and a file that fills what is asked for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def leave_free(disk, size):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - size)))


@ROOT_ONLY
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_disk_that_fills_up_during_a_save_leaves_the_last_checkpoint_whole(rank, settings, groups, tmp_path, small_disk):
    folder = small_disk / "run"
    settings |= {"output_dir": folder}
    with fed(folder, groups) as (server, feeder):
        settings["atropos_url"] = server.url
        output = train(settings, script=f"tests/kill_at.py full 3@{rank}", codes=(1,))
        assert "checkpoint step_6 cannot be saved" in output and "No space left on device" in output
        assert "step_3 there is complete" in output and "Traceback" not in output, output
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_3"]
        assert state_of(folder)["state"] == "failed" and "No space left" in state_of(folder)["reason"]
        (small_disk / "filler").unlink()
        feeder.run_is_dead()
        train(settings)
    assert_bitwise_equal(folder, untouched(settings, groups, tmp_path / "untouched"))


@ROOT_ONLY
def test_a_disk_that_is_full_when_a_batch_comes_damages_nothing(settings, groups, tmp_path, small_disk):
    folder = small_disk / "run"
    settings |= {"output_dir": folder}
    huge = groups[4] | {"messages": [[{"role": "user", "content": "x" * 5_000_000}]] * 4}
    with fed(folder, groups[:4]) as (server, feeder):
        settings["atropos_url"] = server.url

        def fill(processes):
            wait_until(lambda: len(steps_of(folder)) == 4)
            leave_free(small_disk, 18 * 2**20)  # enough for any batch so far
            post_group(server.url, register_env(server.url, 4), huge)

        output = train(settings, during=fill, codes=(1,))
        assert (
            "No space left on device" in output and "the batch just fetched is lost, those in the journal before it" in output
        )
        (small_disk / "filler").unlink()
        leave_free(small_disk, 4 * 2**20)
        output = train(settings, codes=(1,))
        assert "so it was not fetched: make room and start with --resume" in output and "Traceback" not in output
        (small_disk / "filler").unlink()
        feeder.pieces += groups[4:]
        feeder.release(STEPS)
        feeder.run_is_dead()
        train(settings)
    assert_bitwise_equal(folder, untouched(settings, groups, tmp_path / "untouched"))
