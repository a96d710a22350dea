"""The host's work for a step: planning what each rank runs, and messages between ranks.

    python -m benchmarks.host [--rounds 3]

Batches of RL-shaped rollouts: groups of 16 with a prompt in common of 200 to 1,000 tokens, completions of 100 to 7,000
(lognormal, median 900), packed into rows of 8,192 tokens. `thread_ms` is what one rank's thread does for a batch once it is
there: metrics, advantages, assignment to ranks, its own rows and loss terms. `critical_ms` is what the rank itself does to get
the plan of the next step, which is ready. Both of one rank of many, in one process with one thread. Messages are those of a run
of two ranks over gloo, per step, besides DeepSpeed's own: small ones that the step waits for, and those of its thread, which
carry the batch.

The last line is JSON.
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from wsft import WeightedSFTConfig
from wsft.distributed.world import free_port
from wsft.loss.advantages import Override, Shaping
from wsft.model.flops import StepFlops
from wsft.planning import Planner, RowSettings
from wsft.rollouts.batch import Batch
from wsft.rollouts.decoder import REASONS
from wsft.rollouts.feed import Feed

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, looks for another and warns
ROOT = Path(__file__).resolve().parent.parent
SIZES = [(128, 8), (1024, 32), (4096, 32)]  # rollouts, ranks
GROUP, VOCAB = 16, 150_000
FLOPS = StepFlops(39e9, 6.0 * 28 * 3584, 3.3e9)  # of a Qwen2.5-7B
WORDS, STEPS = 96, 6  # of the run whose messages are counted


class Messages:
    """For --callbacks: writes to $WSFT_MESSAGES, for each step, the numbers of messages on the channels of rank 0: that of the
    ranks, that of their threads."""

    def __init__(self):
        self.counts, self.file = {}, Path(os.environ["WSFT_MESSAGES"])
        for name in ("all_gather", "all_reduce", "broadcast", "barrier"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function):
        def call(*args, group=None, **kwargs):
            self.counts[group] = self.counts.get(group, 0) + 1
            return function(*args, group=group, **kwargs)

        return call

    def on_step(self, trainer, metrics):
        if trainer.world.rank == 0:
            control, data = (self.counts.pop(x.group, 0) for x in (trainer.world._control, trainer.feed._channel))
            with self.file.open("a") as file:
                print(json.dumps([control, data]), file=file)


def make_batch(rollouts: int) -> Batch:
    rng = np.random.default_rng(0)
    rows, masks = [], []
    for _ in range(rollouts // GROUP):
        prompt = rng.integers(VOCAB, size=rng.integers(200, 1000))
        for n in rng.lognormal(np.log(900), 0.8, GROUP).clip(100, 7000).astype(int):
            rows.append(np.concatenate([prompt, rng.integers(VOCAB, size=n)]))
            masks.append(np.arange(len(rows[-1])) >= len(prompt))
    tokens, loss_mask = np.concatenate(rows), np.concatenate(masks)
    R, N, none = len(rows), len(tokens), np.zeros(0)
    return Batch(
        tokens=tokens,
        loss_mask=loss_mask,
        advantages=np.where(loss_mask, np.repeat(rng.normal(size=R), [len(row) for row in rows]), 0.0),
        behavior_logp=rng.normal(-1, 0.1, N).astype(np.float32),
        ref_logp=none.astype(np.float32),
        weight_versions=np.zeros(N),
        teacher_sizes=none.astype(np.int64),
        teacher_ids=none.astype(np.int64),
        teacher_logp=none.astype(np.float32),
        lengths=np.array([len(row) for row in rows]),
        overrides=np.full(R, Override.NONE, dtype=np.int64),
        temperatures=np.ones(R),
        scores=rng.integers(2, size=R).astype(np.float64),
        env_ids=np.zeros(R, dtype=np.int64),
        groups=np.arange(R) // GROUP,
        counts=np.zeros(len(REASONS), dtype=np.int64),
    )


class OneRank:
    """What a feed asks of the world, without other ranks."""

    def all_gather_ints(self, *values: int) -> list[list[int]]:
        return [list(values)]

    def new_channel(self) -> "OneRank":
        return self

    def broadcast(self, message: np.ndarray, size: int, source: int) -> np.ndarray:
        return message


def milliseconds(rollouts: int, num_ranks: int, rounds: int) -> tuple[float, float]:
    """Medians: critical, thread."""
    torch.set_num_threads(1)
    config = WeightedSFTConfig(model_name="none", training_steps=rounds, objective="ppo_clip", max_token_len=8192)
    rows = RowSettings(packs=True, shares=True, micro_batch_tokens=8192, shortest=2, pad_token_id=0)
    planner = Planner(config, rows, FLOPS, Shaping("batch", None, 1.0), False, 0, num_ranks, pins=False)
    batch, critical, thread = make_batch(rollouts), [], []
    source = SimpleNamespace(take=lambda *_: (batch, {}), possibly_lost=0, journal_bytes=0, state="")

    def prepare(batch, step):
        start = time.perf_counter()
        planned = planner(batch, step)
        thread.append(time.perf_counter() - start)
        return planned

    feed = Feed(config, source, prepare, OneRank(), SimpleNamespace(code=0), {}, 0)
    for step in range(rounds):
        if step:
            feed._futures[step].result()  # it came while the step before trained
        start = time.perf_counter()
        feed.next(step, waiting=lambda state: None)
        critical.append(time.perf_counter() - start)
    return 1e3 * statistics.median(critical[1:]), 1e3 * statistics.median(thread)


def count_messages() -> tuple[int, int]:
    """Of a step of two ranks, the most: of the ranks, of their threads."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape)).save_pretrained(f"{folder}/model")
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(f"{folder}/model")
        group = {"tokens": [[1, 2, 3], [1, 2, 4]], "masks": [[-100, 2, 3], [-100, 2, 4]], "scores": [1.0, 0.0]}
        Path(folder, "data.jsonl").write_text((json.dumps(group) + "\n") * STEPS)
        flags = {"model_name": f"{folder}/model", "data": f"{folder}/data.jsonl", "output_dir": f"{folder}/run"}
        flags |= {"batch_size": 2, "training_steps": STEPS, "device": "cpu", "callbacks": "benchmarks.host:Messages"}
        env = os.environ | {"WSFT_MESSAGES": f"{folder}/messages", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
        command += ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        steps = [json.loads(line) for line in Path(folder, "messages").read_text().splitlines()]
    return tuple(max(x) for x in zip(*steps[1:], strict=True))  # the first looks for parameters without a gradient, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {"critical_ms": {}, "thread_ms": {}}
    for rollouts, num_ranks in SIZES:
        critical, thread = milliseconds(rollouts, num_ranks, args.rounds)
        print(
            f"{rollouts:5} rollouts on {num_ranks} ranks: {critical:.2f} ms on the step's path, {thread:.0f} ms in the thread"
        )
        found["critical_ms"][f"{rollouts} on {num_ranks}"] = round(critical, 3)
        found["thread_ms"][f"{rollouts} on {num_ranks}"] = round(thread, 1)
    found["collectives_per_step"], found["messages_of_the_thread"] = count_messages()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
