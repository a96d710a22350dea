"""Sources and the feed: what they return, when, and what is in the journal by then."""

import contextlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from atropos_server import group
from conftest import make_group, run_ranks, write_groups
from fed_run import flags, wait_until

from wsft import WeightedSFTConfig
from wsft.errors import UserError
from wsft.rollouts.batch import AtroposBatchProcessor
from wsft.rollouts.client import AtroposClient
from wsft.rollouts.data_files import DataFiles
from wsft.rollouts.feed import Feed
from wsft.rollouts.journal import Journal
from wsft.rollouts.sources import AtroposSource, EndOfData, FileSource


@contextmanager
def batch_server(answering=None):
    """Answers as Atropos does; no two batches are the same. While the event `answering` is not set, batches are asked for in
    vain. What it was asked for is in the list that comes with its address."""
    served = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"batch_size": 2, "max_token_len": 64}
            if self.path == "/batch":
                served.append(group(length=len(served) + 6))
                body = {"batch": served[-1:]}
                if answering:
                    answering.wait()
            self.answer(body)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"uuid": 1})

        def answer(self, body):
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", served
        server.shutdown()


def open_source(url, folder):
    client = AtroposClient(url, batch_size=2, max_token_len=64, num_steps=1, timeout=10)
    return AtroposSource(client, AtroposBatchProcessor(pad_token_id=0), Journal(folder), [])


def take(source, number):
    """The lengths of the batch's sequences."""
    return source.take(number, step=0, over=threading.Event())[0].lengths.tolist()


def test_batches_come_in_order_once_and_again_from_the_journal(tmp_path):
    with batch_server() as (url, served):
        source = open_source(url, tmp_path / "journal")
        got = [take(source, number) for number in range(3)]
        assert got == [[6, 6], [7, 7], [8, 8]] and len(served) == 3
    assert Journal(tmp_path / "journal").numbers == [0, 1, 2]
    again = open_source("http://127.0.0.1:9", tmp_path / "journal")
    assert [take(again, number) for number in range(3)] == got


def records(rng, sizes, env_id=0):
    """Of one environment; two of a size and prompt that follow each other may be parts of a group."""
    made = [make_group(rng, [8] * size, env_id=env_id, advantages=None) for size in sizes]
    for record in made:
        record["tokens"] = [[1, 5, *row[2:]] for row in record["tokens"]]
        record["masks"] = [[-100, -100, *row[2:]] for row in record["tokens"]]
    return made


def read_all(source):
    batches = []
    with contextlib.suppress(EndOfData):
        while True:
            batches.append(source.take(0, step=0, over=threading.Event()))
    return batches


def test_a_file_gives_the_advantages_that_a_server_gives(tmp_path, rng):
    bodies = [records(rng, [4, 2, 2]), records(rng, [2, 2, 1, 3]), records(rng, [1, 1, 4, 2])]  # 8 sequences each
    bodies[0][1]["scores"], bodies[0][2]["scores"] = [1.0, 0.0], [3.0, 2.0]
    path = write_groups(tmp_path / "data.jsonl", [record for body in bodies for record in body])
    from_file = [batch for batch, _ in read_all(FileSource(DataFiles(path), 8, AtroposBatchProcessor()))]
    processor = AtroposBatchProcessor()
    from_server = [processor.decode(body) for body in bodies]
    assert len(from_file) == 3
    for ours, theirs in zip(from_file, from_server, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.advantages.tolist() == theirs.advantages.tolist()
    means = [from_file[0].advantages[span][-1] for span in from_file[0].spans()][4:]
    assert means == pytest.approx([-0.447, -1.342, 1.342, 0.447], abs=1e-3)  # of one group of four


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 100])
def test_a_file_resumes_after_any_batch_without_a_difference(batch_size, tmp_path, rng):
    made = records(rng, [2, 2, 4, 2, 1, 1, 3, 2, 2])
    made[3]["masks"][1] = None  # one that is left out
    path = Path(write_groups(tmp_path / "data.jsonl", made))
    text = path.read_bytes()
    path.write_bytes(b'\xef\xbb\xbf{"torn": \n\n' + text)
    whole = read_all(FileSource(DataFiles(str(path)), batch_size, AtroposBatchProcessor()))
    for done, (_, position) in enumerate(whole, 1):
        processor = AtroposBatchProcessor(group_sizes={int(env_id): size for env_id, size in position["group_sizes"].items()})
        rest = read_all(FileSource(DataFiles(str(path)), batch_size, processor, json.loads(json.dumps(position))))
        assert [b.advantages.tolist() for b, _ in rest] == [b.advantages.tolist() for b, _ in whole[done:]]
        assert [b.rejected for b, _ in rest] == [b.rejected for b, _ in whole[done:]]


def test_a_file_may_grow_but_not_change_where_it_was_read(tmp_path, rng):
    path = Path(write_groups(tmp_path / "data.jsonl", records(rng, [2] * 6)))
    text = path.read_bytes()
    (first, position), *_ = read_all(FileSource(DataFiles(str(path)), 4, AtroposBatchProcessor()))
    assert len(first.lengths) == 4

    def go_on():
        return [
            len(batch.lengths) for batch, _ in read_all(FileSource(DataFiles(str(path)), 4, AtroposBatchProcessor(), position))
        ]

    path.write_bytes(text + text[: text.index(b"\n") + 1])
    assert go_on() == [4, 4, 2]
    lines = text.splitlines(keepends=True)
    swapped = [lines[1], lines[0], *lines[2:]]
    for changed in (b"\n" + text, b"".join(lines[1:]), text.replace(b"1, 5", b"1, 6", 1), b"".join(swapped)):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"has changed in the part that this run has read \(those lines differ"):
            go_on()
    path.write_bytes(lines[0])
    with pytest.raises(UserError, match="it has 1 lines, and 2 were read"):
        go_on()
    path.write_bytes(b"".join(lines[:2]) + b"other lines\n")  # behind what was read
    assert go_on() == []


def test_the_sizes_of_groups_go_with_the_position(tmp_path):
    Journal(tmp_path / "journal").append(0, json.dumps({"batch": [group(size=4) | {"env_id": 3}]}).encode())
    source = open_source("http://127.0.0.1:9", tmp_path / "journal")
    assert source.take(0, step=0, over=threading.Event())[1] == {"group_sizes": {3: 4}}


def test_a_body_that_cannot_be_decoded_is_counted_and_ends_nothing(tmp_path):
    Journal(tmp_path / "journal").append(0, b'{"batch": 5}')
    source = open_source("http://127.0.0.1:9", tmp_path / "journal")
    batch, _ = source.take(0, step=0, over=threading.Event())
    assert not len(batch.lengths) and batch.rejected == {"record is not a group": 1}


class OneRank:
    """What a feed wants of the world, for one rank."""

    def all_gather_ints(self, *values):
        return [list(values)]

    def raise_on_all_ranks(self, error):
        raise error

    def new_channel(self):
        return self

    def broadcast(self, message, size, source):
        return message


def open_feed(url, folder, **settings):
    config = WeightedSFTConfig(model_name="none", training_steps=3, **settings)
    return Feed(config, open_source(url, folder), lambda batch, step: batch, OneRank(), SimpleNamespace(code=0), {}, 0)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_next_batch_comes_while_this_one_trains_and_none_beyond_the_last(ahead, tmp_path):
    with batch_server() as (url, served):
        feed = open_feed(url, tmp_path / "journal", prefetch_batches=ahead)
        for step in range(3):
            assert feed.next(step, waiting=lambda state: None).lengths.tolist() == [6 + step] * 2
            wait_until(lambda step=step: len(served) >= min(step + 1 + ahead, 3))  # while it trains
            time.sleep(0.1)
            assert len(served) == min(step + 1 + ahead, 3)
        feed.close()
        assert len(served) == 3 and Journal(tmp_path / "journal").numbers == [0, 1, 2]


def test_a_batch_under_way_when_the_run_stops_is_kept_for_the_next(tmp_path):
    answering = threading.Event()
    with batch_server(answering) as (url, served):
        feed = open_feed(url, tmp_path / "journal")

        def stop(state):
            wait_until(lambda: served)
            feed._stop.code = 15

        assert feed.next(0, waiting=stop) is None and feed.stopped == 15
        answering.set()
        feed.close()
        assert len(served) == 1 and Journal(tmp_path / "journal").numbers == [0]


def test_a_step_waits_for_three_messages_between_ranks_and_its_thread_takes_two(tiny_model, tmp_path, rng, monkeypatch):
    monkeypatch.setenv("WSFT_MESSAGES", str(tmp_path / "messages"))
    settings = {"model_name": tiny_model, "data": write_groups(tmp_path / "data.jsonl", [make_group(rng, [6, 7])] * 4)}
    settings |= {"batch_size": 2, "device": "cpu", "output_dir": tmp_path / "run", "callbacks": "benchmarks.host:Messages"}
    for code, output in run_ranks(["train.py", *flags(settings)], 2):
        assert code == 0, output
    _, *steps = map(json.loads, (tmp_path / "messages").read_text().splitlines())  # the first looks at gradients, too
    assert [control for control, _ in steps] == [3] * 3 and sum(thread for _, thread in steps) <= 2 * 3


def test_no_batch_is_fetched_in_the_place_of_one_that_failed(tmp_path, monkeypatch):
    """Else the journal would have a hole that no later start could fill."""
    with batch_server() as (url, served):
        feed, append = open_feed(url, tmp_path / "journal", prefetch_batches=2), Journal.append

        def failing(journal, number, body):
            if number == 1:
                raise UserError("the disk is full")
            append(journal, number, body)

        monkeypatch.setattr(Journal, "append", failing)
        assert feed.next(0, waiting=lambda state: None).lengths.tolist() == [6, 6]
        with pytest.raises(UserError, match="the disk is full"):
            feed.next(1, waiting=lambda state: None)
        time.sleep(0.5)
        assert len(served) == 2 and Journal(tmp_path / "journal").numbers == [0]
