"""The chunked head beside what others do: time and peak memory of forward and backward, in turn in one call.

    python -m benchmarks.head [--tokens 4096] [--threads 2] [--rounds 3] [--dtype float32] [--out runs/head.json]

Half of the tokens carry no loss. wsft never looks at them; the others compute and mask them, as they do in their trainers.
Peak memory is that of a process of its own, above what it held before the forward pass; the gradients (0.11 GiB for lm_head in
float32) are among it. A peer that is not installed (benchmarks/requirements.txt) is said and left out.

    dense       all logits, cross_entropy: the usual model.forward(labels=...)
    checkpoint  chunks of 1,024 tokens, each under activation checkpointing
    deepspeed   TiledFusedLogitsLoss, 4 tiles
    trl         the fused head of TRL's trainers
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint as checkpointed

from wsft.loss_head import weighted_linear_cross_entropy

H, V = 576, 49_152  # SmolLM2-135M
CHUNK = 1024  # of tokens, where a peer wants it said


def wsft(hidden, lm_head, targets, weights, trained):
    return weighted_linear_cross_entropy(hidden[trained], lm_head, targets[trained], weights[trained])


def dense(hidden, lm_head, targets, weights, trained):
    losses = cross_entropy((hidden @ lm_head.T).float(), targets, reduction="none")
    return (losses * weights * trained).sum()


def checkpoint(hidden, lm_head, targets, weights, trained):
    parts = zip(*(x.split(CHUNK) for x in (hidden, targets, weights, trained)), strict=True)
    return sum(checkpointed(dense, h, lm_head, *rest, use_reentrant=False) for h, *rest in parts)


def deepspeed(hidden, lm_head, targets, weights, trained):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss(_, x, y, mask):
        return (cross_entropy((x @ lm_head.T).float(), y, reduction="none") * mask).sum()

    inputs = (x.unsqueeze(0) for x in (hidden, targets, weights * trained))
    return TiledFusedLogitsLoss.apply(loss, None, *inputs, len(hidden) // CHUNK, [lm_head], "sum")


def trl(hidden, lm_head, targets, weights, trained):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    return -(_ChunkedLogProbFunction.apply(hidden, lm_head, None, targets, *options)[0] * weights * trained).sum()


HEADS = {head.__name__: head for head in (wsft, dense, checkpoint, deepspeed, trl)}


def forget_peak() -> None:
    """Let the peak be what is held now: making the inputs had one of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held since `forget_peak`."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def make(args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(tokens, H).to(dtype).requires_grad_()
    lm_head = (torch.randn(V, H) * 0.02).to(dtype).requires_grad_()
    return hidden, lm_head, torch.randint(V, (tokens,)), torch.randn(tokens), torch.arange(tokens) % 2 == 0


def run(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One forward and backward, after a small one that loads what the libraries load."""
    HEADS[name](*make(args, 2 * CHUNK)).backward()
    inputs = make(args, args.tokens)
    forget_peak()
    before, start = peak_bytes(), time.perf_counter()
    HEADS[name](*inputs).backward()
    found = {"seconds": time.perf_counter() - start, "gib": (peak_bytes() - before) / 2**30}
    return found | {"gradient": inputs[1].grad.float().norm().item()}


def measured(name: str) -> dict[str, float] | str:
    """From a process of its own; the last line of what it said if it could not."""
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--only", name]
    child = subprocess.run(command, capture_output=True, text=True)
    return child.stderr.strip().split("\n")[-1] if child.returncode else json.loads(child.stdout.split("\n")[-2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=HEADS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args)))
        return
    results = {name: [] for name in HEADS}
    for _ in range(args.rounds):
        for name, found in results.items():
            found.append(measured(name))
    ours = results["wsft"]
    for name, found in results.items():
        if isinstance(found[0], str):
            print(f"{name:10} left out: {found[0]}")
            continue
        times, memory = ([r[key] for r in found] for key in ("seconds", "gib"))
        ratio = statistics.median(o["seconds"] for o in ours) / statistics.median(times)
        small = statistics.median(o["gib"] for o in ours) / statistics.median(memory)
        spread = f"{statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})"
        same = abs(found[0]["gradient"] / ours[0]["gradient"] - 1)
        print(f"{name:10} {spread}  {statistics.median(memory):.3f} GiB  wsft takes {ratio:.2f} x its time, "
              f"{small:.2f} x its memory; gradient norms differ by {same:.0e}")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
