"""Receives broadcasts as a vLLM server does, by wsft's plugin, and discards them: the speed of a transport without the loading.

    python -m benchmarks.receiver --port 8001 --device cuda:1                                   # then, on another GPU:
    python -m benchmarks.publish FOLDER http://127.0.0.1:8001 --transports nccl --dtype bfloat16 --discarded

FOLDER may hold a config.json alone: the weights are random then. NCCL needs two GPUs.
"""

import argparse
import json
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from wsft.publish.vllm_plugin import WorkerExtension

ROUTES = ("/pause", "/resume", "/collective_rpc", "/update_weight_version", "/weight_info", "/reset_prefix_cache")


class Worker(WorkerExtension):
    rank = 0

    def __init__(self, device: torch.device):
        self.device, self.model_config = device, types.SimpleNamespace(model="", revision=None)
        parallel = types.SimpleNamespace(data_parallel_index=0, world_size=1)
        self.vllm_config = types.SimpleNamespace(parallel_config=parallel)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def reload_weights(self, weights_iterator: object) -> None:
        for _ in weights_iterator:
            pass
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _wsft_pack_tied(self) -> int:
        return 0


class Handler(BaseHTTPRequestHandler):
    worker: Worker
    version = "default"

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        answer = {}
        if self.path == "/collective_rpc":
            if self.worker.device.type == "cuda":
                torch.cuda.set_device(self.worker.device)  # of this thread
            answer = {"results": [getattr(self.worker, body["method"])(**body["kwargs"])]}
        elif self.path == "/update_weight_version":
            Handler.version = body["new_version"]
        else:
            answer = {
                "/openapi.json": {"paths": {route: {} for route in ROUTES}},
                "/weight_info": {"weight_version": self.version},
                "/get_world_size": {"world_size": 1},
                "/wsft": {"worker_extension": True},
            }.get(self.path, {})
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    Handler.worker = Worker(args.device)
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
