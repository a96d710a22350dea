"""The dense interface, against loops in plain Python written apart from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsft import WeightedSFTInterface

B, T, V = 3, 5, 7
DIVISOR = 11  # max_token_len, of the reduction "constant"


def make_batch(seed=0, rows=B, positions=T, vocab=V, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, positions, vocab, generator=generator, dtype=dtype)
    tokens = torch.randint(vocab, (rows, positions), generator=generator)
    masks = torch.rand(rows, positions, generator=generator) < 0.6
    advantages = torch.randn(rows, positions, generator=generator, dtype=dtype)
    return logits.requires_grad_(), tokens, masks, advantages


def loss_by_loops(logits, tokens, masks, advantages, reduction="mean", normalize="none", temperatures=None, ignore_index=-100):
    """The issue's sentence, token by token, in Python floats: (loss or [B][T], trained tokens, [B][T] logprobs)."""
    logits, tokens, masks, advantages = (x.tolist() for x in (logits, tokens, masks, advantages))
    rows, positions = len(tokens), len(tokens[0])
    temperatures = temperatures or [1.0] * rows
    trained = [(b, t) for b in range(rows) for t in range(1, positions) if masks[b][t] == 1 and tokens[b][t] != ignore_index]
    if normalize != "none" and trained:
        chosen = [advantages[b][t] for b, t in trained]
        mean = math.fsum(chosen) / len(chosen)
        deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in chosen) / len(chosen)) if normalize == "batch" else 1.0
        advantages = [[(a - mean) / max(deviation, 1e-8) for a in row] for row in advantages]
    terms = [[0.0] * positions for _ in range(rows)]
    logprobs = [[0.0] * positions for _ in range(rows)]
    for b, t in trained:
        z = [x / temperatures[b] for x in logits[b][t - 1]]
        logprobs[b][t] = z[tokens[b][t]] - max(z) - math.log(math.fsum(math.exp(x - max(z)) for x in z))
        terms[b][t] = advantages[b][t] * -logprobs[b][t]
    total = math.fsum(math.fsum(row) for row in terms)
    losses = {"none": terms, "sum": total, "mean": total / max(len(trained), 1)}
    sizes = {b: sum(row == b for row, _ in trained) for b, _ in trained}
    losses["sequence_mean"] = sum(math.fsum(terms[b]) / n for b, n in sizes.items()) / max(len(sizes), 1)
    losses["constant"] = total / max(len(sizes), 1) / DIVISOR
    return losses[reduction], len(trained), logprobs


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalization", ["none", "batch", "batch_center"])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "constant", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, [0.5, 1.0, 2.5]])
def test_values_are_those_of_the_loops(reduction, normalization, temperature):
    batch = make_batch()
    batch[2][1] = False  # a sequence that is not trained
    divisor = DIVISOR if reduction == "constant" else None
    interface = WeightedSFTInterface(reduction, normalization, temperature, max_token_len=divisor)
    result = interface.compute_weighted_loss(*batch)
    temperatures = temperature if isinstance(temperature, list) else [temperature] * B
    loss, num_tokens, logprobs = loss_by_loops(*batch, reduction, normalization, temperatures)
    assert_close(result["loss"], loss)
    assert_close(result["token_logprobs"], logprobs)
    assert result["num_tokens"] == num_tokens and type(result["num_tokens"]) is int
    assert not result["token_logprobs"].requires_grad


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_any_shape_agrees_with_the_loops(rows, positions, vocab, seed, normalize):
    batch = make_batch(seed, rows, positions, vocab)
    result = WeightedSFTInterface("sum", "batch" if normalize else "none").compute_weighted_loss(*batch)
    loss, num_tokens, logprobs = loss_by_loops(*batch, "sum", "batch" if normalize else "none")
    assert_close(result["loss"], loss, 1e-9)
    assert_close(result["token_logprobs"], logprobs)
    assert result["num_tokens"] == num_tokens


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_pass_gradcheck(reduction):
    logits, *rest = make_batch(positions=4, vocab=5)
    interface = WeightedSFTInterface(reduction, "batch", [0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(lambda x: interface.compute_weighted_loss(x, *rest)["loss"], logits)


def test_the_gradient_is_advantage_times_softmax_minus_onehot():
    logits, tokens, masks, advantages = make_batch()
    WeightedSFTInterface("sum", temperature=2.0).compute_weighted_loss(logits, tokens, masks, advantages)["loss"].backward()
    expected = torch.zeros_like(logits)
    for b in range(B):
        for t in range(1, T):
            if masks[b, t]:
                p = (logits[b, t - 1].detach() / 2).exp()
                p = p / p.sum()
                p[tokens[b, t]] -= 1
                expected[b, t - 1] = advantages[b, t] * p / 2
    assert_close(logits.grad, expected)


def test_position_0_is_never_trained():
    logits, tokens, _, advantages = make_batch()
    masks = torch.zeros(B, T, dtype=torch.bool)
    masks[:, 0] = True
    result = WeightedSFTInterface().compute_weighted_loss(logits, tokens, masks, advantages)
    assert result["num_tokens"] == 0 and result["loss"] == 0


def test_logits_score_the_next_token():
    logits = torch.full((1, 3, 4), -50.0)
    logits[0, 0, 2] = logits[0, 1, 3] = 50.0  # after position 0 comes token 2, then token 3
    tokens = torch.tensor([[1, 2, 3]])
    result = WeightedSFTInterface().compute_weighted_loss(logits, tokens, torch.ones(1, 3), torch.ones(1))
    assert result["loss"] == 0 and result["num_tokens"] == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_bool_integers_and_floats_say_the_same(dtype):
    logits, tokens, masks, advantages = make_batch()
    interface = WeightedSFTInterface()
    expected = interface.compute_weighted_loss(logits, tokens, masks, advantages)["loss"]
    assert interface.compute_weighted_loss(logits, tokens, masks.to(dtype), advantages)["loss"] == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tokens_may_be_of_any_integer_type(dtype):
    logits, tokens, masks, advantages = make_batch(vocab=200)
    tokens[1, 2] = 156  # -100 as an unsigned byte
    masks[1, 2] = True
    expected = WeightedSFTInterface().compute_weighted_loss(logits, tokens, masks, advantages)["loss"]
    assert WeightedSFTInterface().compute_weighted_loss(logits, tokens.to(dtype), masks, advantages)["loss"] == expected


def test_one_advantage_per_sequence_holds_for_all_its_tokens():
    logits, tokens, masks, _ = make_batch(rows=T)  # B == T: a 1-D tensor is per sequence all the same
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    interface = WeightedSFTInterface(reduction="none")
    expected, _, _ = loss_by_loops(logits, tokens, masks, advantages.unsqueeze(1).expand(T, T), "none")
    for form in (advantages, advantages.unsqueeze(1), advantages.unsqueeze(1).repeat(1, T)):
        assert_close(interface.compute_weighted_loss(logits, tokens, masks, form)["loss"], expected)


def test_arguments_go_by_name_too():
    logits, tokens, masks, advantages = make_batch()
    interface = WeightedSFTInterface()
    by_name = interface.compute_weighted_loss(advantages=advantages, loss_masks=masks, tokens=tokens, logits=logits)
    assert by_name["loss"] == interface.compute_weighted_loss(logits, tokens, masks, advantages)["loss"]


@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_an_ignored_token_is_not_trained(ignore_index):
    logits, tokens, masks, advantages = make_batch()
    tokens[0, 1] = tokens[2, 3] = ignore_index
    masks[0, 1] = masks[2, 3] = True
    result = WeightedSFTInterface(ignore_index=ignore_index).compute_weighted_loss(logits, tokens, masks, advantages)
    loss, num_tokens, _ = loss_by_loops(logits, tokens, masks, advantages, ignore_index=ignore_index)
    assert_close(result["loss"], loss)
    assert result["num_tokens"] == num_tokens
    assert result["token_logprobs"][0, 1] == 0


def test_an_advantage_of_0_counts_in_the_mean():
    logits, tokens, _, _ = make_batch()
    advantages = torch.zeros(B, T)
    advantages[0, 1] = 1.0
    result = WeightedSFTInterface().compute_weighted_loss(logits, tokens, torch.ones(B, T), advantages)
    assert result["num_tokens"] == B * (T - 1)
    assert_close(result["loss"] * B * (T - 1), -logits[0, 0].log_softmax(-1)[tokens[0, 1]])


@pytest.mark.parametrize("normalization", ["none", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(B, T), (1, 1), (0, T), (2, 0)])
def test_nothing_to_train_gives_a_connected_0(shape, reduction, normalization):
    logits = torch.randn(*shape, V, requires_grad=True)
    tokens, masks = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    result = WeightedSFTInterface(reduction, normalization).compute_weighted_loss(logits, tokens, masks, torch.zeros(shape[0]))
    assert result["num_tokens"] == 0 and torch.equal(result["loss"], torch.zeros(shape if reduction == "none" else ()))
    result["loss"].sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_what_is_not_trained_may_hold_anything():
    logits, tokens, masks, advantages = make_batch()
    clean = WeightedSFTInterface(advantage_normalization="batch").compute_weighted_loss(logits, tokens, masks, advantages)[
        "loss"
    ]
    clean.backward()
    scoring = torch.zeros(B, T, dtype=torch.bool)
    scoring[:, :-1] = masks[:, 1:]
    wild = logits.detach().clone()
    wild[~scoring] = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0, 4.0], dtype=wild.dtype)
    wild.requires_grad_()
    untrained = ~masks
    untrained[:, 0] = True
    tokens, advantages = tokens.masked_fill(untrained, -(2**40)), advantages.masked_fill(untrained, math.nan)
    loss = WeightedSFTInterface(advantage_normalization="batch").compute_weighted_loss(wild, tokens, masks, advantages)["loss"]
    loss.backward()
    assert loss == clean
    assert torch.equal(wild.grad, logits.grad)


def test_no_gradient_flows_to_advantages():
    logits, tokens, masks, advantages = make_batch()
    advantages.requires_grad_()
    WeightedSFTInterface(advantage_normalization="batch").compute_weighted_loss(logits, tokens, masks, advantages)[
        "loss"
    ].backward()
    assert advantages.grad is None


def test_equal_advantages_normalise_to_0():
    logits, tokens, masks, _ = make_batch(dtype=torch.float32)
    for advantage in (0.1, 100.1, 12345.678):  # float32 cannot hold their mean exactly
        result = WeightedSFTInterface("sum", "batch").compute_weighted_loss(logits, tokens, masks, torch.full((B,), advantage))
        assert abs(result["loss"]) < 1e-2
    for advantage in (1e8 + 0.1, 1e12 + 0.1):  # nor float64 the mean of these
        advantages = torch.full((B,), advantage, dtype=torch.float64)
        assert WeightedSFTInterface("sum", "batch").compute_weighted_loss(logits, tokens, masks, advantages)["loss"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_in_float32_at_least(dtype):
    logits, tokens, masks, advantages = make_batch(vocab=300, dtype=torch.float32)
    logits = logits.detach().to(dtype).requires_grad_()
    result = WeightedSFTInterface().compute_weighted_loss(logits, tokens, masks, advantages.to(dtype))
    loss, _, logprobs = loss_by_loops(logits, tokens, masks, advantages.to(dtype))
    assert result["loss"].dtype == result["token_logprobs"].dtype == torch.float32
    assert_close(result["loss"], loss, 1e-5)
    assert_close(result["token_logprobs"], logprobs, 1e-5)
    result["loss"].backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype):
    logits, tokens, masks, advantages = make_batch(dtype=dtype)
    logits = (logits.detach() * 1e4).requires_grad_()
    result = WeightedSFTInterface().compute_weighted_loss(logits, tokens, masks, advantages)
    result["loss"].backward()
    assert result["loss"].isfinite() and logits.grad.isfinite().all()


def changed(**changes):
    names = ("logits", "tokens", "loss_masks", "advantages")
    return {**dict(zip(names, make_batch(), strict=True)), **changes}


def with_entry(tensor, at, value):
    tensor = tensor.detach().clone()
    tensor[at] = value
    return tensor


def all_trained(**changes):
    return changed(loss_masks=torch.ones(B, T), **changes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (changed(logits=torch.zeros(B, T)), r"logits are \[3, 5\].*expected \[B, T, V\]"),
        (changed(logits=torch.zeros(B, T, V, dtype=torch.int64)), r"torch.int64; expected .* floating"),
        (changed(tokens=torch.zeros(B, T - 1, dtype=torch.int64)), r"tokens have shape \[3, 4\]; expected \[3, 5\]"),
        (changed(tokens=torch.zeros(B, T)), r"tokens are of torch.float32; expected integers"),
        (changed(tokens=torch.zeros(B, T, dtype=torch.bool)), r"tokens are of torch.bool; expected integers"),
        (changed(loss_masks=torch.ones(B)), r"loss_masks have shape \[3\]; expected \[3, 5\]"),
        (changed(loss_masks=with_entry(torch.ones(B, T), (1, 2), -100)), r"hold -100.0; expected .*AtroposBatchProcessor"),
        (changed(loss_masks=with_entry(torch.ones(B, T), (0, 0), 0.5)), r"hold 0.5; expected bool, or 0 and 1"),
        (changed(loss_masks=with_entry(torch.ones(B, T), (0, 0), math.nan)), r"hold nan; expected bool, or 0 and 1"),
        (changed(advantages=torch.zeros(T)), r"advantages have shape \[5\]; expected \[3, 5\], or \[3\] or \[3, 1\]"),
        (changed(advantages=torch.zeros(1, T)), r"advantages have shape \[1, 5\]"),
        (changed(advantages=torch.tensor(1.0)), r"advantages have shape \[\]"),
        (
            all_trained(advantages=with_entry(torch.zeros(B, T), (1, 2), math.nan)),
            r"advantages\[1, 2\] is nan; expected a finite",
        ),
        (all_trained(advantages=with_entry(torch.zeros(B), 2, math.inf)), r"advantages\[2, 1\] is inf; expected a finite"),
        (all_trained(tokens=with_entry(torch.zeros(B, T).long(), (2, 4), V)), r"tokens\[2, 4\] is 7; expected .*\[0, 7\)"),
        (all_trained(tokens=with_entry(torch.zeros(B, T).long(), (2, 4), -1)), r"tokens\[2, 4\] is -1; expected .*\[0, 7\)"),
    ],
)
def test_bad_input_is_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        WeightedSFTInterface().compute_weighted_loss(**arguments)


def test_an_advantage_that_float32_cannot_hold_is_refused():
    logits, tokens, _, _ = make_batch(dtype=torch.float32)
    advantages = torch.full((B,), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"is 1e\+300; expected a finite torch.float32"):
        WeightedSFTInterface().compute_weighted_loss(logits, tokens, torch.ones(B, T), advantages)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(reduction="avg"), "reduction is 'avg'; expected one of mean, sequence_mean, constant, sum, none"),
        (dict(reduction="constant"), "max_token_len is None with reduction 'constant'"),
        (dict(max_token_len=5), "max_token_len is 5 with reduction 'mean'; expected a number with 'constant' only"),
        (dict(advantage_normalization="group"), "advantage_normalization is 'group'; expected one of none, batch"),
        (dict(temperature=0.0), "temperature is 0.0; expected a finite number above 0"),
        (dict(temperature=math.inf), "temperature is inf"),
        (dict(temperature=[1.0, math.nan]), "temperature is .*nan"),
        (dict(temperature=[1.0, -1.0]), r"temperature is \[1.0, -1.0\]"),
        (dict(temperature=torch.ones(B, 1)), "one per sequence"),
    ],
)
def test_bad_settings_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        WeightedSFTInterface(**arguments)


def test_as_many_temperatures_as_sequences_are_needed():
    with pytest.raises(ValueError, match="there are 2 temperatures; expected one number, or one for each of 3 sequences"):
        WeightedSFTInterface(temperature=[1.0, 2.0]).compute_weighted_loss(*make_batch())
