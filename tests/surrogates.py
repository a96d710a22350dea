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
