"""Every causal language model that transformers has: trained by two ranks under ZeRO-3 as a dense float64 reference trains it,
or refused in a sentence, by run and dry run alike. CI has one model for each cause of past failures.

    PYTHONPATH=. python tests/test_zoo.py TABLE.jsonl [NAMES...] [SETTING=VALUE...]   # a line for each: error, layout, message
"""

import contextlib
import io
import json
import math
import re
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_group, run_ranks, write_groups
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrize import register_parametrization
from transformers.pytorch_utils import Conv1D
from zoo import REMOTE, VOCAB, ZOO, make, reading
from zoo_table import EXACT, is_exact

from wsft import WeightedSFTConfig
from wsft.dry_run import dry_run
from wsft.errors import UserError
from wsft.model.loading import passes_of
from wsft.model.lora import Adapters

LEARNING_RATE, BATCH_SIZE, RANKS = 0.1, 12, 2
TOGETHER = 8  # models in one start of the ranks, for a table
PEFT = re.compile(r"base_model\.model\.(.*)\.weight")  # names in an adapter's file
OTHER = "mtp.layers.0.weight"  # in the file but not in the model, like layers for multi-token prediction
SETTINGS = dict(
    batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, max_grad_norm=0, micro_batch_tokens=128, max_token_len=64, device="cpu",
    trust_remote_code=True, step_timeout=60,
)  # fmt: skip
DS = {
    "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
LAYOUTS = {  # as a run says them
    "sequences are packed, prefixes that they share are run once": "packed, shared",
    "sequences are packed;": "packed",
    "are padded instead": "padded",
    "each sequence is one": "alone",
}


def batches(rng):
    """Two of three groups of rollouts that begin alike, with a turn of the user's in the longer ones; and one of one rollout,
    so that the other rank has an empty micro-batch."""
    made = []
    for prompts in ((14, 9, 20), (14, 9, 20), (5,)):
        groups = []
        for prompt in prompts:
            lengths = (prompt + rng.integers(3, 30, 4)).tolist() if len(prompts) > 1 else [prompt + 11]
            group = make_group(rng, lengths, prompt, alike=True, words=VOCAB - 20)
            for mask in group["masks"]:
                if len(mask) > prompt + 12:
                    mask[prompt + 5 : prompt + 9] = [-100] * 4
            groups.append(group)
        made.append(groups)
    return made


class AddLow(torch.nn.Module):
    """A parametrization of a weight as its sum with an adapter."""

    def __init__(self, lora_A, outputs, scaling, transposed):
        super().__init__()
        self.lora_A, self.scaling, self.transposed = torch.nn.Parameter(lora_A), scaling, transposed
        self.lora_B = torch.nn.Parameter(torch.zeros(outputs, len(lora_A), dtype=lora_A.dtype))

    def forward(self, weight):
        change = self.scaling * self.lora_B @ self.lora_A
        return weight + (change.T if self.transposed else change)


def adapt(model, folder, lora_rank):
    """Add the adapters with which a run begins; returns name -> parameter."""
    config = WeightedSFTConfig(model_name=str(folder), lora_rank=lora_rank, seed=42)
    passes = passes_of(model.config, True, SETTINGS["max_token_len"], torch.float32)
    adapters = Adapters.for_model(passes.model, passes.unreached(), config)
    start = reading(folder, torch.float32)
    adapters.put_into(start, config.seed)
    model.requires_grad_(False)
    found = {}
    for name in adapters.modules:
        module, begin = model.get_submodule(name), start.get_submodule(name)
        down, outputs, transposed = begin.lora_A.detach().to(module.weight.dtype), len(begin.lora_B), isinstance(begin, Conv1D)
        added = AddLow(down, outputs, config.lora_alpha / lora_rank, transposed)
        register_parametrization(module, "weight", added)
        found |= {f"{name}.{matrix}": param for matrix, param in added.named_parameters()}
    return found


def reference(folder, batches, dtype, lora_rank=None, learning_rate=LEARNING_RATE):
    """Parameters after a step of SGD on each batch: one rollout at a time, dense, with the code of transformers alone. With
    `lora_rank` those of the adapters."""
    model = reading(folder, dtype)
    params = adapt(model, folder, lora_rank) if lora_rank else dict(model.named_parameters())
    for groups in batches:
        rows = [row for group in groups for row in zip(group["tokens"], group["masks"], group["advantages"], strict=True)]
        total = sum(mask[t] != -100 for _, mask, _ in rows for t in range(1, len(mask)))
        model.zero_grad()
        for tokens, mask, advantages in rows:
            logp = logits_of(model, torch.tensor([tokens]))[0].log_softmax(-1)
            trained = [t for t in range(1, len(tokens)) if mask[t] != -100]
            loss = -sum(advantages[t] * logp[t - 1, tokens[t]] for t in trained) / total
            loss.backward()
        with torch.no_grad():
            for param in params.values():
                if param.grad is not None:
                    param -= learning_rate * param.grad
    return params


def logits_of(model, tokens):
    try:
        return model(input_ids=tokens, use_cache=False).logits
    except AttributeError:  # of Llama 4's multimodal class, in transformers 5.24
        return model.language_model(input_ids=tokens, use_cache=False).logits


def reference_in_float64(folder, batches, *settings):
    """Or in float32, where the model's code runs in nothing else. What it raises, where it does not run at all."""
    try:
        return reference(folder, batches, torch.float64, *settings)
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            return reference(folder, batches, torch.float32, *settings)
    except Exception as error:
        return error
    return RuntimeError("the model does not run")


def worst(found, wanted):
    """The largest relative error of a parameter, and its name."""
    errors = {
        name: ((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)).item()
        for name, value in wanted.items()
    }
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[name], name


class Untried(Exception):
    """The model cannot be made from the defaults of its class, or does not run on text in transformers itself."""


def train(names, folder, rng, bf16=False, **changes):
    """The result of each model, in one start of the ranks: {"error": relative to float64, "float32": that of a
    float32 reference, "layout"}, or {"refused": the last message}; "dry" is that of the dry run, if it refused."""
    made, rows, runs = batches(rng), [], []
    (folder / "ds.json").write_text(json.dumps(DS | {"bf16": {"enabled": bf16}}))
    data = write_groups(folder / "data.jsonl", [group for groups in made for group in groups])
    for name in names:
        model = folder / name
        try:
            make(name, model)
        except Exception as error:  # of transformers, of many types
            raise Untried(f"{name} cannot be made: {type(error).__name__}: {error}") from error
        save_file(weights_of(model) | {OTHER: torch.arange(5.0)}, model / "model.safetensors", {"format": "pt"})
        rows.append({"name": name, "class": json.loads((model / "config.json").read_text())["architectures"][0]})
        there = dict(
            model_name=str(model), data=data, output_dir=str(folder / f"{name}.run"), deepspeed=str(folder / "ds.json")
        )
        runs.append(SETTINGS | there | changes)
    settings = lora_rank, _ = changes.get("lora_rank"), changes.get("learning_rate", LEARNING_RATE)
    wanted = [reference_in_float64(folder / name, made, *settings) for name in names]
    (folder / "runs.json").write_text(json.dumps(runs))
    results = run_ranks(["tests/train_many.py", folder / "runs.json"], RANKS, timeout=120 + 20 * len(names))
    output = results[0][1]
    layouts = [LAYOUTS[words] for words in re.findall("|".join(LAYOUTS), output)]
    for row, run, values in zip(rows, runs, wanted, strict=True):
        row |= dry(run)
        final = Path(run["output_dir"]) / "final"
        if not final.exists():
            row["refused"] = sentence(output)
            continue
        if isinstance(values, Exception):
            raise Untried(f"{name} does not run: {values}") from values
        row["layout"] = layouts.pop(0) if layouts else "padded"  # nothing is logged where that was asked for
        if lora_rank:
            found = {PEFT.sub(r"\1", key): tensor for key, tensor in weights_of(final).items()}
            row["export"] = sorted(found.keys() ^ values.keys())
        else:
            found = {key: param.detach() for key, param in reading(final, torch.float32).named_parameters()}
            row["export"] = unlike(weights_of(final), weights_of(Path(run["model_name"])), values)
        row["error"], row["worst"] = worst(found, values)
        if row["error"] > EXACT:
            row["float32"] = worst(reference(run["model_name"], made, torch.float32, *settings), values)[0]
    return rows


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def unlike(exported, original, trained):
    """How an export differs from the original: names, shapes, and values that are not reached from text."""
    found = sorted(exported.keys() ^ original.keys())
    found += [name for name in exported.keys() & original.keys() if exported[name].shape != original[name].shape]
    still = [name for name, param in trained.items() if name in original and param.grad is None]
    still = [name for name in still if torch.equal(trained[name], original[name].double())]
    return found + [name for name in [OTHER, *still] if not torch.equal(exported[name], original[name])]


def dry(run):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            fits = dry_run(WeightedSFTConfig(**run, dry_run=True, ranks=RANKS))
        except UserError as error:
            return {"dry": f"error: {error}"}
    return {} if fits else {"dry": sentence(output.getvalue())}


def sentence(output):
    """The last message, without program and rank."""
    last = [line for line in output.splitlines() if line.strip()][-1]
    return (
        "Traceback: " + last
        if "Traceback" in output
        else re.sub(r"^(wsft ERROR \(rank \d+\)|train.py: error): (ended by rank \d+: )?", "error: ", last)
    )


def assert_exact_or_refused(row):
    if "refused" in row:
        assert row["refused"].startswith("error: ") and row["refused"] == row.get("dry"), row
    else:
        assert "dry" not in row and is_exact(row), row


def test_one_of_each_cause_is_trained_exactly(tmp_path, rng):
    """A parameter that is read outside of its module; parts of attention that packed rows do not have; a router whose experts
    look at values; experts that are not run without tokens; a vision tower beside it; a buffer of a type of its own."""
    for row in train(["mamba", "gpt_oss", "dbrx", REMOTE, "qwen3_5", "recurrent_gemma"], tmp_path, rng):
        assert_exact_or_refused(row)


@pytest.mark.parametrize(
    "names",
    [["qwen3_moe", "gemma3n_text", "mamba"], pytest.param(["falcon_h1", "qwen2_5_vl", "mamba"], marks=pytest.mark.slow)],
)
def test_adapters_of_mixtures_hybrids_and_multimodal_models_are_trained_exactly(names, tmp_path, rng):
    """Or refused: Mamba has no attention. The derivative of Gemma 3n is not finite where an embedding is 0."""
    rows = train(names, tmp_path, rng, lora_rank=3)
    for row in rows:
        assert_exact_or_refused(row)
    assert [row["name"] for row in rows if "refused" in row] == ["mamba"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_is_trained_exactly_or_refused_in_a_sentence(name, tmp_path, rng):
    try:
        (row,) = train([name], tmp_path, rng)
    except Untried as error:
        pytest.skip(str(error).splitlines()[0])
    assert_exact_or_refused(row)


def main(table, *given):
    names, settings = [word for word in given if "=" not in word], dict(word.split("=") for word in given if "=" in word)
    settings = {name: json.loads(value) for name, value in settings.items()}
    names, size = names or list(ZOO), TOGETHER
    with open(table, "a", buffering=1) as file:
        while names:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rows = train(names[:size], Path(folder), np.random.default_rng(0), **settings)
                except Exception:
                    if size > 1:
                        size = 1  # until the one is found that cannot be tried
                        continue
                    rows = [{"name": names[0], "untried": traceback.format_exc()[-600:]}]
                    size = TOGETHER
            refused = next((i for i, row in enumerate(rows) if "refused" in row), len(rows))  # it ended the ranks
            for row in rows[: refused + 1]:
                print(json.dumps(row), file=file)
                print(json.dumps(row)[:250], flush=True)
            names = names[len(rows[: refused + 1]) :]


if __name__ == "__main__":
    main(*sys.argv[1:])
