"""Reports of synthetic runs: what is read, what is drawn, and errors if there is nothing to show."""

import itertools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from made_runs import write_run

from wsft import WeightedSFTConfig
from wsft.report.page import main, write_page, write_picture
from wsft.report.panels import events_of, shown, thin
from wsft.report.runs import differing_settings, labels, read_runs
from wsft.run.metrics import Metrics
from wsft.run.output_folder import RunFolder

REQUIRED = {
    "loss": -1.0,
    "grad_norm": 2.0,
    "tokens/per_second": 9.0,
    "time/step": 2.0,
    "time/wait": 1.0,
    "memory/peak_gib": 3.0,
}


def report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    main()


def curves_of(runs):
    return {(panel.title, curve.label): curve for panel, curves in shown(runs) for curve in curves}


def test_lines_are_dated_and_say_which_start_of_the_run_wrote_them(tmp_path):
    """The third start goes back behind all that the second wrote, and is the third still."""
    config = WeightedSFTConfig(model_name="m", output_dir=str(tmp_path))
    for begins, ends in ((0, 3), (2, 4), (1, 2)):
        metrics = Metrics(config, tmp_path, begins)
        for step in range(begins + 1, ends + 1):
            metrics.step({"step": step} | REQUIRED)
        metrics.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "run/st')
    (run,) = read_runs([tmp_path])
    assert [(line["step"], line["run/starts"]) for line in run.lines] == [(1, 1), (2, 3)]
    assert run.lines[0]["time/at"] <= run.lines[1]["time/at"] == round(run.lines[1]["time/at"], 3)


def test_a_run_from_before_starts_were_counted_has_started_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    metrics = Metrics(WeightedSFTConfig(model_name="m", output_dir=str(tmp_path)), tmp_path, 1)
    metrics.step({"step": 2} | REQUIRED)
    metrics.close()
    assert read_runs([tmp_path])[0].lines[1]["run/starts"] == 2


@given(st.lists(st.one_of(st.just(math.nan), st.floats(-9, 9)), max_size=200), st.integers(1, 50))
def test_a_thinned_curve_hides_no_extreme_and_no_gap(values, points):
    values = np.append(values, 1.0)
    kept = thin(values, points)
    assert (np.diff(kept) > 0).all() and len(kept) <= max(2 * points, 10)
    assert np.nanmin(values[kept]) == np.nanmin(values) and np.nanmax(values[kept]) == np.nanmax(values)
    known = np.flatnonzero(np.isfinite(values))
    assert {known[0], known[-1]} <= set(kept)
    for first, last in itertools.pairwise(kept):  # where the line goes straight from one to the other
        if np.isfinite(values[[first, last]]).all():
            assert np.isfinite(values[first : last + 1]).all()


def test_a_thinned_curve_has_the_lowest_and_the_highest_of_each_stretch():
    values = np.random.default_rng(0).normal(size=10_000)
    kept = thin(values, 100)
    stretches = values.reshape(50, 200)
    assert set(values[kept]) == {*stretches.min(1), *stretches.max(1), values[0], values[-1]}
    assert (thin(values, 10_000) == np.arange(10_000)).all()


def test_null_is_a_gap_and_an_absent_environment_none(tmp_path):
    def lines(rows):
        rows[1]["loss"] = rows[3]["loss"] = None
        return rows

    curves = curves_of(read_runs([write_run(tmp_path / "run", 9, lines=lines)]))
    assert np.flatnonzero(np.isnan(curves["loss", "loss"].values)).tolist() == [1, 3]
    assert curves["loss", "loss"].alone().tolist() == [0, 2]  # which a line would not show
    assert curves["score", "env 3"].steps.tolist() == [2, 3, 5, 6, 8, 9]
    assert np.isfinite(curves["score", "env 3"].values).all()


def test_what_a_run_does_not_have_is_not_drawn(tmp_path):
    def lines(rows):
        return [{name: value for name, value in row.items() if name != "kl/teacher"} | {"entropy": None} for row in rows]

    curves = curves_of(read_runs([write_run(tmp_path / "run", 9, lines=lines)]))
    assert ("KL", "reference") in curves and ("KL", "teacher") not in curves and ("entropy", "entropy") not in curves


def test_waiting_is_a_share_of_the_step(tmp_path):
    (run,) = runs = read_runs([write_run(tmp_path / "run", 5)])
    share = [line["time/wait"] / line["time/step"] for line in run.lines]
    assert curves_of(runs)["shares lost", "waiting"].values == pytest.approx(share)


def test_the_course_of_a_long_curve_is_its_means(tmp_path):
    (run,) = runs = read_runs([write_run(tmp_path / "run", 1000)])
    line = curves_of(runs)["loss", "loss"].averaged()
    losses = np.array([line["loss"] for line in run.lines]).reshape(100, 10)
    assert line.values == pytest.approx(losses.mean(1), rel=1e-5) and line.steps.tolist() == list(range(6, 1000, 10))
    clipped = curves_of(runs)["share of ratios clipped", "clipped"]
    assert np.isfinite(clipped.averaged().values).all()  # a few nulls are no gap of a mean
    short = curves_of(read_runs([write_run(tmp_path / "short", 40)]))["loss", "loss"]
    assert short.averaged() is short


def test_events_are_found_where_they_befell_the_run(tmp_path):
    def lines(rows):
        for i, row in enumerate(rows):
            row |= {"run/starts": 1 if i < 3 else 4, "data/rejected": 5 * (i in (2, 4, 5)), "steps/not_finite": int(i > 7)}
            row["data/possibly_lost_batches"] = 0
        return rows

    runs = read_runs([write_run(tmp_path / "run", 10, lines=lines)])
    found = {kind: [array.tolist() for array in of_runs[0]] for kind, of_runs in events_of(runs).items()}
    assert found == {
        "restarts": [[4], [4], [3]],
        "rejected sequences": [[3, 5, 6], [3, 5, 6], [5, 5, 5]],
        "steps not finite": [[9], [9], [1]],
    }
    first, last, count = events_of(runs, width=4)["rejected sequences"][0]
    assert (first.tolist(), last.tolist(), count.tolist()) == ([3, 5], [3, 6], [5, 10])


def crowded(rows):
    """Eight environments, and something befalls the run at every step."""
    for i, row in enumerate(rows):
        row |= {f"score/env_{e}/mean": (i * 7919 + e) % 101 for e in range(8)}
        row |= {"data/rejected": 1, "data/possibly_lost_batches": i, "steps/not_finite": i}
    return rows


@pytest.mark.parametrize("number", [1, 4])
def test_a_page_of_ten_thousand_steps_is_under_2_mb(number, tmp_path, monkeypatch, capsys):
    folders = [write_run(tmp_path / f"sweep/{i}/run", 10_000, seed=i, lines=crowded) for i in range(number)]
    monkeypatch.chdir(tmp_path)
    report(monkeypatch, *folders)
    page = (folders[0] if number == 1 else tmp_path) / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert 1_300_000 < page.stat().st_size < 2_000_000
    assert re.search(r"10,000 steps, drawn [\d,]+ points a line: the lowest and highest of each stretch", page.read_text())


def test_settings_are_shown_that_differ_or_are_not_the_default(tmp_path):
    stages = [{"zero_optimization": {"stage": stage}} for stage in (2, 3)]
    one = write_run(tmp_path / "one", 2, deepspeed=stages[0], learning_rate=1e-5)
    two = write_run(tmp_path / "two", 2, deepspeed=stages[1], learning_rate=1e-5, objective="cispo", kl_coef=0.1)
    assert differing_settings(read_runs([one, two])) == {
        "deepspeed.zero_optimization.stage": [2, 3],
        "objective": ["weighted_sft", "cispo"],
        "kl_coef": [0.0, 0.1],
    }
    alone = {"model_name": ["some/model"], "training_steps": [2], "learning_rate": [1e-5]}
    assert differing_settings(read_runs([one])) == {"deepspeed.zero_optimization.stage": [2]} | alone


def test_runs_are_called_by_the_shortest_end_of_their_path_that_no_other_has(tmp_path):
    paths = [tmp_path / path for path in ("a/x/run", "b/x/run", "b/y/run", "other")]
    assert labels(paths) == ["a/x/run", "b/x/run", "y/run", "other"]
    assert labels([tmp_path / "run", tmp_path / "in" / "run"])[1] == "in/run"
    folder = write_run(tmp_path / "run", 1)
    assert len(read_runs([folder, folder / "..", folder][::2])) == 1


def test_what_a_run_is_called_and_set_to_is_text_on_the_page(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>", 3, model_name="</script><script>alert(2)</script>")
    report(monkeypatch, folder, "--html", tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "alert(2)</script>" not in page and "&lt;/script&gt;&lt;script&gt;alert(2)" in page


def test_a_run_that_is_still_going_is_shown_as_far_as_it_is(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", 5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": -1.2, "data/rej')
    (folder / "state.json").unlink()
    (folder / "config.yaml").unlink()
    (folder / "checkpoints" / "step_5" / "checkpoint.json").rename(folder / "elsewhere")
    report(monkeypatch, folder)
    page = (folder / "report.html").read_text()
    assert "<td>5 of ?</td>" in page and "<td>unknown</td>" in page and "<td>none</td>" in page


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(tmp_path):
    folder = write_run(tmp_path / "run", 100)
    for step in (9, 20):
        (folder / f"checkpoints/step_{step}").mkdir()
        (folder / f"checkpoints/step_{step}/checkpoint.json").write_text(json.dumps({"step": step}))
    assert read_runs([folder])[0].checkpoint["step"] == 100


def test_a_picture_is_drawn_of_one_run_or_several(tmp_path, monkeypatch, capsys):
    folders = [write_run(tmp_path / name, 500) for name in (r"$\no$", "_b")]
    report(monkeypatch, *folders, "--png", tmp_path / "both.png")
    write_picture(read_runs([write_run(tmp_path / "short", 1)]), tmp_path / "short.png")
    for name in ("both", "short"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 30_000
    assert capsys.readouterr().out == f"{tmp_path / 'both.png'}\n" and not list(tmp_path.rglob("*.html"))


def no_metrics(folder):
    (folder / "metrics.jsonl").unlink()


def empty_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo')


def foreign_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"epoch": 1}\n{"step": 3}\n')


def broken_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss\n{"step": 3}\n')


def bare_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')


def listed_config(folder):
    (folder / "config.yaml").write_text("- a\n- b\n")


def broken_config(folder):
    (folder / "config.yaml").write_text("a: [")


def broken_state(folder):
    (folder / "state.json").write_text("{")


def empty_folder(folder):
    no_metrics(folder)
    (folder / "config.yaml").unlink()


@pytest.mark.parametrize(
    "spoil, output",
    [
        (no_metrics, "has no step yet: metrics.jsonl is missing or empty. Look again after the run's first step"),
        (empty_metrics, "has no step yet"),
        (
            foreign_metrics,
            r"line 2 of .*metrics.jsonl is not one of a run's: found '\{\"epoch\": 1\}', expected JSON with a step",
        ),
        (broken_metrics, "line 2 of .*metrics.jsonl is not one of a run's: found .* Take the line out, or give another run"),
        (bare_metrics, "has steps, but no value that is drawn, like loss: name the output_dir of a run"),
        (listed_config, "config.yaml holds list, expected names and values"),
        (broken_config, "config.yaml cannot be read: .*Put back the file that the run wrote"),
        (broken_state, "state.json cannot be read: .*Put back"),
        (empty_folder, "is not a run: it has neither metrics.jsonl nor config.yaml. Give the output_dir of a run"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(spoil, output, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", 3)
    spoil(folder)
    with pytest.raises(SystemExit, match=f"(?s)^report: error: .*{output}"):
        report(monkeypatch, folder)
    assert not list(tmp_path.rglob("*.html"))


def test_the_command_fails_with_a_sentence_and_loads_no_torch(tmp_path):
    write_run(tmp_path / "run", 3)

    def run(*arguments):
        command = [sys.executable, "-X", "importtime", "-m", "wsft.report", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    wrong = run(tmp_path / "nowhere")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert wrong.stderr.endswith("is not a run: there is no such folder. Give the output_dir of a run, like runs/first\n")
    right = run(tmp_path / "run", "--png", tmp_path / "run")  # where a folder is
    assert right.returncode == 1 and "Is a directory" in right.stderr and "Traceback" not in right.stderr
    assert not re.search(r"\| +(torch|deepspeed|transformers)\n", right.stderr)


def test_an_overwritten_run_takes_its_pages_with_it(tmp_path):
    folder = write_run(tmp_path / "run", 3)
    write_page(read_runs([folder]), folder / "report.html")
    (folder / "inspect.html").write_text("page")
    config = WeightedSFTConfig(**yaml.safe_load((folder / "config.yaml").read_text()) | {"overwrite_output_dir": True})
    opened = RunFolder(config)
    opened.open(config, {})
    opened.close()
    assert not list(folder.glob("*.html"))
