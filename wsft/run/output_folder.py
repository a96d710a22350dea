"""output_dir: its lock, what a new run replaces, what a resumed run continues from, and the state of the run.

Used by rank 0. `state.json` has the state (`running`, `finished`, `preempted`, `failed`), the step, and the reason; a killed
run leaves `running`. Knows nothing of ranks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import yaml

from wsft.atomic_files import atomic_write
from wsft.config import WeightedSFTConfig
from wsft.errors import UserError
from wsft.run.checkpoint import SHARED_WAIT_S, Checkpoint, all_in, delete, require_same_run

log = logging.getLogger(__name__)

# what a run writes, and overwriting removes
RESULTS = (
    *("config.yaml", "state.json", "metrics.jsonl", "wandb_id", "journal", "checkpoints", "final", "final.partial"),
    *("report.html", "inspect.html", "published"),
)
LOGS = "logs"  # written by the launchers before the run starts
LOCK_WAIT_S = 20.0  # a killed run may take seconds to end
SAY_S = 10.0
TOKEN = ".token"  # per start: a rank that reads it sees the folder that rank 0 opened
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # Lustre without -o flock, NFS without lockd


class RunFolder:
    """Attributes: path, checkpoints, final: folders. step: the last one saved. token: content of the token file, once
    opened."""

    def __init__(self, config: WeightedSFTConfig):
        self.path = Path(config.output_dir)
        self.checkpoints, self.final = self.path / "checkpoints", self.path / "final"
        self._lock: IO[str] | None = None
        state = self.path / "state.json"
        found = json.loads(state.read_text()) if state.exists() else {}
        self._restarted = is_restart(os.environ) and found.get("job") == job_of(os.environ)
        self._ours = bool(found) and (config.resume is True or self._restarted)
        self.step, self.token = found["step"] if self._ours else 0, ""

    def open(self, config: WeightedSFTConfig, contents: dict[str, str | None]) -> Checkpoint | None:
        """Lock the folder for this run, and remove the results of another run or return the checkpoint to resume from (None:
        start at step 0).

        UserError if another run is using it, if it has results that are not to be overwritten, or if it is not the run to be
        resumed, by its settings and by what they name (fingerprint.py).
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            goes_on = config.resume or self._restarted
            start = self._resumed(config, contents) if goes_on else self._make_empty(config)
            self.checkpoints.mkdir(exist_ok=True)
            self.step = start.step if start else 0
            self.token = secrets.token_hex(8)
            atomic_write(self.path / TOKEN, self.token)
            atomic_write(self.path / "config.yaml", config.to_yaml())
            self.write_state("running", "")
            return start
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error}") from error

    def require_shared(self, token: str | None) -> None:
        """UserError on a host whose output_dir is not the one that rank 0 opened, and wrote the `token` to."""
        deadline = time.monotonic() + SHARED_WAIT_S
        while not self._has(token):
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir {self.path} on {os.uname().nodename} is not the one that rank 0 opened: with several hosts it "
                    f"must be on a file system that all of them share"
                )
            time.sleep(1)

    def _has(self, token: str | None) -> bool:
        with contextlib.suppress(OSError):
            return (self.path / TOKEN).read_text() == token
        return False

    def close(self) -> None:
        """Release the lock."""
        if self._lock:
            self._lock.close()

    def write_state(self, state: str, reason: str) -> None:
        self._ours = True
        metadata = {"state": state, "step": self.step, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        metadata["job"] = job_of(os.environ)
        atomic_write(self.path / "state.json", json.dumps(metadata) + "\n")

    def failed(self, reason: str) -> None:
        """Write state.json, unless the folder is locked by another run."""
        if self._ours:
            self.write_state("failed", reason)

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("a+")
        start = time.monotonic()
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    log.warning(
                        "the file system of output_dir %s has no locks (%s): make sure that no other run uses it",
                        self.path,
                        error.strerror,
                    )
                    return
                if not isinstance(error, BlockingIOError):
                    raise
                self._lock.seek(0)
                holder, waited = self._lock.read().strip(), time.monotonic() - start
                if waited > LOCK_WAIT_S:
                    raise UserError(
                        f"another run is using output_dir {self.path} ({holder}): stop it, or choose another output_dir"
                    ) from None
                if waited % SAY_S < 1:
                    log.info("waiting for another run in %s to end (%s)", self.path, holder)
                time.sleep(1)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def _make_empty(self, config: WeightedSFTConfig) -> None:
        found = sorted(path.name for path in self.path.glob("[!.]*") if path.name != LOGS)
        if found and not config.overwrite_output_dir:
            raise UserError(
                f"output_dir {self.path} is not empty ({', '.join(found[:4])}): choose another one, continue the run in it "
                f"with --resume, or replace its results with --overwrite_output_dir"
            )
        for old in (self.path / name for name in RESULTS):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def _resumed(self, config: WeightedSFTConfig, contents: dict[str, str | None]) -> Checkpoint | None:
        if isinstance(config.resume, str) and not self._restarted:
            self._go_back_to(Checkpoint.at(Path(config.resume)), config, contents)
        elif config.overwrite_output_dir:
            log.info("continuing the run in %s: overwrite_output_dir applies to a new run only", self.path)
        start, settings = next(reversed(all_in(self.checkpoints)), None), self.path / "config.yaml"
        was = start.metadata if start else {"config": yaml.safe_load(settings.read_text()) if settings.exists() else {}}
        require_same_run(was, config, contents, start.folder if start else self.path)
        if start:
            log.info("resuming from %s", start.folder)
        else:
            replayed = ", with the batches in its journal" if (self.path / "journal").exists() else ""
            log.info("no checkpoint in %s yet: starting at step 0%s", self.path, replayed)
        return start

    def _go_back_to(self, wanted: Checkpoint, config: WeightedSFTConfig, contents: dict[str, str | None]) -> None:
        """Make the named checkpoint the newest of this folder; copy it here, with its journal, from another run's folder."""
        require_same_run(wanted.metadata, config, contents, wanted.folder)
        if wanted.folder.resolve().parent != self.checkpoints.resolve():
            if not all_in(self.checkpoints):
                self._make_empty(config)
                _bring(wanted, self.path)
            return  # copied by an earlier start of the same command: continue from the newest
        newer = [c for c in all_in(self.checkpoints) if c.step > wanted.step]
        if newer and not config.overwrite_output_dir:
            raise UserError(
                f"{newer[-1].folder} is newer than {wanted.folder.name}, where this run was to begin: drop it with "
                f"--overwrite_output_dir, or resume into another output_dir, or from the newest with --resume alone"
            )
        for checkpoint in newer:
            log.warning("removing %s, newer than %s", checkpoint.folder, wanted.folder.name)
            delete(checkpoint.folder)
        if newer and (self.path / "wandb_id").exists():
            log.info("W&B gets a new run, since it does not accept a step twice")
            (self.path / "wandb_id").unlink()


def is_restart(env: Mapping[str, str]) -> bool:
    """Whether this is a restart by SLURM or torchrun of the same command."""
    return any(int(env.get(name, "0")) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def job_of(env: Mapping[str, str]) -> str | None:
    """An identifier that all starts of one SLURM job, or of one torchrun, have in common."""
    if "SLURM_JOB_ID" in env:
        return env["SLURM_JOB_ID"]
    return f"{os.uname().nodename}/{os.getppid()}" if "TORCHELASTIC_RESTART_COUNT" in env else None


def _bring(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a checkpoint (by hard links if possible, as it never changes), its journal and its metrics to another folder."""
    log.info("copying %s and its journal to %s", checkpoint.folder, folder)
    origin = checkpoint.folder.parent.parent
    if (origin / "journal").exists():
        shutil.copytree(origin / "journal", folder / "journal")
    if (origin / "metrics.jsonl").exists():
        shutil.copy(origin / "metrics.jsonl", folder)
    aside = folder / "checkpoints" / f"{checkpoint.folder.name}.partial"
    shutil.copytree(checkpoint.folder, aside, copy_function=_link_or_copy)
    os.sync()
    aside.rename(aside.with_suffix(""))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or no hard links
        shutil.copy2(source, target)
