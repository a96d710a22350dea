"""Synthetic folders of runs, for tests of reports."""

import json

import numpy as np

from wsft import WeightedSFTConfig

PAIRS = {"loss": -1.0, "grad_norm": 2.0, "entropy": 1.5, "tokens/per_second": 12_000, "memory/peak_gib": 61.5}
ANY = {"score/mean": 0.6, "score/env_0/mean": 0.5, "score/env_3/mean": 0.7, "logp/positive": -0.8, "logp/negative": -1.6}
MORE = {"ratio/clipped": 0.02, "kl/behavior_k1": 0.001, "kl/behavior_k3": 0.002, "kl/reference": 0.05, "kl/teacher": 0.3}
PLAN = {"plan/padding": 0.01, "plan/imbalance": 0.04, "time/step": 21.0, "time/wait": 3.0}


def write_run(folder, steps, seed=0, lines=None, **settings):
    """A synthetic run of that many steps; `lines` changes its lines of metrics before they are written."""
    rng, progress = np.random.default_rng(seed), np.arange(1, steps + 1) / steps
    level = {name: np.full(steps, value) for name, value in (PAIRS | ANY | MORE | PLAN).items()}
    columns = {name: value * (1 + 0.4 * progress + 0.15 * rng.normal(size=steps)) for name, value in level.items()}
    columns |= {"ratio/mean": 1 + 0.02 * rng.normal(size=steps), "ratio/max": np.exp(1 + np.abs(rng.normal(size=steps)))}
    columns["learning_rate"] = 1e-6 * np.minimum(1, 20 * progress) * (1 + np.cos(np.pi * progress)) / 2
    columns["time/at"] = 1.79e9 + 21.0 * np.arange(steps)
    rejected = rng.poisson(0.02, steps)
    counts = {
        "step": np.arange(1, steps + 1),
        "run/starts": 1 + (progress > 0.3) + (progress > 0.62),
        "data/rejected": rejected,
    }
    counts |= {"data/possibly_lost_batches": np.cumsum(progress == progress[steps // 2]), "steps/not_finite": 0 * rejected}
    rows = [dict(zip(counts, map(int, row), strict=True)) for row in zip(*counts.values(), strict=True)]
    for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True):
        row |= dict(zip(columns, map(float, values), strict=True))
    for row in rows[:: max(1, steps // 7)]:
        row["ratio/clipped"] = None
    for row in rows[::3]:
        del row["score/env_3/mean"]
    rows = lines(rows) if lines else rows
    (folder / "checkpoints" / f"step_{steps}").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = WeightedSFTConfig(**{"model_name": "some/model", "training_steps": steps, "output_dir": str(folder)} | settings)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "state.json").write_text(json.dumps({"state": "running", "step": steps, "reason": "", "time": "-"}))
    metadata = {"step": steps, "num_ranks": 8, "stage": 3, "precision": "bf16", "versions": {"torch": "2.13.0"}}
    (folder / "checkpoints" / f"step_{steps}" / "checkpoint.json").write_text(json.dumps(metadata))
    return folder
