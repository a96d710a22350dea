"""Objectives and terms through ZeRO on real ranks with uneven micro-batches, against their papers' surrogates in float64."""

import copy
import json
import math
from functools import partial

import pytest
import surrogates as papers
import torch
from conftest import VOCAB, make_group, run_ranks, write_groups
from safetensors.torch import load_file

LEARNING_RATE, BATCH_SIZE, MAX_TOKEN_LEN = 0.5, 6, 40
PAPERS = {  # what is maximised, see surrogates.py
    "ppo_clip": partial(papers.ppo, eps_low=0.1, eps_high=0.2),
    "gspo": partial(papers.gspo, eps_low=0.02, eps_high=0.03),
    "dppo": partial(papers.dppo, divergence="tv", low=0.001, high=0.002, tau=0.3),
    "gmpo": partial(papers.gmpo, bound=0.2),
    "sapo_sequence": partial(papers.sapo_sequence, tau_pos=1.0, tau_neg=1.05),
}
CASES = {
    "ppo_clip": dict(objective="ppo_clip", objective_args={"eps_low": 0.1, "eps_high": 0.2}),
    "gspo": dict(objective="gspo", objective_args={"eps_low": 0.02, "eps_high": 0.03}, reduction="sequence_mean"),
    "dppo": dict(objective="dppo", objective_args={"delta_low": 0.001, "delta_high": 0.002, "tau": 0.3}),
    "gmpo": dict(objective="gmpo", objective_args={"eps_low": 0.2, "eps_high": 0.2}, reduction="sequence_mean"),
    "sapo_sequence": dict(objective="sapo_sequence", reduction="constant"),
    "corrected": dict(mismatch_cap=1.1, sequence_mask={"geometric": [0.9, 1.1]}, max_staleness=0),
    "two_updates": dict(
        objective="ppo_clip", objective_args={"eps_low": 0.05, "eps_high": 0.05}, icepop=[0.7, 1.4], updates_per_batch=2
    ),
    "kl_and_teacher": dict(kl_coef=0.3, distill_coef=0.7, entropy_coef=0.05, reduction="constant"),
    "reference_model": dict(objective="importance_sampling", kl_coef=0.5, distill_coef=0.4, distill_renormalize=True),
}


def rows_of(group):
    """The sequences of a group, each as what the surrogates want to know of it."""
    for i, tokens in enumerate(group["tokens"]):
        yield {
            "tokens": tokens,
            "trained": [t for t, label in enumerate(group["masks"][i]) if label != -100],
            "temperature": group["overrides"][i].get("temperature", group["generation_params"]["temperature"]),
            "version": group["overrides"][i].get("weight_version", math.nan),
            **{name: group[name][i] for name in ("advantages", "inference_logprobs", "ref_logprobs")},
            "teacher": list(zip(group["distill_token_ids"][i], group["distill_logprobs"][i], strict=True)),
        }


def make_records(model, rng):
    """Two batches of uneven sequences: sampled by a policy near the model's, here and there without a logp or a teacher."""
    groups = [make_group(rng, lengths) for lengths in ([3, 40, 7], [25, 11, 4], [9, 30, 5], [17, 6, 21])]
    for group, third in zip(groups, [0.0, 0.4, 0.4, 0.4], strict=True):
        n = len(group["tokens"])
        group["advantages"] = [
            [0.0 if label == -100 else a for label in row] for row, a in zip(group["masks"], [1.3, -0.8, third], strict=True)
        ]
        group["generation_params"] = {"temperature": 0.8}
        group["overrides"] = [{}, {"temperature": 1.25, "weight_version": 0}, {}]
        group["distill_token_ids"] = [
            [rng.integers(0, VOCAB, rng.integers(0, 4)).tolist() for _ in row] for row in group["tokens"]
        ]
        group["distill_logprobs"] = [
            [rng.uniform(-3, -1.2, len(ids)).tolist() for ids in row] for row in group["distill_token_ids"]
        ]
        group["inference_logprobs"], group["ref_logprobs"] = [None] * n, [None] * n
        for i, row in enumerate(rows_of(group)):
            logp = scores(model, row).tolist()
            drift, far = rng.normal(0, 0.3, len(logp)), rng.normal(0, 0.5, len(logp))
            known = [t in row["trained"] and rng.random() > 0.2 for t in range(len(logp))]
            group["inference_logprobs"][i] = [min(0.0, p + d) if k else 1.0 for p, d, k in zip(logp, drift, known, strict=True)]
            group["ref_logprobs"][i] = [min(0.0, p + d) for p, d in zip(logp, far, strict=True)]
    return [groups[:2], groups[2:]]


def logits_of(model, row):
    """[T, V] scaled: those that score token t stand at t."""
    logits = model(torch.tensor([row["tokens"]])).logits[0].double() / row["temperature"]
    return torch.cat([logits[:1] * 0, logits[:-1]])


def scores(model, row):
    return logits_of(model, row).log_softmax(-1).gather(1, torch.tensor(row["tokens"])[:, None]).squeeze(1).detach()


def surrogate(case, model, reference, rows, step, start):
    """The loss of the batch of a step as the papers write it; `start` is the model at the start of the batch."""
    losses, masked = [], []
    for row in rows:
        at = row["trained"]
        log_p = logits_of(model, row)[at].log_softmax(-1)
        logp = log_p.gather(1, torch.tensor(row["tokens"])[at, None]).squeeze(1)
        A = torch.tensor(row["advantages"], dtype=torch.float64)[at]
        sampled = torch.tensor(row["inference_logprobs"], dtype=torch.float64)[at]
        sampled = sampled.masked_fill(sampled == 1.0, math.nan)
        if case in PAPERS:
            losses.append(-PAPERS[case](logp, sampled, A))
        elif case == "corrected":
            known = papers.ratio(logp, sampled).detach()[~sampled.isnan()]
            near = not len(known) or 0.9 <= known.log().mean().exp() <= 1.1
            kept = near and not step - row["version"] > 0
            masked.append(not kept)
            losses.append(-float(kept) * papers.ratio(logp, sampled).detach().clamp(max=1.1) * A * logp)
        elif case == "two_updates":
            prox = scores(start, row)[at]
            rho = (prox - sampled.where(~sampled.isnan(), prox)).exp()
            masked += (out := (rho < 0.7) | (rho > 1.4)).tolist()
            losses.append(-papers.ppo(logp, prox, A, 0.05, 0.05) * rho.masked_fill(out, 0))
        elif case == "kl_and_teacher":
            ref = torch.tensor(row["ref_logprobs"], dtype=torch.float64)[at]
            entropy = -(log_p.exp() * log_p).sum(-1)
            losses.append(-A * logp + 0.3 * k3(ref - logp) - 0.05 * entropy + 0.7 * forward_kl(row, log_p, False))
        else:
            ref = scores(reference, row)[at]
            losses.append(-A * papers.ratio(logp, sampled) + 0.5 * k3(ref - logp) + 0.4 * forward_kl(row, log_p, True))
    assert not masked or (any(masked) and not all(masked))
    return papers.REDUCTIONS[CASES[case].get("reduction", "mean")](losses, MAX_TOKEN_LEN)


def k3(log_ratio):
    return log_ratio.exp() - 1 - log_ratio


def forward_kl(row, log_p, renormalize):
    """For each trained token the sum over its teacher's entries of q * log(q / p)."""
    values = []
    for t, log_p_V in zip(row["trained"], log_p, strict=True):
        ids, logq = row["teacher"][t]
        q = torch.tensor(logq, dtype=torch.float64).exp()
        q = q / q.sum() if renormalize and len(q) else q
        values.append((q * (q.log() - log_p_V[ids])).sum() if ids else log_p_V.sum() * 0)
    return torch.stack(values)


def trained_by_hand(case, model_name, reference, batches):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float64, attn_implementation="eager")
    for step, groups in enumerate(batches):
        start, updates = copy.deepcopy(model), CASES[case].get("updates_per_batch", 1)
        for part in (groups,) if updates == 1 else [[group] for group in groups]:
            model.zero_grad()
            surrogate(case, model, reference, [row for group in part for row in rows_of(group)], step, start).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= LEARNING_RATE * p.grad
    return dict(model.named_parameters())


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_objectives_and_terms_move_the_parameters_as_their_papers_say(num_ranks, tiny_model, tiny_untied_model, tmp_path, rng):
    from transformers import AutoModelForCausalLM

    load = dict(dtype=torch.float64, attn_implementation="eager")
    model, reference = (AutoModelForCausalLM.from_pretrained(m, **load) for m in (tiny_model, tiny_untied_model))
    batches = make_records(model, rng)
    data = write_groups(tmp_path / "data.jsonl", [group for groups in batches for group in groups])
    runs, start = {}, load_file(f"{tiny_model}/model.safetensors")
    for case, settings in CASES.items():
        for stage, micro_batch_tokens in [(3, 24), (2, 1000)][: {"ppo_clip": 2}.get(case, 1)]:
            ds = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, "gradient_clipping": "auto"}
            ds["optimizer"] = {"type": "SGD", "params": {"lr": "auto"}}
            out = tmp_path / f"{case}_{stage}_{micro_batch_tokens}"
            if case == "reference_model":
                settings = settings | {"ref_model_name": tiny_untied_model}
            runs[case, out] = settings | dict(
                model_name=tiny_model, data=data, deepspeed=ds, batch_size=BATCH_SIZE, micro_batch_tokens=micro_batch_tokens,
                learning_rate=LEARNING_RATE, max_grad_norm=0, device="cpu", output_dir=str(out), max_token_len=MAX_TOKEN_LEN,
                packing=stage == 3, skip_zero_weight=stage == 3, prefetch_batches=stage,
            )  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps([*runs.values()]))
    for code, output in run_ranks(["tests/train_many.py", tmp_path / "runs.json"], num_ranks, timeout=400):
        assert code == 0, output[-4000:]
    wanted = {case: trained_by_hand(case, tiny_model, reference, batches) for case in CASES}
    for case, out in runs:
        got = load_file(out / "final" / "model.safetensors")
        for name, value in wanted[case].items():
            error = ((got[name].double() - value).norm() / value.norm()).item()
            moved = ((value - start[name].double()).norm() / value.norm()).item()
            assert moved > 1e-5, f"{name} hardly moved under {case}: this would show nothing"
            assert error < 2e-6, f"{name}: {error} in {out.name}"
    clipped = [json.loads(line)["ratio/clipped"] for line in (tmp_path / "ppo_clip_3_24" / "metrics.jsonl").open()]
    assert all(0 < share < 1 and math.isfinite(share) for share in clipped)
