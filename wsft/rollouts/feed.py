"""Delivers the same batch to every rank at the same time.

A thread of each rank works `prefetch_batches` ahead of the training step: on ranks that fetch it reads from the source
(sources.py), a batch is journalled, decoded, broadcast to the threads of the other ranks and prepared while the one before it
trains. The ranks themselves do not wait for data inside one long collective. They exchange their states about once a second, so
a run may wait for hours without a timeout, and an error on the fetching rank reaches all.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Generic, TypeVar

import numpy as np

from wsft.config import WeightedSFTConfig
from wsft.distributed.channel import from_message, to_message
from wsft.distributed.signals import Stop
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.rollouts.batch import Batch
from wsft.rollouts.decoder import REASONS
from wsft.rollouts.sources import EndOfData, GivenSource, Position, Source

T = TypeVar("T")
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


class _State(IntEnum):
    """States that ranks exchange. The reason is added to STOP, which one rank suffices for."""

    WAIT = 0
    READY = 1
    END = 2
    FAILED = 3
    STOP = 100


class _FailedElsewhere(Exception):
    """Another rank could not fetch its part of a batch: the message comes from there."""


@dataclass(frozen=True)
class _Ready(Generic[T]):
    """A batch that was delivered.

    Attributes:
        rejected: sequences left out since the last batch with a trained token, by reason.
    """

    prepared: T
    has_trained: bool
    rejected: dict[str, int]
    position: Position | None  # of the source, on the ranks that fetch


class Feed(Generic[T]):
    """The global batches of a run, delivered to every rank and prepared there by a thread, `prefetch_batches` ahead.

    Args:
        prepare: called on every rank with each batch and the number of optimizer steps before it; pure.
        step: optimizer steps so far.

    Attributes:
        batches: number of batches that the run has taken, and index of the next in the journal.
        stopped: why any rank was asked to stop (signals.py); 0 if none was.
        possibly_lost: batches that may have been lost between server and trainer, over all ranks and restarts.
        position: of the source on rank 0, after the last batch taken.
    """

    def __init__(
        self,
        config: WeightedSFTConfig,
        source: Source | None,
        prepare: Callable[[Batch, int], T],
        world: World,
        stop: Stop,
        metadata: dict[str, Any],
        step: int,
    ):
        self._config, self._source, self._prepare, self._world, self._stop = config, source, prepare, world, stop
        given, has_source = zip(
            *world.all_gather_ints(int(isinstance(source, GivenSource)), int(source is not None)), strict=True
        )
        self._is_given, self._fetching = any(given), [rank for rank, has in enumerate(has_source) if has]
        self._prefetch = 0 if self._is_given else config.prefetch_batches
        self.batches, self._lost_before = metadata.get("batches", 0), metadata.get("possibly_lost", 0)
        self.possibly_lost, self.position = self._lost_before, metadata.get("position")
        self.stopped, self._since_pruned = 0, 0
        # of this rank's journal: bytes that the last checkpoint needed as it was complete, and as the newest began
        self._pruned_bytes = self._at_save = self._journal_bytes
        self._over, self._ahead, self._channel = threading.Event(), _Ahead(), world.new_channel()
        self._futures: dict[int, Future[_Ready[T]]] = {}  # batch number -> the batch
        # of the thread: steps before the batch that it prepares, and sequences that were left out with batches passed over
        self._step_ahead, self._passed_over = step, np.zeros(len(REASONS), dtype=np.int64)

    def begin_checkpoint(self) -> dict[str, Any]:
        """State for a checkpoint that is saved now, to resume from; `prune` follows once it is complete."""
        self._at_save = self._journal_bytes
        return {"batches": self.batches, "possibly_lost": self.possibly_lost, "position": self.position}

    def next(self, step: int, waiting: Callable[[str], None]) -> T | None:
        """The next batch with a trained token; None at the end of the data or if the run should stop. Sequences of batches that
        were skipped are counted in it as left out. `waiting` is called with the state every second. A batch that the caller
        gave is returned as it is."""
        for _ in range(EMPTY_BATCHES_ALLOWED):
            ready = self._exchange(step, waiting)
            if ready is None:
                return None
            if ready.has_trained or self._is_given:
                return ready.prepared
            left_out = ready.rejected or "none"
            log.info("a batch held no usable sequence (left out since the last step: %s): passed over", left_out)
        raise UserError(
            f"{EMPTY_BATCHES_ALLOWED} batches in a row held no usable sequence (left out: {left_out}): do the environments use "
            f"the tokenizer of the model, a max_token_len no larger than the trainer's, and masks that train any token?"
        )

    def _exchange(self, step: int, waiting: Callable[[str], None]) -> _Ready[T] | None:
        """One message between ranks, and one more for each second of waiting."""
        world, state, ready, error = self._world, _State.WAIT, None, None
        while True:
            if state == _State.WAIT and not self._stop.code:
                try:
                    ready = self._ready(step)
                    state = _State.READY if ready else _State.WAIT
                except EndOfData:
                    state = _State.END
                except Exception as failure:  # any exception must reach the other ranks
                    state, error = _State.FAILED, failure
            stopping = self._stop.code and state != _State.FAILED
            mine = _State.STOP + self._stop.code if stopping else state
            lost = self._source.possibly_lost if self._source else 0
            states, all_lost, since_pruned = zip(
                *world.all_gather_ints(mine, lost, self._journal_bytes - self._pruned_bytes), strict=True
            )
            if _State.FAILED in states:
                world.raise_on_all_ranks(error)
            self.stopped = max(0, max(states) - _State.STOP)
            if self.stopped or _State.END in states:
                return None  # a batch that is READY here is in the journal, and will be replayed
            if _State.WAIT not in states:
                break
            waiting(self._source.state if self._source else "")
        self._futures.pop(self.batches)
        self.batches += 1
        self.position, self.possibly_lost = ready.position, self._lost_before + sum(all_lost)
        self._since_pruned = max(since_pruned)
        return ready

    def _ready(self, step: int) -> _Ready[T] | None:
        """The next batch if it is there within a second. Schedules the following ones, up to the last step."""
        batches_left = (self._config.training_steps - step) // self._config.updates_per_batch
        ahead = min(self._prefetch, batches_left - 1)
        for number in range(self.batches, self.batches + ahead + 1):
            if number not in self._futures:
                self._futures[number] = self._ahead.submit(functools.partial(self._deliver, number, step))
        first = self._futures[self.batches]
        try:
            return first.result() if wait([first], timeout=POLL_S).done else None
        except _FailedElsewhere:
            return None

    def _deliver(self, number: int, step: int) -> _Ready[T]:
        """Take this rank's part of a batch, get those of the others, and prepare the whole. Runs in the thread; a collective of
        these threads, in the order of the numbers."""
        state, part, position, error = _State.READY, np.zeros(0, np.uint8), None, None
        if self._source:
            try:
                batch, position = self._source.take(number, step, self._over)
                part = to_message(batch)
            except EndOfData:
                state = _State.END
            except Exception as failure:  # the threads of the other ranks must not wait for this part
                state, error = _State.FAILED, failure
        states, sizes = zip(*self._channel.all_gather_ints(state, len(part)), strict=True)
        if error:
            raise error
        if _State.FAILED in states:
            raise _FailedElsewhere
        if _State.END in states:
            raise EndOfData
        parts = [self._channel.broadcast(part, sizes[source], source) for source in self._fetching]
        return self._prepared(Batch.joined(from_message(part, Batch) for part in parts), position)

    def _prepared(self, batch: Batch, position: Position | None) -> _Ready[T]:
        if not batch.num_trained and not self._is_given:
            self._passed_over[REASONS.index("no token is trained")] += len(batch.lengths)
        batch = replace(batch, counts=batch.counts + self._passed_over)
        has_trained = batch.num_trained > 0
        self._passed_over = np.zeros_like(batch.counts) if has_trained or self._is_given else batch.counts
        prepared = self._prepare(batch, self._step_ahead)
        self._step_ahead += self._config.updates_per_batch if has_trained else 0
        return _Ready(prepared, has_trained, batch.rejected, position)

    @property
    def _journal_bytes(self) -> int:
        return self._source.journal_bytes if self._source else 0

    @property
    def journal_gib(self) -> float:
        """Size of this rank's journal on disk."""
        return self._journal_bytes / 2**30

    def journal_is_full(self) -> bool:
        """Whether to save now, so that pruning to the oldest of the kept checkpoints holds the journals to journal_gib."""
        since_last = len(self._fetching) * self._since_pruned / 2**30
        return since_last > self._config.journal_gib / (self._config.keep_checkpoints + 1)

    def prune(self, below: int) -> None:
        """Delete batches below that number from the journal: all kept checkpoints were trained on them."""
        if self._source:
            before = self._journal_bytes
            self._source.prune(below)
            self._pruned_bytes = self._at_save - (before - self._journal_bytes)
        self._since_pruned = 0

    def close(self) -> None:
        """Wait for a request in flight, so that its batch reaches the journal. Called on every rank."""
        self._over.set()
        leaving = self._ahead.submit(lambda: self._channel.all_gather_ints(_State.END, 0))
        if wait([leaving], timeout=LAST_WORD_S).not_done and self._source:
            log.warning(
                "a request to the Atropos server is still unanswered after %.0f s: a batch that it hands out now is lost",
                LAST_WORD_S,
            )
