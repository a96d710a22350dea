"""The test environment: groups of real text with known advantages, for a real Atropos server or into a file.

    python -m wsft.environment --url http://localhost:8000 --tokenizer FOLDER --pattern mixed
    python -m wsft.environment --tokenizer FOLDER --pattern increasing --groups 64 --output rollouts.jsonl
    python -m wsft.environment --url http://localhost:8000 --tokenizer FOLDER --pattern custom --texts weighted.jsonl

A line of weighted.jsonl is one prompt with its completions, each a list of text pieces with weights. A token has the weight of
the piece that contains its first character other than white space; the end of the turn that of the last piece, which may
be empty:

    {"prompt": "Who are you?", "completions": [[["I am ", 0.0], ["a model", 1.0], ["", 0.5]], [["Guess.", -1.0]]]}

Knows nothing of torch, ranks or the trainer. It does not sample from a model, so its groups have no logprobs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

import requests

from wsft.environment.texts import CUSTOM, PATTERNS, built_in_texts, groups, load_tokenizer, read_texts, tokenise_all
from wsft.errors import UserError
from wsft.rollouts.answers import HEADERS, never_sent
from wsft.rollouts.client import CONNECT_SECONDS, CONTROL_READ_SECONDS

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # interval in seconds at which a server without demand is polled
QUEUED_BATCHES = 3  # batches ahead of the trainer; default of max_batches_offpolicy in atroposlib's environments


# -- where groups go --------------------------------------------------------------------------------------------------


class _NotYet(Exception):
    """The server cannot take a group now, and may recover."""

    def __init__(self, reason: str, *, never_sent: bool = False):
        super().__init__(reason)
        self.never_sent = never_sent  # the request certainly did not reach the server


class AtroposEnvironment:
    """An environment of an Atropos server: registers, keeps a few batches in its queue, recovers from restarts.

    Posts only after a trainer has registered: a post to a server without a trainer prevents trainers from registering.
    """

    def __init__(self, url: str, group_size: int, max_token_len: int):
        self._url, self._group_size, self._max_token_len = url.rstrip("/"), group_size, max_token_len
        self._env_id: int | None = None
        self._batch_size = 0
        self._said = ""

    def post(self, group: dict) -> None:
        """Wait until the server needs a group, then send it at most once."""
        pause = FIRST_PAUSE
        while not (self._is_wanted() and self._send(group)):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_wanted(self) -> bool:
        """Poll the server, and register if needed. Returns whether to post, by the rule of atroposlib's env_manager."""
        try:
            if self._env_id is None:
                self._register()
            status = self._ask("GET", "/status-env", {"env_id": self._env_id})
        except _NotYet as reason:
            self._wait_for(str(reason))
            return False
        return status["queue_size"] * self._group_size < QUEUED_BATCHES * self._batch_size

    def _register(self) -> None:
        environment = {"max_token_length": self._max_token_len, "desired_name": "wsft", "weight": 1.0}
        answer = self._ask("POST", "/register-env", environment | {"group_size": self._group_size})
        if answer["status"] != "success":
            raise _NotYet(f"{self._url} answers {answer['status']!r}")
        self._batch_size = self._ask("GET", "/info")["batch_size"]
        self._env_id, self._said = answer["env_id"], ""
        log.info("registered at %s as environment %d; it makes batches of %d", self._url, self._env_id, self._batch_size)
        if self._batch_size % self._group_size:
            log.warning(
                "batches of %d cannot be made of groups of %d alone: the trainer will wait for ever unless other "
                "environments fill the gaps; choose a --group_size that divides it",
                self._batch_size,
                self._group_size,
            )

    def _send(self, group: dict) -> bool:
        """Whether the group was sent. It is sent again only if it certainly did not arrive, since a duplicate would count
        twice."""
        try:
            self._ask("POST", "/scored_data", group | {"env_id": self._env_id})
        except _NotYet as reason:
            self._wait_for(str(reason))
            if reason.never_sent:
                return False
            log.warning("one group may not have arrived, and is not sent again")
        return True

    def _wait_for(self, reason: str) -> None:
        self._env_id = None  # a restarted server has no registrations
        if reason != self._said:
            log.info("waiting: %s", reason)
            self._said = reason

    def _ask(self, method: str, path: str, body: dict | None = None) -> dict:
        url = f"{self._url}{path}"
        try:
            timeout = (CONNECT_SECONDS, CONTROL_READ_SECONDS)
            response = requests.request(method, url, json=body, headers=HEADERS, timeout=timeout)
            answer = response.json() if response.status_code == 200 else None
        except ValueError as error:  # not a URL, or not JSON
            raise UserError(
                f"{url} is not of an Atropos server ({error}); expected --url like http://localhost:8000"
            ) from error
        except requests.RequestException as error:
            raise _NotYet(f"{self._url} cannot be reached", never_sent=never_sent(error)) from error
        if response.status_code >= 500:  # answer of a restarted server to an unknown environment
            raise _NotYet(f"{path} answers {response.status_code}")
        if answer is None:
            raise UserError(
                f"{url} answers {response.status_code}, expected 200: is this an Atropos server? {response.text[:200]}"
            )
        return answer


def write(records: Iterator[dict], path: Path) -> None:
    """Write one record per line; the file appears once complete."""
    aside = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w") as lines:
        lines.writelines(json.dumps(group) + "\n" for group in records)
        lines.flush()
        os.fsync(lines.fileno())
    aside.replace(path)


# -- command line -----------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m wsft.environment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://localhost:8000", help="the Atropos server (default: %(default)s)")
    add("--tokenizer", required=True, metavar="FOLDER", help="folder or hub name of the tokenizer of the model to train")
    patterns = "".join(f"; {name}: {function.__doc__.rstrip('.')}" for name, function in PATTERNS.items())
    add(
        "--pattern",
        required=True,
        choices=[*PATTERNS, CUSTOM],
        metavar="PATTERN",
        help=f"the advantages of a completion's tokens. {CUSTOM}: the weights in --texts{patterns}",
    )
    add("--level", choices=["token", "sequence"], default="token", help="sequence: scores only, no token-level advantages")
    add("--texts", type=Path, metavar="FILE", help="JSONL of weighted texts, as above; built-in questions if unset")
    add("--groups", type=_at_least(0), default=0, metavar="N", help="groups to make; 0: until stopped (default)")
    add("--group_size", type=_at_least(1), metavar="G", help="sequences in a group; unset: as the first text has completions")
    add("--seed", type=int, default=0, metavar="S", help="seed of the order of texts and of random patterns")
    add("--max_token_len", type=_at_least(2), default=4096, metavar="L", help="longest sequence allowed (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the groups to this JSONL file instead of posting them")
    args = parser.parse_args()
    if args.pattern == CUSTOM and args.texts is None:
        parser.error("--pattern custom takes its weights from a file: give --texts FILE")
    if args.output and not args.groups:
        parser.error("--output needs an end: give --groups N")
    return args


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def _stop(signal_number: int, frame: object) -> NoReturn:
    os._exit(0)  # not sys.exit: some of the imports below catch SystemExit, and there is nothing to clean up


def run(args: argparse.Namespace) -> None:
    texts = read_texts(args.texts) if args.texts else built_in_texts()
    prompts = tokenise_all(texts, load_tokenizer(args.tokenizer), args.max_token_len)
    group_size = args.group_size or len(prompts[0])
    records = groups(prompts, args.pattern, args.level, group_size, args.seed)
    records = islice(records, args.groups or None)
    if args.output:
        write(records, args.output)
        return
    environment = AtroposEnvironment(args.url, group_size, args.max_token_len)
    for group in records:
        environment.post(group)
    log.info("posted %d groups", args.groups)


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s environment: %(message)s")
    log.setLevel(logging.INFO)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"wsft.environment: error: {error}")
