"""Panels of a report: curves and events of runs. Long curves are thinned without losing extremes. Knows nothing of pages or
pictures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from wsft.errors import UserError
from wsft.report.runs import EVENTS, Occurrences, Run

COLOURS = ("#3b82d6", "#e0712c", "#2a9d62", "#c84f9b", "#8a6ee0", "#b08a1a", "#1f9aa8", "#d64545")  # on white, on black
DASHES = ("", "6 3", "2 2", "8 3 2 3", "4 2 2 2 2 2")
MEANS = 100  # points of the mean drawn over a long curve


@dataclass(frozen=True)
class Panel:
    """`lines`: label -> name of a metric. `parts`: the same for lines drawn if there are several, with a regular expression
    whose groups may be used in the label."""

    title: str
    lines: dict[str, str]
    log: bool = False
    parts: dict[str, str] = field(default_factory=dict)


PANELS = (
    Panel("loss", {"loss": "loss"}),
    Panel("loss on eval_data", {"loss": "eval/loss"}),
    Panel("mean logp of eval_data", {"favoured": "eval/logp_positive", "disfavoured": "eval/logp_negative"}),
    Panel("score", {"mean": "score/mean"}, parts={r"env \1": r"score/env_(\d+)/mean"}),
    Panel("mean logp of tokens", {"favoured": "logp/positive", "disfavoured": "logp/negative"}),
    Panel("ratio to the sampler", {"mean": "ratio/mean", "highest": "ratio/max"}, log=True),
    Panel("share of ratios clipped", {"clipped": "ratio/clipped"}),
    Panel("staleness in steps", {"mean": "data/staleness"}),
    Panel("KL", {"sampler k1": "kl/behavior_k1", "k3": "kl/behavior_k3", "reference": "kl/reference", "teacher": "kl/teacher"}),
    Panel("entropy", {"entropy": "entropy"}),
    Panel("gradient norm", {"norm": "grad_norm"}),
    Panel("learning rate", {"rate": "learning_rate"}),
    Panel("tokens per second", {"tokens/s": "tokens/per_second"}),
    Panel("shares lost", {"waiting": "time/waiting", "imbalance": "plan/imbalance", "padding": "plan/padding"}),
    Panel("peak memory", {"GiB": "memory/peak_gib"}),
    Panel("seconds to publish weights", {"all": "publish/seconds", "server paused": "publish/pause_seconds"}),
    Panel(
        "difference of a server's logprobs", {"mean": "publish/difference_mean", "highest": "publish/difference_max"}, log=True
    ),
)


@dataclass(frozen=True)
class Curve:
    """A line of a run in a panel; NaN marks gaps. `dash`: lengths of dashes and gaps, empty for a solid line."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    dash: str

    def thinned(self, points: int) -> Curve:
        kept = thin(self.values, points)
        return replace(self, steps=self.steps[kept], values=self.values[kept])

    def averaged(self) -> Curve:
        """Means over equal intervals, to show a trend in noise; the curve itself if it is short."""
        if len(self.steps) < 4 * MEANS:
            return self
        starts, known = np.linspace(0, len(self.steps), MEANS, endpoint=False, dtype=int), np.isfinite(self.values)
        with np.errstate(invalid="ignore"):  # an interval without values is a gap
            means = np.add.reduceat(np.where(known, self.values, 0), starts) / np.add.reduceat(known.astype(np.float32), starts)
        return replace(self, steps=self.steps[starts + len(self.steps) // (2 * MEANS)], values=means)

    def alone(self) -> np.ndarray:
        """Indices of isolated points between gaps, which a line would not show."""
        known = np.pad(np.isfinite(self.values), 1)
        return np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])


def thin(values: np.ndarray, points: int) -> np.ndarray:
    """Indices of about `points` values: minimum and maximum of each of equal intervals, the first and the last, and one NaN
    wherever there are some in between."""
    if len(values) <= points:
        return np.arange(len(values))
    gaps, known = np.flatnonzero(np.isnan(values)), np.flatnonzero(~np.isnan(values))
    stretches = np.array_split(known, min(len(known), max(1, points // (4 if len(gaps) else 2))))
    kept = np.array([known[0], known[-1], *(s[f(values[s])] for s in stretches for f in (np.argmin, np.argmax))])
    after = np.searchsorted(gaps, kept)
    return np.union1d(kept, gaps[after[after < len(gaps)]])


def shown(runs: Sequence[Run]) -> list[tuple[Panel, list[Curve]]]:
    """Panels with their curves, ordered by line and run; those without values are left out. UserError if none is left."""
    found = [(panel, curves) for panel in PANELS if (curves := _curves(panel, runs))]
    if not found:
        raise UserError(f"{runs[0].folder} has steps, but no value that is drawn, like loss: name the output_dir of a run")
    return found


def events_of(runs: Sequence[Run], width: int = 1) -> dict[str, list[Occurrences]]:
    """For each kind of event in any run, the steps of each run."""
    found = {kind: [run.events(kind, width) for run in runs] for kind in EVENTS}
    return {kind: of_runs for kind, of_runs in found.items() if any(len(first) for first, _, _ in of_runs)}


def colour(runs: Sequence[Run], run: int, line: int) -> str:
    """Several runs differ by colour, and their lines by dashes; the lines of one run by colour."""
    return COLOURS[(run if len(runs) > 1 else line) % len(COLOURS)]


def _curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    names = sorted(set().union(*(run.names for run in runs)), key=lambda name: (len(name), name))  # env_2 before env_10
    lines = [(label, name) for label, name in panel.lines.items() if name in names]
    pairs = [(label, re.fullmatch(pattern, name)) for label, pattern in panel.parts.items() for name in names]
    parts = [(match.expand(label), match[0]) for label, match in pairs if match]
    lines += parts if len(parts) > 1 else []
    found = []
    for (i, (label, name)), (r, run) in itertools.product(enumerate(lines), enumerate(runs)):
        steps, values = run.curve(name)
        if np.isfinite(values).any():
            dash = DASHES[i % len(DASHES)] if len(runs) > 1 else ""
            found.append(Curve(label, steps, values, colour(runs, r, i), dash))
    return found
