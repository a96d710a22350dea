"""Publishing weights: every version is the model of that step, under the names of the base model's files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_group, make_model, run_ranks, run_script, write_groups
from fed_run import flags
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import make

from wsft.publish.folder import checksum_of

STEPS = 3
SGD = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def publish(tmp_path, rng, model, ranks=1, stage=3, codes=(0,), **changes):
    """A run that publishes to tmp_path / "published"; returns its output."""
    data = tmp_path / "data.jsonl"
    if not data.exists():
        write_groups(data, [make_group(rng, [10, 14], words=60) for _ in range(STEPS)])
    (tmp_path / "ds.json").write_text(json.dumps(SGD | {"zero_optimization": {"stage": stage}}))
    settings = dict(
        model_name=model, data=data, output_dir=tmp_path / "run", deepspeed=tmp_path / "ds.json", batch_size=2, device="cpu",
        learning_rate=0.1, max_token_len=64, trust_remote_code=True, publish_folder=tmp_path / "published", publish_keep=9,
    )  # fmt: skip
    results = run_ranks(["train.py", *flags(settings | changes)], ranks)
    assert all(code in codes for code, _ in results), results[0][1]
    return results[0][1]


@pytest.mark.parametrize("ranks, stage, tied", [(2, 3, True), (2, 3, False), (1, 0, True)])
def test_every_version_is_the_model_of_that_step(ranks, stage, tied, tmp_path, rng):
    model = make_model(tmp_path / "model", tied=tied)
    publish(tmp_path, rng, model, ranks, stage, publish_bucket_mib=1)
    published, final = tmp_path / "published", tmp_path / "run" / "final"
    assert sorted(path.name for path in published.iterdir()) == ["latest", *(f"step_{step}" for step in range(STEPS + 1))]
    assert (published / "latest").read_text() == f"step_{STEPS}\n"
    first, last, base, exported = (
        tensors_of(f) for f in (published / "step_0", published / f"step_{STEPS}", tmp_path / "model", final)
    )
    assert first.keys() == last.keys() == base.keys() and all(torch.equal(first[name], base[name]) for name in base)
    assert all(torch.equal(last[name], exported[name]) for name in exported)
    assert not any(torch.equal(last[name], base[name]) for name in base)
    version = json.loads((published / f"step_{STEPS}" / "version.json").read_text())
    assert version["version"] == str(STEPS) and version["crc32"] == {name: checksum_of(last[name]) for name in last}
    AutoModelForCausalLM.from_pretrained(published / f"step_{STEPS}"), AutoTokenizer.from_pretrained(published / "step_1")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["publish/version"] for line in metrics] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_names_are_those_of_the_files_and_what_is_not_trained_is_linked(name, tmp_path, rng):
    """Experts that transformers keeps as one parameter are separate tensors in the files; a vision tower is not trained; nor is
    a tensor that transformers does not load."""
    model = tmp_path / "model"
    make(name, model)
    other = {"mtp.layers.0.weight": torch.arange(5.0)}
    save_file(tensors_of(model) | other, model / "model.safetensors", {"format": "pt"})
    publish(tmp_path, rng, model, 2)
    published, base, exported = tmp_path / "published", tensors_of(model), tensors_of(tmp_path / "run" / "final")
    last = tensors_of(published / f"step_{STEPS}")
    assert last.keys() == base.keys() and all(torch.equal(last[name], exported[name]) for name in base)
    # the folder is used again
    save_file({"of.another.model": torch.zeros(1)}, published / ".unchanged" / "model-unchanged-00009.safetensors")
    shutil.rmtree(tmp_path / "run")
    publish(tmp_path, rng, model, 2)
    assert tensors_of(published / f"step_{STEPS}").keys() == base.keys()
    first, last = (sorted((published / f"step_{step}").glob("model-unchanged-*")) for step in (0, STEPS))
    assert first and all(file.samefile(other) for file, other in zip(first, last, strict=True))
    assert any("mtp.layers.0.weight" in load_file(file) for file in first)


def test_with_lora_a_version_is_the_whole_adapted_model(tmp_path, rng):
    """What has no adapter is linked."""
    model, published = make_model(tmp_path / "model", tied=False), tmp_path / "published"
    publish(tmp_path, rng, model, 2, lora_rank=3, lora_alpha=6, learning_rate=0.5, publish_lora="merged")
    code, output = run_script(
        "-m", "wsft.export", tmp_path / "run/checkpoints" / f"step_{STEPS}", tmp_path / "merged", "--merge"
    )
    assert code == 0, output
    last, merged, base = tensors_of(published / f"step_{STEPS}"), tensors_of(tmp_path / "merged"), tensors_of(Path(model))
    assert last.keys() == base.keys() and all(torch.equal(last[name], merged[name]) for name in base)
    same = {name for name in base if torch.equal(last[name], base[name])}
    assert "lm_head.weight" in same and not any("proj" in name for name in same)
    AutoModelForCausalLM.from_pretrained(published / f"step_{STEPS}")


def test_adapters_are_folders_that_peft_loads(tmp_path, rng):
    """Of bf16 copies, as they are in the forward pass; the newest of them stay."""
    model, published = make_model(tmp_path / "model"), tmp_path / "published"
    publish(tmp_path, rng, model, 2, lora_rank=3, lora_alpha=6, learning_rate=0.5, publish_keep=2)
    newest, other = sorted(published.iterdir(), key=lambda path: int(path.name.split("_")[-1]), reverse=True)
    assert newest.name.endswith(f"_{STEPS}") and other.name.endswith(f"_{STEPS - 1}")
    final = tensors_of(tmp_path / "run" / "final")
    assert final.keys() == tensors_of(newest).keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in tensors_of(newest).items())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), newest)


def test_versions_are_pruned_and_later_ones_of_an_earlier_start_removed(tmp_path, rng):
    model, published = make_model(tmp_path / "model"), tmp_path / "published"
    publish(tmp_path, rng, model, publish_keep=2, save_steps=1, keep_checkpoints=9)
    assert sorted(path.name for path in published.glob("step_*")) == ["step_2", "step_3"]
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    (published / "step_2.partial").mkdir()
    (published / "step_2.partial" / "version.json").touch()
    publish(tmp_path, rng, model, publish_keep=2, resume=True, training_steps=2)
    assert sorted(path.name for path in published.glob("step_*")) == ["step_1", "step_2"]
    assert (published / "latest").read_text() == "step_2\n"


def test_a_folder_of_checkpoints_is_not_taken_for_versions(tmp_path, rng):
    model, checkpoints = make_model(tmp_path / "model"), tmp_path / "run" / "checkpoints"
    publish(tmp_path, rng, model, save_steps=1, training_steps=2)
    before = sorted(path.name for path in checkpoints.iterdir())
    output = publish(tmp_path, rng, model, codes=(1,), resume=True, publish_folder=checkpoints, training_steps=3)
    assert "checkpoints/step_2 is no published version: set publish_folder to a folder of its own" in output
    assert sorted(path.name for path in checkpoints.iterdir()) == before == ["step_1", "step_2"]


def test_weights_in_another_format_are_published_whole(tmp_path, rng):
    """And converted to safetensors; buffers and frozen parameters too."""
    model = tmp_path / "model"
    make("mixtral", model)
    tensors = load_file(model / "model.safetensors")
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    publish(tmp_path, rng, model)
    first = tensors_of(tmp_path / "published" / "step_0")
    assert first.keys() == tensors.keys() and all(torch.equal(first[name], tensors[name]) for name in tensors)


def test_a_folder_that_cannot_be_written_ends_the_run_with_a_sentence(tmp_path, rng):
    (tmp_path / "published").write_text("a file")
    output = publish(tmp_path, rng, make_model(tmp_path / "model"), codes=(1,))
    assert "weights cannot be published to" in output and "set another publish_folder" in output and "Traceback" not in output
