"""Functions and classes of the user, named `my_module:my_function` in settings."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable


def load(name: str, what: str) -> Callable:
    """Import it, from the Python path or the current folder. ValueError if it cannot be imported, or called. `what` is what
    messages call it."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as with `python -m`; `python train.py` has the folder of train.py only
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}; looked in {os.getcwd()} and the Python path") from error
    if not callable(found):
        raise ValueError(f"{what} {name!r} is a {type(found).__name__}, expected a function")
    return found


class Callbacks:
    """What the setting `callbacks` names, called on every rank after each event. Methods that it lacks are left out.

    on_step(trainer, metrics), on_save(trainer, folder) once a checkpoint is complete, on_publish(trainer, version),
    on_end(trainer, folder of the model or None). An exception ends the run on all ranks.
    """

    EVENTS = ("on_step", "on_save", "on_publish", "on_end")

    def __init__(self, target: object = None):
        self._target = target

    @classmethod
    def load(cls, name: str | None) -> Callbacks:
        """ValueError if it cannot be imported, or has methods for other events."""
        target = load(name, "callbacks")() if name else None
        unknown = [method for method in dir(target) if method.startswith("on_") and method not in cls.EVENTS]
        if unknown:
            raise ValueError(f"callbacks {name!r} have {unknown[0]}: there are {', '.join(cls.EVENTS)}")
        return cls(target)

    def call(self, event: str, *args: object) -> None:
        method = getattr(self._target, event, None)
        if method is not None:
            method(*args)
