"""Capabilities of devices, and FLOPs of a step."""

import mmap

import pytest
import torch
from conftest import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from wsft import device
from wsft.device import PeakMemory, device_type, free_host_memory
from wsft.errors import UserError
from wsft.model.flops import rated_flops, step_flops
from wsft.model.loading import empty_model


def test_the_peak_is_that_since_the_last_call():
    memory = PeakMemory(torch.device("cpu"))
    held = memory.gib()
    with mmap.mmap(-1, 400 * 2**20) as large:  # not of the heap, which may keep what is freed
        for _ in range(400):
            large.write(bytes(2**20))
    assert held + 0.35 < memory.gib() < held + 0.6
    assert memory.gib() < held + 0.1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("NVIDIA Unheard-of 9000", None),
    ],
)
def test_a_card_is_rated_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert rated_flops(torch.device("cuda", 0)) == (tflops and tflops * 1e12)


def test_no_cpu_is_rated():
    assert rated_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_cost_of_a_step_is_what_its_products_take(tied, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", tied=tied), attn_implementation="eager")
    T = 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(T)[None] % 4).logits.sum().backward()
    flops = step_flops(model)
    # eager attention computes the whole square, of which a causal one needs half
    expected = (flops.per_token + flops.per_pair * T) * T + flops.per_pair * T**2 + flops.per_trained_token * T
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "billions", "pairs"),
    [
        ("llama", 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 1e9, 32 * 4096),
        ("mixtral", 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336 + 4096 * 8) / 1e9, 32 * 4096),
        ("mamba", None, 0),
    ],
)
def test_a_token_costs_6_per_parameter_that_it_meets(kind, billions, pairs):
    flops = step_flops(empty_model(config := AutoConfig.for_model(kind), trust_remote_code=False))
    assert billions is None or flops.per_token == pytest.approx(6e9 * billions, rel=1e-4)
    assert flops.per_pair == 6 * pairs and flops.per_trained_token == 6 * config.vocab_size * config.hidden_size


def test_a_gpu_that_torch_cannot_use_is_refused_unless_it_is_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "NVIDIA_CARDS", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert device_type("auto") == device_type("cpu") == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(UserError, match=r"there are 1 NVIDIA GPU.s. here .*nvidia0.*, but torch cannot use them"):
        device_type("auto")
    assert device_type("cpu") == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device_type("auto") == "cpu"
    with pytest.raises(UserError, match="finds no CUDA device"):
        device_type("cuda")


@pytest.mark.parametrize("line, root, limit, used", [
    ("0::/slurm/job_7/step_0", "", "memory.max", "memory.current"),
    ("5:cpu:/x\n4:memory:/slurm/job_7/step_0", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
])  # fmt: skip
def test_free_memory_is_within_the_limits_of_all_groups_above(line, root, limit, used, tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    job = groups / root / "slurm" / "job_7"
    for folder in (proc / "self", job / "step_0"):
        folder.mkdir(parents=True)
    assert free_host_memory(proc, groups) is None
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000 kB\n")
    (proc / "self" / "cgroup").write_text(line + "\n")
    assert free_host_memory(proc, groups) == 4_096_000
    for folder, most in ((job / "step_0", "max"), (job, "3000000")):
        (folder / limit).write_text(most + "\n")
        (folder / used).write_text("1000000\n")
    assert free_host_memory(proc, groups) == 2_000_000
