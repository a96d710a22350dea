"""Models in their published sizes, without weights; and what a dry run prints of them."""

import re

from conftest import make_model

QWEN_1_5B = dict(
    family="qwen", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, tied=True,
)  # fmt: skip
QWEN_7B = dict(
    family="qwen", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, head_dim=128, max_position_embeddings=32768, tied=False,
)  # fmt: skip
LLAMA_70B = dict(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tied=False,
)  # fmt: skip
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
)  # fmt: skip
LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tied=True,
)  # fmt: skip


def make_shape(folder, family="llama", tied=True, **shape):
    """A model's folder without weights."""
    from transformers import LlamaConfig, Qwen2Config

    make_model(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    config = {"llama": LlamaConfig, "qwen": Qwen2Config}[family](tie_word_embeddings=tied, **shape)
    config.save_pretrained(folder)
    return str(folder)


def figure(text, name):
    """GiB in a row of the table."""
    return float(re.search(rf"^  {name}\s+([\d.]+)$", text, re.M)[1])
