"""Packed rows: each sequence attends to itself only, in every family of models."""

import pytest
import torch
from conftest import VOCAB, make_model
from torch.overrides import TorchFunctionMode

from wsft.loss import head as loss_head
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients, TokenTerms
from wsft.model import attention
from wsft.model.attention import PACKED
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.packing import Layout, VarlenMetadata

CPU = torch.device("cpu")
LENGTHS = [5, 11, 1, 8, 2]
FAMILIES = {
    "llama": {},
    "qwen": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_get_what_each_gets_alone(family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "model", family=family, **FAMILIES[family])
    attention.register()
    model, own = (AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name) for name in (PACKED, "eager"))
    parts = torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)
    found = model(torch.cat(parts).unsqueeze(0), use_cache=False, **VarlenMetadata.of(Layout.of(LENGTHS)).kwargs()).logits[0]
    alone = torch.cat([own(part.unsqueeze(0)).logits[0] for part in parts])
    torch.testing.assert_close(found.log_softmax(-1), alone.log_softmax(-1), atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (alone * weights).sum().backward()
    for ours, theirs in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_share_a_piece_get_what_each_gets_alone(family, tmp_path):
    """Values of what only they run, and the gradients of all: those of the shared prefix from all sequences."""
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "model", family=family, **FAMILIES[family])
    attention.register()
    model, own = (AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name) for name in (PACKED, "eager"))
    pieces = torch.randint(VOCAB, (33,), generator=torch.Generator().manual_seed(0)).split([7, 5, 1, 9, 3, 2, 6])
    layout = Layout((7, 5, 1, 9, 3, 2, 6), (-1, 0, 0, -1, -1, 4, 4))
    found = (
        model(torch.cat(pieces).unsqueeze(0), use_cache=False, **VarlenMetadata.of(layout).kwargs())
        .logits[0]
        .split(layout.lengths)
    )
    found = torch.cat([found[i] for i in (1, 2, 3, 5, 6)])
    alone = []
    for i in (1, 2, 3, 5, 6):
        prefix = [] if layout.parents[i] < 0 else [pieces[layout.parents[i]]]
        alone.append(own(torch.cat([*prefix, pieces[i]]).unsqueeze(0)).logits[0, -len(pieces[i]) :])
    alone = torch.cat(alone)
    torch.testing.assert_close(found.log_softmax(-1), alone.log_softmax(-1), atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (alone * weights).sum().backward()
    for ours, theirs in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_the_keys_of_a_shared_prefix_come_before_those_of_each_sequence():
    """As variable-length attention on a GPU takes them."""
    output = VarlenMetadata.of(Layout((2, 3, 1, 2), (-1, 0, -1, 0))).kwargs()
    assert output["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 2, 3]] and "cu_seq_lens_q" not in output
    varlen = output["wsft_varlen"]
    assert varlen.cu_seqlens_q.tolist() == [0, 2, 5, 6, 8] and varlen.cu_seqlens_k.tolist() == [0, 2, 7, 8, 12]
    assert varlen.key_indices.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 6, 7] and (
        varlen.max_seqlen_q,
        varlen.max_seqlen_k,
    ) == (3, 5)


class Looks(TorchFunctionMode):
    """Counts what asks a tensor for its value: on a GPU the host would wait for it."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.item, torch.Tensor.tolist)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_runs_without_synchronizing(family, tmp_path):
    from transformers import AutoModelForCausalLM

    attention.register()
    folder = make_model(tmp_path / "model", family=family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED)
    output = VarlenMetadata.of(Layout.of(LENGTHS)).kwargs()
    with Looks() as looks:
        model(torch.zeros(1, sum(LENGTHS), dtype=torch.int64), use_cache=False, **output)
    assert looks.count == 0


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_a_packed_row_looks_at_no_value(family, name, tmp_path, monkeypatch):
    """Forward pass, loss, backward pass with recomputed activations and metrics, on a device that has none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(loss_head, "memory_bytes", lambda _: 2**30)
    attention.register()
    config = AutoConfig.from_pretrained(make_model(tmp_path / "model", family=family, **FAMILIES[family]))
    with torch.device("meta"):
        model = WeightedSFTModel(AutoModelForCausalLM.from_config(config, attn_implementation=PACKED))
        model.recompute_activations()
        model.train()
        tokens, trained = torch.zeros(1, sum(LENGTHS), dtype=torch.int64), torch.arange(1, LENGTHS[0])
        some = [torch.zeros(len(trained)) for _ in range(5)]
        terms = TokenTerms(Objective(name), Coefficients(entropy=0.1), *some, trained - 1)
    out = model(tokens, trained, terms, VarlenMetadata.of(Layout.of(LENGTHS)).to("meta"), **terms.head_options())
    out.loss.backward()
    assert all(x.is_meta for x in terms.sums(out)[0].values())
    assert all(param.grad is not None for param in model.parameters())


def test_it_costs_the_sum_of_the_squares(monkeypatch):
    seen = []
    real = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(q.shape[2]) or real(q, *a, **k)
    )
    q, kv = torch.randn(1, 4, sum(LENGTHS), 8), torch.randn(1, 2, sum(LENGTHS), 8)
    out, _ = attention.packed_attention(torch.nn.Module(), q, kv, kv, None, **VarlenMetadata.of(Layout.of(LENGTHS)).kwargs())
    assert seen == LENGTHS and out.shape == (1, sum(LENGTHS), 4, 8)


@pytest.mark.parametrize("packed", [True, False])
def test_on_a_cpu_half_precision_is_attended_to_in_float32(packed):
    q, kv = torch.randn(1, 4, sum(LENGTHS), 8).bfloat16(), torch.randn(1, 2, sum(LENGTHS), 8).bfloat16()
    output = VarlenMetadata.of(Layout.of(LENGTHS)).kwargs() if packed else {}
    found = attention.packed_attention(torch.nn.Module(), q, kv, kv, None, **output)[0]
    exact = attention.packed_attention(torch.nn.Module(), q.float(), kv.float(), kv.float(), None, **output)[0]
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("window", [None, 4])
def test_heads_repeated_where_no_kernel_groups_them_give_the_same(window, monkeypatch):
    q, k, v = torch.randn(1, 4, sum(LENGTHS), 8), *torch.randn(2, 1, 2, sum(LENGTHS), 8)
    kwargs = VarlenMetadata.of(Layout.of(LENGTHS)).kwargs() | {"sliding_window": window}
    grouped, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, **kwargs)
    monkeypatch.setattr(attention, "_groups_heads", lambda *_, masked: False)
    repeated, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None, **kwargs)
    torch.testing.assert_close(grouped, repeated)


def test_only_flash_attention_groups_heads_on_a_gpu():
    on = lambda device, dtype, masked: attention._groups_heads(torch.device(device), dtype, masked=masked)  # noqa: E731
    assert on("cpu", torch.float32, True) and on("cuda", torch.bfloat16, False)
    assert not on("cuda", torch.bfloat16, True) and not on("cuda", torch.float32, False)


@pytest.mark.parametrize("takes_groups", [True, False])
def test_varlen_attention_is_called_as_its_version_of_torch_takes_it(takes_groups, monkeypatch):
    """Torch 2.11 takes fewer heads of keys than of queries without `enable_gqa`."""
    calls = []

    def varlen_attn(q, k, v, *args, **options):
        calls.append(options)
        return q

    monkeypatch.setattr(attention, "_is_flash", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen_attn", lambda: (varlen_attn, takes_groups))
    kwargs = VarlenMetadata.of(Layout.of(LENGTHS)).kwargs()
    for head_dim, called in ((8, 1), (12, 1)):  # of another size flash attention has no kernel
        q, kv = torch.randn(1, 4, sum(LENGTHS), head_dim), torch.randn(1, 2, sum(LENGTHS), head_dim)
        attention.packed_attention(torch.nn.Module(), q, kv, kv, None, **kwargs)
        assert len(calls) == called
    assert calls[0].get("enable_gqa") == (True if takes_groups else None)


@pytest.mark.parametrize("strange", [{"s_aux": torch.ones(4)}, {"position_bias": torch.ones(4)}])
def test_attention_of_a_kind_it_does_not_know_is_not_a_number(strange):
    q = torch.randn(1, 4, 3, 8)
    assert attention.packed_attention(torch.nn.Module(), q, q, q, None, **strange)[0].isnan().all()


def test_positions_begin_anew_with_each_sequence():
    output = VarlenMetadata.of(Layout.of([3, 1, 2])).kwargs()
    assert output["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]] and output["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
