"""Scaling of time and peak memory: of the head, and of whole steps at one micro_batch_tokens.

    python -m benchmarks.growth [--rounds 3] [--rollouts 64] [--micro_batch_tokens 2048] [--out runs/growth.json]

The head of SmolLM2-135M with 1 to 8 times the tokens, and with a vocabulary 4 times as large. Steps of a Llama of 17 million
parameters (random weights, 6 layers) on 1 to 8 times the rollouts, by ZeRO-3 on one rank and on two; the first step of a run is
not counted. The ranks share the cores that this process may use.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.step import make_groups, run_ranks

TIMES = (1, 2, 4, 8)
TOKENS, VOCAB = 2048, 49_152  # of the head, times 1
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 16_384}
STEPS = 3  # without the first


def measure_head(times: int, vocab: int) -> dict[str, float]:
    shape = [f"--tokens={times * TOKENS}", f"--vocab={vocab * VOCAB}", "--masked=0", "--hidden=576", "--dtype=float32"]
    child = subprocess.run([sys.executable, "-m", "benchmarks.head", "--only=wsft", *shape], capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr)
    return json.loads(child.stdout.split("\n")[-2])


def make_model(folder: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def measure_step(times: int, ranks: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Time and peak of a run as it is launched; and the peak of one whose malloc gives back at once what is freed."""
    groups = make_groups(args.rollouts, 8, SHAPE["vocab_size"]) * times
    (folder / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups * (STEPS + 1)))
    flags = {"model_name": folder / "model", "data": folder / "groups.jsonl", "output_dir": folder / "run"}
    flags |= {"batch_size": args.rollouts * times, "micro_batch_tokens": args.micro_batch_tokens}
    flags |= {"learning_rate": 1e-5, "overwrite_output_dir": "true"}

    def run(steps: int, **options: int) -> list[dict[str, float]]:
        command = ["train.py", *(f"--{name}={value}" for name, value in flags.items()), f"--training_steps={steps + 1}"]
        run_ranks(command, ranks, folder / "log", **options)
        return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()][1:]

    steps = run(STEPS)
    found = {"seconds": statistics.median(step["time/step"] for step in steps), "kept_gib": steps[-1]["memory/peak_gib"]}
    found |= {"micro_batches": steps[-1]["plan/micro_batches"], "tokens": steps[-1]["tokens/total"]}
    return found | {"gib": run(1, keep=2**20)[-1]["memory/peak_gib"]}


def tell(title: str, rows: dict[str, tuple[float, list[dict[str, float]]]]) -> None:
    """Each row with how much the work grew from the first one's."""
    print(title)
    (_, base), *_ = rows.values()
    one = statistics.median(found["seconds"] for found in base)
    for name, (work, found) in rows.items():
        seconds, gib = [f["seconds"] for f in found], statistics.median(f["gib"] for f in found)
        median = statistics.median(seconds)
        spread = f"{median:7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        kept = max(f.get("kept_gib", 0.0) for f in found)
        peak = f"peak {gib:.2f} GiB" + (f", {kept:.2f} with what malloc keeps" if kept else "")
        print(f"  {name:32} {spread}  {median / one / work:.2f} x the time per unit of work  {peak}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    heads = {f"{TOKENS * n} tokens": (n, n, 1) for n in TIMES} | {f"{TOKENS} tokens, V = {4 * VOCAB}": (4, 1, 4)}
    steps = {f"{ranks} rank(s), {args.rollouts * n} rollouts": (n, n, ranks) for ranks in (1, 2) for n in TIMES}
    heads = {name: (work, [], shape) for name, (work, *shape) in heads.items()}
    steps = {name: (work, [], shape) for name, (work, *shape) in steps.items()}
    with tempfile.TemporaryDirectory() as path:
        make_model(Path(path) / "model", args.tokenizer)
        for _ in range(args.rounds):
            for _, found, shape in heads.values():
                found.append(measure_head(*shape))
            for _, found, shape in steps.values():
                found.append(measure_step(*shape, args, Path(path)))
    heads, steps = ({name: row[:2] for name, row in rows.items()} for rows in (heads, steps))
    tell("the head, float32, H = 576", heads)
    tell(f"a step, {args.micro_batch_tokens} tokens in a micro-batch", steps)
    if args.out:
        args.out.write_text(json.dumps({"head": heads, "step": steps}, indent=1))


if __name__ == "__main__":
    main()
