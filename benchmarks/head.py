"""The chunked head beside its dense twin: time and peak memory of forward and backward, alternating in one run.

    python -m benchmarks.head [--tokens 4096] [--threads 2] [--rounds 3] [--dtype float32]

Half of the tokens carry no loss: the head never sees them, the dense twin computes and masks them. Peak memory is that of a
process of its own, above what it held before the forward pass; the gradients (0.11 GiB for lm_head) are among it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from wsft.loss_head import weighted_linear_cross_entropy

H, V = 576, 49_152  # SmolLM2-135M


def chunked(hidden, lm_head, targets, weights, trained):
    return weighted_linear_cross_entropy(hidden[trained], lm_head, targets[trained], weights[trained])


def dense(hidden, lm_head, targets, weights, trained):
    losses = torch.nn.functional.cross_entropy((hidden @ lm_head.T).float(), targets, reduction="none")
    return (losses * weights * trained).sum()


def forget_peak() -> None:
    """Let the peak be what is held now: making the inputs had one of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held since `forget_peak`."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def run(name: str, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, H).to(dtype).requires_grad_()
    lm_head = (torch.randn(V, H) * 0.02).to(dtype).requires_grad_()
    targets, weights = torch.randint(V, (args.tokens,)), torch.randn(args.tokens)
    trained = torch.arange(args.tokens) % 2 == 0
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the library's own buffers
    forget_peak()
    before, start = peak_bytes(), time.perf_counter()
    {"chunked": chunked, "dense": dense}[name](hidden, lm_head, targets, weights, trained).backward()
    return {"seconds": time.perf_counter() - start, "gib": (peak_bytes() - before) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args)))
        return
    results = {"chunked": [], "dense": []}
    for _ in range(args.rounds):
        for name, found in results.items():
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--only", name],
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(json.loads(child.stdout))
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in results.items()}
    for name, found in results.items():
        spread = f"{min(r['seconds'] for r in found):.2f} to {max(r['seconds'] for r in found):.2f}"
        print(f"{name:8} {medians[name]['seconds']:6.2f} s ({spread})  {medians[name]['gib']:.3f} GiB")
    time_ratio, memory_ratio = (medians["chunked"][k] / medians["dense"][k] for k in ("seconds", "gib"))
    print(f"chunked / dense: {time_ratio:.2f} x time, {memory_ratio:.2f} x memory")


if __name__ == "__main__":
    main()
