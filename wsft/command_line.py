"""Settings of a pydantic model from the command line and a YAML file, and what is wrong with them in a sentence.

pydantic-settings' CLI is not used, since its errors for unknown flags do not suggest the right one.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from wsft.settings_files import expand_path, parse_yaml

T = TypeVar("T", bound=BaseModel)

RENAMED = {"skip_weightless": "skip_zero_weight"}
NOT_SUPPORTED = {
    "load_in_4bit": "is not supported: under ZeRO-3 each rank would hold the whole 4-bit model while it loads; take a base in "
    "bf16",
    "lora_dropout": "is not supported: with dropout the trained policy is not that of the sampler",
    "use_rslora": "is not supported: SGLang ignores it; set lora_alpha",
}


def from_args(cls: type[T], argv: list[str] | None, prog: str) -> T:
    """An instance of the model, from `--config run.yaml` with flags on top. Errors go to stderr, with exit code 2."""
    parser = _parser(cls, prog)
    flags, unknown_args = parser.parse_known_args(argv)
    given = vars(flags)
    given.pop("local_rank")  # passed by the deepspeed launcher; equal to LOCAL_RANK
    path = given.pop("config")
    try:
        _require_home()
        if unknown_args:
            name = unknown_args[0].split("=")[0]
            known = name.startswith("--")
            raise ValueError(unknown_setting(name[2:], cls.model_fields, "--") if known else f"unexpected argument {name!r}")
        return cls(**{**(_read_yaml(path) if path else {}), **given})
    except ValidationError as error:
        message = "; ".join(map(_sentence, error.errors()))
    except (ValueError, OSError) as error:
        message = str(error)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # print it once, not on every rank
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def unknown_setting(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence that says what it is called now, why there is none, or which is similar."""
    if name in RENAMED:
        return f"{prefix}{name} is called {prefix}{RENAMED[name]} now"
    if name in NOT_SUPPORTED:
        return f"{prefix}{name} {NOT_SUPPORTED[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f", did you mean {prefix}{near[0]}?" if near else "; --help lists all settings"
    return f"unknown setting {prefix}{name}{hint}"


def _sentence(error: dict[str, Any]) -> str:
    """One pydantic error as a sentence: the setting, what was found, what was expected."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    if error["type"] == "missing":
        return f"{error['loc'][0]} is not set: give --{error['loc'][0]}"
    return f"{error['loc'][0]} is {error['input']!r}: {message}"


def _require_home() -> None:
    if os.path.expanduser("~") == "~":  # else packages would create a folder named ~ here
        raise ValueError(
            f"there is no HOME, and user {os.getuid()} has no entry in /etc/passwd: set HOME to a folder that may be written, "
            f"where packages keep what they download and compile"
        )


def _parser(cls: type[T], prog: str) -> argparse.ArgumentParser:
    """Flags from the fields. Values stay strings, which pydantic parses and validates as it does those from YAML."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a causal language model by loss-masked, advantage-weighted SFT on Atropos rollouts.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    parser.add_argument("--config", default=None, metavar="RUN.YAML", help="Settings from a YAML file; flags take precedence.")
    parser.add_argument("--local_rank", default=None, help=argparse.SUPPRESS)
    for name, field in cls.model_fields.items():
        choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
        metavar = "|".join(choices) or name.split("_")[-1].upper()
        default = "required" if field.is_required() else f"default: {field.default}"
        switch = {"nargs": "?", "const": True} if "bool" in str(field.annotation) else {}
        text = f"{field.description} ({default})".replace("%", "%%")
        parser.add_argument(f"--{name}", metavar=metavar, help=text, **switch)
    return parser


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = parse_yaml(Path(expand_path(path)).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, expected lines of `setting: value`")
    strange = [key for key in settings if not isinstance(key, str)]
    if strange:
        raise ValueError(f"{path} names a setting {strange[0]!r}, expected a name (YAML reads on, off, yes and no as booleans)")
    return settings
