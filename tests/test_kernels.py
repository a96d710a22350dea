"""Fused kernels in the place of a model's own code. Those of liger-kernel need a GPU (test_gpu.py); here the model is changed
as liger-kernel changes it, to code that is right or wrong.
"""

import json
import subprocess
import types

import pytest
import torch
from conftest import ROOT, clean_environment, make_model
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from wsft.config import WeightedSFTConfig
from wsft.dry_run import dry_run
from wsft.errors import UserError
from wsft.model import kernels
from wsft.model.kernels import find_kernels, fuse

CPU = torch.device("cpu")


class LigerRMSNorm(torch.nn.Module):
    def forward(self, states):
        return torch.nn.functional.rms_norm(states, self.weight.shape, self.weight, self.variance_epsilon)


class LigerWrongForward(torch.nn.Module):
    def forward(self, states):
        return LigerRMSNorm.forward(self, states) * 1.01


class LigerWrongBackward(torch.nn.Module):
    def forward(self, states):
        return LigerRMSNorm.forward(self, states).detach() + 0 * states


class LigerFailing(torch.nn.Module):
    def forward(self, states):
        raise RuntimeError("no kernel image is available")


def liger_rope(q, k, cos, sin, unsqueeze_dim=1):
    return own_rope(q, k, cos, sin, unsqueeze_dim)


own_rope, own_norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm


def change_to(norm, knows_rope=True, knows_mlp=True):
    def change(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        if swiglu and not knows_mlp:
            raise AttributeError("experts")
        assert not cross_entropy and not fused_linear_cross_entropy
        if rope and not knows_rope:
            raise NotImplementedError
        if rope:
            modeling_llama.apply_rotary_pos_emb = liger_rope
        modeling_llama.LlamaRMSNorm = norm
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = types.MethodType(norm.forward, module)

    return change


@pytest.fixture
def model(tmp_path):
    yield AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"), dtype=torch.float32)
    modeling_llama.apply_rotary_pos_emb = own_rope


def config_of(**settings):
    return WeightedSFTConfig(model_name="model", atropos_url="http://localhost:1", **settings)


def logits_of(model):
    return model(torch.arange(3, 20).unsqueeze(0)).logits


@pytest.mark.parametrize("settings", [{}, {"ref_model_name": "reference", "kl_coef": 0.1}])
def test_a_model_is_changed_and_no_other(model, settings, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(kernels, "find_kernels", lambda *_: change_to(LigerRMSNorm))
    monkeypatch.setattr(kernels, "version", lambda _: "0.8.5")
    before = logits_of(model)
    fuse(model, config_of(**settings), CPU)
    assert "kernels of liger-kernel 0.8.5 for LlamaRMSNorm (5)" in caplog.text
    assert caplog.text.endswith("rotary embeddings\n") == (not settings)
    assert vars(model.model.norm)["forward"].__func__ is LigerRMSNorm.forward
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)
    assert modeling_llama.LlamaRMSNorm is own_norm
    assert modeling_llama.apply_rotary_pos_emb is (own_rope if settings else liger_rope)


@pytest.mark.parametrize("lacking", ["knows_rope", "knows_mlp"])
def test_what_the_kernels_lack_is_the_models_own(model, lacking, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(kernels, "find_kernels", lambda *_: change_to(LigerRMSNorm, **{lacking: False}))
    monkeypatch.setattr(kernels, "version", lambda _: "0.8.5")
    fuse(model, config_of(), CPU)
    assert vars(model.model.norm)["forward"].__func__ is LigerRMSNorm.forward and "rotary" not in caplog.text


@pytest.mark.parametrize("norm", [LigerWrongForward, LigerWrongBackward, LigerFailing])
def test_kernels_that_give_other_results_are_not_used(model, norm, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "find_kernels", lambda *_: change_to(norm))
    before = logits_of(model)
    fuse(model, config_of(), CPU)
    assert "of liger-kernel for LlamaForCausalLM give other results than its own code, or do not run" in caplog.text
    with pytest.raises(UserError, match=r"give other results than its own code.*leave kernels at auto"):
        fuse(model, config_of(kernels="liger"), CPU)
    assert "forward" not in vars(model.model.norm) and torch.equal(logits_of(model), before)
    assert modeling_llama.LlamaRMSNorm is own_norm and modeling_llama.apply_rotary_pos_emb is own_rope


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "types_of_models",
    ["llama,qwen2,qwen3,mistral,olmo2,phi3,granite,smollm3", "gemma,gemma2,gemma3_text,glm4,qwen3_moe,mixtral"],
)
def test_models_with_the_kernels_of_liger_have_the_results_of_their_own_code(types_of_models):
    """The real ones, by Triton's interpreter, in an environment of their own. Of mixtures of experts the norms alone."""
    from inference_servers import environment_with_triton  # a plugin of pytest, imported by others as such

    python = environment_with_triton()
    command, env = [python, "tests/liger_on_cpu.py", types_of_models], clean_environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert isinstance(found, dict) and found["difference"] < 1e-5, (name, found)
        assert len(found["fused"]) == (1 if name in ("qwen3_moe", "mixtral") else 2), (name, found)


def test_all_ranks_run_the_same_code(model, monkeypatch):
    monkeypatch.setattr(kernels, "find_kernels", lambda *_: change_to(LigerRMSNorm))
    fuse(model, config_of(), CPU, all_true=lambda mine: False)
    assert "forward" not in vars(model.model.norm)


def test_what_was_asked_for_and_cannot_be_used_is_said(model, monkeypatch, tiny_model):
    assert find_kernels(model, config_of(), on_gpu=False) is None
    assert find_kernels(model, config_of(kernels="none"), on_gpu=True) is None
    with pytest.raises(UserError, match=r"kernels is liger, but there is no GPU to run them\. Fix that, or leave kernels"):
        find_kernels(model, config_of(kernels="liger"), on_gpu=False)
    with pytest.raises(UserError, match=r"no GPU"):
        dry_run(config_of(kernels="liger", device="cpu").model_copy(update={"model_name": str(tiny_model)}))
    monkeypatch.setitem(kernels.sys.modules, "liger_kernel", None)
    assert find_kernels(model, config_of(), on_gpu=True) is None
    with pytest.raises(UserError, match=r"liger-kernel cannot be imported.*pip install liger-kernel"):
        find_kernels(model, config_of(kernels="liger"), on_gpu=True)
    table = types.ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": change_to(LigerRMSNorm)}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(kernels.sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(kernels.sys.modules, table.__name__, table)
    assert find_kernels(model, config_of(), on_gpu=True) is None
    with pytest.raises(UserError, match=r"it has none for models of type 'llama'"):
        find_kernels(model, config_of(kernels="liger"), on_gpu=True)
    table.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"] = find_kernels
    assert find_kernels(model, config_of(), on_gpu=True) is find_kernels
