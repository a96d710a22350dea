"""A batch of rollouts as one self-contained HTML file: no server, network or library.

Rollouts are never markup: they are embedded as gzip in base64, which contains no `<`, and inspect_page.html inserts them as
text only, under a content security policy without connections. Knows nothing of tokenizers, objectives or records.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = Path(__file__).with_suffix(".html")
TYPES = {"piece": "<i4", "id": "<i4", "mask": "u1"}  # of these arrays; others are float32


def page(view: dict[str, Any]) -> str:
    """The HTML page.

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
    text = json.dumps(json.loads(text, parse_constant=str))  # NaN and Infinity as strings, which browsers' JSON lacks
    data = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    return TEMPLATE.read_text(encoding="utf-8").replace("THE VIEW", data)


def _scale(weights_N: np.ndarray) -> float:
    """The weight shown in full colour: a high percentile, so that an outlier does not bleach the others."""
    sizes = np.abs(weights_N[np.isfinite(weights_N) & (weights_N != 0)])
    return float(np.quantile(sizes, 0.98)) if len(sizes) else 1.0
