"""A run that was killed or stopped continues without a difference: from a file, at every stage, on other ranks."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RANK_VARIABLES, clean_environment, make_group, make_model, run_together, write_groups
from fed_run import fed, make_groups, make_settings, state_of, steps_of, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from wsft import WeightedSFTConfig, WeightedSFTTrainer, trainer
from wsft.errors import UserError
from wsft.rollouts.journal import Journal
from wsft.run import checkpoint
from wsft.run import export as export_module
from wsft.run import output_folder as run_folder
from wsft.run.checkpoint import Checkpoint, prune

STEPS = 8
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "fused": True}}}
KILLED = "tests/kill_at.py step 5"


def make_run(model, data):
    return {
        "model_name": model, "data": data, "batch_size": 2, "device": "cpu", "learning_rate": 1e-2, "save_steps": 3,
        "training_steps": STEPS, "lr_scheduler": "cosine", "warmup_steps": 1, "step_timeout": 120,
    }  # fmt: skip


@pytest.fixture
def settings(tiny_model, tmp_path, rng):
    groups = [make_group(rng, [10, 14, 7]) for _ in range(STEPS)]
    groups[1]["masks"][1] = None  # one that is left out and must be counted once
    return make_run(tiny_model, write_groups(tmp_path / "data.jsonl", groups))


def write_ds(tmp_path, stage, bf16=False):
    path = tmp_path / f"stage{stage}.json"
    zero = {"stage": stage} | ({"sub_group_size": 2000} if stage == 3 else {})  # several, as a large model has
    path.write_text(json.dumps(ADAM | {"zero_optimization": zero, "bf16": {"enabled": bf16}}))
    return path


def assert_same_run(folder, untouched, tolerance=0.0):
    ours, theirs = (load_file(f / "final" / "model.safetensors") for f in (folder, untouched))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=0, atol=tolerance)
    steps, wanted = steps_of(folder), steps_of(untouched)
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    for name in ("data/sequences", "data/rejected", "tokens/trained", "learning_rate"):
        assert [s[name] for s in steps] == [s[name] for s in wanted], name
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in wanted], rel=1e-4, abs=1e-5)
    assert state_of(folder)["state"] == "finished"


def mostly_slow(setups, quick):
    return [pytest.param(*setup, marks=pytest.mark.slow if i >= quick else ()) for i, setup in enumerate(setups)]


@pytest.mark.parametrize(
    "num_ranks, stage, bf16",
    mostly_slow([(2, 3, True), (1, 3, False), (2, 3, False), (2, 0, False), (2, 2, False), (2, 1, True), (2, 0, True)], 1),
)
def test_a_run_killed_after_a_checkpoint_ends_bitwise_equal(num_ranks, stage, bf16, settings, tmp_path):
    settings["deepspeed"] = write_ds(tmp_path, stage, bf16)
    train(settings, num_ranks, output_dir=tmp_path / "untouched")
    train(settings, num_ranks, script=KILLED, codes=(-signal.SIGKILL,), output_dir=tmp_path / "run")
    assert state_of(tmp_path / "run")["state"] == "running"
    output = train(settings, num_ranks, output_dir=tmp_path / "run", resume=True)
    assert "resuming from" in output and "step_3" in output
    assert_same_run(tmp_path / "run", tmp_path / "untouched")


@pytest.mark.parametrize(
    "before, after, stage", mostly_slow([(2, 1, 3), (1, 2, 2), (1, 2, 3), (2, 1, 2), (2, 1, 0), (1, 2, 0)], 1)
)
def test_another_number_of_ranks_resumes_exactly(before, after, stage, settings, tmp_path):
    settings["deepspeed"] = write_ds(tmp_path, stage)
    train(settings, 2, output_dir=tmp_path / "untouched")
    train(settings, before, script=KILLED, codes=(-signal.SIGKILL,), output_dir=tmp_path / "run")
    train(settings, after, output_dir=tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "untouched", tolerance=1e-5)
    assert not list((tmp_path / "run" / "checkpoints").glob("*converted*"))


@pytest.mark.slow
def test_two_ranks_that_become_one_and_two_again(settings, tmp_path):
    """A checkpoint made of a converted one is as good as any."""
    settings["deepspeed"] = write_ds(tmp_path, 3)
    train(settings, 2, output_dir=tmp_path / "untouched")
    settings |= {"output_dir": tmp_path / "run", "resume": True, "save_steps": 2}
    train(settings, 2, script="tests/kill_at.py step 3", codes=(-signal.SIGKILL,))
    train(settings, 1, script="tests/kill_at.py step 3", codes=(-signal.SIGKILL,))
    train(settings, 2)
    assert_same_run(tmp_path / "run", tmp_path / "untouched", tolerance=1e-5)


@pytest.fixture(scope="module")
def killed_once(tiny_model, tmp_path_factory):
    """The settings of a run of one rank, what it leaves when it is killed after step 5 (checkpoints of steps 2 and 4), and
    what it leaves untouched."""
    folder = tmp_path_factory.mktemp("killed")
    rng = np.random.default_rng(0)
    data = write_groups(folder / "data.jsonl", [make_group(rng, [10, 14, 7]) for _ in range(STEPS)])
    settings = make_run(tiny_model, data) | {"save_steps": 2}
    train(settings, 1, script=KILLED, codes=(-signal.SIGKILL,), output_dir=folder / "run")
    train(settings, 1, output_dir=folder / "untouched")
    return settings, folder


@pytest.fixture
def killed(killed_once, tmp_path, monkeypatch):
    """Settings to continue a copy of that run in tmp_path / "run", in this process."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    settings, folder = killed_once
    shutil.copytree(folder / "run", tmp_path / "run")
    yield settings | {"output_dir": tmp_path / "run"}
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # of the group that stays


@pytest.fixture
def untouched(killed_once):
    return killed_once[1] / "untouched"


def train_here(settings, **changes):
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in (settings | changes).items()}
    return WeightedSFTTrainer(WeightedSFTConfig(**settings)).train()


def test_what_cannot_be_resumed_is_an_error(killed, untouched, tmp_path):
    run, other = tmp_path / "run", make_model(tmp_path / "other", hidden_size=16)
    torn = shutil.copytree(run / "checkpoints" / "step_4", tmp_path / "torn")
    (torn / "random_0.pt").write_bytes(b"")
    for changes, sentence in (
        ({"resume": "runs/absent/step_4"}, "runs/absent/step_4 is not a complete checkpoint: there is no such folder"),
        ({"resume": run}, "it has no checkpoint.json, which is written last"),
        ({"resume": torn}, "is damaged: random_0.pt has 0 bytes, expected"),
        ({"model_name": other}, f"model_name is '{other}' and was '{killed['model_name']}'"),
        ({"seed": 7}, "seed is 7 and was 42"),
        ({"reduction": "sum"}, "reduction is 'sum' and was 'mean'"),
        ({"deepspeed": ADAM | {"zero_optimization": {"stage": 1}}}, "was saved with stage 3, the DeepSpeed JSON and this"),
        ({"resume": run / "checkpoints" / "step_2"}, "is newer than .*step_2, where this run was to begin"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train_here(killed, **({"resume": True} | changes))
    assert state_of(run)["state"] == "failed" and state_of(run)["step"] == 4  # of its last checkpoint
    train_here(killed, resume=True)
    assert_same_run(run, untouched)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"training_steps": STEPS + 1}, f"training_steps is {STEPS + 1} and was {STEPS}"),  # the cosine would end elsewhere
        ({"deepspeed": {"betas": [0.9, 0.95]}}, r"optimizer\.params\.betas is \[0\.9, 0\.95\] and was None"),
        ({"deepspeed": {"eps": 1e-6}}, r"optimizer\.params\.eps is 1e-06 and was None"),
    ],
)
def test_what_would_change_learning_or_be_ignored_is_refused(changes, sentence, killed, tmp_path):
    if "deepspeed" in changes:
        params = {"lr": "auto", "torch_adam": True, "fused": True} | changes["deepspeed"]
        optimizer = {"type": "AdamW", "params": params}
        changes = {"deepspeed": {"bf16": {"enabled": "auto"}, "optimizer": optimizer, "zero_optimization": {"stage": 3}}}
    with pytest.raises(UserError, match=sentence):
        train_here(killed, resume=True, **changes)


def test_a_json_with_another_implementation_of_adam_resumes(killed, untouched, tmp_path):
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.0}}
    ds = {"bf16": {"enabled": "auto"}, "optimizer": optimizer, "zero_optimization": {"stage": 3}}
    train_here(killed, resume=True, deepspeed=ds)
    assert_same_run(tmp_path / "run", untouched, tolerance=1e-2)  # bf16 weights, whose last bit differs


def test_model_tokenizer_and_data_may_have_moved(killed, untouched, tmp_path):
    model, tokenizer = (
        shutil.copytree(killed["model_name"], tmp_path / "m"),
        shutil.copytree(killed["model_name"], tmp_path / "t"),
    )
    data = shutil.copy(killed["data"], tmp_path / "moved.jsonl")
    train_here(killed, resume=True, model_name=model, tokenizer_name=tokenizer, data=data)
    assert_same_run(tmp_path / "run", untouched)


def test_other_data_or_another_tokenizer_at_the_new_path_are_refused(killed, tmp_path):
    lines = Path(killed["data"]).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(UserError, match=r"other.jsonl' has changed in the part that this run has read"):
        train_here(killed, resume=True, data=tmp_path / "other.jsonl")
    other = AutoTokenizer.from_pretrained(killed["model_name"])
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer_name is .*tokenizer' and was None"):
        train_here(killed, resume=True, tokenizer_name=tmp_path / "tokenizer")


def test_a_run_without_a_checkpoint_yet_must_be_the_same_run_too(killed, untouched, tmp_path):
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"learning_rate is 0\.02 and was 0\.01"):
        train_here(killed, resume=True, learning_rate=0.02)
    train_here(killed, resume=True)
    assert_same_run(tmp_path / "run", untouched)


def test_a_checkpoint_that_is_named_begins_another_run_or_takes_one_back(killed, untouched, tmp_path):
    older = tmp_path / "run" / "checkpoints" / "step_2"
    for _ in range(2):  # the same words again, as a requeued job says them, go on from the newest
        train_here(killed, output_dir=tmp_path / "branch", resume=older)
        assert_same_run(tmp_path / "branch", untouched)
    train_here(killed, resume=older, overwrite_output_dir=True)
    assert_same_run(tmp_path / "run", untouched)


def test_a_second_run_in_one_folder_waits_and_then_says_who_is_there(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 1)
    with (tmp_path / "run" / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another run is using output_dir .*run \(process \d+ on"):
            train_here(killed, resume=True)
    assert state_of(tmp_path / "run")["state"] == "failed"
    train_here(killed, resume=True)


def test_a_file_system_without_locks_is_a_warning(killed, untouched, tmp_path, monkeypatch, capfd):
    def without_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "flock", without_locks)
    train_here(killed, resume=True)
    output = capfd.readouterr().err
    assert f"{tmp_path / 'run'} has no locks (No locks available)" in output and "make sure that no other run uses it" in output
    assert_same_run(tmp_path / "run", untouched)


def test_only_output_dir_is_private(killed, monkeypatch):
    """Not what is downloaded or compiled, which others use, too."""
    masks, load_model = [], trainer.load_model

    def loaded(*args):
        masks.append(os.umask(0o022))
        return load_model(*args)

    monkeypatch.setattr(trainer, "load_model", loaded)
    before = os.umask(0o022)
    try:
        train_here(killed, resume=True)
    finally:
        os.umask(before)
    assert masks == [0o022]


def test_only_the_newest_checkpoints_are_kept_and_what_a_killed_save_left_is_removed(killed, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_2", "step_4"]
    (checkpoints / "step_9.partial").mkdir()
    train_here(killed, resume=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_6", "step_8"]


def test_what_wsft_did_not_make_stays(killed, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step_2_hf", "step_2_hf.partial", "step_1_notes", "step_3", "step_best.partial"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "kept").write_text("mine")
    (checkpoints / "step_1.tar").write_text("mine")
    (checkpoints / "step_best").symlink_to("nowhere")
    (checkpoints / "step_1").symlink_to(checkpoints / "step_2")
    others = {path.name for path in checkpoints.iterdir()} - {"step_2", "step_4"}
    train_here(killed, resume=True)
    assert {path.name for path in checkpoints.iterdir()} == others | {"step_6", "step_8"}
    assert (checkpoints / "step_3" / "kept").read_text() == "mine"


def test_a_checkpoint_that_cannot_be_deleted_is_logged_once_and_deleted_later(killed, untouched, tmp_path, monkeypatch, capfd):
    """A file held open on NFS keeps its folder from being removed."""
    rmtree, checkpoints = shutil.rmtree, tmp_path / "run" / "checkpoints"

    def refuse(path, *args, **kwargs):
        if Path(path).name == "step_2.partial":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        rmtree(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        train_here(killed, resume=True)
    assert capfd.readouterr().err.count("step_2.partial cannot be deleted (Directory not empty)") == 1
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_2.partial", "step_6", "step_8"]
    assert_same_run(tmp_path / "run", untouched)
    prune(checkpoints, 2)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_6", "step_8"]


@pytest.mark.parametrize("launcher", ["SLURM", "torchrun"])
def test_a_restart_resumes_whatever_it_was_submitted_with(launcher, killed, tmp_path, monkeypatch):
    """overwrite_output_dir is for the first start of a job; a restart that finds another's results begins as submitted."""
    job, restarts = {"SLURM": ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), "torchrun": (None, "TORCHELASTIC_RESTART_COUNT")}[
        launcher
    ]
    if job:
        monkeypatch.setenv(job, "7")
    monkeypatch.setenv(restarts, "1")
    run, submitted = tmp_path / "run", killed | {"overwrite_output_dir": True}
    train_here(submitted, training_steps=STEPS, save_steps=100)  # what is there is of no job: replaced
    assert {step["run/starts"] for step in steps_of(run)} == {1}
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS}")
    train_here(submitted)  # the journal is read, no checkpoint is left: it begins again, but knows of the start before
    assert [step["step"] for step in steps_of(run)] == list(range(1, STEPS + 1))
    assert {step["run/starts"] for step in steps_of(run)} == {2}
    train_here(submitted)  # finished: nothing is left to do
    assert {step["run/starts"] for step in steps_of(run)} == {2}


def test_going_back_gives_wandb_another_run(killed, tmp_path, monkeypatch, capfd):
    """W&B does not accept a step twice."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train_here(killed, resume=True, wandb_project="p")
    first = (run / "wandb_id").read_text()
    train_here(killed, resume=run / "checkpoints" / "step_6", overwrite_output_dir=True, wandb_project="p")
    assert (run / "wandb_id").read_text() != first and "W&B gets a new run" in capfd.readouterr().err


COMBINATIONS = [(stage, *types) for stage in range(4) for types in (("fp32", None), ("bf16", None), ("bf16", "bf16"))]


@pytest.mark.parametrize(
    "stage, precision, accumulated",
    [pytest.param(*setup, marks=() if setup == (1, "bf16", None) else pytest.mark.slow) for setup in COMBINATIONS],
)
def test_every_combination_trains_exports_and_resumes(stage, precision, accumulated, settings, tmp_path):
    """On the same and on another number of ranks; with a tokenizer of several chat templates."""
    model = shutil.copytree(settings["model_name"], tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    ds = ADAM | {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}}
    (tmp_path / "ds.json").write_text(
        json.dumps(ds | ({"data_types": {"grad_accum_dtype": accumulated}} if accumulated else {}))
    )
    settings |= {"model_name": model, "deepspeed": tmp_path / "ds.json", "lr_scheduler": "constant", "save_steps": 2}
    train(settings, 2, output_dir=tmp_path / "run", training_steps=2)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for ranks, name in ((2, "same"), (1, "other")):
        train(settings, ranks, output_dir=tmp_path / name, training_steps=4, resume=True)
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "final")
        assert len(steps_of(tmp_path / name)) == 4
        assert (tmp_path / name / "final" / "additional_chat_templates" / "tool_use.jinja").exists()
    same, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("same", "other"))
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert all(torch.allclose(same[name].float(), other[name].float(), atol=tolerance, rtol=tolerance) for name in same)


@pytest.mark.slow
def test_a_save_and_a_load_that_take_longer_than_any_step_are_no_hang(killed, untouched, tmp_path, monkeypatch):
    """As on a file system that is slow: twelve times step_timeout."""
    slowed = []
    for module, name in ((checkpoint, "_save_random"), (trainer, "load_random")):
        action = getattr(module, name)

        def slow(*args, action=action):
            if len(slowed) < 2:
                slowed.append(action)
                time.sleep(24)
            return action(*args)

        monkeypatch.setattr(module, name, slow)
    train_here(killed, resume=True, step_timeout=2)
    assert len(slowed) == 2
    assert_same_run(tmp_path / "run", untouched)


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(killed, untouched, tmp_path, capfd):
    (tmp_path / "run" / "checkpoints" / "step_4" / "random_0.pt").unlink()
    train_here(killed, resume=True)
    assert "passing over" in capfd.readouterr().err
    assert_same_run(tmp_path / "run", untouched)


def test_a_checkpoint_that_holds_code_does_not_run_it(killed, untouched, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_4"
    whole = (folder / "checkpoint.json").read_text()
    for path in (folder / "random_0.pt", *folder.glob("deepspeed/*")):
        kept, metadata = path.read_bytes(), json.loads(whole)
        torch.save(Evil(tmp_path / "ran"), path)
        metadata["files"][str(path.relative_to(folder))] = path.stat().st_size
        (folder / "checkpoint.json").write_text(json.dumps(metadata))
        with pytest.raises(Exception, match="Weights only load failed"):
            train_here(killed, resume=True)
        path.write_bytes(kept)
    (folder / "checkpoint.json").write_text(whole)
    assert not (tmp_path / "ran").exists()
    train_here(killed, resume=True)
    assert_same_run(tmp_path / "run", untouched)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_export_writes_what_the_run_writes_in_as_many_shards_as_needed(untouched, tmp_path, monkeypatch):
    checkpoint = Checkpoint.at(untouched / "checkpoints" / f"step_{STEPS}")
    monkeypatch.setattr(export_module, "SHARD_BYTES", 10_000)
    export_module.export(checkpoint, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert not list((tmp_path / "out").glob("mapped"))
    wanted = load_file(untouched / "final" / "model.safetensors")
    found = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == model.config.vocab_size


def test_what_export_copies_out_of_the_base_model_is_in_as_many_shards_as_needed(untouched, tmp_path, monkeypatch):
    checkpoint, model = Checkpoint.at(untouched / "checkpoints" / f"step_{STEPS}"), tmp_path / "model"
    shutil.copytree(checkpoint.metadata["config"]["model_name"], model)
    others = {f"mtp.{i}.weight": torch.full((50, 20), float(i)) for i in range(5)}  # 4 KB each
    save_file(load_file(model / "model.safetensors") | others, model / "model.safetensors", {"format": "pt"})
    config = checkpoint.metadata["config"] | {"model_name": str(model)}
    monkeypatch.setattr(export_module, "SHARD_BYTES", 10_000)
    export_module.export(replace(checkpoint, metadata=checkpoint.metadata | {"config": config}), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len({index["weight_map"][name] for name in others}) == 3
    found = {name: load_file(tmp_path / "out" / index["weight_map"][name])[name] for name in others}
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("bf16", [False, True])
def test_files_other_than_weights_are_those_of_the_base_model_byte_for_byte(bf16, tiny_model, tmp_path, rng, monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    older = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    older |= {"rope_theta": 5e5, "torch_dtype": "float32", "auto_map": {}}
    (model / "config.json").write_text(json.dumps(older, indent=4))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("chat_template.jinja", "generation_config.json", "modeling_own.py", "additional_chat_templates/tool.jinja"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{ }\n")
    (model / "README.md").write_text("not of the model")
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14])])
    ds = {"bf16": {"enabled": bf16}, "optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 3}}
    settings = make_run(str(model), data) | {"output_dir": tmp_path / "run", "deepspeed": ds, "training_steps": 2}
    train_here(settings)
    final = tmp_path / "run" / "final"
    ours, theirs = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (final, model))
    del ours["model.safetensors"], theirs["model.safetensors"], theirs["README.md"]
    if bf16:
        output = json.loads(ours.pop("config.json"))
        assert output == json.loads(theirs.pop("config.json")) | {"torch_dtype": "bfloat16"}
    assert ours == theirs
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def test_export_from_the_command_line_needs_no_gpu_and_says_what_is_wrong(untouched, tmp_path, monkeypatch):
    newest = untouched / "checkpoints" / f"step_{STEPS}"
    command = [sys.executable, "-m", "wsft.export", newest, tmp_path / "out"]
    (done,) = run_together([command], [clean_environment(CUDA_VISIBLE_DEVICES="")])
    assert done == (0, f"the model of {newest} is in {tmp_path / 'out'}\n")
    wrong = {"is not a complete checkpoint": (untouched, tmp_path / "none"), "exists: name a new folder": (newest, untouched)}
    for sentence, given in wrong.items():
        monkeypatch.setattr(sys, "argv", ["export", *map(str, given)])
        with pytest.raises(SystemExit, match=sentence):
            export_module.main()
    same = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "out", untouched / "final")]
    assert same[0] == same[1]


def test_files_are_private_and_keys_are_written_nowhere(tiny_model, tmp_path, rng, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, groups = tmp_path / "run", make_groups(rng)[:3]
    settings = make_settings(tiny_model, tmp_path) | {"training_steps": 3, "wandb_project": "p", "output_dir": folder}
    with fed(folder, groups) as (server, _):
        output = train(settings, 1, atropos_url=server.url.replace("://", "://me:hunter2@"))
    assert "***@127.0.0.1" in output and "hunter2" not in output
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    ours = [path for path in files if "wandb" not in path.parts]
    assert len(ours) > 10 and not [p for p in (folder, *ours) if stat.S_IMODE(p.stat().st_mode) & 0o077]


def test_the_journal_is_pruned_to_the_oldest_checkpoint_and_its_limit_is_held(tiny_model, tmp_path, rng):
    folder, groups = tmp_path / "run", make_groups(rng)
    for group in groups:
        group["messages"] = [[{"role": "user", "content": "x" * 200_000}]] * 4
    settings = make_settings(tiny_model, tmp_path) | {"output_dir": folder, "save_steps": 100, "journal_gib": 4 / 1024}
    with fed(folder, groups) as (server, feeder):
        train(settings, 1, script="tests/kill_at.py step 11", codes=(-signal.SIGKILL,), atropos_url=server.url)
        feeder.run_is_dead()  # the batch that it was fetching may be lost
        kept = sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
        assert len(kept) == 2 and max(s["journal/gib"] for s in steps_of(folder)) < 8 / 1024  # of 11 MiB
        assert min(Journal(folder / "journal" / "0_of_1", read_only=True).numbers) <= kept[0]
        train(settings, 1, atropos_url=server.url)
    assert [s["step"] for s in steps_of(folder)] == list(range(1, len(groups) + 1))
