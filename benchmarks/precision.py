"""How far the gradient of a whole step in bf16 is from the exact one, by what micro-batches and ranks are summed in.

    python -m benchmarks.precision [--sequences 128] [--ranks 1 2 4] [--stages 2 3]

Each run is train.py: one step of SGD over sequences of 64 tokens, each a micro-batch, in bf16. What the step took from the
float32 masters, over the learning rate, is the gradient; the exact one is that of the dense model in float64, from the same
bf16 weights. Printed are |found - exact| / |exact| over all parameters, and how far the logged norm is from the exact one.
`repeated` are equal sequences, whose sum grows without cancelling: there a bf16 sum stops growing first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from wsft.distributed.deepspeed_files import saved_parameters
from wsft.distributed.world import free_port

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
LENGTH, RATE = 64, 1000.0
SUMS = {  # of micro-batches, of ranks
    "float32, float32": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
    "float32, bf16": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16"},
    "bf16, bf16": {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"},
}


def make_model(folder: Path, tokenizer: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4, tie_word_embeddings=False)).bfloat16()
    for param in model.parameters():
        param.data.mul_(3.0 if param.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def make_record(sequences: int, repeated: bool) -> dict:
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, SHAPE["vocab_size"], (sequences, LENGTH))
    advantages = rng.normal(1.0, 1.0, sequences)
    if repeated:
        tokens[:], advantages[:] = tokens[0], 1.0
    return {"tokens": tokens.tolist(), "masks": [[0] + [1] * (LENGTH - 1)] * sequences, "advantages": advantages.tolist()}


def exact_gradient(folder: Path, record: dict) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokens, advantages = torch.tensor(record["tokens"]), torch.tensor(record["advantages"]).double()
    for rows, weights in zip(tokens.split(16), advantages.split(16), strict=True):
        logp = model(rows).logits[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2)
        (-(weights[:, None] * logp).sum() / (len(tokens) * (LENGTH - 1))).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def found_gradient(folder: Path, record: dict, ranks: int, ds: dict, run: Path) -> tuple[dict[str, torch.Tensor], float]:
    """And the norm that the run logs."""
    (run / "data.jsonl").write_text(json.dumps(record) + "\n")
    (run / "ds.json").write_text(json.dumps(ds))
    command = [sys.executable, "train.py", f"--model_name={folder}", f"--data={run / 'data.jsonl'}", "--device=cpu"]
    command += [f"--batch_size={len(record['tokens'])}", f"--micro_batch_tokens={LENGTH}", f"--learning_rate={RATE}"]
    command += ["--max_grad_norm=0", f"--deepspeed={run / 'ds.json'}", f"--output_dir={run / 'out'}", "--overwrite_output_dir"]
    command += ["--share_prefixes=false", f"--max_token_len={LENGTH}"]
    env = os.environ | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.DEVNULL)
        for r in range(ranks)
    ]
    if any([process.wait() for process in started]):
        sys.exit(f"a run ended with {[process.returncode for process in started]}: {command}")
    before = AutoModelForCausalLM.from_pretrained(folder).float().state_dict()
    after = saved_parameters(run / "out" / "checkpoints" / "step_1" / "deepspeed")
    (step,) = [json.loads(line) for line in (run / "out" / "metrics.jsonl").open()]
    return {name: (before[name] - after[name].contiguous()) / RATE for name in before}, step["grad_norm"]


def norm_of(gradient: dict[str, torch.Tensor]) -> float:
    return torch.stack([value.double().norm() for value in gradient.values()]).norm().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--tokenizer", default="runs/models/SmolLM2-135M-Instruct", help="any: its tokens are not used")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place)
        make_model(run / "model", args.tokenizer)
        print("| sequences | ZeRO stage | sums of micro-batches, of ranks | ranks | error of the gradient | of its norm |")
        print("|---|---|---|---|---|---|")
        for repeated in (False, True):
            record = make_record(args.sequences, repeated)
            exact = exact_gradient(run / "model", record)
            for stage in args.stages:
                for name, sums in SUMS.items():
                    for ranks in args.ranks:
                        ds = sums | {
                            "bf16": {"enabled": True},
                            "optimizer": {"type": "SGD"},
                            "zero_optimization": {"stage": stage},
                        }
                        found, norm = found_gradient(run / "model", record, ranks, ds, run)
                        error = norm_of({key: found[key].double() - exact[key] for key in exact}) / norm_of(exact)
                        kind = "repeated" if repeated else "different"
                        cells = (kind, stage, name, ranks, f"{error:.2e}", f"{norm / norm_of(exact) - 1:+.1e}")
                        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
