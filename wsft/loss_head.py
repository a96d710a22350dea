"""The chunked loss head: weighted cross-entropy from hidden states, without ever holding the logits.

The logits of N tokens are the largest tensor of a training step, so they exist one chunk at a time: the head forms a chunk of
them, reads logp and entropy, and turns the same buffer into its own gradient, weight * (softmax - onehot). The gradients of
hidden states and head are ready when the forward pass is: three matrix products in all. The dense twin is
`wsft.loss.WeightedSFTInterface`. Knows nothing of batches, processes, or where a weight came from.

Letters: N trained tokens, C tokens of a chunk, R tokens of a block of it, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

# The size of a chunk's logits, were they float32. On a CPU larger ones were no faster; a GPU needs more rows to be filled.
CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_GPU = 512 * 2**20
# The softmax walks over a chunk in blocks of rows, so that its float32 temporaries are small beside the chunk, and on a CPU
# stay in the cache (2.5 times as fast as whole chunks).
BLOCKS_PER_CHUNK = 16


class HeadOutput(NamedTuple):
    """What the head says of N tokens; a tuple, so that DeepSpeed's module hooks find the tensors in it."""

    loss: torch.Tensor  # sum of weight * -logp: scalar, float32 or float64, the one that carries gradients
    logp_N: torch.Tensor  # natural logarithm of softmax(logits / temperature)[target]
    entropy_N: torch.Tensor  # of the same distribution, in nats


def weighted_linear_cross_entropy(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    chunk_tokens: int | None = None,
    *,
    bias_V: torch.Tensor | None = None,
    logit_scale: float | None = None,
    final_logit_softcapping: float | None = None,
) -> torch.Tensor:
    """The weighted sum of -log p(target): a scalar, differentiable in hidden, lm_head and bias. All is as in `head_loss`."""
    options = dict(bias_V=bias_V, logit_scale=logit_scale, final_logit_softcapping=final_logit_softcapping)
    return head_loss(hidden_NH, lm_head_VH, targets_N, weights_N, temperature, chunk_tokens, **options).loss


def head_loss(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    chunk_tokens: int | None = None,
    *,
    bias_V: torch.Tensor | None = None,
    logit_scale: float | None = None,
    final_logit_softcapping: float | None = None,
) -> HeadOutput:
    """sum_n weights[n] * -log_softmax(z_n / temperature)[targets[n]], with logp and entropy of each token.

    z = hidden @ lm_head.T + bias, then times `logit_scale` (Cohere; Granite's is 1 / logits_scaling), then
    cap * tanh(z / cap) with cap = `final_logit_softcapping` (Gemma 2): the order of the models in `transformers`.

    The matrix products run in the type of `hidden`; softmax, loss, and the sum of lm_head's gradient over chunks in float32
    (float64 where hidden is). The gradients are made before the loss is scaled, so float16 ones may vanish: use bfloat16.

    Args:
        hidden_NH: [N, H], the states that score the targets (the shift is the caller's). N may be 0: a loss of 0, connected.
        lm_head_VH: [V, H], of the same type.
        targets_N: [N] integers in [0, V). On a GPU an id out of range is an assertion of the device: to look would be to wait.
        weights_N: [N] constants, no gradient flows to them. A token of weight 0 adds nothing; its hidden state is read as 0
            where it is not finite.
        temperature: one number, or one per token [N].
        chunk_tokens: C; None chooses it by vocabulary and device.
        bias_V: [V], of the same type as lm_head.
    Raises:
        ValueError: shapes or types that do not fit, or a value out of its range.
    """
    shape = _LogitShape(temperature, 1.0 if logit_scale is None else logit_scale, final_logit_softcapping)
    _check(hidden_NH, lm_head_VH, bias_V, targets_N, weights_N, shape)
    if chunk_tokens is None:
        chunk_bytes = CHUNK_BYTES_CPU if hidden_NH.device.type == "cpu" else CHUNK_BYTES_GPU
        chunk_tokens = max(1, chunk_bytes // (4 * len(lm_head_VH)))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1, or None to let the head choose")
    inputs = (hidden_NH, lm_head_VH, bias_V)
    # asked here: inside a Function's forward the grad mode is always off, and ctx.needs_input_grad does not know of it
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return HeadOutput(*_ChunkedHead.apply(*inputs, targets_N.long(), weights_N, shape, chunk_tokens, wanted))


class LossHead(torch.nn.Linear):
    """What `model.lm_head.__class__` becomes: a Linear that, given targets, returns their loss instead of logits.

    Under ZeRO-3 a parameter is whole only inside the forward of the module that owns it, so the loss is computed there: one
    gather a micro-batch, however many chunks. It adds no state: parameters, names and checkpoints are those of the Linear.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        weights_N: torch.Tensor | None = None,
        **options: float | torch.Tensor | None,
    ) -> torch.Tensor | HeadOutput:
        """Logits [..., V] of hidden [..., H] as ever; with targets and weights [N], the `head_loss` of hidden [N, H].

        Options: temperature, chunk_tokens, logit_scale, final_logit_softcapping, as there.
        """
        if targets_N is None:
            return super().forward(hidden)
        if weights_N is None:
            raise ValueError("targets came without weights; expected one weight per target (ones for plain SFT)")
        return head_loss(hidden, self.weight, targets_N, weights_N, bias_V=self.bias, **options)


class _LogitShape(NamedTuple):
    """What lies between the products hidden @ lm_head.T + bias and the softmax."""

    temperature: float | torch.Tensor  # one number, or [N]
    scale: float
    softcap: float | None

    def of_rows(self, rows: slice) -> _LogitShape:
        one_number = not isinstance(self.temperature, torch.Tensor)
        return self if one_number else self._replace(temperature=self.temperature[rows].unsqueeze(1))


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, lm_head_VH, bias_V, targets_N, weights_N, shape, chunk_tokens, wanted):
        N, exact = len(hidden_NH), torch.promote_types(hidden_NH.dtype, torch.float32)
        wants_hidden, wants_lm_head, wants_bias = wanted
        grad_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_VH = torch.zeros_like(lm_head_VH, dtype=exact) if wants_lm_head else None
        grad_V = torch.zeros_like(bias_V, dtype=exact) if wants_bias else None
        weights_N = weights_N.detach().to(exact)
        if isinstance(shape.temperature, torch.Tensor):
            shape = shape._replace(temperature=shape.temperature.detach().to(exact))
        logp_N, entropy_N = torch.empty_like(weights_N), torch.empty_like(weights_N)
        buffer_CV = hidden_NH.new_empty(min(chunk_tokens, N), len(lm_head_VH))

        for chunk in _slices(0, N, chunk_tokens):
            # 0 * NaN is NaN, and would reach every gradient through the products below
            silent_C1 = (weights_N[chunk] == 0).unsqueeze(1)
            hidden_CH = torch.where(silent_C1, hidden_NH[chunk].nan_to_num(0.0, 0.0, 0.0), hidden_NH[chunk])
            logits_CV = buffer_CV[: len(hidden_CH)]
            if bias_V is None:
                torch.mm(hidden_CH, lm_head_VH.T, out=logits_CV)
            else:
                torch.addmm(bias_V, hidden_CH, lm_head_VH.T, out=logits_CV)

            for rows in _slices(chunk.start, chunk.stop, math.ceil(len(buffer_CV) / BLOCKS_PER_CHUNK)):
                block_RV = logits_CV[rows.start - chunk.start : rows.stop - chunk.start]
                logp_N[rows], entropy_N[rows], grad_RV = _softmax_rows(
                    block_RV.to(exact), targets_N[rows], weights_N[rows], shape.of_rows(rows), any(wanted)
                )
                if any(wanted):
                    block_RV.copy_(grad_RV)

            # logits_CV now holds the gradient with respect to what it held
            if wants_hidden:
                torch.mm(logits_CV, lm_head_VH, out=grad_NH[chunk])
            if wants_lm_head and logits_CV.dtype == exact:
                grad_VH.addmm_(logits_CV.T, hidden_CH)
            elif wants_lm_head:
                grad_VH += logits_CV.T @ hidden_CH
            if wants_bias:
                grad_V += logits_CV.sum(0, dtype=exact)

        ctx.gradients = (
            grad_NH,
            grad_VH.to(lm_head_VH.dtype) if wants_lm_head else None,
            grad_V.to(bias_V.dtype) if wants_bias else None,
        )
        ctx.mark_non_differentiable(logp_N, entropy_N)
        return (weights_N * -logp_N).sum(), logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _logp, _entropy):
        if ctx.gradients is None:
            raise RuntimeError("the chunked head gives its gradients away in the first backward; run its forward again")
        gradients, ctx.gradients = ctx.gradients, None
        # scaled even by 1: to look at grad_loss would be to wait for the device
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None, None


def _softmax_rows(
    z: torch.Tensor, targets_R: torch.Tensor, weights_R: torch.Tensor, shape: _LogitShape, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """logp [R], entropy [R], and the gradient [R, V] of sum(weights * -logp), for rows z [R, V] = hidden @ lm_head.T + bias.

    Overwrites z, and has one more temporary of its size (two with a softcap).
    """
    temperature, scale, softcap = shape
    if softcap is None:
        z.mul_(scale / temperature)
    else:
        z.mul_(scale / softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(softcap / temperature)
    z.sub_(z.amax(1, keepdim=True))
    exp = z.exp()
    total_R1 = exp.sum(1, keepdim=True)
    targets_R1 = targets_R.unsqueeze(1)
    logp_R1 = z.gather(1, targets_R1) - total_R1.log()
    mean_z_R1 = z.mul_(exp).sum(1, keepdim=True) / total_R1
    entropy_R1 = total_R1.log() - mean_z_R1
    if not wants_gradient:
        return logp_R1.squeeze(1), entropy_R1.squeeze(1), None

    steepness_R1 = weights_R.unsqueeze(1) * (scale / temperature)
    grad = exp.mul_(steepness_R1 / total_R1).scatter_add_(1, targets_R1, -steepness_R1)
    if softcap is not None:
        grad.mul_(slope)
    return logp_R1.squeeze(1), entropy_R1.squeeze(1), grad


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _check(
    hidden_NH: torch.Tensor,
    lm_head_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    shape: _LogitShape,
) -> None:
    """Refuse what does not fit. Values are looked at on a CPU only: on a GPU that would wait for the device."""
    if hidden_NH.ndim != 2 or lm_head_VH.ndim != 2 or hidden_NH.shape[1] != lm_head_VH.shape[1]:
        found = f"hidden {list(hidden_NH.shape)} and lm_head {list(lm_head_VH.shape)}"
        raise ValueError(f"{found} do not fit; expected [N, H] and [V, H]")
    N, V = len(hidden_NH), len(lm_head_VH)
    per_token = {"targets": targets_N, "weights": weights_N}
    if isinstance(shape.temperature, torch.Tensor):
        per_token["temperature"] = shape.temperature
    for name, tensor in per_token.items():
        if tensor.shape != (N,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{N}], one per row of hidden")
    if bias_V is not None and bias_V.shape != (V,):
        raise ValueError(f"bias has shape {list(bias_V.shape)}; expected [{V}], one per row of lm_head")
    dtypes = {x.dtype for x in (hidden_NH, lm_head_VH, bias_V) if x is not None}
    if len(dtypes) > 1 or not hidden_NH.is_floating_point():
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"hidden, lm_head and bias are of {found}; expected one floating type for all")
    if targets_N.is_floating_point() or targets_N.is_complex() or targets_N.dtype == torch.bool:
        raise ValueError(f"targets are of {targets_N.dtype}; expected integers")
    if shape.softcap is not None and not shape.softcap > 0:
        raise ValueError(f"final_logit_softcapping is {shape.softcap}; expected a number above 0, or None")
    on_cpu = hidden_NH.device.type == "cpu"
    if on_cpu and N and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < V:
        found = f"{int(targets_N.min())} to {int(targets_N.max())}"
        raise ValueError(f"targets run from {found}; expected token ids in [0, {V}): give the trained tokens only")
    if (on_cpu or "temperature" not in per_token) and not (torch.as_tensor(shape.temperature) > 0).all():
        raise ValueError(f"temperature is {shape.temperature}; expected above 0")
