"""The adapter of a LoRA checkpoint as a folder that peft, vLLM and SGLang load, or added to the weights of its base.

Knows nothing of ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from wsft.distributed.deepspeed_files import saved_parameters
from wsft.errors import UserError
from wsft.model.loading import empty_model
from wsft.model.weight_files import Made, files_of, made_of, read
from wsft.run.base_files import of_tokenizer, read_files, write_files
from wsft.run.checkpoint import DEEPSPEED, HUGGING_FACE, Checkpoint

CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"


def write_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    """In peft's format, in float32, with the tokenizer."""
    saved = saved_parameters(checkpoint.folder / DEEPSPEED)
    tensors = {
        name_in_file(f"{module}.{matrix}"): saved[f"{module}.{matrix}"].contiguous().float()
        for module in checkpoint.metadata["adapters"]["modules"]
        for matrix in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = peft_config(checkpoint.metadata, empty_model_of(checkpoint))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_files(folder, of_tokenizer(read_files(checkpoint.folder / HUGGING_FACE)))


def name_in_file(name: str) -> str:
    """Of a parameter "model.layers.0.self_attn.q_proj.lora_A"."""
    return f"base_model.model.{name}.weight"


def peft_config(metadata: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The contents of adapter_config.json. `metadata`: of a checkpoint; `model`: on the meta device."""
    adapters = metadata["adapters"]
    alpha = adapters["alpha"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": metadata["config"]["model_name"],
        "revision": metadata.get("revision"),
        "r": adapters["rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": list(adapters["target_modules"]),  # sorted: peft writes a set, in another order each time
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in adapters["modules"]),
        "inference_mode": True,
    }


def merge(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> str:
    """Write the model with W + (alpha / r) B A, computed in float32 and rounded once to `dtype` (that of the base if None),
    file by file of the base. Returns a sentence about what rounding lost.

    Raises:
        UserError: the checkpoint has no adapter, or its base has no safetensors here.
    """
    if "adapters" not in checkpoint.metadata:
        raise UserError(f"{checkpoint.folder} has no adapter to merge (it was trained without lora_rank): leave --merge out")
    name = checkpoint.metadata["config"]["model_name"]
    files = files_of(name)
    if not files:
        raise UserError(f"the base model {name!r} has no safetensors here: put it where it was, or save it as safetensors")
    changes, places, total = _Changes(checkpoint, files), {}, 0
    asked = getattr(torch, dtype) if dtype else None
    for path in sorted(set(files.values())):
        shard = {}
        for tensor_name in (each for each, file in files.items() if file == path):
            weight = read(path, tensor_name)
            to = asked if asked and weight.is_floating_point() else weight.dtype
            shard[tensor_name] = changes.applied(tensor_name, weight, to)
            total += shard[tensor_name].nbytes
        save_file(shard, folder / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, path.name)
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_files(folder, read_files(checkpoint.folder / HUGGING_FACE))
    return changes.lost()


class _Changes:
    """(alpha / r) B A, for tensors of the files of the base."""

    def __init__(self, checkpoint: Checkpoint, files: dict[str, Path]):
        self._adapters = checkpoint.metadata["adapters"]
        self._saved = saved_parameters(checkpoint.folder / DEEPSPEED)
        self._model = empty_model_of(checkpoint)
        adapted = {f"{module}.weight" for module in self._adapters["modules"]}
        made, _ = made_of(self._model, files)
        self._made = {source: each for each in made if adapted & set(each.targets) for source in each.sources}
        self._adapted, self._ready = adapted, {}  # changes of tensors that were made together with one that was asked for
        self._wanted2 = self._lost2 = 0.0  # sums of squares

    def applied(self, name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight of that name with its change."""
        if name not in self._made:
            return weight.to(dtype)
        if name not in self._ready:
            self._ready |= self._of(self._made[name])
        change = self._ready.pop(name)
        merged = (weight.float() + change).to(dtype)
        self._wanted2 += change.double().square().sum().item()
        self._lost2 += (merged.float() - weight.float() - change).double().square().sum().item()
        return merged

    def _of(self, made: Made) -> dict[str, torch.Tensor]:
        """By the names of the files. Conversions only rearrange values, so that those of a change are that of the tensor."""
        shapes = self._model.state_dict()
        whole = {}
        for target in made.targets:
            if target not in self._adapted:
                whole[target] = torch.zeros(shapes[target].shape)
                continue
            module = target.removesuffix(".weight")
            down, up = (self._saved[f"{module}.{matrix}"].contiguous().float() for matrix in ("lora_A", "lora_B"))
            change = up @ down * (self._adapters["alpha"] / self._adapters["rank"])
            whole[target] = change.T if isinstance(self._model.get_submodule(module), Conv1D) else change
        return dict(revert_weight_conversion(self._model, whole))

    def lost(self) -> str:
        share = (self._lost2 / self._wanted2) ** 0.5 if self._wanted2 else 0.0
        hint = ": serve the adapter beside the base instead, or use --merge_dtype float32" if share > 0.05 else ""
        return f"rounding lost {share:.1%} of what the adapter adds to the weights{hint}"


def empty_model_of(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint, on the meta device."""
    folder, trusts = checkpoint.folder / HUGGING_FACE, checkpoint.metadata["config"]["trust_remote_code"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[checkpoint.metadata["precision"]]
    return empty_model(config, trusts, dtype)
