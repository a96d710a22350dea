"""Models whose code is unlike Llama's, trained by two ranks under ZeRO-3, against a dense float64 reference: one for each cause
by which such a model would not run, or would learn something else."""

import json
import re
import shutil

import pytest
import torch
from conftest import make_group, run_ranks, save_model, write_groups
from test_exact import LEARNING_RATE, MOMENTUM, reference
from test_model import MLA, MOE, SHAPE, SMALL
from transformers import AutoConfig, AutoModelForCausalLM

LINEAR = {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4}
LINEAR |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
INDEX = MLA | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 32, "head_dim": 8}
ROUTED_FIRST = {"num_experts": 4, "moe_intermediate_size": 24, "num_dense_layers": 1, "global_attn_every_n_layers": 2}
KINDS = {  # kind -> its config, and whether its rows are packed
    "mamba": (SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, False),  # reads a parameter of a child
    "qwen3_next": (SHAPE | LINEAR, False),  # refuses packed rows in the middle of a forward pass
    "deepseek_v32": (SHAPE | INDEX, False),  # looks into an attention mask that packed rows do not have
    "afmoe": (SHAPE | MOE | ROUTED_FIRST | {"head_dim": 8, "sliding_window": 8}, True),  # views the output of attention
}
LIST_OF_EXPERTS = '''
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class ListOfExperts(torch.nn.Module):
    """As remote code has it: an expert without tokens is not run."""

    def __init__(self, config):
        super().__init__()
        self.gate = torch.nn.Linear(config.hidden_size, 16, bias=False)
        self.experts = torch.nn.ModuleList([LlamaMLP(config) for _ in range(16)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero().squeeze(1)
            if len(at):
                out = out.index_add(0, at, expert(flat[at]) * weights[at, None])
        return out.view_as(x)


class ExpertsForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListOfExperts(config)
        self.post_init()
'''


def make_list_of_experts(folder):
    """Llama's files with experts in them."""
    save_model(folder, AutoConfig.for_model("llama", **SHAPE))
    (folder / "experts.py").write_text(LIST_OF_EXPERTS)
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "experts.ExpertsForCausalLM"}
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=True)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return str(folder)


@pytest.mark.parametrize("kinds", [["mamba"], pytest.param(list(KINDS), marks=pytest.mark.slow)])
def test_models_of_every_cause_are_exact_on_two_ranks(kinds, tmp_path, rng):
    models = {kind: save_model(tmp_path / kind, AutoConfig.for_model(kind, **KINDS[kind][0])) for kind in kinds}
    models["experts"] = make_list_of_experts(tmp_path / "experts")
    batches = [[make_group(rng, [30, 12, 7]), make_group(rng, [9, 21])], [make_group(rng, [14, 5, 3]), make_group(rng, [11])]]
    data = write_groups(tmp_path / "data.jsonl", [group for batch in batches for group in batch])
    ds = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": MOMENTUM}},
    }
    runs = [
        dict(
            model_name=model, data=data, deepspeed=ds, batch_size=5, micro_batch_tokens=64, learning_rate=LEARNING_RATE,
            max_grad_norm=0, device="cpu", output_dir=str(tmp_path / "runs" / kind), trust_remote_code=kind == "experts",
        )
        for kind, model in models.items()
    ]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    results = run_ranks(["tests/train_many.py", tmp_path / "runs.json"], 2, timeout=300)
    assert [code for code, _ in results] == [0, 0], results[0][1][-4000:]
    laid_out = re.findall(r"sequences are packed|are padded instead", results[0][1])
    packed = [*(KINDS[kind][1] for kind in kinds), True]
    assert laid_out == ["sequences are packed" if each else "are padded instead" for each in packed]
    for kind, model in models.items():
        loading = {"trust_remote_code": True} if kind == "experts" else {"experts_implementation": "eager"}
        wanted = reference(model, batches, False, **loading)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / kind / "final", trust_remote_code=kind == "experts")
        found = dict(found.named_parameters())
        for name, value in wanted.items():
            error = (found[name].double() - value).norm()
            assert error <= 2e-5 * value.norm(), f"{kind}, {name}: {error / value.norm()}"
