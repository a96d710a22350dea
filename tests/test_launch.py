"""launch/single_node.sh: signals reach the ranks, no orphan remains, the exit code is true."""

import importlib.util
import os
import shlex
import signal
import subprocess
import time

import psutil
import pytest
from conftest import ROOT, buffers_of_deepspeed, clean_environment, remove_buffers_of_deepspeed, run_together
from fed_run import PATIENCE_S, STEPS, fed, flags, is_rank, make_groups, make_settings, state_of, steps_of, wait_until


@pytest.fixture
def settings(tiny_model, tmp_path, rng):
    """Of a run that gets all batches but the last, and so cannot end before it is made to."""
    settings = make_settings(tiny_model, tmp_path) | {"output_dir": tmp_path / "run", "resume": False, "save_steps": 1000}
    with fed(tmp_path / "run", make_groups(rng), released=STEPS - 1) as (server, _):
        yield settings | {"atropos_url": server.url}


# what conda's compilers, tcsh, or a job around it set for reasons of their own: nothing to the launcher of one machine
OF_OTHERS = {"HOST": "x86_64-conda-linux-gnu", "WORLD_SIZE": "16", "FIRST_RANK": "8", "MASTER_ADDR": "10.255.255.1"}


class Started:
    """A launcher at work, its ranks in their order, and everything it started."""

    def __init__(self, settings, output):
        self.output = output
        with output.open("w") as file:
            command, env = ["bash", "launch/single_node.sh", *flags(settings)], clean_environment(NUM_GPUS="2", **OF_OTHERS)
            self.launcher = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_until(lambda: len(steps_of(settings["output_dir"])) >= 2 or self.launcher.poll() is not None)
            assert self.launcher.poll() is None, output.read_text()
            self.family = psutil.Process(self.launcher.pid).children(recursive=True)
            self.ranks = sorted(filter(is_rank, self.family), key=lambda rank: rank.environ()["RANK"])
            self.port = self.ranks[0].environ()["MASTER_PORT"]
        except BaseException:
            self.launcher.kill()  # which its ranks notice
            raise

    def end(self, timeout=PATIENCE_S):
        """The exit code; nothing that was started may be left."""
        try:
            code = self.launcher.wait(timeout)
            _, alive = psutil.wait_procs(self.family, timeout=PATIENCE_S)
            assert not alive, f"still there: {alive}\n{self.output.read_text()}"
            return code
        finally:
            for process in self.family:
                if process.is_running():
                    process.kill()


@pytest.fixture
def started(settings, tmp_path):
    running = Started(settings, tmp_path / "output.txt")
    yield running
    assert not buffers_of_deepspeed(running.port)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, to", [slow("TERM", "launcher"), ("INT", "terminal"), slow("USR1", "launcher"), slow("INT", "launcher"),
                 slow("HUP", "launcher"), slow("TERM", 0), slow("USR1", 1), slow("INT", 1)],
)  # fmt: skip
def test_a_signal_to_any_process_ends_with_a_checkpoint(name, to, started, tmp_path):
    number = signal.Signals[f"SIG{name}"]
    if to == "launcher":
        started.launcher.send_signal(number)
    elif to == "terminal":  # Ctrl-C goes to the whole foreground group
        os.killpg(started.launcher.pid, number)
    else:
        started.ranks[to].send_signal(number)
    assert started.end() == (0 if to in (0, 1) else 128 + number), started.output.read_text()
    state = state_of(tmp_path / "run")
    assert state["state"] == "preempted" and (tmp_path / "run" / "checkpoints" / f"step_{state['step']}").exists()
    assert state["step"] == len(steps_of(tmp_path / "run")) and "Traceback" not in started.output.read_text()


@pytest.mark.slow  # CI has it on two hosts (test_multi_node.py)
def test_a_rank_that_is_killed_ends_all_and_is_named(started, tmp_path):
    started.ranks[1].kill()
    start = time.monotonic()
    assert started.end() == 137 and time.monotonic() - start < 100  # sooner than step_timeout, 120
    assert "error: rank 1 failed first: killed (137)" in started.output.read_text()
    assert state_of(tmp_path / "run")["state"] == "failed"


def test_a_second_signal_ends_at_once(started):
    started.ranks[1].send_signal(signal.SIGSTOP)  # it would never be through
    started.launcher.terminate()
    wait_until(lambda: "a second signal" in started.output.read_text())
    started.launcher.terminate()
    assert started.end(60) == 137 and "again: ending at once" in started.output.read_text()


def test_a_launcher_that_is_killed_leaves_a_checkpoint_and_no_orphan(started, tmp_path):
    started.launcher.kill()
    assert started.end() == -signal.SIGKILL
    state = state_of(tmp_path / "run")
    assert state["state"] == "preempted" and "launcher" in state["reason"]
    remove_buffers_of_deepspeed(started.port)  # who would have done so is gone


def test_a_signal_while_modules_load_is_not_lost(settings, tmp_path):
    with (tmp_path / "output.txt").open("w") as output:
        command = ["bash", "launch/single_node.sh", *flags(settings)]
        launcher = subprocess.Popen(command, cwd=ROOT, env=clean_environment(NUM_GPUS="2"), stdout=output, stderr=output)
        wait_until(lambda: len(list(filter(is_rank, psutil.Process(launcher.pid).children()))) == 2)
        launcher.terminate()
        assert launcher.wait(PATIENCE_S) == 143, (tmp_path / "output.txt").read_text()
    assert state_of(tmp_path / "run")["reason"] == "asked to stop before the first step"


def test_wrong_settings_are_printed_once_and_nothing_starts(settings, tmp_path):
    command = ["bash", "launch/single_node.sh", *flags(settings, learning_rate=-1)]
    ((code, output),) = run_together([command], [clean_environment(NUM_GPUS="2")])
    assert code == 2 and output.count("learning_rate") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow  # the second waits for the first to end
def test_a_second_run_in_one_folder_is_refused_with_host_and_process(started, settings):
    ((code, output),) = run_together([["python", "train.py", *flags(settings)]], [clean_environment()])
    assert code == 1 and f"(process {started.ranks[0].pid} on {os.uname().nodename}): stop it" in output
    started.launcher.terminate()
    started.end()


def test_other_hosts_get_what_networks_and_caches_need_and_no_secret(tmp_path, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("hosts", ROOT / "launch" / "hosts.py")
    hosts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hosts)
    given = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "http_proxy": "http://proxy:3128",
        "NO_PROXY": "localhost,10.0.0.0/8", "SSL_CERT_FILE": "/etc/ca.pem", "XDG_CACHE_HOME": "/scratch/cache",
        "DEEPSPEED_LOG_LEVEL": "info", "NCCL_IB_PKEY": "0x1", "NCCL_SOCKET_IFNAME": "ib0", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    secret = {"WANDB_API_KEY": "k", "HF_TOKEN": "t", "HTTPS_PROXY": "http://me:pw@proxy:3128"}
    for name, value in (given | secret | {"EDITOR": "vi", "HOSTNAME": "here"}).items():
        monkeypatch.setenv(name, value)
    hosts.write_environment(tmp_path / "environment")
    written = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert {name: shlex.split(written[name])[0] for name in given} == given
    assert not written.keys() & {*secret, "EDITOR", "HOSTNAME"}
    assert "HF_TOKEN, HTTPS_PROXY, WANDB_API_KEY" in capfd.readouterr().err
