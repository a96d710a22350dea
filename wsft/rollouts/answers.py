"""Parsing the bodies, errors and failures of the Atropos server, and how to connect to it. Stateless."""

from __future__ import annotations

from urllib.parse import urlsplit

import requests
from urllib3.exceptions import MaxRetryError, NewConnectionError

from wsft.config import without_password
from wsft.errors import UserError
from wsft.rollouts.json_parser import parse_json

# gzip, the default of requests, more than doubles the server's time. A new connection per request: on a kept-alive one
# it is unknown whether the server read a request that failed.
HEADERS = {"Accept-Encoding": "identity", "Connection": "close"}


def decode(body: bytes) -> list[dict]:
    """The groups of a body of `GET /batch`; none for null. ValueError if it is not JSON.

    Long rows of numbers are returned as arrays (json_parser.py); integers beyond 64 bits as floats, those beyond float range as
    integers (neither is a valid token id).
    """
    groups = parse_object(body).get("batch") or []
    if not isinstance(groups, list):
        raise ValueError(f"its batch is a JSON {type(groups).__name__}, not a list")
    return groups


def parse_object(body: bytes) -> dict:
    answer = parse_json(body)
    if not isinstance(answer, dict):
        raise ValueError(f"the body is a JSON {type(answer).__name__}, not an object")
    return answer


def is_batch(body: bytes) -> bool:
    """Whether a body is certainly a batch, without parsing 107 MB: null and error answers are short.

    A truncated body without Content-Length (through a proxy) lacks the closing brackets.
    """
    return len(body) > 1024 and body.startswith(b'{"batch":[{') and body.rstrip().endswith(b"}]}")


def never_sent(error: requests.RequestException) -> bool:
    """Whether a request certainly did not reach the server: DNS failure, no route, refused, or connect timeout."""
    cause = error.args[0] if error.args else None
    refused = isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError)
    return refused or isinstance(error, requests.ConnectTimeout)


def is_of_a_proxy(response: requests.Response) -> bool:
    """Whether the answer is that of a proxy or gateway, not of the server (uvicorn). Not for a gateway timeout, after which the
    server may have got the request."""
    return response.status_code in (502, 503, 504) and "uvicorn" not in response.headers.get("Server", "")


def describe_proxy(response: requests.Response) -> str:
    name = response.headers.get("Server") or response.headers.get("Via") or "without a name"
    return (
        f"a proxy ({name}) answers {response.status_code}, not the server; nothing is lost. Start what is behind it, or list "
        f"the server's host in NO_PROXY"
    )


def checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"atropos_url is {without_password(url)!r}; expected scheme, host and port, like http://localhost:8000")
    return url.rstrip("/")
