"""Publishes weights as Hugging Face folders on disk, one per version, for anybody who can read a file system.

    FOLDER/step_41/                 safetensors shards with their index; config, tokenizer and code of the base model
    FOLDER/step_41/version.json     version, step, and a CRC-32 for each tensor
    FOLDER/latest                   the name of the newest complete folder

A folder is complete or absent: it is written under another name and renamed at the end. Knows nothing of Atropos, objectives or
optimizers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from wsft.atomic_files import atomic_write, sync
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.model.weight_files import read
from wsft.publish.tensors import TrainedTensors
from wsft.run.base_files import write_files

log = logging.getLogger(__name__)

VERSION, LATEST, INDEX = "version.json", "latest", "model.safetensors.index.json"


class PublishFolder:
    """Args: keep: versions to keep. base_files: path -> bytes of the base model's files other than weights (rank 0 only)."""

    def __init__(self, path: Path, keep: int, tensors: TrainedTensors, base_files: dict[str, bytes] | None, world: World):
        self.path, self._keep, self._tensors, self._base_files, self._world = path, keep, tensors, base_files, world
        self._writer, self._published = ThreadPoolExecutor(max_workers=1), False
        self._unchanged: dict[str, tuple[str, int]] | None = None

    def publish(self, step: int) -> dict[str, float]:
        """Write the parameters as version `step`; returns metrics. A collective: rank r writes buckets r, r + ranks, ...

        Raises:
            UserError: the folder cannot be written. Older versions are unchanged then.
        """
        start, world = time.monotonic(), self._world
        aside, final = self.path / f"step_{step}.partial", self.path / f"step_{step}"
        world.on_rank_0(lambda: self._begin(aside, step))
        writing: Future | None = None
        error: BaseException | None = None
        for number, names in enumerate(self._tensors.buckets):
            mine = number % world.size == world.rank
            tensors = self._tensors.bucket(names, wanted=mine)
            if mine and error is None:
                error = writing.exception() if writing else None  # waits: at most two buckets are in memory
                writing = self._writer.submit(_write_shard, tensors, aside, number)
        error = error or (writing.exception() if writing else None)
        world.raise_on_all_ranks(_as_user_error(error, self.path))
        size = world.on_rank_0(lambda: self._end(aside, final, step))
        spent = time.monotonic() - start
        if world.rank == 0:
            level = logging.DEBUG if self._published else logging.INFO  # later ones are in the metrics
            log.log(level, "published step %d to %s: %.2f GiB in %.1f s", step, final, size / 2**30, spent)
        self._published = True
        return {"publish/version": step, "publish/seconds": spent, "publish/gib": (size or 0) / 2**30}

    def _begin(self, aside: Path, step: int) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder, _ in self._versions(".partial"):  # left by an interrupted publish
                _delete(folder)
            with contextlib.suppress(OSError):
                aside.rmdir()  # empty: the run was killed before it wrote the file by which the folder is known
            final = aside.with_suffix("")
            if aside.exists() or (final.exists() and not (final / VERSION).is_file()):
                raise UserError(f"{final} is no published version: set publish_folder to a folder of its own")
            aside.mkdir()
            (aside / VERSION).write_text("{}\n")  # by which the folder is known as a version
        except OSError as error:
            raise _as_user_error(error, self.path) from error

    def _versions(self, suffix: str = "") -> list[tuple[Path, int]]:
        """Published versions and their steps, oldest first. Other folders named step_N, such as checkpoints, are not ours."""
        named = [(path, re.fullmatch(rf"step_(\d+){re.escape(suffix)}", path.name)) for path in self.path.iterdir()]
        found = [(path, int(match[1])) for path, match in named if match and (path / VERSION).is_file()]
        return sorted(found, key=lambda version: version[1])

    def _end(self, aside: Path, final: Path, step: int) -> int:
        """Complete the folder and make it the newest; returns its bytes."""
        try:
            checksums, places, size = {}, {}, 0
            for path in sorted(aside.glob("*.checksums")):
                found = json.loads(path.read_text())
                checksums |= {name: checksum for name, (checksum, _) in found.items()}
                places |= dict.fromkeys(found, path.with_suffix(".safetensors").name)
                size += sum(nbytes for _, nbytes in found.values())
                path.unlink()
            unchanged = self._link_unchanged(aside)
            places |= {name: file for name, (file, _) in unchanged.items()}
            write_files(aside, self._base_files)
            index = {"metadata": {"total_size": size + sum(nbytes for _, nbytes in unchanged.values())}, "weight_map": places}
            (aside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            version = {"version": str(step), "step": step, "crc32": checksums}
            (aside / VERSION).write_text(json.dumps(version) + "\n")
            for path in aside.rglob("*"):
                if path.is_file():
                    sync(path)
            if final.exists():  # published by an earlier start
                _delete(final)
            aside.rename(final)
            sync(self.path)
            atomic_write(self.path / LATEST, final.name + "\n")
            versions = self._versions()
            kept = [folder for folder, number in versions if number <= step][-self._keep :]  # later ones are trained again
            for folder, _ in versions:
                if folder not in kept:
                    _delete(folder)
            return size
        except OSError as error:
            raise _as_user_error(error, self.path) from error

    def _link_unchanged(self, aside: Path) -> dict[str, tuple[str, int]]:
        """Tensors that training does not change are written once per start, and linked into each version. Name -> (file,
        bytes)."""
        once = self.path / ".unchanged"
        if self._unchanged is None:
            self._unchanged = self._write_unchanged(once)
        for file in {file for file, _ in self._unchanged.values()}:
            try:
                os.link(once / file, aside / file)
            except OSError:  # a file system without hard links
                shutil.copyfile(once / file, aside / file)
        return self._unchanged

    def _write_unchanged(self, folder: Path) -> dict[str, tuple[str, int]]:
        places, shard, names = {}, {}, list(self._tensors.unchanged)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, perhaps with another model
        if names:
            folder.mkdir()
        for name in names:
            shard[name] = read(self._tensors.unchanged[name], name)
            if name == names[-1] or sum(tensor.nbytes for tensor in shard.values()) >= self._tensors.bucket_bytes:
                file = f"model-unchanged-{len(list(folder.iterdir())) + 1:05d}.safetensors"
                save_file(shard, folder / file, metadata={"format": "pt"})
                sync(folder / file)
                places |= {name: (file, tensor.nbytes) for name, tensor in shard.items()}
                shard = {}
        return places


def _write_shard(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> None:
    path = folder / f"model-{number + 1:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    checksums = {name: (checksum_of(tensor), tensor.nbytes) for name, tensor in tensors.items()}
    path.with_suffix(".checksums").write_text(json.dumps(checksums))
    sync(path)


def _delete(folder: Path) -> None:
    """The file by which it is known as a version last: what is interrupted is deleted later."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != VERSION:
            path.unlink()
    shutil.rmtree(folder)


def checksum_of(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _as_user_error(error: BaseException | None, path: Path) -> BaseException | None:
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return UserError(f"weights cannot be published to {path} ({error}): make space there, or set another publish_folder")
    return error
