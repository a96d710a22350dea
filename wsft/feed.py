"""Where batches come from, and how every rank gets the same one at the same time.

A source is polled: `poll()` gives a `Batch`, or None when there is none yet, and raises `EndOfData` when there will be none.
Ranks never wait for data inside one collective: they meet about once a second and say whether they have theirs. So a run
may wait for hours, an error on the fetching rank reaches all, and nobody's collective times out.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Protocol

from wsft.atropos import AtroposClient, decode
from wsft.batching import AtroposBatchProcessor, Batch
from wsft.config import UserError, WeightedSFTConfig
from wsft.groups import Rollout, parse_json
from wsft.world import World

log = logging.getLogger(__name__)

EMPTY_BATCHES_ALLOWED = 3


class EndOfData(Exception):
    """The source has nothing more."""


class Source(Protocol):
    state: str  # for the progress line
    possibly_lost: int  # batches that may have been lost between server and trainer

    def poll(self) -> Batch | None: ...


class FileSource:
    """One pass over a JSONL file of groups, in file order, `batch_size` good sequences at a time; the last may be smaller."""

    state = "reading"
    possibly_lost = 0

    def __init__(self, path: str, batch_size: int, processor: AtroposBatchProcessor):
        if not Path(path).is_file():
            raise UserError(f"data {path!r} is not a file: expected JSONL, one Atropos group a line")
        self._batch_size, self._processor = batch_size, processor
        self._rollouts = self._read(Path(path))

    def poll(self) -> Batch | None:
        rollouts = list(islice(self._rollouts, self._batch_size))
        if not rollouts:
            self._processor.decoder.take_counts()  # what was left out after the last good sequence is still said
            raise EndOfData
        return Batch.of(rollouts, self._processor.decoder.take_counts())

    def _read(self, path: Path) -> Iterator[Rollout]:
        decoder = self._processor.decoder
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    group = parse_json(line)
                except ValueError as error:
                    decoder.reject("line is not JSON", f"line {number} of {path}", str(error))
                    continue
                yield from decoder.group(group, f"line {number}")


class AtroposSource:
    """Batches of a live server."""

    def __init__(self, client: AtroposClient, processor: AtroposBatchProcessor):
        self._client, self._processor = client, processor

    @property
    def state(self) -> str:
        return self._client.state

    @property
    def possibly_lost(self) -> int:
        return self._client.possibly_lost

    def poll(self) -> Batch | None:
        body = self._client.poll()
        if body is None:
            return None
        self._client.step += 1  # a server that restarts is told where the run is
        return self._processor.decode(decode(body))


def open_source(config: WeightedSFTConfig, processor: AtroposBatchProcessor, world: World) -> Source | None:
    """This rank's source; None on a rank that only listens."""
    fetching = world.size if config.fetch_mode == "per_rank" else 1
    if config.batch_size % fetching:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {fetching} ranks in fetch_mode per_rank: "
            f"make it a multiple of {fetching}, or use fetch_mode rank0"
        )
    if world.rank >= fetching:
        return None
    if config.data is not None:
        return FileSource(config.data, config.batch_size, processor)
    client = AtroposClient(
        config.atropos_url,
        batch_size=config.batch_size // fetching,
        max_token_len=config.max_token_len,
        num_steps=config.training_steps,
        timeout=config.atropos_timeout,
        wandb_group=config.wandb_group or "",
        wandb_project=config.wandb_project or "",
        checkpoint_dir=config.output_dir,
        registers=world.rank == 0,
    )
    return AtroposSource(client, processor)


class _Word(IntEnum):
    """What a rank says at each meeting."""

    WAIT = 0
    READY = 1
    END = 2
    FAILED = 3


class Feed:
    """The global batches of a run, the same on every rank."""

    def __init__(self, source: Source | None, world: World, advantage_normalization: str):
        self._source, self._world, self._normalization = source, world, advantage_normalization
        # learn once who fetches
        self._fetching = [rank for rank, has in enumerate(world.words(int(source is not None))) if has]
        self.possibly_lost = 0

    def next(self, waiting: Callable[[str], None]) -> Batch | None:
        """The next batch with something in it; None at the end of the data. `waiting` is told of every fruitless second."""
        for _ in range(EMPTY_BATCHES_ALLOWED):
            batch = self._exchange(waiting)
            if batch is None or len(batch.lengths):
                return batch
            log.info("a batch held no usable sequence (%s): passed over", batch.rejected or "it was empty")
        raise UserError(
            f"{EMPTY_BATCHES_ALLOWED} batches in a row held no usable sequence (the last: {batch.rejected or 'empty'}): "
            f"do the environments use the tokenizer of the model, and a max_token_len no larger than the trainer's?"
        )

    def _exchange(self, waiting: Callable[[str], None]) -> Batch | None:
        world, mine, error = self._world, None, None
        word = _Word.WAIT if self._source else _Word.READY
        while True:
            if word is _Word.WAIT:
                try:
                    mine = self._source.poll()
                    word = _Word.READY if mine is not None else _Word.WAIT
                except EndOfData:
                    word = _Word.END
                except Exception as failure:  # whatever it is, the other ranks must hear of it
                    word, error = _Word.FAILED, failure
            words = world.words(word)
            if _Word.FAILED in words:
                world.agree(error)
            if _Word.END in words:
                return None
            if _Word.WAIT not in words:
                break
            waiting(self._source.state if self._source else "")
        batch = Batch.joined(world.broadcast(mine, Batch, source) for source in self._fetching)
        self.possibly_lost = sum(world.words(self._source.possibly_lost if self._source else 0))
        return batch.with_final_advantages(self._normalization)
