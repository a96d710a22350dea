"""Digests of the model, tokenizer and data that the settings of a run name: on resume they may be at another path, but must be
unchanged. Knows nothing of checkpoints or ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig

SAMPLE_BYTES = 2**20  # bytes of each end of a weight file: its header, with names and shapes, and its last values
# keys of a model's config about where and by what it was loaded
_OF_LOADING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"}


def contents_of(
    config: WeightedSFTConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | None]:
    """Setting -> digest of what it names; None if it is not set.

    For the trained model only its config counts, since a resumed run loads weights from the checkpoint. For data it is only
    that it is a file: the part that was read is compared by the position of the source (sources.py).
    """
    shape = {name: value for name, value in model_config.to_dict().items() if name not in _OF_LOADING}
    return {
        "model_name": _digest(json.dumps(shape, sort_keys=True, default=str).encode()),
        "tokenizer_name": _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()),
        "ref_model_name": config.ref_model_name and _digest_of_weights(config.ref_model_name),
        "data": config.data and "a file",
    }


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _digest_of_weights(name: str) -> str:
    """For a folder, from the sizes and both ends of its weight files; for a hub name, from the name."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(name).glob(pattern))
    found: list[Any] = [] if files else [name]
    for path in files:
        with path.open("rb") as file:
            begin, size = file.read(SAMPLE_BYTES), path.stat().st_size
            file.seek(max(0, size - SAMPLE_BYTES))
            found.append([path.name, size, _digest(begin), _digest(file.read())])
    return _digest(json.dumps(found).encode())
