"""The losses as in their papers, on dense logprobs with autograd. Imports nothing of wsft.

A surrogate is a function of one sequence: logp_T are the logprobs of its trained tokens, with their graph; mu_T the behavior
logprobs, NaN if unknown, in which case the policy is assumed to have sampled: mu = sg(logp); A_T the advantages. It returns the
quantity to maximise per token, [T]; `sg` is the papers' stop-gradient. Then follow the cases, the reductions, the other terms,
and the loss of Atropos records.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch


def sg(x):
    return x.detach()


def ratio(logp_T, mu_T):
    return (logp_T - torch.where(mu_T.isnan(), sg(logp_T), mu_T)).exp()


def clip(r, eps_low, eps_high):
    return r.clamp(1 - eps_low, 1 + eps_high)


def reinforce(logp_T, mu_T, A_T):
    """Williams 1992: the gradient of A * log pi."""
    return A_T * logp_T


def likelihood(logp_T, mu_T, A_T):
    return logp_T


def dft(logp_T, mu_T, A_T):
    """Wu et al. 2025: sg(pi) * log pi."""
    return sg(logp_T.exp()) * logp_T


def importance_sampling(logp_T, mu_T, A_T):
    """pi / mu * A, the policy gradient of samples of mu."""
    return ratio(logp_T, mu_T) * A_T


def truncated_importance_sampling(logp_T, mu_T, A_T, cap):
    """Yao et al. 2025: sg(min(pi / mu, C)) * A * log pi."""
    return sg(ratio(logp_T, mu_T).clamp(max=cap)) * A_T * logp_T


def ppo(logp_T, mu_T, A_T, eps_low, eps_high):
    """Schulman et al. 2017; with two epsilons DAPO's, Yu et al. 2025."""
    r = ratio(logp_T, mu_T)
    return torch.minimum(r * A_T, clip(r, eps_low, eps_high) * A_T)


def dual_clip_ppo(logp_T, mu_T, A_T, eps_low, eps_high, c):
    """Ye et al. 2020: max(min(..), c * A) where A < 0."""
    plain = ppo(logp_T, mu_T, A_T, eps_low, eps_high)
    return torch.where(A_T < 0, torch.maximum(plain, c * A_T), plain)


def cispo(logp_T, mu_T, A_T, eps_low, eps_high):
    """MiniMax-M1 2025: sg(clip(r)) * A * log pi."""
    return sg(clip(ratio(logp_T, mu_T), eps_low, eps_high)) * A_T * logp_T


def gspo(logp_T, mu_T, A_T, eps_low, eps_high):
    """Zheng et al. 2025: s = (pi(y) / mu(y))^(1/|y|), clipped, with the sequence's one advantage; T times the same."""
    assert (A_T[0] == A_T).all()
    s = ratio(logp_T, mu_T).prod() ** (1 / len(logp_T))
    return torch.minimum(s * A_T[0], clip(s, eps_low, eps_high) * A_T[0]).expand(len(logp_T))


def gspo_token(logp_T, mu_T, A_T, eps_low, eps_high):
    """Zheng et al. 2025, GSPO-token: s_t = sg(s) * pi_t / sg(pi_t), with an advantage for each token."""
    s_T = sg(ratio(logp_T, mu_T).prod() ** (1 / len(logp_T))) * logp_T.exp() / sg(logp_T.exp())
    return torch.minimum(s_T * A_T, clip(s_T, eps_low, eps_high) * A_T)


def gspo_of_means(logp_T, mu_T, A_T, eps_low, eps_high):
    """GSPO of a sequence whose tokens differ in their advantages: with their mean."""
    return gspo(logp_T, mu_T, A_T.mean().expand(len(A_T)), eps_low, eps_high)


def gmpo(logp_T, mu_T, A_T, bound):
    """Zhao et al. 2025 (GMPO), as its code has it: exp(mean of the log ratios, clipped on the side that pays) * A; T times."""
    h_T = ratio(logp_T, mu_T).log()
    A = A_T.mean()
    h_T = h_T.clamp(max=bound) if A > 0 else h_T.clamp(min=-bound)
    return (h_T.mean().exp() * A).expand(len(logp_T))


def gmpo_sum(logp_T, mu_T, A_T, bound):
    """Its ablation: the sum of the log ratios is clipped."""
    h, A = ratio(logp_T, mu_T).log().sum(), A_T.mean()
    h = h.clamp(max=bound) if A > 0 else h.clamp(min=-bound)
    return ((h / len(logp_T)).exp() * A).expand(len(logp_T))


def sapo(logp_T, mu_T, A_T, tau_pos, tau_neg):
    """Gao et al. 2025 (SAPO): 4 / tau * sigmoid(tau * (r - 1)) * A."""
    tau_T = torch.where(A_T > 0, torch.full_like(A_T, tau_pos), tau_neg)
    return 4 / tau_T * torch.sigmoid(tau_T * (ratio(logp_T, mu_T) - 1)) * A_T


def sapo_sequence(logp_T, mu_T, A_T, tau_pos, tau_neg):
    s, A = ratio(logp_T, mu_T).log().mean().exp(), A_T.mean()
    tau = tau_pos if A > 0 else tau_neg
    return (4 / tau * torch.sigmoid(tau * (s - 1)) * A).expand(len(logp_T))


def dppo(logp_T, mu_T, A_T, divergence, low, high, tau=0.0, cap=math.inf):
    """Qi et al. 2026 (DPPO): r * A where the step does not lead away beyond delta, - tau * (log r)^2 everywhere."""
    r_T, away_T = ratio(logp_T, mu_T), dppo_away(logp_T, mu_T, A_T, divergence, low, high)
    gain_T = r_T * A_T if cap == math.inf else sg(r_T.clamp(max=cap)) * A_T * logp_T
    return torch.where(away_T, 0, gain_T) - tau * r_T.log() ** 2


def dppo_away(logp_T, mu_T, A_T, divergence, low, high):
    p, q = (x.detach().exp() for x in (logp_T, torch.where(mu_T.isnan(), logp_T, mu_T)))
    if divergence == "tv":
        return ((A_T > 0) & (p - q > high)) | ((A_T < 0) & (p - q < -low))
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    return ((A_T > 0) & (p > q) & (kl > high)) | ((A_T < 0) & (p < q) & (kl > low))


def ipo(logp_T, mu_T, A_T, eps, tau=0.0):
    """prime-rl's: r * A where the probability is within eps of the sampler's, - tau * (log r)^2 everywhere."""
    r_T = ratio(logp_T, mu_T)
    return torch.where(ipo_away(logp_T, mu_T, A_T, eps), 0, r_T * A_T) - tau * r_T.log() ** 2


def ipo_away(logp_T, mu_T, A_T, eps):
    p, q = (x.detach().exp() for x in (logp_T, torch.where(mu_T.isnan(), logp_T, mu_T)))
    return (p - q).abs() > eps


def gmpo_beyond(logp_T, mu_T, A_T, bound, of_sum):
    h_T = ratio(logp_T, mu_T).log()
    h_T = h_T.sum().expand(len(h_T)) if of_sum else h_T
    return h_T > bound if A_T.mean() > 0 else h_T < -bound if A_T.mean() < 0 else h_T != h_T


# -- which objective, with which arguments, is to have the gradient of which surrogate -------------------------------------


class Case(NamedTuple):
    objective: str
    args: dict
    maximised: Callable | None = None  # of (logp_T, mu_T, A_T)
    clips: tuple = (0.0, math.inf, math.inf)  # lower, upper, and dual clip of the ratio
    per_sequence: bool = False  # whether there is one advantage for a whole sequence


def clipped(objective, surrogate, eps_low, eps_high, args=None, per_sequence=False):
    """With no `args` these are the objective's defaults, which only the surrogate gets."""
    paper = partial(surrogate, eps_low=eps_low, eps_high=eps_high)
    return Case(objective, args or {}, paper, (1 - eps_low, 1 + eps_high, math.inf), per_sequence)


SIDES = {"eps_low": 0.1, "eps_high": 0.3}
CASES = {
    "weighted_sft": Case("weighted_sft", {}, reinforce),
    "sft": Case("sft", {}, likelihood),
    "dft": Case("dft", {}, dft),
    "importance_sampling": Case("importance_sampling", {}, importance_sampling),
    "truncated": Case("importance_sampling", {"cap": 1.2}, partial(truncated_importance_sampling, cap=1.2), (0, 1.2, math.inf)),
    "ppo": clipped("ppo_clip", ppo, 0.2, 0.2),
    "clip_higher": clipped("ppo_clip", ppo, **SIDES, args=SIDES),
    "dual_clip": Case("ppo_clip", SIDES | {"dual_clip": 1.7}, partial(dual_clip_ppo, **SIDES, c=1.7), (0.9, 1.3, 1.7)),
    "cispo": clipped("cispo", cispo, 1.0, 4.0),
    "cispo_both_sides": clipped("cispo", cispo, **SIDES, args=SIDES),
    "gspo": clipped("gspo", gspo, 3e-4, 4e-4, per_sequence=True),
    "gspo_wide": clipped("gspo", gspo, **SIDES, args=SIDES, per_sequence=True),
    "gspo_token": clipped("gspo", gspo_token, **SIDES, args=SIDES),
    "gspo_sequence": Case("gspo", SIDES | {"form": "sequence"}, partial(gspo_of_means, **SIDES)),
    "gmpo": Case("gmpo", {}, partial(gmpo, bound=0.4)),
    "gmpo_sum": Case("gmpo", {"clip": "sum"}, partial(gmpo_sum, bound=0.4)),
    "sapo": Case("sapo", {}, partial(sapo, tau_pos=1.0, tau_neg=1.05)),
    "sapo_sequence": Case("sapo_sequence", {"tau_neg": 2.0}, partial(sapo_sequence, tau_pos=1.0, tau_neg=2.0)),
    "dppo": Case("dppo", {}, partial(dppo, divergence="tv", low=0.2, high=0.2)),
    "dppo_kl": Case("dppo", {"divergence": "kl"}, partial(dppo, divergence="kl", low=0.05, high=0.05)),
    "dppo_near": Case(
        "dppo",
        {"delta_low": 0.02, "delta_high": 0.03, "tau": 0.3},
        partial(dppo, divergence="tv", low=0.02, high=0.03, tau=0.3),
    ),
    "dppo_kl_near": Case(
        "dppo",
        {"divergence": "kl", "delta_low": 0.005, "delta_high": 0.01, "cap": 1.2},
        partial(dppo, divergence="kl", low=0.005, high=0.01, cap=1.2),
    ),
    "ipo": Case("ipo", {}, partial(ipo, eps=0.3)),
    "ipo_near": Case("ipo", {"eps": 0.02, "tau": 0.3}, partial(ipo, eps=0.02, tau=0.3)),
}

# which tokens of a sequence have weight 0, or that of the penalty alone
MASKS = {
    "dppo_near": partial(dppo_away, divergence="tv", low=0.02, high=0.03),
    "dppo_kl_near": lambda *rows: dppo_away(*rows, "kl", 0.005, 0.01) | (ratio(*rows[:2]) > 1.2),
    "ipo_near": partial(ipo_away, eps=0.02),
    "gmpo": partial(gmpo_beyond, bound=0.4, of_sum=False),
    "gmpo_sum": partial(gmpo_beyond, bound=0.4, of_sum=True),
}

# -- how the losses of sequences, [T] each, become one --------------------------------------------------------------------

REDUCTIONS = {
    "mean": lambda losses, max_len: sum(x.sum() for x in losses) / sum(len(x) for x in losses),  # DAPO
    "sequence_mean": lambda losses, max_len: sum(x.mean() for x in losses) / len(losses),  # GRPO
    "constant": lambda losses, max_len: sum(x.sum() for x in losses) / (len(losses) * max_len),  # Dr. GRPO
    "sum": lambda losses, max_len: sum(x.sum() for x in losses),
}

# -- the terms beside the objective, of one sequence [T] ------------------------------------------------------------------


def k3(logp_T, ref_T):
    """Shao et al. 2024 (GRPO): ref / pi - log(ref / pi) - 1; none where the reference is not known."""
    known = ~ref_T.isnan()
    r = (torch.where(known, ref_T, sg(logp_T)) - logp_T).exp()
    return torch.where(known, r - r.log() - 1, 0)


def entropy(log_p_TV):
    return -(log_p_TV.exp() * log_p_TV).sum(-1)


def forward_kl(log_p_TV, teacher_T, renormalize):
    """sum over the teacher's (id, logq) of q * log(q / p), for each token."""
    values = []
    for log_p_V, entries in zip(log_p_TV, teacher_T, strict=True):
        total = sum(math.exp(logq) for _, logq in entries) if renormalize else 1.0
        q = [(k, math.exp(logq) / total) for k, logq in entries]
        values.append(sum((q_k * (math.log(q_k) - log_p_V[k]) for k, q_k in q), torch.zeros((), dtype=log_p_V.dtype)))
    return torch.stack(values)


# -- all of it, for records ------------------------------------------------------------------------------------------------


def losses_of_records(groups, hidden_NH, lm_head_VH, case, coefficients, run_temperature):
    """The loss of every sequence [T], read off Atropos records; hidden_NH: the states of their trained tokens, end to end."""
    losses, start = [], 0
    for group, i, tokens in ((record, i, row) for record in groups for i, row in enumerate(record["tokens"])):
        at = [t for t in range(1, len(tokens)) if group["masks"][i][t] != -100]
        if not at:
            continue
        output, generation = group["overrides"][i], group["generation_params"] or {}
        temperature = output.get("temperature", generation.get("temperature", run_temperature))
        hidden_TH, start = hidden_NH[start : start + len(at)], start + len(at)
        log_p_TV = (hidden_TH @ lm_head_VH.T / temperature).log_softmax(-1)
        logp_T = log_p_TV.gather(1, torch.tensor(tokens)[at, None]).squeeze(1)

        mu_T, ref_T = (_logps(_entries(group, name, i, at, 1.0)) for name in ("inference_logprobs", "ref_logprobs"))
        advantages = group["advantages"][i]
        A_T = torch.tensor(advantages * len(at) if len(advantages) == 1 else [advantages[t] for t in at], dtype=torch.float64)
        maximised_T = case.maximised(logp_T, mu_T, A_T)
        if output.get("sft") or output.get("set_advantage_to_zero"):
            maximised_T = (0 if output.get("set_advantage_to_zero") else 1) * logp_T
        ids, logqs = (_entries(group, name, i, at, []) for name in ("distill_token_ids", "distill_logprobs"))
        teacher_T = [list(zip(*row, strict=True)) for row in zip(ids, logqs, strict=True)]
        kl_T = forward_kl(log_p_TV, teacher_T, coefficients.renormalize)
        beside_T = coefficients.kl * k3(logp_T, ref_T) - coefficients.entropy * entropy(log_p_TV) + coefficients.distill * kl_T
        losses.append(beside_T - maximised_T)
    assert start == len(hidden_NH)
    return losses


def _entries(group, name, i, at, absent):
    rows = group[name]
    return [rows[i][t] for t in at] if rows and rows[i] is not None else [absent] * len(at)


def _logps(values):
    """NaN for placeholders; of the 32 bits that a record's logps are kept in."""
    return torch.tensor([x if x <= 0 else math.nan for x in values], dtype=torch.float32).double()
