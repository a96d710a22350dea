"""Runs fed by a real Atropos server, that meet the same batches in the same order whatever happens to them meanwhile."""

import json
import math
import threading
import time
from contextlib import contextmanager

import requests
import torch
from atropos_server import atropos_server, post_group, register_env
from conftest import make_group, run_ranks
from safetensors.torch import load_file

from wsft.checkpoint import all_in
from wsft.config import UserError
from wsft.journal import Journal

STEPS = 12
LOST_S = 15  # after which what was in the server's queue, and neither is there nor arrived, was lost with the server


def make_groups(rng):
    return [make_group(rng, rng.integers(4, 16, 4).tolist()) for _ in range(STEPS)]


def make_settings(model, tmp_path):
    ds = tmp_path / "ds.json"
    adam = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "fused": True}}
    ds.write_text(json.dumps({"optimizer": adam, "zero_optimization": {"stage": 3}}))
    return {
        "model_name": model, "deepspeed": ds, "batch_size": 4, "device": "cpu", "learning_rate": 1e-2, "save_steps": 3,
        "training_steps": STEPS, "lr_scheduler": "linear", "warmup_steps": 2, "step_timeout": 120, "resume": True,
    }  # fmt: skip


class Feeder(threading.Thread):
    """Posts a group when all before it are safe in the run's journals, and again, when told that the run was killed, if it
    never came there. So the run meets the same batches in the same order, however often it is killed."""

    def __init__(self, url, folder, groups, parts=1):
        super().__init__(daemon=True)
        self.url, self.folder, self.parts, self.posted, self.over = url, folder, parts, {}, threading.Event()
        self.lock = threading.Lock()
        self.pieces = [piece for group in groups for piece in split(group, parts)]

    def run(self):
        env_id = None
        while not self.over.wait(0.05):
            try:
                env_id = env_id or register_env(self.url, 4 // self.parts, patience=0)
                with self.lock:
                    self.post_what_is_next(env_id)
            except (TimeoutError, requests.RequestException, KeyError):
                env_id = None  # the server is down, or new and without a trainer
            except UserError:
                continue  # the journal was pruned while it was read

    def post_what_is_next(self, env_id):
        number = self.arrived()
        if number >= len(self.pieces):
            return
        if self.queued():
            self.posted[number] = time.monotonic()  # not lost yet: a run may take its time to start
        elif time.monotonic() - self.posted.get(number, -math.inf) > LOST_S:
            post_group(self.url, env_id, self.pieces[number])
            self.posted[number] = time.monotonic()

    def the_run_is_dead(self):
        """To be called while no trainer runs: what it took from the server and did not keep is posted again."""
        with self.lock:
            if not self.queued():
                self.posted.clear()

    def queued(self):
        return requests.get(f"{self.url}/status", timeout=10).json()["queue_size"]

    def arrived(self):
        saved = max((c.facts["feed"]["batches"] for c in all_in(self.folder / "checkpoints")), default=0)
        ranks = [self.folder / "journal" / f"{rank}_of_{self.parts}" for rank in range(self.parts)]
        journals = [Journal(path, read_only=True).numbers for path in ranks]
        return sum(max(saved, numbers[-1] + 1 if numbers else 0) for numbers in journals)


def split(group, parts):
    """The group as `parts` groups of fewer sequences."""
    rows = ("tokens", "masks", "scores", "advantages")
    size = len(group["tokens"]) // parts
    return [group | {name: group[name][i * size : (i + 1) * size] for name in rows} for i in range(parts)]


@contextmanager
def fed(folder, groups, parts=1):
    """A real server, and the groups posted to it one after the other; each in `parts` for ranks that fetch their own."""
    with atropos_server() as server:
        feeder = Feeder(server.url, folder, groups, parts)
        feeder.start()
        try:
            yield server, feeder
        finally:
            feeder.over.set()
            feeder.join()


def flags(settings, **changes):
    return [f"--{name}={value}" for name, value in (settings | changes).items()]


def train(settings, num_ranks=2, script="train.py", codes=(0,), during=None, **changes):
    """A run of real ranks: what they said. Every exit code must be among `codes`."""
    results = run_ranks([*script.split(), *flags(settings, **changes)], num_ranks, during=during)
    said = "\n".join(output for _, output in results)
    assert all(code in codes for code, _ in results), f"exit codes {[code for code, _ in results]}:\n{said}"
    return said


def untouched(settings, groups, folder):
    with fed(folder, groups) as (server, _):
        train(settings, atropos_url=server.url, output_dir=folder)
    return folder


def state_of(folder):
    return json.loads((folder / "state.json").read_text())


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def wait_until(truth, seconds=60):
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def assert_bitwise_equal(folder, wanted):
    ours, theirs = (load_file(f / "final" / "model.safetensors") for f in (folder, wanted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps, expected = steps_of(folder), steps_of(wanted)
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "tokens/total", "tokens/trained", "learning_rate", "entropy"):
        assert [s[name] for s in steps] == [s[name] for s in expected], name
    assert state_of(folder)["state"] == "finished"
