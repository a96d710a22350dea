"""python -m wsft.reference > wsft/REFERENCE.md     # every setting and every metric, as the code has them"""

from __future__ import annotations

from wsft.config import WeightedSFTConfig
from wsft.run.measurements import METRICS

SECTIONS = {  # section -> its first setting
    "Model": "model_name",
    "Data": "atropos_url",
    "Optimization": "training_steps",
    "Objective": "objective",
    "Output": "output_dir",
    "Publishing": "publish_folder",
    "Weights & Biases": "wandb_project",
    "Before a run": "dry_run",
}


def reference() -> str:
    titles = {first: title for title, first in SECTIONS.items()}
    lines = [
        "# Settings and metrics",
        "",
        "Written by `python -m wsft.reference` from the code; a test keeps it up to date.",
        "",
        "Settings come from `--config run.yaml`, with flags on top; the same names are the fields of `WeightedSFTConfig`.",
        "An unknown name is an error that suggests a similar one, as is a duplicate key in the YAML or in the DeepSpeed",
        "JSON. Paths may begin with `~` and contain `$VARIABLES`. The resolved settings are in `output_dir/config.yaml`.",
    ]
    for name, field in WeightedSFTConfig.model_fields.items():
        if name in titles:
            lines += ["", f"## {titles[name]}", "", "| setting | default | |", "|---|---|---|"]
        default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {_cell(field.description)} |")
    lines += [
        "",
        "## Metrics",
        "",
        "A line of `output_dir/metrics.jsonl` per step, and the same in W&B. Means are over the tokens of all ranks, computed",
        "from sums and counts; values that are unknown or not finite are null.",
        "",
        "| metric | |",
        "|---|---|",
        *(f"| {' '.join(f'`{name}`' for name in names.split())} | {_cell(text)} |" for names, text in METRICS.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
