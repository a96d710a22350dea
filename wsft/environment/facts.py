"""A task that a model of 135M parameters learns from its own samples in minutes: two of three facts of a sentence as JSON.

Prompts and reward, without dependencies; the environment for Atropos is facts_env.py.

    Return city and name as JSON: Meet David from Milan, age 63.  ->  {"city": "Milan", "name": "David"}
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

SYSTEM = "You answer in JSON."
MAX_TOKENS = 26  # right answers have 13 to 22, with the end of the turn
NAMES = [
    "Tom", "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria",
    "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Max", "Lucy", "Oscar", "Nina", "Peter", "Julia",
    "Simon", "Eva", "Alice", "Bob", "Carl", "Diana", "Eric", "Fiona", "George", "Helen", "Ivan", "Jane",
]  # fmt: skip
CITIES = [
    "Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Tokyo", "Boston", "Chicago", "Lisbon", "Prague",
    "Dublin", "Athens", "Cairo", "Delhi", "Seoul", "Lima", "Toronto", "Sydney", "Milan", "Denver", "Dallas", "Munich",
]  # fmt: skip
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, aged {age}, comes from {city}.",
    "In {city} lives {name}, who is {age}.",
    "Meet {name} from {city}, age {age}.",
)


@dataclass(frozen=True)
class Question:
    text: str
    wanted: dict[str, str | int]  # the two facts

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]


def questions(held_out: bool, seed: int) -> Iterator[Question]:
    """An endless sequence. Held-out questions are about every fourth name and city, which no other question is about."""
    rng = random.Random(f"{held_out} {seed}")
    names, cities = ([word for i, word in enumerate(words) if (i % 4 == 0) == held_out] for words in (NAMES, CITIES))
    while True:
        facts = {"name": rng.choice(names), "age": rng.randint(10, 90), "city": rng.choice(cities)}
        first, second = rng.sample(list(facts), 2)
        sentence = rng.choice(SENTENCES).format(**facts)
        yield Question(f"Return {first} and {second} as JSON: {sentence}", {first: facts[first], second: facts[second]})


def reward(question: Question, answer: str) -> float:
    """The share of the wanted facts that stand behind their key, halved unless the answer is JSON of these two keys alone."""
    found = [re.search(rf'"{key}"\s*:\s*"?{fact}"?\s*[,}}\n]', answer + "\n") for key, fact in question.wanted.items()]
    share = sum(each is not None for each in found) / len(found)
    return share if _is_exact(question, answer) else share / 2


def _is_exact(question: Question, answer: str) -> bool:
    try:
        parsed = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(parsed, dict) or parsed.keys() != question.wanted.keys() or isinstance(parsed.get("age"), str):
        return False
    return all(answer.count(f'"{key}"') == 1 for key in parsed)  # json.loads keeps the last of several guesses
