"""The house of DESIGN.md: imports point down, each module stays ignorant of what it must not know, files say what they are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# top to bottom; a module may import only those below it
FLOORS = """
trainer dry_run inspect report
inspection
export run_folder feed
checkpoint
engine panels loading
model metrics world measurements findings runs
environment batching shares ds_config journal memory stopping watchdog base_files contents
weighted_texts terms empty weight_files
loss loss_head attention atropos groups
records device
config advantages
objectives parser layout inspect_page settings_files
"""
FLOOR_OF = {name: -i for i, floor in enumerate(FLOORS.split("\n")) for name in floor.split()}

NEVER_KNOWS = {
    "groups": {"torch", "requests"},
    "records": {"torch", "requests"},
    "parser": {"torch", "requests", "wsft.records", "wsft.groups"},
    "advantages": {"torch", "requests"},
    "objectives": {"requests", "deepspeed", "torch.distributed", "wsft.config", "wsft.atropos", "wsft.batching"},
    "terms": {"requests", "deepspeed", "torch.distributed", "wsft.config", "wsft.atropos", "wsft.batching"},
    "measurements": {"torch", "requests", "wsft.world", "wsft.model"},
    "layout": {"torch", "requests"},
    "device": {"transformers", "requests", "deepspeed", "torch.distributed"},
    "config": {"torch", "requests", "deepspeed"},
    "settings_files": {"torch", "requests", "deepspeed"},
    "ds_config": {"torch", "requests", "deepspeed"},
    "loss": {"requests", "deepspeed", "torch.distributed", "wsft.config", "wsft.atropos", "wsft.batching"},
    "loss_head": {"requests", "deepspeed", "torch.distributed", "wsft.config", "wsft.atropos", "wsft.batching"},
    "batching": {"requests", "deepspeed", "torch.distributed", "transformers", "wsft.world"},
    "atropos": {"torch", "torch.distributed", "wsft.world", "pathlib"},
    "model": {"requests", "wsft.atropos", "wsft.advantages", "wsft.batching", "wsft.groups"},
    "engine": {"requests", "wsft.atropos", "wsft.advantages", "wsft.batching", "wsft.groups"},
    "memory": {"requests", "deepspeed", "torch.distributed", "transformers", "wsft.config", "wsft.device", "wsft.batching"},
    "dry_run": {"requests", "torch.distributed", "transformers", "wsft.world", "wsft.trainer"},
    "findings": {"torch", "transformers", "requests", "deepspeed"},
    "inspection": {"deepspeed", "torch.distributed", "wsft.world", "wsft.engine"},
    "inspect": {"deepspeed", "requests", "torch", "wsft.world"},
    "journal": {"torch", "requests", "numpy", "json", "wsft.world", "wsft.atropos", "wsft.batching"},
    "stopping": {"torch", "requests", "wsft.world", "wsft.checkpoint"},
    "watchdog": {"torch", "requests", "wsft.world"},
    "checkpoint": {"requests", "wsft.atropos", "wsft.batching", "wsft.groups", "wsft.feed"},
    "base_files": {"torch", "requests", "deepspeed", "wsft.world", "wsft.checkpoint"},
    "contents": {"torch", "requests", "deepspeed", "wsft.world", "wsft.checkpoint"},
    "run_folder": {"torch", "requests", "wsft.world", "wsft.feed"},
    "export": {"requests", "wsft.atropos", "wsft.batching", "wsft.world"},
    "metrics": {"torch", "numpy", "torch.distributed", "wsft.world"},
    "runs": {"torch", "requests", "bokeh", "matplotlib", "wsft.run_folder", "wsft.checkpoint", "wsft.metrics"},
    "panels": {"torch", "requests", "bokeh", "matplotlib"},
    "report": {"torch", "requests", "wsft.run_folder", "wsft.checkpoint", "wsft.metrics"},
    "environment": {"torch"},
    "weighted_texts": {"torch", "requests", "wsft.atropos"},
    "inspect_page": {"torch", "requests", "transformers", "tokenizers", "wsft"},
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


MODULES = {path.stem: imports_of(path) for path in (ROOT / "wsft").glob("*.py") if path.stem != "__init__"}


def test_every_module_has_a_floor():
    assert MODULES.keys() == FLOOR_OF.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for imported in MODULES[name]:
        package, _, module = imported.partition(".")
        module = module.split(".")[0]
        if package == "wsft" and module in FLOOR_OF:
            assert FLOOR_OF[module] < FLOOR_OF[name], f"{name} imports {module}"


@pytest.mark.parametrize("name", NEVER_KNOWS)
def test_modules_stay_ignorant(name):
    for banned in NEVER_KNOWS[name]:
        assert not [i for i in MODULES[name] if i == banned or i.startswith(f"{banned}.")], f"{name} knows {banned}"


def test_only_engine_imports_deepspeed():
    assert [name for name, imports in MODULES.items() if "deepspeed" in {i.split(".")[0] for i in imports}] == ["engine"]


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
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The house") :]
    assert set(re.findall(r"^  (\w+)\.py", tree, re.M)) == MODULES.keys()


def test_the_top_level_holds_only_what_belongs_there():
    allowed = (
        "train.py ds_configs launch wsft tests benchmarks requirements.txt README.md pyproject.toml LICENSE .gitignore .ci"
    )
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {Path(name).parts[0] for name in listed} <= set(allowed.split())
