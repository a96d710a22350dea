"""From the last byte of a batch to tensors on every rank, compared with a trainer that uses requests and broadcasts objects.

    python -m benchmarks.data_plane [--rounds 5] [--teacher 8] [--out data_plane.json]

The batch is the largest that is likely: 512 sequences x 4,096 tokens in groups of 8, every field of a record given, and a
real Atropos server writes it. The ranks are processes, gloo between them; the two ways take turns in them, each with the body
in memory. wsft's way is what its feed does; the journal, which a run writes before it decodes, has a line of its own. The
peer's is `response.json()`, one padded tensor a field, and `broadcast_object_list`: of the tensors, or of the parsed records
before them, whichever is faster. It checks nothing.

Then, what decoding in a thread costs the thread that trains: steps of a small model while a batch is decoded over and over.
And a run of train.py with `prefetch_batches` 1 on a tiny model (64 sequences x 512 tokens a step): the share of its time that
it waits for batches, all of which stand in the server's queue.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.learning import WORDS, answers, ask, make_model, started, wait_until
from wsft.distributed.world import World, free_port
from wsft.rollouts.answers import decode
from wsft.rollouts.batch import AtroposBatchProcessor, Batch, pad
from wsft.rollouts.client import AtroposClient
from wsft.rollouts.journal import Journal

GROUP, PROMPT = 8, 512
ROWS = {"tokens": torch.int64, "masks": torch.int64}
ROWS |= dict.fromkeys(("advantages", "inference_logprobs", "ref_logprobs"), torch.float32)
TEACHER = {"distill_token_ids": torch.int64, "distill_logprobs": torch.float32}
RUN = {"sequences": 64, "length": 512, "steps": 12}  # the run of train.py


# -- the batch ----------------------------------------------------------------------------------------------------------------


def make_groups(sequences: int, length: int, teacher: int = 0, prompt: int = PROMPT, vocab: int = 152_064) -> Iterator[dict]:
    """Records as environments post them. Numbers that were float32 once are written as the doubles they became."""
    rng = np.random.default_rng(0)

    def sampled(logps: np.ndarray, placeholder: float) -> list:
        logps = logps.astype(np.float32).astype(np.float64)
        logps[:, :prompt] = placeholder
        return logps.tolist()

    for _ in range(sequences // GROUP):
        shape = GROUP, length
        tokens = rng.integers(0, vocab, shape)
        tokens[:, :prompt] = tokens[0, :prompt]
        masks = tokens.copy()
        masks[:, :prompt] = -100
        group = {"tokens": tokens.tolist(), "masks": masks.tolist(), "scores": rng.random(GROUP).tolist()}
        group["advantages"] = sampled(rng.normal(0, 1, shape), 0.0)
        for name in ("inference_logprobs", "ref_logprobs"):
            group[name] = sampled(-rng.exponential(0.5, shape), 1.0)
        if teacher:
            group["distill_token_ids"] = rng.integers(0, vocab, (*shape, teacher)).tolist()
            group["distill_logprobs"] = (-rng.exponential(3.0, (*shape, teacher))).round(6).tolist()
        group["overrides"] = [{"temperature": 0.9}, *[{} for _ in range(GROUP - 1)]]
        group |= {"group_overrides": {"group_size": GROUP}, "generation_params": {"temperature": 1.0, "weight_version": 0}}
        yield group


def post(url: str, groups: Iterator[dict]) -> None:
    about = {"max_token_length": 4096, "desired_name": "data_plane", "weight": 1.0, "group_size": GROUP}
    while (env_id := ask("POST", f"{url}/register-env", about).get("env_id")) is None:  # until the trainer asks for a batch
        time.sleep(0.05)
    for group in groups:
        ask("POST", f"{url}/scored_data", group | {"env_id": env_id})


def serving(folder: Path) -> tuple[str, list[str]]:
    port = free_port()
    serve = ["-m", "uvicorn", "atroposlib.api.server:app", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    return f"http://127.0.0.1:{port}", serve


def fetch(args: argparse.Namespace, folder: Path) -> bytes:
    """The body, as a real server writes it."""
    url, serve = serving(folder)
    with started(serve, folder / "server.log") as server:
        wait_until(lambda: answers(url), server, folder / "server.log")
        client = AtroposClient(url, batch_size=args.sequences, max_token_len=args.length, num_steps=1, timeout=60)
        assert client.poll() is None
        post(url, make_groups(args.sequences, args.length, args.teacher))
        start = time.perf_counter()
        while (body := client.poll()) is None:
            pass
    print(f"{len(body) / 2**20:.0f} MiB; the server took {time.perf_counter() - start:.1f} s for them", file=sys.stderr)
    return body


# -- two ways to tensors on all ranks ----------------------------------------------------------------------------------------


class Clock:
    """Seconds of each part of one way, one after the other."""

    def __init__(self):
        dist.barrier()
        self.parts, self._start = {}, time.perf_counter()
        self._last = self._start

    def part(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name], self._last = now - self._last, now

    def over(self) -> dict[str, float]:
        dist.barrier()
        return self.parts | {"all": time.perf_counter() - self._start}


def as_wsft(world: World, body: bytes, processor: AtroposBatchProcessor) -> tuple[dict[str, float], Batch]:
    clock, part = Clock(), None
    if world.rank == 0:
        part = processor.decode(decode(body))
        clock.part("decode")
    batch = Batch.joined([world.broadcast(part, Batch, 0)])
    tensors = {f.name: torch.from_numpy(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    assert len(tensors["tokens"])
    clock.part("broadcast")
    return clock.over(), batch


def tensors_of(records: list[dict]) -> dict[str, object]:
    """Each field of a sequence's tokens as one padded tensor; the others as they are."""
    made = {name: [x for record in records for x in record[name]] for name in ("scores", "overrides")}
    made |= {name: [record[name] for record in records] for name in ("group_overrides", "generation_params", "env_id")}
    for name, dtype in (ROWS | TEACHER).items():
        if records[0][name]:
            rows = [torch.tensor(row, dtype=dtype) for record in records for row in record[name]]
            made[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return made


def as_peer(world: World, body: bytes, tensors_travel: bool) -> tuple[dict[str, float], dict[str, object]]:
    clock, box = Clock(), [None]
    if world.rank == 0:
        response = requests.Response()
        response._content, response.encoding = body, "utf-8"
        box = [response.json()["batch"]]
        clock.part("parse")
        if tensors_travel:
            box = [tensors_of(box[0])]
            clock.part("tensors")
    dist.broadcast_object_list(box, src=0)
    clock.part("broadcast")
    if not tensors_travel:
        box = [tensors_of(box[0])]
        clock.part("tensors")
    return clock.over(), box[0]


def require_equal(batch: Batch, peers: dict[str, object]) -> None:
    rows = pad(batch, range(len(batch.lengths)), 0)
    assert torch.equal(rows["tokens"], peers["tokens"]) and torch.equal(rows["loss_masks"], peers["masks"] != -100)
    trained = rows["loss_masks"]
    for mine, theirs in (("advantages", "advantages"), ("inference_logprobs", "inference_logprobs")):
        assert torch.equal(rows[mine][trained], peers[theirs][trained])


def work(rank: int, args: argparse.Namespace, folder: Path, port: int) -> None:
    """One rank; rank 0 writes down the seconds of every part of every round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    world = World(torch.device("cpu"), 600.0)
    body = (folder / "body.json").read_bytes() if rank == 0 else b""
    processor = AtroposBatchProcessor(reads_reference=True, reads_teacher=bool(args.teacher))
    journal = Journal(folder / f"journal_{rank}")
    times: dict[str, list[float]] = {}

    def note(way: str, parts: dict[str, float]) -> None:
        for name, spent in parts.items():
            times.setdefault(f"{way}: {name}", []).append(spent)

    for i in range(args.rounds):
        parts, batch = as_wsft(world, body, processor)
        note("wsft", parts)
        if rank == 0:
            start = time.perf_counter()
            journal.append(i, body)
            note("wsft", {"journal, append and fsync": time.perf_counter() - start})
            journal.prune(i + 1)
        start = time.perf_counter()
        pad(batch, range(len(batch.lengths)), 0)
        note("wsft", {"all of it as padded rows, which no step needs": time.perf_counter() - start})
        for way, tensors_travel in (("tensors", True), ("objects", False)):
            parts, peers = as_peer(world, body, tensors_travel)
            note(f"peer, {way} travel", parts)
            if i == 0:
                require_equal(batch, peers)
            del peers
        del batch
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


# -- beside the thread that trains --------------------------------------------------------------------------------------------


def steps_beside(action: Callable[[], object] | None, seconds: float) -> tuple[float, float]:
    """Seconds of a small step of the main thread, mean and longest, while a thread does the action over and over."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    inputs, over, spent = torch.randn(64, 256), threading.Event(), []

    def repeat() -> None:
        while action and not over.is_set():
            action()

    model(inputs).square().mean().backward()  # the first one takes longer
    thread = threading.Thread(target=repeat)
    thread.start()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        model(inputs).square().mean().backward()
        spent.append(time.perf_counter() - start)
    over.set()
    thread.join()
    return seconds / len(spent), max(spent)


def measure_beside(body: bytes, seconds: float = 12.0) -> dict[str, tuple[float, float]]:
    torch.set_num_threads(1)
    processor = AtroposBatchProcessor(reads_reference=True)
    beside = {
        "nothing": None,
        "wsft decodes": lambda: processor.decode(decode(body)),
        "the peer parses and makes tensors": lambda: tensors_of(json.loads(body)["batch"]),
    }
    return {name: steps_beside(action, seconds) for name, action in beside.items()}


# -- a run of train.py --------------------------------------------------------------------------------------------------------


def measure_waiting(folder: Path) -> list[dict[str, float]]:
    """The metrics of the steps of a run on a server that has all its batches when it begins, after the first, which has to
    wait for its own."""
    make_model(folder / "model", 0)
    adam = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    (folder / "ds.json").write_text(json.dumps({"optimizer": adam, "zero_optimization": {"stage": 3}}))
    url, serve = serving(folder)
    flags = {"model_name": folder / "model", "deepspeed": folder / "ds.json", "device": "cpu", "atropos_url": url}
    flags |= {"batch_size": RUN["sequences"], "max_token_len": RUN["length"], "training_steps": RUN["steps"]}
    flags |= {"output_dir": folder / "run", "prefetch_batches": 1, "gradient_checkpointing": False, "save_steps": RUN["steps"]}
    command, log = ["train.py", *(f"--{name}={value}" for name, value in flags.items())], folder / "train.log"
    with started(serve, folder / "server.log") as server, started(command, log) as trainer:
        wait_until(lambda: answers(url), server, folder / "server.log")
        sequences = RUN["sequences"] * RUN["steps"]
        post(url, make_groups(sequences, RUN["length"], prompt=64, vocab=WORDS))
        if trainer.wait(600):
            sys.exit(f"train.py ended with {trainer.returncode}:\n{log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return [{name: line[name] for name in ("time/step", "time/wait")} for line in lines[1:]]


# -- output -------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} times)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--teacher", type=int, default=0, help="entries of a teacher for each token")
    parser.add_argument("--body", type=Path, default=None, help="a body of GET /batch, instead of asking a server for one")
    parser.add_argument("--out", type=Path, default=None, help="what was measured, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        body = args.body.read_bytes() if args.body else fetch(args, folder)
        (folder / "body.json").write_bytes(body)
        torch.multiprocessing.spawn(work, (args, folder, free_port()), nprocs=args.ranks)
        times = json.loads((folder / "times.json").read_text())
        beside, run = measure_beside(body), measure_waiting(folder)
    for name, values in times.items():
        print(f"{name:56}{spread(values)} s")
    peer = min((times[f"peer, {way} travel: all"] for way in ("tensors", "objects")), key=statistics.median)
    ratios = [theirs / mine for theirs, mine in zip(peer, times["wsft: all"], strict=True)]
    print(f"{'ratio, the faster peer to wsft':56}{spread(ratios)}")
    for name, (mean, longest) in beside.items():
        print(f"a small step of another thread while {name}: {1e3 * mean:.2f} ms on average, {1e3 * longest:.0f} ms at most")
    waits, steps = ([line[f"time/{name}"] for line in run] for name in ("wait", "step"))
    print(f"a run's steps: {spread(steps)} s; of all its time {sum(waits) / sum(steps):.2%} waiting for a batch")
    if args.out:
        args.out.write_text(json.dumps({"times": times, "ratios": ratios, "beside": beside, "run": run}))


if __name__ == "__main__":
    main()
