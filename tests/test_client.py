"""The client against the real server, fault by fault; the numbers in the sections are those of the server's behaviours.

A raw socket stands in for the server only where that cannot be made to misbehave: a body cut off, a wrong service.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from atropos_server import AtroposServer, atropos_server, free_port, group, post_group, register_env

from wsft.connections import proxies_for
from wsft.rollouts import client as atropos
from wsft.rollouts.answers import decode
from wsft.rollouts.batch import AtroposBatchProcessor, Batch
from wsft.rollouts.client import AtroposClient, AtroposError


@pytest.fixture(scope="module")
def process() -> Iterator[AtroposServer]:
    with atropos_server() as server:
        yield server


@pytest.fixture
def server(process) -> AtroposServer:
    """A server that holds nothing; as after GET /reset_data."""
    requests.get(f"{process.url}/reset_data", timeout=60)
    return process


@pytest.fixture
def new_server(process) -> AtroposServer:
    """A server that was just started: only this one says "not registered"."""
    restart(process)
    return process


def restart(server: AtroposServer) -> None:
    server.kill()
    server.start()


def client_of(server: AtroposServer, **settings) -> AtroposClient:
    return AtroposClient(server.url, **({"batch_size": 4, "max_token_len": 64, "num_steps": 10, "timeout": 300} | settings))


def info(server: AtroposServer) -> dict:
    return requests.get(f"{server.url}/info", timeout=60).json()


def poll_until_batch(client: AtroposClient, patience: float = 300.0) -> list[dict]:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if body := client.poll():
            return decode(body)
    raise TimeoutError(f"no batch in {patience} s; the client is {client.state}")


def post_batch(server: AtroposServer, **fields) -> None:
    """Two groups of two: one batch of the clients here."""
    for _ in range(2):
        assert post_group(server.url, None, group(2, **fields)) == "received"


def warnings(caplog, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@contextmanager
def raw_server(answer: bytes, pause: float = 0.0) -> Iterator[str]:
    """Sends the same bytes to every connection, after a pause of so many seconds, and closes it. Yields its URL."""

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed below
                return
            with connection:
                connection.recv(65536)
                time.sleep(pause)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.5)
                with suppress(OSError):
                    while connection.recv(65536):  # closed with something unread it would be a reset
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# -- a healthy server ------------------------------------------------------------------------------------------------------


def test_the_first_poll_registers_and_lets_environments_in(new_server):
    client = client_of(new_server, step=3)
    assert info(new_server)["batch_size"] == -1
    assert client.poll() is None
    assert client.state == "waiting for a batch"
    assert info(new_server) == {"batch_size": 4, "max_token_len": 64}
    env_id = register_env(new_server.url, group_size=2, patience=1)
    assert requests.get(f"{new_server.url}/status", timeout=60).json()["current_step"] == 3
    groups = [group(2, scores=[0.5, -0.5]), group(2, length=9)]
    for one in groups:
        post_group(new_server.url, env_id, one)
    delivered = poll_until_batch(client)
    assert [one["tokens"] for one in delivered] == [one["tokens"] for one in groups]
    assert [one["scores"] for one in delivered] == [one["scores"] for one in groups]
    assert client.poll() is None
    assert client.possibly_lost == 0


def test_an_empty_queue_is_waited_for_beyond_the_timeout_ever_more_slowly(server, monkeypatch):
    pauses, slept = [], 0.0

    def sleep(seconds):
        nonlocal slept
        pauses.append(seconds)
        slept += seconds

    monkeypatch.setattr(atropos, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: time.monotonic() + slept))
    client = client_of(server, timeout=0.2)
    for _ in range(7):
        assert client.poll() is None
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    post_batch(server)
    assert client.poll() is not None
    assert client.poll() is None
    assert pauses[7:] == [0.05]


def test_every_batch_is_delivered_once_to_two_clients(server):  # 2, 3, 4
    first, second = client_of(server), client_of(server, registers=False)
    first.poll()
    for number in range(12):
        post_group(server.url, None, group(2, scores=[float(number), 0.0]))
    delivered = [one for _ in range(3) for client in (first, second) for one in poll_until_batch(client)]
    assert sorted(one["scores"][0] for one in delivered) == list(range(12))
    assert first.poll() is None and second.poll() is None


def test_a_big_batch_is_handed_over_as_it_was_sent(server):  # 11
    client = client_of(server)
    client.poll()
    post_batch(server, length=20_000)
    body = client.poll()
    assert len(body) > 400_000
    read, sent = (AtroposBatchProcessor().decode(groups) for groups in (decode(body), json.loads(body)["batch"]))
    assert len(read.tokens) == 4 * 20_000
    assert all(np.array_equal(getattr(read, f.name), getattr(sent, f.name), equal_nan=True) for f in fields(Batch))


# -- registration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"batch_size": 8}, {"max_token_len": 128}])
def test_a_server_registered_for_another_batch_ends_the_run(server, other):  # 5
    client_of(server).poll()
    with pytest.raises(AtroposError, match=r"batch_size 4 and max_token_len 64; this run asks for .*reset_data"):
        client_of(server, **other).poll()


def test_a_second_run_with_the_same_batch_continues(server):
    client_of(server).poll()
    post_batch(server)
    assert client_of(server).poll() is not None


def test_a_poisoned_registration_is_cured(new_server, caplog):  # 6
    post_batch(new_server)
    client = client_of(new_server)
    client.poll()
    assert info(new_server)["batch_size"] == 4
    assert warnings(caplog, "resetting it") == 1
    post_batch(new_server)
    assert len(poll_until_batch(client)) == 2
    assert client.possibly_lost == 0


def test_a_restarted_server_gets_the_trainers_step(server, caplog):  # 7
    client = client_of(server)
    client.poll()
    client.step = 41
    restart(server)
    client.poll()
    assert client.state == "server without a trainer"
    client.poll()
    assert info(server)["batch_size"] == 4
    assert requests.get(f"{server.url}/status", timeout=60).json()["current_step"] == 41
    assert warnings(caplog, "registering again") == 1
    post_batch(server)
    assert poll_until_batch(client)
    assert client.possibly_lost == 0


def test_a_restart_poisoned_by_an_environment_is_cured(server):  # 6, 7
    client = client_of(server)
    client.poll()
    restart(server)
    post_batch(server)
    client.poll()
    client.poll()
    post_batch(server)
    assert len(poll_until_batch(client)) == 2


def test_a_reset_server_is_registered_again_after_three_errors(server):  # 8
    client = client_of(server)
    client.poll()
    requests.get(f"{server.url}/reset_data", timeout=60)
    for _ in range(atropos.ERRORS_BEFORE_LOOK + 1):
        client.poll()
    assert info(server)["batch_size"] == 4
    post_batch(server)
    assert poll_until_batch(client)


def test_a_reset_server_that_answers_null_for_ever_is_registered_again(server, monkeypatch):  # 6, 8
    monkeypatch.setattr(atropos, "STALL_SECONDS", 0.3)
    client = client_of(server)
    client.poll()
    requests.get(f"{server.url}/reset_data", timeout=60)
    post_batch(server)
    for _ in range(6):
        client.poll()
    assert info(server)["batch_size"] == 4
    post_batch(server)
    assert poll_until_batch(client)
    assert client.possibly_lost == 0


def test_a_further_rank_waits_for_the_first_to_register(new_server):
    further = client_of(new_server, registers=False)
    assert further.poll() is None
    assert further.state.startswith("server without a trainer")
    assert info(new_server)["batch_size"] == -1
    client_of(new_server).poll()
    post_batch(new_server)
    assert poll_until_batch(further)


def test_a_further_rank_gives_up_when_nobody_registers(new_server):
    further = client_of(new_server, registers=False, timeout=0.3)
    with pytest.raises(AtroposError, match=r"without a trainer for .*Trainer not registered"):
        poll_until_batch(further)
    assert info(new_server)["batch_size"] == -1


# -- lost batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_batch_with_nan_is_counted_as_lost_and_the_next_one_comes(server, caplog, number):  # 8
    client = client_of(server)
    client.poll()
    post_batch(server, scores=[number, 1.0])
    assert client.poll() is None
    assert client.possibly_lost == 1
    assert warnings(caplog, "A batch may be lost (1 so far)") == 1
    assert warnings(caplog, "Trying again") == 0  # no outage: logged once
    post_batch(server)
    assert poll_until_batch(client)
    assert client.possibly_lost == 1


BODY = json.dumps({"batch": [group(2, length=500)]}, separators=(",", ":")).encode()
CUT_OFF = [
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY[:-100], id="shorter than announced"),
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\n" + BODY[:-100], id="of no announced length"),
    pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n" + BODY[:100], id="within a chunk"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + BODY[:11], id="short and no JSON"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Le", id="within the headers"),
    pytest.param(b"", id="before the headers"),
]


@pytest.mark.parametrize("answer", CUT_OFF)
def test_a_body_that_is_cut_off_is_a_lost_batch(answer):  # 1
    with raw_server(answer) as url:
        client = AtroposClient(url, batch_size=2, max_token_len=64, num_steps=1, timeout=300, registers=False)
        assert client.poll() is None
        assert client.possibly_lost == 1


@pytest.mark.parametrize("headers", [b"Content-Length: %d\r\n" % len(BODY), b""])
def test_a_whole_body_is_a_batch_whether_or_not_its_length_is_announced(headers):
    with raw_server(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n" + BODY) as url:
        client = AtroposClient(url, batch_size=2, max_token_len=64, num_steps=1, timeout=300, registers=False)
        assert client.poll() == BODY
        assert client.possibly_lost == 0


def test_a_read_timeout_is_a_lost_batch_and_is_not_sent_again(monkeypatch):  # 1
    monkeypatch.setattr(atropos, "BATCH_READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts, nobody answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = AtroposClient(url, batch_size=2, max_token_len=64, num_steps=1, timeout=300, registers=False)
        assert client.poll() is None
        assert client.possibly_lost == 1
        listener.accept()[0].close()
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_connect_timeout_loses_nothing(monkeypatch):  # 1
    monkeypatch.setattr(atropos, "CONNECT_SECONDS", 0.2)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # fill the queue of connections, so that the next one is neither taken nor refused
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = AtroposClient(url, batch_size=2, max_token_len=64, num_steps=1, timeout=300, registers=False)
        assert client.poll() is None
        assert client.state == "server unreachable"
        assert client.possibly_lost == 0


@pytest.mark.parametrize("status", [b"502 Bad Gateway", b"503 Service Unavailable", b"504 Gateway Timeout"])
@pytest.mark.parametrize("name", [b"Server: squid/6.6\r\n", b"Via: 1.1 gateway\r\n", b""])
def test_what_a_proxy_answers_is_named_and_loses_nothing(status, name, caplog, monkeypatch):
    answer = b"HTTP/1.1 " + status + b"\r\n" + name + b"Content-Length: 2\r\n\r\nno"
    with raw_server(answer) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        client = AtroposClient(
            "http://atropos.invalid:8000", batch_size=2, max_token_len=64, num_steps=1, timeout=300, registers=False
        )
        assert client.poll() is None
    assert client.possibly_lost == 0 and client.state == "server unreachable"
    output = {b"S": "a proxy (squid/6.6)", b"V": "a proxy (1.1 gateway)", b"": "a proxy (without a name)"}[name[:1]]
    assert warnings(caplog, f"{output} answers {status[:3].decode()}, not the server; nothing is lost") == 1


def test_a_proxy_that_waited_for_the_server_may_have_lost_a_batch(monkeypatch):
    monkeypatch.setattr(atropos, "CONNECT_SECONDS", 0.2)
    with raw_server(b"HTTP/1.1 504 Gateway Timeout\r\nServer: squid\r\nContent-Length: 0\r\n\r\n", pause=0.4) as url:
        client = AtroposClient(url, batch_size=2, max_token_len=64, num_steps=1, timeout=300, registers=False)
        assert client.poll() is None
    assert client.possibly_lost == 1


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_server_on_this_machine_is_asked_directly(name, server, monkeypatch):
    monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")  # where nobody listens
    client = client_of(server)
    assert client.poll() is None and client.state == "waiting for a batch"


@pytest.mark.parametrize(
    "url, direct",
    [
        ("http://localhost:8000", True),
        ("http://127.9.0.1:1", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1:8000", False),
    ],
)
def test_which_servers_are_on_this_machine(url, direct):
    assert bool(proxies_for(url)) == direct


# -- outages ---------------------------------------------------------------------------------------------------------------


def test_an_outage_is_logged_once_and_tolerated(server, caplog):  # 7
    caplog.set_level(logging.INFO)
    client = client_of(server)
    client.poll()
    server.stop()
    for _ in range(4):
        assert client.poll() is None
    assert client.state.startswith("server unreachable")
    assert warnings(caplog, "Trying again for another 300 s") == 1
    server.start()
    while not client.state.startswith("waiting"):
        client.poll()
    post_batch(server)
    assert poll_until_batch(client)
    assert sum("is back after" in record.getMessage() for record in caplog.records) == 1
    assert client.possibly_lost == 0


def test_a_server_that_comes_later_than_the_trainer_is_waited_for():
    port = free_port()
    client = AtroposClient(f"http://127.0.0.1:{port}/", batch_size=4, max_token_len=64, num_steps=1, timeout=300)
    assert client.poll() is None
    with atropos_server(port) as server:
        while info(server)["batch_size"] == -1:
            client.poll()
        post_batch(server)
        assert poll_until_batch(client)
    assert client.possibly_lost == 0


@pytest.mark.parametrize("registers", [True, False])
def test_a_server_that_stays_away_ends_the_run(registers):
    url = f"http://127.0.0.1:{free_port()}"
    client = AtroposClient(url, batch_size=4, max_token_len=64, num_steps=1, timeout=0.5, registers=registers)
    start = time.monotonic()
    with pytest.raises(AtroposError, match=r"unreachable for .*\(limit 0.5 s\).*--atropos_timeout"):
        poll_until_batch(client)
    assert time.monotonic() - start >= 0.5
    assert client.possibly_lost == 0


@pytest.mark.parametrize("answer", [b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", b"HTTP/1.1 200 OK\r\n\r\n{}"])
def test_another_service_at_the_url_ends_the_run(answer):
    with raw_server(answer) as url:
        client = AtroposClient(url, batch_size=4, max_token_len=64, num_steps=1, timeout=0.3)
        with pytest.raises(AtroposError, match="unusable"):
            poll_until_batch(client)


# -- a queue that never becomes a batch --------------------------------------------------------------------------------------


def poll_fruitlessly(client: AtroposClient) -> None:
    """Often enough to last for seconds, by its pauses alone."""
    for _ in range(6):
        assert client.poll() is None


def test_groups_that_do_not_tile_the_batch_are_warned_of_once(server, caplog, monkeypatch):  # 10
    monkeypatch.setattr(atropos, "STALL_SECONDS", 0.3)
    client = client_of(server)
    client.poll()
    for _ in range(2):
        post_group(server.url, None, group(3))
    poll_fruitlessly(client)
    assert warnings(caplog, "holds 2 groups and forms no batch of 4 sequences") == 1


def test_an_idle_environment_with_a_minimum_allocation_is_warned_of(server, caplog, monkeypatch):  # 13
    monkeypatch.setattr(atropos, "STALL_SECONDS", 0.3)
    client = client_of(server)
    client.poll()
    register_env(server.url, group_size=2, min_batch_allocation=0.5)
    for _ in range(2):
        post_group(server.url, register_env(server.url, group_size=2), group(2))
    poll_fruitlessly(client)
    assert warnings(caplog, "min_batch_allocation") == 1


def test_a_queue_too_short_for_a_batch_is_not_warned_of(server, caplog, monkeypatch):
    monkeypatch.setattr(atropos, "STALL_SECONDS", 0.3)
    client = client_of(server)
    client.poll()
    post_group(server.url, None, group(2))
    poll_fruitlessly(client)
    assert warnings(caplog, "forms no batch") == 0


# -- numbers and addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 2**63 - 1, 2**64, 2**80, 10**400])
def test_any_integer_passes_through(server, token):  # 9
    client = client_of(server)
    client.poll()
    post_batch(server, tokens=[[1, 2, token], [3, 4]])
    delivered = poll_until_batch(client)
    assert delivered[0]["tokens"][0][2] == (token if token < 2**64 or token > 2**1024 else float(token))
    assert delivered[0]["tokens"][1] == [3, 4]


def test_null_and_error_answers_decode_to_no_groups():
    assert decode(b'{"batch":null}') == decode(b'{"status":"error","message":"","batch":[]}') == []
    with pytest.raises(ValueError):
        decode(b'{"batch":[{"tok')


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1:8000", "", "http://", "ftp://host:1"])
def test_a_url_without_scheme_or_host_is_refused(url):
    with pytest.raises(ValueError, match="like http://localhost:8000"):
        AtroposClient(url, batch_size=4, max_token_len=64, num_steps=1, timeout=1)
