"""A small inference server with vLLM's routes: a transformers model behind wsft's own worker extension, in this process.

What it serves is computed from the weights that it holds. Faults are set by tests.

    python tests/small_server.py FOLDER PORT     # prints each version that it is given
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from wsft.publish import vllm_plugin

ROUTES = """/pause /resume /collective_rpc /update_weight_version /weight_info /reset_prefix_cache /get_world_size /wsft
/v1/models /v1/completions /v1/load_lora_adapter /v1/unload_lora_adapter /health""".split()  # noqa: SIM905


class Worker(vllm_plugin.WorkerExtension):
    """As vLLM's workers look to the extension."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, folder, lora=None):
        self.folder, self.model = folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model_config = types.SimpleNamespace(model=str(folder), revision=None, dtype=torch.float32)
        parallel = types.SimpleNamespace(data_parallel_index=0, world_size=1)
        self.vllm_config = types.SimpleNamespace(parallel_config=parallel, lora_config=lora)
        self.fault = lambda number: None  # called before each received tensor is loaded

    # of vLLM's layers
    def _wsft_pack_tied(self):
        return 0

    def _wsft_end_broken_reload(self):
        pass

    def reload_weights(self, weights_iterator):
        held = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for number, (name, tensor) in enumerate(weights_iterator):
                self.fault(number)
                held[name].copy_(tensor)


class SmallServer:
    """
    Attributes:
        calls: names of requests in order, without those that only ask.
        answers: name -> what to answer it with.
        keeps_cache: whether it samples on with the weights with which its prefix cache was filled.
    """

    def __init__(self, folder, host="127.0.0.1", port=0, max_lora_rank=0):
        self._lora = types.SimpleNamespace(max_lora_rank=max_lora_rank, max_loras=2) if max_lora_rank else None
        self.worker, self.version, self.calls, self.answers = Worker(folder, self._lora), "default", [], {}
        self.cached, self.keeps_cache = None, False  # weights of the prefix cache
        self.adapters, self.current, self.running = {}, None, {}  # name -> model; what the middleware got; in flight
        self.ignores_adapters = False  # as vLLM does with names of no module
        handler = type("Handler", (_Handler,), {"server_of_test": self})
        self._http = ThreadingHTTPServer((host, port), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def restart(self):
        """It has the weights again with which it was started."""
        self.worker, self.version, self.adapters, self.current = Worker(self.worker.folder, self._lora), "default", {}, None

    def answer(self, path, body):
        name = body["method"] if path == "/collective_rpc" else path
        if name not in ("/weight_info", "/openapi.json", "/wsft", "/v1/models", "/v1/completions", "wsft_info"):
            self.calls.append(name)
        if name in self.answers:
            return self.answers[name]()
        if path == "/collective_rpc":
            return {"results": [getattr(self.worker, name)(**body["kwargs"])]}
        if path == "/reset_prefix_cache" and not self.keeps_cache:
            self.cached = None
        if path == "/update_weight_version":
            self.version, self.current = body["new_version"], None
            print("version", self.version, flush=True)
        if path == "/v1/load_lora_adapter":
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.worker.model), body["lora_path"])
            self.adapters[body["lora_name"]] = self.worker.model if self.ignores_adapters else adapted
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        if path == "/wsft/adapter":
            self.current = body
            self.version = body["version"]
        if path == "/v1/completions":
            return {"choices": [self._complete(body)]}
        return {
            "/openapi.json": {"paths": {route: {} for route in ROUTES}},
            "/weight_info": {"weight_version": self.version},
            "/get_world_size": {"world_size": 1},
            "/wsft": {"worker_extension": True, "adapter": self.current, "running": self.running},
            "/v1/models": {
                "data": [{"id": "small", "max_model_len": 64}, *({"id": x, "parent": "small"} for x in self.adapters)]
            },
        }.get(path, {})

    def _complete(self, body):
        tokens, adapter = body["prompt"], self.current and self.adapters[self.current["name"]]
        if adapter:
            sampled = list(range(1, 1 + body["max_tokens"]))
            logprobs = self._logprobs(adapter, tokens + sampled)
            found = [float(logprobs[len(tokens) + i - 1, token]) for i, token in enumerate(sampled)]
            return {"token_ids": sampled, "logprobs": {"token_logprobs": found}}
        if "prompt_logprobs" in body:
            logprobs = self._logprobs(self.worker.model, tokens)
            found = [{str(token): {"logprob": float(logprobs[t - 1, token])}} for t, token in enumerate(tokens)]
            return {"prompt_logprobs": [None, *found[1:]]}
        self.cached = self.cached or copy.deepcopy(self.worker.model)
        sampled = list(range(1, 1 + body["max_tokens"]))
        logprobs = self._logprobs(self.cached, tokens + sampled)
        found = [float(logprobs[len(tokens) + i - 1, token]) for i, token in enumerate(sampled)]
        return {"token_ids": sampled, "logprobs": {"token_logprobs": found}}

    @torch.no_grad()
    def _logprobs(self, model, tokens):
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_of_test: SmallServer

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        content = json.dumps(self.server_of_test.answer(self.path.split("?")[0], json.loads(self.rfile.read(size) or "{}")))
        with contextlib.suppress(BrokenPipeError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    with SmallServer(sys.argv[1], "0.0.0.0", int(sys.argv[2])):
        threading.Event().wait()
