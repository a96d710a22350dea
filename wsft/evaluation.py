"""Loss and logprobs on held-out records, without gradients."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
import torch

from wsft.config import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.errors import UserError
from wsft.loss.terms import Coefficients
from wsft.planning import loss_settings
from wsft.rollouts.batch import AtroposBatchProcessor, Batch, token_terms
from wsft.rollouts.data_files import DataFiles
from wsft.rollouts.sources import FileSource
from wsft.training_step import TrainingStep

log = logging.getLogger(__name__)

RECORDS_TOGETHER = 1024  # sequences among which parts of a group are looked for


class Evaluation:
    """The records of eval_data, read once, as one batch.

    Args:
        processor: of these records alone.
    Raises:
        UserError: the file has no sequence that can be trained.
    """

    def __init__(self, config: WeightedSFTConfig, processor: AtroposBatchProcessor, take_step: TrainingStep, world: World):
        self._config, self._take_step = config, take_step
        batch = world.on_rank_0(lambda: _read(config.eval_data, processor))
        self._batch = world.broadcast(batch, Batch, 0).with_final_advantages(processor.shaping)
        log.info("eval_data: %d sequences with %d trained tokens", len(self._batch.lengths), self._batch.num_trained)

    def metrics(self) -> dict[str, float]:
        """Of the current parameters. A collective."""
        start, batch, config = time.monotonic(), self._batch, self._config
        logp_N, rows = self._take_step.logprobs(batch), list(range(len(batch.lengths)))
        scales_R = batch.scales(config.reduction, config.max_token_len)
        terms = token_terms(batch, rows, scales_R, replace(loss_settings(config), coefficients=Coefficients()))
        logp, advantages = logp_N[batch.trained_positions(rows)], batch.advantages[batch.loss_mask]
        loss, _ = terms(torch.from_numpy(logp), slice(None))
        return {
            "eval/loss": float(loss.double().sum()),
            "eval/logp_positive": _mean(logp[advantages > 0]),
            "eval/logp_negative": _mean(logp[advantages < 0]),
            "eval/seconds": time.monotonic() - start,
        }


def _read(path: str, processor: AtroposBatchProcessor) -> Batch:
    source, rollouts = FileSource(DataFiles(path), RECORDS_TOGETHER, processor), []
    while taken := source.rollouts()[0]:
        rollouts += taken
    batch = Batch.of(rollouts, processor.decoder.take_counts())
    if not batch.num_trained:
        raise UserError(f"eval_data {path} holds no sequence with a trained token (left out: {batch.rejected or 'none'})")
    return batch


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
