"""Logging to stderr that leaves the progress line intact."""

from __future__ import annotations

import contextlib
import logging
import sys

from tqdm import tqdm


def configure_logging(rank: int) -> None:
    """Send this package's log to stderr, above the progress line. Ranks other than 0 log warnings only, and only errors of
    transformers, which logs the same on every rank."""
    if rank:
        logging.getLogger("transformers").setLevel(logging.ERROR)
    root = logging.getLogger("wsft")
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not root.handlers:
        handler = _AboveProgressLine()
        handler.setFormatter(logging.Formatter(f"wsft %(levelname)s (rank {rank}): %(message)s"))
        root.addHandler(handler)
        root.propagate = False


class _AboveProgressLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record) if record.levelno > logging.INFO else record.getMessage())


def write_line(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr is closed, but there may be a checkpoint to save
        tqdm.write(text, file=sys.stderr)
