"""Rank and GPU of a process, from the environment of launchers and SLURM."""

import os
from pathlib import Path

import pytest

from wsft.distributed.process_start import collective_timeout, gpu_of_this_rank, set_for_gpus, threads_of_rank
from wsft.distributed.world import file_timeout_s, first_host, ranks_from_environment
from wsft.errors import UserError

# as SLURM 23.11 sets them
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-04]"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def names_of(monkeypatch):
    def found(env):
        for name in (*NAMES, *STEP):
            monkeypatch.setenv(name, "")  # so that whatever comes is taken back
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        ranks_from_environment()
        return {name: os.environ[name] for name in NAMES}

    return found


def test_a_task_of_srun_is_a_rank_without_asking_scontrol(names_of, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = names_of(STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"})
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "24711"}


def test_a_step_that_is_smaller_than_its_job_has_its_own_ranks_and_port(names_of):
    first, second = (names_of(STEP | {"SLURM_STEP_ID": step, "SLURM_STEP_NUM_TASKS": "2"}) for step in ("1", "2"))
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2" and first["MASTER_PORT"] != second["MASTER_PORT"]


@pytest.mark.parametrize(
    "shell",
    [
        JOB,  # of sbatch, or of salloc on a login node
        STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # of salloc on a node of the allocation
        STEP | {"SLURM_STEP_ID": "4294967290"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # of srun --pty -n 1
    ],
)
def test_a_shell_of_an_allocation_is_one_rank_and_waits_for_nobody(shell, names_of):
    found = names_of(shell)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("0", "1", "0", "127.0.0.1")


def test_variables_of_a_launcher_take_precedence(names_of):
    output = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert names_of(STEP | output) == output


@pytest.mark.parametrize(
    "nodelist, first",
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,9]-ib,login1", "gpu03-ib"),
        ("a-1,a-2", "a-1"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("n[7,9-11]", "n7"),
    ],
)
def test_the_first_host_of_a_nodelist(nodelist, first):
    assert first_host(nodelist) == first


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_its_task_sees():
    assert gpu_of_this_rank({"LOCAL_RANK": "3"}, 4) == 3
    task = {"LOCAL_RANK": "3", "SLURM_PROCID": "7", "SLURM_GPUS_ON_NODE": "4"}
    assert gpu_of_this_rank(task, 1) == 0
    for env, gpus in (({"LOCAL_RANK": "3"}, 1), (task, 2), (task | {"SLURM_GPUS_ON_NODE": "1"}, 1)):
        with pytest.raises(UserError, match=f"local rank 3 has no GPU of its own, {gpus} are visible"):
            gpu_of_this_rank(env, gpus)


def test_collectives_outlast_the_watchdog():
    """Which can say why a run hangs: NCCL would abort it after ten minutes."""
    for step_timeout, size in ((1800, 0), (10, 0), (10, 2**40)):
        timeout_s = file_timeout_s(step_timeout, size)
        assert collective_timeout(timeout_s).total_seconds() > timeout_s >= max(600, 10 * step_timeout)
    assert timeout_s > 24 * 3600  # a tebibyte on the slowest of disks


@pytest.mark.parametrize("env, cores, threads", [
    ({"WORLD_SIZE": "8"}, 64, 8),  # deepspeed
    ({"WORLD_SIZE": "8"}, 4, 1),
    ({"WORLD_SIZE": "8", "OMP_NUM_THREADS": "3"}, 64, None),
    ({"WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, 64, None),
    ({"WORLD_SIZE": "8", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 64, 8),  # set by torchrun itself
    ({"WORLD_SIZE": "8", "OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 64, None),
    ({"WORLD_SIZE": "16", "SLURM_CPUS_PER_TASK": "12", "SLURM_STEP_NUM_TASKS": "16"}, 12, 12),  # srun, bound
    ({"WORLD_SIZE": "16", "SLURM_CPUS_PER_TASK": "12", "SLURM_STEP_NUM_TASKS": "16"}, 96, 12),  # and not bound
    ({"WORLD_SIZE": "16", "SLURM_CPUS_PER_TASK": "96", "SLURM_STEP_NUM_TASKS": "2"}, 96, 12),  # a launcher per host
])  # fmt: skip
def test_a_rank_takes_its_share_of_the_cores(env, cores, threads):
    assert threads_of_rank(env, cores, 8) == threads


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_set_for_the_gpu_stays(name):
    env = {}
    set_for_gpus(env)
    assert env[name] == "expandable_segments:True" and env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(Path.home() / ".cache" / "wsft" / "torchinductor")
    env = {name: "max_split_size_mb:64", "TORCHINDUCTOR_COMPILE_THREADS": "4", "TORCHINDUCTOR_CACHE_DIR": "/c"}
    set_for_gpus(given := dict(env))
    assert given == env
