"""The chunked head compared with its dense twin, the formula under autograd."""

import functools
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from wsft import WeightedSFTInterface
from wsft.loss import head as loss_head
from wsft.loss import softmax
from wsft.loss.head import LossHead, Teacher, head_loss, weighted_linear_cross_entropy
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients, TokenTerms

N, H, V = 13, 6, 17
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": "per token"},
    "scale": {"logit_scale": 0.0625},
    "softcap": {"final_logit_softcapping": 3.0},
    "bias": {"bias_V": "parameter"},
    "entropy": {"entropy_weights_N": "per token"},
    "teacher": {"teacher": 3},
    "all": {
        "entropy_weights_N": "per token",
        "teacher": 2,
        "temperature": "per token",
        "logit_scale": 1.7,
        "final_logit_softcapping": 2.0,
        "bias_V": "parameter",
    },
}


def make_inputs(n=N, h=H, v=V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, lm_head = (torch.randn(rows, h, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, v))
    targets = torch.randint(v, (n,), generator=generator)
    weights = torch.randn(n, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return hidden.requires_grad_(), lm_head.requires_grad_(), targets, weights


def make_options(name, n=N, v=V, dtype=torch.float64, seed=1):
    generator, options = torch.Generator().manual_seed(seed), dict(OPTIONS[name])
    if options.get("temperature") == "per token":
        options["temperature"] = 0.3 + 2 * torch.rand(n, generator=generator)
    if "bias_V" in options:
        options["bias_V"] = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    if "entropy_weights_N" in options:
        options["entropy_weights_N"] = torch.randn(n, generator=generator)
    if "teacher" in options:
        ids, probs = (
            torch.randint(v, (n, options["teacher"]), generator=generator),
            torch.rand(n, options["teacher"], generator=generator),
        )
        probs[: n // 2, 0] = 0  # an entry that is not there
        options["teacher"] = Teacher(ids, probs, torch.randn(n, generator=generator))
    return options


def dense(
    hidden, lm_head, targets, weights, temperature=1.0, bias_V=None, logit_scale=None, final_logit_softcapping=None,
    entropy_weights_N=None, teacher=None,
):  # fmt: skip
    """(loss, logp, entropy, divergence) with all logits at once, as the models of transformers shape them."""
    logits = torch.nn.functional.linear(hidden, lm_head, bias_V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale is not None:
        logits = logits * logit_scale
    if final_logit_softcapping is not None:
        logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None]
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    logp, entropy = distribution.log_prob(targets), distribution.entropy()
    loss, divergence = (weights * -logp).sum(), torch.zeros_like(logp)
    if entropy_weights_N is not None:
        loss = loss - (entropy_weights_N * entropy).sum()
    if teacher is not None:
        q = teacher.probs_NK.double()
        divergence = (q * (q.clamp(min=1e-300).log() - distribution.logits.gather(1, teacher.ids_NK))).sum(1).to(logp.dtype)
        loss = loss + (teacher.weights_N * divergence).sum()
    return loss, logp, entropy, divergence


def assert_twins(inputs, options, chunk_tokens, tolerance, scale=1.0):
    """Same loss, logp, entropy, and gradients of hidden, head and bias; errors relative to the largest entry."""
    leaves = [x for x in (*inputs[:2], options.get("bias_V")) if x is not None]
    found = head_loss(*inputs, chunk_tokens=chunk_tokens, **options)
    expected = dense(*inputs, **options)
    gradients = zip(*(torch.autograd.grad(out[0] * scale, leaves) for out in (found, expected)), strict=True)
    for ours, theirs in (*zip(found, expected, strict=True), *gradients):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 10 * N, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_head_is_its_dense_twin(name, chunk_tokens, dtype):
    assert_twins(make_inputs(dtype=dtype), make_options(name, dtype=dtype), chunk_tokens, TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from([*OPTIONS]),
    st.integers(0, 9),
)
def test_any_shape_agrees_with_the_dense_twin(n, h, v, chunk_tokens, name, seed):
    assert_twins(make_inputs(n, h, v, seed=seed), make_options(name, n, v, seed=seed), chunk_tokens, 1e-10)


def test_a_larger_vocabulary_in_float32_agrees_over_many_chunks():
    assert_twins(make_inputs(200, 32, 5000, torch.float32), make_options("all", 200, 5000, torch.float32), 7, 1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("chunk_tokens", [16, 256])
def test_bf16_differs_from_exact_by_its_own_rounding(chunk_tokens, native, monkeypatch):
    """Logits and their gradient are rounded to 8 bits: each entry is off by up to 1/256, the gradients by little more. Where a
    CPU does not multiply bf16 they are not."""
    monkeypatch.setattr(loss_head, "has_native_matmul", lambda device, dtype: native or dtype == torch.float32)
    monkeypatch.setattr(loss_head, "CONVERTED_BYTES", 4 * 32 * 150)  # three parts of lm_head
    inputs = make_inputs(256, 32, 400, torch.bfloat16)
    found = head_loss(*inputs, chunk_tokens=chunk_tokens)
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    expected = dense(*exact, *inputs[2:])
    assert found.loss.dtype == found.logp_N.dtype == found.entropy_N.dtype == torch.float32
    torch.testing.assert_close(found.logp_N.double(), expected[1], rtol=1e-2, atol=5e-2)
    torch.testing.assert_close(found.entropy_N.double(), expected[2], rtol=1e-2, atol=5e-2)
    gradients = zip(torch.autograd.grad(found.loss, inputs[:2]), torch.autograd.grad(expected[0], exact), strict=True)
    for ours, theirs in gradients:
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < (0.01 if native else 0.003) * theirs.norm()


def slow(name):
    """Each kernel takes ten seconds to compile."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow("temperature"), slow("temperatures"), slow("softcap"), slow("all")])
def test_one_kernel_computes_what_many_do(name, monkeypatch):
    """As on a GPU, where torch.compile makes it; chunks are of two sizes."""
    for module in (loss_head, softmax):
        monkeypatch.setattr(module, "can_compile", lambda device: True)
    assert_twins(make_inputs(dtype=torch.float32), make_options(name, dtype=torch.float32), 5, 1e-5)
    inputs, few = make_inputs(dtype=torch.bfloat16), make_options(name, dtype=torch.bfloat16)
    fused = head_loss(*inputs, **few)
    fused_gradients = torch.autograd.grad(fused.loss, inputs[:2])
    monkeypatch.undo()
    many = head_loss(*inputs, **few)
    for ours, theirs in zip(fused[:3] + fused_gradients, many[:3] + torch.autograd.grad(many.loss, inputs[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kernel_of_one_pass_computes_what_two_passes_do():
    """By Triton's interpreter, in an environment of its own; it truncates where a GPU rounds to bf16."""
    from inference_servers import environment_with_triton  # a plugin of pytest, imported by others as such

    command, env = [environment_with_triton(), "tests/one_pass_on_cpu.py"], clean_environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 48 and all(error < (1e-2 if "bfloat16" in name else 1e-6) for name, error in found.items()), found


def test_the_head_agrees_with_the_dense_interface():
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(2, 6, H, generator=generator, dtype=torch.float64)
    lm_head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (2, 6), generator=generator)
    masks = torch.rand(2, 6, generator=generator) < 0.5
    advantages = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    result = WeightedSFTInterface("sum", temperature=0.8).compute_weighted_loss(
        hidden_BTH @ lm_head.T, tokens, masks, advantages
    )
    masks[:, 0] = False
    trained = masks.flatten().nonzero().squeeze(1)
    out = head_loss(hidden_BTH.flatten(0, 1)[trained - 1], lm_head, tokens[masks], advantages[masks], 0.8, chunk_tokens=2)
    torch.testing.assert_close(out.loss, result["loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logp_N, result["token_logprobs"][masks], rtol=1e-12, atol=1e-12)


def test_the_public_function_is_the_loss_of_head_loss():
    inputs, options = make_inputs(), make_options("all")
    loss = weighted_linear_cross_entropy(*inputs, options.pop("temperature"), 4, **options)
    assert loss == head_loss(*inputs, chunk_tokens=4, **make_options("all")).loss
    assert loss.shape == () and loss.requires_grad


@pytest.mark.parametrize("scale", [0.0, -3.5, 1024.0])
def test_gradients_follow_what_is_done_with_the_loss(scale):
    assert_twins(make_inputs(), make_options("bias"), 4, 1e-10 * max(1, abs(scale)), scale)


def test_losses_of_parts_add_up():
    hidden, lm_head, targets, weights = make_inputs()
    whole = torch.autograd.grad(weighted_linear_cross_entropy(hidden, lm_head, targets, weights), (hidden, lm_head))
    parts = [slice(0, 4), slice(4, 4), slice(4, N)]
    losses = [weighted_linear_cross_entropy(hidden[part], lm_head, targets[part], weights[part]) for part in parts]
    for ours, theirs in zip(torch.autograd.grad(sum(losses), (hidden, lm_head)), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_give_a_connected_0(name, dtype):
    inputs, options = make_inputs(n=0, dtype=dtype), make_options(name, n=0, dtype=dtype)
    out = head_loss(*inputs, **options)
    out.loss.backward()
    assert out.loss == 0 and out.logp_N.shape == out.entropy_N.shape == (0,)
    for leaf in (*inputs[:2], options.get("bias_V")):
        assert leaf is None or torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_tokens_of_weight_0_add_nothing_and_still_have_a_logp():
    hidden, lm_head, targets, weights = make_inputs()
    zero_weight = torch.arange(N) % 3 == 0
    weights[zero_weight] = 0
    out = head_loss(hidden, lm_head, targets, weights, chunk_tokens=4)
    found = torch.autograd.grad(out.loss, (hidden, lm_head))
    loss = weighted_linear_cross_entropy(hidden[~zero_weight], lm_head, targets[~zero_weight], weights[~zero_weight])
    for ours, theirs in zip((out.loss, *found), (loss, *torch.autograd.grad(loss, (hidden, lm_head))), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0][zero_weight], torch.zeros_like(hidden[zero_weight]))
    torch.testing.assert_close(out.logp_N, dense(hidden, lm_head, targets, weights)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_token_of_weight_0_silences_even_a_hidden_state_that_is_not_finite(poison):
    hidden, lm_head, targets, weights = make_inputs()
    weights[3] = 0
    expected = weighted_linear_cross_entropy(hidden, lm_head, targets, weights)
    sick = hidden.detach().clone()
    sick[3, 1] = poison
    sick.requires_grad_()
    found = weighted_linear_cross_entropy(sick, lm_head, targets, weights)
    assert found == expected
    gradients = torch.autograd.grad(found, (sick, lm_head)), torch.autograd.grad(expected, (hidden, lm_head))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "softcap", "temperature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logits_stay_finite(name, dtype):
    hidden, lm_head, targets, weights = make_inputs(dtype=dtype)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    out = head_loss(hidden, lm_head, targets, weights, chunk_tokens=5, **make_options(name))
    for x in (*out, *torch.autograd.grad(out.loss, (hidden, lm_head))):
        assert x.isfinite().all()


def test_entropy_lies_between_0_and_that_of_a_coin_with_v_sides():
    hidden, lm_head, targets, weights = make_inputs(dtype=torch.float32)
    flat = head_loss(torch.zeros_like(hidden), lm_head, targets, weights).entropy_N
    torch.testing.assert_close(flat, torch.full((N,), math.log(V)))
    sharp = head_loss(hidden, lm_head, targets, weights, temperature=1e-4).entropy_N
    assert (sharp >= 0).all() and sharp.max() < 1e-6


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
def test_only_what_needs_a_gradient_gets_one(trained):
    inputs, options = make_inputs(), make_options("bias")
    leaves = [*inputs[:2], options["bias_V"]]
    expected = torch.autograd.grad(head_loss(*inputs, **options).loss, leaves)
    for leaf, on in zip(leaves, trained, strict=True):
        leaf.requires_grad_(on)
    loss = head_loss(*inputs, **options).loss
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    for leaf, on, gradient in zip(leaves, trained, expected, strict=True):
        assert torch.equal(leaf.grad, gradient) if on else leaf.grad is None


def test_without_gradients_the_values_are_the_same():
    inputs = make_inputs()
    with_gradients = head_loss(*inputs)
    with torch.no_grad():
        without = head_loss(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(with_gradients, without, strict=True))
    assert not any(x.requires_grad for x in (*without, with_gradients.logp_N, with_gradients.entropy_N))


@pytest.mark.parametrize(
    ("trained", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_three_matrix_products_are_made_and_none_for_a_gradient_nobody_wants(trained, products, monkeypatch):
    hidden, lm_head, targets, weights = make_inputs(dtype=torch.bfloat16)  # in float32 torch does not count addmm_
    monkeypatch.setattr(loss_head, "has_native_matmul", lambda *_: True)
    for leaf, on in zip((hidden, lm_head), trained, strict=True):
        leaf.requires_grad_(on)
    with FlopCounterMode(display=False) as counter:
        loss = weighted_linear_cross_entropy(hidden, lm_head, targets, weights, chunk_tokens=4)
        if any(trained):
            loss.backward()
    assert counter.get_total_flops() == products * 2 * N * H * V
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        weighted_linear_cross_entropy(hidden, lm_head, targets, weights)
    assert counter.get_total_flops() == 2 * N * H * V


def test_inputs_are_left_as_they_were():
    inputs, options = make_inputs(), make_options("all")
    before = [x.detach().clone() for x in (*inputs, options["bias_V"], options["temperature"])]
    head_loss(*inputs, chunk_tokens=3, **options).loss.backward()
    after = (*inputs, options["bias_V"], options["temperature"])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_second_backward_is_refused():
    loss = weighted_linear_cross_entropy(*make_inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run its forward again"):
        loss.backward()


def test_weights_get_no_gradient():
    hidden, lm_head, targets, weights = make_inputs()
    weights.requires_grad_()
    weighted_linear_cross_entropy(hidden, lm_head, targets, weights).backward()
    assert weights.grad is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            dict(hidden_NH=torch.zeros(2, N, H).double()),
            r"hidden \[2, 13, 6\] and lm_head \[17, 6\].*expected \[N, H\] and \[V, H\]",
        ),
        (dict(lm_head_VH=torch.zeros(V, H + 1).double()), r"hidden \[13, 6\] and lm_head \[17, 7\]"),
        (dict(targets_N=torch.zeros(N - 1).long()), r"targets has shape \[12\]; expected \[13\]"),
        (dict(targets_N=torch.zeros(N)), "targets are of torch.float32; expected integers"),
        (dict(targets_N=torch.zeros(N).bool()), "targets are of torch.bool; expected integers"),
        (dict(targets_N=torch.full((N,), -100)), r"targets run from -100 to -100; expected token ids in \[0, 17\)"),
        (dict(targets_N=torch.arange(N) + 5), r"targets run from 5 to 17; expected token ids in \[0, 17\)"),
        (dict(weights_N=torch.zeros(N, 1)), r"weights has shape \[13, 1\]; expected \[13\]"),
        (dict(temperature=torch.ones(2)), r"temperature has shape \[2\]; expected \[13\]"),
        (dict(temperature=0.0), "temperature is 0.0; expected above 0"),
        (dict(temperature=torch.arange(N)), "temperature is .*; expected above 0"),
        (dict(chunk_tokens=0), "chunk_tokens is 0; expected at least 1"),
        (dict(bias_V=torch.zeros(V + 1).double()), r"bias has shape \[18\]; expected \[17\]"),
        (dict(bias_V=torch.zeros(V)), "are of torch.float32, torch.float64; expected one floating type"),
        (dict(lm_head_VH=torch.zeros(V, H)), "are of torch.float32, torch.float64; expected one floating type"),
        (dict(final_logit_softcapping=0.0), "final_logit_softcapping is 0.0; expected a number above 0"),
    ],
)
def test_bad_input_is_named(changes, says):
    names = ("hidden_NH", "lm_head_VH", "targets_N", "weights_N")
    arguments = dict(zip(names, make_inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=says):
        weighted_linear_cross_entropy(**arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_becomes_a_loss_head_stays_a_linear(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(H, V, bias=bias)
    hidden = torch.randn(2, 3, H)
    before, state = linear(hidden), {name: x.clone() for name, x in linear.state_dict().items()}
    linear.__class__ = LossHead
    assert torch.equal(linear(hidden), before)
    assert linear.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in linear.state_dict().items())
    assert LossHead(H, V, bias=bias).load_state_dict(state)


def test_rows_beyond_the_vocabulary_make_no_logits():
    head = LossHead(4, 9).double()
    hidden, targets = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 6, 3, 2, 6])
    logp = head(hidden, targets, torch.ones(5), vocab_size=7).logp_N
    wanted = head(hidden)[:, :7].log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(logp, wanted)
    head(hidden, targets, torch.ones(5), vocab_size=7).loss.backward()
    assert head.weight.grad[:7].any() and not head.weight.grad[7:].any() and not head.bias.grad[7:].any()


def test_a_loss_head_given_targets_trains_its_weight_and_bias():
    torch.manual_seed(0)
    head = LossHead(H, V).double()
    hidden, _, targets, weights = make_inputs()
    out = head(hidden, targets, weights, temperature=0.5, chunk_tokens=4)
    expected = dense(hidden, head.weight, targets, weights, 0.5, head.bias)
    leaves = (hidden, head.weight, head.bias)
    gradients = zip(*(torch.autograd.grad(loss, leaves) for loss in (out.loss, expected[0])), strict=True)
    for ours, theirs in (*zip(out, expected, strict=True), *gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="targets came without weights"):
        head(hidden, targets)


def test_a_tied_embedding_gets_the_sum_of_both_gradients():
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(V, H).double(), LossHead(H, V, bias=False).double()
    head.weight = embedding.weight
    tokens, (_, _, targets, weights) = torch.randint(V, (N,)), make_inputs()
    (found,) = torch.autograd.grad(head(embedding(tokens).tanh(), targets, weights).loss, embedding.weight)
    (expected,) = torch.autograd.grad(dense(embedding(tokens).tanh(), head.weight, targets, weights)[0], embedding.weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


MEMORY = """
import torch
from wsft.loss.head import weighted_linear_cross_entropy

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

def train(n):
    hidden, lm_head = torch.randn(n, 8, requires_grad=True), torch.randn(32768, 8, requires_grad=True)
    weighted_linear_cross_entropy(hidden, lm_head, torch.zeros(n, dtype=torch.int64), torch.ones(n)).backward()
    return peak_mb()

train(512)
print(train(512), train(4096))  # the first one's buffers, freed, may or may not serve the others
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_eight_times_the_tokens_take_no_more_memory():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    few, many = map(int, out.stdout.split())
    assert many - few < 150  # MB; one chunk of logits is 64 MB, those of 4,096 tokens are 512 MB


def test_chunks_are_of_one_size_and_graphs_compiled_once_for_all_sizes(monkeypatch):
    """50 steps with ragged numbers of tokens, as on a GPU, but with the compiler's eager backend."""
    import torch._dynamo as dynamo

    monkeypatch.setattr(loss_head, "can_compile", lambda device: True)
    monkeypatch.setattr(softmax, "can_compile", lambda device: True)
    monkeypatch.setattr(softmax, "_compiled", functools.cache(functools.partial(torch.compile, dynamic=True, backend="eager")))
    dynamo.reset()
    dynamo.utils.counters.clear()
    sizes, real = [], loss_head._to_gradient_
    monkeypatch.setattr(loss_head, "_to_gradient_", lambda block, *args: sizes.append(len(block)) or real(block, *args))
    for n in range(2, 102, 2):
        sizes.clear()
        hidden, lm_head = torch.randn(n, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        temperature = torch.ones(n)
        head_loss(hidden, lm_head, torch.randint(V, (n,)), torch.ones(n), temperature, 40).loss.backward()
        assert sum(sizes) == n and len(sizes) == math.ceil(n / 40) and max(sizes) - min(sizes) < len(sizes)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_no_step_synchronizes_with_the_device(name, monkeypatch):
    """Tensors without values, as those that a GPU has not come to yet: reading them would synchronize."""
    monkeypatch.setattr(loss_head, "has_native_matmul", lambda *_: True)
    monkeypatch.setattr(loss_head, "memory_bytes", lambda _: 2**20)

    def some(*shape, dtype=torch.float32):
        return torch.empty(*shape, device="meta", dtype=dtype)

    leaves = [some(rows, H, dtype=torch.bfloat16).requires_grad_() for rows in (300, 500)]
    ids = some(300, dtype=torch.int64)
    terms = TokenTerms(
        Objective(name), Coefficients(0.1, 0.1, 0.1), *(some(300) for _ in range(5)), ids, some(300), ids[:, None], some(300, 1)
    )
    out = head_loss(*leaves, ids, terms, **terms.head_options())
    out.loss.backward()
    terms.sums(out)
    assert leaves[1].grad.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        out.loss.item()
