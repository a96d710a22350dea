"""Publishes LoRA adapters as folders in peft's format, one per version, under names that no other version has.

    FOLDER/wsft_3fa9c1d2_b61e02_41/     adapter_model.safetensors, adapter_config.json

The name holds the run, the start of the run and the step: a server's caches are keyed by names and paths, so none of them can
hold another version. A folder is complete or absent. It is deleted once no server knows its name any more: a server whose
memory for adapters is full reads them again, and vLLM's engine ends if it cannot. Knows nothing of Atropos, objectives or
optimizers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wsft.atomic_files import atomic_folder
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.publish.tensors import TrainedTensors
from wsft.run.adapter import CONFIG, WEIGHTS, name_in_file


class AdapterFolder:
    """
    Args:
        path: of the folder of versions.
        run: what names this run on every start, such as the absolute path of its output_dir.
        start: what names this start of it.
        peft_config: the contents of adapter_config.json.
    """

    def __init__(self, path: Path, run: str, start: str, peft_config: dict[str, Any], tensors: TrainedTensors, world: World):
        self.path, self._peft_config, self._tensors, self._world = path, peft_config, tensors, world
        self.prefix = f"wsft_{hashlib.blake2b(run.encode(), digest_size=4).hexdigest()}_"
        self._of_start = f"{self.prefix}{start[:6]}_"

    def name(self, step: int) -> str:
        return f"{self._of_start}{step}"

    def publish(self, step: int) -> dict[str, float]:
        """Write the adapter after `step` steps, as it is in the forward pass; returns metrics. A collective.

        Raises:
            UserError: it is not finite, or the folder cannot be written.
        """
        start = time.monotonic()
        tensors = {name_in_file(name): tensor for name, tensor in self._tensors.adapters(wanted=self._world.rank == 0)}
        size = self._world.on_rank_0(lambda: self._write(step, tensors)) or 0
        return {"publish/version": step, "publish/seconds": time.monotonic() - start, "publish/gib": size / 2**30}

    def _write(self, step: int, tensors: dict[str, torch.Tensor]) -> int:
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"the adapter after step {step} is not finite ({len(broken)} tensors, such as {broken[0]}) and was not "
                f"published: lower learning_rate, or resume from an earlier checkpoint"
            )
        try:
            with atomic_folder(self.path / self.name(step)) as aside:
                save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
                (aside / CONFIG).write_text(json.dumps(self._peft_config, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"the adapter cannot be published to {self.path} ({error}): make space there, or set another publish_folder"
            ) from error
        return sum(tensor.nbytes for tensor in tensors.values())

    def delete_all_but(self, names: set[str]) -> None:
        """Delete folders of this run, of earlier starts, too. Called on rank 0."""
        for folder in self.path.glob(f"{self.prefix}*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)
