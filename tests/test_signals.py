"""On a signal a run finishes its step, saves, and ends with 0 on every rank; a run that hangs ends with its stacks."""

import os
import signal
import socket
import subprocess
import threading
import time

import psutil
import pytest
from atropos_server import free_port
from conftest import ROOT, clean_environment, run_together
from fed_run import (
    PATIENCE_S,
    STEPS,
    assert_bitwise_equal,
    fed,
    flags,
    make_groups,
    make_settings,
    state_of,
    steps_of,
    train,
    untouched,
    wait_until,
)

from wsft.distributed.signals import Stop


@pytest.fixture
def groups(rng):
    return make_groups(rng)


@pytest.fixture
def settings(tiny_model, tmp_path):
    return make_settings(tiny_model, tmp_path) | {"output_dir": tmp_path / "run", "resume": False}


def test_a_signal_to_one_rank_stops_all_and_resume_completes(settings, groups, tmp_path):
    folder = tmp_path / "run"
    with fed(folder, groups, released=0) as (server, feeder):
        settings["atropos_url"] = server.url
        asked = ((signal.SIGTERM, 1, 3), (signal.SIGUSR1, 0, 6), (signal.SIGINT, 1, 9), (signal.SIGHUP, 0, 11))
        for number, rank, steps in asked:

            def send(processes, number=number, rank=rank, steps=steps):
                feeder.release(steps)
                wait_until(lambda: len(steps_of(folder)) >= steps - 1)  # it trains the next, or waits by now
                processes[rank].send_signal(number)
                while number != signal.SIGINT and processes[rank].poll() is None:  # as some launchers do, to its last moment
                    processes[rank].send_signal(number)
                    time.sleep(0.001)

            printed = train(settings, during=send)
            assert f"({number.name} received)" in printed and "Traceback" not in printed
            assert state_of(folder)["state"] == "preempted" and number.name in state_of(folder)["reason"]
            assert state_of(folder)["step"] == len(steps_of(folder)) < STEPS
            assert (folder / "checkpoints" / f"step_{len(steps_of(folder))}").exists()
            settings["resume"] = True
        feeder.release(STEPS)
        train(settings)
    assert_bitwise_equal(folder, untouched(settings, groups, tmp_path / "untouched"))


def test_a_run_under_nohup_continues_when_its_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: stop.code)
        assert stop.code == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_that_waits_notices_a_signal_within_seconds(rank, settings, groups, tmp_path):
    ended = []

    def send(processes):
        wait_until(lambda: len(steps_of(tmp_path / "run")) == 1)  # the second batch never comes
        processes[rank].send_signal(signal.SIGTERM)
        sent = time.monotonic()
        wait_until(lambda: state_of(tmp_path / "run")["state"] == "preempted")
        ended.append(time.monotonic() - sent)

    with fed(tmp_path / "run", groups[:1]) as (server, _):
        train(settings, during=send, atropos_url=server.url)
    assert ended[0] < 30  # two to notice, and a small checkpoint on a busy machine


@pytest.fixture
def silent_server():
    """A server that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def accept():
            while True:
                try:
                    connections.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        for connection in connections:
            connection.close()


def test_a_request_that_is_never_answered_keeps_nobody_and_a_second_interrupt_ends_at_once(settings, silent_server, tmp_path):
    url, connections = silent_server
    spent = []

    def interrupt(processes):
        wait_until(lambda: connections)
        start = time.monotonic()
        processes[0].send_signal(signal.SIGINT)
        wait_until(lambda: state_of(tmp_path / "run")["state"] == "preempted")
        spent.append(time.monotonic() - start)
        processes[0].send_signal(signal.SIGINT)
        processes[0].wait(PATIENCE_S)

    printed = train(settings, num_ranks=1, codes=(130,), during=interrupt, atropos_url=url)
    assert spent[0] < 30 and "Ctrl-C again ends at once" in printed and "interrupted again" in printed


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_ends_the_run_with_the_stacks_of_all(rank, settings, groups, tmp_path):
    def stop(processes):
        wait_until(lambda: len(steps_of(tmp_path / "run")) >= 1)
        processes[rank].send_signal(signal.SIGSTOP)
        for process in processes:
            process.wait(PATIENCE_S)

    with fed(tmp_path / "run", groups, released=STEPS - 1) as (server, _):
        printed = train(settings, codes=(1,), during=stop, atropos_url=server.url, step_timeout=10)
    assert "no progress for 10 s" in printed and printed.count("most recent call first") >= 2
    assert printed.count("in train\n") + printed.count("in _loop") >= 2, printed  # the main thread of each rank
    assert state_of(tmp_path / "run")["state"] == "failed"


@pytest.mark.slow  # test_kills.py kills this launcher, test_launch.py another
def test_a_launcher_that_is_gone_stops_its_ranks(settings, groups, tmp_path):
    """An orphan would keep running next to whatever is started then."""
    with fed(tmp_path / "run", groups[:2]) as (server, _):
        command = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port()), "train.py"]
        run = subprocess.Popen([*command, *flags(settings, atropos_url=server.url)], env=clean_environment(), cwd=ROOT)
        wait_until(lambda: len(steps_of(tmp_path / "run")) == 2)
        family = psutil.Process(run.pid).children(recursive=True)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        for process in alive:
            process.kill()
    assert not alive
    assert state_of(tmp_path / "run")["state"] == "preempted" and "launcher" in state_of(tmp_path / "run")["reason"]


@pytest.mark.slow  # two starts of two real ranks
def test_torchrun_starts_a_run_again(settings, groups, tmp_path):
    with fed(tmp_path / "run", groups) as (server, _):
        command = ["torchrun", "--nproc_per_node", "2", "--max_restarts", "1", "--master_port", str(free_port())]
        command += ["tests/kill_at.py", "step", "4@1", *flags(settings | {"resume": True}, atropos_url=server.url)]
        ((code, output),) = run_together([command], [clean_environment()])
    assert code == 0, output
    assert_bitwise_equal(tmp_path / "run", untouched(settings, groups, tmp_path / "untouched"))
