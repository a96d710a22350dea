"""YAML and JSON files written by people. A duplicate key is an error, where the usual parsers silently keep the last value;
paths may begin with ~ and contain $VARIABLES.
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
    """Raises yaml.YAMLError if the text is not YAML, ValueError for a duplicate key."""
    return yaml.load(text, _OnceOnly)


def parse_json(text: str) -> Any:
    """Raises json.JSONDecodeError if the text is not JSON, ValueError for a duplicate key."""
    value = json.loads(text)
    objects: list[set[str] | None] = []  # keys of each open object; None for an open list
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
    return f"duplicate key {name}, the second on line {line}: keep one of the two"


def expand_path(path: str) -> str:
    """Replace ~ and $VARIABLES as a shell does. ValueError if there is no such variable or user."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    missing = _VARIABLE.search(expanded)
    if missing:
        raise ValueError(f"there is no {missing[1]} in the environment")
    if expanded.startswith("~"):
        raise ValueError(
            f"there is no user {expanded[1:].partition('/')[0]!r} with a home folder: ./~ is a folder of that name here"
        )
    return expanded
