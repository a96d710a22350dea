"""Two hosts by hostfile, and SLURM over both: real sshd, pdsh, slurmctld and ranks, on hosts made of namespaces."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, clean_environment, make_group, run_ranks, run_together, write_groups
from fed_run import PATIENCE_S, fed, flags, state_of, steps_of, wait_until
from safetensors.torch import load_file

pytestmark = pytest.mark.cluster
PACKAGES = "slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "/usr/sbin/sshd", "pdsh", "ip")
STEPS = 20
CLONE_NEWNET = 0x40000000
DS = {
    "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        self.path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"

    def do(self, what, *more):
        subprocess.run(["bash", "tests/cluster.sh", what, str(self.folder), *more], cwd=ROOT, check=True, timeout=PATIENCE_S)

    def start(self, node, *command, said=None, **more):
        """The process of a command on a node."""
        words = ["nsenter", "-t", (self.folder / f"{node}.pid").read_text().strip(), "-n", "-u", "-p", "-i", "-m"]
        env = clean_environment(PATH=self.path, SLURM_CONF=str(self.folder / "slurm.conf")) | more
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(said.open("w")) if said else subprocess.DEVNULL
            words += [f"--wd={ROOT}", "--", *map(str, command)]
            return subprocess.Popen(words, env=env, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def on(self, node, *command, timeout=PATIENCE_S, **more):
        """Its exit code and what it said."""
        said = self.folder / "said.txt"
        process = self.start(node, *command, said=said, **more)
        try:
            return process.wait(timeout), said.read_text()
        finally:
            process.kill()

    @contextlib.contextmanager
    def network_of(self, node):
        """What this thread starts and connects to meanwhile is on the node's network."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        pid = (self.folder / f"{node}.pid").read_text().strip()
        with open("/proc/thread-self/ns/net") as here, open(f"/proc/{pid}/ns/net") as there:
            assert setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert setns(here.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def processes(self, node, words):
        """On a node, those with the words in their command line."""
        pids = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=True).stdout.split()
        found = []
        for pid in map(int, pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if words in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def runs(self):
        return [
            p for node in ("node1", "node2") for p in self.processes(node, "train.py") + self.processes(node, "single_node")
        ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if os.geteuid():
        pytest.skip("two hosts and a SLURM are made by root")
    if not all(map(shutil.which, NEEDED)):
        install = f"apt-get update -q && apt-get install -qy --no-install-recommends {PACKAGES}"
        if not shutil.which("apt-get") or subprocess.run(install, shell=True, capture_output=True).returncode:
            pytest.skip(f"needs {PACKAGES}, and apt cannot install them here")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    made.do("down")  # what a run that was killed left
    try:
        made.do("up")
    except subprocess.CalledProcessError:
        made.do("down")
        pytest.skip("no hosts out of namespaces here: `bash tests/cluster.sh up DIR` says why")
    yield made
    made.do("down")


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory):
    """Settings of a run, its groups, and the parameters that one process comes to with them."""
    import numpy as np

    folder, rng = tmp_path_factory.mktemp("shared"), np.random.default_rng(0)
    groups = [make_group(rng, [5, 9, 4, 12]) for _ in range(STEPS)]
    data = write_groups(folder / "data.jsonl", groups)
    (folder / "ds.json").write_text(json.dumps(DS))
    settings = dict(model_name=tiny_model, data=data, deepspeed=folder / "ds.json", batch_size=4, device="cpu")
    settings |= dict(learning_rate=0.01, training_steps=STEPS, save_steps=1000)
    ((code, said),) = run_ranks(["train.py", *flags(settings, output_dir=folder / "alone")], 1)
    assert code == 0, said
    alone, start = (load_file(f"{path}/model.safetensors") for path in (folder / "alone" / "final", tiny_model))
    return SimpleNamespace(settings=settings, groups=groups, alone=alone, start=start)


@pytest.fixture
def settings(shared, tmp_path):
    """Of a run from a file."""
    return shared.settings | {"output_dir": tmp_path / "run"}


@pytest.fixture
def feeder(cluster, shared, tmp_path):
    """Of an Atropos server on node1; it has released nothing."""
    with contextlib.ExitStack() as opened:
        with cluster.network_of("node1"):
            _, feeder = opened.enter_context(fed(tmp_path / "run", shared.groups, released=0))
        yield feeder


@pytest.fixture
def fed_settings(settings, feeder):
    """Of a run that trains what the feeder releases, and can neither go on nor end before."""
    return {name: value for name, value in settings.items() if name != "data"} | {"atropos_url": feeder.url}


def assert_as_one_process(folder, shared):
    found = load_file(folder / "final" / "model.safetensors")
    for name, value in shared.alone.items():
        assert ((found[name] - value).norm() / value.norm()).item() < 1e-5, name
        assert not torch.equal(value, shared.start[name])


@pytest.fixture
def hostfile(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1  # both\n")
    return tmp_path / "hosts"


def multi_node(hostfile, settings, **changes):
    return ["bash", "launch/multi_node.sh", hostfile, *flags(settings, **changes)]


@contextlib.contextmanager
def at_work(cluster, command, folder, feeder):
    """The launcher, a few steps into its run, which cannot end."""
    said = Path(f"{folder}.txt")
    feeder.release(STEPS - 1)
    outer = cluster.start("node1", *command, said=said, HF_TOKEN="hf_secret", NCCL_DEBUG="WARN")
    try:
        wait_until(lambda: len(steps_of(folder)) >= 5 or outer.poll() is not None)
        assert outer.poll() is None, said.read_text()
        yield outer, said
    finally:
        outer.kill()
        for process in cluster.runs():
            process.kill()


def test_two_hosts_train_as_one_process_and_ctrl_c_leaves_a_checkpoint_that_is_gone_on_with(
    cluster, hostfile, fed_settings, feeder, shared, tmp_path
):
    command = multi_node(hostfile, fed_settings)
    with at_work(cluster, command, tmp_path / "run", feeder) as (outer, said):
        assert [len(cluster.processes(node, "train.py")) for node in ("node1", "node2")] == [1, 1]
        for launcher in cluster.processes("node1", "launch/hosts.py"):
            launcher.send_signal(signal.SIGINT)
        assert outer.wait(PATIENCE_S) == 130, said.read_text()
    state = state_of(tmp_path / "run")
    assert state["state"] == "preempted" and 5 <= state["step"] < STEPS and not cluster.runs()
    words = said.read_text()
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
    with at_work(cluster, command, tmp_path / "run", feeder) as (outer, said):
        (rank,) = cluster.processes("node2", "train.py")
        rank.kill()
        assert outer.wait(PATIENCE_S) == 137, said.read_text()  # a hang would end after step_timeout, 1,800 s
        assert "rank 1 failed first, on node2: killed (137)" in said.read_text()
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


def test_what_is_wrong_with_a_host_is_said_before_anything_starts(cluster, hostfile, settings, tmp_path):
    import numpy

    command, venv = multi_node(hostfile, settings), Path(sys.executable).parent

    def refused(*words, **environment):
        code, said = cluster.on("node1", *command, **environment)
        assert code == 1 and "nothing was started" in said, said
        for word in words:
            assert re.search(word, said), said
        assert not (tmp_path / "run" / "state.json").exists()

    refused("node1 cannot listen on port 22 .*: set MASTER_PORT to another", MASTER_PORT="22")
    with mounted(cluster, "node2", "-t", "tmpfs", "tmpfs", venv):
        refused(f"node2 has no {ROOT}, or no {sys.executable}: both must stand there")
    metadata = Path(numpy.__file__).parent.parent / f"numpy-{numpy.__version__}.dist-info" / "METADATA"
    (tmp_path / "METADATA").write_text(metadata.read_text().replace(f"Version: {numpy.__version__}", "Version: 1.0.0"))
    (tmp_path / "run" / "logs").mkdir(parents=True, exist_ok=True)
    with (
        mounted(cluster, "node2", "--bind", tmp_path / "METADATA", metadata),
        mounted(cluster, "node2", "-t", "tmpfs", "tmpfs", tmp_path / "run" / "logs"),
    ):
        same = f"numpy is not the same everywhere: {numpy.__version__} on node1, 1.0.0 on node2; install the same"
        refused(re.escape(same), "node2 does not see .*: it must be on a file system that all hosts share")
    hostfile.write_text("node1 slots=1\n10.77.0.9 slots=1\n")
    command += ["--data=", "--atropos_url=http://10.77.0.2:9"]
    command = [word for word in command if not str(word).startswith("--data")]
    refused(
        r"10\.77\.0\.9 gives no answer by ssh \(.*\): start it, mend it, or leave it out",
        "node1 does not reach the Atropos server at http://10.77.0.2:9 .*: start it",
    )


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "there is no hostfile .*: name a file"),
        ("alpha slots=8\n", r"names 1 host\(s\): for one machine use launch/single_node.sh"),
        ("alpha slots=8\nbeta\n", "line 2 of .* is not \"host slots=8\": 'beta'"),
        ("alpha slots=8\n\nalpha slots=8\n", "line 3 of .* names a host again"),
        ("alpha slots=8\nbeta slots=4\n", "has hosts with 4 and 8 slots: give all as many"),
        ("alpha slots=8\nbeta slots=8\n", "no pdsh here: install it"),
    ],
)
def test_a_hostfile_that_will_not_do(text, words, tmp_path):
    if text:
        (tmp_path / "hosts").write_text(text)
    path = {"PATH": "/nowhere"} if "pdsh" in words else {}
    command = [sys.executable, "launch/hosts.py", tmp_path / "run", tmp_path / "hosts", "--model_name=m", "--data=d"]
    ((code, said),) = run_together([command], [clean_environment() | path])
    assert code == 1 and re.search(words, said) and "Traceback" not in said


# -- SLURM -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(cluster, request):
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.do("slurm_down")
    cluster.do("slurm_up", *getattr(request, "param", []))
    yield cluster
    cluster.on("node1", "scancel", "--user=root")
    cluster.do("slurm_down")


class Job:
    def __init__(self, slurm, settings, *options):
        self.slurm, self.folder = slurm, Path(settings["output_dir"])
        self.said = self.folder.with_suffix(".out")
        shape = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2", "--time=60", f"--output={self.said}"]
        self.id = self.sbatch(*shape, *options, "launch/slurm.sbatch", *flags(settings))

    def sbatch(self, *words):
        code, said = self.slurm.on("node1", "sbatch", "--parsable", *words)
        assert code == 0, said
        return said.split()[-1]

    def words(self):
        return self.said.read_text() if self.said.exists() else ""

    def control(self, *words):
        code, said = self.slurm.on("node1", "scontrol", *words)
        assert code == 0, said

    def state(self):
        """Of the job, as SLURM has it."""
        code, said = self.slurm.on("node1", "scontrol", "show", "job", self.id)
        assert code == 0, said
        return re.search(r"JobState=(\w+)", said)[1]

    def until(self, truth):
        try:
            wait_until(truth)
        except AssertionError:
            raise AssertionError(f"{self.state()}: {self.words()}") from None

    def train(self, feeder, steps):
        """So many steps of the run, which then waits for what comes next."""
        feeder.release(steps)
        self.until(lambda: len(steps_of(self.folder)) == steps)

    def starts(self):
        return self.words().count(f"job {self.id}, start ")

    def until_its_limit_is_met(self, limit, times):
        """The limit is lowered until SLURM, which looks every 30 s, has acted on it: in the queue it is as it was."""
        self.control("update", f"JobId={self.id}", limit)
        self.until(lambda: self.state() == "PENDING" or self.starts() > times)
        self.control("update", f"JobId={self.id}", "TimeLimit=60")
        self.until_it_comes_back(times)

    def until_it_comes_back(self, times):
        """Saved by start number `times`, and begun again where that stopped."""
        self.until(lambda: self.starts() > times)
        saved = re.findall(r"stopped after step (\d+)", self.words())
        assert len(saved) == times, self.words()
        self.until(lambda: len(re.findall("resuming from", self.words())) == times)
        assert f"step_{saved[-1]}\n" in self.words().rpartition("resuming from")[2]

    def until_it_is_over(self, state="COMPLETED"):
        self.until(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        assert self.state() == state, self.words()
        wait_until(lambda: not self.slurm.runs())


def preempting(job):
    job.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true")


@pytest.mark.parametrize("slurm", [[]], indirect=True)
def test_a_job_that_is_requeued_at_its_time_limit_and_preempted_finishes_as_if_untouched(
    slurm, fed_settings, feeder, shared, tmp_path
):
    """Preempted without a signal of its own: only its ranks are told."""
    job = Job(slurm, fed_settings, "--signal=B:USR1@600")
    job.train(feeder, 4)
    job.control("requeue", job.id)
    job.until_it_comes_back(1)
    job.train(feeder, 8)
    job.until_its_limit_is_met("TimeLimit=10", 2)  # so that its signal is due, and its end is not
    job.train(feeder, 12)
    preempting(job)
    job.until_it_comes_back(3)
    job.train(feeder, 16)
    job.until_its_limit_is_met("EndTime=now", 4)  # without a signal that leaves it time
    job.train(feeder, STEPS)
    job.until_it_is_over()
    assert "the trained model is in" in job.words()
    assert_as_one_process(job.folder, shared)
    assert [step["step"] for step in steps_of(job.folder)] == list(range(1, STEPS + 1))
    assert {path.name for path in (job.folder / "logs").iterdir()} >= {"rank_0.log", "rank_1.log"}


@pytest.mark.parametrize("slurm", [["SlurmctldParameters=preempt_send_user_signal"]], indirect=True)
def test_a_job_that_preemption_signals_comes_back_and_one_that_is_cancelled_does_not(slurm, fed_settings, feeder, shared):
    job = Job(slurm, fed_settings, "--signal=B:USR1@40")
    job.train(feeder, 5)
    preempting(job)
    job.until_it_comes_back(1)
    job.train(feeder, 10)
    assert slurm.on("node1", "scancel", job.id)[0] == 0
    job.until_it_is_over("CANCELLED")  # and not PENDING: SLURM starts it no more
    assert "if the job does not come back" in job.words() and state_of(job.folder)["state"] == "preempted"
    job = Job(slurm, fed_settings | {"resume": True})
    job.train(feeder, STEPS)
    job.until_it_is_over()
    assert_as_one_process(job.folder, shared)


def test_a_job_that_fails_or_has_no_gpus_says_so(slurm, settings, tmp_path):
    failing = Job(slurm, settings | {"model_name": tmp_path})
    failing.until_it_is_over("FAILED")
    for words in ("training failed", "no model in", "exit code 1): see above"):
        assert words in failing.words()
    del settings["device"]  # then the job is one for GPUs
    gpus = Job(slurm, settings | {"output_dir": tmp_path / "other"}, "--gpus-per-node=0")
    gpus.until_it_is_over("FAILED")
    assert "the job has no GPUs: add --gpus-per-node=8 to sbatch" in gpus.words()


def test_the_server_runs_in_the_job(slurm, settings, tmp_path):
    """And an environment on the other node feeds it."""
    del settings["data"]
    job = Job(slurm, settings | {"training_steps": 3, "max_token_len": 128}, "--export=ALL,ATROPOS_PORT=8123")
    environment = ["--url", "http://node1:8123", "--tokenizer", settings["model_name"], "--pattern", "mixed"]
    environment += ["--groups", "0", "--group_size", "4"]
    posting = slurm.start("node2", sys.executable, "-m", "wsft.environment", *environment, said=tmp_path / "posting.txt")
    try:
        job.until_it_is_over()
    finally:
        posting.kill()
        for process in slurm.processes("node2", "wsft.environment"):
            process.kill()
    assert len(steps_of(job.folder)) == 3 and not slurm.processes("node1", "atroposlib")


def test_a_look_at_a_job_before_it_is_submitted(settings):
    ((code, said),) = run_together([["bash", "launch/slurm.sbatch", "--dry-run", *flags(settings)]], [clean_environment()])
    assert code == 0 and "#SBATCH --signal=B:USR1@600" in said and "'srun' '--kill-on-bad-exit=1'" in said
    assert not Path(settings["output_dir"]).exists()
    ((code, said),) = run_together([["bash", "launch/slurm.sbatch", *flags(settings)]], [clean_environment()])
    assert code == 1 and "this is no job: sbatch launch/slurm.sbatch" in said
