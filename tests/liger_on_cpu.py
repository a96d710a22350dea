"""Models whose code is replaced by kernels of liger-kernel, which Triton's interpreter runs on a CPU:

    TRITON_INTERPRET=1 python tests/liger_on_cpu.py llama,qwen2,...

Prints, as JSON, for each type of model the modules that were changed, and the largest relative difference of logits and
gradients; or why they were not used.
"""

import json
import sys

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime import interpreter

from wsft.config import WeightedSFTConfig
from wsft.errors import UserError
from wsft.model import kernels

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
convert = interpreter._implicit_cvt


def as_on_a_gpu(value):
    """There a float argument is a float32 scalar; the interpreter leaves it a float of Python's, which has no `.to`."""
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return convert(value)


interpreter._implicit_cvt = as_on_a_gpu
# the interpreter has no libdevice
rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)
geglu.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
find, found = kernels.find_kernels, {}
kernels.find_kernels = lambda model, config, on_gpu: find(model, config, True)
for name in sys.argv[1].split(","):
    torch.manual_seed(0)
    made = AutoConfig.for_model(name, vocab_size=300, head_dim=16, pad_token_id=0, **SHAPE, **EXPERTS)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    before = kernels._results(model)
    config = WeightedSFTConfig(model_name=name, atropos_url="http://localhost:1", kernels="liger")
    try:
        kernels.fuse(model, config, torch.device("cpu"))
    except UserError as error:
        found[name] = str(error)
        continue
    fused = sorted({type(m).__name__ for m in model.modules() if "forward" in vars(m)})
    pairs = zip(kernels._results(model), before, strict=True)
    found[name] = {"fused": fused, "difference": max(float((a - b).norm() / b.norm()) for a, b in pairs)}
print(json.dumps(found))
