"""A checkpoint as a Hugging Face folder, without a GPU:

    python -m wsft.export runs/first/checkpoints/step_1000 OUT
    python -m wsft.export runs/first/checkpoints/step_1000 OUT --merge     # LoRA: the model, not the adapter (adapter.py)

Parameters are assembled one at a time in a memory-mapped file, from which transformers writes shards of safetensors under the
names that tensors have on disk. It needs the memory of about one shard, and temporarily twice the model's size on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wsft.atomic_files import atomic_folder
from wsft.distributed.deepspeed_files import saved_parameters
from wsft.errors import UserError
from wsft.logs import configure_logging
from wsft.model.weight_files import files_of, made_of, read
from wsft.run.adapter import empty_model_of, merge, write_adapter
from wsft.run.base_files import read_files, write_files
from wsft.run.checkpoint import DEEPSPEED, HUGGING_FACE, Checkpoint

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9


def export(checkpoint: Checkpoint, out: Path) -> None:
    """Write what was trained, with its tokenizer: the model, in the precision it was trained in, or with LoRA the adapter.
    Complete or absent: an existing folder is replaced at the end. OSError if the disk is full."""
    with atomic_folder(out) as aside:
        if "adapters" in checkpoint.metadata:
            write_adapter(checkpoint, aside)
        else:
            _write_model(checkpoint, aside)


def _write_model(checkpoint: Checkpoint, folder: Path) -> None:
    model = empty_model_of(checkpoint)
    untrained, copied = _as_they_were(checkpoint, model)
    with _mapped_state(model, saved_parameters(checkpoint.folder / DEEPSPEED), folder / "mapped") as state:
        trained = {name: tensor for name, tensor in state.items() if name not in untrained}
        model.save_pretrained(folder, state_dict=trained, max_shard_size=SHARD_BYTES)
    if copied:
        _add(copied, folder)
    for name in ("config.json", "generation_config.json"):  # as written by this version of transformers
        (folder / name).unlink(missing_ok=True)
    write_files(folder, read_files(checkpoint.folder / HUGGING_FACE))


def _as_they_were(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[set[str], dict[str, Path]]:
    """What is copied from the files of the base model: the names of parameters that were not trained; tensor -> file, of their
    tensors and of those that transformers does not load, such as layers for multi-token prediction."""
    named, metadata = checkpoint.metadata["config"]["model_name"], checkpoint.metadata
    files = files_of(named)
    if metadata.get("not_loaded") and not files:
        log.warning(
            "%s does not exist any more: %d of its tensors that transformers does not load are missing in the export",
            named, metadata["not_loaded"],
        )  # fmt: skip
    made, others = made_of(model, files)
    untrained = [each for each in made if set(metadata.get("untrained", [])).issuperset(each.targets)]
    copied = [*others, *(name for each in untrained for name in each.sources)]
    return {name for each in untrained for name in each.targets}, {name: files[name] for name in copied}


def _add(copied: dict[str, Path], folder: Path) -> None:
    """Copy tensors from those files into additional shards of a folder of safetensors, and update its index."""
    single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index_path.exists():
        index = json.loads(index_path.read_text())
    else:
        # a file with its old name would be taken for the whole model
        single = single.rename(folder / "model-00001-of-00001.safetensors")
        with safe_open(single, "pt") as file:
            index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(file.keys(), single.name)}
    for number, tensors in enumerate(_shards(copied), start=1):
        name = f"model-others-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        index["weight_map"] |= dict.fromkeys(tensors, name)
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(copied: dict[str, Path]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, file in copied.items():
        tensor = read(file, name)
        if shard and sum(each.nbytes for each in (*shard.values(), tensor)) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


@contextlib.contextmanager
def _mapped_state(model: PreTrainedModel, saved: dict[str, torch.Tensor], path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The model's state dict in its types, in a memory-mapped file; tied parameters share memory."""
    empty = model.state_dict(keep_vars=True)
    missing = [name for name in empty if name not in saved]
    if missing:
        raise UserError(f"the checkpoint lacks {missing[:3]} of {type(model).__name__}: was it saved by this version of wsft?")
    distinct = {id(tensor): name for name, tensor in reversed(empty.items())}
    sizes = [empty[name].nbytes + -empty[name].nbytes % 64 for name in distinct.values()]
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, sum(sizes)))  # a full disk is an error here, not a SIGBUS later
    mapped, places, offset = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.uint8), {}, 0
    for (key, name), size in zip(distinct.items(), sizes, strict=True):
        place = mapped[offset : offset + empty[name].nbytes].view(empty[name].dtype).view(empty[name].shape)
        places[key] = place.copy_(saved[name].contiguous())
        offset += size
    yield {name: places[id(tensor)] for name, tensor in empty.items()}
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m wsft.export", description="Write a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path, help="a folder like output_dir/checkpoints/step_100")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--merge", action="store_true", help="LoRA: write the model with its adapter added to the weights")
    parser.add_argument("--merge_dtype", choices=("float32", "bfloat16"), help="type of the sums; as in the base if unset")
    args = parser.parse_args()
    configure_logging(0)
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        if args.out.exists():
            raise UserError(f"{args.out} exists: name a new folder")
        checkpoint = Checkpoint.at(args.checkpoint)
        if args.merge:
            with atomic_folder(args.out) as aside:
                print(merge(checkpoint, aside, args.merge_dtype))
        else:
            export(checkpoint, args.out)
    except (UserError, OSError) as error:
        sys.exit(f"export: error: {error}")
    print(f"the model of {args.checkpoint} is in {args.out}")
