"""Runs fed by a real Atropos server with the same batches in the same order, whatever happens to the run or the server."""

import contextlib
import json
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import requests
import torch
from atropos_server import atropos_server, post_group, register_env
from conftest import make_group, run_ranks
from safetensors.torch import load_file

from wsft.errors import UserError
from wsft.rollouts.journal import Journal
from wsft.run.checkpoint import all_in

STEPS = 12
PATIENCE_S = 300  # for events that come at once on an idle machine: costs time only if one never comes


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
    """Posts a group once all before it are in the run's journals and `release` allows it. So a run gets the same batches in
    the same order, whatever happens to it, and waits, without ending, where a test acts on it."""

    def __init__(self, url, folder, groups, parts=1, released=None):
        super().__init__(daemon=True)
        self.url, self.folder, self.parts, self.over = url, folder, parts, threading.Event()
        self.pieces = [piece for group in groups for piece in split(group, parts)]
        self.released = len(groups) if released is None else released
        self.posted, self.env_id, self.lock = 0, None, threading.Lock()

    def release(self, groups):
        """Let the run train that many groups in total; then it waits."""
        self.released = groups

    def run(self):
        while not self.over.wait(0.05):
            try:
                with self.lock:
                    self.post_what_is_next()
            except (TimeoutError, requests.RequestException, KeyError):
                self.env_id = None  # the server is down, or new and without a trainer
            except UserError:
                continue  # the journal was pruned while it was read

    def post_what_is_next(self):
        number = self.arrived()
        if self.posted > number or number >= min(self.released * self.parts, len(self.pieces)):
            return
        if self.env_id is None:
            if self.ask("info")["batch_size"] == -1:
                return  # it would be taken for the registration that the trainer has yet to make, and dropped
            self.env_id = register_env(self.url, 4 // self.parts, patience=0)
        post_group(self.url, self.env_id, self.pieces[number])
        self.posted = number + 1

    def server_loses_all(self, fault):
        """Post again what a fault left neither in the server nor in a journal, once the trainer has registered again."""
        with self.lock:
            fault()
            self.posted, self.env_id = 0, None

    def run_is_dead(self):
        """Called while no trainer runs: post again what it took from the server and did not write to its journal."""
        with self.lock:
            if not self.ask("status")["queue_size"]:
                self.posted = 0

    def ask(self, what):
        return requests.get(f"{self.url}/{what}", timeout=60).json()

    def arrived(self):
        saved = max((c.metadata["feed"]["batches"] for c in all_in(self.folder / "checkpoints")), default=0)
        ranks = [self.folder / "journal" / f"{rank}_of_{self.parts}" for rank in range(self.parts)]
        journals = [Journal(path, read_only=True).numbers for path in ranks]
        return sum(max(saved, numbers[-1] + 1 if numbers else 0) for numbers in journals)


def split(group, parts):
    """The group as `parts` groups of fewer sequences."""
    rows = ("tokens", "masks", "scores", "advantages")
    size = len(group["tokens"]) // parts
    return [group | {name: group[name][i * size : (i + 1) * size] for name in rows} for i in range(parts)]


@contextlib.contextmanager
def fed(folder, groups, parts=1, released=None):
    """A real server, and the groups posted to it one after the other: the first `released` (None: all) until the feeder's
    `release` allows more; each in `parts` for ranks that fetch their own."""
    with atropos_server() as server:
        feeder = Feeder(server.url, folder, groups, parts, released)
        feeder.start()
        try:
            yield server, feeder
        finally:
            feeder.over.set()
            feeder.join()


def flags(settings, **changes):
    return [f"--{name}={value}" for name, value in (settings | changes).items()]


def train(settings, num_ranks=2, script="train.py", codes=(0,), during=None, **changes):
    """Run real ranks; returns their output. Every exit code must be among `codes`."""
    results = run_ranks([*script.split(), *flags(settings, **changes)], num_ranks, during=during)
    printed = "\n".join(output for _, output in results)
    assert all(code in codes for code, _ in results), f"exit codes {[code for code, _ in results]}:\n{printed}"
    return printed


def untouched(settings, groups, folder):
    """Folder of an undisturbed run with this model and these groups, trained here or by an earlier call."""
    key = json.dumps([settings["model_name"], groups])
    if key not in _untouched:
        with fed(folder, groups) as (server, _):
            train(settings, atropos_url=server.url, output_dir=folder)
        _untouched[key] = folder
    return _untouched[key]


_untouched = {}


def state_of(folder):
    return json.loads((folder / "state.json").read_text())


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.open() if line.endswith("\n")] if path.exists() else []


def command_of(process):
    with contextlib.suppress(psutil.Error):  # gone meanwhile
        return process.cmdline()
    return []


def is_rank(process):
    """And one that has read its settings: from then on, before torch is loaded, it catches SIGTERM and knows its launcher."""
    with contextlib.suppress(OSError):  # gone meanwhile
        caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
        return "train.py" in command_of(process)[:3] and int(caught, 16) >> (signal.SIGTERM - 1) & 1


def wait_until(truth, seconds=PATIENCE_S, every=0.05):
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every)


def assert_bitwise_equal(folder, wanted, num_steps=STEPS):
    ours, theirs = (load_file(f / "final" / "model.safetensors") for f in (folder, wanted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps, expected = steps_of(folder), steps_of(wanted)
    assert [s["step"] for s in steps] == list(range(1, num_steps + 1))
    for name in ("loss", "grad_norm", "tokens/total", "tokens/trained", "learning_rate", "entropy"):
        assert [s[name] for s in steps] == [s[name] for s in expected], name
    assert state_of(folder)["state"] == "finished"
