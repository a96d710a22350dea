"""Whole optimizer steps compared with alternatives: the same rollouts, model, optimizer, ZeRO stage and ranks, alternating in
one call.

    python -m benchmarks.step runs/models/SmolLM2-135M-Instruct [--rollouts 128] [--group_size 8] [--rounds 2]
    python -m benchmarks.step --shape qwen2.5-7b --ranks 1 --lengths 512:8192 --rollouts 32    (random weights, NVIDIA GPU)

Rollouts have lognormal lengths (median 120 for 32 to 512 tokens); 40 % of the tokens are prompt, which carries no loss. They
come in groups of `--group_size` to a prompt, as from Atropos, and every fifth group has no advantage; with 1 each rollout has
a prompt of its own. A step is what each takes for all rollouts, waiting for data included; the first of a run is not counted.
All compute in `--dtype` (float32 where the device has no bf16), with or without activation checkpointing, the same for all.

    wsft         train.py as it is
    wsft equal   the same without sharing prefixes and without skipping tokens of weight 0: as many tokens run as the others run
    wsft lora    the same with --lora_rank; `trl lora` and `trl lora packing` are TRL with peft's adapters of that rank
    trl          TRL's SFTTrainer at its defaults, 8 sequences a micro-batch. It has no advantages: it trains all tokens that
                 carry loss alike
    trl packing  the same with its packing, in rows of the longest rollout's length
    example      the way of the example trainer of Atropos: all rollouts padded to one length, a multiple of 64, dense logits,
                 8 sequences a micro-batch; here under DeepSpeed like the others
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from wsft.distributed.world import free_port

ROOT = Path(__file__).resolve().parent.parent
OURS = ("wsft", "wsft equal")  # to which the others are compared
PER_DEVICE = 8  # sequences in a micro-batch, for peers with such an option
QWEN = {
    "qwen2.5-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                         num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False),
}  # fmt: skip


def make_groups(rollouts: int, group_size: int, vocab: int, shortest: int = 32, longest: int = 512) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    median = shortest * (longest / shortest) ** 0.476  # 120 between 32 and 512
    lengths = rng.lognormal(np.log(median), 0.7, rollouts).clip(shortest, longest)
    groups = []
    for k, each in enumerate(np.split(lengths, range(group_size, rollouts, group_size))):
        prompt = rng.integers(100, vocab, int(0.4 * each.mean())).tolist()
        ends = [rng.integers(100, vocab, int(0.6 * n)).tolist() for n in each]
        advantages = [0.0 if k % 5 == 4 else float(rng.normal()) for _ in ends]
        groups.append({
            "tokens": [prompt + end for end in ends],
            "masks": [[-100] * len(prompt) + end for end in ends],
            "advantages": [[a] * (len(prompt) + len(end)) for a, end in zip(advantages, ends, strict=True)],
        })  # fmt: skip
    return groups


def run_ranks(command: list[str], ranks: int, log: Path, keep: int = 2**32) -> None:
    """The Python command once per rank, as a launcher would; what it says goes to the log. RuntimeError with the first error in
    it if it fails. `keep`: bytes of freed memory that the C library may keep; launch/common.sh has it as here."""
    env = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"LOCAL_WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_DEEPSPEED": "true"}
    env |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(keep), "MALLOC_TRIM_THRESHOLD_": str(keep)}
    each = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with log.open("w+") as output:
        options = {"cwd": ROOT, "stdout": output, "stderr": subprocess.STDOUT}
        codes = [p.wait() for p in [subprocess.Popen([sys.executable, *command], env=own, **options) for own in each]]
        if any(codes):
            output.seek(0)
            lines = output.read().strip().splitlines()
            why = next((line for line in lines if re.search(r"\w+(Error|Exception|Failed): ", line)), lines[-1])
            raise RuntimeError(f"ended with {codes}: {why}")


def ds_config(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    adam = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "fused": True}}
    return {"zero_optimization": {"stage": 3}, "bf16": {"enabled": args.dtype == "bfloat16"}, "optimizer": adam, **more}


def wsft(args: argparse.Namespace, folder: Path, name: str) -> list[float]:
    (folder / "ds.json").write_text(json.dumps(ds_config(args)))
    flags = {
        "model_name": args.model, "data": folder / "groups.jsonl", "deepspeed": folder / "ds.json",
        "output_dir": folder / "run", "overwrite_output_dir": "true", "max_token_len": args.longest,
        "batch_size": args.rollouts, "training_steps": args.steps + 1, "learning_rate": 1e-5, "max_grad_norm": 0,
        "micro_batch_tokens": args.micro_batch_tokens, "gradient_checkpointing": str(args.checkpointing).lower(),
    }  # fmt: skip
    flags |= {"lora_rank": args.lora_rank} if "lora" in name else {}
    flags |= {"share_prefixes": "false", "skip_zero_weight": "false"} if "equal" in name else {}
    run_ranks(["train.py", *(f"--{name}={value}" for name, value in flags.items())], args.ranks, folder / "wsft.log")
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()][1:]
    shown = ("plan/micro_batches", "plan/shared", "plan/skipped", "memory/peak_gib", "compute/tflops_per_rank", "compute/mfu")
    print(f"{name}:", {key: round(steps[-1][key], 3) for key in shown if key in steps[-1]}, file=sys.stderr)
    return [step["time/step"] for step in steps]


def peer(args: argparse.Namespace, folder: Path, name: str) -> list[float]:
    out = folder / "seconds.json"
    settings = vars(args) | {"peer": name, "folder": str(folder), "out": str(out)}
    run_ranks(["-m", "benchmarks.step", "--as_peer", json.dumps(settings)], args.ranks, folder / "peer.log")
    return json.loads(out.read_text())[1:]


def read_rollouts(folder: Path, rollouts: int) -> list[dict[str, list]]:
    names, rows = ("tokens", "masks", "advantages"), []
    for line in (folder / "groups.jsonl").open():
        group = json.loads(line)
        rows += [dict(zip(names, row, strict=True)) for row in zip(*(group[name] for name in names), strict=True)]
    return rows[:rollouts]


def start_gloo() -> bool:
    """Whether there is no GPU; then over gloo, which Accelerate does not think of."""
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo" if cpu else "nccl")
    return cpu


def train_with_trl(args: argparse.Namespace) -> list[float]:
    cpu, packing, lora = start_gloo(), args.peer.endswith("packing"), " lora" in args.peer
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rollouts = read_rollouts(Path(args.folder), args.rollouts)
    rows = [{"input_ids": r["tokens"], "completion_mask": [int(m != -100) for m in r["masks"]]} for r in rollouts]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]

    # packed rows hold about as many tokens as PER_DEVICE sequences do; a step is again all rollouts
    tokens = sum(len(row["input_ids"]) for row in rows)
    in_a_step = math.ceil(tokens / args.longest) if packing else args.rollouts
    per_device = max(1, round(PER_DEVICE * tokens / args.rollouts / args.longest)) if packing else PER_DEVICE
    bf16 = args.dtype == "bfloat16"
    config = SFTConfig(
        output_dir=f"{args.folder}/trl", max_steps=args.steps + 1, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=max(1, round(in_a_step / per_device / args.ranks)), max_length=args.longest,
        packing=packing, completion_only_loss=True, bf16=bf16, use_cpu=cpu, gradient_checkpointing=args.checkpointing,
        deepspeed=ds_config(args, gradient_accumulation_steps="auto", train_micro_batch_size_per_gpu="auto"),
        report_to="none", save_strategy="no", max_grad_norm=0, learning_rate=1e-5, disable_tqdm=True,
        model_init_kwargs={"dtype": args.dtype},
    )  # fmt: skip
    adapters = None
    if lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=args.lora_rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    dataset = Dataset.from_list(rows * (args.steps + 1))
    trainer = SFTTrainer(args.model, args=config, train_dataset=dataset, callbacks=[Clock()], peft_config=adapters)
    trainer.train()
    return times


def train_like_the_example(args: argparse.Namespace) -> list[float]:
    start_gloo()
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    ds = ds_config(args, train_micro_batch_size_per_gpu=PER_DEVICE, gradient_accumulation_steps=1)
    zero3 = HfDeepSpeedConfig(ds)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    del zero3
    model.train()
    if args.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(model=model, config=ds, model_parameters=model.parameters(), dist_init_required=False)
    rollouts = read_rollouts(Path(args.folder), args.rollouts)
    T = 64 * math.ceil(max(len(r["tokens"]) for r in rollouts) / 64)

    def rows(name: str, fill: float) -> torch.Tensor:
        return torch.tensor([r[name] + [fill] * (T - len(r[name])) for r in rollouts])

    tokens, labels, advantages = rows("tokens", 0), rows("masks", -100), rows("advantages", 0.0)
    own = range(args.local_rank, args.rollouts, args.ranks)
    mine = [own[i : i + PER_DEVICE] for i in range(0, len(own), PER_DEVICE)]
    times = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        for i, chosen in enumerate(mine):
            engine.set_gradient_accumulation_boundary(i == len(mine) - 1)
            x, y, a = (part[list(chosen)].to(engine.device) for part in (tokens, labels, advantages))
            logits = engine(input_ids=x, attention_mask=(x != 0).long()).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), y[:, 1:], reduction="none")
            mask = y[:, 1:] != -100
            engine.backward((nll * a[:, 1:] * mask).sum() / mask.sum() / len(mine))
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def be_a_peer(settings: dict[str, Any]) -> None:
    """One rank of a peer's run; rank 0 writes the seconds of each step."""
    import torch

    args = argparse.Namespace(**settings, local_rank=int(os.environ["RANK"]))
    seconds = train_like_the_example(args) if args.peer == "example" else train_with_trl(args)
    if args.local_rank == 0:
        Path(args.out).write_text(json.dumps(seconds))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else a rank now and then aborts as it ends


def make_random_model(shape: str) -> str:
    """A folder with random weights of that shape, in bf16, made once; the tokenizer is never asked."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    folder = ROOT / "runs" / "models" / f"random-{shape}"
    if not (folder / "config.json").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN[shape]), dtype=torch.bfloat16)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(QWEN[shape]["vocab_size"])}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def parse_args() -> argparse.Namespace:
    import torch

    from wsft.device import has_native_matmul

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = "bfloat16" if has_native_matmul(device, torch.bfloat16) else "float32"
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", choices=QWEN)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=native)
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--lengths", default="32:512")
    parser.add_argument("--steps", type=int, default=2, help="of each run, beside the first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro_batch_tokens", type=int, default=2048)
    parser.add_argument("--lora_rank", type=int, default=16, help="of the peers with lora in their names")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers", default="wsft,wsft equal,trl,trl packing,example")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as_peer", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shape and device.type == "cpu":
        sys.exit(f"--shape {args.shape} is for an NVIDIA GPU, and there is none: nothing was measured")
    if args.as_peer is None and not (args.model or args.shape):
        parser.error("name a model folder, or a --shape")
    return args


def main() -> None:
    args = parse_args()
    if args.as_peer:
        be_a_peer(args.as_peer)
        return
    del args.as_peer
    args.out, out = None, args.out
    shortest, args.longest = (int(n) for n in args.lengths.split(":"))
    args.model = args.model or make_random_model(args.shape)
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    groups = make_groups(args.rollouts, args.group_size, vocab, shortest, args.longest)
    tokens = sum(len(row) for group in groups for row in group["tokens"])
    print(f"{args.rollouts} rollouts in groups of {args.group_size}, {tokens} tokens a step, {args.ranks} rank(s), "
          f"{args.dtype}, {'with' if args.checkpointing else 'without'} activation checkpointing")  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in args.peers.split(",")}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups * (args.steps + 1)))
        for _ in range(args.rounds):
            for name, seconds in found.items():
                if name in failed:
                    continue
                try:
                    seconds += wsft(args, folder, name) if name.startswith("wsft") else peer(args, folder, name)
                except RuntimeError as error:
                    failed[name] = str(error)
                print(f"{name}: {seconds or failed.get(name)}", file=sys.stderr)
    for name, seconds in found.items():
        if not seconds:
            print(f"{name:16} left out: {failed[name]}")
            continue
        median = statistics.median(seconds)
        ratios = [f"{own} is {median / statistics.median(found[own]):.2f} x as fast" for own in OURS if found.get(own)]
        spread = f"{median:7.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"{name:16} {spread}  {tokens / median:6.0f} tokens/s  {', '.join(ratios)}")
    if out:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
