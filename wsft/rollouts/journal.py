"""An append-only log of byte strings on disk: once `append` returns, the record is durable.

A folder of segment files. A record is a header (magic, number, length and CRC-32 of the body, CRC-32 of these) and the body.
Every record is synced before the next is written, so a crash can leave only the last record of the last segment incomplete,
which is truncated. Any other inconsistency is damage, and an error. Knows bytes and numbers only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wsft.atomic_files import sync
from wsft.errors import UserError

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * 2**20  # size from which a new segment is started
_MAGIC = b"wsfJ"
_FIELDS = struct.Struct("<4sQQI")  # magic, number, length and CRC-32 of the body
_CRC = struct.Struct("<I")  # CRC-32 of the fields above
_HEADER_BYTES = _FIELDS.size + _CRC.size


class JournalDamaged(UserError):
    """Bytes that were synced to disk have changed."""


class Journal:
    """The records in a folder, with ascending numbers and possibly gaps. One process appends, any number may read.

    Args:
        folder: created if missing, accessible to the user only.
        read_only: change nothing on disk; an incomplete record is ignored, a missing folder is an empty journal.

    Attributes:
        torn: incomplete records truncated when it was opened, 0 or 1.

    Raises:
        JournalDamaged: with file and byte, for any damage other than an incomplete last record.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        self._folder, self.torn, self._pruned = folder, 0, False
        self._records: dict[int, _Record] = {}  # ascending
        self._lock = threading.Lock()  # a batch may be appended by another thread while a checkpoint prunes
        try:
            if not read_only:
                _make(folder)
            ours = (path for path in folder.glob("*.journal") if re.fullmatch("[0-9]{12,}", path.stem))
            segments = sorted(ours, key=lambda path: int(path.stem))
            for path in segments:
                self._open(path, is_last=path is segments[-1], repairs=not read_only)
        except OSError as error:
            raise UserError(f"the journal {folder} cannot be opened: {error}") from error

    def append(self, number: int, body: bytes) -> None:
        """Append a record, durable on return. ValueError unless the number is above all others; UserError if writing fails,
        which leaves the journal unchanged."""
        with self._lock:
            last = next(reversed(self._records.values()), None)
            if last and number <= last.number:
                raise ValueError(f"record {number} cannot follow record {last.number} in {self._folder}: numbers ascend")
            goes_on = last and last.end <= SEGMENT_BYTES and not self._pruned
            path, offset = (last.path, last.end) if goes_on else (self._folder / _name(number), 0)
            record = _Record(path, offset, number, len(body), zlib.crc32(body))
            try:
                _write(record, body)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written ({error}): the batch just fetched is lost, those in the journal before it are "
                    f"whole. Make room on the disk, or repair it, and start with --resume"
                ) from error
            self._records[number], self._pruned = record, False

    def read(self, number: int) -> bytes:
        """The body of a record. KeyError without such a number, JournalDamaged if the body has changed."""
        record = self._records[number]
        try:
            body = record.read()
        except OSError as error:
            raise record.damaged(f"record {number} cannot be read ({error})") from error
        if zlib.crc32(body) != record.crc:
            raise record.damaged(f"the body of record {number} does not match its checksum")
        return body

    def __contains__(self, number: int) -> bool:
        return number in self._records

    @property
    def numbers(self) -> list[int]:
        return list(self._records)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(record.end - record.offset for record in list(self._records.values()))

    def require_room(self, size: int) -> None:
        """UserError if fewer than `size` bytes are free. Called before a batch is fetched that could not be stored."""
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise UserError(
                f"the disk of {self._folder} has {free / 2**20:,.1f} MiB free and the next batch may need "
                f"{size / 2**20:,.1f} MiB, so it was not fetched: make room and start with --resume"
            )

    def prune(self, below: int) -> None:
        """Delete segments with numbers below the given one only, also of a journal opened read_only.

        The next append starts a segment, so that the next call can delete all before it.
        """
        with self._lock:
            self._pruned = True
            newest = {record.path: record.number for record in self._records.values()}
            for path, number in newest.items():
                if number < below:
                    path.unlink(missing_ok=True)
            self._records = {n: record for n, record in self._records.items() if newest[record.path] >= below}

    def _open(self, path: Path, is_last: bool, repairs: bool) -> None:
        size = path.stat().st_size
        records = list(_scan(path, size))
        if is_last and records and zlib.crc32(records[-1].read()) != records[-1].crc:
            torn = records.pop()
            if path.read_bytes()[torn.end :].strip(b"\0"):  # a later append had started, so this record was complete
                raise torn.damaged(f"the body of record {torn.number} does not match its checksum, and something follows it")
        end = records[-1].end if records else 0
        whole = end == size > 0
        if not whole and not (is_last and _is_torn(path, end)):
            raise _damaged(path, end, "no whole record begins there, and it is not the end of the journal")
        for record in records:
            last = next(reversed(self._records), -1)
            if record.number <= last or (record.offset == 0 and path.name != _name(record.number)):
                raise record.damaged(f"record {record.number} does not belong there, after record {last}")
            self._records[record.number] = record
        if repairs and not whole:
            _cut(path, end)
            if size:  # not an empty new segment
                self.torn = 1
                message = "cut %d bytes off the end of %s: a batch that was being written there when the run was killed is lost"
                log.warning(message, size - end, path)


class _Record(NamedTuple):
    path: Path  # of its segment
    offset: int  # of its header
    number: int
    length: int  # of its body
    crc: int

    @property
    def end(self) -> int:
        return self.offset + _HEADER_BYTES + self.length

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset + _HEADER_BYTES)
            return file.read(self.length)

    def damaged(self, what: str) -> JournalDamaged:
        return _damaged(self.path, self.offset, what)


def _damaged(path: Path, offset: int, what: str) -> JournalDamaged:
    return JournalDamaged(
        f"{path} is damaged at byte {offset}: {what}. Put the file back from a copy; or move the folder {path.parent} away and "
        f"start with --resume: the batches in it since the last checkpoint are then lost, and new ones take their place"
    )


def _name(number: int) -> str:
    return f"{number:012d}.journal"


def _scan(path: Path, size: int) -> Iterator[_Record]:
    """The records up to the first incomplete one, without their bodies."""
    end = 0
    with path.open("rb", buffering=0) as file:
        while (record := _parse(path, end, file.read(_HEADER_BYTES))) and record.end <= size:
            yield record
            end = file.seek(record.end)


def _parse(path: Path, offset: int, header: bytes) -> _Record | None:
    fields, crc = header[: _FIELDS.size], header[_FIELDS.size :]
    if not fields.startswith(_MAGIC) or crc != _CRC.pack(zlib.crc32(fields)):
        return None
    return _Record(path, offset, *_FIELDS.unpack(fields)[1:])


def _is_torn(path: Path, end: int) -> bool:
    """Whether the bytes after the last complete record are from a single append: they contain no further header."""
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read()
    places = (match.start() for match in re.finditer(_MAGIC, tail))
    return next((at for at in places if _parse(path, end + at, tail[at : at + _HEADER_BYTES])), 0) == 0


def _write(record: _Record, body: bytes) -> None:
    """Write the record durably, or leave the segment unchanged."""
    begins = record.offset == 0
    fields = _FIELDS.pack(_MAGIC, record.number, record.length, record.crc)
    left = [memoryview(fields + _CRC.pack(zlib.crc32(fields))), memoryview(body)]
    file = os.open(record.path, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if begins else 0), 0o600)
    try:
        os.lseek(file, record.offset, os.SEEK_SET)
        while left:
            written = os.writev(file, left)
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            left[:1] = [left[0][written:]] if left else []
        os.fsync(file)
        if begins:
            sync(record.path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the next append overwrites the rest, or opening truncates it
            _cut(record.path, record.offset)
        raise
    finally:
        os.close(file)


def _cut(path: Path, end: int) -> None:
    """Truncate a segment at `end`, durably; delete it if it is then empty."""
    if end:
        os.truncate(path, end)
        sync(path)
    else:
        path.unlink()
        sync(path.parent)


def _make(folder: Path) -> None:
    """Create the folder and missing parents durably, since a file is only as durable as the names of its path."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)
