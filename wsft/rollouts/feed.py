"""Delivers the same batch to every rank at the same time.

A thread reads from the source (sources.py), `prefetch_batches` ahead of the training step: a batch is fetched, journalled and
decoded while the one before it trains. Ranks do not wait for data inside one long collective. They exchange their states about
once a second, so a run may wait for hours without a timeout, and an error on the fetching rank reaches all.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from enum import IntEnum
from typing import Any

import numpy as np

from wsft.config import WeightedSFTConfig
from wsft.distributed.signals import Stop
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.rollouts.batch import Batch
from wsft.rollouts.decoder import REASONS
from wsft.rollouts.sources import EndOfData, GivenSource, Position, Source

log = logging.getLogger(__name__)

EMPTY_BATCHES_ALLOWED = 3
POLL_S = 1.0  # interval of the exchange between ranks
LAST_WORD_S = 30.0  # for a request in flight when the run ends


class _Ahead:
    """A thread that runs functions in order. After one fails the others fail, too, since a batch that could not be fetched must
    not be replaced by the next. A daemon, which does not keep the process alive as a ThreadPoolExecutor would."""

    def __init__(self):
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, action: Callable[[], Any]) -> Future:
        future = Future()
        self._jobs.put((future, action))
        return future

    def _work(self) -> None:
        failure = None
        while True:
            future, action = self._jobs.get()
            try:
                if failure:
                    raise failure
                future.set_result(action())
            except BaseException as error:
                failure = error
                future.set_exception(error)


class _Answer(IntEnum):
    """States that ranks exchange. The reason is added to STOP, which one rank suffices for."""

    WAIT = 0
    READY = 1
    END = 2
    FAILED = 3
    STOP = 100


class Feed:
    """The global batches of a run, the same on every rank; advantages are not yet shaped over the batch.

    Attributes:
        batches: number of batches that the run has taken, and index of the next in the journal.
        stopped: why any rank was asked to stop (signals.py); 0 if none was.
        possibly_lost: batches that may have been lost between server and trainer, over all ranks and restarts.
        position: of the source on rank 0, after the last batch taken.
    """

    def __init__(self, config: WeightedSFTConfig, source: Source | None, world: World, stop: Stop, metadata: dict[str, Any]):
        self._config, self._source, self._world, self._stop = config, source, world, stop
        self._is_given = any(world.all_gather_int(int(isinstance(source, GivenSource))))
        self._prefetch = 0 if self._is_given else config.prefetch_batches
        self._fetching = [rank for rank, has in enumerate(world.all_gather_int(int(source is not None))) if has]
        self.batches, self._lost_before = metadata.get("batches", 0), metadata.get("possibly_lost", 0)
        self.possibly_lost, self.position = self._lost_before, metadata.get("position")
        self.stopped, self._pruned_gib = 0, self.journal_gib
        self._over, self._ahead = threading.Event(), _Ahead()
        self._taking: dict[int, Future] = {}  # batch number -> future of the batch and the position after it

    @property
    def metadata(self) -> dict[str, Any]:
        """State for a checkpoint, to resume from."""
        return {"batches": self.batches, "possibly_lost": self.possibly_lost, "position": self.position}

    def next(self, step: int, waiting: Callable[[str], None]) -> Batch | None:
        """The next batch with a trained token; None at the end of the data or if the run should stop. Sequences of batches that
        were skipped are counted in it as left out. `waiting` is called with the state every second. A batch that the caller
        gave is returned as it is."""
        left_out = np.zeros(len(REASONS), dtype=np.int64)
        for _ in range(EMPTY_BATCHES_ALLOWED):
            batch = self._exchange(step, waiting)
            if batch is None or self._is_given:
                return batch
            if not batch.num_trained:
                left_out[REASONS.index("no token is trained")] += len(batch.lengths)
            batch = replace(batch, counts=batch.counts + left_out)
            if batch.num_trained:
                return batch
            left_out = batch.counts
            log.info(
                "a batch held no usable sequence (left out since the last step: %s): passed over", batch.rejected or "none"
            )
        raise UserError(
            f"{EMPTY_BATCHES_ALLOWED} batches in a row held no usable sequence (left out: {batch.rejected or 'none'}): do the "
            f"environments use the tokenizer of the model, a max_token_len no larger than the trainer's, and masks that train "
            f"any token?"
        )

    def _exchange(self, step: int, waiting: Callable[[str], None]) -> Batch | None:
        world, mine, error = self._world, None, None
        answer = _Answer.WAIT if self._source else _Answer.READY
        while True:
            if answer == _Answer.WAIT and not self._stop.code:
                try:
                    mine = self._take(step)
                    answer = _Answer.READY if mine is not None else _Answer.WAIT
                except EndOfData:
                    answer = _Answer.END
                except Exception as failure:  # any exception must reach the other ranks
                    answer, error = _Answer.FAILED, failure
            stopping = self._stop.code and answer != _Answer.FAILED
            answers = world.all_gather_int(_Answer.STOP + self._stop.code if stopping else answer)
            if _Answer.FAILED in answers:
                world.raise_on_all_ranks(error)
            self.stopped = max(0, max(answers) - _Answer.STOP)
            if self.stopped or _Answer.END in answers:
                return None  # a batch that is READY here is in the journal, and will be replayed
            if _Answer.WAIT not in answers:
                break
            waiting(self._source.state if self._source else "")
        part, self.position = mine or (None, None)
        batch = Batch.joined(world.broadcast(part, Batch, source) for source in self._fetching)
        self._taking.pop(self.batches, None)
        self.batches += 1
        self.possibly_lost = self._lost_before + sum(world.all_gather_int(self._source.possibly_lost if self._source else 0))
        return batch

    def _take(self, step: int) -> tuple[Batch, Position] | None:
        """The next batch if it is ready within a second. Schedules the following ones, up to the last step."""
        batches_left = (self._config.training_steps - step) // self._config.updates_per_batch
        ahead = min(self._prefetch, batches_left - 1)
        for number in range(self.batches, self.batches + ahead + 1):
            if number not in self._taking:
                job = functools.partial(self._source.take, number, step, self._over)
                self._taking[number] = self._ahead.submit(job)
        first = self._taking[self.batches]
        return first.result() if wait([first], timeout=POLL_S).done else None

    @property
    def journal_gib(self) -> float:
        """Size of this rank's journal on disk."""
        return self._source.journal_bytes / 2**30 if self._source else 0.0

    def journal_is_full(self) -> bool:
        """Whether to save now, so that pruning to the oldest of the kept checkpoints holds the journals to journal_gib."""
        since_last = len(self._fetching) * (self.journal_gib - self._pruned_gib)
        return any(self._world.all_gather_int(int(since_last > self._config.journal_gib / (self._config.keep_checkpoints + 1))))

    def prune(self, below: int) -> None:
        """Delete batches below that number from the journal: all kept checkpoints were trained on them."""
        if self._source:
            self._source.prune(below)
            self._pruned_gib = self.journal_gib

    def close(self) -> None:
        """Wait for a request in flight, so that its batch reaches the journal."""
        self._over.set()
        if wait(self._taking.values(), timeout=LAST_WORD_S).not_done:
            log.warning(
                "a request to the Atropos server is still unanswered after %.0f s: a batch that it hands out now is lost",
                LAST_WORD_S,
            )
