"""One optimizer step on a batch: which sequences share micro-batches, on which ranks, with which weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numpy as np

from wsft.config import WeightedSFTConfig
from wsft.distributed.engine import BaseReference, Engine, MicroBatch, Reference, StepResult
from wsft.distributed.load_balancing import Cost, Load, assign_rollouts
from wsft.distributed.world import World
from wsft.loss.objectives import Objective
from wsft.loss.terms import Coefficients
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.flops import StepFlops
from wsft.model.lora import as_if_trained
from wsft.model.packing import Prefixes
from wsft.model.row_layouts import find_row_layouts
from wsft.rollouts.batch import Batch, pack, pad, token_terms
from wsft.run.measurements import of_batch, of_plan

log = logging.getLogger(__name__)


class TrainingStep:
    """Takes optimizer steps. Tries first how rows can be laid out: a collective, that writes what it found to the log."""

    def __init__(
        self,
        config: WeightedSFTConfig,
        engine: Engine,
        model: WeightedSFTModel,
        reference: Reference | BaseReference | None,
        flops: StepFlops,
        pad_token_id: int,
        world: World,
    ):
        self.config, self.engine, self.model, self.reference, self.world = config, engine, model, reference, world
        self.flops, self.pad_token_id = flops, pad_token_id
        self.objective = Objective(config.objective, config.objective_args)
        self.coefficients = Coefficients(config.kl_coef, config.entropy_coef, config.distill_coef, config.distill_renormalize)
        self.packs, self.shares, self.micro_batch_tokens = self._choose_layout()

    def __call__(
        self, batch: Batch, step: int, prox_logp_N: np.ndarray | None
    ) -> tuple[Callable[[], StepResult], dict[str, float], float]:
        """Take an optimizer step, after `step` others. A collective.

        Args:
            prox_logp_N: for each token its logprob at the start of the batch; None: that is now.
        Returns:
            a function that returns its result, the metrics of the batch and of its assignment to ranks (which every rank
            computes), and the FLOPs of all ranks.
        """
        values, stale_N = of_batch(batch, step), batch.stale(step, self.config.max_staleness)
        if stale_N is not None:
            values["data/stale"] = int((stale_N & batch.loss_mask).sum())
        # counted over the global batch before the first backward, so that the step does not depend on how it is split
        scales_R = batch.scales(self.config.reduction, self.config.max_token_len)
        if self.config.skip_zero_weight and not self.coefficients.concern_every_token:
            batch = batch.of_weight(self.objective, self.config.corrections, stale_N)
        rows = np.flatnonzero(batch.trained_tokens if self.config.skip_zero_weight else batch.lengths).tolist()
        load, assignment, prefixes = self._assign(batch, rows)
        values |= of_plan(assignment, load, self.packs)
        micro_batches = [
            self._micro_batch(batch, rows, scales_R, prefixes, stale_N, prox_logp_N) for rows in assignment[self.world.rank]
        ]
        flops = (
            sum(load.of(rows) for of_rank in assignment for rows in of_rank) + self.flops.per_trained_token * batch.num_trained
        )
        return self.engine.step(micro_batches, self._reference_for(batch)), values, flops

    def logprobs(self, batch: Batch) -> np.ndarray:
        """The current logprobs of the trained tokens of a batch, [N] float32; 0 elsewhere. A collective."""
        rows = np.flatnonzero(batch.trained_tokens).tolist()
        _, assignment, prefixes = self._assign(batch, rows)
        mine, scales_R = assignment[self.world.rank], np.ones(len(batch.lengths))
        found = self.engine.logprobs([self._micro_batch(batch, rows, scales_R, prefixes) for rows in mine])
        logp_N = np.zeros(len(batch.tokens), dtype=np.float32)
        for rows, of_rows in zip(mine, found, strict=True):
            logp_N[batch.trained_positions(rows)] = of_rows.float().cpu().numpy()
        return self.world.sum_arrays(logp_N)

    def _choose_layout(self) -> tuple[bool, bool, int]:
        """Whether to pack sequences, whether to share prefixes, and the token budget of a micro-batch: what the model and the
        reference model support on all ranks."""
        models = [self.model, *([self.reference.model] if isinstance(self.reference, Reference) else [])]
        look = functools.partial(
            find_row_layouts,
            device=self.world.device,
            max_token_len=self.config.max_token_len,
            packing=self.config.packing,
            all_true=self.world.all_true,
        )
        with as_if_trained(self.model):
            layouts = [look(model) for model in models]
        packs, pads = all(layout.packs for layout in layouts), all(layout.pads for layout in layouts)
        self.shortest = max(model.shortest for model in models)
        shares = packs and self.config.share_prefixes and all(layout.shares for layout in layouts)
        if packs:
            prefixes = ", prefixes that they share are run once" if shares else ""
            log.info("sequences are packed%s; attention: %s", prefixes, self.model.attention)
        elif self.config.packing and pads:
            log.info("%s cannot keep packed sequences apart: they are padded instead", type(self.model.model).__name__)
        elif not pads:
            name = type(self.model.model).__name__
            log.info(
                "the logits of %s depend on the other sequences of a micro-batch: each sequence is its own, which is slow", name
            )
        return packs, shares, self.config.micro_batch_tokens if packs or pads else 1

    def _assign(self, batch: Batch, rows: list[int]) -> tuple[Load, list[list[list[int]]], Prefixes]:
        """Assign rollouts to micro-batches of ranks."""
        prefixes = batch.prefixes(rows) if self.shares else Prefixes.none(len(batch.lengths))
        load = Load(batch.lengths, Cost(self.flops.per_token, self.flops.per_pair), prefixes)
        return load, assign_rollouts(load, rows, self.world.size, self.micro_batch_tokens, self.packs), prefixes

    def _reference_for(self, batch: Batch) -> Reference | BaseReference | None:
        """None if the records have the logprobs of all trained tokens, which take precedence over those of the base model."""
        known = len(batch.ref_logp) and not np.isnan(batch.ref_logp[batch.loss_mask]).any()
        return None if known else self.reference

    def _micro_batch(
        self,
        batch: Batch,
        rows: list[int],
        scales_R: np.ndarray,
        prefixes: Prefixes,
        stale_N: np.ndarray | None = None,
        prox_logp_N: np.ndarray | None = None,
    ) -> MicroBatch:
        settings = self.objective, self.coefficients, self.config.temperature, self.config.corrections
        terms = token_terms(batch, rows, scales_R, *settings, stale_N, prox_logp_N)
        if self.packs:
            tokens_1T, trained_N, layout = pack(batch, rows, self.pad_token_id, prefixes)
            return MicroBatch(tokens_1T, trained_N, terms, layout)
        padded = pad(batch, rows, self.pad_token_id, self.shortest)
        trained_N = padded["loss_masks"].flatten().nonzero().squeeze(1)
        return MicroBatch(padded["tokens"], trained_N, terms, None)
