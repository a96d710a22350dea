"""For vLLM's environment: a worker extension and an HTTP middleware. Imports nothing of wsft, so this file alone is enough.

    VLLM_SERVER_DEV_MODE=1 PYTHONPATH=FOLDER_OF_THIS_FILE vllm serve MODEL --enable-scale-out \\
        --worker-extension-cls vllm_plugin.WorkerExtension --middleware vllm_plugin.Middleware --logprobs-mode
        processed_logprobs

The extension repairs vLLM's reload on a CPU, where a layer with tied weights keeps a packed copy of the old ones (seen with
0.32). The middleware adds `POST /generate` in the form that Atropos's `server_type: vllm` calls, by vLLM's
`/inference/v1/generate`.
"""

from __future__ import annotations

import json
from typing import Any


class WorkerExtension:
    """Methods of each vLLM worker, called through /collective_rpc."""

    def wsft_reload(self, weights_path: str) -> dict[str, int]:
        """Load the weights in a Hugging Face folder; returns how many layers were packed again."""
        self.reload_weights(weights_path=weights_path)
        return {"packed_again": _pack_tied(self.get_model())}


def _pack_tied(model: Any) -> int:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear")]
    for layer in layers:
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return len(layers)


class Middleware:
    """ASGI middleware: `GET /wsft` tells the trainer that the extension is there, `POST /generate` is Atropos's route."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        route = (scope.get("method"), scope.get("path")) if scope["type"] == "http" else None
        if route == ("GET", "/wsft"):
            await _answer(send, 200, {"worker_extension": True})
        elif route == ("POST", "/generate"):
            await self._generate(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _generate(self, scope: dict, receive: Any, send: Any) -> None:
        body = json.dumps(_to_vllm(json.loads(await _read(receive)))).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        path = "/inference/v1/generate"
        inner = scope | {"path": path, "raw_path": path.encode(), "headers": headers}
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        status, answer = 500, b""

        async def give() -> dict:
            return messages.pop() if messages else await receive()

        async def take(message: dict) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        await self._app(inner, give, take)
        await _answer(send, status, _from_vllm(json.loads(answer)) if status == 200 else answer)


def _to_vllm(asked: dict) -> dict:
    """The body of Atropos's request as one of /inference/v1/generate."""
    sampling = {name: value for name, value in asked.items() if name not in ("prompt", "stream", "stop")}
    stop = asked.get("stop") or []
    stops = [stop] if isinstance(stop, str | int) else stop
    sampling["stop"] = [each for each in stops if isinstance(each, str)]
    sampling["stop_token_ids"] = [*sampling.get("stop_token_ids", []), *(each for each in stops if isinstance(each, int))]
    sampling.setdefault("logprobs", 0)
    return {"token_ids": asked["prompt"]["prompt_token_ids"], "sampling_params": sampling}


def _from_vllm(found: dict) -> dict:
    """Its answer in the form that Atropos reads, with the versions of the weights that sampled."""
    choices = sorted(found["choices"], key=lambda choice: choice["index"])
    return {
        "text": [""] * len(choices),
        "token_ids": [choice["token_ids"] for choice in choices],
        "logprobs": [
            [[{str(token["token_id"]): token["logprob"]}] for token in choice["logprobs"]["content"]] for choice in choices
        ],
        "finish_reasons": [choice["finish_reason"] for choice in choices],
        "weight_versions": [choice.get("weight_versions") for choice in choices],
    }


async def _read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _answer(send: Any, status: int, body: dict | bytes) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
