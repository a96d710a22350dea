"""The table of benchmarks/ARCHITECTURES.md, from the output of test_zoo.py: python tests/zoo_table.py TABLE.jsonl..."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

EXACT = 2e-5
CHAOTIC = 1e-2  # relative error of float32 itself from which on an error says nothing: train at a smaller learning rate
COLUMNS = "architecture", "class", "error", "rows", "dry run"


def is_exact(row):
    """Whether a model was trained exactly, or as well as transformers' code in float32, and exported as it is."""
    in_float32 = row.get("float32", 0)
    return row["error"] <= max(EXACT, 5 * in_float32) and in_float32 < CHAOTIC and not row["export"]


def cells(row):
    """The kind of a row, and its cells."""
    if "untried" in row:
        reason = row["untried"].strip().splitlines()[-1]
        return "not tried", (row["name"], "", "", f"not tried: {reason.strip()[:110]}", "")
    if "refused" in row:
        same = row.get("dry") == row["refused"]
        return "refused", (
            row["name"],
            row["class"],
            "",
            _without_folders(row["refused"]),
            "same" if same else "not seen",
        )
    kind = f"exact, {row['layout']}" if is_exact(row) else "not exact"
    error = f"{row['error']:.1e}" + (f" (float32 itself {row['float32']:.1e})" if "float32" in row else "")
    return kind, (row["name"], row["class"], error, row["layout"], row.get("dry", "runs"))


def _without_folders(sentence):
    return re.sub(r"'/[^']*/([^/']+)'", r"'\1'", sentence.removeprefix("error: "))


def main(*paths):
    rows = {row["name"]: row for path in paths for row in map(json.loads, Path(path).read_text().splitlines())}
    made = [cells(row) for row in rows.values()]
    print(", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kind for kind, _ in made).items())) + ".\n")
    for line in (COLUMNS, ["---"] * len(COLUMNS), *sorted(line for _, line in made)):
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
