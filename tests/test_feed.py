"""Sources and the feed: what they give, when, and what is in the journal by then."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from atropos_server import group
from fed_run import wait_until

from wsft import WeightedSFTConfig
from wsft.atropos import AtroposClient
from wsft.batching import AtroposBatchProcessor
from wsft.config import UserError
from wsft.feed import AtroposSource, Feed
from wsft.journal import Journal


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


def test_a_body_that_cannot_be_decoded_is_counted_and_ends_nothing(tmp_path):
    Journal(tmp_path / "journal").append(0, b'{"batch": 5}')
    source = open_source("http://127.0.0.1:9", tmp_path / "journal")
    batch, _ = source.take(0, step=0, over=threading.Event())
    assert not len(batch.lengths) and batch.rejected == {"record is not a group": 1}


class OneRank:
    """What a feed wants of the world, for one rank."""

    rank, size = 0, 1

    def words(self, word):
        return [word]

    def agree(self, error):
        raise error

    def broadcast(self, arrays, like, source):
        return arrays


def open_feed(url, folder, **settings):
    config = WeightedSFTConfig(model_name="none", training_steps=3, **settings)
    return Feed(config, open_source(url, folder), OneRank(), SimpleNamespace(code=0), {})


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
