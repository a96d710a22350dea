"""Objectives: the weight of a trained token, given its logp, its behavior logp and its advantage. Pure functions of tensors.

    loss = sum over trained tokens of  scale * weight * -logp        (no gradient flows through the weight)

Each has the gradient of its paper's surrogate: d(ratio) = ratio * d(logp), so A * ratio as a constant weight on -logp gives the
policy gradient of A * ratio, and where clipping makes the surrogate constant the weight is 0. Your own objective is a function
of the same signature, named `my_module:my_function`.

    def objective(logp_N, behavior_logp_N, advantages_N, *, my_argument=1.0):
        return weights_N                # or (weights_N, clipped_N) with a bool per token, reported as ratio/clipped

If it also takes `sequence_N` (the index of each token's sequence, from 0), it is called with all tokens of whole sequences. For
a token without a behavior logp its own logp is passed, so its ratio is 1. Logps are at the temperature of the sequence. Knows
nothing of HTTP, DeepSpeed, ranks, the run's config, or the origin of a batch; it does not import torch.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, create_model

from wsft.user_code import load

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # ratios are clamped to [exp(-20), exp(20)], so that one absurd logp does not make a step infinite

Below1 = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Above1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]


def ratio(logp_N: "Tensor", behavior_logp_N: "Tensor") -> "Tensor":
    """exp(logp - behavior_logp), with the exponent clamped to [-20, 20]."""
    return log_ratio_of(logp_N, behavior_logp_N).exp()


def log_ratio_of(logp_N: "Tensor", behavior_logp_N: "Tensor") -> "Tensor":
    return (logp_N - behavior_logp_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def weighted_sft(logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor") -> "Tensor":
    """A: REINFORCE (Williams 1992), without a correction for off-policy data."""
    return advantages_N


def sft(logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor") -> "Tensor":
    """1: plain cross-entropy. Ignores advantages."""
    return logp_N.new_ones(logp_N.shape)


def dft(logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor") -> "Tensor":
    """p: dynamic fine-tuning, SFT without its implicit 1/p (Wu et al. 2025, arXiv:2508.05629). Ignores advantages."""
    return logp_N.exp()


def importance_sampling(
    logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor", *, cap: Above0 | None = None
) -> tuple["Tensor", "Tensor"]:
    """A * min(ratio, cap): the off-policy policy gradient, token by token.

    With `cap` truncated importance sampling (Ionides 2008; as TIS in Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"); None does not truncate.
    """
    r, truncated = _capped(ratio(logp_N, behavior_logp_N), cap)
    return advantages_N * r, truncated


def ppo_clip(
    logp_N: "Tensor",
    behavior_logp_N: "Tensor",
    advantages_N: "Tensor",
    *,
    eps_low: Below1 = 0.2,
    eps_high: NotNegative = 0.2,
    dual_clip: Above1 | None = None,
) -> tuple["Tensor", "Tensor"]:
    """A * ratio; 0 where min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) takes the clipped branch.

    PPO (Schulman et al. 2017, arXiv:1707.06347); eps_high above eps_low is DAPO's clip-higher (arXiv:2503.14476). With
    `dual_clip` c also 0 where A < 0 and ratio > c (Ye et al. 2020, arXiv:1912.09729).
    """
    r = ratio(logp_N, behavior_logp_N)
    return _clipped(r, advantages_N, eps_low, eps_high, dual_clip)


def dppo(
    logp_N: "Tensor",
    behavior_logp_N: "Tensor",
    advantages_N: "Tensor",
    *,
    divergence: Literal["tv", "kl"] = "tv",
    delta_low: NotNegative | None = None,
    delta_high: NotNegative | None = None,
    tau: NotNegative = 0.0,
    cap: Above0 | None = None,
) -> tuple["Tensor", "Tensor"]:
    """A * min(ratio, cap); 0 where a step would move the token's probability further from the sampler's than delta. Of both,
    minus 2 * tau * log ratio, from a penalty tau * (log ratio)^2 on every trained token.

    DPPO (arXiv:2602.04879), with the penalty of Kimi K2.5 (arXiv:2602.02276). p is the token's probability, q that under the
    sampler: the divergence is |p - q| (tv), or the KL divergence between the two Bernoulli distributions (kl). delta_high is
    for p > q and A > 0, delta_low for p < q and A < 0; 0.2 (tv) or 0.05 (kl) if unset.
    """
    log_ratio = log_ratio_of(logp_N, behavior_logp_N)
    default = 0.2 if divergence == "tv" else 0.05
    low, high = (default if delta is None else delta for delta in (delta_low, delta_high))
    p, q = logp_N.exp(), behavior_logp_N.exp()
    distance = (p - q).abs() if divergence == "tv" else _bernoulli_kl(logp_N, behavior_logp_N)
    away = ((advantages_N > 0) & (p > q) & (distance > high)) | ((advantages_N < 0) & (p < q) & (distance > low))
    r, capped = _capped(log_ratio.exp(), cap)
    return (advantages_N * r).masked_fill(away, 0) - 2 * tau * log_ratio, away | capped


def ipo(
    logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor", *, eps: NotNegative = 0.3, tau: NotNegative = 0.0
) -> tuple["Tensor", "Tensor"]:
    """A * ratio; 0 where the token's probability differs from the sampler's by more than eps, whatever the sign of A. Of both,
    minus 2 * tau * log ratio.

    The default of prime-rl (its pull requests 3418 and 3586).
    """
    log_ratio = log_ratio_of(logp_N, behavior_logp_N)
    away = (logp_N.exp() - behavior_logp_N.exp()).abs() > eps
    return (advantages_N * log_ratio.exp()).masked_fill(away, 0) - 2 * tau * log_ratio, away


def sapo(
    logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor", *, tau_pos: Above0 = 1.0, tau_neg: Above0 = 1.05
) -> "Tensor":
    """A * ratio * 4 * s * (1 - s), with s = sigmoid(tau * (ratio - 1)), tau_pos where A > 0, else tau_neg.

    SAPO (arXiv:2511.20347), a smooth trust region: A at ratio 1, less away from it, never 0.
    """
    return _soft(ratio(logp_N, behavior_logp_N), advantages_N, tau_pos, tau_neg)


def sapo_sequence(
    logp_N: "Tensor",
    behavior_logp_N: "Tensor",
    advantages_N: "Tensor",
    sequence_N: "Tensor",
    *,
    tau_pos: Above0 = 1.0,
    tau_neg: Above0 = 1.05,
) -> "Tensor":
    """As `sapo`, with the geometric mean of the sequence's ratios, and the mean of its advantages."""
    r = mean_of(log_ratio_of(logp_N, behavior_logp_N), sequence_N).exp()
    return _soft(r, mean_of(advantages_N, sequence_N), tau_pos, tau_neg)


def cispo(
    logp_N: "Tensor",
    behavior_logp_N: "Tensor",
    advantages_N: "Tensor",
    *,
    eps_low: Below1 = 1.0,
    eps_high: NotNegative = 4.0,
) -> tuple["Tensor", "Tensor"]:
    """CISPO, A * clip(ratio, 1 - eps_low, 1 + eps_high): every token keeps a weight (MiniMax-M1, arXiv:2506.13585).

    By default it clips from above only, at 5, as there and in ScaleRL (arXiv:2510.13786).
    """
    r = ratio(logp_N, behavior_logp_N)
    return advantages_N * r.clamp(1 - eps_low, 1 + eps_high), (r < 1 - eps_low) | (r > 1 + eps_high)


def gspo(
    logp_N: "Tensor",
    behavior_logp_N: "Tensor",
    advantages_N: "Tensor",
    sequence_N: "Tensor",
    *,
    form: Literal["token", "sequence"] = "token",
    eps_low: Below1 = 3e-4,
    eps_high: NotNegative = 4e-4,
) -> tuple["Tensor", "Tensor"]:
    """A * s, with s = exp(mean of log ratio over the sequence's trained tokens), 0 where PPO's rule clips s.

    GSPO (Zheng et al. 2025, arXiv:2507.18071); the paper's loss has `reduction sequence_mean`. A is the token's own (form
    token, GSPO-token), or the mean over the sequence (form sequence): the same where a sequence has one advantage.
    """
    s = mean_of(log_ratio_of(logp_N, behavior_logp_N), sequence_N).exp()
    return _clipped(s, mean_of(advantages_N, sequence_N) if form == "sequence" else advantages_N, eps_low, eps_high)


def gmpo(
    logp_N: "Tensor",
    behavior_logp_N: "Tensor",
    advantages_N: "Tensor",
    sequence_N: "Tensor",
    *,
    clip: Literal["token", "sum"] = "token",
    eps_low: NotNegative = 0.4,
    eps_high: NotNegative = 0.4,
) -> tuple["Tensor", "Tensor"]:
    """B * exp(mean of clipped log ratios), B the mean advantage of the sequence; 0 where the log ratio is clipped: at eps_high
    where B > 0, at -eps_low where B < 0.

    GMPO (arXiv:2507.20673), whose loss has `reduction sequence_mean`. With clip `sum` the sum of the sequence's log ratios is
    clipped at these bounds, then divided by its length: the paper's ablation.
    """
    log_ratio, mean_N = log_ratio_of(logp_N, behavior_logp_N), mean_of(advantages_N, sequence_N)
    if clip == "sum":
        log_ratio = sum_of(log_ratio, sequence_N)
    clipped = ((mean_N > 0) & (log_ratio > eps_high)) | ((mean_N < 0) & (log_ratio < -eps_low))
    bounded = log_ratio.clamp(max=eps_high).where(mean_N > 0, log_ratio.clamp(min=-eps_low))
    if clip == "sum":
        bounded = bounded / sum_of(bounded.new_ones(len(bounded)), sequence_N)
    geometric = (bounded if clip == "sum" else mean_of(bounded, sequence_N)).exp()
    return (mean_N * geometric).masked_fill(clipped, 0), clipped


def _capped(r: "Tensor", cap: float | None) -> tuple["Tensor", "Tensor"]:
    cap = float("inf") if cap is None else cap
    return r.clamp(max=cap), r > cap


def _clipped(
    r: "Tensor", advantages_N: "Tensor", eps_low: float, eps_high: float, dual_clip: float | None = None
) -> tuple["Tensor", "Tensor"]:
    """A * r where PPO does not clip, else 0; and where it clips."""
    clipped = ((advantages_N > 0) & (r > 1 + eps_high)) | ((advantages_N < 0) & (r < 1 - eps_low))
    if dual_clip is not None:
        clipped |= (advantages_N < 0) & (r > dual_clip)
    return (advantages_N * r).masked_fill(clipped, 0), clipped


def _soft(r: "Tensor", advantages_N: "Tensor", tau_pos: float, tau_neg: float) -> "Tensor":
    scaled = (r - 1) * (advantages_N > 0).to(r.dtype).mul(tau_pos - tau_neg).add(tau_neg)
    return advantages_N * r * 4 * scaled.sigmoid() * (-scaled).sigmoid()  # 1 - sigmoid would cancel


def _bernoulli_kl(logp_N: "Tensor", behavior_logp_N: "Tensor") -> "Tensor":
    """KL(q || p) of the events that the token is drawn; infinite where p is 1 and q is not."""
    p_of_others, q_of_others = (-x.clamp(max=0).expm1() for x in (logp_N, behavior_logp_N))
    of_others = q_of_others.xlogy(q_of_others) - q_of_others.xlogy(p_of_others)
    q = behavior_logp_N.exp()
    return (q * (behavior_logp_N - logp_N)).masked_fill(q == 0, 0) + of_others


def sum_of(values_N: "Tensor", sequence_N: "Tensor") -> "Tensor":
    """For each token the sum over its sequence, [N]."""
    return values_N.new_zeros(len(values_N)).index_add(0, sequence_N, values_N)[sequence_N]


def mean_of(values_N: "Tensor", sequence_N: "Tensor") -> "Tensor":
    return sum_of(values_N, sequence_N) / sum_of(values_N.new_ones(len(values_N)), sequence_N)


OBJECTIVES = {
    f.__name__: f
    for f in (weighted_sft, sft, importance_sampling, ppo_clip, dppo, ipo, sapo, sapo_sequence, cispo, gspo, gmpo, dft)
}
_WITHOUT_BEHAVIOR = {weighted_sft, sft, dft}
_WITHOUT_ADVANTAGE = {sft, dft}


@dataclass(frozen=True)
class Objective:
    """An objective with its arguments. Calling it returns weights [N] and which of them are clipped, bool [N]."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    function: Callable = field(init=False)

    def __post_init__(self):
        """Raises ValueError for an unknown name, a module without it, or unknown arguments."""
        object.__setattr__(self, "function", _function(self.name))
        object.__setattr__(self, "args", _checked(self.name, self.function, self.args))

    @property
    def of_sequences(self) -> bool:
        """Whether it needs the logps of whole sequences to weigh any of their tokens."""
        return "sequence_N" in inspect.signature(self.function).parameters

    @property
    def needs_behavior(self) -> bool:
        return self.function not in _WITHOUT_BEHAVIOR

    @property
    def is_constant(self) -> bool:
        """Whether the weight does not depend on logp."""
        return self.function in (weighted_sft, sft)

    @property
    def zero_weight_without_advantage(self) -> bool:
        """Whether the weight is always 0 of a token, or, with `of_sequences`, of all tokens of a sequence, of advantage 0."""
        return self.function in set(OBJECTIVES.values()) - _WITHOUT_ADVANTAGE and not self.args.get("tau")

    def __call__(
        self, logp_N: "Tensor", behavior_logp_N: "Tensor", advantages_N: "Tensor", sequence_N: "Tensor"
    ) -> tuple["Tensor", "Tensor"]:
        behavior_logp_N = behavior_logp_N.where(~behavior_logp_N.isnan(), logp_N)
        more = {"sequence_N": sequence_N} if self.of_sequences else {}
        found = self.function(logp_N, behavior_logp_N, advantages_N, **more, **self.args)
        pair = found if isinstance(found, tuple) and len(found) == 2 else (found, logp_N.new_zeros(len(logp_N), dtype=bool))
        for what, x in zip(("weights", "clipped"), pair, strict=True):
            if getattr(x, "shape", None) != logp_N.shape:  # it may not be a tensor
                shape = list(x.shape) if isinstance(x, type(logp_N)) else f"a {type(x).__name__}"
                raise ValueError(f"objective {self.name} gave {what} {shape}; expected {list(logp_N.shape)}")
        return pair[0].detach(), pair[1].bool()


def _function(name: str) -> Callable:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise ValueError(
            f"unknown objective {name!r}: {hint} are {', '.join(OBJECTIVES)}, or your own as my_module:my_function"
        )
    return load(name, "objective")


def _checked(name: str, function: Callable, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, converted to the types that the function's annotations name."""
    parameters = inspect.signature(function).parameters
    takes = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    tensors = [n for n in parameters if n not in takes]
    if len(tensors) not in (3, 4) or "sequence_N" in tensors[:3] or tensors[3:] not in ([], ["sequence_N"]):
        raise ValueError(
            f"objective {name!r} takes ({', '.join(tensors)}); expected (logp_N, behavior_logp_N, advantages_N), "
            f"sequence_N as a fourth or not, and its own arguments behind a *"
        )
    fields = {n: (_annotation(p), ... if p.default is p.empty else p.default) for n, p in takes.items()}
    try:
        read = create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)(**args)
    except ValidationError as error:
        first = error.errors()[0]
        argument, known = first["loc"][0], ", ".join(takes) or "none"
        wrong = {"extra_forbidden": "is not one of its arguments", "missing": "is not given"}.get(
            first["type"], f"is {first['input']!r}: {first['msg']}"
        )
        raise ValueError(f"{argument} of objective {name} {wrong}; it takes {known}") from error
    return {n: getattr(read, n) for n in args}


def _annotation(parameter: inspect.Parameter) -> Any:
    """The type of an argument for pydantic; Any if its annotation cannot be evaluated."""
    unsaid = parameter.annotation is parameter.empty or isinstance(parameter.annotation, str)
    return Any if unsaid else parameter.annotation
