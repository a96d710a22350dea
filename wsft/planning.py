"""What each rank runs for a batch: micro-batches with their weights, and what is known of the step before it is taken.

Pure, without messages between ranks: every rank plans the same from the same batch. The feed calls it in its thread while the
step before trains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from wsft.config import WeightedSFTConfig
from wsft.distributed.engine import MicroBatch
from wsft.distributed.load_balancing import Cost, Load, assign_rollouts
from wsft.loss.advantages import Shaping
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients, LossSettings
from wsft.model.flops import StepFlops
from wsft.model.packing import Prefixes, VarlenMetadata
from wsft.rollouts.batch import Batch, pack, pad, token_terms
from wsft.run.measurements import missing, of_batch, of_plan


@dataclass(frozen=True)
class RowSettings:
    """How sequences become rows of micro-batches: what the models can do (row_layouts.py), within the run's settings.

    Args:
        packs: several in one row; else each is a row of its own, padded.
        shares: with their common prefixes once.
        micro_batch_tokens: of a micro-batch, padding included.
        shortest: tokens to which rows are padded at least.
    """

    packs: bool
    shares: bool
    micro_batch_tokens: int
    shortest: int
    pad_token_id: int


@dataclass(frozen=True)
class Pass:
    """Forward passes of this rank over a batch, as many as on every rank."""

    micro_batches: list[MicroBatch]
    positions: list[np.ndarray]  # of each, int64 [N]: its trained tokens in the flat arrays of the batch
    num_tokens: int  # of the batch
    flops: float  # of all ranks, backward passes included


@dataclass(frozen=True)
class Plan:
    """One optimizer step.

    Attributes:
        training: forward and backward passes.
        at_start: passes that score its trained tokens under the policy at the start of the batch; None: that policy is trained.
        metrics: of the batch and of its assignment to ranks; every rank has the same.
        flops: of all ranks, those of scoring the whole batch included in the first step.
        has_ref_logp: whether the records have reference logprobs of all trained tokens.
    """

    training: Pass
    at_start: Pass | None
    metrics: dict[str, float]
    flops: float
    has_ref_logp: bool


@dataclass(frozen=True)
class PlannedBatch:
    """The optimizer steps on a batch; none if no token of it is trained.

    Attributes:
        missing: see `measurements.missing`.
    """

    plans: list[Plan]
    missing: dict[str, str]


class Planner:
    """Plans for one rank.

    Args:
        has_reference: whether a model gives reference logprobs that the records lack.
        pins: put tensors into pinned memory, from which they are copied to a GPU without waiting for it.
    """

    def __init__(
        self,
        config: WeightedSFTConfig,
        rows: RowSettings,
        flops: StepFlops,
        shaping: Shaping,
        has_reference: bool,
        rank: int,
        num_ranks: int,
        pins: bool,
    ):
        self._config, self._rows, self._flops, self._shaping = config, rows, flops, shaping
        self._has_reference, self._rank, self._num_ranks, self._pins = has_reference, rank, num_ranks, pins
        self.loss = loss_settings(config)

    def __call__(self, batch: Batch, step: int) -> PlannedBatch:
        """For a global batch whose advantages are not shaped yet, to be trained after `step` optimizer steps."""
        if not batch.num_trained:
            return PlannedBatch([], {})
        parts = batch.with_final_advantages(self._shaping).minibatches(self._config.updates_per_batch)
        plans = [self._step(part, step + number, is_first=number == 0) for number, part in enumerate(parts)]
        forward_only = sum(plan.at_start.flops for plan in plans[1:]) / 3
        plans[0] = replace(plans[0], flops=plans[0].flops + forward_only)
        return PlannedBatch(plans, missing(batch, self._config.needs_behavior, self._has_reference))

    def scoring(self, batch: Batch) -> Pass:
        """Passes for the logprobs of the trained tokens of a batch."""
        assignment, load = self._assign(batch, np.flatnonzero(batch.trained_tokens).tolist())
        return self._pass(batch, assignment, np.ones(len(batch.lengths)), load)

    def _step(self, batch: Batch, step: int, is_first: bool) -> Plan:
        config, whole = self._config, batch
        values, stale_N = of_batch(batch, step), batch.stale(step, config.max_staleness)
        if stale_N is not None:
            values["data/stale"] = int((stale_N & batch.loss_mask).sum())
        # counted over the global batch before the first backward, so that the step does not depend on how it is split
        scales_R = batch.scales(config.reduction, config.max_token_len)
        if config.skip_zero_weight and not self.loss.coefficients.concern_every_token:
            batch = batch.of_weight(self.loss.objective, config.corrections, stale_N)
        rows = np.flatnonzero(batch.trained_tokens if config.skip_zero_weight else batch.lengths).tolist()
        assignment, load = self._assign(batch, rows)
        training = self._pass(batch, assignment, scales_R, load, stale_N)
        return Plan(
            training=training,
            at_start=None if is_first else self.scoring(whole),
            metrics=values | of_plan(assignment, load, self._rows.packs),
            flops=training.flops,
            has_ref_logp=bool(len(batch.ref_logp)) and not np.isnan(batch.ref_logp[batch.loss_mask]).any(),
        )

    def _assign(self, batch: Batch, rows: list[int]) -> tuple[list[list[list[int]]], Load]:
        prefixes = batch.prefixes(rows) if self._rows.shares else Prefixes.none(len(batch.lengths))
        load = Load(batch.lengths, Cost(self._flops.per_token, self._flops.per_pair), prefixes)
        return assign_rollouts(load, rows, self._num_ranks, self._rows.micro_batch_tokens, self._rows.packs), load

    def _pass(
        self,
        batch: Batch,
        assignment: list[list[list[int]]],
        scales_R: np.ndarray,
        load: Load,
        stale_N: np.ndarray | None = None,
    ) -> Pass:
        mine = assignment[self._rank]
        micro_batches = [self._micro_batch(batch, rows, scales_R, load.prefixes, stale_N) for rows in mine]
        flops = sum(load.of(rows) for of_rank in assignment for rows in of_rank)
        flops += self._flops.per_trained_token * batch.num_trained
        return Pass(micro_batches, [batch.trained_positions(rows) for rows in mine], len(batch.tokens), flops)

    def _micro_batch(
        self, batch: Batch, rows: list[int], scales_R: np.ndarray, prefixes: Prefixes, stale_N: np.ndarray | None
    ) -> MicroBatch:
        terms = token_terms(batch, rows, scales_R, self.loss, stale_N)
        if self._rows.packs:
            tokens_1T, trained_N, layout = pack(batch, rows, self._rows.pad_token_id, prefixes)
            made = MicroBatch(tokens_1T, trained_N, terms, VarlenMetadata.of(layout))
        else:
            padded = pad(batch, rows, self._rows.pad_token_id, self._rows.shortest)
            made = MicroBatch(padded["tokens"], padded["loss_masks"].flatten().nonzero().squeeze(1), terms, None)
        return made.pin_memory() if self._pins else made


def loss_settings(config: WeightedSFTConfig) -> LossSettings:
    coefficients = Coefficients(config.kl_coef, config.entropy_coef, config.distill_coef, config.distill_renormalize)
    objective = Objective(config.objective, config.objective_args)
    return LossSettings(objective, coefficients, config.temperature, config.corrections)


def with_proximal(training: Pass, prox_logp_N: np.ndarray) -> Pass:
    """The passes with the logprobs of the policy at the start of the batch, one for each token of the batch. They are pinned if
    the tokens are."""
    micro_batches = []
    for mb, at_N in zip(training.micro_batches, training.positions, strict=True):
        prox = torch.from_numpy(prox_logp_N[at_N].astype(np.float32))
        prox = prox.pin_memory() if mb.tokens_BT.is_pinned() else prox
        micro_batches.append(replace(mb, terms=replace(mb.terms, prox_logp_N=prox)))
    return replace(training, micro_batches=micro_batches)
