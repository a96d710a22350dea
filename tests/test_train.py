"""Runs of train.py: every launcher, both fetch modes, the real server, sudden ends."""

import json
import signal
import sys
import threading

import numpy as np
import pytest
import requests
import torch
from atropos_server import atropos_server, free_port, post_group, register_env
from conftest import clean_environment, follow, make_group, make_model, run_ranks, run_together, write_groups
from fed_run import state_of
from fork_server import fork_server
from safetensors.torch import load_file

FP32_SGD = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 3}}


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture
def run_flags(tiny_model, tmp_path, rng):
    """A run of three steps from a file."""
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14, 9, 22]) for _ in range(3)])
    return flags(model_name=tiny_model, data=data, batch_size=4, device="cpu", output_dir=tmp_path / "run", learning_rate=0.01)


def launched(launcher):
    python, port = sys.executable, free_port()
    return {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(port), "train.py"],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(port), "train.py"],
        "python": [python, "train.py"],
        "single_node.sh": ["bash", "launch/single_node.sh"],
    }[launcher]


def slow(launcher):
    """In CI test_multi_node.py trains to the end by single_node.sh on each of two hosts, test_resume.py by torchrun."""
    return pytest.param(launcher, marks=pytest.mark.slow)


@pytest.mark.parametrize("launcher", ["deepspeed", slow("torchrun"), slow("python"), slow("single_node.sh")])
def test_every_launcher_starts_the_same_train_py(launcher, run_flags, tmp_path):
    command = [*launched(launcher), *run_flags, "--deepspeed=ds_configs/zero3_cpu.json"]
    ((code, output),) = run_together([command], [clean_environment(NUM_GPUS="2")])
    assert code == 0, output
    assert [values["step"] for values in steps_of(tmp_path / "run")] == [1, 2, 3]
    assert "step 3/1000" in output and "Traceback" not in output
    assert (f"starting {1 if launcher == 'python' else 2} rank(s) on cpu") in output


@pytest.mark.slow
def test_a_batch_eight_times_as_large_takes_no_more_memory(tmp_path, monkeypatch):
    """At one `micro_batch_tokens`, in the precision that the machine is fast at. malloc is made to give back what is freed."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 256}
    model, rng, peaks = make_model(tmp_path / "model", **shape), np.random.default_rng(0), {}
    for groups in (2, 16):
        groups_of = [make_group(rng, rng.integers(32, 256, 4).tolist()) for _ in range(2 * groups)]
        given = flags(model_name=model, data=write_groups(tmp_path / "data.jsonl", groups_of), batch_size=4 * groups)
        given += flags(output_dir=tmp_path / f"run_{groups}", micro_batch_tokens=1024, device="cpu", save_steps=9)
        ((code, output),) = run_ranks(["train.py", *given], 1, imports_done=False)
        assert code == 0, output
        peaks[groups] = [step["memory/peak_gib"] for step in steps_of(tmp_path / f"run_{groups}")]
    print(peaks)
    assert peaks[16][1] == pytest.approx(peaks[2][1], abs=0.1)  # a few kernels for sizes met, and what is loaded late


def test_srun_gives_the_ranks(run_flags, tmp_path):
    """What srun sets, without srun: two processes that know only SLURM's names."""
    slurm = dict(SLURM_NTASKS="2", SLURM_STEP_ID="0", SLURM_JOB_ID=str(free_port() - 20000), MASTER_ADDR="127.0.0.1")
    environments = [clean_environment(**slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    for code, output in follow([fork_server().start(["train.py", *run_flags], env) for env in environments]):
        assert code == 0, output
    assert len(steps_of(tmp_path / "run")) == 3


def feed_server(url, groups):
    env = register_env(url, group_size=len(groups[0]["tokens"]), patience=300)
    for group in groups:
        post_group(url, env, group)


@pytest.mark.parametrize("fetch_mode", ["rank0", "per_rank"])
def test_batches_of_a_live_server_train_as_those_of_a_file(fetch_mode, tiny_model, tmp_path, rng):
    groups = [make_group(rng, [10, 14, 9, 22]), make_group(rng, [30, 5, 5, 12])]
    common = dict(model_name=tiny_model, batch_size=8, device="cpu", learning_rate=0.5, deepspeed=FP32_SGD, training_steps=1)
    with atropos_server() as server:
        live = dict(atropos_url=server.url, fetch_mode=fetch_mode, output_dir=str(tmp_path / "live"))
        file = dict(data=write_groups(tmp_path / "data.jsonl", groups), output_dir=str(tmp_path / "file"))
        (tmp_path / "runs.json").write_text(json.dumps([common | live, common | file]))
        threading.Thread(target=feed_server, args=(server.url, groups), daemon=True).start()
        for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], 2):
            assert code == 0, output
        assert requests.get(f"{server.url}/info").json()["batch_size"] == (8 if fetch_mode == "rank0" else 4)
    live, file = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("live", "file"))
    for name, value in file.items():
        assert torch.allclose(live[name], value, rtol=1e-5, atol=1e-6), name
    assert steps_of(tmp_path / "live")[0]["tokens/trained"] == 55 + 52 - 8 * 2


def test_a_batch_size_not_divisible_by_ranks_is_an_error_on_all(tiny_model, tmp_path):
    command = ["train.py", *flags(model_name=tiny_model, fetch_mode="per_rank", batch_size=7, output_dir=tmp_path / "run")]
    results = run_ranks(command, 2)
    assert all(code != 0 for code, _ in results)
    assert "batch_size 7 cannot be shared by 2 ranks" in results[0][1] and "Traceback" not in results[0][1]


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_ends_all_with_its_message(how, run_flags, tmp_path):
    results = run_ranks(["tests/fail_on_rank_1.py", how, *run_flags], 2)  # sooner than step_timeout, 1,800 s
    assert [code != 0 for code, _ in results] == [True, True]
    if how == "raise":
        assert all("rank 1" in output and "ran out of luck" in output for _, output in results)
        assert "Traceback" in results[1][1] and "Traceback" not in results[0][1]
    else:
        assert results[1][0] == -signal.SIGKILL
        assert "gone without a message" in results[0][1] and "Traceback" not in results[0][1]


def test_rank_0_alone_verifies_the_checkpoint(run_flags, tmp_path):
    """All its files: hundreds of ranks would ask the file system for the size of hundreds."""
    for more in (["--training_steps=2"], ["--resume"]):
        for code, output in run_ranks(["tests/fail_on_rank_1.py", "verify", *run_flags, *more], 2):
            assert code == 0, output
    assert [values["step"] for values in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_a_disk_of_its_own_is_found_at_the_start_or_at_the_first_save(run_flags, tmp_path, monkeypatch):
    """Also where a run was before, on the other host's own disk."""
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("OTHER_DISK", str(tmp_path / "other"))
    for how, printed in (
        ("apart", f"output_dir {tmp_path}/other on "),
        ("lost", " bytes that all ranks wrote: output_dir must be"),
    ):
        for code, output in run_ranks(["tests/fail_on_rank_1.py", how, *run_flags, "--overwrite_output_dir"], 2):
            assert code == 1 and printed in output and "Traceback" not in output, output
        assert not list((tmp_path / "run").glob("checkpoints/*")) and state_of(tmp_path / "run")["state"] == "failed"


def test_rank_0_alone_reads_a_missing_file_and_all_end(tiny_model, tmp_path):
    command = ["train.py", *flags(model_name=tiny_model, data="absent.jsonl", output_dir=tmp_path / "run")]
    results = run_ranks(command, 2)
    assert all(code != 0 and "absent.jsonl" in output and "Traceback" not in output for code, output in results)


def test_a_machine_without_a_compiler_trains_with_what_needs_none(tiny_model, tmp_path, rng):
    """DeepSpeed's Adam and its op for shared memory are compiled at the first start."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}))
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14])])
    flags = dict(model_name=tiny_model, data=data, batch_size=2, device="cpu", deepspeed=tmp_path / "ds.json")
    command = [sys.executable, "train.py", *(f"--{k}={v}" for k, v in flags.items()), f"--output_dir={tmp_path / 'run'}"]
    env = clean_environment() | {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    ((code, output),) = run_together([command], [env])
    assert code == 0 and (tmp_path / "run" / "final").exists(), output
    assert "op for shared memory cannot be compiled" in output and "Adam cannot be compiled here" in output
    assert "Traceback" not in output
