"""Learning from own samples (launch/loop.sh) by several objectives, by the update of Atropos's example trainer, and with
weights published every 1, 2 or 4 steps.

    VLLM_ENV=.venv-vllm bash -c 'source launch/common.sh; use_environment; make_vllm_environment
        start_vllm runs/models/SmolLM2-135M-Instruct 8001 vllm.log; wait' &
    python -m benchmarks.loop --vllm_port 8001 [--seeds 0 1 2] [--steps 16] [--only weighted_sft,every_2]

All runs share one vLLM server, which gets the base model before each. With weights published every K steps, K batches are
sampled with the same weights: they are 0 to K - 1 steps old. Runs are in runs/benchmark_loop/NAME_SEED; finished ones are not
run again. `python -m wsft.report runs/benchmark_loop/*` draws them; `--picture OUT` draws the rewards of the steps.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path("runs/benchmark_loop")
SAMPLING = ["--objective", "importance_sampling", "--objective_args", "{cap: 2.0}"]
PPO = ["--objective", "ppo_clip", "--objective_args", "{eps_low: 0.2, eps_high: 0.28}"]
RUNS = {
    "weighted_sft": [],
    "importance_sampling": SAMPLING,
    "ppo_clip": PPO,
    "gspo": ["--objective", "gspo"],
    "example_update": [],  # benchmarks/example_update.py
    "lora_16": ["--lora_rank", "16", "--learning_rate", "5e-4"],
    "every_2": ["--publish_steps", "2"],
    "every_4": ["--publish_steps", "4"],
    "every_4_importance_sampling": ["--publish_steps", "4", *SAMPLING],
    "every_4_ppo_clip": ["--publish_steps", "4", *PPO],
    "every_4_dppo": ["--publish_steps", "4", "--objective", "dppo"],
    "every_4_off_policy_mask": ["--publish_steps", "4", *SAMPLING, "--off_policy_mask", "0.05"],
}
LABELS = {
    "weighted_sft": "weights published every step",
    "every_4": "every 4 steps",
    "every_4_ppo_clip": "every 4 steps, with ppo_clip",
    "every_4_importance_sampling": "every 4 steps, with importance_sampling",
}
REACHED = 0.7  # mean reward of three steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_port", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--picture", type=Path, help="reward over rollouts, mean and range of the seeds")
    args = parser.parse_args()
    names = args.only.split(",")
    for seed in args.seeds:
        for name in names:
            run = FOLDER / f"{name}_{seed}"
            if not (run / "after").exists():
                variables = {"RUN": str(run), "SEED": str(seed), "STEPS": str(args.steps), "VLLM_PORT": args.vllm_port}
                if name == "example_update":
                    variables["TRAINER"] = "benchmarks/example_update.py"
                subprocess.run(["bash", "launch/loop.sh", *RUNS[name]], env=os.environ | variables, check=True)
    print(f"| | held-out reward after, by seed | rollouts until {REACHED} in three steps | seconds until then | staleness |")
    print("|---|---|---|---|---|")
    for name in names:
        runs = [FOLDER / f"{name}_{seed}" for seed in args.seeds]
        after = [json.loads((run / "after" / "metrics.json").read_text())["results"]["all"]["reward"] for run in runs]
        reached = [until_reached(run) for run in runs]
        stale = statistics.mean(line["data/staleness"] for run in runs for line in metrics_of(run))
        rollouts, seconds = (", ".join("not" if r is None else f"{r[i]:.0f}" for r in reached) for i in (0, 1))
        print(f"| {name} | {', '.join(f'{reward:.2f}' for reward in after)} | {rollouts} | {seconds} | {stale:.2f} |")
    if args.picture:
        draw({name: [metrics_of(FOLDER / f"{name}_{seed}") for seed in args.seeds] for name in names}, args.picture)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def until_reached(run: Path) -> tuple[int, float] | None:
    """Rollouts and seconds after the first step; None: not reached."""
    lines = metrics_of(run)
    for last in range(2, len(lines)):
        if statistics.mean(line["score/mean"] for line in lines[last - 2 : last + 1]) >= REACHED:
            done = lines[: last + 1]
            return sum(line["data/sequences"] for line in done), done[-1]["time/at"] - done[0]["time/at"]
    return None


def draw(runs: dict[str, list[list[dict]]], path: Path) -> None:
    figure = Figure(figsize=(7, 3.4), dpi=200)
    axes = figure.add_subplot()
    for name, seeds in runs.items():
        rollouts = np.cumsum([line["data/sequences"] for line in seeds[0]])
        rewards = np.array([[line["score/mean"] for line in lines] for lines in seeds])
        (line,) = axes.plot(rollouts, rewards.mean(0), lw=1.6, label=LABELS.get(name, name))
        axes.fill_between(rollouts, rewards.min(0), rewards.max(0), color=line.get_color(), alpha=0.12, lw=0)
    axes.set(xlabel="rollouts", ylabel="reward of the model's own answers", ylim=(0, 1.02), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
