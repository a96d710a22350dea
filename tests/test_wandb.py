"""Failures of Weights & Biases do not affect training, saving or the end of a run."""

import signal

import psutil
import pytest
import wandb
from atropos_server import free_port
from conftest import make_group, write_groups
from fed_run import command_of, fed, make_groups, make_settings, state_of, steps_of, train, wait_until

from wsft import WeightedSFTConfig, WeightedSFTTrainer
from wsft.dry_run import dry_run
from wsft.errors import UserError
from wsft.run import metrics
from wsft.run.metrics import Metrics

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def settings(tiny_model, tmp_path, rng, monkeypatch):
    wandb.teardown()  # else its settings, and its process, are those of an earlier test
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14]) for _ in range(3)])
    settings = dict(model_name=tiny_model, data=data, batch_size=2, device="cpu", wandb_project="tests")
    return settings | {"output_dir": str(tmp_path / "run"), "save_steps": 1}


def train_here(settings):
    WeightedSFTTrainer(WeightedSFTConfig(**settings)).train()


def cores(process):
    """W&B's own processes of one that logs to it."""
    return [child for child in psutil.Process(process).children(recursive=True) if "wandb-core" in " ".join(command_of(child))]


def is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_missing_key_is_an_error_before_anything_is_loaded(settings):
    for start in (train_here, lambda settings: dry_run(WeightedSFTConfig(**settings))):
        with pytest.raises(UserError, match=r"there is no key for http://127.0.0.1:\d+: run `wandb login`, set WANDB_API_KEY"):
            start(settings | {"model_name": "nothing here"})


def test_a_service_out_of_reach_is_one_warning(settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(metrics, "WANDB_S", 3.0)
    train_here(settings)
    words = capfd.readouterr().err
    assert words.count("W&B fails, and is given up; the run continues") == 1 and "Traceback" not in words
    assert [step["step"] for step in steps_of(tmp_path / "run")] == [1, 2, 3]
    assert state_of(tmp_path / "run")["state"] == "finished"


def test_a_failing_sink_is_logged_once(settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened, failing = Metrics.__init__, []

    def fail(*_, **__):
        failing.append(1)
        raise ConnectionResetError("Connection lost")

    def open_badly(self, *args):
        opened(self, *args)
        self._line.step = self._line.close = self._wandb.log = self._wandb.finish = fail

    monkeypatch.setattr(Metrics, "__init__", open_badly)
    train_here(settings)
    words = capfd.readouterr().err
    for name in ("W&B fails, and is given up", "the progress line fails, and is not whole"):
        assert words.count(f"{name}; the run continues (ConnectionResetError: Connection lost)") == 1
    assert len(steps_of(tmp_path / "run")) == 3 and len(failing) == 5  # W&B once


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_helper_of_wandb_that_dies_takes_nothing_with_it(how, settings, tiny_model, tmp_path, rng, monkeypatch):
    """TERM is what a cluster sends to every process of a job."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, groups = tmp_path / "run", make_groups(rng)
    settings = make_settings(tiny_model, tmp_path) | {"wandb_project": "p", "output_dir": folder}
    with fed(folder, groups, released=2) as (server, feeder):

        def end(processes):
            wait_until(lambda: len(steps_of(folder)) == 2)
            helpers = cores(processes[0].pid)
            assert helpers
            for helper in helpers:
                helper.send_signal(how)
            wait_until(lambda: not any(map(is_alive, helpers)))
            if how == signal.SIGTERM:
                processes[0].send_signal(how)
            feeder.release(len(groups))

        output = train(settings, 1, during=end, atropos_url=server.url)
    assert state_of(folder)["state"] == ("preempted" if how == signal.SIGTERM else "finished")
    assert list((folder / "checkpoints").glob("step_*")) and "Traceback" not in output
    assert output.count("W&B fails, and is given up") == 1 or how == signal.SIGTERM
