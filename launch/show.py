"""What a run on the test environment taught: a picture of the run, and the model before and after on the same groups of it.

python launch/show.py MODEL RUN         # writes RUN/curves.png and RUN/learned.txt
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM

from wsft import AtroposBatchProcessor, WeightedSFTInterface


def main(model: str, run: Path) -> None:
    draw(run)
    groups = run / "groups.jsonl"
    command = [sys.executable, "-m", "wsft.environment", "--tokenizer", model, "--pattern", "mixed", "--seed", "1000"]
    subprocess.run([*command, "--groups", "6", "--group_size", "4", "--output", str(groups)], check=True)
    processor = AtroposBatchProcessor()
    rows = processor.to_tensors(processor.process_atropos_batch([json.loads(line) for line in groups.open()]))
    before, after = logps(model, rows), logps(str(run / "final"), rows)
    lines = ["mean log-probability a token   before    after   change"]
    for kind, old, new in zip(("favoured", "disfavoured"), before, after, strict=True):
        lines.append(f"{kind:<28}{old:9.3f}{new:9.3f}{new - old:+9.3f}")
    learned = after[0] > before[0] and after[1] < before[1]
    lines.append(
        "favoured tokens became likelier, disfavoured ones less likely"
        if learned
        else "NOT LEARNED: favoured tokens should have become likelier and disfavoured ones less likely"
    )
    lines.append(f"model: {run / 'final'}   metrics: {run / 'metrics.jsonl'}   picture: {run / 'curves.png'}")
    (run / "learned.txt").write_text("\n".join(lines) + "\n")
    if not learned:
        sys.exit("\n".join(lines))


@torch.no_grad()
def logps(folder: str, rows: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Mean logp of the trained tokens with positive and with negative advantage."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    parts = []
    for b in range(0, len(rows["tokens"]), 4):
        part = {name: rows[name][b : b + 4].to(device) for name in ("tokens", "loss_masks", "advantages")}
        logits = model(input_ids=part["tokens"]).logits
        parts.append(WeightedSFTInterface().compute_weighted_loss(logits, **part)["token_logprobs"].cpu())
    logp, trained = torch.cat(parts), rows["loss_masks"]
    return tuple(logp[trained & (sign * rows["advantages"] > 0)].mean().item() for sign in (1, -1))


def draw(run: Path) -> None:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="black")
    left.set(title="loss", xlabel="step")
    for name, colour in (("positive", "tab:green"), ("negative", "tab:red")):
        label = {"positive": "favoured", "negative": "disfavoured"}[name]
        right.plot([s["step"] for s in steps], [s[f"logp/{name}"] for s in steps], color=colour, label=label)
    right.set(title="mean log-probability of trained tokens", xlabel="step")
    right.legend()
    figure.tight_layout()
    figure.savefig(run / "curves.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
