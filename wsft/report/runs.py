"""Reads the folders of runs: metrics, events, settings, state. Read-only, and safe while a run is active. Knows nothing of
torch or of how a run is shown.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from wsft.config import WeightedSFTConfig
from wsft.errors import UserError

# event -> its metric and, if that is a counter over the run, its initial value
EVENTS = {
    "restarts": ("run/starts", 1),
    "rejected sequences": ("data/rejected", None),
    "possibly lost batches": ("data/possibly_lost_batches", 0),
    "steps not finite": ("steps/not_finite", 0),
}
Occurrences = tuple[np.ndarray, np.ndarray, np.ndarray]  # first step, last step, count
WHEREABOUTS = {"output_dir", "overwrite_output_dir", "resume"}  # settings without effect on learning


@dataclass(frozen=True)
class Run:
    """A run, read from its output_dir. `label` is unique among the runs; `checkpoint` is the metadata of the newest, or {}."""

    folder: Path
    label: str
    lines: list[dict[str, Any]]
    settings: dict[str, Any]
    state: dict[str, Any]
    checkpoint: dict[str, Any]

    @functools.cached_property
    def names(self) -> set[str]:
        return set().union(*self.lines)

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps with the metric (not every batch has every environment), and its values: NaN if not finite."""
        lines = [line for line in self.lines if name in line]
        return np.array([line["step"] for line in lines], np.int32), np.array([line[name] for line in lines], np.float32)

    def events(self, kind: str, width: int) -> Occurrences:
        """Steps with the event; those within the same `width` steps are one entry."""
        name, begins = EVENTS[kind]
        steps, counts = self.curve(name)
        counts = counts if begins is None else np.diff(counts, prepend=np.float32(begins))
        steps, total = steps[counts > 0], np.cumsum(counts[counts > 0], dtype=int)
        stretch = steps // width
        ends = np.flatnonzero(np.diff(stretch, append=-1))
        return steps[np.diff(stretch, prepend=-1) != 0], steps[ends], np.diff(total[ends], prepend=0).astype(np.int32)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs. UserError if a folder is not that of a run, or has no step yet."""
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest suffix of each path that is unique."""

    def ends(folder: Path) -> list[str]:
        return [str(Path(*folder.parts[i:])) for i in range(len(folder.parts) - 1, -1, -1)]

    others = [{end for other in folders if other != folder for end in ends(other)} for folder in folders]
    return [next(end for end in ends(folder) if end not in taken) for folder, taken in zip(folders, others, strict=True)]


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that differ between runs; for a single run those that differ from the default. Dicts are flattened."""
    flat = [dict(_flat(run.settings)) for run in runs]
    defaults = {name: field.get_default() for name, field in WeightedSFTConfig.model_fields.items()}
    compared = flat if len(runs) > 1 else [*flat, dict(_flat(defaults))]
    names = [name for name in dict.fromkeys(name for settings in flat for name in settings) if name not in WHEREABOUTS]
    found = {name: [settings.get(name) for settings in compared] for name in names}
    return {name: values[: len(runs)] for name, values in found.items() if any(value != values[0] for value in values)}


def _read(folder: Path, label: str) -> Run:
    path, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not path.is_file() and not config.is_file():
        there = "it has neither metrics.jsonl nor config.yaml" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder} is not a run: {there}. Give the output_dir of a run, like runs/first")
    lines = _lines(path) if path.is_file() else []
    if not lines:
        raise UserError(f"{folder} has no step yet: metrics.jsonl is missing or empty. Look again after the run's first step")
    settings, state = _mapping(config, yaml.safe_load), _mapping(folder / "state.json", json.loads)
    newest = max(folder.glob("checkpoints/step_*/checkpoint.json"), key=_number, default=folder / "checkpoints")
    return Run(folder, label, lines, settings, state, _mapping(newest, json.loads))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines without an incomplete last one, which is being written or was left by a killed process."""
    found = []
    whole, _, _ = path.read_text(errors="replace").rpartition("\n")
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            if "time/wait" in line:
                line["time/waiting"] = line["time/wait"] / line["time/step"]
            line["step"] += 0  # a number
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise UserError(
                f"line {number} of {path} is not one of a run's: found {text[:60]!r}, expected JSON with a step. "
                f"Take the line out, or give another run"
            ) from error
        found.append(line)
    return found


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """{} without such a file."""
    try:
        found = parse(path.read_text()) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}. Put back the file that the run wrote, or take it away") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected names and values. Put back what the run wrote")
    return found


def _number(path: Path) -> int:
    return int(re.sub(r"\D", "", path.parent.name) or 0)


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in settings.items():
        whole = f"{prefix}{name}"
        pairs += _flat(value, f"{whole}.") if isinstance(value, dict) and value else [(whole, value)]
    return pairs
