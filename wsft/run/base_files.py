"""The files of the base model other than its weights: config, tokenizer, chat template, remote code.

Checkpoints and exports copy them byte for byte. If another version of transformers saved them again, current readers (inference
servers, transformers 4) could misread them: a tokenizer class that they do not have, an added pad token, the base of rotary
embeddings under another key.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from wsft.config import WeightedSFTConfig

_OF_TOKENIZER = re.compile(
    r"(.*token.*|vocab.*|merges.*|spiece.*|sentencepiece.*|chat_template.*|tekken.*)\.(json|txt|model|jinja|py)|.*\.(tiktoken|jinja)"
)
_OF_MODEL = re.compile(r"(config|generation_config|(pre)?processor_config|video_preprocessor_config)\.json|.*\.py|LICENSE.*")
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]
_DTYPES = ("float32", "bfloat16", "float16")


def base_files(config: WeightedSFTConfig, dtype: str) -> dict[str, bytes]:
    """Path in the folder -> bytes, of model and tokenizer; the dtype in config.json is that of the trained weights."""
    files = {}
    for name, is_tokenizer in ((config.model_name, False), (config.tokenizer_name or config.model_name, True)):
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(snapshot_download(name, ignore_patterns=_WEIGHTS))
        for path in [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]:
            of_tokenizer = _OF_TOKENIZER.fullmatch(path.name)
            wanted = of_tokenizer if is_tokenizer else _OF_MODEL.fullmatch(path.name) and not of_tokenizer
            if wanted and path.is_file():
                files[str(path.relative_to(folder))] = path.read_bytes()
    return files | {"config.json": _with_dtype(files["config.json"], dtype)}


def read_files(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_tokenizer(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those of `base_files` that belong to the tokenizer."""
    return {path: text for path, text in files.items() if _OF_TOKENIZER.fullmatch(Path(path).name)}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def _with_dtype(text: bytes, dtype: str) -> bytes:
    """config.json with the dtype replaced if it differs."""
    config, changed = json.loads(text), []

    def correct(node: Any) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            if name in ("dtype", "torch_dtype") and value in _DTYPES and value != dtype:
                changed.append(name)
                node[name] = dtype
            correct(value)

    correct(config)
    return (json.dumps(config, indent=2) + "\n").encode() if changed else text
