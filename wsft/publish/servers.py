"""Running inference servers, which load weights or receive them: vLLM and SGLang, by their HTTP routes.

A server is recognised by the routes in its openapi.json, not by its version. Knows nothing of ranks, models or torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import requests

from wsft.config import without_password
from wsft.connections import cause_of, proxies_for
from wsft.errors import UserError

log = logging.getLogger(__name__)

CONNECT_S = 10.0
LEAST_ADAPTERS = 2  # that a server must run at a time


class ServerFailed(UserError):
    """A server could not be brought to serve the published weights."""


@dataclass(eq=False)
class Server:
    """A running inference server. Subclasses know the routes of one kind.

    Args:
        url: "http://host:port".
        timeout: seconds in which each request must be answered.
        api_key: sent as a bearer token where it is set, for a proxy in front of the server.
        pause_mode: requests in flight are paused and kept, aborted, or waited for ("keep", "abort", "wait").
    """

    url: str
    timeout: float
    api_key: str | None = None
    pause_mode: str = "keep"
    kind = ""
    needs: tuple[str, ...] = ()  # routes
    pause_modes: ClassVar = {mode: mode for mode in ("keep", "abort", "wait")}  # ours -> what it calls them

    def load(self, folder: Path, version: str) -> float:
        """Load the weights in the folder, which must be at this path on the server's host, too. Returns the seconds of the
        pause.

        Raises:
            ServerFailed: it is then unknown what the server serves; it stays paused where it can.
        """
        self.pause()
        self.load_paused(folder, version)
        self.finish(version)
        return self.paused_s

    def pause(self) -> None:
        """What happens to requests in flight is `pause_mode`; new ones wait."""
        self._paused_at = time.monotonic()
        self._pause(self.pause_modes[self.pause_mode])

    def finish(self, version: str) -> None:
        """After weights were loaded: give them this version, clear caches, and continue."""
        self._finish(version)
        self.paused_s = time.monotonic() - self._paused_at
        found = self.version()
        if found != version:
            raise ServerFailed(f"{self} has weight version {found!r} after loading {version!r}: it answered, and did nothing")

    def version(self) -> str:
        """The version of the weights that it serves."""
        raise NotImplementedError

    def logprobs(self, tokens: list[int]) -> list[float]:
        """The logprobs of all tokens but the first, at temperature 1."""
        raise NotImplementedError

    def sample(self, tokens: list[int], n: int) -> tuple[list[int], list[float]]:
        """n tokens sampled at temperature 1 after these, and their logprobs."""
        raise NotImplementedError

    def context(self) -> int:
        """Tokens that a sequence may have, the prompt included."""
        raise NotImplementedError

    def load_paused(self, folder: Path, version: str) -> None:
        raise NotImplementedError

    # to receive weights: see broadcast.py

    def backends(self) -> set[str]:
        """Backends of torch.distributed over which it can receive weights: "gloo", "nccl"."""
        return set()

    def shapes(self) -> dict[str, list[int]]:
        """Of the tensors in the files that it serves, by name; empty if it cannot be asked."""
        return {}

    def dtype(self) -> str:
        """Of its weights, such as "float32"; empty if it cannot be asked."""
        return ""

    def workers(self) -> int:
        """Its processes that hold weights."""
        raise NotImplementedError

    def join(self, host: str, port: int, size: int, backend: str, timeout: float) -> None:
        """Have its workers join a process group of `size` whose store is at host:port; rank 0 is the trainer's. Returns once
        they did."""
        raise NotImplementedError

    def receive(self, buckets: list[list[tuple[str, str, list[int]]]]) -> None:
        """Have its workers receive a broadcast for each bucket, which is the bytes of tensors (name, dtype, shape), and load
        these. Returns once all are loaded."""
        raise NotImplementedError

    # to load adapters: see adapters.py

    def refuses_adapters(self, rank: int) -> str:
        """Why adapters of this rank cannot be published to it; empty if they can."""
        return f"{self} cannot be given adapters by wsft"

    def load_adapter(self, folder: Path, version: str) -> None:
        """Load the adapter in the folder under the folder's name, and run requests on it from now on; those in flight continue
        with theirs. ServerFailed: it runs on as before."""
        raise NotImplementedError

    def unload_adapters(self, prefix: str, keep: str) -> set[str]:
        """Unload adapters whose names begin with the prefix, except the one to keep and those that requests run on. Returns the
        names of those that it still has."""
        raise NotImplementedError

    def _pause(self, mode: str) -> None:
        raise NotImplementedError

    def _finish(self, version: str) -> None:
        raise NotImplementedError

    def request(self, method: str, path: str, body: Any = None, parses: bool = True) -> Any:
        """The JSON of an answer of 200 (None if it is not to be parsed); ServerFailed for anything else."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            answer = requests.request(
                method, self.url + path, json=body, headers=headers, timeout=(CONNECT_S, self.timeout),
                proxies=proxies_for(self.url), allow_redirects=False,
            )  # fmt: skip
        except requests.RequestException as error:
            raise ServerFailed(f"{self} does not answer {method} {path} ({cause_of(error)})") from error
        if answer.status_code != 200:
            raise ServerFailed(f"{self} answers {method} {path} with {answer.status_code}: {answer.text[:300]}")
        try:
            return answer.json() if answer.content and parses else None
        except ValueError as error:
            raise ServerFailed(f"{self} answers {method} {path} with no JSON: {answer.text[:300]}") from error

    def __str__(self) -> str:
        return f"the {self.kind or 'inference'} server at {without_password(self.url)}"


class VLLM(Server):
    """With VLLM_SERVER_DEV_MODE=1, which adds the routes for weights."""

    kind = "vLLM"
    needs = ("/pause", "/resume", "/collective_rpc", "/update_weight_version", "/weight_info", "/reset_prefix_cache")

    def version(self) -> str:
        return str(self.request("GET", "/weight_info")["weight_version"])

    def logprobs(self, tokens: list[int]) -> list[float]:
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "model": self._model()}
        found = self.request("POST", "/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [found[i][str(token)]["logprob"] for i, token in enumerate(tokens) if i]

    def sample(self, tokens: list[int], n: int) -> tuple[list[int], list[float]]:
        body = {"prompt": tokens, "max_tokens": n, "ignore_eos": True, "temperature": 1, "logprobs": 0, "model": self._model()}
        choice = self.request("POST", "/v1/completions", body | {"return_token_ids": True})["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def context(self) -> int:
        return self.request("GET", "/v1/models")["data"][0]["max_model_len"]

    def _model(self) -> str:
        return self.request("GET", "/v1/models")["data"][0]["id"]

    def _pause(self, mode: str) -> None:
        self.request("POST", f"/pause?mode={mode}")

    def load_paused(self, folder: Path, version: str) -> None:
        # with wsft's plugin layers that hold a packed copy of tied weights are packed again (vllm_plugin.py)
        method = "wsft_reload" if self._has_plugin() else "reload_weights"
        self._on_workers(method, weights_path=str(folder))

    def backends(self) -> set[str]:
        return set(self._on_workers("wsft_info")["backends"]) if self._has_plugin() else set()

    def shapes(self) -> dict[str, list[int]]:
        return self._on_workers("wsft_info")["shapes"] if self._has_plugin() else {}

    def dtype(self) -> str:
        return self._on_workers("wsft_info").get("dtype", "") if self._has_plugin() else ""

    def workers(self) -> int:
        return self.request("GET", "/get_world_size")["world_size"]

    def join(self, host: str, port: int, size: int, backend: str, timeout: float) -> None:
        self._on_workers("wsft_join", host=host, port=port, size=size, backend=backend, timeout_s=timeout)

    def receive(self, buckets: list[list[tuple[str, str, list[int]]]]) -> None:
        self._on_workers("wsft_receive", buckets=buckets)

    def refuses_adapters(self, rank: int) -> str:
        limits = self._on_workers("wsft_info").get("lora") if self._has_plugin() else None
        if not limits:
            return f"{self} needs wsft's plugin and --enable-lora to be given adapters"
        if limits["max_lora_rank"] < rank:
            return f"{self} takes adapters up to rank {limits['max_lora_rank']}: start it with --max-lora-rank {rank} or more"
        if limits["max_loras"] < LEAST_ADAPTERS:
            return (
                f"{self} runs {limits['max_loras']} adapter at a time, and a new one is loaded before requests on the old one "
                f"end: start it with --max-loras {LEAST_ADAPTERS}, or more for longer requests"
            )
        routes = self.request("GET", "/openapi.json")["paths"]
        if "/v1/load_lora_adapter" not in routes:
            return f"{self} loads no adapters while it runs: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        return ""

    def load_adapter(self, folder: Path, version: str) -> None:
        models = self.request("GET", "/v1/models")["data"]
        if folder.name not in {model["id"] for model in models}:  # else loaded by an attempt whose answer did not arrive
            body = {"lora_name": folder.name, "lora_path": str(folder)}
            self.request("POST", "/v1/load_lora_adapter", body, parses=False)
        base = [model["id"] for model in models if not model.get("parent")]
        self.request("POST", "/wsft/adapter", {"name": folder.name, "version": version, "base": base})
        self.paused_s = 0.0

    def unload_adapters(self, prefix: str, keep: str) -> set[str]:
        names = {model["id"] for model in self.request("GET", "/v1/models")["data"] if model["id"].startswith(prefix)}
        unused = names - {keep} - self.request("GET", "/wsft")["running"].keys()
        for name in unused:
            self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, parses=False)
        return names - unused

    def _has_plugin(self) -> bool:
        try:
            return bool(self.request("GET", "/wsft")["worker_extension"])
        except ServerFailed:
            return False

    def _on_workers(self, method: str, **arguments: Any) -> dict:
        """Call a method on all workers; returns what the first one does. The plugin's methods return errors, since an exception
        would end vLLM's engine."""
        found = self.request("POST", "/collective_rpc", {"method": method, "kwargs": arguments})
        results = [result for result in (found or {}).get("results", []) if isinstance(result, dict)]
        for result in results:
            if "error" in result:
                raise ServerFailed(f"{self} cannot load weights: {result['error']}")
        return results[0] if results else {}

    def _finish(self, version: str) -> None:
        self.request("POST", "/update_weight_version", {"new_version": version})
        self.request("POST", "/reset_prefix_cache")
        self.request("POST", "/resume")


class SGLang(Server):
    kind = "SGLang"
    needs = ("/pause_generation", "/continue_generation", "/update_weights_from_disk", "/model_info")
    pause_modes: ClassVar = {"keep": "retract", "abort": "abort"}

    def version(self) -> str:
        return str(self.request("GET", "/model_info")["weight_version"])

    def logprobs(self, tokens: list[int]) -> list[float]:
        body = {
            "input_ids": tokens, "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        }  # fmt: skip
        found = self.request("POST", "/generate", body)["meta_info"]["input_token_logprobs"]
        return [logprob for logprob, *_ in found[1:]]

    def sample(self, tokens: list[int], n: int) -> tuple[list[int], list[float]]:
        sampling = {"max_new_tokens": n, "ignore_eos": True, "temperature": 1}  # min_new_tokens would change the logprobs
        body = {"input_ids": tokens, "return_logprob": True, "sampling_params": sampling}
        found = self.request("POST", "/generate", body)["meta_info"]["output_token_logprobs"]
        return [token for _, token, *_ in found], [logprob for logprob, *_ in found]

    def context(self) -> int:
        return self._info().get("context_length") or 2**31

    def backends(self) -> set[str]:
        info = self._info()
        if info.get("dp_size", 1) > 1:  # SGLang's group for updates has no ranks for them
            return set()
        return {"nccl"} if info.get("device", "cuda") == "cuda" else {"gloo"}

    def dtype(self) -> str:
        return self._info().get("dtype", "")

    def workers(self) -> int:
        return self._info()["tp_size"] * self._info().get("pp_size", 1)

    def join(self, host: str, port: int, size: int, backend: str, timeout: float) -> None:
        self._group = group_name(port)
        body = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size, "backend": backend}
        self._succeed("/init_weights_update_group", body | {"group_name": self._group})

    def receive(self, buckets: list[list[tuple[str, str, list[int]]]]) -> None:
        self._succeed("/begin_weight_update", {})
        for number, bucket in enumerate(buckets):
            names, dtypes, shapes = zip(*bucket, strict=True)
            body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": self._group}
            body |= {"load_format": "flattened_bucket", "flush_cache": number == len(buckets) - 1}
            self._succeed("/update_weights_from_distributed", body)
        self._succeed("/end_weight_update", {})

    def _info(self) -> dict:
        try:
            return self.request("GET", "/server_info")
        except ServerFailed:  # of older versions
            return self.request("GET", "/get_server_info")

    def _succeed(self, path: str, body: dict) -> None:
        answer = self.request("POST", path, body) or {}
        if answer.get("success") is False:
            raise ServerFailed(f"{self} cannot load weights: {answer.get('message')}")

    def _pause(self, mode: str) -> None:
        self.request("POST", "/pause_generation", {"mode": mode})

    def load_paused(self, folder: Path, version: str) -> None:
        self._succeed("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True})

    def _finish(self, version: str) -> None:
        self._succeed("/update_weight_version", {"new_version": version, "abort_all_requests": False})
        self.request("POST", "/continue_generation", {})


class Each:
    """Runs steps on several servers, each step on all at the same time. A server whose step fails is left out of later ones.

    Attributes:
        left: servers that have not failed.
    """

    def __init__(self, servers: list[Server], pool: ThreadPoolExecutor):
        self.left, self._pool = list(servers), pool
        self._running: dict[Server, Future] = {}
        self._failures: dict[Server, ServerFailed] = {}

    def run(self, step: Callable[[Server], Any]) -> None:
        self.start(step)
        self.wait()

    def start(self, step: Callable[[Server], Any]) -> None:
        self._running = {server: self._pool.submit(step, server) for server in self.left}

    def wait(self) -> None:
        for server, future in self._running.items():
            error = future.exception()
            if error:  # whatever it is: raised on rank 0 alone, it would leave the other ranks waiting
                log.debug("%s failed", server, exc_info=error)
                failed = isinstance(error, ServerFailed)
                self._failures[server] = error if failed else ServerFailed(f"{server} cannot be given weights: {error!r}")
                self.left.remove(server)
        self._running = {}

    def results(self, servers: list[Server]) -> list[float | ServerFailed]:
        """For how many seconds each server was paused, or why it failed."""
        return [self._failures.get(server) or server.paused_s for server in servers]


def group_name(port: int) -> str:
    """Of the process group of SGLang's workers and rank 0, whose store is at the port."""
    return f"wsft_{port}"


def connect(url: str, timeout: float, api_key: str | None = None, pause_mode: str = "keep") -> Server:
    """The server at the URL. UserError if it is neither vLLM nor SGLang, lacks the routes to load weights, or cannot pause in
    this way."""
    url = url.rstrip("/")
    found = Server(url, timeout, api_key).request("GET", "/openapi.json")
    routes = (found or {}).get("paths", {}).keys()
    for kind in (VLLM, SGLang):
        if routes >= set(kind.needs):
            server = kind(url, timeout, api_key, pause_mode)
            if pause_mode not in kind.pause_modes:
                raise UserError(f"{server} cannot pause by {pause_mode}: expected {' or '.join(kind.pause_modes)}")
            return server
    shown = without_password(url)
    if "/v1/completions" in routes and "/pause_generation" not in routes:
        raise UserError(
            f"{shown} has no routes to load weights: if it is vLLM, start it with VLLM_SERVER_DEV_MODE=1 in its environment "
            f"(needs {', '.join(sorted(set(VLLM.needs) - routes))})"
        )
    raise UserError(
        f"{shown} is neither a vLLM nor an SGLang server that can load weights: expected --publish_to http://host:port"
    )
