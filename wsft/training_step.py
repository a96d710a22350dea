"""Runs plans: an optimizer step, or logprobs under the current parameters."""

from __future__ import annotations

import functools
import logging

import numpy as np

from wsft.config import WeightedSFTConfig
from wsft.distributed.engine import BaseReference, Engine, Reference, StepResult
from wsft.distributed.world import World
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.lora import as_if_trained
from wsft.model.row_layouts import find_row_layouts
from wsft.planning import Pass, Plan, Planner, RowSettings, with_proximal
from wsft.rollouts.batch import Batch

log = logging.getLogger(__name__)


class TrainingStep:
    def __init__(self, engine: Engine, planner: Planner, reference: Reference | BaseReference | None, world: World):
        self._engine, self._planner, self._reference, self._world = engine, planner, reference, world

    def __call__(self, plan: Plan, prox_logp_N: np.ndarray | None) -> StepResult:
        """Take an optimizer step. A collective.

        Args:
            prox_logp_N: the result of `score(plan.at_start)` at the start of the batch.
        """
        training = plan.training if prox_logp_N is None else with_proximal(plan.training, prox_logp_N)
        # those of the records take precedence over those of the base model
        return self._engine.step(training.micro_batches, None if plan.has_ref_logp else self._reference)

    def logprobs(self, batch: Batch) -> np.ndarray:
        """The current logprobs of the trained tokens of a batch, [N] float32; 0 elsewhere. A collective."""
        return self.score(self._planner.scoring(batch))

    def score(self, scoring: Pass) -> np.ndarray:
        """As `logprobs`, of a batch that is planned."""
        found, logp_N = self._engine.logprobs(scoring.micro_batches), np.zeros(scoring.num_tokens, dtype=np.float32)
        for at_N, logp in zip(scoring.positions, found, strict=True):
            logp_N[at_N] = logp.float().cpu().numpy()
        return self._world.sum_arrays(logp_N)


def choose_rows(
    config: WeightedSFTConfig, model: WeightedSFTModel, reference: WeightedSFTModel | None, pad_token_id: int, world: World
) -> RowSettings:
    """Find by trying, on all ranks, how the model and the reference model can take rows, and write it to the log. A
    collective."""
    models = [model, *([reference] if reference else [])]
    look = functools.partial(
        find_row_layouts,
        device=world.device,
        max_token_len=config.max_token_len,
        packing=config.packing,
        all_true=world.all_true,
    )
    with as_if_trained(model):
        layouts = [look(each) for each in models]
    packs, pads = all(layout.packs for layout in layouts), all(layout.pads for layout in layouts)
    shares = packs and config.share_prefixes and all(layout.shares for layout in layouts)
    name = type(model.model).__name__
    if packs:
        prefixes = ", prefixes that they share are run once" if shares else ""
        log.info("sequences are packed%s; attention: %s", prefixes, model.attention)
    elif config.packing and pads:
        log.info("%s cannot keep packed sequences apart: they are padded instead", name)
    elif not pads:
        log.info(
            "the logits of %s depend on the other sequences of a micro-batch: each sequence is its own, which is slow", name
        )
    shortest = max(each.shortest for each in models)
    return RowSettings(packs, shares, config.micro_batch_tokens if packs or pads else 1, shortest, pad_token_id)
