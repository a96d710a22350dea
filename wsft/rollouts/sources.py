"""Sources of batches: a file of records; an Atropos server, or a generator of the user, with a journal; the caller."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.model.loading import end_tokens
from wsft.rollouts.answers import decode
from wsft.rollouts.batch import AtroposBatchProcessor, Batch
from wsft.rollouts.chat import ChatRenderer
from wsft.rollouts.client import AtroposClient
from wsft.rollouts.data_files import DataFiles, Line
from wsft.rollouts.decoder import Origin, Rollout
from wsft.rollouts.journal import Journal
from wsft.rollouts.json_parser import parse_json
from wsft.rollouts.records import is_group
from wsft.user_code import load

log = logging.getLogger(__name__)

SMALLEST_ROOM = 8 * 2**20  # free bytes on disk that are required before a batch is fetched

# State of a source after a batch, as JSON: group sizes so far (see decoder.py), position in the files
Position = dict[str, Any]


class EndOfData(Exception):
    """The source is exhausted."""


class Source(Protocol):
    state: str  # for the progress line
    possibly_lost: int  # batches that may have been lost between server and trainer
    journal_bytes: int  # on disk

    def take(self, number: int, step: int, over: threading.Event) -> tuple[Batch, Position]:
        """Batch `number` of the run (or this rank's part of it), requested after `step` optimizer steps, and the position
        after it. Waits for it, or until the run is over. Raises EndOfData if there is none."""

    def prune(self, below: int) -> None:
        """Batches below this number will not be requested again."""


class FileSource:
    """Groups of files (data_files.py), `batch_size` valid sequences at a time; the last batch may be smaller.

    Lines are decoded in chunks of at least `batch_size` sequences, as a server would release them, so that parts of one group
    get the same advantages as from a server.

    Args:
        position: to resume from: the number of lines read before the current chunk, and with it; the number of its valid
            sequences already taken; a digest of all lines read.
    Raises:
        UserError: no such file, or the lines already read have changed (appending lines is allowed, unless they are shuffled).
    """

    state = "reading"
    possibly_lost = journal_bytes = 0

    def __init__(self, files: DataFiles, batch_size: int, processor: AtroposBatchProcessor, position: Position | None = None):
        self._files, self._batch_size, self._processor = files, batch_size, processor
        self._lines, self._digest = files.lines(), hashlib.blake2b(digest_size=16)
        begin = position or {"before": 0, "read": 0, "taken": 0}
        chunk = self._again(position) if position else []
        self._rollouts = self._read(chunk, begin["before"], begin["taken"])

    def take(self, number: int, step: int, over: threading.Event) -> tuple[Batch, Position]:
        rollouts, position = self.rollouts()
        counts = self._processor.decoder.take_counts()  # still counts sequences left out after the last valid one
        if not rollouts:
            raise EndOfData
        return Batch.of(rollouts, counts), position

    def rollouts(self) -> tuple[list[Rollout], Position | None]:
        """Rollouts of the next batch, empty at the end, and the position after them."""
        taken = list(islice(self._rollouts, self._batch_size))
        return [rollout for rollout, _ in taken], taken[-1][1] if taken else None

    def prune(self, below: int) -> None: ...

    def _again(self, position: Position) -> list[Line]:
        """The lines of the current chunk, after those before it."""
        if "read" not in position:
            raise UserError(
                "the checkpoint is of an earlier version of wsft, whose position in data cannot be read: start anew"
            )
        lines, shown = list(islice(self._noted(), position["read"])), ", ".join(map(repr, map(str, self._files.paths)))
        if len(lines) < position["read"] or self._digest.hexdigest() != position["digest"]:
            found = "those lines differ"
            if len(lines) < position["read"]:
                found = f"it has {len(lines)} lines, and {position['read']} were read"
            raise UserError(
                f"data {shown} has changed in the part that this run has read ({found}): put the file back as it was (lines "
                f"may be appended, unless they are shuffled), or start another run in another output_dir"
            )
        return lines[position["before"] :]

    def _noted(self) -> Iterator[Line]:
        """The lines that follow; they enter the digest."""
        for line in self._lines:
            self._digest.update(line.text.rstrip(b"\r\n") + b"\n")
            yield line

    def _read(self, chunk: list[Line], before: int, taken: int) -> Iterator[tuple[Rollout, Position]]:
        decoder = self._processor.decoder
        while True:
            sizes = dict(decoder.group_sizes)
            chunk, found, names = self._chunk(chunk)
            if not chunk:
                return
            rollouts = decoder.batch(found, names)
            if taken:
                decoder.forget()  # counted when the first sequences of the chunk were taken
            read = before + len(chunk)
            place = {"before": before, "read": read, "digest": self._digest.hexdigest()}
            for i in range(taken, len(rollouts)):
                yield rollouts[i], place | {"taken": i + 1, "group_sizes": sizes}
            chunk, before, taken = [], read, 0

    def _chunk(self, given: list[Line]) -> tuple[list[Line], list[Any], list[str]]:
        """The given lines, or as many of the next as contain a batch; their records and names."""
        lines, found, names, sequences = [], [], [], 0
        for line in given or self._noted():
            lines.append(line)
            text = line.text.removeprefix(codecs.BOM_UTF8) if line.number == 1 else line.text
            if not text.strip():
                continue
            try:
                record = parse_json(text)
            except ValueError as error:
                origin = Origin(text, f"line {line.number} of {line.path}", None)
                self._processor.decoder.reject("line is not JSON", origin, str(error))
                continue
            found.append(record)
            names.append(line.name)
            sequences += len(record["tokens"]) if is_group(record) else 1
            if not given and sequences >= self._batch_size:
                break
        return lines, found, names


class AtroposSource:
    """Batches of a server, each written to the journal before it is decoded; a resumed run first replays the journal.

    Args:
        journal: of this rank; record numbers are batch numbers of the run.
        others: journals that the run wrote with another number of fetching ranks.
    """

    def __init__(
        self,
        client: AtroposClient | GeneratedBatches,
        processor: AtroposBatchProcessor,
        journal: Journal,
        others: list[Journal],
    ):
        self._client, self._processor, self._journal, self._others = client, processor, journal, others
        self._replays_others = client.registers
        self._largest = SMALLEST_ROOM

    @property
    def state(self) -> str:
        return self._client.state

    @property
    def possibly_lost(self) -> int:
        return self._client.possibly_lost + self._journal.torn

    @property
    def journal_bytes(self) -> int:
        return self._journal.size

    def take(self, number: int, step: int, over: threading.Event) -> tuple[Batch, Position]:
        batch = self._batch(number, step, over)
        return batch, {"group_sizes": dict(self._processor.decoder.group_sizes)}

    def _batch(self, number: int, step: int, over: threading.Event) -> Batch:
        if number in self._journal:
            return self._decoded(self._journal.read(number))
        elsewhere = [journal for journal in self._others if number in journal]
        if elsewhere:  # fetched by another number of ranks: one rank replays all parts
            parts = [self._decoded(journal.read(number)) for journal in elsewhere if self._replays_others]
            return Batch.joined([Batch.empty(), *parts])
        self._client.step, self._client.number = step, number  # of a server that restarted, of a generator that begins
        while not over.is_set():
            self._journal.require_room(2 * self._largest)  # before the server removes it from its queue
            body = self._client.poll()
            if body is not None:
                self._largest = max(self._largest, len(body))
                self._journal.append(number, body)
                return self._decoded(body)
        raise EndOfData

    def _decoded(self, body: bytes) -> Batch:
        try:
            groups = decode(body)
        except ValueError as error:  # it must not end the run, and each resumed one again
            groups = []
            self._processor.decoder.reject("record is not a group", Origin(None, "a whole batch", None), str(error))
        return self._processor.decode(groups)

    def prune(self, below: int) -> None:
        for journal in [self._journal, *(self._others if self._replays_others else [])]:
            journal.prune(below)


class GivenSource:
    """Batches that the caller of `WeightedSFTTrainer.step` gives, one at a time. They are not journalled, since the caller has
    them."""

    state = "waiting for groups"
    possibly_lost = journal_bytes = 0

    def __init__(self, processor: AtroposBatchProcessor, position: Position | None):
        self._processor, self._groups = processor, None
        if position:
            _set_group_sizes(processor, position)

    def give(self, groups: list[dict] | dict[str, Any] | None) -> None:
        """See `WeightedSFTTrainer.step`."""
        self._groups = groups

    def take(self, number: int, step: int, over: threading.Event) -> tuple[Batch, Position]:
        found = self._processor.decode(groups_of(self._groups))
        return found, {"group_sizes": dict(self._processor.decoder.group_sizes)}

    def prune(self, below: int) -> None: ...


def groups_of(given: list[dict] | dict[str, Any] | None) -> list[dict]:
    """Groups as the caller of `WeightedSFTTrainer.step` gives them on rank 0."""
    if isinstance(given, dict):
        return [group_of_rows(given)]
    if not isinstance(given, list):
        raise UserError(f"rank 0 was given {type(given).__name__}, expected a list of groups, or rows of tensors")
    return given


def group_of_rows(rows: dict[str, Any]) -> dict[str, Any]:
    """One group of the rows of tensors or arrays [B, T]: tokens, loss_masks (0/1), advantages ([B, T], [B] or [B, 1]), and, if
    there are, inference_logprobs and ref_logprobs. A row ends with its last trained token, since nothing behind it counts."""
    columns = {name: np.asarray(values) for name, values in rows.items()}
    masks = columns.pop("loss_masks").astype(np.int64)
    ends = [int(row.nonzero()[0].max(initial=1)) + 1 for row in masks]
    group: dict[str, Any] = {"masks": [row[:end].tolist() for row, end in zip(masks, ends, strict=True)]}
    for name, values in columns.items():
        cut = values.reshape(len(masks), -1)
        group[name] = [row[:end].tolist() for row, end in zip(cut, ends, strict=True)]
    return group


class GeneratedBatches:
    """The user's generator in the place of the client of a server: each list of groups that it yields is a batch.

    Args:
        name: of a function of the config and of the number of batches that the run has taken, `my_module:my_generator`.
    """

    state = "waiting for the source"
    possibly_lost, registers = 0, True

    def __init__(self, name: str, config: WeightedSFTConfig):
        try:
            self._function = load(name, "source")
        except ValueError as error:
            raise UserError(str(error)) from error
        self._config, self._batches = config, None
        self.step = self.number = 0

    def poll(self) -> bytes:
        """The next batch as a server would send it. Raises EndOfData at the generator's end."""
        if self._batches is None:
            self._batches = iter(self._function(self._config, self.number))
        try:
            groups = next(self._batches)
        except StopIteration:
            raise EndOfData from None
        if not isinstance(groups, list):
            raise UserError(f"source {self._config.source!r} yielded a {type(groups).__name__}, expected a list of groups")
        try:
            return json.dumps({"batch": groups}).encode()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"source {self._config.source!r} yielded what is not JSON, as the journal holds it: {error}; expected lists "
                f"and numbers of Python"
            ) from error


def open_source(
    config: WeightedSFTConfig, processor: AtroposBatchProcessor, world: World, position: Position | None
) -> Source | None:
    """This rank's source; None on a rank that does not fetch. A resumed run continues at `position`."""
    fetching = fetching_ranks(config, world.size)
    if world.rank >= fetching:
        return None
    if position:
        _set_group_sizes(processor, position)
    if config.data is not None:
        return FileSource(data_files_of(config), config.batch_size, processor, position)
    if config.source is not None:
        client = GeneratedBatches(config.source, config)
    else:
        client = client_of(config, fetching, registers=world.rank == 0)
    folder = Path(config.output_dir) / "journal"
    mine = {rank: folder / f"{rank}_of_{fetching}" for rank in range(fetching)}
    others = [Journal(path, read_only=True) for path in sorted(folder.glob("*_of_*")) if path not in mine.values()]
    return AtroposSource(client, processor, Journal(mine[world.rank]), others)


def _set_group_sizes(processor: AtroposBatchProcessor, position: Position) -> None:
    processor.decoder.group_sizes |= {int(env_id): size for env_id, size in position["group_sizes"].items()}


def data_files_of(config: WeightedSFTConfig) -> DataFiles:
    return DataFiles(config.data, config.epochs, config.seed if config.shuffle else None)


def fetching_ranks(config: WeightedSFTConfig, num_ranks: int) -> int:
    """The number of ranks that fetch. UserError if batch_size is not divisible by it."""
    fetching = num_ranks if config.fetch_mode == "per_rank" else 1
    if config.batch_size % fetching:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {fetching} ranks in fetch_mode per_rank: "
            f"make it a multiple of {fetching}, or use fetch_mode rank0"
        )
    return fetching


def client_of(config: WeightedSFTConfig, fetching: int, registers: bool) -> AtroposClient:
    """The client of one of `fetching` ranks."""
    return AtroposClient(
        config.atropos_url,
        batch_size=config.batch_size // fetching,
        max_token_len=config.max_token_len,
        num_steps=config.training_steps,
        timeout=config.atropos_timeout,
        wandb_group=config.wandb_group or "",
        wandb_project=config.wandb_project or "",
        checkpoint_dir=config.output_dir,
        save_checkpoint_interval=config.save_steps,
        registers=registers,
    )


def processor_of(config: WeightedSFTConfig, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> AtroposBatchProcessor:
    ends = end_tokens(config.model_name, tokenizer)
    return AtroposBatchProcessor(
        advantage_normalization=config.advantage_normalization,
        advantage_clip=config.advantage_clip,
        negative_advantage_scale=config.negative_advantage_scale,
        max_token_len=config.max_token_len,
        overlong=config.overlong,
        score_advantages=config.score_advantages,
        vocab_size=vocab_size,
        record_temperature=config.record_temperature,
        end_tokens=ends if config.mask_truncated else None,
        chat=ChatRenderer(tokenizer, ends) if tokenizer.chat_template and tokenizer.is_fast else None,
        reads_behavior=config.needs_behavior,
        reads_reference=config.kl_coef > 0 and config.ref_model_name is None,
        reads_teacher=config.distill_coef > 0,
    )
