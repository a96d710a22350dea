"""The chunked head compared with others: time and peak memory of forward and backward, alternating in one call.

    python -m benchmarks.head [--dtype float32] [--tokens 4096] [--masked 0.5] [--rounds 3] [--out runs/head.json]

By default the head of SmolLM2-135M on a CPU (4,096 tokens), and in bf16 that of Qwen2.5-7B on an NVIDIA GPU (32,768 tokens).
The masked tokens carry no loss: wsft never looks at them, the others compute and mask them, as they do in their trainers.
Each measurement is a process of its own. Its peak memory is above what it held before the forward pass, so that the gradients
are among it. What cannot run here is reported and left out; benchmarks/requirements.txt has the peers.

    wsft_one_pass  the gradient of the logits by one kernel (wsft/loss/one_pass.py)
    products    the three matrix products of the trained tokens alone, all at once: what no head can do without
    dense       all logits, cross_entropy: the usual model.forward(labels=...)
    checkpoint  chunks of 1,024 tokens, each under activation checkpointing
    deepspeed   TiledFusedLogitsLoss, tiles of 1,024 tokens
    trl         the fused head of TRL's trainers
    liger       fused linear cross-entropy of Liger, reduction "none" for the sake of the weights, sums in float32
    liger_sum   the same with reduction "sum": every token weighs 1
    liger_scaled  its loss of each token at one temperature, which takes four products
    cce         cut-cross-entropy, without its filter for small gradients
    torch_none  torch's linear_cross_entropy in chunks, from torch 2.13 on, reduction "none" for the sake of the weights
    torch_sum   the same with reduction "sum": every token weighs 1
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

import wsft.loss.head as loss_head
from wsft.device import PeakMemory
from wsft.loss.head import weighted_linear_cross_entropy

CHUNK = 1024  # tokens, for peers with such an option
DEFAULTS = {
    "cpu": {"tokens": 4096, "hidden": 576, "vocab": 49_152, "dtype": "float32", "repeats": 1},
    "cuda": {"tokens": 32_768, "hidden": 3_584, "vocab": 152_064, "dtype": "bfloat16", "repeats": 10},
}


def wsft(hidden, lm_head, targets, weights, trained):
    return weighted_linear_cross_entropy(hidden[trained], lm_head, targets[trained], weights[trained])


def wsft_one_pass(*inputs):
    loss_head.runs_in_one_pass = lambda logits: True
    return wsft(*inputs)


def products(hidden, lm_head, targets, weights, trained):
    return (hidden[trained] @ lm_head.T).sum()


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


def liger(hidden, lm_head, targets, weights, trained, reduction="none"):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=torch.float32)
    losses = head(lm_head, hidden, targets.where(trained, -100))
    return (losses * weights).sum() if reduction == "none" else losses


def liger_sum(*inputs):
    return liger(*inputs, reduction="sum")


def liger_scaled(hidden, lm_head, targets, weights, trained):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return (Function.apply(hidden, lm_head, targets.where(trained, -100)) * weights).sum()


def cce(hidden, lm_head, targets, weights, trained):
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden, lm_head, targets.where(trained, -100), reduction="none", filter_eps=None)
    return (losses * weights).sum()


def torch_none(hidden, lm_head, targets, weights, trained, reduction="none"):
    given = targets.where(trained, -100)
    options = torch.nn.LinearCrossEntropyOptions()  # without, it is the dense path
    losses = torch.nn.functional.linear_cross_entropy(hidden, lm_head, given, reduction=reduction, options=options)
    return (losses * weights).sum() if reduction == "none" else losses


def torch_sum(*inputs):
    return torch_none(*inputs, reduction="sum")


HEADS = {
    head.__name__: head
    for head in (
        wsft, wsft_one_pass, products, dense, checkpoint, deepspeed, trl, liger, liger_sum, liger_scaled, cce, torch_none,
        torch_sum,
    )
}  # fmt: skip
OF_A_GPU = ("wsft_one_pass", "liger", "liger_sum", "liger_scaled", "cce")


def make(args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(tokens, args.hidden).to(args.device, dtype).requires_grad_()
    lm_head = (torch.randn(args.vocab, args.hidden) * 0.02).to(args.device, dtype).requires_grad_()
    rest = torch.randint(args.vocab, (tokens,)), torch.randn(tokens), torch.arange(tokens) % 100 >= 100 * args.masked
    return hidden, lm_head, *(x.to(args.device) for x in rest)


def run(head: str, args: argparse.Namespace) -> dict[str, float]:
    """The median of some forward and backward passes, after one that loads and makes what the libraries load and make."""
    torch.set_num_threads(args.threads)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    HEADS[head](*make(args, args.tokens if args.device == "cuda" else 2 * CHUNK)).backward()
    inputs, memory, seconds = make(args, args.tokens), PeakMemory(torch.device(args.device)), []
    held = torch.cuda.memory_allocated() / 2**30 if args.device == "cuda" else memory.gib()
    for _ in range(args.repeats):
        inputs[0].grad = inputs[1].grad = None
        wait()
        start = time.perf_counter()
        HEADS[head](*inputs).backward()
        wait()
        seconds.append(time.perf_counter() - start)
    found = {"seconds": statistics.median(seconds), "gib": memory.gib() - held}
    return found | {"gradient": inputs[1].grad.float().norm().item()}


def measured(head: str) -> dict[str, float] | str:
    """From a process of its own; the last line of its output if it failed."""
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--only", head]
    child = subprocess.run(command, capture_output=True, text=True)
    return child.stderr.strip().split("\n")[-1] if child.returncode else json.loads(child.stdout.split("\n")[-2])


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser()
    for name, value in DEFAULTS[device].items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--device", default=device)
    parser.add_argument("--masked", type=float, default=0.5, help="share of the tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", default=",".join(HEADS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=HEADS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args)))
        return
    results: dict[str, list] = {name: [] for name in args.heads.split(",")}
    for round_ in range(args.rounds):
        for name, found in results.items():
            if name in OF_A_GPU and device == "cpu":
                found.append("runs on an NVIDIA GPU only")
            elif not found or not isinstance(found[0], str):
                found.append(measured(name))
                print(f"round {round_ + 1}, {name}: {found[-1]}", file=sys.stderr)
    table(results)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


def table(results: dict[str, list]) -> None:
    ours = results["wsft"]
    for name, found in results.items():
        if isinstance(found[0], str):
            print(f"{name:10} left out: {found[0]}")
            continue
        times, memory = ([r[key] for r in found] for key in ("seconds", "gib"))
        ratio = statistics.median(o["seconds"] for o in ours) / statistics.median(times)
        small = statistics.median(o["gib"] for o in ours) / statistics.median(memory)
        spread = f"{statistics.median(times):8.3f} s ({min(times):.3f} to {max(times):.3f})"
        same = abs(found[0]["gradient"] / ours[0]["gradient"] - 1)
        print(f"{name:10} {spread}  {statistics.median(memory):.3f} GiB  wsft takes {ratio:.2f} x its time, "
              f"{small:.2f} x its memory; gradient norms differ by {same:.0e}")  # fmt: skip


if __name__ == "__main__":
    main()
