"""Tests that need a GPU: the head against its dense twin, runs of the shipped configs. Skipped elsewhere, with a reason."""

import functools
import json
import signal
import sys

import numpy as np
import pytest
import torch
from atropos_server import free_port
from conftest import clean_environment, make_group, run_ranks, run_together, write_groups
from fed_run import steps_of, train
from shapes import QWEN_1_5B, QWEN_7B, figure, make_shape

from wsft.loss.head import head_loss, weighted_linear_cross_entropy
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients, TokenTerms
from wsft.model.attention import packed_attention
from wsft.model.packing import Layout, VarlenMetadata

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("in_one_pass", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_head_on_a_gpu_gives_the_dense_gradients(dtype, tolerance, in_one_pass, monkeypatch):
    monkeypatch.setattr("wsft.loss.head.runs_in_one_pass", lambda logits: in_one_pass)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    hidden, lm_head, weights = random(300, 64).to(dtype), (random(5000, 64) / 8).to(dtype), random(300)
    targets = torch.randint(5000, (300,), device="cuda", generator=generator)
    inputs = [hidden.requires_grad_(), lm_head.requires_grad_()]
    loss = weighted_linear_cross_entropy(hidden, lm_head, targets, weights, 0.7, chunk_tokens=128)
    gradients = torch.autograd.grad(loss, inputs)
    logp = (hidden.double() @ lm_head.double().T / 0.7).log_softmax(-1)
    dense = -(weights.double() * logp.gather(1, targets[:, None]).squeeze(1)).sum()
    assert (loss - dense).abs() < tolerance * dense.abs()
    for ours, theirs in zip(gradients, torch.autograd.grad(dense, inputs), strict=True):
        assert (ours.double() - theirs.double()).norm() < tolerance * theirs.double().norm()


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_terms_on_a_gpu_are_those_of_a_cpu(name):
    generator, N = torch.Generator().manual_seed(0), 300
    hidden, lm_head = torch.randn(N, 64, generator=generator), torch.randn(500, 64, generator=generator) / 8
    targets, sequences = torch.randint(500, (N,), generator=generator), torch.arange(N) // 50
    logp = (hidden @ lm_head.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    terms = TokenTerms(
        Objective(name), Coefficients(kl=0.1, entropy=0.01, distill=0.5), torch.full((N,), 1 / N),
        torch.randn(N, generator=generator),
        logp + torch.randn(N, generator=generator) / 4, torch.full((N,), torch.nan), torch.ones(N), sequences,
        logp - 0.1, torch.randint(500, (N, 4), generator=generator), torch.rand(N, 4, generator=generator) / 4,
    )  # fmt: skip
    found = []
    for device in ("cuda", "cpu"):
        inputs, there = [x.to(device).requires_grad_() for x in (hidden, lm_head)], terms.to(device)
        out = head_loss(*inputs, targets.to(device), there, chunk_tokens=128, **there.head_options())
        sums, maxima = there.sums(out)
        found.append([x.cpu() for x in (out.loss, *torch.autograd.grad(out.loss, inputs), *sums.values(), *maxima.values())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_the_head_never_waits_for_the_gpu(name):
    N, some = 300, functools.partial(torch.rand, device="cuda")
    leaves = [some(rows, 64).bfloat16().requires_grad_() for rows in (N, 500)]
    ids, numbers = torch.arange(N, device="cuda"), [some(N) + 0.1 for _ in range(5)]
    terms = TokenTerms(Objective(name), Coefficients(entropy=0.01), *numbers, ids // 50)
    for mode in ("default", "error"):  # the first time kernels are made
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = head_loss(*leaves, ids, terms, chunk_tokens=128, **terms.head_options())
            out.loss.backward()
            sums, _ = terms.sums(out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sums["tokens"] == N


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 16])
def test_packed_attention_on_a_gpu_keeps_sequences_apart(window, dtype, tolerance):
    lengths, after = [40, 1, 130, 17, 64], [-1, -1, -1, 2, 2]
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 64, device="cuda", generator=generator, dtype=dtype).requires_grad_()
        for heads in (8, 2, 2)
    )
    printed = VarlenMetadata.of(Layout(tuple(lengths), tuple(after))).to(query.device).kwargs()
    packed, _ = packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=window, **printed)
    parts, alone = [x.split(lengths, dim=2) for x in (query, key, value)], []
    for i, before in enumerate(after):
        whole = [x[i] if before < 0 else torch.cat([x[before], x[i]], dim=2) for x in parts]
        alone.append(packed_attention(torch.nn.Module(), *whole, None, sliding_window=window)[0][:, -lengths[i] :])
    alone = torch.cat(alone, dim=1)
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad(x.float().square().sum(), (query, key, value)) for x in (packed, alone))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 2 * tolerance * theirs.norm()


@pytest.mark.parametrize("name", ["zero3", "zero2", "zero3_offload", "zero3_offload_optimizer"])
def test_the_shipped_configs_train_on_a_gpu_as_on_a_cpu(name, tiny_model, tmp_path, rng):
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14, 9, 22]) for _ in range(3)])
    losses = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        command = ["deepspeed", "--num_gpus", "1", "--master_port", str(free_port()), "train.py", f"--output_dir={out}"]
        command += [f"--deepspeed=ds_configs/{name}.json", f"--model_name={tiny_model}", f"--data={data}", "--batch_size=4"]
        ((code, output),) = run_together([[*command, f"--device={device}"]], [clean_environment()], timeout=400)
        assert code == 0, output
        losses[device] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05, abs=0.02)


def test_fused_kernels_train_as_the_models_own_code(tiny_model, tmp_path, rng):
    pytest.importorskip("liger_kernel")
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14, 9, 22]) for _ in range(3)])
    settings = {"deepspeed": "ds_configs/zero3.json", "model_name": tiny_model, "data": data, "batch_size": 4, "device": "cuda"}
    losses = {}
    for kernels in ("none", "liger"):
        output = train(settings, 1, output_dir=tmp_path / kernels, kernels=kernels)
        assert ("kernels of liger-kernel" in output) == (kernels == "liger")
        losses[kernels] = [step["loss"] for step in steps_of(tmp_path / kernels)]
    assert losses["liger"] == pytest.approx(losses["none"], rel=0.05, abs=0.02)


@pytest.mark.parametrize("name", ["zero3", "zero2", "zero3_offload", "zero3_offload_optimizer"])
def test_a_run_killed_on_a_gpu_resumes_with_the_same_losses(name, tiny_model, tmp_path, rng):
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14]) for _ in range(6)])
    settings = {"deepspeed": f"ds_configs/{name}.json", "model_name": tiny_model, "data": data, "batch_size": 2}
    settings |= {"device": "cuda", "learning_rate": 1e-3, "save_steps": 2}
    train(settings, 1, output_dir=tmp_path / "untouched")
    train(settings, 1, script="tests/kill_at.py step 5", codes=(-signal.SIGKILL,), output_dir=tmp_path / "run")
    train(settings, 1, output_dir=tmp_path / "run", resume=True)
    losses = [[s["loss"] for s in steps_of(tmp_path / run)] for run in ("run", "untouched")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shape, optimizer, tokens", [(QWEN_1_5B, "AdamW", 4096), (QWEN_7B, "SGD", 2048)], ids=["1.5b", "7b"])
def test_a_run_takes_the_gpu_memory_that_was_estimated(shape, optimizer, tokens, kept, tmp_path):
    """Within 15 %; SGD, and gradients summed in bf16, bring 7B onto one GPU of 80 GB."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = make_shape(tmp_path / "model", **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the run is another process on this GPU
    params = {"lr": "auto"} | ({"torch_adam": True, "fused": True} if optimizer == "AdamW" else {})
    ds = {"bf16": {"enabled": True}, "optimizer": {"type": optimizer, "params": params}, "zero_optimization": {"stage": 3}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    rng = np.random.default_rng(0)
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [tokens // 2] * 2) for _ in range(3)])
    command = ["train.py", f"--model_name={folder}", f"--data={data}", f"--deepspeed={tmp_path / 'ds.json'}"]
    command += ["--device=cuda", "--batch_size=2", f"--micro_batch_tokens={tokens}", f"--max_token_len={tokens}"]
    command += [f"--gradient_checkpointing={not kept}", "--save_steps=9", f"--output_dir={tmp_path / 'run'}"]
    ((code, text),) = run_together([[sys.executable, *command, "--dry_run", "--ranks=1"]], [clean_environment()])
    assert code == 0, text
    ((code, output),) = run_ranks(command, 1, imports_done=False, timeout=900)
    assert code == 0, output
    measured = max(step["memory/peak_gib"] for step in steps_of(tmp_path / "run"))
    assert figure(text, "the most at a time") == pytest.approx(measured, rel=0.15)


def test_more_ranks_than_gpus_are_refused_by_name(tiny_model, tmp_path):
    environment = clean_environment(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="99", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    command = [sys.executable, "train.py", f"--model_name={tiny_model}", f"--output_dir={tmp_path / 'run'}"]
    ((code, output),) = run_together([command], [environment])
    assert code != 0 and "local rank 99 has no GPU of its own" in output
