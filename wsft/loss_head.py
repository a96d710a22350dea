"""The chunked loss head: weighted cross-entropy from hidden states, without ever holding the logits.

The logits of N tokens are the largest tensor of a training step, so they exist one chunk at a time: the head forms a chunk of
them, reads logp and entropy, asks what each token weighs, and turns the same buffer into its own gradient, as
weight * (softmax - onehot). The gradients of hidden states and head are ready when the forward pass is: three matrix products
in all; a fourth where weights depend on whole sequences, whose logp must be known first. The dense twin is
`wsft.loss.WeightedSFTInterface`. Knows nothing of batches, processes, or where a weight came from.

Letters: N trained tokens, C tokens of a chunk, R tokens of a block of it, H hidden, V vocabulary, K entries of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

# The size of a chunk's logits, were they float32. On a CPU larger ones were no faster; a GPU needs more rows to be filled.
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_GPU = 512 * 2**20
# The softmax walks over a chunk in blocks of rows, so that its float32 temporaries are small beside the chunk, and on a CPU
# stay in the cache (2.5 times as fast as whole chunks).
BLOCKS_PER_CHUNK = 16


class HeadOutput(NamedTuple):
    """What the head says of N tokens; a tuple, so that DeepSpeed's module hooks find the tensors in it."""

    loss: torch.Tensor  # scalar, float32 or float64, the one that carries gradients
    logp_N: torch.Tensor  # natural logarithm of softmax(logits / temperature)[target]
    entropy_N: torch.Tensor  # of the same distribution, in nats
    divergence_N: torch.Tensor  # KL(teacher || same distribution) over the teacher's entries, in nats; 0 without a teacher


class TokenLoss(Protocol):
    """A loss per token that depends on the model through its logp alone."""

    of_sequences: bool  # whether it wants the logp of all N tokens at once

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, weight = -d loss / d logp) of the tokens `rows`, from their logp; no gradient flows through either."""


class Teacher(NamedTuple):
    """What another model says in the place of each token: K token ids and their probabilities, which need not sum to 1."""

    ids_NK: torch.Tensor  # int64
    probs_NK: torch.Tensor  # 0 for an entry that is not there
    weights_N: torch.Tensor  # of the token's divergence in the loss

    def of_rows(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.ids_NK[rows], self.probs_NK[rows].to(dtype), self.weights_N[rows].unsqueeze(1).to(dtype)


def weighted_linear_cross_entropy(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    chunk_tokens: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The weighted sum of -log p(target): a scalar, differentiable in hidden, lm_head and bias. All is as in `head_loss`."""
    return head_loss(hidden_NH, lm_head_VH, targets_N, weights_N, temperature, chunk_tokens, **options).loss


def head_loss(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights: torch.Tensor | TokenLoss,
    temperature: float | torch.Tensor = 1.0,
    chunk_tokens: int | None = None,
    *,
    entropy_weights_N: torch.Tensor | None = None,
    teacher: Teacher | None = None,
    bias_V: torch.Tensor | None = None,
    logit_scale: float | None = None,
    final_logit_softcapping: float | None = None,
) -> HeadOutput:
    """sum_n weights[n] * -log_softmax(z_n / temperature)[targets[n]], with logp and entropy of each token.

    To it are added -entropy_weights[n] * entropy[n], and the teacher's weights[n] * sum_k q_k * (log q_k - log p_k) over its
    entries k: the forward KL divergence of the teacher's q from the model's p. Where `weights` is a `TokenLoss`, its losses
    take the place of weights * -logp.

    z = hidden @ lm_head.T + bias, then times `logit_scale` (Cohere; Granite's is 1 / logits_scaling), then
    cap * tanh(z / cap) with cap = `final_logit_softcapping` (Gemma 2): the order of the models in `transformers`.

    The matrix products run in the type of `hidden`; softmax, loss, and the sum of lm_head's gradient over chunks in float32
    (float64 where hidden is). The gradients are made before the loss is scaled, so float16 ones may vanish: use bfloat16.

    Args:
        hidden_NH: [N, H], the states that score the targets (the shift is the caller's). N may be 0: a loss of 0, connected.
        lm_head_VH: [V, H], of the same type.
        targets_N: [N] integers in [0, V). On a GPU an id out of range is an assertion of the device: to look would be to wait.
        weights: [N] constants, no gradient flows to them; a token of weight 0 adds nothing, and its hidden state is read as 0
            where it is not finite. Or a `TokenLoss`.
        temperature: one number, or one per token [N].
        chunk_tokens: C; None chooses it by vocabulary and device.
        entropy_weights_N: [N], of each token's entropy as a bonus.
        bias_V: [V], of the same type as lm_head.
    Raises:
        ValueError: shapes or types that do not fit, or a value out of its range.
    """
    shape = _LogitShape(temperature, 1.0 if logit_scale is None else logit_scale, final_logit_softcapping)
    token_loss = _Weighted(weights.detach()) if isinstance(weights, torch.Tensor) else weights
    terms = _Terms(targets_N, token_loss, entropy_weights_N, teacher)
    _check(hidden_NH, lm_head_VH, bias_V, weights, terms, shape)
    if chunk_tokens is None:
        chunk_bytes = CHUNK_BYTES_CPU if hidden_NH.device.type == "cpu" else CHUNK_BYTES_GPU
        chunk_tokens = max(1, chunk_bytes // (4 * len(lm_head_VH)))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1, or None to let the head choose")
    inputs = (hidden_NH, lm_head_VH, bias_V)
    # asked here: inside a Function's forward the grad mode is always off, and ctx.needs_input_grad does not know of it
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    terms = terms._replace(targets_N=targets_N.long())
    return HeadOutput(*_ChunkedHead.apply(*inputs, terms, shape, chunk_tokens, wanted))


class LossHead(torch.nn.Linear):
    """What `model.lm_head.__class__` becomes: a Linear that, given targets, returns their loss instead of logits.

    Under ZeRO-3 a parameter is whole only inside the forward of the module that owns it, so the loss is computed there: one
    gather a micro-batch, however many chunks. It adds no state: parameters, names and checkpoints are those of the Linear.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        weights: torch.Tensor | TokenLoss | None = None,
        **options: Any,
    ) -> torch.Tensor | HeadOutput:
        """Logits [..., V] of hidden [..., H] as ever; with targets and weights, the `head_loss` of hidden [N, H].

        Options: temperature, chunk_tokens, entropy_weights_N, teacher, logit_scale, final_logit_softcapping, as there.
        """
        if targets_N is None:
            return super().forward(hidden)
        if weights is None:
            raise ValueError("targets came without weights; expected one weight per target (ones for plain SFT)")
        return head_loss(hidden, self.weight, targets_N, weights, bias_V=self.bias, **options)


class _LogitShape(NamedTuple):
    """What lies between the products hidden @ lm_head.T + bias and the softmax."""

    temperature: float | torch.Tensor  # one number, or [N]
    scale: float
    softcap: float | None

    def of_rows(self, rows: slice) -> _LogitShape:
        one_number = not isinstance(self.temperature, torch.Tensor)
        return self if one_number else self._replace(temperature=self.temperature[rows].unsqueeze(1))

    def apply(self, z: torch.Tensor) -> torch.Tensor | None:
        """Make of the products [R, V], in place, what the softmax is taken of; the slope of the softcap, where there is one."""
        if self.softcap is None:
            z.mul_(self.scale / self.temperature)
            return None
        z.mul_(self.scale / self.softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(self.softcap / self.temperature)
        return slope


class _Weighted:
    """The loss weight * -logp, for constant weights [N]."""

    of_sequences = False

    def __init__(self, weights_N: torch.Tensor):
        self.weights_N = weights_N

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.weights_N[rows].to(logp.dtype)
        return weights * -logp, weights


class _Known(NamedTuple):
    """A loss whose values are there already, [N] each."""

    loss_N: torch.Tensor
    weights_N: torch.Tensor
    of_sequences = False

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loss_N[rows], self.weights_N[rows]


class _Terms(NamedTuple):
    """What the loss is made of, for N tokens."""

    targets_N: torch.Tensor
    token_loss: TokenLoss
    entropy_weights_N: torch.Tensor | None
    teacher: Teacher | None

    def audible(self, hidden_CH: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Hidden states, made finite where the weight is 0: 0 * NaN is NaN, and would reach every gradient."""
        if not isinstance(self.token_loss, _Weighted) or self.entropy_weights_N is not None or self.teacher:
            return hidden_CH
        silent_C1 = (self.token_loss.weights_N[chunk] == 0).unsqueeze(1)
        return torch.where(silent_C1, hidden_CH.nan_to_num(0.0, 0.0, 0.0), hidden_CH)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, lm_head_VH, bias_V, terms, shape, chunk_tokens, wanted):
        N, exact = len(hidden_NH), torch.promote_types(hidden_NH.dtype, torch.float32)
        wants_hidden, wants_lm_head, wants_bias = wanted
        grad_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_VH = torch.zeros_like(lm_head_VH, dtype=exact) if wants_lm_head else None
        grad_V = torch.zeros_like(bias_V, dtype=exact) if wants_bias else None
        if isinstance(shape.temperature, torch.Tensor):
            shape = shape._replace(temperature=shape.temperature.detach().to(exact))
        found_4N = torch.zeros(4, N, dtype=exact, device=hidden_NH.device)  # loss, logp, entropy, divergence
        buffer_CV = hidden_NH.new_empty(min(chunk_tokens, N), len(lm_head_VH))

        def logits(chunk: slice, hidden_CH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
            """The chunk's, in the buffer; a block of rows at a time."""
            logits_CV = buffer_CV[: len(hidden_CH)]
            if bias_V is None:
                torch.mm(hidden_CH, lm_head_VH.T, out=logits_CV)
            else:
                torch.addmm(bias_V, hidden_CH, lm_head_VH.T, out=logits_CV)
            for rows in _slices(chunk.start, chunk.stop, math.ceil(len(buffer_CV) / BLOCKS_PER_CHUNK)):
                yield rows, logits_CV[rows.start - chunk.start : rows.stop - chunk.start]

        if terms.token_loss.of_sequences:
            for chunk in _slices(0, N, chunk_tokens):
                for rows, block_RV in logits(chunk, hidden_NH[chunk]):
                    found_4N[1, rows] = _logp(block_RV.to(exact), terms.targets_N[rows], shape.of_rows(rows))
            terms = terms._replace(token_loss=_Known(*terms.token_loss(found_4N[1], slice(0, N))))

        for chunk in _slices(0, N, chunk_tokens):
            hidden_CH = terms.audible(hidden_NH[chunk], chunk)
            for rows, block_RV in logits(chunk, hidden_CH):
                found_4N[:, rows], grad_RV = _terms_of_rows(block_RV.to(exact), rows, terms, shape.of_rows(rows), any(wanted))
                if any(wanted):
                    block_RV.copy_(grad_RV)
            grad_CV = buffer_CV[: len(hidden_CH)]  # with respect to the logits that stood there
            if wants_hidden:
                torch.mm(grad_CV, lm_head_VH, out=grad_NH[chunk])
            if wants_lm_head and grad_CV.dtype == exact:
                grad_VH.addmm_(grad_CV.T, hidden_CH)
            elif wants_lm_head:
                grad_VH += grad_CV.T @ hidden_CH
            if wants_bias:
                grad_V += grad_CV.sum(0, dtype=exact)

        ctx.gradients = (
            grad_NH,
            grad_VH.to(lm_head_VH.dtype) if wants_lm_head else None,
            grad_V.to(bias_V.dtype) if wants_bias else None,
        )
        loss_N, *others = found_4N.unbind()
        ctx.mark_non_differentiable(*others)
        return loss_N.sum(), *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the chunked head gives its gradients away in the first backward; run its forward again")
        gradients, ctx.gradients = ctx.gradients, None
        # scaled even by 1: to look at grad_loss would be to wait for the device
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None


def _terms_of_rows(
    z: torch.Tensor, rows: slice, terms: _Terms, shape: _LogitShape, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss, logp, entropy and divergence [4, R] of rows z [R, V] = hidden @ lm_head.T + bias, and the loss's gradient [R, V].

    Overwrites z, and has one more temporary of its size (two with a softcap). With p = softmax(z), the gradient of -logp is
    p - onehot; that of -entropy p * (log p + entropy) = p * (z - mean z); that of the divergence sum(q) * p - q.
    """
    slope = shape.apply(z)
    z.sub_(z.amax(1, keepdim=True))
    exp = z.exp()
    total_R1 = exp.sum(1, keepdim=True)
    targets_R1 = terms.targets_N[rows].unsqueeze(1)
    logp_R1 = z.gather(1, targets_R1) - total_R1.log()
    if terms.teacher:
        ids_RK, q_RK, strength_R1 = terms.teacher.of_rows(rows, z.dtype)
        log_p_RK = z.gather(1, ids_RK) - total_R1.log()
        divergence_R1 = (torch.xlogy(q_RK, q_RK) - q_RK * log_p_RK).sum(1, keepdim=True)
    mean_z_R1 = z.mul_(exp).sum(1, keepdim=True) / total_R1
    entropy_R1 = total_R1.log() - mean_z_R1

    loss_R1, weights_R1 = (x.unsqueeze(1) for x in terms.token_loss(logp_R1.squeeze(1), rows))
    mass_R1 = weights_R1
    if terms.entropy_weights_N is not None:
        bonus_R1 = terms.entropy_weights_N[rows].unsqueeze(1).to(z.dtype)
        loss_R1, mass_R1 = loss_R1 - bonus_R1 * entropy_R1, mass_R1 - bonus_R1 * mean_z_R1
    if terms.teacher:
        loss_R1, mass_R1 = loss_R1 + strength_R1 * divergence_R1, mass_R1 + strength_R1 * q_RK.sum(1, keepdim=True)
    else:
        divergence_R1 = torch.zeros_like(logp_R1)
    found_4R = torch.cat([loss_R1, logp_R1, entropy_R1, divergence_R1], dim=1).T
    if not wants_gradient:
        return found_4R, None

    steepness = shape.scale / shape.temperature
    grad = exp.mul_(steepness * mass_R1 / total_R1).scatter_add_(1, targets_R1, -steepness * weights_R1)
    if terms.entropy_weights_N is not None:
        grad.addcmul_(z, steepness * bonus_R1 / total_R1)  # z holds z * exp
    if terms.teacher:
        grad.scatter_add_(1, ids_RK, -steepness * strength_R1 * q_RK)
    return found_4R, grad if slope is None else grad.mul_(slope)


def _logp(z: torch.Tensor, targets_R: torch.Tensor, shape: _LogitShape) -> torch.Tensor:
    """Of the targets alone [R]. Overwrites z [R, V]."""
    shape.apply(z)
    return z.gather(1, targets_R.unsqueeze(1)).squeeze(1) - z.logsumexp(1)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _check(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    weights: torch.Tensor | TokenLoss,
    terms: _Terms,
    shape: _LogitShape,
) -> None:
    """Refuse what does not fit. Values are looked at on a CPU only: on a GPU that would wait for the device."""
    if hidden_NH.ndim != 2 or lm_head_VH.ndim != 2 or hidden_NH.shape[1] != lm_head_VH.shape[1]:
        found = f"hidden {list(hidden_NH.shape)} and lm_head {list(lm_head_VH.shape)}"
        raise ValueError(f"{found} do not fit; expected [N, H] and [V, H]")
    N, V = len(hidden_NH), len(lm_head_VH)
    _check_per_token(
        {
            "targets": terms.targets_N,
            "weights": weights,
            "temperature": shape.temperature,
            "entropy_weights": terms.entropy_weights_N,
            "teacher's weights": terms.teacher and terms.teacher.weights_N,
        },
        N,
    )
    if bias_V is not None and bias_V.shape != (V,):
        raise ValueError(f"bias has shape {list(bias_V.shape)}; expected [{V}], one per row of lm_head")
    dtypes = {x.dtype for x in (hidden_NH, lm_head_VH, bias_V) if x is not None}
    if len(dtypes) > 1 or not hidden_NH.is_floating_point():
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"hidden, lm_head and bias are of {found}; expected one floating type for all")
    if shape.softcap is not None and not shape.softcap > 0:
        raise ValueError(f"final_logit_softcapping is {shape.softcap}; expected a number above 0, or None")
    _check_ids("targets", terms.targets_N, V)
    if terms.teacher:
        ids_NK, probs_NK, _ = terms.teacher
        if ids_NK.ndim != 2 or len(ids_NK) != N or probs_NK.shape != ids_NK.shape:
            found = f"ids {list(ids_NK.shape)} and probs {list(probs_NK.shape)}"
            raise ValueError(f"the teacher has {found}; expected [{N}, K] for both")
        _check_ids("the teacher's ids", ids_NK, V)
    per_token = isinstance(shape.temperature, torch.Tensor)
    if (not per_token or hidden_NH.device.type == "cpu") and not (torch.as_tensor(shape.temperature) > 0).all():
        raise ValueError(f"temperature is {shape.temperature}; expected above 0")


def _check_per_token(values: dict[str, Any], N: int) -> None:
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.shape != (N,):
            raise ValueError(f"{name} has shape {list(value.shape)}; expected [{N}], one per row of hidden")


def _check_ids(name: str, ids: torch.Tensor, V: int) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} are of {ids.dtype}; expected integers")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
        raise ValueError(
            f"{name} run from {int(ids.min())} to {int(ids.max())}; expected token ids in [0, {V}): give trained tokens only"
        )
