"""Objectives and the terms beside them, through the head, against autograd on the surrogates as their papers write them."""

import math

import pytest
import torch
from conftest import make_group
from torch.utils.flop_counter import FlopCounterMode

from wsft.advantages import Shaping, from_scores
from wsft.batching import AtroposBatchProcessor, token_terms
from wsft.loss_head import head_loss
from wsft.objectives import OBJECTIVES, Objective
from wsft.terms import Coefficients, TokenTerms

H, V, K = 6, 17, 3
LENGTHS = [1, 9, 14, 1, 6, 11]  # trained tokens of the sequences
N = sum(LENGTHS)
ARGS = {
    "importance_sampling": [{}, {"cap": 1.2}],
    "ppo_clip": [{"eps_low": 0.1, "eps_high": 0.3}, {"eps_low": 0.1, "eps_high": 0.3, "dual_clip": 1.5}],
    "cispo": [{"eps_low": 0.2, "eps_high": 0.3}],
    "gspo": [{"eps_low": 0.05, "eps_high": 0.08}],
}
CASES = [(name, args) for name in OBJECTIVES for args in ARGS.get(name, [{}])]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def surrogate(name, args, logp, behavior, A, sequences):
    """The sum over tokens of what the paper maximises, the ratio part of the graph. A token nobody sampled has ratio 1."""
    ratio = (logp - torch.where(behavior.isnan(), logp.detach(), behavior)).exp()
    low, high = 1 - args.get("eps_low", 0), 1 + args.get("eps_high", 0)
    if name == "weighted_sft":  # REINFORCE: A * log pi
        return (A * logp).sum()
    if name == "sft":
        return logp.sum()
    if name == "dft":  # sg(p) * log p
        return (logp.exp().detach() * logp).sum()
    if name == "importance_sampling":  # pi / mu * A; truncated: sg(min(ratio, cap)) * A * log pi
        return (ratio * A).sum() if not args else (ratio.detach().clamp(max=args["cap"]) * A * logp).sum()
    if name == "cispo":  # sg(clip(ratio)) * A * log pi
        return (ratio.clamp(low, high).detach() * A * logp).sum()
    if name == "ppo_clip":
        pessimist = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
        if "dual_clip" in args:
            pessimist = torch.where(A < 0, torch.maximum(pessimist, args["dual_clip"] * A), pessimist)
        return pessimist.sum()
    assert name == "gspo"
    total = 0.0
    for i in range(len(LENGTHS)):  # GSPO-token: s = sg(sequence ratio) * pi / sg(pi)
        own = sequences == i
        s = ratio[own].log().mean().exp().detach() * (logp[own] - logp[own].detach()).exp()
        total = total + torch.minimum(s * A[own], s.clamp(low, high) * A[own]).sum()
    return total


def make(dtype=torch.float64, seed=0, whole=False):
    """Inputs of the head, and the terms' tensors; `whole`: one advantage for a sequence."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sequences = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    hidden, lm_head, targets = random(N, H), random(V, H), torch.randint(V, (N,), generator=g)
    temperature = torch.tensor([0.7, 1.0, 1.3, 0.9, 2.0, 1.0], dtype=torch.float64)[sequences]
    logp = (hidden @ lm_head.T / temperature[:, None]).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    behavior = logp + 0.4 * random(N)
    behavior[torch.rand(N, generator=g) < 0.2] = math.nan
    A = random(len(LENGTHS))[sequences] if whole else random(N)
    A[4] = 0.0
    inputs = [x.to(dtype).requires_grad_() for x in (hidden, lm_head)]
    tensors = dict(scale_N=torch.rand(N, generator=g, dtype=torch.float64), advantages_N=A, behavior_logp_N=behavior)
    tensors |= dict(fixed_weights_N=torch.full((N,), math.nan), temperature_N=temperature)
    return inputs, targets, {k: x.to(dtype) for k, x in tensors.items()} | {"sequence_N": sequences}


def dense(inputs, targets, tensors):
    """log softmax [N, V], and of the targets [N]."""
    log_p = (inputs[0] @ inputs[1].T / tensors["temperature_N"][:, None]).log_softmax(-1)
    return log_p, log_p.gather(1, targets[:, None]).squeeze(1)


def assert_same_gradients(loss, expected, inputs, tolerance):
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name, args", CASES)
def test_the_gradient_is_that_of_the_papers_surrogate(name, args, whole, dtype):
    for seed in range(4):
        inputs, targets, tensors = make(dtype, seed, whole)
        scale = 0.37
        terms = TokenTerms(Objective(name, args), Coefficients(), **tensors | {"scale_N": torch.full((N,), scale, dtype=dtype)})
        out = head_loss(*inputs, targets, terms, chunk_tokens=5, **terms.head_options())
        _, logp = dense(inputs, targets, tensors)
        expected = -scale * surrogate(
            name, args, logp, *(tensors[k] for k in ("behavior_logp_N", "advantages_N", "sequence_N"))
        )
        assert_same_gradients(out.loss, expected, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("name, args", [case for case in CASES if case[1]])
def test_the_data_meets_every_branch(name, args):
    met = set()
    for seed in range(4):
        for whole in (False, True):
            inputs, targets, tensors = make(seed=seed, whole=whole)
            terms = TokenTerms(Objective(name, args), Coefficients(), **tensors)
            _, clipped = terms.weigh(dense(inputs, targets, tensors)[1].detach())
            A, known = tensors["advantages_N"], ~tensors["behavior_logp_N"].isnan()
            met |= {(bool(c), bool(a > 0), bool(k)) for c, a, k in zip(clipped, A, known, strict=True)}
    assert {(True, True, True), (False, True, True), (False, False, True), (False, True, False), (False, False, False)} <= met
    assert (True, False, True) in met  # negative advantages are clipped, too


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["weighted_sft", "gspo"])
def test_kl_entropy_and_teacher_are_terms_of_the_same_sum(name, dtype):
    inputs, targets, tensors = make(dtype)
    g = torch.Generator().manual_seed(7)
    ref = dense(inputs, targets, tensors)[1].detach() + 0.3 * torch.randn(N, generator=g).to(dtype)
    ref[::5] = math.nan
    ids = torch.randint(V, (N, K), generator=g)
    ids[3] = ids[3, 0]  # one id three times
    q = torch.rand(N, K, generator=g).to(dtype) / K
    q[::4, 1:], q[::6] = 0, 0  # fewer entries, and none
    tensors |= dict(ref_logp_N=ref, teacher_ids_NK=ids, teacher_probs_NK=q)
    terms = TokenTerms(Objective(name), Coefficients(kl=0.3, entropy=0.2, distill=0.7), **tensors)
    out = head_loss(*inputs, targets, terms, chunk_tokens=7, **terms.head_options())

    log_p, logp = dense(inputs, targets, tensors)
    k3 = torch.where(ref.isnan(), 0, (ref.nan_to_num() - logp).exp() - 1 - (ref.nan_to_num() - logp))
    entropy = -(log_p.exp() * log_p).sum(-1)
    kl = sum(torch.xlogy(q[:, k], q[:, k]) - q[:, k] * log_p.gather(1, ids[:, k : k + 1]).squeeze(1) for k in range(K))
    weights, _ = terms.weigh(logp.detach())
    expected = (tensors["scale_N"] * (-weights * logp + 0.3 * k3 - 0.2 * entropy + 0.7 * kl)).sum()
    torch.testing.assert_close(out.loss, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(out.divergence_N, kl, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_same_gradients(out.loss, expected, inputs, TOLERANCE[dtype])
    sums, _ = terms.sums(out)
    found = torch.stack([sums["kl_reference"], sums["divergence"], sums["reference"], sums["teacher"]])
    wanted = torch.stack([k3.sum(), kl.sum(), (~ref.isnan()).sum(), (q.sum(1) > 0).sum()]).detach().double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, args", CASES)
def test_what_a_record_fixes_is_the_weight_under_every_objective(name, args):
    inputs, targets, tensors = make()
    tensors["fixed_weights_N"][10:20], tensors["fixed_weights_N"][20:30] = 0.0, 1.0
    weights, clipped = TokenTerms(Objective(name, args), Coefficients(), **tensors).weigh(
        dense(inputs, targets, tensors)[1].detach()
    )
    assert (weights[10:20] == 0).all() and (weights[20:30] == 1).all() and not clipped[10:30].any()


@pytest.mark.parametrize("name, products", [("weighted_sft", 3), ("ppo_clip", 3), ("gspo", 4)])
def test_a_sequence_level_objective_costs_one_product_more(name, products):
    inputs, targets, tensors = make(torch.bfloat16)  # in float32 torch does not count addmm_
    terms = TokenTerms(Objective(name), Coefficients(), **tensors)
    with FlopCounterMode(display=False) as counter:
        head_loss(*inputs, targets, terms, chunk_tokens=8, **terms.head_options()).loss.backward()
    assert counter.get_total_flops() == products * 2 * N * H * V


@pytest.mark.parametrize("name, args", CASES)
@pytest.mark.parametrize("gap", [-1e30, -1000.0, 1000.0])
def test_an_absurd_logp_gives_a_finite_weight(name, args, gap):
    logp = torch.full((4,), -2.0)
    weights, _ = Objective(name, args)(logp, logp + gap, torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([0, 0, 1, 2]))
    assert weights.isfinite().all()


def test_the_sums_are_those_of_the_tokens_one_by_one():
    inputs, targets, tensors = make()
    terms = TokenTerms(Objective("ppo_clip", ARGS["ppo_clip"][0]), Coefficients(), **tensors)
    out = head_loss(*inputs, targets, terms, **terms.head_options())
    sums, maxima = terms.sums(out)
    wanted = dict.fromkeys(
        ("ratio", "clipped", "k1", "k3", "behavior", "weight", "weight_abs", "logp_positive", "negative"), 0.0
    )
    highest = 0.0
    for logp, mu, a in zip(
        out.logp_N.tolist(), tensors["behavior_logp_N"].tolist(), tensors["advantages_N"].tolist(), strict=True
    ):
        r = 1.0 if math.isnan(mu) else math.exp(logp - mu)
        clipped = (a > 0 and r > 1.3) or (a < 0 and r < 0.9)
        weight = 0.0 if clipped else a * r
        wanted["weight"], wanted["weight_abs"] = wanted["weight"] + weight, wanted["weight_abs"] + abs(weight)
        wanted["logp_positive"], wanted["negative"] = wanted["logp_positive"] + (a > 0) * logp, wanted["negative"] + (a < 0)
        if not math.isnan(mu):
            highest = max(highest, r)
            found = {"ratio": r, "clipped": clipped, "k1": mu - logp, "k3": r - 1 - (logp - mu), "behavior": 1}
            wanted |= {name: wanted[name] + value for name, value in found.items()}
    assert {name: float(sums[name]) for name in wanted} == pytest.approx(wanted) and float(maxima["ratio"]) == pytest.approx(
        highest
    )


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "constant", "sum"])
def test_reductions_are_their_definitions_and_do_not_depend_on_the_split(reduction, rng):
    masked = make_group(rng, [5], masks=[[-100] * 5])
    processor = AtroposBatchProcessor()
    batch = processor.process_atropos_batch([make_group(rng, [9, 5]), masked, make_group(rng, [12, 4])])
    scales = batch.scales(reduction, max_token_len=20)
    losses = [rng.normal(size=n) for n in batch.trained_tokens]
    real = [loss for loss in losses if len(loss)]
    wanted = {
        "mean": sum(loss.sum() for loss in real) / sum(map(len, real)),
        "sequence_mean": sum(loss.mean() for loss in real) / 4,
        "constant": sum(loss.sum() for loss in real) / 20 / 4,
        "sum": sum(loss.sum() for loss in real),
    }[reduction]
    for split in ([[0, 1, 2, 3, 4]], [[3], [0, 4], [2, 1]]):
        total = 0.0
        for rows in split:
            terms = token_terms(batch, rows, scales, Objective("weighted_sft"), Coefficients(), 1.0)
            total += float(terms.scale_N.double() @ torch.cat([torch.from_numpy(losses[i]) for i in rows]))
        assert total == pytest.approx(wanted, rel=1e-6)


def test_an_objective_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_of_test_terms.py").write_text(
        "def half(logp_N, behavior_logp_N, advantages_N, *, factor: float = 0.5):\n    return factor * advantages_N\n"
        "def told(logp_N, behavior_logp_N, advantages_N, sequence_N):\n    return sequence_N.to(logp_N.dtype), logp_N < -1\n"
        "def wrong(logp_N, behavior_logp_N, advantages_N):\n    return advantages_N[:1]\n"
        "def strange(logp_N, rewards):\n    return rewards\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    logp, A, sequence = torch.tensor([-0.5, -2.0]), torch.tensor([1.0, -3.0]), torch.tensor([0, 1])
    module = "mine_of_test_terms"
    half, told = Objective(f"{module}:half", {"factor": "2"}), Objective(f"{module}:told")
    assert half(logp, logp, A, sequence)[0].tolist() == [2.0, -6.0] and not half.of_sequences and half.needs_behavior
    assert [x.tolist() for x in told(logp, logp, A, sequence)] == [[0.0, 1.0], [False, True]] and told.of_sequences
    with pytest.raises(ValueError, match=r"gave weights \[1\]; expected \[2\]"):
        Objective(f"{module}:wrong")(logp, logp, A, sequence)
    for name, says in {"strange": r"takes \(logp_N, rewards\); expected", "number": "is a int, expected a function"}.items():
        with pytest.raises(ValueError, match=says):
            Objective(f"{module}:{name}")


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("ppo_clp", {}, "unknown objective 'ppo_clp': did you mean ppo_clip"),
        ("no_such_module:f", {}, "cannot be imported: No module named 'no_such_module'"),
        ("math:nothing", {}, "cannot be imported"),
        (
            "ppo_clip",
            {"eps": 1},
            "eps of objective ppo_clip is not one of its arguments; it takes eps_low, eps_high, dual_clip",
        ),
        ("ppo_clip", {"eps_low": 1.5}, "eps_low of objective ppo_clip is 1.5"),
        ("ppo_clip", {"eps_low": "much"}, "eps_low of objective ppo_clip is 'much'"),
        ("ppo_clip", {"dual_clip": 1.0}, "dual_clip of objective ppo_clip is 1.0"),
        ("importance_sampling", {"cap": 0}, "cap of objective importance_sampling is 0"),
        ("weighted_sft", {"cap": 2}, "cap of objective weighted_sft is not one of its arguments; it takes none"),
    ],
)
def test_a_wrong_objective_or_argument_is_a_sentence(name, args, says):
    with pytest.raises(ValueError, match=says):
        Objective(name, args)


def test_scores_become_advantages_as_their_papers_say(rng):
    scores, counted = rng.normal(size=6), torch.tensor([1, 1, 0, 1, 1, 1]).bool().numpy()
    others = [(scores[counted].sum() - s) / 4 for s in scores]
    wanted = {
        "group_norm": (scores - scores[counted].mean()) / scores[counted].std(),
        "group_center": scores - scores[counted].mean(),
        "rloo": scores - others,
        "raw": scores,
    }
    for method, advantages in wanted.items():
        assert from_scores(scores, counted, method)[counted] == pytest.approx(advantages[counted]), method


def test_advantages_are_normalised_then_clipped_then_scaled_by_sign(rng):
    advantages, counted = rng.normal(1.0, 2.0, 50), rng.random(50) < 0.8
    centred = advantages - advantages[counted].mean()
    normal = centred / centred[counted].std()
    cut = normal.clip(-1.5, 1.5)
    assert Shaping("batch_center").apply(advantages, counted) == pytest.approx(centred)
    assert Shaping("batch", clip=1.5, negative_scale=0.25).apply(advantages, counted) == pytest.approx(
        [a if a > 0 else 0.25 * a for a in cut]
    )
