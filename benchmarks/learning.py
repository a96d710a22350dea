"""A tiny task that learns, off-policy on purpose: objectives and corrections side by side, through train.py and a real Atropos
server.

    python -m benchmarks.learning [--seeds 5] [--steps 96] [--objectives weighted_sft,importance_sampling,ppo_clip,...]
    python -m benchmarks.learning --windows_behind 0        # the control: the same on fresher data
    python -m benchmarks.learning --picture benchmarks/learning.png

The model is a random Llama (2 layers, hidden size 32, 32 words). A prompt is one word, a completion the next 12. Its reward is
the share of them that are one of the 4 words that follow the word before, in a circle: chance gives 1/8.

How stale the data is, is arranged: the batches of steps mK+1 to (m+1)K, K = 4, are sampled from the weights of step (m-1)K,
out of the checkpoint there. So a batch is 4 to 7 optimizer steps old (0 to 3 at the very start). One batch is posted when the
one before was taken: the server hands out the newest first, and two that wait would change places.

All have the same settings: 128 sequences a step in groups of 16, sampled at temperature 0.8, advantages from scores
(`group_norm`), AdamW (betas 0.9 and 0.95) at a constant 4e-3 in float32, gradients clipped at norm 1. What differs is in
OBJECTIVES. A run depends on its seed alone: that of the model, the prompts and the samples.

What is drawn is the reward of the checkpoints, not of the batches: the mean over the 512 completions sampled from each.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from wsft.distributed.deepspeed_files import saved_parameters
from wsft.distributed.world import free_port
from wsft.run.checkpoint import DEEPSPEED, METADATA, Checkpoint

ROOT = Path(__file__).resolve().parent.parent
HIGHER = {"eps_low": 0.2, "eps_high": 0.28}
OBJECTIVES = {  # name -> settings
    "weighted_sft": {},
    "importance_sampling": {"objective": "importance_sampling", "objective_args": {"cap": 2.0}},
    "ppo_clip": {"objective": "ppo_clip", "objective_args": HIGHER},
    "cispo": {"objective": "cispo"},
    "dppo": {"objective": "dppo"},
    "ipo": {"objective": "ipo"},
    "sapo": {"objective": "sapo"},
    "gspo": {"objective": "gspo", "objective_args": HIGHER},
    "gmpo": {"objective": "gmpo"},
    "icepop": {"icepop": [0.5, 2.0]},
    "token mask": {"mismatch_mask": [0.5, 2.0]},
    "geometric mask": {"sequence_mask": {"geometric": [0.7, 1.4]}},
    "off-policy mask": {"off_policy_mask": 0.1},
    "cap and off-policy mask": {"mismatch_cap": 2.0, "off_policy_mask": 0.1},
    "max_staleness 5": {"max_staleness": 5},
}
DRAWN = ("weighted_sft", "importance_sampling", "ppo_clip")  # by default
TARGET, BY_STEP = 0.8, 80  # importance_sampling and ppo_clip reach this reward by that step

WORDS, FOLLOWERS = 32, 4
COMPLETION, TEMPERATURE = 12, 0.8
BATCH, GROUP = 128, 16
WINDOW = 4  # steps between two checkpoints; what K is above
LEARNING_RATE = 4e-3
ADAM = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "torch_adam": True}}

PATIENCE_S = 300.0  # for whatever the server and the trainer do between two looks at them
COLOURS = ("#c1432e", "#2166ac", "#3f8f4f", "#e08e2b", "#7b4fa3", "#8c5a3c", "#d070b0", "#666666", "#1fa3b3")


@dataclass(frozen=True)
class Plan:
    """One run."""

    objective: str
    seed: int
    steps: int
    folder: Path
    windows_behind: int = 1
    learning_rate: float = LEARNING_RATE

    def sampled_at(self, window: int) -> int:
        """The step whose weights sample what the window trains on."""
        return max(0, window - self.windows_behind) * WINDOW

    def staleness(self, step: int) -> int:
        """How many optimizer steps were taken between the weights that sample the batch of this step (from 1) and it."""
        return step - 1 - self.sampled_at((step - 1) // WINDOW)


# -- the task ---------------------------------------------------------------------------------------------------------


def make_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=WORDS, **shape), dtype=torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    # no word is special: none ends a completion, and sequences of one length need no padding
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)


@torch.no_grad()
def sample(model: PreTrainedModel, sequences: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, 1 + COMPLETION] and the sampler's logp of each; 1.0, which says that there is none, for the prompt."""
    tokens = torch.randint(WORDS, (sequences // GROUP, 1), generator=generator).repeat_interleave(GROUP, 0)
    logps = torch.ones(sequences, 1)
    for _ in range(COMPLETION):
        logp_BV = (model(input_ids=tokens).logits[:, -1] / TEMPERATURE).log_softmax(-1)
        chosen = torch.multinomial(logp_BV.exp(), 1, generator=generator)
        tokens, logps = torch.cat([tokens, chosen], 1), torch.cat([logps, logp_BV.gather(1, chosen)], 1)
    return tokens, logps


def reward(tokens: torch.Tensor) -> torch.Tensor:
    """[B]: the share of a completion's words that follow the word before closely enough."""
    ahead = (tokens[:, 1:] - tokens[:, :-1]) % WORDS
    return ((ahead >= 1) & (ahead <= FOLLOWERS)).float().mean(1)


def groups_of(tokens: torch.Tensor, logps: torch.Tensor, step: int) -> Iterator[dict]:
    """Atropos records of sequences that the weights of `step` sampled."""
    fields = "advantages ref_logprobs messages overrides group_overrides images distill_token_ids distill_logprobs"
    for tokens_GT, logps_GT in zip(tokens.split(GROUP), logps.split(GROUP), strict=True):
        yield dict.fromkeys(fields.split()) | {
            "tokens": tokens_GT.tolist(),
            "masks": [[-100, *row] for row in tokens_GT[:, 1:].tolist()],
            "scores": reward(tokens_GT).tolist(),
            "inference_logprobs": logps_GT.tolist(),
            "generation_params": {"temperature": TEMPERATURE, "weight_version": step},
        }


# -- a run: server, trainer, environment ------------------------------------------------------------------------------


class Ended(Exception):
    """A process that should be at work is not, or does not get on."""


def wait_until(truth: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        over = process.poll() is not None or time.monotonic() > deadline  # looked at first: its last deed may be the truth
        if truth():
            return
        if over:
            raise Ended(f"exit code {process.poll()}, waited for {PATIENCE_S:.0f} s at most:\n{log.read_text()[-3000:]}")
        time.sleep(0.01)


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    # one thread each: more only get in each other's way, and sums keep their order on every machine
    alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=alone, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()  # asked first: DeepSpeed's ranks that are killed leave shared memory behind
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(method: str, url: str, body: object = None) -> dict:
    response = requests.request(method, url, json=body, timeout=60)
    response.raise_for_status()
    return response.json()


def answers(url: str) -> bool:
    try:
        return ask("GET", url) == {"message": "AtroposLib API"}
    except requests.ConnectionError:
        return False


class Environment:
    """Posts batches, each when the one before it was taken."""

    def __init__(self, url: str, trainer: subprocess.Popen, log: Path):
        self.url, self.trainer, self.log, self.env_id = url, trainer, log, None

    def register(self) -> bool:
        """Whether it is; not before the trainer asked for its first batch."""
        about = {"max_token_length": 64, "desired_name": "learning", "weight": 1.0, "group_size": GROUP}
        self.env_id = ask("POST", f"{self.url}/register-env", about).get("env_id")
        return self.env_id is not None

    def post(self, batch: list[dict]) -> None:
        if self.env_id is None:
            wait_until(self.register, self.trainer, self.log)
        wait_until(lambda: ask("GET", f"{self.url}/status")["queue_size"] == 0, self.trainer, self.log)
        ask("POST", f"{self.url}/scored_data_list", [group | {"env_id": self.env_id} for group in batch])


def load(model: PreTrainedModel, checkpoint: Path) -> None:
    saved = saved_parameters(Checkpoint.at(checkpoint).folder / DEEPSPEED)
    model.load_state_dict({name: value.contiguous() for name, value in saved.items()})


def act(plan: Plan, environment: Environment) -> list[tuple[int, float]]:
    """Sample window after window and post it; the last windows are not trained on, and only tell the reward of the last
    checkpoints. Returns (step, mean reward of what its weights sampled)."""
    policy, loaded, rewards = AutoModelForCausalLM.from_pretrained(plan.folder / "model").eval(), 0, {}
    for window in range(plan.steps // WINDOW + plan.windows_behind + 1):
        step = plan.sampled_at(window)
        if step != loaded:
            checkpoint = plan.folder / "run" / "checkpoints" / f"step_{step}"
            wait_until((checkpoint / METADATA).exists, environment.trainer, environment.log)
            load(policy, checkpoint)
            loaded = step
        generator = torch.Generator().manual_seed(plan.seed * 100_000 + window)
        tokens, logps = sample(policy, WINDOW * BATCH, generator)
        rewards.setdefault(step, []).append(reward(tokens).mean().item())
        if window * WINDOW < plan.steps:
            groups = list(groups_of(tokens, logps, step))
            for i in range(0, len(groups), BATCH // GROUP):
                environment.post(groups[i : i + BATCH // GROUP])
    return [(step, statistics.mean(found)) for step, found in rewards.items()]


def train_flags(plan: Plan, url: str) -> list[str]:
    settings = {
        "model_name": plan.folder / "model", "deepspeed": plan.folder / "ds.json", "device": "cpu", "seed": plan.seed,
        "atropos_url": url, "batch_size": BATCH, "max_token_len": 64, "gradient_checkpointing": False,
        "training_steps": plan.steps, "learning_rate": plan.learning_rate, "max_grad_norm": 1.0,
        **{name: x if isinstance(x, str) else json.dumps(x) for name, x in OBJECTIVES[plan.objective].items()},
        "output_dir": plan.folder / "run", "save_steps": WINDOW, "keep_checkpoints": 2 + plan.windows_behind,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


def learn(plan: Plan) -> dict:
    """One run, from its random model to its curve."""
    start = time.monotonic()
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, which transformers imports, looks for another and warns
    disable_progress_bar()
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    make_model(plan.folder / "model", plan.seed)
    # no bf16, not even where the machine has it: the curve should be the same everywhere
    (plan.folder / "ds.json").write_text(json.dumps({"optimizer": ADAM, "zero_optimization": {"stage": 3}}))
    port = free_port()
    url, server_log, log = f"http://127.0.0.1:{port}", plan.folder / "server.log", plan.folder / "train.log"
    serve = ["-m", "uvicorn", "atroposlib.api.server:app", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    with started(serve, server_log) as server, started(["train.py", *train_flags(plan, url)], log) as trainer:
        wait_until(lambda: answers(url), server, server_log)
        curve = act(plan, Environment(url, trainer, log))
        if trainer.wait(PATIENCE_S):
            raise Ended(f"train.py ended with {trainer.returncode}:\n{log.read_text()[-3000:]}")
    metrics = [json.loads(line) for line in (plan.folder / "run" / "metrics.jsonl").open()]
    shown = ("score/mean", "data/staleness", "ratio/mean", "ratio/max", "ratio/clipped", "kl/behavior_k3", "entropy")
    found = {"steps": [step for step, _ in curve], "reward": [mean for _, mean in curve], "seconds": time.monotonic() - start}
    return asdict(plan) | found | {name: [line[name] for line in metrics] for name in shown}


def learn_all(plans: list[Plan], parallel: int) -> Iterator[dict]:
    """The runs in processes of their own, so many at a time, in the order of the plans."""
    with ProcessPoolExecutor(parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(learn, plans)


# -- output -----------------------------------------------------------------------------------------------------


def first_reached(run: dict, target: float = TARGET) -> int | None:
    return next((step for step, mean in zip(run["steps"], run["reward"], strict=True) if mean >= target), None)


def lowest_after(run: dict) -> float | None:
    """The lowest reward behind the step at which the target was reached: whether it stays."""
    reached = first_reached(run)
    return None if reached is None else min(run["reward"][run["steps"].index(reached) :])


def spread(values: list[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "never"
    text = f"{statistics.median(found):{form}} ({min(found):{form}} to {max(found):{form}})"
    return text if len(found) == len(values) else f"{text}, {len(found)} of {len(values)}"


def tell(runs: dict[str, list[dict]], steps: int) -> None:
    print(f"{'':25}{f'reward at step {steps}':24}{f'{TARGET} reached at step':24}lowest reward from there on")
    for objective, found in runs.items():
        reached = spread([first_reached(run) for run in found], ".0f")
        last, lowest = spread([run["reward"][-1] for run in found], ".2f"), spread([lowest_after(r) for r in found], ".2f")
        print(f"{objective:25}{last:24}{reached:24}{lowest}")


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    objectives = [name for name in runs if name == "weighted_sft" or "objective" in OBJECTIVES[name]]
    corrections = [name for name in runs if name == "weighted_sft" or name not in objectives]
    panels = [names for names in (objectives, corrections) if set(names) - {"weighted_sft"}] or [objectives]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 3.6), sharey=True, squeeze=False)
    any_runs = next(iter(runs.values()))
    steps, stale = any_runs[0]["steps"], any_runs[0]["data/staleness"][2 * WINDOW :]  # behind the first windows it repeats
    age = f", on data {min(stale):.0f} to {max(stale):.0f} steps old" if stale else ""
    title = f"median and range of {len(any_runs)} seeds" if len(any_runs) > 1 else "one seed"
    for axes, names in zip(all_axes[0], panels, strict=True):
        for n, name in enumerate(names):
            colour, by_step = COLOURS[n % len(COLOURS)], list(zip(*(run["reward"] for run in runs[name]), strict=True))
            axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=colour, alpha=0.12, lw=0)
            axes.plot(steps, list(map(statistics.median, by_step)), color=colour, lw=1.6, label=name)
        axes.axhline(TARGET, color="0.6", lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.set(xlabel=f"optimizer step{age}", ylim=(0, 1.02), xlim=(0, steps[-1]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title=title, alignment="left", loc="lower right", fontsize=9, title_fontsize=9)
    all_axes[0][0].set_ylabel("reward of the policy")
    figure.tight_layout()
    figure.savefig(path, dpi=200)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=96, help=f"of a run; a multiple of {WINDOW}")
    parser.add_argument("--objectives", default=",".join(DRAWN), help=f"separated by commas, of {', '.join(OBJECTIVES)}; all")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each objective")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="folder of the runs and of learning.json")
    parser.add_argument("--picture", type=Path, help="output/learning.png if not given")
    parser.add_argument("--windows_behind", type=int, default=1, help=f"windows of {WINDOW} steps that the sampler lags behind")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--parallel", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="runs at a time")
    args = parser.parse_args()
    args.objectives = list(OBJECTIVES) if args.objectives == "all" else args.objectives.split(",")
    unknown = set(args.objectives) - OBJECTIVES.keys()
    if unknown or args.steps % WINDOW:
        parser.error(f"unknown objectives {unknown}" if unknown else f"--steps {args.steps} is no multiple of {WINDOW}")
    return args


def main() -> None:
    args = parse_args()
    output = args.output.resolve()
    plans = [
        Plan(objective, seed, args.steps, output / f"{objective}_{seed}", args.windows_behind, args.learning_rate)
        for seed in range(args.seeds)
        for objective in args.objectives
    ]
    start, runs = time.monotonic(), {objective: [] for objective in args.objectives}
    for run in learn_all(plans, args.parallel):
        runs[run["objective"]].append(run)
        last = f"reward {run['reward'][-1]:.2f}, {TARGET} at step {first_reached(run)}"
        print(f"{run['objective']}, seed {run['seed']}: {last}, {run['seconds']:.0f} s", file=sys.stderr)
    tell(runs, args.steps)
    print(f"{len(plans)} runs, {args.parallel} at a time, in {time.monotonic() - start:.0f} s")
    (output / "learning.json").write_text(json.dumps(runs, default=lambda path: path.name))
    draw(runs, args.picture or output / "learning.png")


if __name__ == "__main__":
    main()
