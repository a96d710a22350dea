"""A batch of rollouts as one HTML file that needs nothing else: no server, no network, no library.

What a rollout holds is never markup: it travels as gzip in base64, which has no `<`, and inspect_page.html puts it into the
page as text alone, under a policy that lets nothing out. Knows nothing of tokenizers, objectives or records.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = Path(__file__).with_suffix(".html")
TYPES = {"piece": "<i4", "id": "<i4", "mask": "u1"}  # of the arrays of tokens; float32 the others


def page(view: dict[str, Any]) -> str:
    """The whole page.

    `view["tokens"]` holds arrays over the tokens of all rollouts in their order: piece (an index of `view["pieces"]`, the
    distinct texts), id, mask, advantage, behavior_logp, weight and, where a policy was run, logp and ratio; NaN where there is
    none. The rest is plain: title, metadata {name: value}, findings (text, places [rollout, position or None], more), groups
    (name, env_id, scores, rejected, the indices of its rollouts), rollouts (sequence, score, advantage, override, temperature,
    tokens, trained, logp).
    """
    tokens = {name: np.asarray(values, TYPES.get(name, "<f4")) for name, values in view["tokens"].items()}
    sizes = {len(values) for values in tokens.values()} | {sum(rollout["tokens"] for rollout in view["rollouts"])}
    assert len(sizes) == 1, f"tokens of {sizes} positions"
    packed = {name: base64.b64encode(values).decode() for name, values in tokens.items()}
    text = json.dumps(view | {"tokens": packed, "scale": _scale(tokens["weight"])}, default=lambda scalar: scalar.item())
    text = json.dumps(json.loads(text, parse_constant=str))  # NaN and Infinity, which JSON in a browser lacks, as strings
    data = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    return TEMPLATE.read_text(encoding="utf-8").replace("THE VIEW", data)


def _scale(weights_N: np.ndarray) -> float:
    """The weight with the full colour: so high that few are beyond it, so low that one outlier does not bleach the rest."""
    sizes = np.abs(weights_N[np.isfinite(weights_N) & (weights_N != 0)])
    return float(np.quantile(sizes, 0.98)) if len(sizes) else 1.0
