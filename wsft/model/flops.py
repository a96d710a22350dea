"""FLOPs of a training step, and the peak FLOP/s of GPUs."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from wsft.model.causal_lm import body_of

# peak TFLOP/s of dense bf16 matrix products, from the data sheets
RATED_TFLOPS = {
    "A100": 312, "A800": 312, "A10": 125, "A10G": 70, "A30": 165, "A40": 150, "A6000": 155, "L4": 121, "L40": 181, "L40S": 362,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H20": 148, "H200": 989, "GH200": 989, "B200": 2250,
    "GB200": 2500, "B300": 2250, "GB300": 2500, "3090": 71, "4090": 165, "5090": 210,
}  # fmt: skip


class StepFlops(NamedTuple):
    """FLOPs of a training step.

    Args:
        per_token: of the matrices below lm_head, for each of T tokens.
        per_pair: of attention, for each of T^2 pairs of tokens.
        per_trained_token: of lm_head, which runs on trained tokens only.
    """

    per_token: float
    per_pair: float
    per_trained_token: float


def step_flops(model: PreTrainedModel, untrained: Collection[str] = ()) -> StepFlops:
    """6 FLOPs per parameter and token (Chowdhery et al. 2022, "PaLM", appendix B), 4 if it is frozen.

    2 of the 6 are the forward pass, 2 each the gradients of inputs and of weights; recomputing activations is not counted.
    Causal attention is half of a square. Of the experts, only those that a token is routed to count; parameters that are not
    reached from text do not.
    """
    config, used = model.config.get_text_config(), 0.0
    named = config.to_dict()  # attributes that differ between layers raise if read from the config
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    experts = named.get("num_experts_per_tok")
    passed_over = embeddings | {id(param) for name, param in model.named_parameters() if name in untrained}
    for param in body_of(model).parameters():
        if param.ndim > 1 and id(param) not in passed_over:
            used += _flops(param) * (experts / len(param) if experts and param.ndim == 3 else 1)
    heads = named.get("num_attention_heads") or 0
    width = heads * (named.get("head_dim") or config.hidden_size // max(1, heads))
    of_head = _flops(model.get_output_embeddings().weight)
    return StepFlops(used, 6.0 * config.num_hidden_layers * width, of_head)


def _flops(param: torch.nn.Parameter) -> float:
    return (6.0 if param.requires_grad else 4.0) * param.numel()


def rated_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of the GPU; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in RATED_TFLOPS if all(re.search(rf"\b{word}\b", name) for word in key.split())]
    return RATED_TFLOPS[max(known, key=len)] * 1e12 if known else None
