"""Writing the trained model where others can load it. Write last: to a folder beside it, then rename."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wsft.config import UserError
from wsft.engine import Engine
from wsft.world import World

log = logging.getLogger(__name__)


def publish(engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World) -> None:
    """A Hugging Face folder (safetensors, config, tokenizer) of the engine's parameters. All ranks call it together."""
    state = {name: value for name, value in engine.full_parameters() if value is not None}
    error = None
    if world.rank == 0:
        aside = folder.with_name(f"{folder.name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        except Exception as failure:  # a full disk is rank 0's alone: the others must hear of it
            shutil.rmtree(aside, ignore_errors=True)
            error = UserError(f"the model cannot be saved in {folder}: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
    world.agree(error)
