"""Chat records {"messages": [...]} as groups of token sequences, rendered by the model's chat template."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

from wsft.rollouts.records import Malformed, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_RENDERED = "messages that cannot be rendered"


def is_chat(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("messages"), list) and record.get("tokens") is None


class ChatRenderer:
    """Renders records of messages {"role", "content", ...}, as of OpenAI's fine-tuning.

    The assistant's messages are trained, up to and with the token that ends them. `weight` of a message (OpenAI's 0 or 1, or
    any number) times that of the record is the advantage of its tokens; 0: not trained. `tools` of the record go to the
    template.

    Where the template writes a message otherwise once others follow it (as with the reasoning of earlier turns), each of the
    assistant's messages becomes a sequence of its own, behind what it saw when it was written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]):
        self._tokenizer, self._ends = tokenizer, end_tokens

    def group(self, record: dict) -> dict:
        """An Atropos group, with token-level advantages. Raises Malformed."""
        messages, tools = record["messages"], record.get("tools")
        weights = [self._weight(message, record) for message in messages]
        spoken = [i for i, weight in enumerate(weights) if weight]
        if not spoken:
            raise Malformed(NOT_RENDERED, "no message of the assistant has a weight")
        texts = {i: (self._text(messages[:i], tools, True), self._text(messages[: i + 1], tools)) for i in spoken}
        for before, after in texts.values():
            if not after.startswith(before):
                raise Malformed(NOT_RENDERED, f"the template does not continue its prompt: {short(before[-40:])}")
        whole = self._text(messages, tools)
        if all(whole.startswith(after) for _, after in texts.values()):
            parts = [(whole, [(len(texts[i][0]), len(texts[i][1]), weights[i]) for i in spoken])]
        else:
            parts = [(texts[i][1], [(len(texts[i][0]), len(texts[i][1]), weights[i])]) for i in spoken]
        rows = [self._row(text, spans) for text, spans in parts]
        names = ("tokens", "masks", "advantages")
        return record | {name: [row[n] for row in rows] for n, name in enumerate(names)} | {"messages": None}

    def _weight(self, message: Any, record: dict) -> float:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Malformed(NOT_RENDERED, f"found {short(message)}, expected an object with a role")
        weights = [place.get("weight") for place in (message, record)]
        weights = [1 if weight is None else weight for weight in weights]
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise Malformed(NOT_RENDERED, f"found weight {short(weight)}, expected a number")
        return weights[0] * weights[1] if message["role"] == "assistant" else 0.0

    def _text(self, messages: list[dict], tools: list | None, prompt: bool = False) -> str:
        plain = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is code of the model's author, and may raise anything
            raise Malformed(NOT_RENDERED, f"{type(error).__name__}: {str(error).split(chr(10))[0]}") from error

    def _row(self, text: str, spans: list[tuple[int, int, float]]) -> tuple[list[int], list[int], list[float]]:
        """Tokens, mask (0/1) and advantages of a text, of which the spans of characters are trained with their weights."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        mask, advantages = [0] * len(ids), [0.0] * len(ids)
        for begin, end, weight in spans:
            first, last = (bisect.bisect_left(starts, place) for place in (begin, end))
            ended = [n for n in range(first, last) if ids[n] in self._ends]
            last = ended[-1] + 1 if ended else last  # what follows is written by the template
            mask[first:last], advantages[first:last] = [1] * (last - first), [float(weight)] * (last - first)
        return ids, mask, advantages
