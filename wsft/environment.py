"""The test environment: groups of real text with known advantages, for a real Atropos server or into a file.

    python -m wsft.environment --url http://localhost:8000 --tokenizer FOLDER --pattern mixed
    python -m wsft.environment --tokenizer FOLDER --pattern increasing --groups 64 --output rollouts.jsonl
    python -m wsft.environment --url http://localhost:8000 --tokenizer FOLDER --pattern custom --texts weighted.jsonl

A line of weighted.jsonl is one prompt with its completions, each cut into pieces that have a weight. A token takes the
weight of the piece in which its first character stands that is not white space; the end of the turn that of the last
piece, which may be empty:

    {"prompt": "Who are you?", "completions": [[["I am ", 0.0], ["a model", 1.0], ["", 0.5]], [["Guess.", -1.0]]]}

It knows nothing of torch, ranks or the trainer. It is no model's sampler: there are no log-probabilities in its groups.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import requests
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wsft.atropos import CONNECT_SECONDS, CONTROL_READ_SECONDS, HEADERS, never_sent
from wsft.config import UserError
from wsft.groups import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

TEXTS = Path(__file__).with_name("environment_texts.yaml")
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks at a server that wants nothing yet
QUEUED_BATCHES = 3  # how far ahead of the trainer; max_batches_offpolicy of atroposlib's environments, their default
NULL_FIELDS = (
    *("ref_logprobs", "messages", "generation_params", "inference_logprobs", "overrides"),
    *("group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs"),
)


# -- patterns: (number n of completion tokens, is the completion favoured, rng) -> n advantages -----------------------


def uniform_positive(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """1 everywhere: plain SFT."""
    return [1.0] * n


def uniform_negative(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """-1 everywhere."""
    return [-1.0] * n


def increasing(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """1/n, 2/n, ..., 1."""
    return [(i + 1) / n for i in range(n)]


def decreasing(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """1, (n-1)/n, ..., 1/n."""
    return increasing(n, favoured, rng)[::-1]


def sparse_positive(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """1 on a tenth of the tokens, at least one, drawn at random; 0 on the others."""
    chosen = set(rng.sample(range(n), math.ceil(n / 10)))
    return [float(i in chosen) for i in range(n)]


def end_weighted(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """1 on the last quarter (rounded up), 0.1 before it."""
    end = math.ceil(n / 4)
    return [0.1] * (n - end) + [1.0] * end


def mixed(n: int, favoured: bool, rng: random.Random) -> list[float]:
    """1 everywhere in a favoured completion, -1 everywhere in a disfavoured one."""
    return [1.0 if favoured else -1.0] * n


Pattern = Callable[[int, bool, random.Random], list[float]]
PATTERNS: dict[str, Pattern] = {
    pattern.__name__: pattern
    for pattern in (uniform_positive, uniform_negative, increasing, decreasing, sparse_positive, end_weighted, mixed)
}
CUSTOM = "custom"  # the weights of the texts themselves


# -- texts ------------------------------------------------------------------------------------------------------------

Piece = tuple[str, Annotated[float, Field(allow_inf_nan=False)]]


class Text(BaseModel):
    """One prompt and its completions, each a row of (piece of text, weight)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completions: list[Annotated[list[Piece], Field(min_length=1)]] = Field(min_length=1)


def built_in_texts() -> dict[str, Text]:
    """Where it stands -> text: favoured completions weigh 1, disfavoured ones -1."""
    entries = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    return {
        f"built-in text {number}": Text(
            prompt=entry["prompt"],
            completions=[[(text, 1.0)] for text in entry["favoured"]] + [[(text, -1.0)] for text in entry["disfavoured"]],
        )
        for number, entry in enumerate(entries, 1)
    }


def read_texts(path: Path) -> dict[str, Text]:
    """Where it stands -> text, of a JSONL file. A UserError names the line that is broken."""
    if not path.is_file():
        raise UserError(f"--texts {str(path)!r} is not a file: expected JSONL, one prompt with its completions a line")
    texts = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            texts[where] = Text.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = "".join(f"[{part!r}]" for part in first["loc"])
            raise UserError(
                f"{where}: {at + ': ' if at else ''}{first['msg']}, found {str(first['input'])[:80]!r}; expected "
                '{"prompt": text, "completions": [[[text, weight], [text, weight], ...], ...]} with finite weights'
            ) from error
    if not texts:
        raise UserError(f"--texts {str(path)!r} holds no text")
    return texts


# -- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """A tokenised conversation of one prompt and one completion, up to and including the end of the turn."""

    tokens: list[int]
    weights: list[float]  # of the trained tokens, which are the last len(weights) ones

    @property
    def favoured(self) -> bool:
        return sum(self.weights) > 0

    def labels(self) -> list[int]:
        border = len(self.tokens) - len(self.weights)
        return [IGNORED] * border + self.tokens[border:]


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer  # seconds to import: not before a wrong flag has been said

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {folder!r}: expected the folder of the model to train ({error})") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {folder!r} has no fast version, which alone tells where a token stands in the text")
    if tokenizer.chat_template is None:
        log.warning("the tokenizer has no chat template: the conversations are prompt, line break, completion, end of text")
    return tokenizer


def tokenise(prompt: str, pieces: list[Piece], tokenizer: PreTrainedTokenizerFast) -> Completion:
    """One conversation as the model's chat template writes it. Trained: the completion and the token that ends its turn.

    What the template puts between prompt and completion (an empty thinking block) is untrained, what it puts after
    the end of the turn (a line break) is left out: the model never writes either.
    """
    text = "".join(piece for piece, _ in pieces)
    head, whole = _conversation(prompt, text, tokenizer)
    prompt_tokens = tokenizer(head, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    tokens, spans = encoded["input_ids"], encoded["offset_mapping"]
    start = whole.find(text, len(head))
    if not text.strip() or not whole.startswith(head) or tokens[: len(prompt_tokens)] != prompt_tokens or start < 0:
        raise UserError(
            f"the chat template does not continue the prompt with the completion {text[:60]!r} as it is: expected a "
            "completion that is not blank and has no white space at its ends, and a template that keeps the prompt"
        )
    stop = start + len(text)
    border = next(i for i in range(len(prompt_tokens), len(tokens)) if spans[i][1] > start)
    after = next((i for i in range(border, len(tokens)) if spans[i][0] >= stop), len(tokens))
    ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    end = next((i + 1 for i in range(after, len(tokens)) if tokens[i] in ends), after)

    starts = list(accumulate((len(piece) for piece, _ in pieces[:-1]), initial=start))
    weights = [pieces[max(0, bisect_right(starts, _first_visible(whole, span)) - 1)][1] for span in spans[border:end]]
    return Completion(tokens[:end], weights)


def _conversation(prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The text that asks for the completion, and the text with the completion."""
    if tokenizer.chat_template is None:
        return f"{prompt}\n", f"{prompt}\n{completion}{tokenizer.eos_token or ''}"
    asked = [{"role": "user", "content": prompt}]
    answered = [*asked, {"role": "assistant", "content": completion}]
    head = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return head, tokenizer.apply_chat_template(answered, tokenize=False)


def _first_visible(text: str, span: tuple[int, int]) -> int:
    """Where a token's first character stands that is not white space. Tokenizers disagree on the space before a word."""
    return next((i for i in range(*span) if not text[i].isspace()), span[0])


def tokenise_all(texts: dict[str, Text], tokenizer: PreTrainedTokenizerFast, max_token_len: int) -> list[list[Completion]]:
    """Per prompt its completions. All are looked at before the first group leaves: a UserError names what cannot be."""
    prompts = []
    for where, text in texts.items():
        try:
            completions = [tokenise(text.prompt, pieces, tokenizer) for pieces in text.completions]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        longest = max(len(completion.tokens) for completion in completions)
        if longest > max_token_len:
            raise UserError(f"{where}: a sequence of {longest} tokens; expected at most {max_token_len} (--max_token_len)")
        prompts.append(completions)
    return prompts


# -- groups -----------------------------------------------------------------------------------------------------------


def groups(prompts: list[list[Completion]], pattern: str, level: str, group_size: int, seed: int) -> Iterator[dict]:
    """Atropos records without end: every prompt once in an order drawn anew for each pass. The same seed, the same groups."""
    rng = random.Random(seed)
    while True:
        for completions in rng.sample(prompts, len(prompts)):
            yield _group(_drawn(completions, group_size, rng), pattern, level, rng)


def _drawn(completions: list[Completion], size: int, rng: random.Random) -> list[Completion]:
    """`size` completions, favoured and disfavoured in turn while both last; where they are too few, again from the first."""
    kinds = [[c for c in completions if c.favoured is favoured] for favoured in (True, False)]
    for kind in (*kinds, kinds):
        rng.shuffle(kind)
    in_turn = [c for c in chain.from_iterable(zip_longest(*kinds)) if c is not None]
    return list(islice(cycle(in_turn), size))


def _group(completions: list[Completion], pattern: str, level: str, rng: random.Random) -> dict:
    """One record. A sequence's score is the mean advantage of its trained tokens."""
    weights = [c.weights if pattern == CUSTOM else PATTERNS[pattern](len(c.weights), c.favoured, rng) for c in completions]
    advantages = [[0.0] * (len(c.tokens) - len(w)) + w for c, w in zip(completions, weights, strict=True)]
    return {
        "tokens": [c.tokens for c in completions],
        "masks": [c.labels() for c in completions],
        "scores": [math.fsum(w) / len(w) for w in weights],
        "advantages": advantages if level == "token" else None,
    } | dict.fromkeys(NULL_FIELDS)


# -- where groups go --------------------------------------------------------------------------------------------------


class _NotYet(Exception):
    """The server takes nothing now; time will mend it."""

    def __init__(self, reason: str, *, never_sent: bool = False):
        super().__init__(reason)
        self.never_sent = never_sent  # the request surely did not reach the server


class AtroposEnvironment:
    """One environment of an Atropos server: registers, keeps a few batches in its queue, outlives its restarts.

    Never posts unregistered: what is posted to a server without a trainer keeps every trainer from registering there.
    """

    def __init__(self, url: str, group_size: int, max_token_len: int):
        self._url, self._group_size, self._max_token_len = url.rstrip("/"), group_size, max_token_len
        self._env_id: int | None = None
        self._batch_size = 0
        self._said = ""

    def post(self, group: dict) -> None:
        """Wait until the server wants a group, then send this one: once, whatever becomes of it on the way."""
        pause = FIRST_PAUSE
        while not (self._is_wanted() and self._send(group)):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_wanted(self) -> bool:
        """One look at the server, registering where needed; the queue is held full as atroposlib's env_manager holds it."""
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
        """Whether this group is done with. Only one that surely did not arrive is sent again: twice would double it."""
        try:
            self._ask("POST", "/scored_data", group | {"env_id": self._env_id})
        except _NotYet as reason:
            self._wait_for(str(reason))
            if reason.never_sent:
                return False
            log.warning("one group may not have arrived, and is not sent again")
        return True

    def _wait_for(self, reason: str) -> None:
        self._env_id = None  # a server that was down has forgotten it
        if reason != self._said:
            log.info("waiting: %s", reason)
            self._said = reason

    def _ask(self, method: str, path: str, body: dict | None = None) -> dict:
        url = f"{self._url}{path}"
        try:
            timeout = (CONNECT_SECONDS, CONTROL_READ_SECONDS)
            response = requests.request(method, url, json=body, headers=HEADERS, timeout=timeout)
            answer = response.json() if response.status_code == 200 else None
        except ValueError as error:  # no URL, or no JSON
            raise UserError(
                f"{url} is not of an Atropos server ({error}); expected --url like http://localhost:8000"
            ) from error
        except requests.RequestException as error:
            raise _NotYet(f"{self._url} cannot be reached", never_sent=never_sent(error)) from error
        if response.status_code >= 500:  # so a server that restarted answers an environment it does not know
            raise _NotYet(f"{path} answers {response.status_code}")
        if answer is None:
            raise UserError(
                f"{url} answers {response.status_code}, expected 200: is this an Atropos server? {response.text[:200]}"
            )
        return answer


def write(records: Iterator[dict], path: Path) -> None:
    """One record a line; the file appears when it is whole."""
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
    add("--level", choices=["token", "sequence"], default="token", help="sequence: scores only, no advantages per token")
    add("--texts", type=Path, metavar="FILE", help="JSONL of weighted texts, as above; built-in questions if unset")
    add("--groups", type=_at_least(0), default=0, metavar="N", help="groups to make; 0: until stopped (default)")
    add("--group_size", type=_at_least(1), metavar="G", help="sequences in a group; unset: as the first text has completions")
    add("--seed", type=int, default=0, metavar="S", help="of the order of the texts and of what is random in a pattern")
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
    os._exit(0)  # not sys.exit: some of the imports below swallow a SystemExit, and there is nothing to tidy up


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


if __name__ == "__main__":
    main()
