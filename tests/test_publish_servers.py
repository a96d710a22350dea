"""Publishing into running inference servers: small ones with vLLM's routes; test_inference_servers.py has the real ones."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from atropos_server import atropos_server, free_port
from conftest import make_group, make_model, run_ranks, run_script, write_groups
from fed_run import flags, state_of, steps_of
from safetensors.torch import load_file
from small_server import SmallServer

from wsft import WeightedSFTConfig
from wsft.errors import UserError
from wsft.publish import broadcast
from wsft.publish.adapters import AdapterFolder
from wsft.publish.probe import Probe
from wsft.publish.servers import VLLM, Server, ServerFailed, SGLang, connect
from wsft.publish.verification import Verification, WeightsDiffer

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
    settings = {name: value for name, value in (settings | changes).items() if value is not None}
    results = run_ranks(["train.py", *flags(settings)], ranks)
    assert all(code in codes for code, _ in results), results[0][1]
    return results[0][1], steps_of(tmp_path / "run")


def test_a_server_that_cannot_load_weights_is_refused_at_the_start(tmp_path, rng):
    with atropos_server() as server:
        output, _ = fed_to([server], tmp_path, rng, make_model(tmp_path / "model"), codes=(1,))
    assert "is neither a vLLM nor an SGLang server" in output and "Traceback" not in output


def test_a_server_out_of_reach_ends_the_start_after_the_timeout(tmp_path, rng):
    server = SimpleNamespace(url=f"http://127.0.0.1:{free_port()}")
    output, _ = fed_to([server], tmp_path, rng, make_model(tmp_path / "model"), codes=(1,), publish_timeout=1)
    assert f"server at {server.url} does not answer GET /openapi.json" in output and "Traceback" not in output


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


def test_with_lora_servers_receive_the_adapted_weights(tmp_path, rng):
    """In float32, which the server has, also from a trainer in bf16: rounded to bf16 the first small changes would be lost."""
    model = make_model(tmp_path / "model", tied=True)
    lora = dict(lora_rank=3, lora_alpha=6, learning_rate=0.5)
    with SmallServer(model) as server:
        output, metrics = fed_to([server], tmp_path, rng, model, 2, 3, **lora)
        assert "adapters are added to the published weights: the vLLM server at" in output
        checkpoint = tmp_path / "run" / "checkpoints" / "step_3"
        code, output = run_script("-m", "wsft.export", checkpoint, tmp_path / "merged", "--merge")
        assert code == 0 and server.version == "3" and serves(server, tmp_path / "merged") and not serves(server, model), output
    assert max(line["publish/difference_max"] for line in metrics) < 1e-5
    assert [line["publish/rounding_lost"] for line in metrics] == pytest.approx([0] * 3, abs=1e-3)
    assert metrics[0]["publish/gib"] < sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 2**30
    bf16 = {
        "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    (tmp_path / "bf16.json").write_text(json.dumps(bf16))
    changes = lora | dict(deepspeed=tmp_path / "bf16.json", overwrite_output_dir=True)
    with SmallServer(model) as server:
        _, metrics = fed_to([server], tmp_path, rng, model, **changes)
        assert any((held.bfloat16() != held).any() for held in server.worker.model.parameters())
    assert metrics[-1]["publish/rounding_lost"] < 1e-3


def test_what_rounding_takes_from_adapters_is_said(tmp_path, rng):
    model = make_model(tmp_path / "model")
    bf16 = {
        "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    (tmp_path / "bf16.json").write_text(json.dumps(bf16))
    changes = dict(lora_rank=3, lora_alpha=6, deepspeed=tmp_path / "bf16.json")
    changes |= dict(publish_to=None, publish_folder=tmp_path / "published", publish_lora="merged", learning_rate=1e-3)
    output, metrics = fed_to([], tmp_path, rng, model, **changes)
    assert 0.1 < metrics[0]["publish/rounding_lost"] < 1.1 and "of what the adapters add to the published weights" in output


LORA = dict(lora_rank=3, lora_alpha=6, learning_rate=0.5)


def test_adapters_get_a_name_for_each_version_and_stay_while_requests_run_on_them(tmp_path, rng):
    """One server is new between two versions, and gets the last one again."""
    model, published = make_model(tmp_path / "model"), tmp_path / "run" / "published"
    with SmallServer(model, max_lora_rank=4) as server, SmallServer(model, max_lora_rank=4) as other:
        restarts = [other.restart]

        def restart_after_2():
            if other.version == "2" and restarts:
                restarts.pop()()
            return {"weight_version": other.version}

        other.answers["/weight_info"] = restart_after_2
        first = lambda: next((name for name in server.adapters if name.endswith("_0")), None)  # noqa: E731
        server.answers["/wsft"] = lambda: {"worker_extension": True, "running": {first(): 1} if first() else {}}
        output, metrics = fed_to([server, other], tmp_path, rng, model, 2, 3, publish_steps=2, **LORA)
        assert "adapters are published under a name of its own for each version" in output
        assert "did it restart?" in output
        assert [name.split("_")[-1] for name in server.adapters] == ["0", "2"] and first() in server.adapters
        assert [name.split("_")[-1] for name in other.adapters] == ["2"] and other.version == server.version == "2"
        assert sorted(path.name for path in published.iterdir()) == sorted(server.adapters)
        assert not any(call in server.calls for call in ("/pause", "wsft_receive"))
        del server.answers["/wsft"]
        again = np.random.default_rng(0)  # the same data
        fed_to([server, other], tmp_path, again, model, 2, 3, resume=True, training_steps=3, **LORA)
        assert len(server.adapters) == len(other.adapters) == 1 == len([*published.iterdir()])
    (verified,) = (line for line in metrics if "publish/difference_max" in line)
    assert verified["publish/difference_max"] < 1e-5 < 1e-3 < verified["publish/difference_base"]


def test_a_server_that_applies_no_adapter_is_noticed(tmp_path, rng):
    model = make_model(tmp_path / "model")
    with SmallServer(model, max_lora_rank=4) as server:
        server.ignores_adapters = True
        output, metrics = fed_to([server], tmp_path, rng, model, codes=(1,), **LORA)
    assert "samples from its base model instead of the adapter of version 1" in output and "Traceback" not in output
    assert [line["step"] for line in metrics] == [1] == [state_of(tmp_path / "run")["step"]]


@pytest.mark.parametrize("limit, message", [(0, "needs wsft's plugin and --enable-lora"), (2, "--max-lora-rank 3 or more")])
def test_a_server_that_takes_no_such_adapters_is_refused(limit, message, tmp_path, rng):
    model = make_model(tmp_path / "model")
    with SmallServer(model, max_lora_rank=limit) as server:
        output, _ = fed_to([server], tmp_path, rng, model, codes=(1,), publish_lora="adapter", **LORA)
    assert message in output and "or set publish_lora merged" in output and "Traceback" not in output


def test_an_adapter_that_is_not_finite_is_not_published(tmp_path):
    folder = AdapterFolder(tmp_path, "run", "start", {}, None, None)
    with pytest.raises(UserError, match="the adapter after step 7 is not finite"):
        folder._write(7, {"a": torch.tensor([1.0, float("nan")])})
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("fault, message", [("address", "cannot be sent to"), ("answer", "cannot be given weights: KeyError")])
def test_what_goes_wrong_on_rank_0_alone_is_the_failure_of_that_server(fault, message, tmp_path, monkeypatch):
    """An exception there would leave the other ranks waiting."""
    tensors = SimpleNamespace(
        buckets=[["w"]], manifest=[[("w", "float32", [2])]], bucket=lambda names, wanted, device: {"w": torch.zeros(2)}
    )
    world = SimpleNamespace(rank=0, device=torch.device("cpu"))
    with SmallServer(make_model(tmp_path / "model")) as server:
        if fault == "address":
            monkeypatch.setattr(broadcast, "_own_address", lambda url: "192.0.2.1")  # of no interface
        else:
            server.answers["/get_world_size"] = dict
        (result,) = broadcast.Broadcast(tensors, world, "gloo", 5).send([VLLM(server.url, 5)], "1")
    assert isinstance(result, ServerFailed) and message in str(result)


def test_an_answer_that_is_no_json_is_a_failure_of_the_server():
    with atropos_server() as server, pytest.raises(ServerFailed, match="with no JSON: "):
        Server(server.url, 5).request("GET", "/docs")


def test_a_way_to_pause_that_a_server_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(Server, "request", lambda *_: {"paths": dict.fromkeys(SGLang.needs)})
    with pytest.raises(UserError, match="cannot pause by wait: expected keep or abort"):
        connect("http://localhost:1", 5, pause_mode="wait")


def test_a_server_with_the_version_before_is_noticed_however_small_the_step():
    """By logprobs alone: the server says that it has the new version, and its noise is as large as the step."""
    rng = np.random.default_rng(0)
    before, step, noise = rng.normal(-3, 1, 40), rng.normal(0, 1e-3, 40), rng.normal(0, 2e-4, 40)
    verification = Verification(WeightedSFTConfig(model_name="m"), None, None, "bf16", None)
    trained, untouched = Scoring(before + step + noise), Scoring(before + noise)
    verification._due, verification._prefixes = True, {trained: [1] * 33, untouched: [1] * 33}
    probes = (Probe([list(range(41))], [logprobs.tolist()]) for logprobs in (before, before + step))
    verification._before, verification._probe = probes
    verification.verify(trained, "2")
    with pytest.raises(WeightsDiffer, match="still serves the version before 2"):
        verification.verify(untouched, "2")


class Scoring:
    def __init__(self, logprobs):
        self.found = logprobs.tolist()

    def version(self):
        return "2"

    def sample(self, tokens, n):
        return [0] * n, self.found[-n:]

    def logprobs(self, tokens):
        return self.found
