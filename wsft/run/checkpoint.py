"""Checkpoints, complete or absent: a folder `step_N` is written under another name, checkpoint.json last, then renamed.

    step_N/deepspeed/        DeepSpeed's sharded parameters, optimizer, schedule
    step_N/random_R.pt       random generators of rank R
    step_N/hugging_face/     the base model's own config, tokenizer and code, so that export needs nothing else
    step_N/checkpoint.json   step, feed position, settings, versions, and the size of every file

Of what the engine saves it knows the folder only. Knows nothing of Atropos or batches.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsft.atomic_files import atomic_write, sync
from wsft.config import RESUME_MAY_CHANGE, WeightedSFTConfig
from wsft.distributed.deepspeed_files import convert
from wsft.distributed.engine import Engine
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.run.base_files import write_files

log = logging.getLogger(__name__)

SHARED_WAIT_S = 30.0  # a network file system may show new files with a delay
METADATA = "checkpoint.json"
DEEPSPEED, HUGGING_FACE = "deepspeed", "hugging_face"
_NAME = re.compile(r"step_(\d+)")
_PARTIAL, _CONVERTED = ".partial", ".converted"  # suffixes of folders that are not complete checkpoints
_OPEN = ".nfs"  # prefix on NFS of a deleted file that a process has open


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `metadata` is its checkpoint.json."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def step(self) -> int:
        return self.metadata["step"]

    @classmethod
    def at(cls, folder: Path) -> Checkpoint:
        """The checkpoint in the folder. UserError with what is missing if it is not complete."""
        if not (folder / METADATA).is_file():
            there = "there is no such folder" if not folder.exists() else f"it has no {METADATA}, which is written last"
            raise UserError(
                f"{folder} is not a complete checkpoint: {there}. Give a folder like output_dir/checkpoints/step_100"
            )
        metadata = json.loads((folder / METADATA).read_text())
        for name, size in metadata["files"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise UserError(
                    f"the checkpoint {folder} is damaged: {name} has {found} bytes, expected {size}; use another one"
                )
        return cls(folder, metadata)


def require_same_run(was: dict[str, Any], config: WeightedSFTConfig, contents: dict[str, str | None], place: Path) -> None:
    """UserError with every setting that decides what is learned and differs from those of the run in `place`. Other
    differences are logged.

    Args:
        was: metadata of that run's checkpoint; its settings only, if it has no checkpoint yet.
        contents: digests of what the settings name (fingerprint.py), equal if only paths differ.
    """
    now, was_there, was = config.public(), was.get("contents", {}), was["config"]
    changed = [name for name in now if name in was and was[name] != now[name]]
    free = RESUME_MAY_CHANGE - ({"training_steps"} if config.lr_scheduler != "constant" else set())  # its schedule ends there
    free |= {name for name in contents if was_there.get(name) and was_there[name] == contents[name]}
    wrong = [f"{name} is {now[name]!r} and was {was[name]!r}" for name in changed if name not in free]
    base = was_there.get("base_weights")
    if base and base != contents["base_weights"]:
        wrong.append(f"the weights in {now['model_name']!r}, to which the adapters belong, have changed")
    if wrong:
        raise UserError(
            f"this is not the run of {place}: {'; '.join(wrong)}. Resume with its settings (in its config.yaml"
            f"), or start another run in another output_dir"
        )
    not_logged = {"resume", "output_dir", "overwrite_output_dir"}
    others = [f"{name} {now[name]} (was {was[name]})" for name in changed if name not in not_logged]
    if others:
        log.info("resumed with other settings: %s", ", ".join(others))


def all_in(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in the folder, oldest first. Damaged ones are logged and skipped."""
    found = []
    for path in sorted(folders_in(folder), key=lambda path: int(_NAME.fullmatch(path.name)[1])):
        if (path / METADATA).exists():
            try:
                found.append(Checkpoint.at(path))
            except (UserError, OSError, ValueError, KeyError) as error:
                log.warning("passing over %s: %s", path, error)
    return found


def folders_in(folder: Path, suffix: str = "") -> list[Path]:
    """Folders with the exact name step_N plus suffix. Links and other names are not ours."""
    found = [path for path in folder.glob(f"step_*{suffix}") if _NAME.fullmatch(path.name.removesuffix(suffix))]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


class Save:
    """A checkpoint of step `metadata["step"]`, being saved in the folder. A collective, as `finish`; between the two training
    goes on. UserError if it cannot be written: then nothing of it remains, and older checkpoints are unchanged.

    Args:
        files: those of the base model (rank 0 only).
        waits: `finish` follows at once.
    """

    def __init__(
        self,
        folder: Path,
        metadata: dict[str, Any],
        engine: Engine,
        files: dict[str, bytes] | None,
        world: World,
        waits: bool,
    ):
        self.step, self._metadata, self._engine, self._files, self._world = metadata["step"], metadata, engine, files, world
        self._final = folder / f"step_{self.step}"
        self._aside = folder / f"{self._final.name}{_PARTIAL}"
        with self._explained():
            world.on_rank_0(lambda: _recreate(self._aside))
            engine.save(self._aside / DEEPSPEED, waits)
            self._written = world.run_on_all_ranks(lambda: _save_random(self._aside / f"random_{world.rank}.pt"))

    def finish(self) -> Checkpoint:
        """The complete checkpoint; on rank 0 its metadata is complete, too."""
        with self._explained():
            written, error = self._engine.wait_saved()
            self._world.raise_on_all_ranks(error)
            written = sum(self._world.all_gather_int(self._written + written))
            sizes = self._world.on_rank_0(lambda: _finish(self._aside, self._final, self._metadata, self._files, written))
        return Checkpoint(self._final, self._metadata | {"files": sizes or {}})

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._world.rank == 0:
                _remove(self._aside)
            older = all_in(self._final.parent)[-1:]
            raise UserError(
                f"checkpoint {self._final.name} cannot be saved in {self._final.parent} ({_root(error)}). "
                f"{f'{older[0].folder.name} there is complete' if older else 'There is no older one'}; fetched batches are in "
                f"the journal. Fix that and continue with --resume"
            ) from error


@contextlib.contextmanager
def resumable(start: Checkpoint | None, metadata: dict[str, Any], ds: dict[str, Any], world: World) -> Iterator[Path | None]:
    """The folder for `Engine.load`; None at step 0. `metadata` is that of this start: for another number of ranks the state is
    converted, in a folder that exists inside the context, and `ds` is changed to load it."""
    if start is None:
        yield None
        return
    for name in ("stage", "precision", "optimizer"):
        if start.metadata[name] != metadata[name]:
            raise UserError(
                f"{start.folder} was saved with {name} {start.metadata[name]}, the DeepSpeed JSON and this machine make it "
                f"{metadata[name]}: resume with the JSON of the run"
            )
    changed = _differences(start.metadata["deepspeed"], metadata["deepspeed"])
    if changed:  # else it would be loaded from the checkpoint
        raise UserError(
            f"{start.folder} was saved with another DeepSpeed JSON: {'; '.join(changed)}. Resume with that, or "
            f"start another run in another output_dir"
        )
    saved = start.folder / DEEPSPEED
    if start.metadata["num_ranks"] == world.size or metadata["stage"] == 0:
        yield saved
        return
    log.info("the checkpoint is of %d rank(s): converting it for %d", start.metadata["num_ranks"], world.size)
    converted = start.folder.with_name(f"{start.folder.name}{_CONVERTED}")
    with world.extended_timeout():
        world.on_rank_0(lambda: _convert(saved, converted))
    ds["checkpoint"] = ds.get("checkpoint", {}) | {"load_universal": True}
    try:
        yield converted
        world.all_gather_int(0)  # after all ranks have read it
    finally:
        if world.rank == 0:
            _remove(converted)


def _differences(was: Any, now: Any, path: str = "") -> list[str]:
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return [] if was == now else [f"{path} is {now!r} and was {was!r}"]
    names = sorted(was.keys() | now.keys())
    return [text for name in names for text in _differences(was.get(name), now.get(name), f"{path}.{name}".lstrip("."))]


def _convert(saved: Path, converted: Path) -> None:
    _recreate(converted)
    convert(saved, converted)


def _recreate(folder: Path) -> None:
    _remove(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _finish(aside: Path, final: Path, metadata: dict, files: dict[str, bytes], written: int) -> dict[str, int]:
    """File -> size. `written` is the number of bytes that all ranks wrote into the folder."""
    deadline = time.monotonic() + SHARED_WAIT_S
    # at least: DeepSpeed writes more by itself for offload to NVMe; a network file system may show files with a delay
    while (seen := sum(_sizes(aside).values())) < written and time.monotonic() < deadline:
        time.sleep(1)
    if seen < written:
        raise OSError(f"rank 0 sees {seen} of the {written} bytes that all ranks wrote: output_dir must be one that they share")
    write_files(aside / HUGGING_FACE, files)
    sizes = _sizes(aside)
    for name in sizes:
        sync(aside / name)
    atomic_write(aside / METADATA, json.dumps(metadata | {"files": sizes}, indent=1))
    if (final / METADATA).exists():  # a damaged one, which was skipped at the start
        _remove(final)
    aside.rename(final)
    sync(final.parent)
    return sizes


def prune(folder: Path, keep: int) -> list[Checkpoint]:
    """Delete all but the newest `keep` checkpoints, and remains of interrupted saves. Returns those kept, oldest first."""
    checkpoints = all_in(folder)
    for old in checkpoints[:-keep]:
        delete(old.folder)
    for suffix in (_PARTIAL, _CONVERTED):
        for left in folders_in(folder, suffix):
            _remove(left)
    return checkpoints[-keep:]


def delete(folder: Path) -> None:
    """Delete a checkpoint. If interrupted it does not look complete, and the next `prune` continues."""
    partial = folder.with_name(f"{folder.name}{_PARTIAL}")
    _remove(partial)
    try:
        folder.rename(partial)
    except OSError as error:
        return _warn_once(f"{folder} cannot be deleted ({error.strerror}): it stays until it can be")
    _remove(partial)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:  # on NFS a process has a file open, or there are no permissions
        _warn_once(f"{folder} cannot be deleted ({error.strerror}): the rest stays until it can be")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def _sizes(folder: Path) -> dict[str, int]:
    """File -> size, of all files in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(_OPEN)]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _save_random(path: Path) -> int:
    """Write random generators durably; returns the number of bytes."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": [version, internal, gauss]}
    state["numpy"] = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)
    return path.stat().st_size


def load_random(checkpoint: Checkpoint, rank: int) -> None:
    """Restore this rank's random generators, if the checkpoint had this rank."""
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


def _root(error: BaseException) -> BaseException:
    """The first exception of the chain: torch reports a full disk as a RuntimeError about positions."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error
