"""YAML and JSON files that people write. A name that stands twice in one object is an error, where of two values the last would
win without a word; paths may begin with ~ and hold $VARIABLES.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import yaml

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]')
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class _OnceOnly(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ValueError(_twice(key.value, key.start_mark.line + 1))
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """yaml.YAMLError if it is no YAML, ValueError if it says something twice."""
    return yaml.load(text, _OnceOnly)


def parse_json(text: str) -> Any:
    """json.JSONDecodeError if it is no JSON, ValueError if it says something twice."""
    value = json.loads(text)
    objects: list[set[str] | None] = []  # the names of each that is open; None of a list
    last = ""
    for token in _JSON_TOKEN.finditer(text):
        if token[0] in "{[":
            objects.append(set() if token[0] == "{" else None)
        elif token[0] in "}]":
            objects.pop()
        elif token[0] == ":":
            name = json.loads(last)
            if name in objects[-1]:
                raise ValueError(_twice(name, text.count("\n", 0, token.start()) + 1))
            objects[-1].add(name)
        last = token[0]
    return value


def _twice(name: str, line: int) -> str:
    return f"{name} stands there twice, the second time on line {line}: keep one of the two"


def expand_path(path: str) -> str:
    """With ~ and $VARIABLES replaced, as a shell does it. ValueError where there is no such variable or user."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    missing = _VARIABLE.search(expanded)
    if missing:
        raise ValueError(f"there is no {missing[1]} in the environment")
    if expanded.startswith("~"):
        raise ValueError(
            f"there is no user {expanded[1:].partition('/')[0]!r} with a home folder: ./~ is a folder of that name here"
        )
    return expanded
