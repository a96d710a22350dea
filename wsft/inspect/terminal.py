"""Shows a batch as training sees it: its text, the weight of each token, and findings of the checks.

    python -m wsft.inspect rollouts.jsonl --tokenizer FOLDER            # the first batch_size sequences; --batch 1 for the next
    python -m wsft.inspect runs/first                                   # a run's journal, its newest batch; or --batch 7
    python -m wsft.inspect http://host:8000 --tokenizer FOLDER          # the group posted last; takes nothing from the queue
    python -m wsft.inspect runs/first --model runs/first/final          # with the policy's logps, ratios and weights

Prints findings, groups and the first rollouts, and writes all rollouts into one self-contained HTML page. Settings of train.py
may follow (--objective, --batch_size, --score_advantages, ...); those of a run come from its config.yaml. Decoding, advantages
and weights are computed by the code that trains. Without --model the policy is assumed to be the sampler: ratios are 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from wsft.config import WeightedSFTConfig, without_password
from wsft.errors import UserError
from wsft.inspect.page import page
from wsft.inspect.view import Inspected, inspect
from wsft.loss.advantages import Override
from wsft.rollouts.decoder import REJECTED

PROG = "python -m wsft.inspect"
TOKENS_SHOWN = 800  # tokens of a rollout shown in the terminal
CONTEXT_SHOWN = 100  # tokens shown around trained ones in a long rollout
PARTS_OF_A_CHARACTER = 8  # tokens at most
OVERRIDES = {Override.NONE: "", Override.ZERO: "set_advantage_to_zero", Override.SFT: "sft", Override.CUT_OFF: "cut off"}


def main(argv: list[str] | None = None) -> None:
    args, config = read_args(argv)
    logging.getLogger("wsft").setLevel(logging.ERROR)  # warnings of the decoder are among the findings
    disable_progress_bar()
    os.umask(0o077)  # rollouts may hold anything: the page is readable by its owner only
    try:
        found = inspect(args.source, args.batch, config, args.model)
        view = view_of(found, args.model)
        Path(args.html).write_text(page(view), encoding="utf-8")
    except (UserError, OSError) as error:
        sys.exit(f"{PROG}: error: {error}")
    show(view, Console(highlight=False), args.show)
    print(f"all {len(view['rollouts'])} sequences, with the numbers of each token: {args.html}")


def read_args(argv: list[str] | None) -> tuple[argparse.Namespace, WeightedSFTConfig]:
    """The arguments of this command, and the settings for decoding and weights."""
    description = "Show a batch as training sees it. Settings of train.py may follow: --objective, --batch_size, --config, ..."
    parser = argparse.ArgumentParser(prog=PROG, description=description, allow_abbrev=False)
    parser.add_argument("source", help="JSONL file of groups, output_dir of a run, or URL of an Atropos server")
    parser.add_argument("--tokenizer", help="folder or hub name; for a run, its own if unset")
    parser.add_argument("--model", help="folder or hub name of the policy whose logps are compared with the sampler's")
    parser.add_argument("--batch", type=int, help="index from 0; if unset the newest of a run, the first of a file")
    parser.add_argument("--show", type=int, default=3, help="sequences shown in the terminal; the page has all")
    parser.add_argument("--html", help="path of the page; next to the source if unset")
    args, settings = parser.parse_known_args(argv)
    run = Path(args.source) / "config.yaml"
    if run.exists() and "--config" not in " ".join(settings):
        settings = ["--config", str(run), *settings]
    elif Path(args.source).is_dir() and not run.exists():
        parser.error(f"{args.source} is a folder without config.yaml: expected the output_dir of a run, a JSONL file, or a URL")
    elif not any(word.startswith(("--config", "--model_name")) for word in settings):
        if not (args.tokenizer or args.model):
            parser.error(f"name the tokenizer of {without_password(args.source)} with --tokenizer FOLDER")
        settings += ["--model_name", args.model or args.tokenizer]
    if args.tokenizer:
        settings += ["--tokenizer_name", args.tokenizer]
    args.html = args.html or _beside(args.source)
    return args, WeightedSFTConfig.from_args(settings, PROG)


def _beside(source: str) -> str:
    if "://" in source:
        return "latest_example.html"
    return str(Path(source) / "inspect.html" if Path(source).is_dir() else Path(source).with_suffix(".html"))


# -- as text -----------------------------------------------------------------------------------------------------------------


def pieces(tokenizer: PreTrainedTokenizerBase, rows: Sequence[np.ndarray]) -> list[list[str]]:
    """The text of each token of each row. A character that several tokens form is shown at the last, with an ellipsis at the
    others."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # decoding strips a space before the first token
    lead = tokenizer.decode(anchor)

    def text(ids: list[int]) -> str:
        whole = tokenizer.decode(anchor + ids)
        return whole.removeprefix(lead) if whole.startswith(lead) else tokenizer.decode(ids)

    alone = {i: text([i]) or f"<{i}>" for i in {i for row in rows for i in row.tolist()}}
    found = []
    for ids in map(np.ndarray.tolist, rows):
        texts, n = [alone[i] for i in ids], 0
        while n < len(ids):
            for end in range(n + 2, min(n + PARTS_OF_A_CHARACTER, len(ids)) + 1) if "\ufffd" in texts[n] else ():
                whole = text(ids[n:end])
                if "\ufffd" not in whole:
                    texts[n:end] = ["\N{HORIZONTAL ELLIPSIS}"] * (end - n - 1) + [whole]
                    n = end - 1
                    break
            n += 1
        found.append(texts)
    return found


def view_of(found: Inspected, policy: str | None) -> dict[str, Any]:
    """The data to show, in the format of `page.page`."""
    view, batch, config = found.view, found.view.batch, found.config
    texts = list(chain(*pieces(found.tokenizer, [rollout.tokens for rollout in view.rollouts])))
    numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    logp_N = np.full(len(batch.tokens), np.nan, np.float32) if view.logp_N is None else view.logp_N
    tokens = {
        "piece": np.array([numbers[text] for text in texts], dtype=np.int32),
        "id": batch.tokens.astype(np.int32),
        "mask": batch.loss_mask.astype(np.uint8),
        "advantage": batch.advantages.astype(np.float32),
        "behavior_logp": batch.behavior_logp,
        "weight": found.weights_N,
    }
    if policy:
        tokens |= {"logp": logp_N, "ratio": np.exp(logp_N - batch.behavior_logp)}
    rollouts, groups = [], {}
    for r, (rollout, span) in enumerate(zip(view.rollouts, batch.spans(), strict=True)):
        trained = batch.loss_mask[span]
        rollouts.append({
            "sequence": rollout.origin.sequence,
            "score": _number(rollout.score),
            "advantage": _mean(batch.advantages[span][trained]),
            "override": OVERRIDES[rollout.override],
            "temperature": config.temperature if np.isnan(rollout.temperature) else rollout.temperature,
            "tokens": len(trained),
            "trained": int(trained.sum()),
            "logp": _mean(logp_N[span][trained]),
        })  # fmt: skip
        _group(groups, rollout.origin)["rollouts"].append(r)
    for reason, faults in view.faults.items():
        for origin, detail in faults:
            rejected = {"sequence": origin.sequence, "reason": reason, "detail": detail, "rejected": reason in REJECTED}
            _group(groups, origin)["rejected"].append(rejected)
    metadata = {
        "objective": config.objective, "reduction": config.reduction, "advantages": config.advantage_normalization,
        "tokenizer": config.tokenizer_name or config.model_name, "policy": policy or "assumed to be the sampler",
    }  # fmt: skip
    return {
        "title": found.title, "metadata": metadata, "pieces": list(numbers), "groups": list(groups.values()),
        "rollouts": rollouts, "tokens": tokens, "names": view.names,
        "findings": [{"text": f.text, "places": f.places, "message": f.describe(view.names)} for f in found.findings],
    }  # fmt: skip


def _group(groups: dict[str, dict], origin: Any) -> dict[str, Any]:
    record = origin.record if isinstance(origin.record, dict) else {}
    scores, env = record.get("scores"), record.get("env_id")
    return groups.setdefault(origin.name, {
        "name": origin.name, "env_id": env if isinstance(env, int) else None, "rollouts": [], "rejected": [],
        "scores": [_number(x) for x in scores] if isinstance(scores, list | np.ndarray) else [],
    })  # fmt: skip


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float | np.number) and np.isfinite(value)
    return float(value) if known else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


# -- in the terminal ---------------------------------------------------------------------------------------------------------


def show(view: dict[str, Any], console: Console, rollouts: int) -> None:
    console.print(Text(view["title"], style="bold"))
    console.print(Text("  ".join(f"{name} {value}" for name, value in view["metadata"].items()), style="dim"))
    for finding in view["findings"]:
        console.print(Text(f"looks wrong: {finding['message']}", style="yellow"))
    if not view["findings"]:
        console.print("nothing looks wrong")
    console.print(_groups_table(view))
    starts = np.cumsum([0, *(rollout["tokens"] for rollout in view["rollouts"])])
    for r, rollout in enumerate(view["rollouts"][:rollouts]):
        about = {"score": rollout["score"], "advantage": rollout["advantage"], "temperature": rollout["temperature"]}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in about.items() if value is not None)
        head = f"{view['names'][r]}: {rollout['trained']} of {rollout['tokens']} tokens trained, {numbers}"
        console.print(Text(f"\n{head} {rollout['override']}", style="bold"))
        console.print(_coloured(view, starts[r], starts[r + 1]), soft_wrap=True)
    left = len(view["rollouts"]) - rollouts
    if left > 0:
        console.print(
            Text(f"\n{left} more sequences are not shown here (--show {len(view['rollouts'])} shows all)", style="dim")
        )


def _groups_table(view: dict[str, Any]) -> Table:
    table = Table("group", "environment", "scores", "advantages", "tokens", "trained", "left out", box=None, pad_edge=False)
    for group in view["groups"]:
        rows = [view["rollouts"][r] for r in group["rollouts"]]
        columns = [
            group["scores"],
            [row["advantage"] for row in rows],
            [row["tokens"] for row in rows],
            [r["trained"] for r in rows],
        ]
        env = "" if group["env_id"] is None else str(group["env_id"])
        left_out = "; ".join(dict.fromkeys(fault["reason"] for fault in group["rejected"]))
        table.add_row(*(Text(cell) for cell in (group["name"], env, *map(_few, columns), left_out)))
    return table


def _few(values: list[float | None]) -> str:
    shown = ["-" if value is None else f"{value:.3g}" for value in values[:8]]
    return " ".join(shown) + (" ..." if len(values) > 8 else "")


def _coloured(view: dict[str, Any], start: int, stop: int) -> Text:
    """A rollout's text: blue for positive weights, red for negative ones, grey if untrained; a bar where training starts. Of a
    long prompt only the part next to trained tokens."""
    tokens, text, left_out = view["tokens"], Text(), 0
    trained = tokens["mask"][start:stop].astype(bool)
    near = (
        np.convolve(trained, np.ones(2 * CONTEXT_SHOWN + 1), "same") > 0 if stop - start > 4 * CONTEXT_SHOWN else trained | True
    )
    near &= np.cumsum(near) <= TOKENS_SHOWN
    most = np.abs(tokens["weight"]).max(initial=0) or 1.0
    for t, n in enumerate(range(start, stop)):
        left_out += not near[t]
        if near[t] and left_out:
            text.append(f"[{left_out} tokens] ", style="dim")
            left_out = 0
        if near[t]:
            if trained[t] and not trained[t - 1]:
                text.append("\N{LEFT ONE QUARTER BLOCK}", style="bold")
            text.append(visible(view["pieces"][tokens["piece"][n]]), style=_style(trained[t], tokens["weight"][n] / most))
    return text.append(f" [{left_out} tokens]", style="dim") if left_out else text


def _style(trained: bool, weight: float) -> str:
    """Style of a token with a weight between -1 and 1."""
    strength = int(60 + 120 * abs(weight))
    if not trained:
        return "grey50"
    if weight > 0:
        return f"white on rgb(0,{strength // 2},{strength})"
    return f"white on rgb({strength},{strength // 4},0)" if weight < 0 else "underline"


def visible(text: str) -> str:
    """Replace control and formatting characters by symbols, since a terminal would interpret them."""
    return "".join(c if c == "\n" or c.isprintable() else _sign(c) for c in text)


def _sign(c: str) -> str:
    return chr(0x2400 + ord(c)) if ord(c) < 0x20 else f"<U+{ord(c):04X}>"
