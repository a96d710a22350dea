"""Proxies and failures of HTTP requests. Knows nothing of any server."""

from __future__ import annotations

import contextlib
import ipaddress
from urllib.parse import urlsplit

import requests


def cause_of(error: requests.RequestException) -> str:
    """The innermost exception that requests and urllib3 wrapped, such as "[Errno 111] Connection refused"."""
    cause = str(error).rsplit(": ", 1)[-1].rstrip("\"')")
    return cause + ")" * (cause.count("(") - cause.count(")"))


def proxies_for(url: str) -> dict[str, None]:
    """Proxies for requests: none to this machine, else those of the environment."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return {"http": None, "https": None, "all": None}
    return {}
