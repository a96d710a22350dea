"""Sampling, training and publishing in a loop: the plugin's route for Atropos, and launch/loop.sh with a real vLLM (--all)."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, clean_environment, run_together

from wsft.publish.vllm_plugin import Middleware

pytest_plugins = ["inference_servers"]
SPANS = [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}]


async def vllm_app(scope, receive, send):
    """Answers as vLLM's /inference/v1/generate, with what it was asked in a header."""
    asked = (await receive())["body"]
    choices = [
        {
            "index": index, "token_ids": [7, 8], "finish_reason": "stop", "weight_versions": SPANS,
            "logprobs": {"content": [{"token_id": 7, "logprob": -0.5}, {"token_id": 8, "logprob": -index}]},
        }
        for index in (1, 0)
    ]  # fmt: skip
    vllm_app.asked = scope["path"], json.loads(asked)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"choices": choices}).encode()})


def ask(app, method, path, body=None):
    sent, parts = [], [{"body": json.dumps(body).encode()}]

    async def receive():
        return {"type": "http.request", "more_body": False, **parts.pop()}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    with ThreadPoolExecutor() as pool:  # a test before this one may have left a running event loop in this thread
        pool.submit(asyncio.run, app(scope, receive, send)).result()
    return json.loads(sent[1]["body"])


def generate(app=None, **asked):
    body = {"prompt": {"prompt_token_ids": [1, 2]}, "n": 2, **asked}
    return ask(app or Middleware(vllm_app), "POST", "/generate", body)


def test_atropos_samples_by_vllms_route_for_tokens():
    answer = generate(temperature=1.0, stop=["\n", 9], max_tokens=4, stream=False)
    path, asked = vllm_app.asked
    assert path == "/inference/v1/generate" and asked["token_ids"] == [1, 2]
    sampling = dict(n=2, temperature=1.0, stop=["\n"], stop_token_ids=[9], max_tokens=4, logprobs=0)
    assert asked["sampling_params"] == sampling
    assert answer["logprobs"] == [[[{"7": -0.5}], [{"8": 0}]], [[{"7": -0.5}], [{"8": -1}]]]
    assert answer["token_ids"] == [[7, 8]] * 2 and answer["finish_reasons"] == ["stop"] * 2


def test_an_environment_that_asks_learns_which_weights_sampled():
    answer = generate(weight_versions=True)
    assert "weight_versions" not in vllm_app.asked[1]["sampling_params"]
    assert answer["finish_reasons"] == [{"type": "stop", "weight_versions": SPANS}] * 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_learns_from_its_own_samples(vllm, tmp_path):
    environment = clean_environment(VLLM_ENV=str(vllm.parent.parent), RUN=str(tmp_path / "loop"))
    ((code, output),) = run_together([["bash", "launch/loop.sh"]], [environment], cwd=ROOT)
    assert code == 0, output
    before, after = map(float, re.search(r"reward before (\S+) after (\S+)\n?$", output).groups())
    assert before <= 0.4 and after >= 0.7, output
    metrics = [json.loads(line) for line in (tmp_path / "loop" / "metrics.jsonl").open()]
    assert all(line["data/staleness"] == 0 and abs(line["ratio/mean"] - 1) < 0.02 for line in metrics)
    assert (tmp_path / "loop" / "report.html").exists()


def test_requests_run_on_the_adapter_that_was_published_last():
    """For the served model or for none, by all routes; the plugin counts them, since a running one needs its adapter."""

    async def vllm(scope, receive, send):
        running.append(app._running.copy())
        await vllm_app(scope, receive, send)

    app, running = Middleware(vllm), []
    generate(app)
    assert "model" not in vllm_app.asked[1] and not running[-1]
    ask(app, "POST", "/wsft/adapter", {"name": "wsft_1_7", "version": "7", "base": ["small"]})
    assert ask(app, "GET", "/weight_info") == {"weight_version": "7"}
    answer = generate(app, weight_versions=True)
    assert vllm_app.asked[1]["model"] == "wsft_1_7" and running[-1] == {"wsft_1_7": 1}
    assert answer["finish_reasons"] == [{"type": "stop", "weight_versions": [{"version": "7", "start": 0, "end": 2}]}] * 2
    for path in ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate"):
        for model, served in (("small", "wsft_1_7"), (None, "wsft_1_7"), ("another", "another")):
            ask(app, "POST", path, {"model": model} if model else {})
            assert vllm_app.asked == (path, {"model": served}) and (running[-1]["wsft_1_7"] == 1) == (served != "another")
    assert ask(app, "GET", "/wsft")["running"] == {}


def test_a_run_that_publishes_whole_weights_ends_the_adapter_of_an_earlier_one():
    app = Middleware(vllm_app)
    ask(app, "POST", "/wsft/adapter", {"name": "wsft_1_7", "version": "7", "base": ["small"]})
    ask(app, "POST", "/update_weight_version", {"new_version": "0"})
    assert vllm_app.asked == ("/update_weight_version", {"new_version": "0"})
    answer = generate(app, weight_versions=True)
    assert "model" not in vllm_app.asked[1] and answer["finish_reasons"][0]["weight_versions"] == SPANS
    assert ask(app, "GET", "/wsft")["adapter"] is None
