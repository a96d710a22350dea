"""What the settings of a run point to, in digests: a resumed run may find its model, tokenizer and data at another path, but
they must be what they were. Knows nothing of checkpoints or ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig

SAMPLE_BYTES = 2**20  # of each end of a file of weights: its header, with names and shapes, and its last values
# of a model's config: where it was loaded from and by what, not what it is
_OF_LOADING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"}


def contents_of(
    config: WeightedSFTConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | None]:
    """Setting -> a digest of what it names; None where it is not set.

    Of the model that is trained it is the shape: a resumed run has its weights from the checkpoint. Of the data it is only that
    it is a file: what was read of it is compared by the file's own position (feed.py).
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
    """Of a folder, by the sizes and both ends of its files of weights; of a hub name, by the name."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(name).glob(pattern))
    found: list[Any] = [] if files else [name]
    for path in files:
        with path.open("rb") as file:
            begin, size = file.read(SAMPLE_BYTES), path.stat().st_size
            file.seek(max(0, size - SAMPLE_BYTES))
            found.append([path.name, size, _digest(begin), _digest(file.read())])
    return _digest(json.dumps(found).encode())
