"""Loads published weights into running inference servers: vLLM and SGLang, by their HTTP routes.

A server is recognised by the routes in its openapi.json, not by its version. Knows nothing of ranks, models or torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import requests

from wsft.config import without_password
from wsft.connections import cause_of, proxies_for
from wsft.errors import UserError

CONNECT_S = 10.0


class ServerFailed(UserError):
    """A server could not be brought to serve the published weights."""


@dataclass
class Server:
    """A running inference server. Subclasses know the routes of one kind.

    Args:
        url: "http://host:port".
        timeout: seconds in which each request must be answered.
        api_key: sent as a bearer token where it is set, for a proxy in front of the server.
    """

    url: str
    timeout: float
    api_key: str | None = None
    kind = ""
    needs: tuple[str, ...] = ()  # routes

    def load(self, folder: Path, version: str, pause: str) -> float:
        """Load the weights in the folder, which must be at this path on the server's host, too. Requests in flight are paused
        and kept, aborted, or waited for (`pause`: "keep", "abort", "wait"). Returns the seconds of the pause.

        Raises:
            ServerFailed: it is then unknown what the server serves; it stays paused where it can.
        """
        start = time.monotonic()
        self._pause(pause)
        self._load(folder, version)
        self._resume()
        spent, found = time.monotonic() - start, self.version()
        if found != version:
            raise ServerFailed(f"{self} has weight version {found!r} after loading {version!r}: it answered, and did nothing")
        return spent

    def version(self) -> str:
        """The version of the weights that it serves."""
        raise NotImplementedError

    def logprobs(self, tokens: list[int]) -> list[float]:
        """The logprobs of all tokens but the first, at temperature 1."""
        raise NotImplementedError

    def _pause(self, mode: str) -> None:
        raise NotImplementedError

    def _load(self, folder: Path, version: str) -> None:
        raise NotImplementedError

    def _resume(self) -> None:
        raise NotImplementedError

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer of 200; ServerFailed for anything else."""
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
        return answer.json() if answer.content else None

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

    def _model(self) -> str:
        return self.request("GET", "/v1/models")["data"][0]["id"]

    def _pause(self, mode: str) -> None:
        self.request("POST", f"/pause?mode={mode}")

    def _load(self, folder: Path, version: str) -> None:
        # with wsft's plugin layers that hold a packed copy of tied weights are packed again (vllm_plugin.py)
        method = "wsft_reload" if self._has_plugin() else "reload_weights"
        self.request("POST", "/collective_rpc", {"method": method, "kwargs": {"weights_path": str(folder)}})
        self.request("POST", "/update_weight_version", {"new_version": version})
        self.request("POST", "/reset_prefix_cache")

    def _has_plugin(self) -> bool:
        try:
            return bool(self.request("GET", "/wsft")["worker_extension"])
        except ServerFailed:
            return False

    def _resume(self) -> None:
        self.request("POST", "/resume")


class SGLang(Server):
    kind = "SGLang"
    needs = ("/pause_generation", "/continue_generation", "/update_weights_from_disk", "/model_info")
    _PAUSES: ClassVar = {"keep": "retract", "abort": "abort"}

    def version(self) -> str:
        return str(self.request("GET", "/model_info")["weight_version"])

    def logprobs(self, tokens: list[int]) -> list[float]:
        body = {
            "input_ids": tokens, "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        }  # fmt: skip
        found = self.request("POST", "/generate", body)["meta_info"]["input_token_logprobs"]
        return [logprob for logprob, *_ in found[1:]]

    def _pause(self, mode: str) -> None:
        if mode not in self._PAUSES:
            raise UserError(f"{self} cannot wait for requests in flight: set publish_pause to keep or abort")
        self.request("POST", "/pause_generation", {"mode": self._PAUSES[mode]})

    def _load(self, folder: Path, version: str) -> None:
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        self.request("POST", "/update_weights_from_disk", body)

    def _resume(self) -> None:
        self.request("POST", "/continue_generation", {})


def connect(url: str, timeout: float, api_key: str | None = None) -> Server:
    """The server at the URL. UserError if it is neither vLLM nor SGLang, or lacks the routes to load weights."""
    url = url.rstrip("/")
    found = Server(url, timeout, api_key).request("GET", "/openapi.json")
    routes = (found or {}).get("paths", {}).keys()
    for kind in (VLLM, SGLang):
        if routes >= set(kind.needs):
            return kind(url, timeout, api_key)
    shown = without_password(url)
    if "/v1/completions" in routes and "/pause_generation" not in routes:
        raise UserError(
            f"{shown} has no routes to load weights: if it is vLLM, start it with VLLM_SERVER_DEV_MODE=1 in its environment "
            f"(needs {', '.join(sorted(set(VLLM.needs) - routes))})"
        )
    raise UserError(
        f"{shown} is neither a vLLM nor an SGLang server that can load weights: expected --publish_to http://host:port"
    )
