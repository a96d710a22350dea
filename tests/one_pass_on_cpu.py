"""The head with its kernel of one pass, which Triton's interpreter runs on a CPU, beside the head without:

    TRITON_INTERPRET=1 python tests/one_pass_on_cpu.py

Prints, as JSON, for each combination of options the largest relative difference of losses, logps, entropies and gradients.
"""

import itertools
import json

import torch

from wsft.loss import head

N, H, SIZES = 11, 16, (5, 8192, 20_011)  # less than a block, one, several and a part of one
EVERY = ("temperatures", "softcap", "scale", "bias", "entropy", "teacher")


def results(V, dtype, names, in_one_pass):
    """Of tokens whose largest logit is in any of the blocks."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    leaves = [random(N, H).to(dtype), random(V, H).to(dtype), random(V).to(dtype)]
    leaves = [leaf.requires_grad_() for leaf in leaves][: 3 if "bias" in names else 2]
    targets, weights = torch.randint(V, (N,), generator=generator), random(N)
    ids = torch.randint(V, (N, 3), generator=generator)
    ids[:, 0] = targets  # an entry of the teacher's that is also the target
    options = {
        "temperatures": ("temperature", random(N).abs() + 0.5),
        "softcap": ("final_logit_softcapping", 5.0),
        "scale": ("logit_scale", 0.3),
        "bias": ("bias_V", leaves[-1]),
        "entropy": ("entropy_weights_N", random(N)),
        "teacher": ("teacher", head.Teacher(ids, random(N, 3).abs(), random(N))),
    }
    head.runs_in_one_pass = lambda logits: in_one_pass
    out = head.head_loss(*leaves[:2], targets, weights, chunk_tokens=4, **dict(options[name] for name in names))
    return *(x.detach() for x in out), *torch.autograd.grad(out.loss, leaves)


found = {}
for V, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16)):
    for names in ((), *((name,) for name in EVERY), EVERY):
        pairs = zip(*(results(V, dtype, names, way) for way in (True, False)), strict=True)
        differences = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9)) for a, b in pairs]
        found[f"{V}, {dtype}, {', '.join(names)}"] = max(differences)
print(json.dumps(found))
