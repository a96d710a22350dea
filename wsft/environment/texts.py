"""Groups of real text with known advantages, for the test environment.

Texts are formatted by the model's chat template and tokenized; a pattern gives each token of a completion its advantage. Knows
nothing of servers, torch, ranks or the trainer.
"""

from __future__ import annotations

import logging
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wsft.errors import UserError
from wsft.rollouts.records import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

TEXTS = Path(__file__).with_name("texts.yaml")
NULL_FIELDS = (
    *("ref_logprobs", "messages", "generation_params", "inference_logprobs", "overrides"),
    *("group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs"),
)


# -- patterns: (number n of completion tokens, whether the completion is favoured, rng) -> n advantages -----------------------


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
CUSTOM = "custom"  # weights are those of the texts


# -- texts ------------------------------------------------------------------------------------------------------------

Piece = tuple[str, Annotated[float, Field(allow_inf_nan=False)]]


class Text(BaseModel):
    """A prompt and its completions, each a list of (text, weight)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completions: list[Annotated[list[Piece], Field(min_length=1)]] = Field(min_length=1)


def built_in_texts() -> dict[str, Text]:
    """Name -> text: favoured completions have weight 1, disfavoured ones -1."""
    entries = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    return {
        f"built-in text {number}": Text(
            prompt=entry["prompt"],
            completions=[[(text, 1.0)] for text in entry["favoured"]] + [[(text, -1.0)] for text in entry["disfavoured"]],
        )
        for number, entry in enumerate(entries, 1)
    }


def read_texts(path: Path) -> dict[str, Text]:
    """Name -> text, from a JSONL file. UserError with the line that is invalid."""
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
    """A tokenized conversation of a prompt and a completion, including the end of the turn."""

    tokens: list[int]
    weights: list[float]  # of the trained tokens, which are the last ones

    @property
    def favoured(self) -> bool:
        return sum(self.weights) > 0

    def labels(self) -> list[int]:
        border = len(self.tokens) - len(self.weights)
        return [IGNORED] * border + self.tokens[border:]


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer  # takes seconds to import: after flags were checked

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {folder!r}: expected the folder of the model to train ({error})") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder!r} has no fast version, which is needed for the positions of tokens in the text"
        )
    if tokenizer.chat_template is None:
        log.warning("the tokenizer has no chat template: the conversations are prompt, line break, completion, end of text")
    return tokenizer


def tokenise(prompt: str, pieces: list[Piece], tokenizer: PreTrainedTokenizerFast) -> Completion:
    """A conversation in the model's chat template. Trained are the completion and the token that ends its turn.

    Text of the template between prompt and completion (an empty thinking block) is untrained, text after the end of the turn
    (a line break) is left out, since the model never generates either.
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
    """The text of the prompt, and the text with the completion."""
    if tokenizer.chat_template is None:
        return f"{prompt}\n", f"{prompt}\n{completion}{tokenizer.eos_token or ''}"
    asked = [{"role": "user", "content": prompt}]
    answered = [*asked, {"role": "assistant", "content": completion}]
    head = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return head, tokenizer.apply_chat_template(answered, tokenize=False)


def _first_visible(text: str, span: tuple[int, int]) -> int:
    """Position of a token's first character that is not white space, since tokenizers treat spaces before words differently."""
    return next((i for i in range(*span) if not text[i].isspace()), span[0])


def tokenise_all(texts: dict[str, Text], tokenizer: PreTrainedTokenizerFast, max_token_len: int) -> list[list[Completion]]:
    """For each prompt its tokenized completions. UserError if any is invalid, before the first group is posted."""
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
    """An endless stream of Atropos records: every prompt once per pass, in random order. Deterministic by seed."""
    rng = random.Random(seed)
    while True:
        for completions in rng.sample(prompts, len(prompts)):
            yield _group(_drawn(completions, group_size, rng), pattern, level, rng)


def _drawn(completions: list[Completion], size: int, rng: random.Random) -> list[Completion]:
    """`size` completions, alternating favoured and disfavoured ones while possible, repeated if there are too few."""
    kinds = [[c for c in completions if c.favoured is favoured] for favoured in (True, False)]
    for kind in (*kinds, kinds):
        rng.shuffle(kind)
    in_turn = [c for c in chain.from_iterable(zip_longest(*kinds)) if c is not None]
    return list(islice(cycle(in_turn), size))


def _group(completions: list[Completion], pattern: str, level: str, rng: random.Random) -> dict:
    """A record. The score of a sequence is the mean advantage of its trained tokens."""
    weights = [c.weights if pattern == CUSTOM else PATTERNS[pattern](len(c.weights), c.favoured, rng) for c in completions]
    advantages = [[0.0] * (len(c.tokens) - len(w)) + w for c, w in zip(completions, weights, strict=True)]
    return {
        "tokens": [c.tokens for c in completions],
        "masks": [c.labels() for c in completions],
        "scores": [math.fsum(w) / len(w) for w in weights],
        "advantages": advantages if level == "token" else None,
    } | dict.fromkeys(NULL_FIELDS)
