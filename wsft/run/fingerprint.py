"""Digests of the model, tokenizer and data that the settings of a run name: on resume they may be at another path, but must be
unchanged. Knows nothing of checkpoints or ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig
from wsft.model.weight_files import files_of

SAMPLE_BYTES = 2**20  # bytes of each end of a weight file: its header, with names and shapes, and its last values
SAMPLES = 16  # more in between, of 1/16 of that size; a change of a weight file elsewhere is not seen
# keys of a model's config about where and by what it was loaded
_OF_LOADING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"}


def contents_of(
    config: WeightedSFTConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | None]:
    """Setting -> digest of what it names; None if it is not set.

    For the trained model only its config counts, since a resumed run loads weights from the checkpoint, but with LoRA also its
    weights, as "base_weights". For data it is only
    that it is a file: the part that was read is compared by the position of the source (sources.py).
    """
    shape = {name: value for name, value in model_config.to_dict().items() if name not in _OF_LOADING}
    return {
        "base_weights": _digest_of_weights(config.model_name) if config.lora_rank else None,
        "model_name": _digest(json.dumps(shape, sort_keys=True, default=str).encode()),
        "tokenizer_name": _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()),
        "ref_model_name": config.ref_model_name and _digest_of_weights(config.ref_model_name),
        "data": config.data and "a file",
    }


def _digest(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _digest_of_weights(name: str) -> str:
    """From the sizes, both ends and samples of the weight files of a folder, or of a hub name in the cache."""
    files = sorted(set(files_of(name).values())) or sorted(Path(name).glob("*.bin"))
    found: list[Any] = [] if files else [name]
    for path in files:
        with path.open("rb") as file:
            size, digests = path.stat().st_size, []
            for i in range(SAMPLES + 1):
                file.seek(i * max(0, size - SAMPLE_BYTES) // SAMPLES)
                digests.append(_digest(file.read(SAMPLE_BYTES if i in (0, SAMPLES) else SAMPLE_BYTES // 16)))
            found.append([path.name, size, digests])
    return _digest(json.dumps(found).encode())
