"""Lines of files of records, in order or shuffled, over several epochs: JSONL, plain or compressed (.gz, .zst), and Parquet."""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from wsft.errors import UserError

log = logging.getLogger(__name__)


class Line(NamedTuple):
    name: str  # in messages: "line 17", with its file if there are several
    text: bytes  # one record as JSON, or blank
    number: int  # in its file, from 1
    path: Path


class DataFiles:
    """Args:
    data: paths or patterns such as `data/*.jsonl.gz`, separated by commas; those that a pattern matches are sorted.
    epochs: how often all lines are read.
    shuffle_seed: lines are in another random order in each epoch; None: as in the files. Lines of compressed files are then
        held in memory.

    Raises:
        UserError: no such file, or one that needs a package that is not installed.
    """

    def __init__(self, data: str, epochs: int = 1, shuffle_seed: int | None = None):
        self._data, self._epochs, self._seed = data, epochs, shuffle_seed
        parts = [data] if Path(data).is_file() else data.split(",")  # a file's name may have a comma in it
        self.paths = [path for part in parts for path in _paths(part.strip(), data)]

    def lines(self) -> Iterator[Line]:
        """Of all epochs."""
        if self._seed is None:
            for _ in range(self._epochs):
                for path in self.paths:
                    yield from self._of_file(path)
            return
        index = [place for path in self.paths for place in self._places(path)]
        files = {path: path.open("rb") for path in self.paths if _is_plain(path)}
        for epoch in range(self._epochs):
            for n in np.random.default_rng([self._seed, epoch]).permutation(len(index)):
                path, number, found = index[n]
                if isinstance(found, int):
                    files[path].seek(found)
                    found = files[path].readline()
                yield Line(self._name(path, number), found, number, path)

    def _of_file(self, path: Path) -> Iterator[Line]:
        with _opened(path) as texts:
            for number, text in enumerate(texts, 1):
                yield Line(self._name(path, number), text, number, path)

    def _places(self, path: Path) -> Iterator[tuple[Path, int, int | bytes]]:
        """Path, number, and where the line begins; or its text, of a file in which one cannot jump. Without blank lines."""
        offset = 0
        for line in self._of_file(path):
            if line.text.strip():
                yield path, line.number, offset if _is_plain(path) else line.text
            offset += len(line.text)

    def _name(self, path: Path, number: int) -> str:
        return f"line {number}" if len(self.paths) == 1 else f"line {number} of {path}"


def _paths(part: str, data: str) -> list[Path]:
    if Path(part).is_file():
        return [Path(part)]
    found = sorted(Path(path) for path in glob.glob(part, recursive=True) if Path(path).is_file())
    if not found:
        where = "" if part == data else f" (in data {data!r})"
        raise UserError(f"data {part!r} is not a file{where}: expected JSONL, one Atropos group a line")
    return found


def _is_plain(path: Path) -> bool:
    return path.suffix not in (".gz", ".zst", ".parquet")


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[bytes]]:
    """The records of a file, one as JSON in each line."""
    match path.suffix:
        case ".gz":
            with gzip.open(path) as file:
                yield iter(file)
        case ".zst":
            zstandard = _package("zstandard", path)
            with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                yield iter(io.BufferedReader(reader))
        case ".parquet":
            batches = _package("pyarrow.parquet", path).ParquetFile(path).iter_batches()
            yield (json.dumps(row).encode() for batch in batches for row in batch.to_pylist())
        case _:
            with path.open("rb") as file:
                yield iter(file)


def _package(name: str, path: Path) -> IO:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"data {str(path)!r} needs the package {name.split('.')[0]}: pip install {name.split('.')[0]}"
        ) from error
