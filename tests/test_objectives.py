"""Objectives, reductions and other terms, through the head, against the losses of the papers (surrogates.py)."""

import math
import sys
from typing import NamedTuple

import numpy as np
import pytest
import surrogates as papers
import torch
from conftest import VOCAB, make_group
from surrogates import CASES, Case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wsft.loss import head as loss_head
from wsft.loss.advantages import FROM_SCORES, Override, Shaping, from_scores
from wsft.loss.corrections import NO_CORRECTIONS
from wsft.loss.head import head_loss
from wsft.loss.objectives import OBJECTIVES, Objective
from wsft.loss.terms import Coefficients, LossSettings, TokenTerms
from wsft.rollouts.batch import AtroposBatchProcessor, Batch, token_terms

H, V, K = 6, 17, 4
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
SEEDS = range(3)
LENGTHS = [1, 9, 1, 14, 6, 1, 11, 5, 20, 1, 3, 8, 2, 7, 1, 12]  # trained tokens of the sequences
N = sum(LENGTHS)


class Data(NamedTuple):
    """Random tokens of sequences, in float64: what the head is given, and what the terms are made of."""

    hidden: torch.Tensor
    lm_head: torch.Tensor
    targets: torch.Tensor
    tensors: dict

    def leaves(self, dtype=torch.float64):
        return [x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.lm_head)]

    def terms(self, case, coefficients=None, dtype=torch.float64, **more):
        inputs = (self.tensors | more).items()
        inputs = {k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs}
        return TokenTerms(Objective(case.objective, case.args), coefficients or Coefficients(), **inputs)

    def log_softmax(self, hidden, lm_head):
        """Of all [N, V], and of the targets [N]."""
        log_p = (hidden @ lm_head.T / self.tensors["temperature_N"][:, None]).log_softmax(-1)
        return log_p, log_p.gather(1, self.targets[:, None]).squeeze(1)

    def logp(self):
        return self.log_softmax(self.hidden, self.lm_head)[1]

    def maximised(self, case, logp):
        """The surrogate, token by token [N]."""
        rows = (logp, self.tensors["behavior_logp_N"], self.tensors["advantages_N"])
        return torch.cat([case.maximised(*row) for row in zip(*(x.split(LENGTHS) for x in rows), strict=True)])


def make(seed=0, per_sequence=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(n):
        return torch.rand(n, generator=g, dtype=torch.float64)

    S, sequence = len(LENGTHS), torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    tensors = dict(sequence_N=sequence, temperature_N=(0.5 + 1.5 * uniform(S))[sequence], scale_N=(0.2 + uniform(S))[sequence])
    data = Data(normal(N, H), normal(V, H), torch.randint(V, (N,), generator=g), tensors)
    far = 0.3 * normal(N) * torch.where(uniform(N) < 0.15, 7, 1) + 0.25 * normal(S)[sequence]
    unknown = (uniform(N) < 0.15) | (sequence == 4)  # placeholders; one sequence of nothing else
    advantages = normal(S)[sequence] if per_sequence else normal(N)
    tensors |= dict(
        behavior_logp_N=(data.logp() + far).clamp(max=-1e-3).masked_fill(unknown, math.nan),
        advantages_N=advantages.masked_fill(sequence == 3, 0.0),
        fixed_weights_N=torch.full((N,), math.nan),
    )
    return data


def make_beside(data, seed=0):
    """A reference and a teacher for the data: the terms' tensors, and the teacher's (id, logq) of each token."""
    rng = np.random.default_rng(seed)
    ref = data.logp() + 0.4 * torch.from_numpy(rng.normal(size=N))
    ref[torch.from_numpy(rng.random(N) < 0.2)] = math.nan
    entries = [[(int(rng.integers(V)), -rng.uniform(1.4, 4)) for _ in range(rng.integers(0, K + 1))] for _ in range(N)]
    entries[5] = [(3, -1.5), (3, -1.7), (2, -3.0)]  # one id twice
    entries[6] = [(int(data.targets[6]), -1.5)]  # the target itself
    ids, probs = torch.zeros(N, K, dtype=torch.int64), torch.zeros(N, K, dtype=torch.float64)
    for n, k, (token, logq) in ((n, k, entry) for n, row in enumerate(entries) for k, entry in enumerate(row)):
        ids[n, k], probs[n, k] = token, math.exp(logq)
    return dict(ref_logp_N=ref, teacher_ids_NK=ids, teacher_probs_NK=probs), entries


def through_the_head(data, terms, dtype=torch.float64, chunk_tokens=37):
    """The head's output, and the gradients of hidden states and lm_head."""
    leaves = data.leaves(dtype)
    out = head_loss(*leaves, data.targets, terms, chunk_tokens=chunk_tokens, **terms.head_options())
    return out, torch.autograd.grad(out.loss, leaves)


def assert_close(ours, theirs, tolerance):
    for x, y in zip(ours, theirs, strict=True):
        assert y.norm() > 0 and (x.double() - y).norm() <= tolerance * y.norm()


# -- objectives ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_surrogate_as_its_paper_writes_it(name, dtype):
    case = CASES[name]
    for seed in SEEDS:
        data = make(seed, case.per_sequence)
        out, found = through_the_head(data, data.terms(case, dtype=dtype), dtype)
        leaves = data.leaves()
        loss = -(data.tensors["scale_N"] * data.maximised(case, data.log_softmax(*leaves)[1])).sum()
        assert out.loss.dtype == found[0].dtype == found[1].dtype == dtype
        assert_close(found, torch.autograd.grad(loss, leaves), TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_the_weight_is_the_surrogates_derivative_and_the_loss_weight_times_nll(name):
    case = CASES[name]
    for seed in SEEDS:
        data = make(seed, case.per_sequence)
        terms, logp = data.terms(case), data.logp().requires_grad_()
        (derivative,) = torch.autograd.grad(data.maximised(case, logp).sum(), logp)
        weights, _ = terms.weigh(logp)
        torch.testing.assert_close(weights, derivative, rtol=1e-9, atol=1e-12)
        assert not weights.requires_grad
        out, _ = through_the_head(data, terms)
        torch.testing.assert_close(out.loss, (data.tensors["scale_N"] * derivative * -logp).sum())


def branches(case, data):
    """For each token (sign of its advantage, where its ratio lies), and whether it is to count as clipped."""
    low, high, dual = case.clips
    r = papers.ratio(data.logp(), data.tensors["behavior_logp_N"])
    if case.objective == "gspo":
        r = torch.cat([x.log().mean().exp().expand(len(x)) for x in r.split(LENGTHS)])
    where = ["below" if x < low else "between" if x <= high else "above" if x <= dual else "far above" for x in r.tolist()]
    met = list(zip(data.tensors["advantages_N"].sign().int().tolist(), where, strict=True))
    if case.objective in ("importance_sampling", "cispo"):
        return met, [side != "between" for side in where]
    clipped = {(1, "above"), (1, "far above"), (-1, "below"), (-1, "far above")}
    return met, [branch in clipped for branch in met]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.clips[1] < math.inf])
def test_the_data_cover_every_branch_and_clipped_tokens_are_counted(name):
    case, met = CASES[name], set()
    for seed in SEEDS:
        data = make(seed, case.per_sequence)
        more, wanted = branches(case, data)
        _, clipped = data.terms(case).weigh(data.logp())
        assert clipped.tolist() == wanted
        met |= set(more)
        unknown = data.tensors["behavior_logp_N"].isnan()
        assert set(data.tensors["advantages_N"][unknown].sign().tolist()) == {-1, 0, 1}
        shares = {(len(x), float(x.double().mean())) for x in unknown.split(LENGTHS)}  # of each sequence, what is unknown
        assert {(1, 0.0), (6, 1.0)} <= shares and any(0 < share < 1 for _, share in shares)
    sides = [
        "between",
        "above",
        *(["below"] if case.clips[0] > 0 else []),
        *(["far above"] if case.clips[2] < math.inf else []),
    ]
    assert met >= {(sign, side) for sign in (-1, 1) for side in sides} and 0 in {sign for sign, _ in met}


@pytest.mark.parametrize("name", papers.MASKS)
def test_masked_tokens_are_counted_as_clipped_and_occur_for_each_sign(name):
    met = set()
    for seed in SEEDS:
        data = make(seed)
        rows = [data.logp(), *(data.tensors[x] for x in ("behavior_logp_N", "advantages_N"))]
        wanted = torch.cat([papers.MASKS[name](*row) for row in zip(*(x.split(LENGTHS) for x in rows), strict=True)])
        _, clipped = data.terms(CASES[name]).weigh(data.logp())
        assert clipped.tolist() == wanted.tolist()
        met |= set(zip(data.tensors["advantages_N"].sign().int().tolist(), wanted.tolist(), strict=True))
    assert met >= {(sign, masked) for sign in (-1, 1) for masked in (True, False)} | {(0, False)}


@pytest.mark.parametrize("name", CASES)
def test_what_a_record_fixes_is_the_weight_under_every_objective_and_kl_still_counts(name):
    case = CASES[name]
    data = make(1, case.per_sequence)
    zero, one = (torch.isin(data.tensors["sequence_N"], torch.tensor(which)) for which in ([1, 4], [8, 9]))
    ref = make_beside(data)[0]["ref_logp_N"]
    fixed = data.tensors["fixed_weights_N"].masked_fill(zero, 0.0).masked_fill(one, 1.0)
    terms, leaves = data.terms(case, Coefficients(kl=0.3), fixed_weights_N=fixed, ref_logp_N=ref), data.leaves()
    _, logp = data.log_softmax(*leaves)
    maximised = data.maximised(case, logp).where(~zero, 0).where(~one, logp)
    loss = (data.tensors["scale_N"] * (0.3 * papers.k3(logp, ref) - maximised)).sum()
    _, found = through_the_head(data, terms)
    assert_close(found, torch.autograd.grad(loss, leaves), 1e-6)
    weights, clipped = terms.weigh(logp.detach())
    assert (weights[zero] == 0).all() and (weights[one] == 1).all() and not clipped[zero | one].any()


@pytest.mark.parametrize("gap", [-math.inf, -1e30, -1000.0, 1000.0, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_an_absurd_logp_of_the_sampler_gives_a_finite_weight(name, gap):
    case, logp = CASES[name], torch.tensor([-2.0, -0.1, -40.0, -1e4])
    more = [torch.tensor([0, 0, 1, 2])] if Objective(case.objective).of_sequences else []
    found = OBJECTIVES[case.objective](logp, logp + gap, torch.tensor([1.0, -1.0, 0.0, 2.0]), *more, **case.args)
    weights = found[0] if isinstance(found, tuple) else found
    assert weights.shape == (4,) and weights.isfinite().all() and weights.abs().max() <= 2 * math.exp(20.001)
    data = make()
    data.tensors["behavior_logp_N"][::3] = gap
    out, gradients = through_the_head(data, data.terms(case, dtype=torch.float32), torch.float32)
    assert all(x.isfinite().all() for x in (out.loss, *gradients))


class LargestTensor(TorchDispatchMode):
    """The entries of the largest tensor that any operation gave."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        self.entries = max(self.entries, *(x.numel() for x in found if isinstance(x, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tokens_cost_three_products_sequences_four_and_no_tensor_holds_all_logits(name, monkeypatch):
    monkeypatch.setattr(loss_head, "has_native_matmul", lambda *_: True)
    data = make()
    terms = data.terms(Case(name, {}), Coefficients(0.1, 0.1, 0.1), torch.float32, **make_beside(data)[0])
    leaves = data.leaves(torch.bfloat16)  # in float32 torch does not count addmm_
    with FlopCounterMode(display=False) as counter, LargestTensor() as largest:
        head_loss(*leaves, data.targets, terms, chunk_tokens=48, **terms.head_options()).loss.backward()
    assert counter.get_total_flops() == (4 if terms.of_sequences else 3) * 2 * N * H * V
    assert 0 < largest.entries <= (48 + 1) * V < N * V


# -- the terms beside the objective ----------------------------------------------------------------------------------------


def test_kl_is_k3_to_the_reference_and_0_where_there_is_none():
    logp, ref = torch.tensor([[-1.0, -2.0, -3.0, -0.5], [-1.5, math.nan, -2.0, -0.5]], dtype=torch.float64)
    one, none, sequence = torch.ones(4), torch.full((4,), math.nan), torch.zeros(4).long()
    terms = TokenTerms(Objective("weighted_sft"), Coefficients(kl=2.0), one, 0 * one, none, none, one, sequence, ref)
    loss, minus_slope = terms(logp, slice(None))
    assert loss.tolist() == pytest.approx([2 * (math.exp(-0.5) - 1 + 0.5), 0, 2 * (math.e - 1 - 1), 0])
    assert minus_slope.tolist() == pytest.approx([2 * (math.exp(-0.5) - 1), 0, 2 * (math.e - 1), 0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["weighted_sft", "dual_clip", "gspo_wide", "gspo_token"])
def test_all_terms_together_have_their_values_and_gradients(name, dtype):
    case, tolerance = CASES[name], TOLERANCE[dtype]
    data = make(2, case.per_sequence)
    tensors, entries = make_beside(data)
    assert {len(row) for row in entries} == {0, 1, 2, 3, 4}
    terms = data.terms(case, Coefficients(kl=0.3, entropy=0.2, distill=0.7), dtype, **tensors)
    out, found = through_the_head(data, terms, dtype)

    leaves, scale = data.leaves(), data.tensors["scale_N"]
    log_p, logp = data.log_softmax(*leaves)
    entropy, divergence = papers.entropy(log_p), papers.forward_kl(log_p, entries, renormalize=False)
    beside = 0.3 * papers.k3(logp, tensors["ref_logp_N"]) - 0.2 * entropy + 0.7 * divergence
    maximised = data.maximised(case, logp)
    (weights,) = torch.autograd.grad(maximised.sum(), logp, retain_graph=True)
    assert_close(out, [(scale * (beside - weights * logp)).sum(), logp, entropy, divergence], tolerance)
    assert_close(found, torch.autograd.grad((scale * (beside - maximised)).sum(), leaves), tolerance)


# -- from records, reduced, in micro-batches -------------------------------------------------------------------------------

MAX_TOKEN_LEN, RUN_TEMPERATURE = 30, 1.4
SPLITS = [[*range(9)]], [[8, 3, 1], [], [5], [0, 2, 4, 6, 7]], [[i] for i in (4, 7, 0, 3, 8, 5, 1, 6, 2)]


def make_records(rng, per_sequence=False):
    """Three groups with all that a record may say and may leave out; the sixth of their nine sequences trains nothing."""
    groups = [make_group(rng, lengths) for lengths in ([3, 25, 9], [7, 3, 5, 16], [12, 6])]
    for group in groups:
        tokens = group["tokens"]
        if per_sequence:
            group["advantages"] = [[a] for a in rng.normal(0, 1, len(tokens)).round(3).tolist()]
        for name in ("inference_logprobs", "ref_logprobs"):
            group[name] = [np.where(rng.random(len(x)) < 0.2, 1.0, rng.normal(-4.7, 0.4, len(x))).tolist() for x in tokens]
        group["distill_token_ids"] = [[rng.integers(0, VOCAB, rng.integers(0, 4)).tolist() for _ in x] for x in tokens]
        group["distill_logprobs"] = [[rng.uniform(-4, -1.2, len(y)).tolist() for y in x] for x in group["distill_token_ids"]]
        group["overrides"] = [{} for _ in tokens]
    groups[0]["masks"][1][6:11] = [-100] * 5  # a turn of somebody else
    groups[0]["generation_params"] = {"temperature": 0.7}
    groups[1]["overrides"] = [{"set_advantage_to_zero": True}, {"sft": True}, {}, {"temperature": 0.9}]
    groups[1]["masks"][2] = [-100] * 5
    groups[1]["inference_logprobs"][3] = None
    groups[0]["advantages"][2][-4:] = [0.0] * len(groups[0]["advantages"][2][-4:])
    groups[2] |= dict.fromkeys(["ref_logprobs", "distill_token_ids", "distill_logprobs"])
    return groups


def make_policy(batch, rng):
    """Hidden states of the trained tokens and lm_head, for logps about those of the records."""
    return [torch.from_numpy(rng.normal(0, std, (n, H))) for std, n in ((0.3, batch.num_trained), (1.0, VOCAB))]


def gradients_in(micro_batches, batch, scales, case, coefficients, hidden, lm_head):
    """Of the sum over micro-batches of their rollouts, as the trainer runs them."""
    leaves, total = [x.clone().requires_grad_() for x in (hidden, lm_head)], 0.0
    rollout = torch.from_numpy(np.repeat(np.arange(len(batch.lengths)), batch.trained_tokens))  # of each trained token
    targets = torch.from_numpy(batch.tokens[batch.loss_mask])
    for rows in micro_batches:
        at = torch.cat([torch.zeros(0).long(), *((rollout == i).nonzero().squeeze(1) for i in rows)])
        terms = token_terms(
            batch, rows, scales, LossSettings(Objective(case.objective, case.args), coefficients, RUN_TEMPERATURE)
        )
        total += head_loss(leaves[0][at], leaves[1], targets[at], terms, chunk_tokens=16, **terms.head_options()).loss
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("reduction", papers.REDUCTIONS)
@pytest.mark.parametrize("name", CASES)
def test_records_in_any_micro_batches_give_the_gradient_of_the_reduced_surrogates(name, reduction, rng):
    case, groups = CASES[name], make_records(rng, CASES[name].per_sequence)
    coefficients = Coefficients(kl=0.3, entropy=0.1, distill=0.6, renormalize=reduction in ("mean", "constant"))
    batch = AtroposBatchProcessor(reads_reference=True, reads_teacher=True).process_atropos_batch(groups)
    assert not batch.rejected and batch.trained_tokens[5] == 0 and 1 in batch.trained_tokens
    scales, (hidden, lm_head) = batch.scales(reduction, MAX_TOKEN_LEN), make_policy(batch, rng)
    leaves = [x.clone().requires_grad_() for x in (hidden, lm_head)]
    losses = papers.losses_of_records(groups, *leaves, case, coefficients, RUN_TEMPERATURE)
    wanted = torch.autograd.grad(papers.REDUCTIONS[reduction](losses, MAX_TOKEN_LEN), leaves)
    for split in SPLITS:
        assert_close(gradients_in(split, batch, scales, case, coefficients, hidden, lm_head), wanted, 1e-6)
    single = gradients_in(SPLITS[1], batch, scales, case, coefficients, hidden.float(), lm_head.float())
    assert_close(single, wanted, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_what_surely_weighs_nothing_can_be_left_out(name, rng):
    case, objective = CASES[name], Objective(CASES[name].objective, CASES[name].args)
    batch = AtroposBatchProcessor().process_atropos_batch(make_records(rng, case.per_sequence))
    scales, (hidden, lm_head) = batch.scales("sequence_mean", MAX_TOKEN_LEN), make_policy(batch, rng)
    wanted = gradients_in(SPLITS[1], batch, scales, case, Coefficients(), hidden, lm_head)
    fewer = batch.of_weight(objective, NO_CORRECTIONS, None)
    kept = torch.from_numpy(fewer.loss_mask[batch.loss_mask])
    found = gradients_in(SPLITS[1], fewer, scales, case, Coefficients(), hidden[kept], lm_head)
    assert_close(found, (wanted[0][kept], wanted[1]), 1e-12)
    assert 0 < int(kept.sum()) < len(kept) and not wanted[0][~kept].any()


@pytest.mark.parametrize("reduction", papers.REDUCTIONS)
def test_reductions_are_their_plain_definitions(reduction, rng):
    batch = AtroposBatchProcessor().process_atropos_batch(make_records(rng))
    losses = [torch.from_numpy(rng.normal(size=n)) for n in batch.trained_tokens]
    wanted = papers.REDUCTIONS[reduction]([x for x in losses if len(x)], MAX_TOKEN_LEN)
    found = sum(float(s) * x.sum() for s, x in zip(batch.scales(reduction, MAX_TOKEN_LEN), losses, strict=True))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert np.isfinite(Batch.empty().scales(reduction, MAX_TOKEN_LEN)).all()


@pytest.mark.parametrize("reduction", papers.REDUCTIONS)
def test_sequences_that_were_cut_off_leave_the_denominator(reduction, rng):
    batch = AtroposBatchProcessor().process_atropos_batch(make_records(rng))
    overrides = batch.overrides.copy()
    overrides[[1, 8]] = Override.CUT_OFF
    cut = batch.__class__(**vars(batch) | {"overrides": overrides})
    losses = [torch.from_numpy(rng.normal(size=n)) for n in batch.trained_tokens]
    kept = [x for i, x in enumerate(losses) if len(x) and i not in (1, 8)]
    found = sum(float(s) * x.sum() for s, x in zip(cut.scales(reduction, MAX_TOKEN_LEN), losses, strict=True))
    torch.testing.assert_close(found, papers.REDUCTIONS[reduction](kept, MAX_TOKEN_LEN), rtol=1e-12, atol=1e-12)
    fewer = cut.of_weight(Objective("sft"), NO_CORRECTIONS, None)
    assert fewer.trained_tokens[[1, 8]].tolist() == [0, 0] and fewer.trained_tokens.any()
    terms = token_terms(cut, [1, 0], cut.scales(reduction, 9), LossSettings(Objective("sft")))
    assert set(terms.fixed_weights_N[: cut.trained_tokens[1]].tolist()) == {0.0}


# -- sums over tokens -----------------------------------------------------------------------------------------------------


def numbers_by_hand(data, fixed, ref, entries, low, high):
    """What `TokenTerms.sums` is to say under PPO, from one token after the other."""
    columns = [data.tensors[k] for k in ("behavior_logp_N", "advantages_N", "temperature_N")]
    columns = [x.numpy() for x in (data.hidden @ data.lm_head.T, data.targets, *columns, fixed, ref)]
    rows = []
    for z, target, mu, A, temperature, weight, ref_logp, teacher in zip(*columns, entries, strict=True):
        log_p = z / temperature - np.log(np.exp(z / temperature).sum())
        logp, known, free, to_ref = log_p[target], not np.isnan(mu), np.isnan(weight), not np.isnan(ref_logp)
        r = np.exp(logp - mu) if known else 1.0
        clipped = free and ((A > 0 and r > high) or (A < 0 and r < low))
        weight = (0 if clipped else r * A) if free else weight
        row = dict(tokens=1, entropy=-(np.exp(log_p) * log_p).sum(), weight=weight, weight_abs=abs(weight))
        row |= dict(positive=A > 0, logp_positive=logp * (A > 0), negative=A < 0, logp_negative=logp * (A < 0))
        row |= dict(
            behavior=known,
            ratio=r * known,
            ratio_squared=r**2 * known,
            clipped=clipped and known,
            k1=-np.log(r),
            k3=r - 1 - np.log(r),
        )
        row |= dict(reference=to_ref, kl_reference=np.exp(ref_logp - logp) - 1 - (ref_logp - logp) if to_ref else 0)
        row |= dict(teacher=len(teacher) > 0, divergence=sum(np.exp(logq) * (logq - log_p[k]) for k, logq in teacher))
        rows.append(row)
    return {name: sum(float(row[name]) for row in rows) for name in rows[0]}, max(row["ratio"] for row in rows)


@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_sums_are_those_of_the_tokens_one_by_one(chunk_tokens):
    data = make()
    tensors, entries = make_beside(data)
    fixed = data.tensors["fixed_weights_N"].clone()
    fixed[10:20], fixed[40:55] = 0.0, 1.0
    terms = data.terms(CASES["clip_higher"], Coefficients(kl=0.1, distill=0.1), fixed_weights_N=fixed, **tensors)
    sums, maxima = terms.sums(through_the_head(data, terms, chunk_tokens=chunk_tokens)[0])
    wanted, highest = numbers_by_hand(data, fixed, tensors["ref_logp_N"], entries, 0.9, 1.3)
    assert {name: float(x) for name, x in sums.items()} == pytest.approx(wanted)
    assert {name: float(x) for name, x in maxima.items()} == pytest.approx({"ratio": highest})
    assert 0 < wanted["clipped"] < wanted["behavior"] < N and wanted["weight"] < wanted["weight_abs"]
    assert all(x.dtype == torch.float64 and x.shape == () for x in (*sums.values(), *maxima.values()))


def test_a_cap_below_1_counts_no_token_as_clipped_that_nobody_sampled():
    data = make()
    terms = data.terms(Case("importance_sampling", {"cap": 0.5}))
    out, _ = through_the_head(data, terms)
    behavior = data.tensors["behavior_logp_N"]
    above = papers.ratio(out.logp_N, behavior) > 0.5
    assert float(terms.sums(out)[0]["clipped"]) == int((above & ~behavior.isnan()).sum()) < int(above.sum())


def test_sums_of_no_tokens_are_0_and_absent_terms_have_no_metrics():
    empty, none = torch.zeros(0), torch.zeros(0).long()
    for name in OBJECTIVES:
        terms = TokenTerms(Objective(name), Coefficients(), empty, empty, empty, empty, empty, none)
        out = head_loss(torch.zeros(0, H), torch.zeros(V, H), none, terms, **terms.head_options())
        sums, maxima = terms.sums(out)
        assert not {"reference", "kl_reference", "teacher", "divergence"} & sums.keys()
        assert not any(map(float, (*sums.values(), *maxima.values())))


@pytest.mark.parametrize("name", CASES)
def test_weights_that_do_not_depend_on_logp_are_known_beforehand(name):
    case = CASES[name]
    data = make(3, case.per_sequence)
    for coefficients in (Coefficients(entropy=0.2), Coefficients(kl=0.1)):
        terms = data.terms(case, coefficients, ref_logp_N=data.logp().detach() - 1)
        (_, low), (_, high) = (terms(data.logp().detach() - shift, slice(None)) for shift in (0.0, 0.7))
        assert (terms.weights_N is not None) == (torch.equal(low, high) and not coefficients.kl)
        assert terms.weights_N is None or torch.equal(terms.weights_N, low)


# -- an objective of one's own, and wrong ones -----------------------------------------------------------------------------

MINE = """
import torch

number = 3

def reinforce(logp_N, behavior_logp_N, advantages_N):
    return advantages_N

def scaled(logp_N, behavior_logp_N, advantages_N, *, factor: float = 0.5, anything=None):
    return factor * advantages_N * logp_N / logp_N.detach(), behavior_logp_N == logp_N

def mine_gspo(logp_N, behavior_logp_N, advantages_N, sequence_N, *, eps: float):
    s = torch.stack([(logp_N - behavior_logp_N)[sequence_N == i].mean().exp() for i in sequence_N.unique()])[sequence_N]
    clipped = advantages_N.sign() * (s - 1) > eps
    return torch.where(clipped, 0, advantages_N * s), clipped

def too_few(logp_N, behavior_logp_N, advantages_N):
    return advantages_N[:1]

def square(logp_N, behavior_logp_N, advantages_N):
    return advantages_N[:, None] * advantages_N

def two(logp_N, advantages_N):
    return advantages_N

def positional(logp_N, behavior_logp_N, advantages_N, factor=0.5):
    return advantages_N

def open_ended(logp_N, behavior_logp_N, advantages_N, **more):
    return advantages_N
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a module in the current folder, which Python does not know of otherwise."""
    (tmp_path / "objectives_of_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "objectives_of_mine"
    sys.modules.pop("objectives_of_mine", None)


@pytest.mark.parametrize(
    "function, args, known",
    [
        ("reinforce", {}, CASES["weighted_sft"]),
        ("mine_gspo", {"eps": 0.1}, Case("gspo", {"eps_low": 0.1, "eps_high": 0.1})),
    ],
)
def test_an_objective_of_ones_own_weighs_as_the_built_in_one(function, args, known, mine):
    data = make()
    own, known = data.terms(Case(f"{mine}:{function}", args)), data.terms(known)
    assert own.of_sequences == (function == "mine_gspo") and own.objective.needs_behavior
    (out, found), (expected, wanted) = (through_the_head(data, terms) for terms in (own, known))
    assert_close((*found, out.loss), (*wanted, expected.loss), 1e-12)
    assert own.sums(out)[0]["clipped"] == known.sums(expected)[0]["clipped"]


def test_its_arguments_are_read_as_annotated_and_its_weights_are_constants(mine):
    logp, A = torch.tensor([-0.5, -2.0], requires_grad=True), torch.tensor([1.0, -3.0])
    objective = Objective(f"{mine}:scaled", {"factor": "2", "anything": [1]})
    assert objective.args == {"factor": 2.0, "anything": [1]}
    weights, clipped = objective(logp, torch.tensor([-1.0, math.nan]), A, torch.tensor([0, 0]))
    assert weights.tolist() == [2.0, -6.0] and clipped.tolist() == [False, True] and not weights.requires_grad


@pytest.mark.parametrize("function, found", [("too_few", "[1]"), ("square", "[2, 2]")])
def test_weights_of_another_shape_are_refused(function, found, mine):
    logp = torch.tensor([-0.5, -2.0])
    with pytest.raises(ValueError) as error:
        Objective(f"{mine}:{function}")(logp, logp, logp, torch.tensor([0, 0]))
    assert str(error.value) == f"objective objectives_of_mine:{function} gave weights {found}; expected [2]"


@pytest.mark.parametrize(
    "function, args, says",
    [
        (
            "two",
            {},
            r"takes \(logp_N, advantages_N\); expected \(logp_N, behavior_logp_N, advantages_N\), sequence_N as a four",
        ),
        ("positional", {}, r"takes \(.*, advantages_N, factor\); expected .* its own arguments behind a \*"),
        ("open_ended", {}, r"takes \(logp_N, behavior_logp_N, advantages_N, more\); expected"),
        ("number", {}, "'objectives_of_mine:number' is a int, expected a function"),
        ("nothing", {}, "cannot be imported: .*has no attribute 'nothing'; looked in "),
        ("scaled", {"factr": 1}, "factr of objective .*:scaled is not one of its arguments; it takes factor, anything"),
        ("scaled", {"factor": "much"}, "factor of objective objectives_of_mine:scaled is 'much': .*valid number"),
        ("reinforce", {"factor": 1}, "factor of .* is not one of its arguments; it takes none"),
        ("mine_gspo", {}, "eps of objective objectives_of_mine:mine_gspo is not given; it takes eps"),
    ],
)
def test_a_wrong_function_or_argument_of_ones_own_is_a_sentence(function, args, says, mine):
    with pytest.raises(ValueError, match=says):
        Objective(f"{mine}:{function}", args)


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "ppo_clp",
            "unknown objective 'ppo_clp': did you mean ppo_clip. There are weighted_sft, .*, or your own as my_module:my",
        ),
        ("grpo", "unknown objective 'grpo': did you mean gspo"),
        ("", "unknown objective '': there are weighted_sft, sft"),
        ("no_such_module:f", "objective 'no_such_module:f' cannot be imported: No module named 'no_such_module'; looked in /"),
        ("math:nothing", "cannot be imported: module 'math' has no attribute 'nothing'"),
    ],
)
def test_an_unknown_objective_names_the_near_one_and_the_known(name, says):
    with pytest.raises(ValueError, match=says):
        Objective(name)


RANGES = {  # what is let in, what is not
    ("importance_sampling", "cap"): ([0.1, 8, None], [0, -1, math.nan, math.inf, "x"]),
    ("ppo_clip", "eps_low"): ([0, 1, "0.5"], [-0.1, 1.1, math.nan, None]),
    ("ppo_clip", "eps_high"): ([0, 5], [-0.1, math.inf, math.nan, "x"]),
    ("ppo_clip", "dual_clip"): ([1.1, 3, None], [1, 0.5, -3, math.inf, math.nan]),
    ("dppo", "delta_low"): ([0, 0.15, None], [-0.1, math.inf, math.nan, "x"]),
    ("dppo", "delta_high"): ([0, 0.15, None], [-0.1, math.inf, math.nan, "x"]),
    ("dppo", "tau"): ([0, 1e-3], [-0.1, math.inf, math.nan, None]),
    ("dppo", "cap"): ([0.1, 20, None], [0, -1, math.nan, math.inf]),
    ("ipo", "eps"): ([0, 0.1], [-0.1, math.inf, math.nan, None]),
    ("ipo", "tau"): ([0, 1e-3], [-0.1, math.inf, math.nan, None]),
    ("sapo", "tau_pos"): ([0.1, 2], [0, -1, math.inf, math.nan]),
    ("sapo", "tau_neg"): ([0.1, 2], [0, -1, math.inf, math.nan]),
    ("sapo_sequence", "tau_pos"): ([0.1, 2], [0, -1, math.inf, math.nan]),
    ("sapo_sequence", "tau_neg"): ([0.1, 2], [0, -1, math.inf, math.nan]),
    ("cispo", "eps_low"): ([0, 1], [-0.1, 1.1, math.nan]),
    ("cispo", "eps_high"): ([0, 5], [-0.1, math.inf, math.nan, [1]]),
    ("gspo", "eps_low"): ([0, 3e-4, 1], [-1e-9, 1.1, math.nan]),
    ("gspo", "eps_high"): ([0, 4e-4], [-1e-9, math.inf, math.nan]),
    ("gmpo", "eps_low"): ([0, 0.4, 2], [-0.1, math.inf, math.nan]),
    ("gmpo", "eps_high"): ([0, 0.4, 2], [-0.1, math.inf, math.nan]),
}
CHOICES = {  # of the arguments that are words; the first is the default
    ("dppo", "divergence"): ["tv", "kl"],
    ("gspo", "form"): ["token", "sequence"],
    ("gmpo", "clip"): ["token", "sum"],
}


def arguments_of(objective):
    return [argument for name, argument in [*CHOICES, *RANGES] if name == objective]


@pytest.mark.parametrize("name, argument", CHOICES)
def test_arguments_that_are_words_are_refused_unless_known(name, argument):
    for value in CHOICES[name, argument]:
        assert Objective(name, {argument: value}).args == {argument: value}
    with pytest.raises(ValueError, match=f"{argument} of objective {name} is 'none': Input should be '"):
        Objective(name, {argument: "none"})


@pytest.mark.parametrize("name, argument", RANGES)
def test_arguments_outside_their_range_are_refused_by_name_and_value(name, argument):
    good, bad = RANGES[name, argument]
    for value in good:
        assert Objective(name, {argument: value}).args == {argument: None if value is None else float(value)}
    for value in bad:
        with pytest.raises(ValueError) as error:
            Objective(name, {argument: value})
        assert str(error.value).startswith(f"{argument} of objective {name} is {value!r}: Input should be ")
        assert str(error.value).endswith(f"it takes {', '.join(arguments_of(name))}")


def test_defaults_are_those_of_the_papers():
    assert {name: f.__kwdefaults__ or {} for name, f in OBJECTIVES.items()} == {
        "weighted_sft": {},
        "sft": {},
        "importance_sampling": {"cap": None},
        "ppo_clip": {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": None},
        "dppo": {"divergence": "tv", "delta_low": None, "delta_high": None, "tau": 0.0, "cap": None},
        "ipo": {"eps": 0.3, "tau": 0.0},
        "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
        "sapo_sequence": {"tau_pos": 1.0, "tau_neg": 1.05},
        "cispo": {"eps_low": 1.0, "eps_high": 4.0},
        "gspo": {"form": "token", "eps_low": 3e-4, "eps_high": 4e-4},
        "gmpo": {"clip": "token", "eps_low": 0.4, "eps_high": 0.4},
        "dft": {},
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_argument_of_another_objective_is_refused(name):
    takes = ", ".join(arguments_of(name)) or "none"
    with pytest.raises(ValueError, match=f"margin of objective {name} is not one of its arguments; it takes {takes}$"):
        Objective(name, {"margin": 1.0})


# -- advantages ------------------------------------------------------------------------------------------------------------


def test_scores_become_advantages_by_their_formulas_and_those_not_counted_move_no_other(rng):
    scores, counted = rng.normal(3.0, 2.0, size=7), np.array([1, 1, 0, 1, 1, 0, 1], dtype=bool)
    scores[2], scores[5] = 1e6, math.nan
    kept = np.flatnonzero(counted)
    mean = sum(scores[i] for i in kept) / len(kept)
    deviation = math.sqrt(sum((scores[i] - mean) ** 2 for i in kept) / len(kept))
    wanted = {
        "rloo": {i: scores[i] - sum(scores[j] for j in kept if j != i) / (len(kept) - 1) for i in kept},
        "group_center": {i: scores[i] - mean for i in kept},
        "group_norm": {i: (scores[i] - mean) / deviation for i in kept},
        "maxrl": {i: (scores[i] - mean) / mean for i in kept},
        "raw": {i: scores[i] for i in kept},
    }
    assert wanted.keys() == set(FROM_SCORES)
    for method, values in wanted.items():
        assert dict(zip(kept, from_scores(scores, counted, method)[kept], strict=True)) == pytest.approx(values), method
        alone = 0.0 if method == "maxrl" else 2.5  # a lone one keeps its score
        assert from_scores(np.array([2.5]), np.array([True]), method).tolist() == [alone]
    assert from_scores(np.array([4.0, 9.0]), np.array([True, False]), "rloo")[0] == 0  # the only one that counts


def shaped_by_hand(batch, normalization, clip, negative_scale):
    """Normalised over the trained, free tokens, clipped, scaled by sign, overridden: in this order, token by token."""
    tokens = list(zip(batch.advantages, batch.loss_mask, np.repeat(batch.overrides, batch.lengths), strict=True))
    free = [a for a, trained, over in tokens if trained and over == Override.NONE]
    mean = sum(free) / len(free)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in free) / len(free))
    wanted = []
    for a, trained, over in tokens:
        a = {"none": a, "batch_center": a - mean, "batch": (a - mean) / deviation}[normalization]
        a = a if clip is None else min(max(a, -clip), clip)
        a = negative_scale * a if a < 0 else a
        wanted.append({Override.NONE: a, Override.ZERO: 0.0, Override.SFT: 1.0}[over] if trained else 0.0)
    return wanted


@pytest.mark.parametrize("negative_scale", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("normalization", ["none", "batch_center", "batch"])
def test_shaping_keeps_its_order_and_is_the_same_however_ranks_split_the_batch(normalization, clip, negative_scale, rng):
    groups = [make_group(rng, lengths) for lengths in ([9, 30, 4], [6, 17], [5, 5, 8])]
    groups[0]["overrides"], groups[2]["overrides"] = [None, None, {"sft": True}], [{"set_advantage_to_zero": True}, None, None]
    groups[0]["advantages"][2], groups[2]["advantages"][0] = [40.0], [-70.0]  # would show in any statistic
    settings = dict(advantage_normalization=normalization, advantage_clip=clip, negative_advantage_scale=negative_scale)
    processor, shaping = AtroposBatchProcessor(**settings), Shaping(normalization, clip, negative_scale)
    found = processor.process_atropos_batch(groups)
    wanted = shaped_by_hand(processor.decode(groups), normalization, clip, negative_scale)
    assert found.advantages.tolist() == pytest.approx(wanted, abs=1e-12)
    for split in ([groups[:1], groups[1:]], [groups[:1], [], groups[1:2], groups[2:]]):
        joined = Batch.joined([processor.decode(part) for part in split]).with_final_advantages(shaping)
        assert np.array_equal(joined.advantages, found.advantages)
    turned = Batch.joined([processor.decode([groups[i]]) for i in (2, 0, 1)]).with_final_advantages(shaping)
    back = np.concatenate([turned.advantages[turned.spans()[i]] for i in (3, 4, 5, 6, 7, 0, 1, 2)])
    assert back.tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("method", FROM_SCORES)
def test_an_overridden_score_moves_no_other_and_what_the_override_says_is_final(method, rng):
    processor = AtroposBatchProcessor(score_advantages=method, advantage_clip=1.5, negative_advantage_scale=0.5)
    group = make_group(rng, [6, 6, 6, 6], advantages=None, scores=[1.0, 2.0, 6.0, 1e6])
    group["overrides"] = [None, None, None, {"sft": True}]
    fewer = {name: rows[:3] if rows else rows for name, rows in group.items()}
    (*found, last), alone = (processor.process_atropos_batch([g]).advantages.reshape(-1, 6)[:, -1] for g in (group, fewer))
    assert last == 1.0 and found == alone.tolist() and max(found) <= 1.5
