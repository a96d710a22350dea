"""The benchmarks can be started, and the one for a GPU runs in small sizes on a CPU."""

import importlib
import json
import subprocess

import pytest
from conftest import ROOT, clean_environment

MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", MODULES, ids="{}.py".format)
def test_a_benchmark_finds_what_it_measures(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(
    "stages", [("card", "head", "profile"), pytest.param(("card", "right", "head", "step", "profile"), marks=pytest.mark.slow)]
)
def test_the_stages_for_a_gpu_run_in_small_sizes(stages, tmp_path):
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--tiny", "--stages", ",".join(stages)]
    child = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert found.keys() == set(stages) and found["card"]["matmul_tflops"] > 0 and found["profile"]["kernels"]
    assert all(isinstance(value, dict) for stage in {"head", "step"}.intersection(stages) for value in found[stage].values())
    if "right" in stages:
        assert found["right"]["losses of zero3"]["right"] and not found["right"]["failed"]
        assert "unmeasured" not in (tmp_path / "out" / "table.md").read_text()
