"""The cost of the journal per batch, of a checkpoint, and of resuming from one.

    python -m benchmarks.durability runs/models/SmolLM2-135M-Instruct [--ranks 2] [--rounds 5] [--folder FOLDER]

The journal's batch is a body of 512 sequences x 4,096 tokens with masks, advantages and logps, as a server sends it. Beside it
stand a plain write with fsync, and the decoding of the same body, which every trainer pays. The checkpoints are those of a run
of train.py; "going on" is the time from the start of the process to the wait for the first batch, against that of a fresh run.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wsft.rollouts.answers import decode
from wsft.rollouts.batch import AtroposBatchProcessor
from wsft.rollouts.journal import Journal


def make_body(sequences: int = 512, length: int = 4096) -> bytes:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 49_152, (sequences, length)).tolist()
    logps = rng.normal(-1, 1, (sequences, length)).round(6).tolist()
    group = {"tokens": tokens, "masks": tokens, "scores": [0.0] * sequences, "advantages": logps, "inference_logprobs": logps}
    return json.dumps({"batch": [group]}, separators=(",", ":")).encode()


def timed(action: object, *args: object) -> float:
    start = time.perf_counter()
    action(*args)
    return time.perf_counter() - start


def write_plainly(path: Path, body: bytes) -> None:
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def measure_journal(folder: Path, rounds: int) -> dict[str, list[float]]:
    body, journal, processor = make_body(), Journal(folder / "journal"), AtroposBatchProcessor(pad_token_id=0)
    print(f"a body of {len(body) / 2**20:.0f} MiB", file=sys.stderr)
    times = {"append and fsync": [], "plain write and fsync": [], "decode": []}
    for i in range(rounds):
        times["append and fsync"].append(timed(journal.append, i, body))
        times["plain write and fsync"].append(timed(write_plainly, folder / "plain", body))
        times["decode"].append(timed(lambda: processor.decode(decode(body))))
        journal.prune(i + 1)
    return times


def run(
    args: argparse.Namespace, folder: Path, steps: int, resume: bool, background: bool
) -> tuple[float, list[float], list[tuple[float, float]]]:
    """Seconds to the first wait for a batch; seconds of each step; of each checkpoint but the last, at whose end nothing is
    trained, the seconds until it was complete, and those for which training waited."""
    command = ["deepspeed", "--num_gpus", str(args.ranks), "--no_local_rank", "--log_level", "error", "train.py"]
    command += ["--deepspeed=ds_configs/zero3_cpu.json", f"--model_name={args.model}", f"--data={folder / 'groups.jsonl'}"]
    command += [f"--output_dir={folder / 'run'}", "--batch_size=4", "--save_steps=1", f"--training_steps={steps}"]
    command += ["--gradient_checkpointing=false", f"--resume={resume}", f"--background_save={background}"]
    start, waited, saves = time.perf_counter(), 0.0, []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        waited = waited or (time.perf_counter() - start if line.startswith("waiting for a batch") else 0.0)
        found = re.search(r"^saved .* in ([\d.]+) s, of which training waited ([\d.]+) s;", line)
        saves += [(float(found[1]), float(found[2]))] if found else []
    if process.wait():
        sys.exit("the run failed")
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return waited, [m["time/step"] for m in metrics], saves[:-1]


def measure_checkpoints(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    writing = ["-m", "wsft.environment", "--tokenizer", args.model, "--pattern", "mixed", "--groups", "16", "--group_size", "4"]
    subprocess.run([sys.executable, *writing, "--output", folder / "groups.jsonl"], check=True, stdout=subprocess.DEVNULL)
    times = {"start afresh": [], "start with --resume": [], "a step": [], "a checkpoint": []}
    times |= {"one in the background": [], "training waits for it": []}
    for _ in range(max(1, args.rounds // 2)):
        shutil.rmtree(folder / "run", ignore_errors=True)
        afresh, _, saves = run(args, folder, 3, resume=False, background=False)
        resumed, steps, in_background = run(args, folder, 6, resume=True, background=True)
        times["start afresh"].append(afresh)
        times["start with --resume"].append(resumed)
        times["a step"] += steps
        times["a checkpoint"] += [spent for spent, _ in saves]
        times["one in the background"] += [spent for spent, _ in in_background]
        times["training waits for it"] += [waited for _, waited in in_background]
    size = sum(path.stat().st_size for path in (folder / "run" / "checkpoints" / "step_6").rglob("*") if path.is_file())
    print(f"a checkpoint of {size / 2**30:.2f} GiB", file=sys.stderr)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of the model whose checkpoints are measured")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured; a temporary one if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        times = measure_journal(Path(folder), args.rounds) | measure_checkpoints(args, Path(folder))
    for name, values in times.items():
        print(f"{name:24}{statistics.median(values):8.2f} s ({min(values):.2f} to {max(values):.2f}, {len(values)} times)")
    print(json.dumps(times))


if __name__ == "__main__":
    main()
