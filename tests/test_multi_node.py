"""launch/multi_node.sh: two hosts by hostfile, with a real sshd each, pdsh and ranks."""

import contextlib
import re
import signal
import sys
from pathlib import Path

import pytest
from cluster import STEPS, assert_as_one_process
from conftest import ROOT, clean_environment, run_together
from fed_run import PATIENCE_S, flags, state_of, steps_of, wait_until

pytestmark = pytest.mark.cluster
pytest_plugins = ["cluster"]


@pytest.fixture
def hostfile(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1  # both\n")
    return tmp_path / "hosts"


def multi_node(hostfile, settings, **changes):
    return ["bash", "launch/multi_node.sh", hostfile, *flags(settings, **changes)]


@contextlib.contextmanager
def at_work(cluster, command, folder, feeder):
    """The launcher, a few steps into its run, which cannot end."""
    output = Path(f"{folder}.txt")
    feeder.release(STEPS - 1)
    outer = cluster.start("node1", *command, output=output, HF_TOKEN="hf_secret", NCCL_DEBUG="WARN")
    try:
        wait_until(lambda: len(steps_of(folder)) >= 5 or outer.poll() is not None)
        assert outer.poll() is None, output.read_text()
        yield outer, output
    finally:
        outer.kill()
        for process in cluster.runs():
            process.kill()


def test_two_hosts_train_as_one_process_and_resume_after_ctrl_c(cluster, hostfile, fed_settings, feeder, shared, tmp_path):
    command = multi_node(hostfile, fed_settings)
    with at_work(cluster, command, tmp_path / "run", feeder) as (outer, output):
        assert [len(cluster.processes(node, "train.py")) for node in ("node1", "node2")] == [1, 1]
        for launcher in cluster.processes("node1", "launch/hosts.py"):
            launcher.send_signal(signal.SIGINT)
        assert outer.wait(PATIENCE_S) == 130, output.read_text()
    state = state_of(tmp_path / "run")
    assert state["state"] == "preempted" and 5 <= state["step"] < STEPS and not cluster.runs()
    words = output.read_text()
    assert "starting 2 rank(s) on cpu" in words and f"step {state['step']}/{STEPS}" in words and "Traceback" not in words
    environment = (tmp_path / "run" / "logs" / ".deepspeed_env").read_text()
    assert "NCCL_DEBUG=WARN" in environment and "hf_secret" not in environment and "HF_TOKEN" in words
    feeder.release(STEPS)
    code, words = cluster.on("node1", *multi_node(hostfile, fed_settings, resume=True))
    assert code == 0 and f"step {STEPS}/{STEPS}" in words, words
    assert_as_one_process(tmp_path / "run", shared)
    assert {path.name for path in (tmp_path / "run" / "logs").glob("rank_*")} == {"rank_0.log", "rank_1.log"}
    # whichever rank hears first, all end; the other may be gone before its own signal comes
    assert any("SIGTERM received" in log.read_text() for log in (tmp_path / "run" / "logs").glob("rank_*"))


def test_a_rank_killed_on_the_other_host_ends_all_and_is_named(cluster, hostfile, fed_settings, feeder, tmp_path):
    command = multi_node(hostfile, fed_settings)
    with at_work(cluster, command, tmp_path / "run", feeder) as (outer, output):
        (rank,) = cluster.processes("node2", "train.py")
        rank.kill()
        assert outer.wait(PATIENCE_S) == 137, output.read_text()  # a hang would end after step_timeout, 1,800 s
        assert "rank 1 failed first, on node2: killed (137)" in output.read_text()
        wait_until(lambda: not cluster.runs())
    assert state_of(tmp_path / "run")["state"] == "failed"


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_a_checkpoint_and_no_orphan(cluster, hostfile, fed_settings, feeder, tmp_path):
    with at_work(cluster, multi_node(hostfile, fed_settings), tmp_path / "run", feeder):
        for launcher in cluster.processes("node1", "launch/hosts.py"):
            launcher.kill()
        wait_until(lambda: not cluster.runs())
    assert state_of(tmp_path / "run")["state"] == "preempted"


@contextlib.contextmanager
def mounted(cluster, node, *words):
    assert cluster.on(node, "mount", *words)[0] == 0
    yield
    assert cluster.on(node, "umount", words[-1])[0] == 0


def test_faults_of_a_host_are_printed_before_anything_starts(cluster, hostfile, settings, tmp_path):
    import numpy

    command, venv = multi_node(hostfile, settings), Path(sys.executable).parent

    def refused(*words, **environment):
        code, output = cluster.on("node1", *command, **environment)
        assert code == 1 and "nothing was started" in output, output
        for word in words:
            assert re.search(word, output), output
        assert not (tmp_path / "run" / "state.json").exists()

    with mounted(cluster, "node2", "-t", "tmpfs", "tmpfs", venv):
        refused(f"node2 has no {ROOT}, or no {sys.executable}: both must exist")
    metadata = Path(numpy.__file__).parent.parent / f"numpy-{numpy.__version__}.dist-info" / "METADATA"
    (tmp_path / "METADATA").write_text(metadata.read_text().replace(f"Version: {numpy.__version__}", "Version: 1.0.0"))
    (tmp_path / "run" / "logs").mkdir(parents=True, exist_ok=True)
    with (
        mounted(cluster, "node2", "--bind", tmp_path / "METADATA", metadata),
        mounted(cluster, "node2", "-t", "tmpfs", "tmpfs", tmp_path / "run" / "logs"),
    ):
        same = f"numpy differs between hosts: {numpy.__version__} on node1, 1.0.0 on node2; install the same"
        port = "node1 cannot listen on port 22 .*: set MASTER_PORT to another"
        refused(
            re.escape(same), "node2 does not see .*: it must be on a file system that all hosts share", port, MASTER_PORT="22"
        )
    hostfile.write_text("node1 slots=1\n10.77.0.9 slots=1\n")
    command += ["--data=", "--atropos_url=http://10.77.0.2:9"]
    command = [word for word in command if not str(word).startswith("--data")]
    refused(
        r"10\.77\.0\.9 does not answer by ssh \(.*\): start it, repair it, or leave it out",
        "node1 does not reach the Atropos server at http://10.77.0.2:9 .*: start it",
    )


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "there is no hostfile .*: name a file"),
        ("alpha slots=8\n", r"names 1 host\(s\): for one machine use launch/single_node.sh"),
        ("alpha slots=8\nbeta\n", "line 2 of .* is not \"host slots=8\": 'beta'"),
        ("alpha slots=8\n\nalpha slots=8\n", "line 3 of .* names a host again"),
        ("alpha slots=8\nbeta slots=4\n", "has hosts with 4 and 8 slots: give all the same number"),
        ("alpha slots=8\nbeta slots=8\n", "no pdsh here: install it"),
    ],
)
def test_a_hostfile_that_will_not_do(text, words, tmp_path):
    if text:
        (tmp_path / "hosts").write_text(text)
    path = {"PATH": "/nowhere"} if "pdsh" in words else {}
    command = [sys.executable, "launch/hosts.py", tmp_path / "run", tmp_path / "hosts", "--model_name=m", "--data=d"]
    ((code, output),) = run_together([command], [clean_environment() | path])
    assert code == 1 and re.search(words, output) and "Traceback" not in output
