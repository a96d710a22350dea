"""For vLLM's environment: a worker extension and an HTTP middleware. Imports nothing of wsft, so this file alone is enough.

    VLLM_SERVER_DEV_MODE=1 PYTHONPATH=FOLDER_OF_THIS_FILE vllm serve MODEL --enable-scale-out \\
        --worker-extension-cls vllm_plugin.WorkerExtension --middleware vllm_plugin.Middleware --logprobs-mode
        processed_logprobs

The extension receives weights that the trainer broadcasts, and repairs vLLM's reload on a CPU, where a layer with tied weights
keeps a packed copy of the old ones (seen with 0.32). Its methods return errors: an exception would end vLLM's engine. The
middleware adds `POST /generate` in the form that Atropos's `server_type: vllm` calls, by vLLM's
`/inference/v1/generate`.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any


class WorkerExtension:
    """Methods of each vLLM worker, called through /collective_rpc."""

    _wsft_group: Any = None

    def wsft_info(self) -> dict[str, Any]:
        """Backends over which it receives, the type of its weights, shapes of the tensors in the files of the model that it
        serves, and its limits for adapters (None: it was started without --enable-lora)."""
        backends = ["gloo", "nccl"] if self.device.type == "cuda" else ["gloo"]
        lora = self.vllm_config.lora_config
        found = {
            "backends": backends,
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "shapes": {},
            "lora": {"max_lora_rank": lora.max_lora_rank, "max_loras": lora.max_loras} if lora else None,
        }
        try:
            found["shapes"] = _shapes(self.model_config.model, self.model_config.revision)
        except Exception as error:  # of a model in another format, or whose files are gone
            print(f"wsft: no shapes of the model's tensors: {_error(error)}", flush=True)
        return found

    def wsft_join(self, host: str, port: int, size: int, backend: str, timeout_s: float) -> dict[str, Any]:
        """Join the process group of the trainer, whose store is at host:port."""
        from torch.distributed import TCPStore

        try:
            self._wsft_group = None
            with socket.create_connection((host, port), timeout_s) as connection:
                own = connection.getsockname()[0]
            store = TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=timeout_s))
            parallel = self.vllm_config.parallel_config
            rank = 1 + parallel.data_parallel_index * parallel.world_size + self.rank
            self._wsft_group = process_group(backend, own, store, rank, size, timeout_s)
            self._wsft_device = self.device if backend == "nccl" else "cpu"
        except Exception as error:
            return _error(error)
        return {}

    def wsft_receive(self, buckets: list) -> dict[str, Any]:
        """Receive buckets of tensors (name, dtype, shape) and load them; returns how many layers were packed again."""
        return self._wsft_load(weights_iterator=self._wsft_received(buckets))

    def wsft_reload(self, weights_path: str) -> dict[str, Any]:
        """Load the weights in a Hugging Face folder; returns how many layers were packed again."""
        if not any(Path(weights_path).glob("*.safetensors")):
            return {"error": f"there are no safetensors in {weights_path} on this host"}
        return self._wsft_load(weights_path=weights_path)

    def _wsft_load(self, **source: Any) -> dict[str, Any]:
        try:
            self.reload_weights(**source)
            return {"packed_again": self._wsft_pack_tied()}
        except Exception as error:
            self._wsft_group = None
            self._wsft_end_broken_reload()
            return _error(error)

    def _wsft_received(self, buckets: list) -> Iterator[tuple[str, Any]]:
        import torch

        for bucket in buckets:
            dtypes = [getattr(torch, dtype) for _, dtype, _ in bucket]
            sizes = [prod(shape) * dtype.itemsize for (_, _, shape), dtype in zip(bucket, dtypes, strict=True)]
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self._wsft_device)
            self._wsft_group.broadcast(buffer, 0).wait()
            for (name, _, shape), dtype, part in zip(bucket, dtypes, buffer.split(sizes), strict=True):
                yield name, part.view(dtype).view(shape)

    def _wsft_pack_tied(self) -> int:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        modules = self.get_model().modules()
        layers = [layer for layer in modules if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear")]
        for layer in layers:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        return len(layers)

    def _wsft_end_broken_reload(self) -> None:
        """Bring layers that are on the meta device while they are loaded back, so that a later reload starts afresh. Their
        weights are wrong: the server stays paused."""
        try:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.get_model(), self.model_config)
        except Exception as error:
            print(f"wsft: a reload failed and could not be undone: {_error(error)}", flush=True)


def process_group(backend: str, host: str, store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """A process group of torch apart from the default one: gloo on the interface of `host`, an address of this machine, or
    NCCL on the current GPU. Returns once all ranks have joined."""
    from torch.distributed import PrefixStore, ProcessGroupGloo

    store = PrefixStore("wsft", store)
    if backend == "nccl":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return ProcessGroupNCCL(store, rank, size, options)
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    return ProcessGroupGloo(store, rank, size, options)


def _shapes(model: str, revision: str | None) -> dict[str, list[int]]:
    """Of the tensors in the safetensors files of a model, by name."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns="*.safetensors"))
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    return found


def _error(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}"[:1000]}


_GENERATE = "/inference/v1/generate"
_OF_A_MODEL = {("POST", path) for path in ("/v1/completions", "/v1/chat/completions", _GENERATE)}


class Middleware:
    """ASGI middleware. `GET /wsft` tells the trainer that the extension is there, `POST /generate` is Atropos's route.

    After `POST /wsft/adapter {"name", "version", "base"}` requests for the models in `base`, or for none, run on that adapter,
    and their version is the adapter's, until whole weights are loaded (by a later run) and get a version. `GET /wsft` counts
    the running requests of each adapter, which must not be unloaded.
    """

    def __init__(self, app: Any):
        self._app = app
        self._adapter: dict[str, Any] | None = None
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        route = (scope.get("method"), scope.get("path")) if scope["type"] == "http" else None
        if route == ("GET", "/wsft"):
            await _answer(send, 200, {"worker_extension": True, "adapter": self._adapter, "running": dict(+self._running)})
        elif route == ("POST", "/wsft/adapter"):
            self._adapter = json.loads(await _read(receive))
            await _answer(send, 200, {})
        elif route == ("POST", "/update_weight_version"):
            self._adapter = None
            await self._app(scope, receive, send)
        elif route == ("GET", "/weight_info") and self._adapter:
            await _answer(send, 200, {"weight_version": self._adapter["version"]})
        elif route == ("POST", "/generate"):
            await self._generate(scope, receive, send)
        elif route in _OF_A_MODEL and self._adapter:
            await self._run(scope, json.loads(await _read(receive)), receive, send)
        else:
            await self._app(scope, receive, send)

    async def _run(self, scope: dict, body: dict, receive: Any, send: Any) -> str | None:
        """Run a request. Returns the version of the adapter that it ran on, if any."""
        adapter = self._adapter
        if adapter and body.get("model") in (None, *adapter["base"]):
            body = body | {"model": adapter["name"]}
        else:
            adapter = None
        content = json.dumps(body).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def give() -> dict:
            return messages.pop() if messages else await receive()

        if not adapter:
            await self._app(scope | {"headers": headers}, give, send)
            return None
        self._running[adapter["name"]] += 1
        try:
            await self._app(scope | {"headers": headers}, give, send)
        finally:
            self._running[adapter["name"]] -= 1
        return adapter["version"]

    async def _generate(self, scope: dict, receive: Any, send: Any) -> None:
        asked = json.loads(await _read(receive))
        status, answer = 500, b""

        async def take(message: dict) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        inner = scope | {"path": _GENERATE, "raw_path": _GENERATE.encode()}
        version = await self._run(inner, _to_vllm(asked), receive, take)
        if status == 200:
            answer = _from_vllm(json.loads(answer), asked.get("weight_versions"), version)
        await _answer(send, status, answer)


def _to_vllm(asked: dict) -> dict:
    """The body of Atropos's request as one of /inference/v1/generate."""
    sampling = {name: value for name, value in asked.items() if name not in ("prompt", "stream", "stop", "weight_versions")}
    stop = asked.get("stop") or []
    stops = [stop] if isinstance(stop, str | int) else stop
    sampling["stop"] = [each for each in stops if isinstance(each, str)]
    sampling["stop_token_ids"] = [*sampling.get("stop_token_ids", []), *(each for each in stops if isinstance(each, int))]
    sampling.setdefault("logprobs", 0)
    return {"token_ids": asked["prompt"]["prompt_token_ids"], "sampling_params": sampling}


def _from_vllm(found: dict, with_versions: bool | None, version: str | None = None) -> dict:
    """Its answer in the form that Atropos reads. `with_versions`: each finish reason is a dict, as of SGLang, that also has the
    versions of the weights that sampled the tokens: atroposlib passes nothing else on to environments. `version`: that of the
    adapter."""
    choices = sorted(found["choices"], key=lambda choice: choice["index"])
    reasons = [choice["finish_reason"] for choice in choices]
    if with_versions:
        spans = [
            [{"version": version, "start": 0, "end": len(choice["token_ids"])}] if version else choice["weight_versions"]
            for choice in choices
        ]
        reasons = [{"type": why, "weight_versions": each} for why, each in zip(reasons, spans, strict=True)]
    return {
        "text": [""] * len(choices),
        "token_ids": [choice["token_ids"] for choice in choices],
        "logprobs": [
            [[{str(token["token_id"]): token["logprob"]}] for token in choice["logprobs"]["content"]] for choice in choices
        ],
        "finish_reasons": reasons,
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
