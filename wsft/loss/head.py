"""The chunked loss head: weighted cross-entropy from hidden states that never materializes the full logits.

The logits of N tokens are the largest tensor of a training step, so only a chunk of them exists at a time. For each chunk the
head computes logits, logp and entropy, gets the weight of each token, and overwrites the logits with their gradient,
weight * (softmax - onehot). The gradients of hidden states and head are complete after the forward pass: three matrix products
in all, and a fourth if weights depend on whole sequences, whose logp must be known first. The dense twin is
`wsft.loss.interface.WeightedSFTInterface`. Knows nothing of batches, processes, or the origin of a weight.

Letters: N trained tokens, C tokens of a chunk, R tokens of a block of it, H hidden, V vocabulary, K entries of a teacher.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from wsft.device import can_compile, has_native_matmul, memory_bytes
from wsft.loss.softmax import Factors, LogitShape, Softmax, differentiate_, sum_of_equal_ids

# Bytes of a chunk's logits in float32. On a CPU larger chunks were not faster. Each chunk reads and writes the gradient of
# lm_head once: on a GPU this takes as long as the matrix products of some hundred rows; on a CPU smaller chunks cost up to a
# sixth more.
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_SHARE_GPU = 1 / 32  # of its memory
CHUNK_TOKENS = 256  # at least
# If it is not compiled to one kernel, the softmax runs over blocks of rows of a chunk, so that its float32 temporaries are
# small and on a CPU stay in the cache (2.5 times as fast as over whole chunks).
BLOCKS_PER_CHUNK = 16
# Compute capabilities of GPUs on which `benchmarks/head.py` found `wsft_one_pass` faster than `wsft`. None was measured.
ONE_PASS_ON: frozenset[tuple[int, int]] = frozenset()
# Bytes that are converted to another type at a time: lm_head, if the device has no matrix products in its type; products that
# are accumulated in float32, if it cannot output that type.
CONVERTED_BYTES = 4 * 2**20


class HeadOutput(NamedTuple):
    """Results for N tokens; a tuple, since DeepSpeed's module hooks look for tensors in tuples."""

    loss: torch.Tensor  # scalar, float32 or float64; the only one with a gradient
    logp_N: torch.Tensor  # natural logarithm of softmax(logits / temperature)[target]
    entropy_N: torch.Tensor  # of the same distribution, in nats
    divergence_N: torch.Tensor  # KL(teacher || same distribution) over the teacher's entries, in nats; 0 without a teacher


class TokenLoss(Protocol):
    """A loss per token that is a function of its logp."""

    of_sequences: bool  # whether it needs the logp of all N tokens at once
    weights_N: torch.Tensor | None  # if they do not depend on logp

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, weight = -d loss / d logp) of the tokens `rows`, given their logp; both are constants for autograd."""


class Teacher(NamedTuple):
    """Another model's distribution for each token: K token ids and their probabilities, which need not sum to 1."""

    ids_NK: torch.Tensor  # int64
    probs_NK: torch.Tensor  # 0 for absent entries
    weights_N: torch.Tensor  # weight of the token's divergence in the loss

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
    """The weighted sum of -log p(target): a scalar, differentiable in hidden, lm_head and bias. See `head_loss`."""
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

    Added are -entropy_weights[n] * entropy[n], and the teacher's weights[n] * sum_k q_k * (log q_k - log p_k) over its entries
    k: the forward KL divergence of the teacher's q from the model's p. If `weights` is a `TokenLoss`, its losses replace
    weights * -logp.

    z = hidden @ lm_head.T + bias, then times `logit_scale` (Cohere; Granite's is 1 / logits_scaling), then
    cap * tanh(z / cap) with cap = `final_logit_softcapping` (Gemma 2): the order of the models in `transformers`.

    The matrix products run in the type of `hidden`; softmax, loss, and the sum of lm_head's gradient over chunks in float32
    (float64 where hidden is). The gradient of hidden is computed before the loss is scaled, so it may underflow in float16: use
    bfloat16.

    Args:
        hidden_NH: [N, H], the states that score the targets (the caller shifts). If N is 0 the loss is 0, with a gradient of 0.
        lm_head_VH: [V, H], of the same type.
        targets_N: [N] integers in [0, V). On a GPU an id out of range is a device-side assertion: a check would synchronize.
        weights: [N], constants for autograd. A token of weight 0 adds nothing, also if its hidden state is not finite. Or a
            `TokenLoss`.
        temperature: one number, or one per token [N].
        chunk_tokens: C; None chooses it by vocabulary and device.
        entropy_weights_N: [N], coefficient of each token's entropy bonus.
        bias_V: [V], of the same type as lm_head.
    Raises:
        ValueError: shapes or types that do not match, or a value out of range.
    """
    shape = LogitShape(temperature, 1.0 if logit_scale is None else logit_scale, final_logit_softcapping)
    token_loss = _Weighted(weights.detach()) if isinstance(weights, torch.Tensor) else weights
    terms = _Terms(targets_N, token_loss, entropy_weights_N, teacher)
    _check(hidden_NH, lm_head_VH, bias_V, weights, terms, shape)
    if chunk_tokens is None:
        device = hidden_NH.device
        chunk_tokens = tokens_of_chunk(len(lm_head_VH), memory_bytes(device) if device.type == "cuda" else None)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1, or None to let the head choose")
    inputs = (hidden_NH, lm_head_VH, bias_V)
    # read here, since inside a Function's forward the grad mode is always off
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    terms = terms._replace(targets_N=targets_N.long())
    return HeadOutput(*_ChunkedHead.apply(*inputs, terms, shape, chunk_tokens, wanted))


def tokens_of_chunk(vocab_size: int, gpu_bytes: float | None) -> int:
    """C, for a GPU with `gpu_bytes` of memory, or None for a CPU."""
    chunk_bytes = CHUNK_BYTES_CPU if gpu_bytes is None else CHUNK_SHARE_GPU * gpu_bytes
    return max(CHUNK_TOKENS, int(chunk_bytes / (4 * vocab_size)))


class LossHead(torch.nn.Linear):
    """A Linear that returns the loss of targets, if given, instead of logits. `model.lm_head.__class__` is set to it.

    Under ZeRO-3 a parameter is gathered only inside the forward of the module that owns it, so the loss is computed there: one
    gather per micro-batch for any number of chunks. It adds no state: parameters, names and checkpoints are those of Linear.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        weights: torch.Tensor | TokenLoss | None = None,
        vocab_size: int | None = None,
        **options: Any,
    ) -> torch.Tensor | HeadOutput:
        """Logits [..., V] of hidden [..., H]; with targets and weights, the `head_loss` of hidden [N, H].

        Options: temperature, chunk_tokens, entropy_weights_N, teacher, logit_scale, final_logit_softcapping, see `head_loss`.
        With `vocab_size`, only the first rows of lm_head count: the others are padding.
        """
        if targets_N is None:
            return super().forward(hidden)
        if weights is None:
            raise ValueError("targets came without weights; expected one weight per target (ones for plain SFT)")
        lm_head_VH, bias_V = self.weight, self.bias
        if vocab_size is not None:
            lm_head_VH, bias_V = lm_head_VH[:vocab_size], bias_V if bias_V is None else bias_V[:vocab_size]
        return head_loss(hidden, lm_head_VH, targets_N, weights, bias_V=bias_V, **options)


class _Weighted:
    """The loss weight * -logp with constant weights [N]."""

    of_sequences = False

    def __init__(self, weights_N: torch.Tensor):
        self.weights_N = weights_N

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.weights_N[rows].to(logp.dtype)
        return weights * -logp, weights


class _Known(NamedTuple):
    """A loss that was already computed, [N] each."""

    loss_N: torch.Tensor
    weights_N: torch.Tensor
    of_sequences = False

    def __call__(self, logp: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loss_N[rows], self.weights_N[rows]


class _Terms(NamedTuple):
    """Inputs of the loss for N tokens."""

    targets_N: torch.Tensor
    token_loss: TokenLoss
    entropy_weights_N: torch.Tensor | None
    teacher: Teacher | None

    def without_non_finite(self, hidden_CH: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Hidden states, with those of weight 0 made finite: 0 * NaN is NaN, and would reach all gradients."""
        if not isinstance(self.token_loss, _Weighted) or self.entropy_weights_N is not None or self.teacher:
            return hidden_CH
        zero_weight_C1 = (self.token_loss.weights_N[chunk] == 0).unsqueeze(1)
        return torch.where(zero_weight_C1, hidden_CH.nan_to_num(0.0, 0.0, 0.0), hidden_CH)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, lm_head_VH, bias_V, terms, shape, chunk_tokens, wanted):
        N, exact = len(hidden_NH), torch.promote_types(hidden_NH.dtype, torch.float32)
        chunks = max(1, math.ceil(N / chunk_tokens))
        chunk_tokens = max(1, math.ceil(N / chunks))  # of one size: a small last chunk would be inefficient
        product = hidden_NH.dtype if has_native_matmul(hidden_NH.device, hidden_NH.dtype) else exact
        wants_hidden, wants_lm_head, wants_bias = wanted
        grad_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_VH = torch.zeros_like(lm_head_VH, dtype=exact) if wants_lm_head else None
        grad_V = torch.zeros_like(bias_V, dtype=exact) if wants_bias else None
        if isinstance(shape.temperature, torch.Tensor):
            shape = shape._replace(temperature=shape.temperature.detach().to(exact))
        found_4N = torch.zeros(4, N, dtype=exact, device=hidden_NH.device)  # loss, logp, entropy, divergence
        # a row more than is used, since compiled functions would be specialized to blocks that are the whole of their tensor
        buffer_CV = hidden_NH.new_empty(chunk_tokens + 1, len(lm_head_VH), dtype=product)
        block_rows = math.ceil(chunk_tokens / (1 if can_compile(hidden_NH.device) else BLOCKS_PER_CHUNK))

        def blocks(chunk: slice, hidden_CH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
            """Compute the chunk's logits into the buffer, block by block."""
            for part, lm_head_PH in _parts(lm_head_VH, product):
                out_CP = buffer_CV[: len(hidden_CH), part]
                if bias_V is None:
                    torch.mm(hidden_CH, lm_head_PH.T, out=out_CP)
                else:
                    torch.addmm(bias_V[part].to(product), hidden_CH, lm_head_PH.T, out=out_CP)
            for rows in _slices(chunk.start, chunk.stop, block_rows):
                yield rows, buffer_CV[rows.start - chunk.start : rows.stop - chunk.start]

        if terms.token_loss.of_sequences:
            for chunk in _slices(0, N, chunk_tokens):
                for rows, block_RV in blocks(chunk, hidden_NH[chunk].to(product)):
                    found_4N[1, rows] = Softmax.of(block_RV, terms.targets_N[rows, None], shape.of_rows(rows)).logp_RJ[:, 0]
            terms = terms._replace(token_loss=_Known(*terms.token_loss(found_4N[1], slice(0, N))))

        for chunk in _slices(0, N, chunk_tokens):
            hidden_CH = terms.without_non_finite(hidden_NH[chunk], chunk).to(product)
            for rows, block_RV in blocks(chunk, hidden_CH):
                found_4N[:, rows] = _to_gradient_(block_RV, rows, terms, shape.of_rows(rows), any(wanted))
            grad_CV = buffer_CV[: len(hidden_CH)]  # with respect to the products that it overwrites
            if wants_hidden:
                parts = (grad_CV[:, part] @ lm_head_PH for part, lm_head_PH in _parts(lm_head_VH, product))
                grad_NH[chunk] = functools.reduce(torch.Tensor.add_, parts)
            if wants_lm_head:
                _add_product_(grad_VH, grad_CV.T, hidden_CH)
            if wants_bias:
                grad_V += grad_CV.sum(0, dtype=exact)

        ctx.gradients, ctx.dtype = (grad_NH, grad_VH, grad_V), hidden_NH.dtype
        loss_N, *others = found_4N.unbind()
        ctx.mark_non_differentiable(*others)
        return loss_N.sum(), *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the chunked head frees its gradients in the first backward; run its forward again")
        gradients, ctx.gradients = ctx.gradients, None
        # also scaled by 1, since reading grad_loss would synchronize
        return *(g if g is None else _scaled(g, grad_loss, ctx.dtype) for g in gradients), None, None, None, None


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * scale in another type: in place, or read and written once."""
    if gradient.dtype == dtype:
        return gradient.mul_(scale)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _to_gradient_(logits_RV: torch.Tensor, rows: slice, terms: _Terms, shape: LogitShape, wants_gradient: bool) -> torch.Tensor:
    """Loss, logp, entropy and divergence [4, R] of rows of products, which are overwritten with the gradient of the loss.

    With p = softmax(z), the gradient of -logp is p - onehot; that of -entropy p * (log p + entropy) = p * (z - mean z); that of
    the divergence sum(q) * p - q.
    """
    exact = torch.promote_types(logits_RV.dtype, torch.float32)
    ids_RJ, bonus_R1 = terms.targets_N[rows, None], None
    if terms.entropy_weights_N is not None:
        bonus_R1 = terms.entropy_weights_N[rows, None].to(exact)
    if terms.teacher:
        ids_RK, q_RK, strength_R1 = terms.teacher.of_rows(rows, exact)
        ids_RJ = torch.cat([ids_RJ, ids_RK], dim=1)

    def factors(weights_R: torch.Tensor) -> Factors:
        mass_R1 = onehot_RJ = weights_R.unsqueeze(1).to(exact)
        if terms.teacher:
            onehot_RJ = sum_of_equal_ids(ids_RJ, torch.cat([mass_R1, strength_R1 * q_RK], dim=1))
            mass_R1 = mass_R1 + strength_R1 * q_RK.sum(1, keepdim=True)
        return Factors(ids_RJ, onehot_RJ, mass_R1, bonus_R1)

    known_N = terms.token_loss.weights_N if wants_gradient and runs_in_one_pass(logits_RV) else None
    if known_N is not None:
        from wsft.loss import one_pass  # imports triton

        softmax = one_pass.differentiate_(logits_RV, factors(known_N[rows]), shape)
    else:
        softmax = Softmax.of(logits_RV, ids_RJ, shape)
    logp_R1, entropy_R1 = softmax.logp_RJ[:, :1], softmax.total_R1.log() - softmax.mean_z_R1
    loss_R, weights_R = terms.token_loss(logp_R1.squeeze(1), rows)
    if wants_gradient and known_N is None:
        differentiate_(logits_RV, softmax, factors(weights_R), shape)
    loss_R1, divergence_R1 = loss_R.unsqueeze(1), torch.zeros_like(logp_R1)
    if bonus_R1 is not None:
        loss_R1 = loss_R1 - bonus_R1 * entropy_R1
    if terms.teacher:
        divergence_R1 = (torch.xlogy(q_RK, q_RK) - q_RK * softmax.logp_RJ[:, 1:]).sum(1, keepdim=True)
        loss_R1 = loss_R1 + strength_R1 * divergence_R1
    return torch.cat([loss_R1, logp_R1, entropy_R1, divergence_R1], dim=1).T


def runs_in_one_pass(logits_RV: torch.Tensor) -> bool:
    """Whether the kernel of one_pass.py is used: where it was measured to be faster than the two passes of softmax.py."""
    device = logits_RV.device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ONE_PASS_ON and logits_RV.dtype.itemsize <= 4


def _parts(lm_head_VH: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """lm_head in a type with native matrix products: itself, or converted one block of rows at a time."""
    V, H = lm_head_VH.shape
    size = V if lm_head_VH.dtype == dtype else max(1, CONVERTED_BYTES // (4 * H))
    return ((part, lm_head_VH[part].to(dtype)) for part in _slices(0, V, size))


def _add_product_(sum_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor) -> None:
    """sum += left @ right in the type of the sum; if the device cannot, a block of rows at a time."""
    if left_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    elif sum_VH.device.type == "cuda":  # neither on a CPU nor, before torch 2.13, on the meta device
        torch.addmm(sum_VH, left_VC, right_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        for part in _slices(0, len(sum_VH), max(1, CONVERTED_BYTES // (4 * right_CH.shape[1]))):
            sum_VH[part] += left_VC[part] @ right_CH


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _check(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    weights: torch.Tensor | TokenLoss,
    terms: _Terms,
    shape: LogitShape,
) -> None:
    """ValueError for invalid arguments. Values are checked on a CPU only, since on a GPU that would synchronize."""
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
