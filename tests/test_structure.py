"""Imports between folders point down, modules do not import what they must not know, the READMEs list all modules."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# top to bottom; a folder, or a module beside the folders, may import only from those below it
FLOORS = """
trainer dry_run export loss_head reference
evaluation step_log
training_step
planning
inspect report environment publish
run
rollouts
distributed
model
config
loss
command_line
logs device settings_files atomic_files connections user_code
errors
"""
FLOOR_OF = {name: -i for i, floor in enumerate(FLOORS.split("\n")) for name in floor.split()}

NEVER_KNOWS = {
    "command_line": {"torch", "requests", "deepspeed"},
    "config": {"torch", "requests", "deepspeed"},
    "connections": {"torch", "deepspeed", "transformers"},
    "device": {"transformers", "requests", "deepspeed", "torch.distributed"},
    "dry_run": {"requests", "torch.distributed", "transformers", "wsft.distributed.world", "wsft.trainer"},
    "settings_files": {"torch", "requests", "deepspeed"},
    "distributed.channel": {"requests", "deepspeed", "wsft.distributed.watchdog"},
    "distributed.deepspeed_config": {"torch", "requests", "deepspeed"},
    "distributed.load_balancing": {"torch", "requests", "wsft.distributed.world"},
    "distributed.signals": {"torch", "requests", "wsft.distributed.world"},
    "distributed.watchdog": {"torch", "requests", "wsft.distributed.world"},
    "environment": {"torch"},
    "environment.texts": {"requests", "wsft.rollouts.client"},
    "inspect.checks": {"torch", "transformers", "requests", "deepspeed"},
    "inspect.page": {"torch", "requests", "transformers", "tokenizers", "wsft"},
    "inspect.terminal": {"deepspeed", "requests", "torch", "wsft.distributed"},
    "inspect.view": {"deepspeed", "torch.distributed", "wsft.distributed"},
    "loss": {"requests", "deepspeed", "torch.distributed", "wsft.config"},
    "loss.advantages": {"torch"},
    "model": {"requests", "deepspeed"},
    "model.memory": {"torch.distributed", "transformers", "wsft.config", "wsft.device"},
    "model.packing": {"torch.distributed", "transformers", "wsft.config"},
    "planning": {"requests", "deepspeed", "torch.distributed", "wsft.distributed.world"},
    "publish": {"wsft.rollouts", "wsft.loss", "wsft.distributed.engine", "deepspeed"},
    "report": {"torch", "requests", "wsft.run"},
    "report.panels": {"bokeh", "matplotlib"},
    "report.runs": {"bokeh", "matplotlib"},
    "rollouts.batch": {"requests", "torch.distributed", "transformers", "wsft.distributed"},
    "rollouts.client": {"torch", "wsft.distributed", "pathlib"},
    "rollouts.decoder": {"torch", "requests"},
    "rollouts.journal": {
        "torch",
        "requests",
        "numpy",
        "json",
        "wsft.distributed",
        "wsft.rollouts.client",
        "wsft.rollouts.batch",
    },
    "rollouts.json_parser": {"torch", "requests", "wsft.rollouts.records", "wsft.rollouts.decoder"},
    "rollouts.records": {"torch", "requests"},
    "run.base_files": {"torch", "requests", "deepspeed", "wsft.distributed", "wsft.run.checkpoint"},
    "run.checkpoint": {
        "requests",
        "wsft.rollouts.client",
        "wsft.rollouts.batch",
        "wsft.rollouts.decoder",
        "wsft.rollouts.feed",
    },
    "run.export": {"requests", "wsft.rollouts.client", "wsft.rollouts.batch", "wsft.distributed.world"},
    "run.fingerprint": {"torch", "requests", "deepspeed", "wsft.distributed", "wsft.run.checkpoint"},
    "run.measurements": {"torch", "requests", "wsft.distributed.world", "wsft.model"},
    "run.metrics": {"torch", "numpy", "wsft.distributed"},
    "run.output_folder": {"torch", "requests", "wsft.distributed", "wsft.rollouts"},
}


def imports_of(path):
    """Every module named by an import anywhere in the file, except under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


PACKAGE = ROOT / "wsft"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports_of(path)
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
}


def of_package(imports):
    """Those of the imported names that are modules of the package, without its name."""
    return {name.removeprefix("wsft.") for name in imports} & MODULES.keys()


def test_every_folder_has_a_floor():
    assert {name.partition(".")[0] for name in MODULES} == FLOOR_OF.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    floor = name.partition(".")[0]
    for imported in of_package(MODULES[name]):
        below = imported.partition(".")[0]
        assert below == floor or FLOOR_OF[below] < FLOOR_OF[floor], f"{name} imports {imported}"


def test_no_imports_go_in_a_circle():
    graphlib.TopologicalSorter({name: of_package(imports) for name, imports in MODULES.items()}).prepare()


def test_no_module_has_the_name_of_one_of_the_standard_library():
    """A folder may: without an __init__.py it is found after all modules."""
    names = {path.stem for path in PACKAGE.rglob("*.py")} - {"__main__", "__init__"}
    assert not names & set(sys.stdlib_module_names) and not list(PACKAGE.glob("*/__init__.py"))
    code = "import inspect; inspect.signature"
    assert not subprocess.run([sys.executable, "-c", code], cwd=PACKAGE).returncode


@pytest.mark.parametrize("name", NEVER_KNOWS)
def test_modules_stay_ignorant(name):
    """A folder's name stands for all that is in it."""
    of_it = {module: imports for module, imports in MODULES.items() if f"{module}.".startswith(f"{name}.")}
    assert of_it
    for module, imports in of_it.items():
        for banned in NEVER_KNOWS[name]:
            assert not [i for i in imports if i == banned or i.startswith(f"{banned}.")], f"{module} knows {banned}"


def test_only_distributed_imports_deepspeed():
    knowing = {name.partition(".")[0] for name, imports in MODULES.items() if "deepspeed" in {i.split(".")[0] for i in imports}}
    assert knowing == {"distributed"}


def test_importing_wsft_loads_neither_torch_nor_deepspeed():
    code = (
        "import sys, wsft; dir(wsft); wsft.WeightedSFTConfig; print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import wsft

    with pytest.raises(AttributeError, match="no attribute 'WeightedSTF'"):
        wsft.WeightedSTF  # noqa: B018


def test_the_tree_in_the_readme_is_the_tree():
    folder, listed = "", set()
    for indent, name in re.findall(r"^( *)([\w.]+(?:/|\.py)) ", (PACKAGE / "README.md").read_text(), re.M):
        if name.endswith("/"):
            folder = name
        else:
            listed.add((folder if indent else "") + name)
    there = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    assert listed == there


def test_the_top_level_holds_only_what_belongs_there():
    allowed = (
        "train.py ds_configs launch wsft tests benchmarks requirements.txt README.md pyproject.toml LICENSE .gitignore .ci"
    )
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {Path(name).parts[0] for name in listed} <= set(allowed.split())
