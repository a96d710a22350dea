"""launch/slurm.sbatch: real daemons of SLURM over two hosts; jobs that are requeued, preempted, cancelled, out of time."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import STEPS, assert_as_one_process
from conftest import clean_environment, run_together
from fed_run import flags, state_of, steps_of, wait_until

pytestmark = pytest.mark.cluster
pytest_plugins = ["cluster"]


@pytest.fixture
def slurm(cluster, request):
    with contextlib.suppress(subprocess.CalledProcessError):
        cluster.do("slurm_down")
    cluster.do("slurm_up", *getattr(request, "param", []))
    yield cluster
    cluster.on("node1", "scancel", "--user=root")
    cluster.do("slurm_down")


class Job:
    def __init__(self, slurm, settings, *options, environment=None):
        self.environment = environment or {}
        self.slurm, self.folder = slurm, Path(settings["output_dir"])
        self.printed = self.folder.with_suffix(".out")
        shape = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2", "--time=60", f"--output={self.printed}"]
        self.id = self.sbatch(*shape, *options, "launch/slurm.sbatch", *flags(settings))

    def sbatch(self, *words):
        code, printed = self.slurm.on("node1", "sbatch", "--parsable", *words, **self.environment)
        assert code == 0, printed
        return printed.split()[-1]

    def output(self):
        return self.printed.read_text() if self.printed.exists() else ""

    def control(self, *words):
        code, printed = self.slurm.on("node1", "scontrol", *words)
        assert code == 0, printed
        return printed

    def state(self):
        """Of the job, as SLURM has it."""
        code, printed = self.slurm.on("node1", "scontrol", "show", "job", self.id)
        assert code == 0, printed
        return re.search(r"JobState=(\w+)", printed)[1]

    def until(self, truth):
        try:
            wait_until(truth, every=0.5)
        except AssertionError:
            raise AssertionError(f"{self.state()}: {self.output()}") from None

    def train(self, feeder, steps):
        """So many steps of the run, which then waits for what comes next."""
        feeder.release(steps)
        self.until(lambda: len(steps_of(self.folder)) == steps)

    def starts(self):
        return self.output().count(f"job {self.id}, start ")

    def until_its_limit_is_met(self, limit, times):
        """The limit is lowered until SLURM, which looks every 30 s, has acted on it: in the queue it is as it was."""
        self.control("update", f"JobId={self.id}", limit)
        self.until(lambda: self.state() == "PENDING" or self.starts() > times)
        self.control("update", f"JobId={self.id}", "TimeLimit=60")
        self.until_it_comes_back(times)

    def until_it_comes_back(self, times):
        """Saved by start number `times`, and continued by the next start."""
        self.until(lambda: self.starts() > times)
        saved = re.findall(r"stopped after step (\d+)", self.output())
        assert len(saved) == times, self.output()
        self.until(lambda: len(self.resumed()) == times)
        assert self.resumed()[-1] == saved[-1]

    def resumed(self):
        return re.findall(r"resuming from .*/step_(\d+)\n", self.output())

    def until_it_is_over(self, state="COMPLETED"):
        self.until(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        assert self.state() == state, self.output()
        wait_until(lambda: not self.slurm.runs(), every=0.5)


def preempting(job):
    job.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true")


@pytest.mark.parametrize("slurm", [[]], indirect=True)
def test_a_job_that_is_requeued_at_its_time_limit_and_preempted_finishes_as_if_untouched(
    slurm, fed_settings, feeder, shared, tmp_path
):
    """Preempted without a signal to the batch script: only its ranks get one. overwrite_output_dir is for its first start."""
    submitted = {name: value for name, value in fed_settings.items() if name != "resume"} | {"overwrite_output_dir": True}
    job = Job(slurm, submitted, "--signal=B:USR1@600")
    job.train(feeder, 4)
    assert "CPUs=4 Tasks=2" in job.control("show", "step", f"{job.id}.0")  # and not a core for each
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
    assert "the trained model is in" in job.output()
    assert_as_one_process(job.folder, shared)
    assert [step["step"] for step in steps_of(job.folder)] == list(range(1, STEPS + 1))
    assert {path.name for path in (job.folder / "logs").iterdir()} >= {"rank_0.log", "rank_1.log"}


@pytest.mark.parametrize("slurm", [["SlurmctldParameters=preempt_send_user_signal"]], indirect=True)
@pytest.mark.slow
def test_a_job_that_preemption_signals_comes_back_and_one_that_is_cancelled_does_not(slurm, fed_settings, feeder, shared):
    job = Job(slurm, fed_settings, "--nodes=1", "--signal=B:USR1@40")
    job.train(feeder, 5)
    preempting(job)
    job.until_it_comes_back(1)
    job.train(feeder, 10)
    assert slurm.on("node1", "scancel", job.id)[0] == 0
    job.until_it_is_over("CANCELLED")  # and not PENDING: SLURM starts it no more
    assert "if the job does not come back" in job.output() and state_of(job.folder)["state"] == "preempted"
    job = Job(slurm, fed_settings | {"resume": True}, "--nodes=1")
    job.train(feeder, STEPS)
    job.until_it_is_over()
    assert_as_one_process(job.folder, shared)


def test_a_job_that_fails_or_has_no_gpus_says_so(slurm, settings, tmp_path):
    failing = Job(slurm, settings | {"model_name": tmp_path}, "--nodes=1")
    failing.until_it_is_over("FAILED")
    for words in ("training failed", "no model in", "exit code 1): see above"):
        assert words in failing.output()
    del settings["device"]  # then the job is one for GPUs
    gpus = Job(slurm, settings | {"output_dir": tmp_path / "other"}, "--gpus-per-node=0")
    gpus.until_it_is_over("FAILED")
    assert "the job has no GPUs: add --gpus-per-node=8 to sbatch" in gpus.output()


def with_all_parts(slurm, settings, **changes):
    """A job that trains on one node, with an Atropos server and an environment, and an inference server on the other."""
    del settings["data"]
    parts = {
        "ATROPOS_PORT": "8123",
        "INFERENCE_NODES": "1",
        "INFERENCE": f"{sys.executable} tests/small_server.py {settings['model_name']} 8001",
        "ENVIRONMENTS": f"{sys.executable} -m wsft.environment --url $ATROPOS_URL --tokenizer {settings['model_name']} "
        "--pattern mixed --groups 0 --group_size 4",
    }
    return Job(slurm, settings | {"max_token_len": 128, "publish_timeout": 60} | changes, environment=parts)


def published(job):
    return re.findall(r"version (\d+)", (job.folder / "logs" / "inference_node2.log").read_text())


def test_server_environment_and_inference_servers_run_in_the_job(slurm, settings):
    job = with_all_parts(slurm, settings, training_steps=3)
    job.until_it_is_over()
    assert len(steps_of(job.folder)) == 3 and published(job) == ["0", "1", "2", "3"]
    wait_until(lambda: not any(slurm.processes(node, words) for node in ("node1", "node2") for words in PARTS), every=0.5)


PARTS = ("atroposlib", "wsft.environment", "small_server")


@pytest.mark.slow
def test_all_parts_come_back_with_a_requeued_job_and_a_dead_environment_ends_it(slurm, settings):
    job = with_all_parts(slurm, settings, training_steps=10**6, resume=True)
    job.until(lambda: len(steps_of(job.folder)) > 3)
    job.control("requeue", job.id)
    job.until_it_comes_back(1)
    saved = int(job.resumed()[0])
    job.until(lambda: len(steps_of(job.folder)) > saved + 3)
    # the last version before the requeue may not have reached the server, which is ended too; the resumed weights do
    assert list(dict.fromkeys(published(job)))[: saved + 3] == [str(step) for step in range(saved + 3)]
    (environment,) = slurm.processes("node1", "wsft.environment --url http://node1:8123")  # not the shell that waits for it
    environment.kill()
    job.until_it_is_over("FAILED")
    assert "the environments ended, see" in job.output() and state_of(job.folder)["state"] == "preempted"


def test_a_job_can_be_shown_before_it_is_submitted(settings):
    env = clean_environment(SLURM_CPUS_PER_TASK="8")
    ((code, printed),) = run_together([["bash", "launch/slurm.sbatch", "--dry-run", *flags(settings)]], [env])
    assert (
        code == 0
        and "#SBATCH --signal=B:USR1@600" in printed
        and "'srun' '--kill-on-bad-exit=1' '--cpus-per-task=8'" in printed
    )
    assert not Path(settings["output_dir"]).exists()
    ((code, printed),) = run_together([["bash", "launch/slurm.sbatch", *flags(settings)]], [clean_environment()])
    assert code == 1 and "not in a job: sbatch launch/slurm.sbatch" in printed
