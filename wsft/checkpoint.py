"""Checkpoints: complete or absent. A folder `step_N` is written aside, its facts (checkpoint.json) last, then renamed.

    step_N/deepspeed/        DeepSpeed's sharded parameters, optimizer, schedule
    step_N/random_R.pt       random generators of rank R
    step_N/hugging_face/     the base model's own config, tokenizer and code, so that export needs nothing else
    step_N/checkpoint.json   step, feed position, settings, versions, and the size of every file

Knows what the engine saves by its folder only, and nothing of Atropos or of what a batch is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsft.base_files import write_files
from wsft.config import RESUME_MAY_CHANGE, UserError, WeightedSFTConfig
from wsft.engine import Engine, convert
from wsft.journal import sync
from wsft.world import World

log = logging.getLogger(__name__)

FACTS = "checkpoint.json"
DEEPSPEED, HUGGING_FACE = "deepspeed", "hugging_face"
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `facts` is its checkpoint.json."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return self.facts["step"]

    @classmethod
    def at(cls, folder: Path) -> Checkpoint:
        """UserError, saying what is missing, if there is no complete checkpoint in the folder."""
        if not (folder / FACTS).is_file():
            there = "there is no such folder" if not folder.exists() else f"it has no {FACTS}, which is written last"
            raise UserError(
                f"{folder} is not a complete checkpoint: {there}. Give a folder like output_dir/checkpoints/step_100"
            )
        facts = json.loads((folder / FACTS).read_text())
        for name, size in facts["files"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise UserError(
                    f"the checkpoint {folder} is damaged: {name} has {found} bytes, expected {size}; use another one"
                )
        return cls(folder, facts)


def require_same_run(was: dict[str, Any], config: WeightedSFTConfig, contents: dict[str, str | None], place: Path) -> None:
    """UserError naming every setting that differs from those of the run begun in `place`, of those that decide what is
    learned. Other differences are said.

    Args:
        was: the facts of that run's checkpoint; without one yet, its settings alone.
        contents: what the settings name now (contents.py); at another path it may be the same.
    """
    now, was_there, was = config.public(), was.get("contents", {}), was["config"]
    changed = [name for name in now if name in was and was[name] != now[name]]
    free = RESUME_MAY_CHANGE - ({"training_steps"} if config.lr_scheduler != "constant" else set())  # its schedule ends there
    free |= {name for name in contents if was_there.get(name) and was_there[name] == contents[name]}
    wrong = [f"{name} is {now[name]!r} and was {was[name]!r}" for name in changed if name not in free]
    if wrong:
        raise UserError(
            f"this is not the run of {place}: {'; '.join(wrong)}. Resume with the settings it was begun with (its config.yaml "
            f"holds them), or start another run in another output_dir"
        )
    silent = {"resume", "output_dir", "overwrite_output_dir"}
    others = [f"{name} {now[name]} (was {was[name]})" for name in changed if name not in silent]
    if others:
        log.info("resumed with other settings: %s", ", ".join(others))


def all_in(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in the folder, oldest first. A damaged one is said and passed over."""
    found = []
    for path in sorted(folder.glob("step_*"), key=_number):
        if _NAME.fullmatch(path.name) and (path / FACTS).exists():
            try:
                found.append(Checkpoint.at(path))
            except (UserError, OSError, ValueError, KeyError) as error:
                log.warning("passing over %s: %s", path, error)
    return found


def _number(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name) or 0)


def save(
    folder: Path,
    facts: dict[str, Any],
    engine: Engine,
    files: dict[str, bytes] | None,
    world: World,
) -> Checkpoint:
    """Save `facts["step"]` in the folder of checkpoints. A collective. `files` are those of the base
    model, of rank 0; only there the checkpoint knows all of its own. UserError if it cannot be
    written; then nothing of it is left, and the older checkpoints are as they were."""
    final = folder / f"step_{facts['step']}"
    aside = folder / f"{final.name}.partial"
    try:
        world.on_rank_0(lambda: _make_anew(aside))
        world.agree(engine.save(aside / DEEPSPEED))
        world.together(lambda: _save_random(aside / f"random_{world.rank}.pt"))
        sizes = world.on_rank_0(lambda: _finish(aside, final, facts, files))
    except Exception as error:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        older = all_in(folder)[-1:]
        raise UserError(
            f"checkpoint {final.name} cannot be saved in {folder} ({_root(error)}). "
            f"{f'{older[0].folder.name} there is whole' if older else 'There is no older one'}; what was fetched is in the "
            f"journal. Mend that and go on with --resume"
        ) from error
    return Checkpoint(final, facts | {"files": sizes or {}})


@contextlib.contextmanager
def resumable(start: Checkpoint | None, facts: dict[str, Any], ds: dict[str, Any], world: World) -> Iterator[Path | None]:
    """The folder for `Engine.load`, None at step 0. `facts` are this start's; of another number of ranks, the state is
    converted for as long as the context lasts, and `ds` says so to DeepSpeed."""
    if start is None:
        yield None
        return
    for name in ("stage", "precision", "optimizer"):
        if start.facts[name] != facts[name]:
            raise UserError(
                f"{start.folder} was saved with {name} {start.facts[name]}, the DeepSpeed JSON and this machine make it "
                f"{facts[name]}: resume with the JSON it was begun with"
            )
    changed = _differences(start.facts["deepspeed"], facts["deepspeed"])
    if changed:  # it would be overwritten from the checkpoint
        raise UserError(
            f"{start.folder} was saved with another DeepSpeed JSON: {'; '.join(changed)}. Resume with the one it was begun "
            f"with, or start another run in another output_dir"
        )
    saved = start.folder / DEEPSPEED
    if start.facts["num_ranks"] == world.size or facts["stage"] == 0:
        yield saved
        return
    log.info("the checkpoint is of %d rank(s): converting it for %d", start.facts["num_ranks"], world.size)
    converted = start.folder.with_name(f"{start.folder.name}.converted")
    with world.taking_its_time():
        world.on_rank_0(lambda: _convert(saved, converted))
    ds["checkpoint"] = ds.get("checkpoint", {}) | {"load_universal": True}
    try:
        yield converted
        world.words(0)  # all have read it
    finally:
        if world.rank == 0:
            shutil.rmtree(converted, ignore_errors=True)


def _differences(was: Any, now: Any, path: str = "") -> list[str]:
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return [] if was == now else [f"{path} is {now!r} and was {was!r}"]
    names = sorted(was.keys() | now.keys())
    return [text for name in names for text in _differences(was.get(name), now.get(name), f"{path}.{name}".lstrip("."))]


def _convert(saved: Path, converted: Path) -> None:
    _make_anew(converted)
    convert(saved, converted)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(aside: Path, final: Path, facts: dict, files: dict[str, bytes]) -> dict[str, int]:
    """The size of each file."""
    write_files(aside / HUGGING_FACE, files)
    files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    for path in files:
        sync(path)
    sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
    write_last(aside / FACTS, json.dumps(facts | {"files": sizes}, indent=1))
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, passed over at the start
    aside.rename(final)
    sync(final.parent)
    return sizes


def prune(folder: Path, keep: int) -> list[Checkpoint]:
    """Delete all but the newest `keep` checkpoints, and what a killed save left. Those that are kept, oldest first."""
    checkpoints = all_in(folder)
    for old in checkpoints[:-keep]:
        (old.folder / FACTS).unlink()  # first: half deleted, it must not look complete
        shutil.rmtree(old.folder)
    for path in folder.glob("step_*"):
        if not (path / FACTS).exists():
            shutil.rmtree(path)
    return checkpoints[-keep:]


def _save_random(path: Path) -> None:
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": [version, internal, gauss]}
    state["numpy"] = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)


def load_random(checkpoint: Checkpoint, rank: int) -> None:
    """Put this rank's random generators back. A rank that the checkpoint did not have keeps its own."""
    path = checkpoint.folder / f"random_{rank}.pt"
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_last(path: Path, text: str) -> None:
    """Replace a small file: it holds the old text or the new one, whenever the process dies."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.touch(mode=0o600)
        aside.write_text(text)
        sync(aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def _root(error: BaseException) -> BaseException:
    """What began it: torch reports a full disk as a RuntimeError about positions."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error
