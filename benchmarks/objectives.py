"""Cost of the objectives and of the corrections: the head under each one, forward and backward over the same tokens,
alternating in one process.

    python -m benchmarks.objectives [--tokens 2048] [--threads 2] [--rounds 5]

`one pass` is the head with nothing to learn: the logp of all tokens, which objectives and factors of whole sequences need
before they can weigh any of them. The corrections are of weighted_sft. Peak memory is that of a process of its own, above what
it held before the forward pass; among it are the gradients, and one chunk of logits.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.head import DEFAULTS
from wsft.device import PeakMemory
from wsft.loss.corrections import NO_CORRECTIONS, Corrections
from wsft.loss.head import head_loss, tokens_of_chunk
from wsft.loss.objectives import OBJECTIVES, Objective
from wsft.loss.terms import Coefficients, TokenTerms

PASS, MORE = "one pass", "kl, entropy, teacher of 8"
CORRECTIONS = {
    "mismatch_mask": Corrections(token_mask=(0.5, 2.0)),
    "mismatch_cap": Corrections(cap=2.0),
    "icepop": Corrections(icepop=(0.5, 2.0)),
    "mismatch_cap of sequences": Corrections(cap=2.0, cap_level="sequence"),
    "sequence_mask geometric": Corrections(sequence_mask={"geometric": (0.9, 1.1)}),
    "off_policy_mask": Corrections(off_policy_mask=0.1),
}
NAMES = (*OBJECTIVES, *CORRECTIONS, MORE, PASS)
SEQUENCE = 128  # tokens
H, V = DEFAULTS["cpu"]["hidden"], DEFAULTS["cpu"]["vocab"]


def make(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    hidden, lm_head = torch.randn(args.tokens, H).requires_grad_(), (torch.randn(V, H) * 0.02).requires_grad_()
    return hidden, lm_head, torch.randint(V, (args.tokens,)), torch.randn(args.tokens)


def make_terms(name: str, advantages: torch.Tensor) -> TokenTerms:
    N, more = len(advantages), name == MORE
    behavior = torch.full((N,), math.log(1 / V)) + torch.randn(N) / 4
    return TokenTerms(
        objective=Objective(name if name in OBJECTIVES else "weighted_sft"),
        corrections=CORRECTIONS.get(name, NO_CORRECTIONS),
        coefficients=Coefficients(kl=0.1, entropy=0.01, distill=0.5) if more else Coefficients(),
        scale_N=torch.full((N,), 1 / N),
        advantages_N=advantages,
        behavior_logp_N=behavior,
        fixed_weights_N=torch.full((N,), math.nan),
        temperature_N=torch.ones(N),
        sequence_N=torch.arange(N) // SEQUENCE,
        ref_logp_N=behavior if more else None,
        teacher_ids_NK=torch.randint(V, (N, 8)) if more else None,
        teacher_probs_NK=torch.rand(N, 8) / 8 if more else None,
    )


def seconds(name: str, hidden: torch.Tensor, lm_head: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor) -> float:
    terms = make_terms(name, advantages)
    start = time.perf_counter()
    if name == PASS:
        with torch.no_grad():
            head_loss(hidden, lm_head, targets, terms, **terms.head_options())
    else:
        head_loss(hidden, lm_head, targets, terms, **terms.head_options()).loss.backward()
    spent = time.perf_counter() - start
    hidden.grad = lm_head.grad = None
    return spent


def peak_mib(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.objectives", *sys.argv[1:], "--only", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    inputs = make(args)
    if args.only:
        torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # the library's own buffers
        memory = PeakMemory(torch.device("cpu"))
        before = memory.gib()
        seconds(args.only, *inputs)
        print(1024 * (memory.gib() - before))
        return
    for name in NAMES:
        seconds(name, *inputs)  # not counted
    found = {name: [] for name in NAMES}
    for _ in range(args.rounds):
        for name, times in found.items():
            times.append(seconds(name, *inputs))
    base = found["weighted_sft"]
    gradients, chunk = 4 * H * (V + args.tokens) / 2**20, 4 * V * tokens_of_chunk(V, None) / 2**20
    print(f"{args.tokens} tokens, H {H}, V {V}; gradients {gradients:.0f} MiB, a chunk of logits {chunk:.0f} MiB")
    for name, times in found.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        spread = f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        print(f"{name:26} {spread}  {ratio:.3f} x weighted_sft  peak {peak_mib(name, args):.0f} MiB")


if __name__ == "__main__":
    main()
