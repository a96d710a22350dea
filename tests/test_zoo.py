"""Every causal language model that transformers has: trained by two ranks under ZeRO-3 as a dense float64 reference trains it,
or refused in a sentence, by run and dry run alike. CI has one of each cause by which a model was not.

    python tests/test_zoo.py TABLE.jsonl [NAMES...]     # a line for each: error, layout, what was said
"""

import json
import math
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_group, run_ranks, run_script, write_groups
from zoo import VOCAB, ZOO, make, reading

LEARNING_RATE, BATCH_SIZE, RANKS = 0.1, 12, 2
EXACT = 2e-5
FLAGS = dict(
    batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, max_grad_norm=0, micro_batch_tokens=128, max_token_len=64, device="cpu",
    trust_remote_code=True, step_timeout=60,
)  # fmt: skip
DS = {
    "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
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


def reference(folder, batches, dtype):
    """Parameters after a step of SGD on each batch: one rollout at a time, dense, with the code of transformers alone."""
    model = reading(folder, dtype)
    model.eval()
    for groups in batches:
        rows = [row for group in groups for row in zip(group["tokens"], group["masks"], group["advantages"], strict=True)]
        total = sum(mask[t] != -100 for _, mask, _ in rows for t in range(1, len(mask)))
        model.zero_grad()
        for tokens, mask, advantages in rows:
            logp = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
            trained = [t for t in range(1, len(tokens)) if mask[t] != -100]
            loss = -sum(advantages[t] * logp[t - 1, tokens[t]] for t in trained) / total
            loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= LEARNING_RATE * param.grad
    return dict(model.named_parameters())


def worst(found, wanted):
    """The largest relative error of a parameter, and its name."""
    errors = {
        name: ((found[name].double() - value.double()).norm() / value.double().norm()).item() for name, value in wanted.items()
    }
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[name], name


def train(name, folder, rng, **changes):
    """What becomes of the model: {"error": relative to float64, "float32": that of a float32 reference, "layout", "shares"}, or
    {"refused": the sentence}; "dry" is what the dry run said, where it refused."""
    make(name, folder / "model")
    made = batches(rng)
    wanted = reference(folder / "model", made, torch.float64)
    data = write_groups(folder / "data.jsonl", [group for groups in made for group in groups])
    (folder / "ds.json").write_text(json.dumps(DS))
    settings = FLAGS | dict(model_name=folder / "model", data=data, deepspeed=folder / "ds.json", training_steps=len(made))
    flags = [f"--{key}={value}" for key, value in (settings | changes).items()]
    results = run_ranks(["train.py", *flags, f"--output_dir={folder / 'run'}"], RANKS, timeout=120)
    said, saved_as = results[0][1], json.loads((folder / "model" / "config.json").read_text())["architectures"][0]
    row = {"name": name, "class": saved_as}
    code, dry = run_script("train.py", *flags, f"--output_dir={folder / 'dry'}", "--dry_run", f"--ranks={RANKS}")
    if code:
        row["dry"] = sentence(dry)
    if any(code for code, _ in results):
        return row | {"refused": sentence(said)}
    layouts = {"packed": "sequences are packed", "padded": "are padded instead", "alone": "each sequence is one"}
    row["layout"] = next((layout for layout, words in layouts.items() if words in said), "padded")
    row["shares"] = "share a piece" in said
    found = {key: p.detach() for key, p in reading(folder / "run" / "final", torch.float32).named_parameters()}
    row["error"], row["worst"] = worst(found, wanted)
    if row["error"] > EXACT:
        row["float32"] = worst(reference(folder / "model", made, torch.float32), wanted)[0]
    return row


def sentence(said):
    """The last thing said, if it is a sentence and no traceback."""
    lines = [line for line in said.splitlines() if line.strip()]
    return "Traceback: " + lines[-1] if "Traceback" in said else lines[-1]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_it_is_trained_exactly_or_refused_in_a_sentence(name, tmp_path, rng):
    row = train(name, tmp_path, rng)
    if "refused" in row:
        assert row["refused"] == row.get("dry") and not row["refused"].startswith("Traceback"), row
    else:
        assert "dry" not in row and row["error"] <= max(EXACT, 5 * row.get("float32", 0)), row


def main(table, *names):
    with open(table, "a", buffering=1) as file:
        for name in names or ZOO:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row = train(name, Path(folder), np.random.default_rng(0))
                except Exception:
                    row = {"name": name, "untried": traceback.format_exc()[-600:]}
            print(json.dumps(row), file=file)
            print(json.dumps(row)[:250], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
