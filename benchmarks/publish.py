"""Publishing a model into a running vLLM server, by each transport, beside a plain copy of the same bytes; growth of memory.

    python -m benchmarks.publish runs/models/SmolLM2-135M-Instruct http://127.0.0.1:8001 [--times 10] [--transports gloo disk]
    ... --transports gloo adapter --lora_rank 16      # the whole model, and adapters alone

One rank, without training. "all" is from the start until the server continues, "pause" the part in which it is paused; with
`disk` "all" includes writing the folder, which comes before the pause. Memory is that of this process and of vLLM's processes.
"""

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers import AutoConfig

from wsft import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.model.loading import class_for, empty_model
from wsft.model.lora import Adapters
from wsft.publish.adapters import AdapterFolder
from wsft.publish.broadcast import Broadcast
from wsft.publish.folder import PublishFolder
from wsft.publish.probe import Probe
from wsft.publish.servers import connect
from wsft.publish.tensors import TrainedTensors
from wsft.run.adapter import peft_config


def memory_gib() -> float:
    found = [psutil.Process()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "vllm" in " ".join(process.cmdline()).lower():
                found.append(process)
    return sum(process.memory_info().rss for process in found) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("url")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--transports", nargs="+", default=["gloo", "disk"], choices=["nccl", "gloo", "disk", "adapter"])
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bucket_mib", type=int, default=256)
    parser.add_argument("--discarded", action="store_true", help="the server is benchmarks.receiver, which loads nothing")
    parser.add_argument("--folder", type=Path, help="for disk; a temporary one if unset")
    args = parser.parse_args()
    device = torch.device("cuda" if "nccl" in args.transports else "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world, config = World(device, 600.0), AutoConfig.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    if any(Path(args.model).glob("*.safetensors")):
        model = class_for(config).from_pretrained(args.model, dtype=dtype).to(device)
    else:
        with device:
            model = class_for(config).from_config(config, dtype=dtype)
    bucket_bytes = args.bucket_mib * 2**20
    tensors = TrainedTensors(model, empty_model(config, False), args.model, lambda _: contextlib.nullcontext(), bucket_bytes)
    server = connect(args.url, 600.0)
    if "adapter" in args.transports:
        empty, lora = empty_model(config, False), WeightedSFTConfig(model_name=args.model, lora_rank=args.lora_rank)
        adapters = Adapters.for_model(empty, (), lora)
        for each in (empty, model):
            adapters.put_into(each, lora.seed)
        metadata = {"adapters": asdict(adapters), "config": lora.public()}
        of_adapters = TrainedTensors(model, empty, args.model, lambda _: contextlib.nullcontext(), bucket_bytes)
    with tempfile.TemporaryDirectory() as temporary:
        path = args.folder or Path(temporary) / "published"
        folder = PublishFolder(path, 1, tensors, {}, world)
        ways = {name: Broadcast(tensors, world, name, 600.0) for name in args.transports if name in ("nccl", "gloo")}
        if "adapter" in args.transports:
            named = AdapterFolder(path.absolute(), args.model, "benchmark", peft_config(metadata, empty), of_adapters, world)
        spent, memory, version = {name: [] for name in args.transports}, [], 0
        for _ in range(args.times):
            for name in args.transports:
                version += 1
                start = time.perf_counter()
                if name == "disk":
                    folder.publish(version)
                    pause = server.load((path / f"step_{version}").absolute(), str(version))
                elif name == "adapter":
                    named.publish(version)
                    server.load_adapter(named.path / named.name(version), str(version))
                    named.delete_all_but(server.unload_adapters(named.prefix, named.name(version)))
                    pause = server.paused_s
                else:
                    (pause,) = ways[name].send([server], str(version))
                    if not isinstance(pause, float):
                        raise pause
                spent[name].append((time.perf_counter() - start, pause))
                memory.append(memory_gib())
        last, copy = max(path.glob("step_*"), default=None), []
        for _ in range(args.times if last else 0):
            start = time.perf_counter()
            for file in last.glob("*.safetensors"):
                shutil.copyfile(file, Path(temporary) / "copy")
            copy.append(time.perf_counter() - start)
    gib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    print(f"{gib:.2f} GiB, {args.times} times each; median (minimum to maximum)")
    for name, found in {name: list(zip(*values, strict=True)) for name, values in spent.items()}.items():
        print(f"{name:<7} all {shown(found[0])}  pause {shown(found[1])}  {gib / statistics.median(found[0]):.2f} GiB/s")
    if copy:
        print(f"plain copy of the folder's files {shown(copy)}")
    tenth = memory[max(len(memory) // 10 - 1, 0)]
    print(f"memory after {max(len(memory) // 10, 1)} versions {tenth:.2f} GiB, after {len(memory)}: {memory[-1]:.2f} GiB")
    if args.discarded or "adapter" in args.transports:
        return
    check = Probe.of_folder(Path(args.model))
    print(
        "difference of logprobs from the model's, mean and maximum: {:.1e} {:.1e}".format(
            *check.differences(check.scored_by(server))
        )
    )


def shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
