"""WeightedSFTTrainer: the loop. What the run is stands in `train`; each step in `_train_on`."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from wsft import ds_config
from wsft.batching import AtroposBatchProcessor, Batch, pad, plan_shares
from wsft.checkpoint import publish
from wsft.config import UserError, WeightedSFTConfig
from wsft.engine import Engine, MicroBatch, StepResult, bf16_is_native, start_ranks
from wsft.feed import Feed, open_source
from wsft.metrics import Metrics, Silence, speak
from wsft.model import load_model, load_model_config, load_tokenizer
from wsft.world import World, ranks_from_environment

log = logging.getLogger(__name__)

BAD_STEPS_ALLOWED = 3
RESULTS = ("config.yaml", "metrics.jsonl", "final", "final.partial")  # what a run leaves, and what overwriting removes


class TrainingDiverged(UserError):
    """Three steps in a row with a loss or gradients that are not finite."""


class WeightedSFTTrainer:
    """One run: batches from Atropos (or a file) in, a trained Hugging Face folder out.

    Under a launcher (deepspeed, torchrun, srun) every rank makes one; without, it is the only rank.
    """

    def __init__(self, config: WeightedSFTConfig):
        self.config = config
        self.folder = Path(config.output_dir)

    def train(self) -> Path:
        """Train to the end; the folder of the trained model.

        Raises:
            UserError: what the user can mend, said in a sentence. With several ranks an exception ends the process instead:
                all ranks, non-zero, within seconds, with the message of the rank that failed.
        """
        rank = ranks_from_environment()
        speak(rank)
        if rank != 0 or not sys.stderr.isatty():
            disable_progress_bar()  # of transformers: loading weights, writing shards
        world = start_ranks(self.config)
        with world.ending_together():
            self._set_up(world)
            try:
                self._loop()
            except BaseException:
                self.metrics.close(failed=True)
                raise
            self.metrics.close()
            log.info("saving the model in %s", self.folder / "final")
            publish(self.engine, self.model.model, self.tokenizer, self.folder / "final", world)
        return self.folder / "final"

    def _set_up(self, world: World) -> None:
        self.world = world
        shape = load_model_config(self.config).get_text_config()
        self.tokenizer = load_tokenizer(self.config)
        native_bf16 = bf16_is_native(world.device)
        self.config, ds = ds_config.resolve(self.config, world.size, shape.hidden_size, native_bf16)
        self.processor = AtroposBatchProcessor(
            self.tokenizer.pad_token_id,
            max_token_len=self.config.max_token_len,
            overlong=self.config.overlong,
            score_advantages=self.config.score_advantages,
            vocab_size=shape.vocab_size,
        )
        source = open_source(self.config, self.processor, world)
        world.agree(_error_of(self._open_folder) if world.rank == 0 else None)
        precision = "bf16" if ds["bf16"]["enabled"] else "fp32"
        if precision == "bf16" and not native_bf16:
            log.info('this device is slow at bf16, having none of its own: "auto" for bf16.enabled in the JSON takes fp32 here')
        log.info("loading %s in %s, ZeRO stage %d", self.config.model_name, precision, ds["zero_optimization"]["stage"])
        self.model = load_model(self.config, ds)
        self.engine = Engine(self.config, ds, self.model, world)
        self.model.check_head(world.device)
        self.feed = Feed(source, world, self.config.advantage_normalization)
        self.metrics = Metrics(self.config, self.folder) if world.rank == 0 else Silence()
        log.info("batches from %s; results in %s", self.config.data or self.config.atropos_url, self.folder)

    def _open_folder(self) -> None:
        """Make output_dir, refuse another run's results, write the resolved config."""
        found = [name for name in sorted(p.name for p in self.folder.glob("*"))]
        if found and not self.config.overwrite_output_dir:
            raise UserError(
                f"output_dir {self.folder} is not empty ({', '.join(found[:4])}): choose another one, or replace the results "
                f"in it with --overwrite_output_dir"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (self.folder / name for name in RESULTS):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            (self.folder / "config.yaml").write_text(self.config.to_yaml())
        except OSError as error:
            raise UserError(f"output_dir {self.folder} cannot be written: {error}") from error

    def _loop(self) -> None:
        bad = step = self.not_finite = 0
        while step < self.config.training_steps:
            start = time.monotonic()
            self.metrics.doing("waiting for a batch")
            batch = self.feed.next(waiting=self.metrics.doing)
            if batch is None:
                break
            wait = time.monotonic() - start
            self.metrics.doing("training")
            result = self._train_on(batch)
            step += 1
            bad = 0 if result.applied and math.isfinite(result.loss) else bad + 1
            self.not_finite += bad > 0
            self.metrics.step(self._describe(step, batch, result, wait, time.monotonic() - start))
            self._shout(step, result, bad)
        if step == 0:
            raise UserError(f"data {self.config.data} holds no usable sequence: nothing was trained")
        log.info("trained %d step(s)", step)

    def _train_on(self, batch: Batch) -> StepResult:
        """One optimizer step: every rank plans the same shares from the same batch and runs its own."""
        shares = plan_shares(batch.lengths, self.world.size, self.config.micro_batch_tokens)
        # counted over the whole batch before the first backward: the step does not depend on how it is split
        divisor = max(batch.num_trained, 1) if self.config.reduction == "mean" else 1
        micro_batches = [self._micro_batch(batch, rows, divisor) for rows in shares[self.world.rank]]
        return self.engine.step(micro_batches)

    def _micro_batch(self, batch: Batch, rows: list[int], divisor: int) -> MicroBatch:
        padded = pad(batch, rows, self.tokenizer.pad_token_id)
        trained_N = padded["loss_masks"].flatten().nonzero().squeeze(1)
        advantages_N = padded["advantages"].flatten()[trained_N]
        return MicroBatch(padded["tokens"], trained_N, advantages_N / divisor, advantages_N.sign())

    def _describe(self, step: int, batch: Batch, result: StepResult, wait: float, spent: float) -> dict:
        advantages = batch.advantages[batch.loss_mask]
        trained, total = len(advantages), len(batch.tokens)
        positive, negative = int((advantages > 0).sum()), int((advantages < 0).sum())
        truncated = batch.rejected.get("truncated", 0)
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens/trained": trained,
            "tokens/total": total,
            "tokens/per_second": total / spent,
            "advantage/mean": float(advantages.mean()) if trained else math.nan,
            "advantage/std": float(advantages.std()) if trained else math.nan,
            "logp/positive": result.logp_positive / positive if positive else math.nan,
            "logp/negative": result.logp_negative / negative if negative else math.nan,
            "entropy": result.entropy / trained if trained else math.nan,
            "data/sequences": len(batch.lengths),
            "data/rejected": int(batch.counts.sum()) - truncated,
            "data/truncated": truncated,
            "data/possibly_lost_batches": self.feed.possibly_lost,
            "steps/not_finite": self.not_finite,
            "time/step": spent,
            "time/wait": wait,
        }

    def _shout(self, step: int, result: StepResult, bad: int) -> None:
        if not bad:
            return
        what = "gradients are not finite, the step was skipped" if not result.applied else "the loss is not finite"
        log.error("step %d: %s (loss %s, grad_norm %s); %d in a row", step, what, result.loss, result.grad_norm, bad)
        if bad >= BAD_STEPS_ALLOWED:
            raise TrainingDiverged(
                f"{bad} steps in a row were not finite, the last at step {step}: lower learning_rate, set max_grad_norm, or "
                f"look at the advantages of the batches"
            )


def _error_of(action: object) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None
