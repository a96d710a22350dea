"""A whole optimizer step beside TRL's SFTTrainer: the same rollouts, model, DeepSpeed JSON and ranks, in turn in one call.

    python -m benchmarks.step runs/models/SmolLM2-135M-Instruct [--rollouts 128] [--steps 2] [--rounds 2] [--ranks 2]

Rollouts have lognormal lengths (median 120, 32 to 512 tokens); 40 % of each is prompt, which carries no loss, and a fifth of
them has advantage 0. TRL has no advantages: it trains all of them alike, at its defaults, with 8 sequences in a micro-batch, or
with its packing. Both compute in the precision that the device has, and checkpoint activations. A step is what each trainer
takes for all rollouts, waiting for data included; the first of a run is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from wsft.world import free_port

ROOT = Path(__file__).resolve().parent.parent
DS = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
}
PER_DEVICE = 8
PEERS = ("wsft", "trl", "trl packing")


def make_groups(rollouts: int, vocab: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    groups = []
    for n in rng.lognormal(np.log(120), 0.7, rollouts).clip(32, 512).astype(int):
        tokens, prompt = rng.integers(100, vocab, n).tolist(), int(0.4 * n)
        advantage = 0.0 if rng.random() < 0.2 else float(rng.normal())
        groups.append({"tokens": [tokens], "masks": [[-100] * prompt + tokens[prompt:]], "advantages": [[advantage] * int(n)]})
    return groups


def run_ranks(command: list[str], ranks: int) -> None:
    """The Python command once per rank, as a launcher would; what it says goes to stderr."""
    env = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"LOCAL_WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_DEEPSPEED": "true"}
    env |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    each = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [subprocess.Popen([sys.executable, *command], cwd=ROOT, env=own, stdout=sys.stderr) for own in each]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"{' '.join(command[:3])} ended with {codes}")


def wsft(args: argparse.Namespace, folder: Path) -> list[float]:
    flags = {
        "model_name": args.model, "data": folder / "groups.jsonl", "deepspeed": folder / "ds.json",
        "output_dir": folder / "run",
        "batch_size": args.rollouts, "training_steps": args.steps + 1, "learning_rate": 1e-5, "max_grad_norm": 0,
        "micro_batch_tokens": args.micro_batch_tokens, "overwrite_output_dir": "true",
    }  # fmt: skip
    run_ranks(["train.py", *(f"--{name}={value}" for name, value in flags.items())], args.ranks)
    return [json.loads(line)["time/step"] for line in (folder / "run" / "metrics.jsonl").open()][1:]


def trl(args: argparse.Namespace, folder: Path, packing: bool = False) -> list[float]:
    out = folder / "trl.json"
    told = {"model": args.model, "data": str(folder / "groups.jsonl"), "out": str(out), "rollouts": args.rollouts}
    told |= {"steps": args.steps + 1, "ranks": args.ranks, "packing": packing}
    run_ranks(["-m", "benchmarks.step", "--trl", json.dumps(told)], args.ranks)
    return json.loads(out.read_text())[1:]


def train_with_trl(model: str, data: str, out: str, rollouts: int, steps: int, ranks: int, packing: bool) -> None:
    """One rank of TRL's run; rank 0 writes the seconds of each step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed("gloo")
    records = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows = [{"input_ids": r["tokens"][0], "completion_mask": [int(m != -100) for m in r["masks"][0]]} for r in records]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]

    # packed rows hold about as many tokens as PER_DEVICE sequences do; a step is again all rollouts
    tokens, length = sum(len(r["input_ids"]) for r in rows[:rollouts]), 512
    in_a_step = -(-tokens // length) if packing else rollouts
    per_device = 2 if packing else PER_DEVICE
    config = SFTConfig(
        output_dir=str(Path(out).parent / "trl"), max_steps=steps, per_device_train_batch_size=per_device, max_length=length,
        gradient_accumulation_steps=max(1, round(in_a_step / per_device / ranks)), packing=packing, completion_only_loss=True,
        deepspeed=DS | {"bf16": {"enabled": not cpu}, "gradient_accumulation_steps": "auto",
                        "train_micro_batch_size_per_gpu": "auto"},
        bf16=not cpu, use_cpu=cpu, gradient_checkpointing=True, report_to="none", logging_steps=1, save_strategy="no",
        max_grad_norm=0, learning_rate=1e-5, dataloader_num_workers=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
    trainer.train()
    if trainer.is_world_process_zero():
        Path(out).write_text(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trl", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        train_with_trl(**args.trl)
        return
    groups = make_groups(args.rollouts, 49_000)
    tokens = sum(len(group["tokens"][0]) for group in groups)
    print(f"{args.rollouts} rollouts, {tokens} tokens a step, {args.ranks} ranks")
    found: dict[str, list[float]] = {name: [] for name in args.peers.split(",")}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups * (args.steps + 1)))
        (folder / "ds.json").write_text(json.dumps(DS))
        for _ in range(args.rounds):
            for name, seconds in found.items():
                seconds += wsft(args, folder) if name == "wsft" else trl(args, folder, name == "trl packing")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        ratio = f"  wsft is {median / statistics.median(found['wsft']):.2f} x as fast" if "wsft" in found else ""
        spread = f"{median:7.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"{name:12} {spread}  {tokens / median:6.0f} tokens/s{ratio}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
