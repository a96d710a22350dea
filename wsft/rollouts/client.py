"""The trainer's client of the Atropos API: registers, fetches batches, recovers from outages and restarts of the server.

Knows nothing of torch, ranks or disks. The server removes a batch from its queue before it sends it, so a `GET /batch` that may
have reached it is not sent again: possibly lost batches are counted and logged. `poll` recovers from every fault that time or a
new registration can fix; others are an `AtroposError`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import KW_ONLY, dataclass, field

import requests

from wsft.config import without_password
from wsft.connections import cause_of, proxies_for
from wsft.errors import UserError
from wsft.rollouts.answers import (
    HEADERS,
    checked_url,
    describe_proxy,
    is_batch,
    is_of_a_proxy,
    never_sent,
    parse_object,
)

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
BATCH_READ_SECONDS = 900.0  # between two packets; the server takes 8 s and more to the first byte of 107 MB
CONTROL_READ_SECONDS = 60.0  # the server blocks while it writes a big batch
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between attempts without a batch
REMIND_SECONDS = 30.0  # between two warnings about one outage
STALL_SECONDS = 30.0  # null answers before the server's queue is examined
ERRORS_BEFORE_LOOK = 3  # consecutive 500s before the registration is checked
UNREGISTERED = -1  # the batch_size in GET /info when no trainer is registered


class AtroposError(UserError):
    """A fault of the server or its settings that does not go away by itself."""


class _Fault(Exception):
    """A request failed, and may succeed later."""

    def __init__(self, reason: str, *, state: str = "unusable", quiet: bool = False):
        super().__init__(reason)
        self.state = state  # "server {state}"
        self.quiet = quiet  # logged already, or expected: no warning unless it lasts


@dataclass
class AtroposClient:
    """The trainer of one Atropos server. Nothing is sent before the first `poll`.

    Args:
        url: "http://host:port"; ValueError if it has no scheme or no host.
        batch_size: sequences in a batch of this server.
        timeout: seconds at a stretch that the server may be unreachable or unusable. There is no limit on waiting for a
            server that has no batch yet: environments may be slow.
        step: the trainer's step, kept up to date by the trainer and sent to a server that restarted.
        registers: False for all but one of several ranks that fetch: they neither register nor reset.

    Attributes:
        possibly_lost: batches that the server may have sent and that did not arrive.
        state: a short description for a progress line.
    """

    url: str
    _: KW_ONLY
    batch_size: int
    max_token_len: int
    num_steps: int
    timeout: float
    step: int = 0
    wandb_group: str = ""
    wandb_project: str = ""
    checkpoint_dir: str = ""
    save_checkpoint_interval: int = 0
    registers: bool = True

    possibly_lost: int = field(default=0, init=False)
    state: str = field(default="registering", init=False)

    def __post_init__(self):
        self.url = checked_url(self.url)
        self._shown = without_password(self.url)
        self._registered = not self.registers
        self._pause = FIRST_PAUSE
        self._errors = 0  # 500s in a row
        self._outage: _Outage | None = None
        self._drought: _Drought | None = None

    def poll(self) -> bytes | None:
        """Try once to fetch: the raw body of a non-empty batch, or None if there is none yet.

        Without a batch it sleeps before it returns, for 0.05 s at first and up to 1 s.
        Raises AtroposError if `timeout` is exceeded, or the server is registered with other settings.
        """
        try:
            if not self._registered:
                self._register()
            body = self._fetch()
            if body is None:
                self._end_outage()
                self._wait_for_environments()
        except _Fault as fault:
            body = None
            self._outlast(fault)
        if body is None:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return None
        self._end_outage()
        self._pause, self._drought, self.state = FIRST_PAUSE, None, "batch received"
        return body

    def look(self) -> tuple[str, bool]:
        """The state of the server as a sentence, and whether a run can start with it. Takes nothing and does not register."""
        try:
            info, queued, size = self._info(), self._ask_json("/status").get("queue_size", 0), self._latest_group_size()
        except _Fault as fault:
            return f"{self._shown} does not answer ({fault}); a run would wait {self.timeout:g} s for it", True
        try:
            if info["batch_size"] != UNREGISTERED:
                self._require_ours(info)
        except AtroposError as error:
            return str(error), False
        if self.batch_size % size:
            return (
                f"the group posted last at {self._shown} has {size} sequences, of which no batch_size {self.batch_size} can be "
                f"made: the sizes of groups must tile it; make batch_size a multiple of {size}, or change group_size"
            ), False
        known = "no trainer has registered" if info["batch_size"] == UNREGISTERED else "registered for this batch_size"
        return f"{self._shown} answers: {known}, {queued} groups wait", True

    def latest_example(self) -> dict:
        """The group posted last, as a record; without tokens if there is none. Takes nothing from the queue."""
        try:
            return self._ask_json("/latest_example")
        except _Fault as fault:
            raise AtroposError(f"{self._shown} gives no example: {fault}; start the server, or fix the URL") from fault

    # -- the batch ----------------------------------------------------------------------------------------------------

    def _fetch(self) -> bytes | None:
        """The only place that sends GET /batch. Returns the body of a batch, or None if the server has none."""
        try:
            response = self._send("GET", "/batch", BATCH_READ_SECONDS)
        except requests.RequestException as error:
            if never_sent(error):
                raise _Fault(f"it cannot be reached ({cause_of(error)})", state="unreachable") from error
            raise self._lost(f"broke off: {error!r}") from error
        if is_of_a_proxy(response) and response.elapsed.total_seconds() < CONNECT_SECONDS:
            raise _Fault(f"GET /batch did not get there: {describe_proxy(response)}", state="unreachable")
        if response.status_code >= 500:
            raise self._server_error(response.status_code)
        if response.status_code != 200:
            raise _Fault(f"GET /batch answers {response.status_code} (is this an Atropos server?)")
        self._errors = 0
        body = response.content
        if is_batch(body):
            return body
        try:
            answer = parse_object(body)
        except ValueError as error:
            raise self._lost(f"brought {len(body)} bytes that are not an answer ({error})") from error
        if answer.get("batch"):
            return body
        if answer.get("status") == "error":
            raise self._forgotten(str(answer.get("message")))
        if "batch" not in answer:
            raise _Fault(f"GET /batch answers {body[:80]!r} (is this an Atropos server?)")
        return None

    def _lost(self, what: str) -> _Fault:
        self.possibly_lost += 1
        log.warning("GET /batch %s. A batch may be lost (%d so far); continuing with the next", what, self.possibly_lost)
        return _Fault(f"GET /batch {what}", quiet=True)

    def _server_error(self, status_code: int) -> _Fault:
        """A batch with NaN is lost with a 500; a server that was reset answers 500 always."""
        fault = self._lost(f"was answered {status_code}")
        self._errors += 1
        if self.registers and self._errors % ERRORS_BEFORE_LOOK == 0:
            self._look_at_registration()
        return fault

    def _forgotten(self, message: str) -> _Fault:
        """The answer of a server that restarted, or with which no trainer has registered."""
        if self.registers:
            log.warning("the Atropos server no longer knows this trainer (did it restart?): registering again")
            self._registered = False
        return _Fault(f"GET /batch answers {message!r}", state="without a trainer", quiet=True)

    # -- registration -------------------------------------------------------------------------------------------------

    def _register(self) -> None:
        self.state = "registering"
        self._post_registration()
        info = self._info()
        if info["batch_size"] == UNREGISTERED:
            # An environment that posts before a trainer registers creates the queue whose absence makes /register work:
            # from then on /register answers 200 and does nothing.
            log.warning(
                "the Atropos server accepted the registration and ignored it (an environment posted before any trainer "
                "registered): resetting it, which drops what was posted, and registering again"
            )
            self._ask("GET", "/reset_data")
            self._post_registration()
            info = self._info()
        if info["batch_size"] == UNREGISTERED:
            raise _Fault("it answers /register with 200 and stays unregistered")
        self._require_ours(info)
        self._registered = True
        asked = ", ".join(f"{name} {value}" for name, value in self._asked().items())
        log.info("registered at %s with %s; environments can start now", self._shown, asked)

    def _post_registration(self) -> None:
        registration = self._asked() | {
            "wandb_group": self.wandb_group,
            "wandb_project": self.wandb_project,
            "checkpoint_dir": self.checkpoint_dir,
            "save_checkpoint_interval": self.save_checkpoint_interval,
            "starting_step": self.step,
            "num_steps": self.num_steps,
        }
        self._ask("POST", "/register", json=registration)

    def _asked(self) -> dict:
        return {"batch_size": self.batch_size, "max_token_len": self.max_token_len}

    def _look_at_registration(self) -> None:
        info = self._info()
        if info["batch_size"] == UNREGISTERED:
            log.warning("the Atropos server was reset: registering again")
            self._registered = False
        else:
            self._require_ours(info)

    def _require_ours(self, info: dict) -> None:
        found = {key: info.get(key) for key in self._asked()}
        if found != self._asked():
            raise AtroposError(
                f"the Atropos server at {self._shown} is registered with batch_size {found['batch_size']} and max_token_len "
                f"{found['max_token_len']}; this run asks for batch_size {self.batch_size} and max_token_len "
                f"{self.max_token_len}, and the server keeps its first registration. Restart the server, or wipe it with "
                f"GET {self._shown}/reset_data (its queue is dropped), or run with the server's values."
            )

    def _info(self) -> dict:
        info = self._ask_json("/info")
        if "batch_size" not in info:
            raise _Fault(f"GET /info answers {info} (is this an Atropos server?)")
        return info

    def _ask(self, method: str, path: str, **arguments) -> requests.Response:
        """A request that is safe to repeat."""
        try:
            response = self._send(method, path, CONTROL_READ_SECONDS, **arguments)
        except requests.RequestException as error:
            raise _Fault(f"{method} {path} failed ({cause_of(error)})", state="unreachable") from error
        if is_of_a_proxy(response):
            raise _Fault(f"{method} {path} did not get there: {describe_proxy(response)}", state="unreachable")
        if response.status_code != 200:
            raise _Fault(f"{method} {path} answers {response.status_code}: {response.text[:200]}")
        return response

    def _send(self, method: str, path: str, read_seconds: float, **arguments: object) -> requests.Response:
        url = self.url + path
        return requests.request(
            method, url, headers=HEADERS, timeout=(CONNECT_SECONDS, read_seconds), proxies=proxies_for(url), **arguments
        )

    def _ask_json(self, path: str) -> dict:
        response = self._ask("GET", path)
        try:
            return parse_object(response.content)
        except ValueError as error:
            raise _Fault(f"GET {path} answers no JSON ({error}; is this an Atropos server?)") from error

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _wait_for_environments(self) -> None:
        self.state = "waiting for a batch"
        if not self.registers:
            return  # the rank that registers checks and warns for all
        now = time.monotonic()
        if self._drought is None:
            self._drought = _Drought(next_look=now + STALL_SECONDS / 2)
        if now >= self._drought.next_look:
            self._drought.next_look = now + STALL_SECONDS / 2
            self._look_at_queue(self._drought)

    def _look_at_queue(self, drought: _Drought) -> None:
        """Warn, once until a batch comes, if the queue was twice long enough for a batch and the server formed none."""
        # After a reset and a new post, the server answers null for ever.
        self._look_at_registration()
        queued = self._ask_json("/status").get("queue_size", 0)
        sequences = queued * self._latest_group_size()
        stuck = self.batch_size <= sequences and 0 < drought.queued <= queued
        drought.queued = queued if self.batch_size <= sequences else 0
        if stuck and not drought.warned:
            drought.warned = True
            log.warning(
                "the Atropos server holds %d groups and forms no batch of %d sequences from them. The sizes of groups "
                "must tile batch_size (8 cannot be made of 3s, nor of one 16), and an environment registered with "
                "min_batch_allocation must keep posting: change batch_size or the environments' group_size, or restart "
                "the server without that environment",
                queued,
                self.batch_size,
            )

    def _latest_group_size(self) -> int:
        """Sequences in the group posted last, at least 1: an estimate of those of the queued groups."""
        try:
            return max(1, len(self._ask_json("/latest_example").get("tokens") or []))
        except _Fault:  # it answers 500 if that group contains NaN
            return 1

    # -- outages ------------------------------------------------------------------------------------------------------

    def _outlast(self, fault: _Fault) -> None:
        """Log an outage from time to time; AtroposError once it exceeds `timeout`."""
        now = time.monotonic()
        if self._outage is None:
            self._outage = _Outage(since=now, next_warning=now + REMIND_SECONDS)
        outage, down = self._outage, now - self._outage.since
        self.state = f"server {fault.state}"
        if down >= self.timeout:
            raise AtroposError(
                f"the Atropos server at {self._shown} has been {fault.state} for {down:.0f} s (limit {self.timeout:g} s): "
                f"{fault}. Start it or correct --atropos_url, or wait longer with --atropos_timeout."
            ) from fault
        if now >= outage.next_warning or not (fault.quiet or outage.warned):
            outage.next_warning, outage.warned = now + REMIND_SECONDS, True
            log.warning(
                "the Atropos server at %s is %s: %s. Trying again for another %.0f s",
                self._shown,
                fault.state,
                fault,
                self.timeout - down,
            )

    def _end_outage(self) -> None:
        if self._outage is not None and self._outage.warned:
            log.info("the Atropos server is back after %.0f s", time.monotonic() - self._outage.since)
        self._outage = None


@dataclass
class _Outage:
    """An outage of the server. Times are those of time.monotonic()."""

    since: float
    next_warning: float
    warned: bool = False


@dataclass
class _Drought:
    """The server works and has no batch yet."""

    next_look: float
    queued: int = 0  # queued groups at the last check, if enough for a batch
    warned: bool = False
