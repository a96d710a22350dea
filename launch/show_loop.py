"""Shows what launch/loop.sh learned: the page of the run, some answers before and after, and the reward on held-out questions.

python launch/show_loop.py RUN EVALUATIONS     # writes RUN/report.html and RUN/answers.txt
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

SHOWN = 6


def main(run: Path, evaluations: Path) -> None:
    subprocess.run([sys.executable, "-m", "wsft.report", str(run)], check=True)
    samples, rewards = {}, {}
    for when in ("before", "after"):
        shutil.copytree(evaluations / when, run / when, dirs_exist_ok=True)
        samples[when] = [json.loads(line) for line in (run / when / "samples.jsonl").open()]
        rewards[when] = json.loads((run / when / "metrics.json").read_text())["results"]["all"]["reward"]
    lines = []
    for before, after in list(zip(samples["before"], samples["after"], strict=True))[:SHOWN]:
        lines.append(before["question"])
        for when, sample in (("before", before), ("after", after)):
            lines.append(f"  {when:<7}{sample['reward']:<5g}{' '.join(sample['answer'].split())}")
    (run / "answers.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"metrics: {run / 'metrics.jsonl'}   the run as a page: {run / 'report.html'}   model: {run / 'final'}")
    print(f"reward before {rewards['before']:.2f} after {rewards['after']:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
