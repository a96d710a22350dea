"""Everything about wsft on a GPU in one call: right or wrong, how fast, where the time goes.

    bash benchmarks/gpu.sh [OUT] [--tiny] [--stages card,right,head,step,profile]

Each stage is a process of its own with a time limit, the most important first, and writes OUT/STAGE.json whenever it has a
result, so that a call that is cut off still brings those before. At the end a table names card, torch and driver with every
figure. `--tiny` runs the same code in small sizes, also on a CPU.

    card     versions; what the card can do: a large matrix product of random numbers in bf16, a large copy
    right    tests/test_gpu.py; losses of the shipped DeepSpeed configs against those of a CPU, in gpu_expected.json (--store)
    head     the loss head beside others, no token masked, and its share of three products at the measured rate
    step     whole steps of a random model at several lengths, without saving: tokens/s, MFU by two ways of counting
    profile  one step: the kernels that take most, the share of time in which the GPU is idle, where the host waits

One card cannot show two NCCL ranks, gathers, or weights sent over NCCL: these are tested over gloo (tests/test_exact.py,
tests/test_publish_servers.py) and stay unmeasured.
"""

import argparse
import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = Path(__file__).with_name("gpu_expected.json")
LIMITS = {"card": 40, "right": 130, "head": 110, "step": 190, "profile": 50}  # seconds
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)  # else DeepSpeed, which transformers imports, looks for another and warns
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "liger-kernel", "cut-cross-entropy", "trl")
CONFIGS = ("zero3", "zero2", "zero3_offload_optimizer")  # on one rank; what compiles for minutes is left out
HEAD_SHAPES = {  # tokens, hidden size, vocabulary
    False: [(8192, 4096, 131_072), (32_768, 3584, 152_064)],
    True: [(256, 64, 2000)],
}
LLM_FOUNDRY = "12 L d T per token for attention, lm_head for all tokens"


class Results:
    """Of one stage, written whenever one comes."""

    def __init__(self, path: Path):
        self._path, self.found = path, {}

    def add(self, **found: Any) -> None:
        self.found |= found
        self._path.write_text(json.dumps(self.found, indent=1))
        print({name: value for name, value in found.items() if not isinstance(value, list | dict)} or list(found), flush=True)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(action: Any, repeats: int) -> float:
    """The median of some calls, after one."""
    action()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


# -- the stages -------------------------------------------------------------------------------------------------------


def card(tiny: bool, results: Results) -> None:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    driver = ""
    if CUDA:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    results.add(card=name, driver=driver, cuda=torch.version.cuda, versions=found, python=sys.version.split()[0])
    n, size = (512, 2**22) if tiny else (8192, 2**31)
    left, right = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    results.add(matmul_tflops=2 * n**3 / seconds_of(lambda: left @ right, 20) / 1e12)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    results.add(copy_gb_s=2 * size / seconds_of(lambda: target.copy_(source), 10) / 1e9)


def make_tiny_model(folder: Path) -> Path:
    """The same on every machine."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **shape)).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder / "model")
    with (folder / "data.jsonl").open("w") as file:
        for k in range(3):
            rows = [[(7 * i * i + 11 * j + k) % 90 + 4 for i in range(n)] for j, n in enumerate((10, 14, 9, 22))]
            masks = [[-100, -100, *row[2:]] for row in rows]
            group = {"tokens": rows, "masks": masks, "advantages": [[a] for a in (1.0, -0.5, 0.7, -1.1)]}
            print(json.dumps(group), file=file)
    return folder


def losses_of(name: str, folder: Path, device: str) -> list[float] | str:
    """Of three steps with a shipped config; or the last line of what the run said."""
    run = folder / f"{name}_{device}"
    flags = {"model_name": folder / "model", "data": folder / "data.jsonl", "deepspeed": f"ds_configs/{name}.json"}
    flags |= {"batch_size": 4, "device": device, "output_dir": run, "learning_rate": 1e-3, "overwrite_output_dir": "true"}
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in flags.items())]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if child.returncode:
        return child.stderr.strip().split("\n")[-1]
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def right(tiny: bool, results: Results) -> None:
    device, folder = DEVICE.type, results._path.parent / "right"
    folder.mkdir(exist_ok=True)
    make_tiny_model(folder)
    expected = json.loads(EXPECTED.read_text())
    for name in CONFIGS[:1] if tiny else CONFIGS:
        found, wanted = losses_of(name, folder, device), expected[name]
        same = isinstance(found, list) and all(abs(a - b) < 0.02 + 0.05 * abs(b) for a, b in zip(found, wanted, strict=True))
        results.add(**{f"losses of {name}": {"found": found, "on a CPU": wanted, "right": same}})
    which = "head_on_a_gpu or attention" if tiny else "not memory_that_was_estimated"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-k", which, "-n", "4", "-rfE"]
    child = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", child.stdout, re.M)
    last = (child.stdout.strip().split("\n") or [""])[-1]
    results.add(tests=last, failed=failed, output="" if not failed else child.stdout[-8000:])


def head(tiny: bool, results: Results) -> None:
    rate = json.loads((results._path.parent / "card.json").read_text())["matmul_tflops"] * 1e12
    for tokens, hidden, vocab in HEAD_SHAPES[tiny]:
        heads = ("wsft", "dense") + CUDA * ("wsft_one_pass", "cce", "liger_scaled", "liger", "torch_none", "torch_sum")
        for name in heads:
            flags = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "masked": 0, "only": name, "device": DEVICE.type}
            flags |= {} if CUDA else {"dtype": "float32"}
            command = [sys.executable, "-m", "benchmarks.head", *(f"--{key}={value}" for key, value in flags.items())]
            child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            key = f"{name}, {tokens} x {hidden} x {vocab}"
            if child.returncode:
                results.add(**{key: child.stderr.strip().split("\n")[-1]})
                continue
            found = json.loads(child.stdout.strip().split("\n")[-1])
            least = 3 * 2 * tokens * hidden * vocab / rate
            results.add(**{key: {"ms": 1e3 * found["seconds"], "gib": found["gib"], "share": least / found["seconds"]}})


def steps_of(shape: str, lengths: str, rollouts: int, tiny: bool, folder: Path, steps: int = 3, **settings: Any) -> Any:
    """A generator of the trainer and the metrics of each step, in this process. Nothing is saved at the end: the caller ends
    the process."""
    from benchmarks.step import make_groups, make_random_model
    from wsft import WeightedSFTConfig, WeightedSFTTrainer

    model = str(make_tiny_model(folder) / "model") if tiny else make_random_model(shape)
    shortest, longest = (int(n) for n in lengths.split(":"))
    vocab = 96 if tiny else json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    groups = make_groups(rollouts, 8, max(vocab, 101) if not tiny else 110, shortest, longest)
    if tiny:
        groups = [group | {name: [[t % 96 if t > 0 else t for t in row] for row in group[name]] for name in ("tokens", "masks")}
                  for group in groups]  # fmt: skip
    optimizer = {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True, "fused": CUDA}}
    ds = {"bf16": {"enabled": CUDA}, "optimizer": optimizer, "zero_optimization": {"stage": 3}}
    config = WeightedSFTConfig(
        model_name=model, deepspeed=ds, batch_size=rollouts, max_token_len=longest, training_steps=steps, save_steps=10_000,
        micro_batch_tokens=256 if tiny else 16_384, output_dir=str(folder / "run"), overwrite_output_dir=True,
        device=DEVICE.type, **settings,
    )  # fmt: skip
    trainer = WeightedSFTTrainer(config).__enter__()
    for _ in range(steps):
        yield trainer, groups, trainer.step(groups)


def step(tiny: bool, results: Results) -> None:
    """Each case in a process of its own, which ends without saving."""
    cases = [
        ("qwen2.5-1.5b", "512:4096", {}),
        ("qwen2.5-1.5b", "512:4096", {"kernels": "none"}),
        ("qwen2.5-7b", "512:4096", {"lora_rank": 16}),
        ("qwen2.5-7b", "4096:8192", {"lora_rank": 16}),
    ]
    for shape, lengths, settings in [("tiny", "16:64", {})] if tiny else cases:
        given = f"{shape!r}, {lengths!r}, {tiny}, {settings!r}, {str(results._path.parent)!r}"
        code = f"from benchmarks import gpu; gpu.step_case({given})"
        child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        key = f"{shape}, {lengths} tokens" + "".join(f", {name} {value}" for name, value in settings.items())
        lines = child.stdout.strip().split("\n")
        results.add(**{key: json.loads(lines[-1]) if child.returncode == 0 else child.stderr[-2000:]})


def step_case(shape: str, lengths: str, tiny: bool, settings: dict[str, Any], out: str) -> None:
    folder = Path(out) / "step"
    folder.mkdir(exist_ok=True)
    for trainer, groups, metrics in steps_of(shape, lengths, 16 if tiny else 64, tiny, folder, **settings):  # noqa: B007
        pass
    sequences = [len(row) for group in groups for row in group["tokens"]]
    model = trainer.model.model.config
    run = metrics["tokens/total"] * (1 - metrics["plan/shared"])
    params = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    attention = sum(12 * model.num_hidden_layers * model.hidden_size * n * n for n in sequences)
    theirs = 6 * params * sum(sequences) + attention
    found = {
        "tokens_per_second": metrics["tokens/per_second"],
        "run_tokens_per_second": run / metrics["time/step"],
        "tflops": metrics["compute/tflops_per_rank"],
        "mfu": metrics.get("compute/mfu"),
        f"tflops, {LLM_FOUNDRY}": theirs / metrics["time/step"] / 1e12,
        "peak_gib": metrics["memory/peak_gib"],
        "seconds": metrics["time/step"],
        "loss": metrics["loss"],
    }
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # nothing is saved: of 7B that would be 46 GB


def profile(tiny: bool, results: Results) -> None:
    code = f"from benchmarks import gpu; gpu.profile_case({tiny}, {str(results._path.parent)!r})"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = child.stdout.strip().split("\n")
    results.add(**(json.loads(lines[-1]) if child.returncode == 0 else {"failed": child.stderr[-2000:]}))


def profile_case(tiny: bool, out: str) -> None:
    from torch.profiler import ProfilerActivity

    folder, waits = Path(out) / "profile", collections.Counter()
    folder.mkdir(exist_ok=True)
    steps = steps_of("qwen2.5-1.5b", "16:64" if tiny else "512:4096", 16 if tiny else 32, tiny, folder, steps=4)
    next(steps), next(steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with torch.profiler.profile(activities=activities, with_stack=False, record_shapes=False) as profiler:
        start = time.perf_counter()
        next(steps)
        synchronize()
        spent = time.perf_counter() - start
    on_device = [event for event in profiler.events() if event.device_type.name == "CUDA"] if CUDA else []
    busy = sum(event.time_range.elapsed_us() for event in on_device) / 1e6
    table = profiler.key_averages().table(sort_by="self_cuda_time_total" if CUDA else "self_cpu_time_total", row_limit=20)

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            own = [f for f in traceback.extract_stack()[:-1] if "warnings" not in f.filename]
            waits[" <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in own[-4:][::-1])] += 1

    if CUDA:  # copies to the host and .item(), not waits for a stream or an event
        warnings.showwarning, _ = note, torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")
    next(steps)
    found = {
        "seconds": spent,
        "idle": 1 - busy / spent if CUDA else None,
        "waits": dict(waits.most_common(20)),
        "kernels": table,
    }
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


STAGES = {"card": card, "right": right, "head": head, "step": step, "profile": profile}


# -- all of them ------------------------------------------------------------------------------------------------------


def store() -> None:
    """Write gpu_expected.json: losses of this machine's CPU."""
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        folder = make_tiny_model(Path(path))
        found = {name: losses_of(name, folder, "cpu") for name in CONFIGS}
    assert all(isinstance(losses, list) for losses in found.values()), found
    EXPECTED.write_text(json.dumps(found, indent=1) + "\n")


def table(out: Path) -> str:
    about = json.loads((out / "card.json").read_text()) if (out / "card.json").exists() else {}
    versions = about.get("versions", {})
    where = f"{about.get('card', '?')}, torch {versions.get('torch', '?')}, driver {about.get('driver') or 'none'}"
    lines = ["| what | found | where |", "| --- | --- | --- |"]
    for stage in STAGES:
        path = out / f"{stage}.json"
        if not path.exists():
            lines.append(f"| {stage} | unmeasured | |")
            continue
        for name, value in json.loads(path.read_text()).items():
            if name in ("versions", "kernels", "output", "waits"):
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in value.items())
            elif isinstance(value, float):
                value = f"{value:.4g}"
            lines.append(f"| {stage}: {name} | {str(value)[:300]} | {where} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--store", action="store_true", help="write the expected losses, of this machine's CPU, and end")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.store:
        store()
        return
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        STAGES[args.stage](args.tiny, Results(out / f"{args.stage}.json"))
        return
    if not CUDA and not args.tiny:
        sys.exit("torch finds no NVIDIA GPU here: nothing was measured (--tiny runs small sizes on a CPU)")
    for stage in args.stages.split(","):
        start, limit = time.monotonic(), LIMITS[stage] * (1 if CUDA else 10)  # on a CPU DeepSpeed compiles an op first
        command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--stage", stage, *(["--tiny"] if args.tiny else [])]
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            code = f"none: longer than {limit} s"
        print(f"-- {stage}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
    text = table(out)
    (out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
