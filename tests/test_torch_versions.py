"""The oldest and the newest torch that wsft runs on: attention, head, dry run, exactness (gigabytes, installed once)."""

import os
import subprocess

import pytest
from conftest import ROOT, clean_environment
from inference_servers import environment_with

FILES = ("attention", "head", "dry_run", "exact", "planning", "interface", "lora")
NOT_NEEDED = ("#", "-r", "torch==", "ruff", "shellcheck", "playwright")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["2.11.0", "2.14.1"])
def test_attention_head_and_exact_steps_hold_on(version, tmp_path):
    files = ("requirements.txt", "launch/requirements.txt", "tests/requirements.txt")
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines()]
    packages = [line for line in lines if line and not line.startswith(NOT_NEEDED)]
    installs = ["install", "-q", f"torch=={version}"], ["install", "-q", *packages]
    python = environment_with(f"torch-{version}", *installs, ["install", "-q", "--no-deps", "atroposlib==0.4.0"])
    env = clean_environment(TORCH_EXTENSIONS_DIR=str(tmp_path), PATH=f"{python.parent}:{os.environ['PATH']}")
    tests = [f"tests/test_{name}.py" for name in FILES]
    command = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
