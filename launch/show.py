"""Shows what a run on the test environment learned: pages of its newest batch and of the run, and logprobs before and after.

python launch/show.py MODEL RUN         # writes RUN/inspect.html, RUN/report.html and RUN/learned.txt
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from wsft import AtroposBatchProcessor, WeightedSFTInterface


def main(model: str, run: Path) -> None:
    subprocess.run([sys.executable, "-m", "wsft.report", str(run)], check=True)
    # a run with one checkpoint has no batch left in its journal
    shown = subprocess.run([sys.executable, "-m", "wsft.inspect", str(run), "--show", "0"]).returncode == 0
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
    lines.append(f"model: {run / 'final'}   metrics: {run / 'metrics.jsonl'}")
    lines.append(f"look at a batch: {run / 'inspect.html' if shown else 'none is kept'}   at the run: {run / 'report.html'}")
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
