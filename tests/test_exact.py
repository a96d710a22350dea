"""A step does not depend on how it is split: parameters against a dense, single-process float64 reference."""

import itertools
import json
import re

import pytest
import torch
from conftest import make_group, make_model, run_ranks, write_groups
from fed_run import flags
from safetensors.torch import load_file

# at 1.0 the reference itself, run in float32, is up to 3e-5 from float64: five steps make that of what float32 rounds
LEARNING_RATE, MOMENTUM, BATCH_SIZE = 0.5, 0.9, 6
STAGES, MICRO_BATCH_TOKENS, NORMALIZATIONS = (0, 1, 2, 3), (24, 1000), ("none", "batch")


def batches_of_uneven_groups(rng):
    """Four steps: uneven rollouts; one trained rollout among masked ones; two prompts that rollouts share, one of them without
    advantage; a last batch of one. And before the third a batch without trained tokens, which is skipped."""
    masked = [[-100] * n for n in (9, 3, 4, 5, 6)]
    one_trained = [make_group(rng, [12]), make_group(rng, [9, 3, 4, 5, 6], masks=masked)]
    nothing = [make_group(rng, [9, 3, 4, 5, 6, 7], masks=[*masked, [-100] * 7])]
    alike = [make_group(rng, [19, 15, 22], 13, alike=True), make_group(rng, [14, 30, 16], 12, alike=True)]
    alike[1]["advantages"][1] = [0.0] * 30
    return [make_group(rng, [3, 40, 7]), make_group(rng, [25, 11, 4])], one_trained, nothing, alike, [make_group(rng, [17])]


def reference(model_name, batches, normalize, **loading):
    """SGD with momentum on the loss as it is documented: one rollout at a time, no padding, float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float64, attn_implementation="eager", **loading)
    velocity = {}
    for groups in batches:
        rows = [row for g in groups for row in zip(g["tokens"], g["masks"], g["advantages"], strict=True)]
        trained = [[m != -100 and t > 0 for t, m in enumerate(mask)] for _, mask, _ in rows]
        known = torch.tensor(
            [a for (_, _, adv), on in zip(rows, trained, strict=True) for a, o in zip(adv, on, strict=True) if o],
            dtype=torch.float64,
        )
        if not len(known):
            continue  # no token has a weight: momentum must not move anything either
        mean, std = (known.mean(), known.std(correction=0).clamp(min=1e-8)) if normalize else (0.0, 1.0)
        loss = 0.0
        for (tokens, _, advantages), on in zip(rows, trained, strict=True):
            logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            for t in range(1, len(tokens)):
                if on[t]:
                    loss = loss - (advantages[t] - mean) / std * logp[t - 1, tokens[t]] / len(known)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad if p.grad is not None else torch.zeros_like(p)
                velocity[name] = MOMENTUM * velocity.get(name, 0) + gradient
                p -= LEARNING_RATE * velocity[name]
    return dict(model.named_parameters())


def setups(every):
    """(model, stage, micro_batch_tokens, normalization, number of the setup). Not `every` one: eight of the 32, in which each
    pair of values of two settings occurs (an orthogonal array)."""
    product = list(itertools.product(range(2), range(4), range(2), range(2)))
    array = [(c, 2 * a + b, c ^ a, c ^ b) for a, b, c in itertools.product(range(2), repeat=3)]
    return [
        (model, STAGES[stage], MICRO_BATCH_TOKENS[tokens], NORMALIZATIONS[normalization], i)
        for i, (model, stage, tokens, normalization) in enumerate(product)
        if every or product[i] in array
    ]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_parameters_do_not_depend_on_ranks_stage_or_micro_batches(
    every, num_ranks, tiny_model, tiny_untied_model, tmp_path, rng
):
    batches, models = batches_of_uneven_groups(rng), (tiny_model, tiny_untied_model)
    data = write_groups(tmp_path / "data.jsonl", [group for batch in batches for group in batch])
    runs = []
    for model, stage, micro_batch_tokens, normalization, i in setups(every):
        ds = {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": MOMENTUM}},
            "gradient_clipping": "auto",
        }
        runs.append(
            dict(
                model_name=models[model], data=data, deepspeed=ds, batch_size=BATCH_SIZE, micro_batch_tokens=micro_batch_tokens,
                learning_rate=LEARNING_RATE, max_grad_norm=0, advantage_normalization=normalization, device="cpu",
                output_dir=str(tmp_path / f"run{i}"), packing=(model + stage // 2 + stage) % 2 == 0,
                gradient_checkpointing=bool(i % 3), skip_zero_weight=bool(i % 5), prefetch_batches=i % 3,
                share_prefixes=bool(i % 7),
            )
        )  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], num_ranks, timeout=1000):
        assert code == 0, output[-4000:]
    wanted = {
        (i, normalization): reference(model, batches, normalization == "batch")
        for i, model in enumerate(models)
        for normalization in NORMALIZATIONS
    }
    starts, shared = [load_file(f"{model}/model.safetensors") for model in models], []
    for run, (model, stage, micro_batch_tokens, normalization, i) in zip(runs, setups(every), strict=True):
        got = load_file(tmp_path / f"run{i}" / "final" / "model.safetensors")
        assert got.keys() == wanted[model, normalization].keys()
        for name, value in wanted[model, normalization].items():
            error = ((got[name].double() - value).norm() / value.norm()).item()
            moved = ((value - starts[model][name].double()).norm() / value.norm()).item()
            assert moved > 1e-4, f"{name} hardly moved: this would show nothing"
            assert error < 1e-5, f"{name}: {error} at stage {stage}, micro_batch_tokens {micro_batch_tokens}"
        if run["packing"] and run["share_prefixes"] and micro_batch_tokens == max(MICRO_BATCH_TOKENS):
            shared.append(json.loads((tmp_path / f"run{i}" / "metrics.jsonl").read_text().splitlines()[2])["plan/shared"])
    assert len(shared) > 1 and min(shared) > 0.1


def test_second_shares_within_hosts_change_nothing(tiny_model, tiny_untied_model, tmp_path, rng):
    """Two hosts of two ranks, as the launcher tells, with a reference model beside the trained one."""
    batches = batches_of_uneven_groups(rng)
    data = write_groups(tmp_path / "data.jsonl", [group for batch in batches for group in batch])
    runs = []
    for name, second in {"plain": 1, "hpz": "auto"}.items():
        ds = {
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": second},
            "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": MOMENTUM}},
        }
        runs.append(
            dict(
                model_name=tiny_model, ref_model_name=tiny_untied_model, kl_coef=0.1, data=data, deepspeed=ds, device="cpu",
                batch_size=BATCH_SIZE, micro_batch_tokens=24, learning_rate=LEARNING_RATE, output_dir=str(tmp_path / name),
            )
        )  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], 4, ranks_a_host=2, timeout=300):
        assert code == 0, output[-4000:]
    plain, hpz = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("plain", "hpz"))
    for name, value in plain.items():
        assert ((hpz[name] - value).norm() / value.norm()).item() < 1e-6, name


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_layers_are_gathered_as_a_whole(lora_rank, tmp_path, rng):
    """Embedding, four layers, norm and head: not each matrix by itself, in backward passes not twice, and the head for itself
    alone, not for the whole pass."""
    ds = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    ds = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}, "zero_optimization": ds}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    data = write_groups(tmp_path / "data.jsonl", [make_group(rng, [10, 14]) for _ in range(6)])
    settings = {"model_name": make_model(tmp_path / "model", num_hidden_layers=4), "deepspeed": tmp_path / "ds.json"}
    settings |= {"data": data, "batch_size": 4, "device": "cpu", "output_dir": tmp_path / "run"}
    settings |= {"callbacks": "tests.own_loop:Gathers"} | ({"lora_rank": lora_rank} if lora_rank else {})
    (code, output), _ = run_ranks(["train.py", *flags(settings)], 2)
    assert code == 0, output
    _, *steps = re.findall(r"gathers \[(\d+), (\d+), (\d+)\]", output)  # the first is that of checks at the start, too
    assert steps and all(int(forward) <= 7 and int(backward) <= 7 and foreign == "0" for forward, backward, foreign in steps)
