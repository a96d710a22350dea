"""The package, built and installed: pyproject.toml names what the scripts install, and it works outside the repository."""

import os
import subprocess
import sys
import sysconfig
import venv

import pytest
from conftest import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OUTSIDE = """
import importlib.resources, sys
import torch
import wsft
from wsft import AtroposBatchProcessor, WeightedSFTInterface
from wsft.loss_head import weighted_linear_cross_entropy

assert wsft.__path__[0].startswith(sys.prefix), wsft.__path__
group = {"tokens": [[4, 5, 6, 7]], "masks": [[-100, -100, 6, 7]], "scores": [1.0], "advantages": [[2.0] * 4]}
processor = AtroposBatchProcessor()
batch = processor.to_tensors(processor.process_atropos_batch([group]))
hidden, lm_head = torch.randn(1, 4, 8), torch.randn(16, 8)
dense = WeightedSFTInterface(reduction="sum").compute_weighted_loss(
    hidden @ lm_head.T, batch["tokens"], batch["loss_masks"], batch["advantages"]
)["loss"]
chunked = weighted_linear_cross_entropy(hidden[0, 1:3], lm_head, batch["tokens"][0, 2:], batch["advantages"][0, 2:])
torch.testing.assert_close(chunked, dense)
for folder, name in (("environment", "texts.yaml"), ("report", "page.html"), ("inspect", "page.html")):
    assert (importlib.resources.files("wsft") / folder / name).read_text()
"""


def listed(*names):
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith(("#", "-r"))}


def test_requirements_and_pyproject_agree():
    extras = {name: set(packages) for name, packages in PROJECT["optional-dependencies"].items()}
    assert set(PROJECT["dependencies"]) == listed("requirements.txt")
    assert extras["test"] == listed("tests/requirements.txt")
    assert extras["look"] < listed("launch/requirements.txt")
    assert not extras["look"] & listed("requirements.txt")


def run(*command, cwd):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path):
    """Which has the packages of this one that it needs, but not the repository, and nothing to show runs with."""
    source = tmp_path / "source"  # to build in a checkout leaves files there
    source.mkdir()
    subprocess.run(f"git archive HEAD | tar x -C {source}", shell=True, cwd=ROOT, check=True)
    code, output = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, source, cwd=tmp_path)
    assert code == 0, output
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = tmp_path.glob("wsft-*.whl")
    packages = next((tmp_path / "venv").glob("lib/*/site-packages"))
    code, output = run(sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", packages, wheel, cwd=tmp_path)
    assert code == 0, output
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    code, output = run(python, "-c", OUTSIDE, cwd=tmp_path)
    assert code == 0, output
    for command in ("export", "inspect", "report", "environment"):
        code, output = run(python, "-m", f"wsft.{command}", "--help", cwd=tmp_path)
        assert code == 0 and f"usage: python -m wsft.{command}" in output, output
    for command, package in (("inspect", "rich"), ("report", "bokeh")):
        hidden = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_module('wsft.{command}', run_name='__main__')"
        code, output = run(python, "-c", hidden, cwd=tmp_path)
        assert code == 1 and "pip install 'wsft[look]'" in output and "Traceback" not in output, output
