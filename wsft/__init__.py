"""Weighted SFT on Atropos rollouts. Importing this loads neither torch nor deepspeed; the names below load when used."""

from importlib import import_module

_HOME = {
    "WeightedSFTInterface": "wsft.loss.interface",
    "AtroposBatchProcessor": "wsft.rollouts.batch",
    "WeightedSFTConfig": "wsft.config",
    "WeightedSFTTrainer": "wsft.trainer",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wsft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
