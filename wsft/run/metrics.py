"""Sinks of metrics: a progress line, metrics.jsonl, W&B. Floats only; no tensors, no process groups.

Rank 0 gets a `Metrics`, other ranks a `NullMetrics`, so that the training loop need not check its rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth
from tqdm import tqdm

from wsft.config import WeightedSFTConfig, without_password
from wsft.errors import UserError, first_line
from wsft.logs import write_line

log = logging.getLogger(__name__)

QUIET_S = 10.0  # without a terminal, waiting is logged after this time, then every WAIT_S
WAIT_S = 60.0
WANDB_S = 60.0  # to start, and to send the rest at the end
FAILED_S = 5.0  # the same for a run that failed, since other ranks wait for its message


class Metrics:
    """The sinks of rank 0. A run resumed from `step` first drops the lines of later steps, which will be trained again.

    A sink that fails is logged once and closed, and never ends the run.
    """

    def __init__(self, config: WeightedSFTConfig, folder: Path, step: int):
        self._starts = 1 + _forget_after(step, folder / "metrics.jsonl")
        self._file = (folder / "metrics.jsonl").open("a", buffering=1)
        self._line = (_TerminalLine if sys.stderr.isatty() else _LogLines)(config.training_steps, step)
        self._wandb, self._said = None, set()
        if config.wandb_project:
            log.info("logging to the W&B project %s, too", config.wandb_project)
            self._try("W&B", self._open_wandb, config, folder)

    def set_status(self, what: str) -> None:
        """Show the state of the run, such as "waiting for a batch" or "training"."""
        self._try("the progress line", self._line.set_status, what)

    def warn(self, text: str) -> None:
        """Log a warning that would be the same on every rank."""
        log.warning("%s", text)

    def step(self, values: dict[str, Any]) -> None:
        """Write the values of a step; those that are not finite as null, which all JSON parsers accept."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        clean |= {"time/at": round(time.time(), 3), "run/starts": self._starts}
        self._try("metrics.jsonl", self._file.write, json.dumps(clean) + "\n")
        if self._wandb:
            finite = {k: v for k, v in clean.items() if v is not None}
            self._try("W&B", self._wandb.log, finite, step=values["step"])
        self._try("the progress line", self._line.step, values)

    def sync(self) -> None:
        """fsync, before a checkpoint is written that continues after these lines."""
        self._try("metrics.jsonl", os.fsync, self._file.fileno())

    def close(self, failed: bool = False) -> None:
        self._try("the progress line", self._line.close)
        self._try("metrics.jsonl", self._file.close)
        if self._wandb:
            self._try("W&B", _finish, self._wandb, failed)

    def _try(self, name: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            action(*args, **kwargs)
        except Exception as error:
            if name not in self._said:
                others = "is given up" if name == "W&B" else "is not whole"
                log.warning(
                    "%s fails, and %s; the run continues (%s: %s)", name, others, type(error).__name__, first_line(error)
                )
            self._said.add(name)
            if name == "W&B":
                self._wandb = None
                # at exit it could block, or fail with a traceback
                threading.Thread(target=_forget_wandb, daemon=True).start()

    def _open_wandb(self, config: WeightedSFTConfig, folder: Path) -> None:
        self._wandb = _open_wandb(config, folder)


class NullMetrics:
    """The sinks of other ranks: none."""

    def set_status(self, what: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, values: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class _TerminalLine:
    """A progress bar on a terminal."""

    def __init__(self, total: int, step: int):
        form = "{desc} |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=total, initial=step, desc="starting", bar_format=form, file=sys.stderr, dynamic_ncols=True)

    def set_status(self, what: str) -> None:
        self._bar.set_description_str(what)

    def step(self, values: dict[str, Any]) -> None:
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {values['tokens/per_second']:.0f} tokens/s, {values['memory/peak_gib']:.1f} GiB",
            refresh=False,
        )
        self._bar.update(values["step"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _LogLines:
    """For stderr to a file or pipe: a line per step, and one for the first state and for long waits."""

    def __init__(self, total: int, step: int):
        self._total, self._from, self._start = total, step, time.monotonic()
        self._what, self._since, self._next = "", 0.0, 0.0
        self._said = set()

    def set_status(self, what: str) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._next = what, now, now + QUIET_S
            if what not in self._said:
                write_line(what)
            self._said.add(what)
        elif now >= self._next:
            write_line(f"{what} ({now - self._since:.0f} s)")
            self._next = now + WAIT_S

    def step(self, values: dict[str, Any]) -> None:
        step, spent = values["step"], time.monotonic() - self._start
        left = tqdm.format_interval(spent / (step - self._from) * (self._total - step))
        values_line = (
            f"loss {values['loss']:+.4f}  grad_norm {values['grad_norm']:.3g}  {values['tokens/per_second']:.0f} tokens/s"
        )
        times = f"{values['time/step']:.1f} s, {values['time/wait']:.1f} s of it waiting  left {left}"
        times += f"  peak {values['memory/peak_gib']:.1f} GiB"
        write_line(f"step {step}/{self._total}  {values_line}  {times}")

    def close(self) -> None: ...


def _forget_after(step: int, path: Path) -> int:
    """Keep the lines up to `step`, without an incomplete last one. Returns how many starts of the run have written lines."""
    if not path.exists():
        return 0
    lines = {text: json.loads(text) for text in path.read_text().split("\n") if text.endswith("}")}
    aside = path.with_name(".metrics.jsonl")
    aside.write_text("".join(f"{text}\n" for text, line in lines.items() if line["step"] <= step))
    aside.rename(path)
    return max((line.get("run/starts", 1) for line in lines.values()), default=0)


def require_wandb(config: WeightedSFTConfig) -> None:
    """UserError if W&B is set, but not installed or without a key. Does not use the network."""
    if not config.wandb_project:
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb_project is set, but wandb is not installed: pip install wandb") from error
    settings = wandb.setup().settings
    if settings.mode != "online" or settings.api_key or "WANDB_IDENTITY_TOKEN_FILE" in os.environ:
        return
    if not get_netrc_auth(settings.base_url):
        raise UserError(
            f"wandb_project is set, but there is no key for {settings.base_url}: run `wandb login`, set WANDB_API_KEY, or "
            f"WANDB_MODE=offline, or leave wandb_project out"
        )


def _open_wandb(config: WeightedSFTConfig, folder: Path) -> Any:
    import wandb

    sys.argv = [without_password(argument) for argument in sys.argv]  # W&B stores the command line
    identity = folder / "wandb_id"  # a resumed run continues the same W&B run
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    return wandb.init(
        id=identity.read_text(),
        resume="allow",
        project=config.wandb_project,
        group=config.wandb_group,
        name=config.wandb_run_name,
        dir=folder,
        config=config.public(),
        settings=wandb.Settings(silent=True, init_timeout=WANDB_S),
    )


def _forget_wandb() -> None:
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _finish(run: Any, failed: bool) -> None:
    """Finish, within a time limit: what is still to be sent to W&B may never arrive."""
    errors: list[Exception] = []

    def finish() -> None:
        try:
            run.finish(exit_code=int(failed))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(FAILED_S if failed else WANDB_S)
    if thread.is_alive():
        raise TimeoutError("it has not taken the last steps yet")
    if errors:
        raise errors[0]
