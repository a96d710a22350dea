"""Files of records: several, compressed, Parquet, shuffled, over epochs; each resumes after any batch without a difference."""

import gzip
import importlib
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import make_group, write_groups
from test_feed import read_all

from wsft import WeightedSFTConfig
from wsft.errors import UserError
from wsft.rollouts.batch import AtroposBatchProcessor
from wsft.rollouts.data_files import DataFiles
from wsft.rollouts.sources import FileSource

SIZES = [2, 2, 4, 2, 1, 1, 3, 2, 2, 4, 1]


@pytest.fixture
def groups(rng):
    return [make_group(rng, [6] * n, env_id=i) for i, n in enumerate(SIZES)]


@pytest.fixture
def folder(groups, tmp_path):
    """The groups in four files of all kinds, in order; and all in one."""
    write_groups(tmp_path / "one.jsonl", groups)
    (tmp_path / "parts").mkdir()
    write_groups(tmp_path / "parts" / "a.jsonl", groups[:3])
    plain = [write_groups(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((groups[3:6], groups[6:8]))]
    with open(plain[0], "rb") as source, gzip.open(tmp_path / "parts" / "b.jsonl.gz", "wb") as file:
        shutil.copyfileobj(source, file)
    with open(plain[1], "rb") as source:
        (tmp_path / "parts" / "c.jsonl.zst").write_bytes(zstandard.compress(source.read()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(groups[8:]), tmp_path / "parts" / "d.parquet")
    return tmp_path


def batches(files, size=4, position=None):
    return read_all(FileSource(files, size, AtroposBatchProcessor(), position))


def tokens_of(found):
    return [batch.tokens.tolist() for batch, _ in found]


def test_several_files_of_all_kinds_are_read_as_one(folder, groups):
    wanted = tokens_of(batches(DataFiles(str(folder / "one.jsonl"))))
    assert tokens_of(batches(DataFiles(f"{folder}/parts/*"))) == wanted and sum(map(len, wanted)) == 6 * sum(SIZES)
    named = ",".join(str(folder / "parts" / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"))
    assert tokens_of(batches(DataFiles(named))) == wanted
    (folder / "a, b.jsonl").write_bytes((folder / "one.jsonl").read_bytes())
    assert tokens_of(batches(DataFiles(f"{folder}/a, b.jsonl"))) == wanted
    assert [line.name for line in DataFiles(named).lines()][3] == f"line 1 of {folder}/parts/b.jsonl.gz"


@pytest.mark.parametrize("what", ["one.jsonl", "parts/*"])
@pytest.mark.parametrize("epochs, seed", [(1, 3), (2, None), (3, 3)])
def test_shuffled_epochs_resume_after_any_batch(what, epochs, seed, folder, groups):
    files = lambda: DataFiles(f"{folder}/{what}", epochs, seed)  # noqa: E731
    whole = batches(files())
    seen = [group["env_id"] for group in map(json.loads, (line.text for line in files().lines()))]
    by_epoch = [seen[i * len(groups) : (i + 1) * len(groups)] for i in range(epochs)]
    assert all(sorted(epoch) == list(range(len(groups))) for epoch in by_epoch)
    assert len({tuple(epoch) for epoch in by_epoch}) == (epochs if seed else 1)
    assert (by_epoch[0] == sorted(by_epoch[0])) == (seed is None)
    assert sum(len(batch.lengths) for batch, _ in whole) == epochs * sum(SIZES)
    for done, (_, position) in enumerate(whole, 1):
        assert tokens_of(batches(files(), position=json.loads(json.dumps(position)))) == tokens_of(whole[done:])


def test_the_order_is_of_the_seed(folder):
    order = lambda seed: [line.number for line in DataFiles(f"{folder}/one.jsonl", 1, seed).lines()]  # noqa: E731
    assert order(1) == order(1) != order(2)


def test_lines_that_changed_are_refused_also_of_compressed_files(folder, groups):
    (_, position), *_ = batches(DataFiles(f"{folder}/parts/*"), 6)
    with gzip.open(folder / "parts" / "b.jsonl.gz", "wb") as file:
        file.write(b"{}\n")
    assert len(tokens_of(batches(DataFiles(f"{folder}/parts/*"), 6, position))) > 1  # behind what was read
    (folder / "parts" / "a.jsonl").rename(folder / "parts" / "z.jsonl")
    with pytest.raises(UserError, match=r"has changed in the part that this run has read \(those lines differ"):
        batches(DataFiles(f"{folder}/parts/*"), 6, position)


def test_what_is_missing_is_a_sentence(folder, monkeypatch):
    with pytest.raises(UserError, match=r"data '.*/none\*' is not a file \(in data '.*one.jsonl, .*none\*'\): expected JSONL"):
        DataFiles(f"{folder}/one.jsonl, {folder}/none*")

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    for name, package in (("c.jsonl.zst", "zstandard"), ("d.parquet", "pyarrow")):
        with pytest.raises(UserError, match=f"{name}' needs the package {package}: pip install {package}"):
            batches(DataFiles(f"{folder}/parts/{name}"))
    with pytest.raises(ValueError, match="epochs and shuffle are for data, which is not set"):
        WeightedSFTConfig(model_name="m", epochs=2)
