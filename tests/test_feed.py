"""Sources one by one: what a poll gives, and what is in the journal by then."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from atropos_server import group

from wsft.atropos import AtroposClient
from wsft.batching import AtroposBatchProcessor
from wsft.feed import AtroposSource
from wsft.journal import Journal


@contextmanager
def slow_server(seconds):
    """Answers as Atropos does; a batch takes its time, and no two are the same."""
    served = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"batch_size": 2, "max_token_len": 64}
            if self.path == "/batch":
                time.sleep(seconds)
                served.append(group(length=len(served) + 6))
                body = {"batch": served[-1:]}
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


@pytest.mark.parametrize("pause", [0, 0.8])
def test_a_batch_that_arrives_between_two_polls_comes_once(pause, tmp_path):
    with slow_server(1.5) as (url, served):
        source, got = open_source(url, tmp_path / "journal"), []
        while len(got) < 3:
            batch = source.poll(len(got), step=0)
            if batch is None:
                time.sleep(pause)  # so that the answer comes while nobody waits for it
            else:
                got.append(len(batch.tokens) // 2)
        assert got == [6, 7, 8] and len(served) == 3
    assert Journal(tmp_path / "journal").numbers == [0, 1, 2]
    again = open_source("http://127.0.0.1:9", tmp_path / "journal")
    assert [len(again.poll(number, step=0).tokens) // 2 for number in range(3)] == got


def test_a_batch_under_way_when_the_run_stops_is_kept_for_the_next(tmp_path):
    with slow_server(2) as (url, served):
        source = open_source(url, tmp_path / "journal")
        assert source.poll(0, step=0) is None
        source.close()
        assert len(served) == 1 and Journal(tmp_path / "journal").numbers == [0]


def test_a_body_that_cannot_be_decoded_is_counted_and_ends_nothing(tmp_path):
    Journal(tmp_path / "journal").append(0, b'{"batch": 5}')
    source = open_source("http://127.0.0.1:9", tmp_path / "journal")
    batch = source.poll(0, step=0)
    assert not len(batch.lengths) and batch.rejected == {"record is not a group": 1}
