"""A page, or a picture, of one or several runs, from their folders:

    python -m wsft.report runs/first                                  # writes runs/first/report.html
    python -m wsft.report runs/first runs/second --html compared.html
    python -m wsft.report runs/first --png curves.png                 # a picture instead

The page is self-contained and stays under 2 MB for runs of any length. Knows nothing of torch or training.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady, DoubleTap, MouseLeave, MouseMove, Tap
from bokeh.models import (
    AdaptiveTicker,
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    CustomJSTickFormatter,
    HoverTool,
    Line,
    NoOverlap,
    NumeralTickFormatter,
    Range1d,
    Span,
    WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wsft.errors import UserError
from wsft.report.panels import MEANS, Curve, Panel, colour, events_of, shown
from wsft.report.runs import Run, differing_settings, read_runs

POINTS = 36_000  # on the page, for all lines and their means: 11 bytes each, in addition to Bokeh's 1.3 MB
STRETCHES = 200  # into which events of a run are binned
TEMPLATE = Path(__file__).with_suffix(".html")


def write_page(runs: Sequence[Run], out: Path) -> None:
    """Write one HTML file, complete or absent: an existing one is replaced at the end."""
    panels = shown(runs)
    points = max(POINTS // sum(len(curves) for _, curves in panels) - MEANS, 40)
    longest = max(len(curve.steps) for _, curves in panels for curve in curves)
    notes = [f"{longest:,} steps, drawn {points:,} points a line: the lowest and highest of each stretch."] * (longest > points)
    notes += ["Bold: the mean of each hundredth of the run."] * (longest >= 4 * MEANS)
    plots = _Plots(runs)
    figures = [plots.panel(panel, curves, points) for panel, curves in panels] + plots.strip()
    plots.join(figures)
    script, divs = components(figures)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    text = page.render(
        runs=[(run.label, colour(runs, r, 0) if len(runs) > 1 else "inherit") for r, run in enumerate(runs)],
        panels=[(panel.title, div, _keys(curves)) for (panel, curves), div in zip(panels, divs, strict=False)],
        strip=divs[len(panels) :],
        notes=notes,
        metadata=_metadata(runs),
        settings={name: [_text_of(value) for value in values] for name, values in differing_settings(runs).items()},
        scripts=[Resources(mode="inline", components=["bokeh"]).render_js(), script],
    )
    _replace(out, text.encode())


def write_picture(runs: Sequence[Run], out: Path) -> None:
    """The same panels as a PNG, with every point."""
    panels, events = shown(runs), events_of(runs)
    rows = -(-(len(panels) + bool(events)) // 3)
    picture = Figure(figsize=(15, 2.6 * rows + 0.4), layout="constrained")
    places = iter(picture.subplots(rows, 3, squeeze=False).flat)
    for (panel, curves), axes in zip(panels, places, strict=False):
        _draw(axes, panel, curves)
    if events:
        axes = next(places)
        for row, of_runs in enumerate(events.values()):
            for r, (steps, _, _) in enumerate(of_runs):
                axes.plot(steps, np.full(len(steps), row + (r + 0.5) / len(runs)), "|", color=colour(runs, r, row))
        axes.set_yticks([row + 0.5 for row in range(len(events))], events)
        axes.set_ylim(len(events), 0)
    for axes in places:
        axes.set_axis_off()
    colours = [colour(runs, r, 0) if len(runs) > 1 else "none" for r in range(len(runs))]
    names = [" " + run.label.replace("$", r"\$") for run in runs]  # matplotlib interprets $, and drops labels that start with _
    handles = [Line2D([], [], color=of_run) for of_run in colours]
    picture.legend(handles, names, loc="outside upper center", ncols=len(runs), frameon=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=100)
    _replace(out, buffer.getvalue())


def _draw(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    for curve in curves:
        axes.plot(curve.steps, curve.values, color=curve.colour, alpha=0.3, marker=".", markevery=curve.alone().tolist())
        line, dashes = curve.averaged(), (0, [*map(int, curve.dash.split())])
        axes.plot(line.steps, line.values, color=curve.colour, linestyle=dashes if curve.dash else "-", label=curve.label)
    axes.set_title(panel.title)
    axes.set_yscale("log" if panel.log else "linear")
    handles, labels = axes.get_legend_handles_labels()
    if len(set(labels)) > 1:
        named = dict(zip(reversed(labels), reversed(handles), strict=True))  # for several runs, those of the first
        axes.legend(reversed(named.values()), reversed(named), fontsize="x-small")


class _Plots:
    """Bokeh's figures with a common axis of steps, and tools that move them together."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        first, last = min(run.lines[0]["step"] for run in runs), max(run.lines[-1]["step"] for run in runs)
        self.width = -(-(last - first + 1) // STRETCHES)
        self.steps = Range1d(first - 0.5, last + 0.5, bounds="auto", min_interval=1)
        self.cursor = Span(dimension="height", line_color="#888888")
        self.drags: list[BoxZoomTool] = []
        self.sources: list[list[ColumnDataSource]] = []  # of each panel, in the order of its curves

    def panel(self, panel: Panel, curves: list[Curve], points: int) -> figure:
        plot = self._figure(height=190, y_axis_type="log" if panel.log else "linear", min_border_left=52)
        plot.yaxis.formatter = CustomJSTickFormatter(code="return told(tick, 8)")
        if not panel.log:  # a constant is centred, with a range of its own magnitude
            plot.y_range.default_span = max(float(np.nanmax(np.abs(curve.values))) for curve in curves) or 1

        def draw(curve: Curve, **style) -> ColumnDataSource:
            source = ColumnDataSource({"x": curve.steps, "y": curve.values})
            plot.add_glyph(source, Line(x="x", y="y", line_color=curve.colour, **style))
            return source

        thinned = [curve.thinned(points) for curve in curves]
        self.sources.append([draw(curve, line_alpha=0.3) for curve in thinned])
        for curve, whole in zip(thinned, curves, strict=True):
            draw(whole.averaged(), line_dash=curve.dash, line_width=1.8)
            if len(alone := curve.alone()):
                plot.scatter(curve.steps[alone], curve.values[alone], color=curve.colour, size=3)
        return plot

    def strip(self) -> list[figure]:
        """Events of the runs, a row per kind and run; None without events."""
        events, tall = events_of(self.runs, self.width), 1 / len(self.runs)
        if not events:
            return []
        plot = self._figure(height=30 + len(events) * max(16, 6 * len(self.runs)), y_range=(len(events), 0))
        for row, (kind, of_runs) in enumerate(events.items()):
            for r, (first, last, count) in enumerate(of_runs):
                where = [f"step {a:,}" if a == b else f"steps {a:,} to {b:,}" for a, b in zip(first, last, strict=True)]
                data = {"left": first - np.float32(0.5), "right": last + np.float32(0.5), "count": count, "where": where}
                place = {"y": row + (r + 0.5) * tall, "height": 0.8 * tall, "left": "left", "right": "right"}
                style = {"color": colour(self.runs, r, row), "line_width": 1.5}
                name = f"{self.runs[r].label}: {kind}" if len(self.runs) > 1 else kind
                plot.hbar(**place, **style, source=ColumnDataSource(data), name=name)
        plot.add_tools(HoverTool(tooltips="$name: @count, @where", mode="vline", attachment="below"))
        plot.yaxis.ticker = [row + 0.5 for row in range(len(events))]
        plot.yaxis.major_label_overrides = {row + 0.5: kind for row, kind in enumerate(events)}
        plot.yaxis.major_tick_line_color = plot.ygrid.grid_line_color = None
        return [plot]

    def join(self, plots: list[figure]) -> None:
        """One document of all figures, with linked hover and ranges."""
        document, args = Document(), {"sources": self.sources, "steps": self.steps, "drags": self.drags}
        read = CustomJS(args=args, code="read(sources, cb_obj.x)")
        leave = CustomJS(args=args, code="read(sources, Infinity)")
        whole = CustomJS(args=args, code="steps.reset()")
        for plot in plots:
            for event, code in ((MouseMove, read), (Tap, read), (MouseLeave, leave), (DoubleTap, whole)):
                plot.js_on_event(event, code)
        document.js_on_event(DocumentReady, CustomJS(args=args, code="ready(sources, steps, drags)"))
        with document.models.freeze():  # else Bokeh recomputes all of them for each
            for plot in plots:
                document.add_root(plot)

    def _figure(self, **options) -> figure:
        bare = {"tools": "", "toolbar_location": None, "sizing_mode": "stretch_width"}
        plot = figure(x_range=self.steps, window_axis="x", min_border_right=20, **bare, **options)
        # without Ctrl the wheel scrolls the page
        drag, wheel = BoxZoomTool(dimensions="width"), WheelZoomTool(dimensions="width", modifiers="ctrl")
        self.drags.append(drag)
        plot.add_tools(drag, wheel, CrosshairTool(overlay=self.cursor))
        plot.toolbar.active_scroll = wheel
        plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
        plot.axis.axis_line_color = plot.axis.minor_tick_line_color = None
        plot.axis.major_tick_line_color = plot.grid.grid_line_color = "#88888840"
        plot.xaxis.ticker, plot.xaxis.formatter = AdaptiveTicker(min_interval=1), NumeralTickFormatter(format="0,0")
        plot.xaxis.major_label_policy = NoOverlap(min_distance=8)
        return plot


def _keys(lines: list[Curve]) -> dict[tuple[str, str], list[str]]:
    """(label, dash) -> colours of the runs with that line, in order."""
    keys: dict[tuple[str, str], list[str]] = {}
    for curve in lines:
        keys.setdefault((curve.label, curve.dash), []).append(curve.colour)
    return keys


def _metadata(runs: Sequence[Run]) -> dict[str, list[str]]:
    """A table with the state of the runs."""
    columns = []
    for run in runs:
        last, saved = run.lines[-1], run.checkpoint
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last["time/at"])) if "time/at" in last else ""
        reason = f" ({run.state['reason']})" if run.state.get("reason") else ""
        ranks = f"{saved['num_ranks']}, ZeRO stage {saved['stage']}, {saved['precision']}" if saved else ""
        columns.append(
            {
                "folder": str(run.folder),
                "state": run.state.get("state", "unknown") + reason,
                "steps": f"{last['step']:,} of {run.settings.get('training_steps', '?')}",
                "starts": str(last.get("run/starts", "")),
                "last step at": at,
                "newest checkpoint": f"step {saved['step']:,}" if saved else "none",
                "ranks": ranks,
                "versions": ", ".join(f"{name} {number}" for name, number in saved.get("versions", {}).items()),
            }
        )
    return {name: [column[name] for column in columns] for name in columns[0] if any(column[name] for column in columns)}


def _text_of(value: object) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)


def _replace(out: Path, content: bytes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}")
    aside.write_bytes(content)
    aside.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wsft.report", description="Show one or several runs on one page.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="path of the page; if unset report.html in the run, or here for several"
    )
    parser.add_argument("--png", type=Path, metavar="OUT", help="a picture, instead of the page unless --html is given too")
    args = parser.parse_args()
    page = args.html or (None if args.png else (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html")
    try:
        runs = read_runs(args.runs)
        for write, out in ((write_page, page), (write_picture, args.png)):
            if out:
                write(runs, out)
                print(out.absolute())
    except (UserError, OSError) as error:
        sys.exit(f"report: error: {error}")
