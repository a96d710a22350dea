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
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

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


class Publishing:
    """A model on one rank, and a way for each transport to publish it into a server."""

    def __init__(self, args: argparse.Namespace, temporary: Path):
        self.path = (args.folder or temporary / "published").absolute()
        device = torch.device("cuda" if "nccl" in args.transports else "cpu")
        self._world, self._server = World(device, 600.0), connect(args.url, 600.0)
        self.model, config = model_of(args, device)
        empty = empty_model(config, False)
        tensors = self._tensors(empty, args)
        self._folder = PublishFolder(self.path, 1, tensors, {}, self._world)
        broadcasts = [name for name in args.transports if name in ("nccl", "gloo")]
        self.ways = {name: partial(self._broadcast, Broadcast(tensors, self._world, name, 600.0)) for name in broadcasts}
        self.ways["disk"] = self._through_files
        if "adapter" in args.transports:
            lora = WeightedSFTConfig(model_name=args.model, lora_rank=args.lora_rank)
            adapters = Adapters.for_model(empty, (), lora)
            for each in (empty, self.model):
                adapters.put_into(each, lora.seed)
            contents = peft_config({"adapters": asdict(adapters), "config": lora.public()}, empty)
            tensors = self._tensors(empty, args)
            self._adapters = AdapterFolder(self.path, args.model, "benchmark", contents, tensors, self._world)
            self.ways["adapter"] = self._adapter

    def _tensors(self, empty: torch.nn.Module, args: argparse.Namespace) -> TrainedTensors:
        return TrainedTensors(self.model, empty, args.model, lambda _: contextlib.nullcontext(), args.bucket_mib * 2**20)

    def _broadcast(self, broadcast: Broadcast, version: int) -> float:
        (pause,) = broadcast.send([self._server], str(version))
        if not isinstance(pause, float):
            raise pause
        return pause

    def _through_files(self, version: int) -> float:
        self._folder.publish(version)
        return self._server.load(self.path / f"step_{version}", str(version))

    def _adapter(self, version: int) -> float:
        named = self._adapters
        named.publish(version)
        self._server.load_adapter(named.path / named.name(version), str(version))
        named.delete_all_but(self._server.unload_adapters(named.prefix, named.name(version)))
        return self._server.paused_s

    def differences(self, folder: str) -> tuple[float, float]:
        """Of logprobs from those of the model in the folder, mean and maximum."""
        check = Probe.of_folder(Path(folder))
        return check.differences(check.scored_by(self._server))


def model_of(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, PretrainedConfig]:
    config, dtype = AutoConfig.from_pretrained(args.model), getattr(torch, args.dtype)
    if any(Path(args.model).glob("*.safetensors")):
        return class_for(config).from_pretrained(args.model, dtype=dtype).to(device), config
    with device:
        return class_for(config).from_config(config, dtype=dtype), config


def copy_seconds(folder: Path, target: Path) -> float:
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        shutil.copyfile(file, target)
    return time.perf_counter() - start


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
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as temporary:
        publishing, version = Publishing(args, Path(temporary)), 0
        spent, memory = {name: [] for name in args.transports}, []
        for _ in range(args.times):
            for name in args.transports:
                version, start = version + 1, time.perf_counter()
                pause = publishing.ways[name](version)
                spent[name].append((time.perf_counter() - start, pause))
                memory.append(memory_gib())
        last = max(publishing.path.glob("step_*"), default=None)
        copy = [copy_seconds(last, Path(temporary) / "copy") for _ in range(args.times if last else 0)]
    gib = sum(p.numel() * p.element_size() for p in publishing.model.parameters()) / 2**30
    print(f"{gib:.2f} GiB, {args.times} times each; median (minimum to maximum)")
    for name, found in {name: list(zip(*values, strict=True)) for name, values in spent.items()}.items():
        print(f"{name:<7} all {shown(found[0])}  pause {shown(found[1])}  {gib / statistics.median(found[0]):.2f} GiB/s")
    if copy:
        print(f"plain copy of the folder's files {shown(copy)}")
    counts = sorted({max(len(memory) // 10, 1), max(len(memory) // 2, 1), len(memory)})
    print("memory after", ", ".join(f"{count} versions {memory[count - 1]:.2f} GiB" for count in counts))
    if not args.discarded and "adapter" not in args.transports:
        mean, largest = publishing.differences(args.model)
        print(f"difference of logprobs from the model's, mean and maximum: {mean:.1e} {largest:.1e}")


def shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
