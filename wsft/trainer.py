"""WeightedSFTTrainer: the training loop. `train` is the run from start to end, `_train_on` one batch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wsft.config import WeightedSFTConfig
from wsft.device import has_native_matmul
from wsft.distributed import deepspeed_config
from wsft.distributed.engine import BaseReference, Engine, Reference
from wsft.distributed.process_start import start_ranks
from wsft.distributed.signals import Stop, name_of
from wsft.distributed.world import PeerFailed, World, ranks_from_environment, ranks_on_this_host
from wsft.errors import UserError
from wsft.evaluation import Evaluation
from wsft.logs import configure_logging
from wsft.loss.objectives import Objective
from wsft.model.causal_lm import largest_layer
from wsft.model.flops import StepFlops, rated_flops, step_flops
from wsft.model.kernels import fuse
from wsft.model.loading import empty_model, load_model, load_model_config, load_reference, load_tokenizer
from wsft.model.lora import Adapters, as_if_trained
from wsft.planning import PlannedBatch, Planner
from wsft.publish.adapters import AdapterFolder
from wsft.publish.folder import PublishFolder
from wsft.publish.publisher import Publisher
from wsft.publish.tensors import TrainedTensors
from wsft.publish.verification import Verification
from wsft.rollouts.batch import Batch
from wsft.rollouts.feed import Feed
from wsft.rollouts.records import is_group
from wsft.rollouts.sources import GivenSource, Position, Source, groups_of, open_source, processor_of
from wsft.run.adapter import peft_config
from wsft.run.base_files import base_files, read_files
from wsft.run.checkpoint import HUGGING_FACE, Checkpoint, Save, load_random, prune, resumable
from wsft.run.export import export
from wsft.run.fingerprint import contents_of
from wsft.run.measurements import of_speed
from wsft.run.metrics import Metrics, NullMetrics, require_wandb
from wsft.run.output_folder import RunFolder
from wsft.step_log import NO_COUNTS, StepLog, TrainingDiverged
from wsft.training_step import TrainingStep, choose_rows
from wsft.user_code import Callbacks

log = logging.getLogger(__name__)

LORA_RATE = 2e-5  # below it a warning
CHECKPOINT_BYTES = 16  # per parameter, at most: weights, float32 masters and Adam's two moments
PACKAGES = ("torch", "deepspeed", "transformers", "numpy")


class Stopped(SystemExit):
    """The run was asked to stop, and can be resumed. Raised by `WeightedSFTTrainer` as a context manager; if nothing catches
    it, the process ends with exit code 0."""

    def __init__(self):
        super().__init__(0)


class WeightedSFTTrainer:
    """One run. Under a launcher (deepspeed, torchrun, srun) every rank creates one; without a launcher there is one rank.

    `train` takes batches from an Atropos server, a file or a generator (`source`), up to the end. As a context manager the
    trainer is given batches by its caller instead, every rank alike:

        with WeightedSFTTrainer(config) as trainer:
            for groups in my_batches(trainer.state.get("position", 0)):   # rank 0 passes groups, the others anything
                metrics = trainer.step(groups)
                trainer.state["position"] = ...                           # saved in checkpoints, given back by resume
            trainer.export(folder)

    At the end of the context a checkpoint is saved. Checkpoints, publishing, metrics and signals are those of `train`: asked to
    stop, `step` raises `Stopped`, which saves and marks the run as preempted. An exception on one rank ends all.

    Attributes:
        step_number: optimizer steps so far.
        state: of the caller, a JSON object; that of rank 0 is saved.
    """

    def __init__(self, config: WeightedSFTConfig):
        self.config = config
        try:
            self.callbacks = Callbacks.load(config.callbacks)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.folder = RunFolder(config)
        self.state: dict[str, Any] = {}
        self._is_given, self._exported = True, None
        self._saving: Save | None = None

    def train(self) -> Path | None:
        """Train to the end; the folder of the trained model, or None if the run was asked to stop and can be resumed.

        Raises:
            UserError: something the user can fix. With several ranks, an exception ends all processes within seconds
                instead, with a non-zero exit code and the message of the rank that failed.
        """
        self._is_given = False
        with contextlib.suppress(Stopped), self:
            self._loop()
            if self.step_number == 0:
                raise UserError(f"data {self.config.data} holds no usable sequence: nothing was trained")
            self.export(self.folder.final)
        return self._exported

    def __enter__(self) -> WeightedSFTTrainer:
        rank = ranks_from_environment()
        configure_logging(rank)
        if rank != 0 or not sys.stderr.isatty():
            disable_progress_bar()  # those of transformers: loading weights, writing shards
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.folder))
            self.stop = stack.enter_context(Stop())
            if os.environ["WORLD_SIZE"] == "1":  # before an op is compiled; several ranks fail together, after that
                require_wandb(self.config)
                load_model_config(self.config.model_name, self.config)
            world = start_ranks(self.config)
            stack.enter_context(world.fail_together(self.folder.failed))
            try:
                with world.extended_timeout():  # models may be downloaded
                    self._set_up(world)
            except Stopped:  # nothing has been trained, so there is nothing to save
                world.on_rank_0(lambda: self.folder.write_state("preempted", "asked to stop before the first step"))
            else:
                stack.enter_context(_private_files())
                with self._closing_metrics():
                    self._end_unless_published(self._publish()[1])
                self._stack = stack.pop_all()
                return self
        raise Stopped

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        with self._stack, self._closing_metrics():
            if error and not isinstance(error, Stopped):
                raise error
            self._wind_up()
        return False

    @contextlib.contextmanager
    def _closing_metrics(self) -> Iterator[None]:
        """Inside, an exception marks the metrics as those of a run that failed."""
        try:
            yield
        except BaseException:
            self.metrics.close(failed=True)
            raise

    def step(self, groups: list[dict] | dict[str, Any] | None) -> dict[str, float]:
        """Train on a batch that the caller has: `updates_per_batch` optimizer steps. A collective.

        Args:
            groups: on rank 0 Atropos groups, or rows {"tokens", "loss_masks", "advantages"} [B, T] of tensors or arrays (see
                `sources.group_of_rows`); what other ranks pass is not used.
        Returns:
            the metrics of the last of the steps, the same on every rank as in metrics.jsonl; empty if no sequence of the groups
            can be trained, so that no step was taken.
        Raises:
            Stopped: the run was asked to stop.
            UserError: the run has taken its training_steps.
        """
        if self.step_number >= self.config.training_steps:
            raise UserError(f"{self.step_number} steps are taken, as training_steps says: set more of them")
        if self.source:
            self.source.give(groups)
        before = self.step_number
        if not self._train_on_next():
            raise Stopped
        return self._metrics if self.step_number > before else {}

    def logprobs(self, groups: list[dict] | dict[str, Any] | None) -> list[list[np.ndarray | None]] | None:
        """Logprobs of the trained tokens of groups under the current parameters, at their temperatures. A collective; arguments
        as of `step`. Returns on rank 0, for each group, an array [T] float32 for each of its sequences, NaN where it is not
        trained, or None for a sequence that is left out; on other ranks None."""
        decoder = dataclasses.replace(self.processor.decoder, group_sizes={})
        groups = self.world.on_rank_0(lambda: decoder.rendered(groups_of(groups)))
        rollouts = self.world.on_rank_0(lambda: decoder.batch(groups))
        batch = Batch.of(rollouts, decoder.take_counts()) if self.world.rank == 0 else None
        batch = self.world.broadcast(batch, Batch, 0)
        logp_N = np.where(batch.loss_mask, self.take_step.logprobs(batch), np.nan).astype(np.float32)
        if self.world.rank != 0:
            return None
        origins = [(id(rollout.origin.record), rollout.origin.sequence) for rollout in rollouts]
        found = {origin: logp_N[span] for origin, span in zip(origins, batch.spans(), strict=True)}
        return [[found.get((id(group), i)) for i in range(len(group["tokens"]) if is_group(group) else 0)] for group in groups]

    def save(self) -> Path:
        """Save a checkpoint of the last step; returns its folder, which is complete then. A collective."""
        self._finish_save()
        if self.step_number > (self.saved.step if self.saved else 0):
            self._begin_save(waits=True)
            self._finish_save()
        return self.folder.checkpoints / f"step_{self.step_number}"

    def publish(self) -> None:
        """Publish the weights, whatever publish_steps says. A collective. UserError if it fails, or nothing is published."""
        if self.publisher is None:
            raise UserError("publish() needs publish_to or publish_folder")
        self._end_unless_published(self._publish(always=True)[1])

    def export(self, folder: str | Path) -> None:
        """Save a checkpoint, and write the model into a Hugging Face folder. A collective."""
        self.save()
        folder = Path(folder)
        what = "adapter" if self.config.lora_rank else "model"
        log.info("trained %d step(s); writing the %s to %s", self.step_number, what, folder)
        with self.world.extended_timeout():
            self.world.on_rank_0(lambda: export(self.saved, folder))
        self._exported = folder

    def _set_up(self, world: World) -> None:
        self.world = world
        world.on_rank_0(lambda: require_wandb(self.config))
        model_config = load_model_config(self.config.model_name, self.config)
        empty = empty_model(model_config, self.config.trust_remote_code)
        world.expect_files(CHECKPOINT_BYTES * sum(param.numel() for param in empty.parameters()))
        self.tokenizer = load_tokenizer(self.config)
        ds = self._resolve_json(empty)
        contents = contents_of(self.config, model_config, self.tokenizer)
        self.saved = self._open_folder(contents)
        progress = {"step": 0, "feed": {}} | NO_COUNTS
        progress = self.saved.metadata if self.saved else progress
        self.processor = processor_of(self.config, model_config.get_text_config().vocab_size, self.tokenizer)
        with _private_files():
            self.source = self._open_source(progress["feed"].get("position"))
        self.metadata = {
            "num_ranks": world.size,
            "stage": ds["zero_optimization"]["stage"],
            "precision": "bf16" if ds["bf16"]["enabled"] else "fp32",
            "optimizer": ds["optimizer"]["type"],
            "revision": getattr(model_config, "_commit_hash", None),
            "contents": contents,
            "deepspeed": deepspeed_config.what_learns(ds),
        }
        self._load(ds, empty)
        self._begin(empty, progress)

    def _resolve_json(self, empty: PreTrainedModel) -> dict[str, Any]:
        """The DeepSpeed JSON; the run's config adopts values from it."""
        native_bf16 = has_native_matmul(self.world.device, torch.bfloat16)
        sizes = deepspeed_config.ModelSizes(empty.config.get_text_config().hidden_size, largest_layer(empty))
        self.config, ds = deepspeed_config.resolve(self.config, self.world.size, ranks_on_this_host(), sizes, native_bf16)
        if self.config.corrections.reweighs and Objective(self.config.objective, self.config.objective_args).needs_behavior:
            log.info(
                "%s counts the mismatch with the sampler, so the ratio of %s is to the policy at the start of the batch: with "
                "one optimizer step per batch it is 1, and clips nothing",
                "icepop" if self.config.icepop else "mismatch_cap",
                self.config.objective,
            )
        if ds["bf16"]["enabled"] and not native_bf16:
            log.info('this device is slow at bf16, having none of its own: "auto" for bf16.enabled in the JSON takes fp32 here')
        return ds

    def _open_folder(self, contents: dict[str, str | None]) -> Checkpoint | None:
        """The checkpoint to resume from, which rank 0 has verified."""
        world = self.world
        with _private_files():
            start = world.on_rank_0(lambda: self.folder.open(self.config, contents))
        token = world.broadcast_text(self.folder.token)
        world.run_on_all_ranks(lambda: self.folder.require_shared(token))
        metadata = json.loads(world.broadcast_text(json.dumps(start.metadata if start else None)))
        return Checkpoint(self.folder.checkpoints / f"step_{metadata['step']}", metadata) if metadata else None

    def _load(self, ds: dict[str, Any], empty: PreTrainedModel) -> None:
        """The models, and the engine with the state of the checkpoint."""
        start, precision = self.saved, self.metadata["precision"]
        log.info("loading %s in %s, ZeRO stage %d", self.config.model_name, precision, self.metadata["stage"])
        dtype = "bfloat16" if precision == "bf16" else "float32"
        self.base_files = self.world.on_rank_0(
            lambda: read_files(start.folder / HUGGING_FACE) if start else base_files(self.config, dtype)
        )
        self._stop_if_asked()
        self.model = load_model(self.config.model_name, self.config, ds)
        fuse(self.model.model, self.config, self.world.device, self.world.all_true)
        self.processor.decoder.vocab_size = self.model.vocab_size
        if self.config.lora_rank:
            self._add_adapters(empty)
        self.metadata |= {"untrained": sorted(self.model.untrained), "not_loaded": self.model.not_loaded}
        self._stop_if_asked()
        self.reference = self._load_reference(ds, self.model.vocab_size)
        with resumable(start, self.metadata, ds, self.world) as saved:
            self.engine = Engine(self.config, ds, self.model, self.world)
            with as_if_trained(self.model):
                self.model.check_head(self.world.device)
            if saved:
                self.engine.load(saved)
        if self.config.lora_rank and self.config.kl_coef and not self.reference:
            log.info("kl_coef: to ref_logprobs where records have them, else to the base model, with the adapters switched off")
            self.reference = BaseReference(self.engine)

    def _begin(self, empty: PreTrainedModel, progress: dict[str, Any]) -> None:
        """What the loop works with, from where it was."""
        planner, precision = self._planner(step_flops(empty, self.model.untrained)), self.metadata["precision"]
        self.take_step = TrainingStep(self.engine, planner, self.reference, self.world)
        self.rated_flops = rated_flops(self.world.device) if precision == "bf16" else None
        self.evaluation = self._open_evaluation()
        if self.saved:
            load_random(self.saved, self.world.rank)
        self.step_number, self.state = progress["step"], progress.get("caller", {})
        self.publisher = self._publisher(empty, precision)
        self.feed = Feed(self.config, self.source, planner, self.world, self.stop, progress["feed"], self.step_number)
        with _private_files():
            of_rank_0 = self.world.rank == 0
            self.metrics = Metrics(self.config, self.folder.path, self.step_number) if of_rank_0 else NullMetrics()
        self.step_log = StepLog(self.config, self.metrics, progress)
        shown = self.config.public()
        source = "the caller" if self._is_given else shown["data"] or shown["source"] or shown["atropos_url"]
        log.info("batches from %s; results in %s", source, self.folder.path)

    def _open_source(self, position: Position | None) -> Source | None:
        if not self._is_given:
            return open_source(self.config, self.processor, self.world, position)
        return GivenSource(self.processor, position) if self.world.rank == 0 else None

    def _planner(self, flops: StepFlops) -> Planner:
        reference = self.reference.model if isinstance(self.reference, Reference) else None
        rows = choose_rows(self.config, self.model, reference, self.processor.pad_token_id, self.world)
        has_reference, pins = self.reference is not None, self.world.device.type == "cuda"
        return Planner(self.config, rows, flops, self.processor.shaping, has_reference, self.world.rank, self.world.size, pins)

    def _open_evaluation(self) -> Evaluation | None:
        if self.config.eval_data is None:
            return None
        processor = processor_of(self.config, self.model.vocab_size, self.tokenizer)
        evaluation = Evaluation(self.config, processor, self.take_step, self.world)
        found = evaluation.metrics()
        log.info("evaluation at the start: loss %.4g, %.1f s", found["eval/loss"], found["eval/seconds"])
        return evaluation

    def _add_adapters(self, empty: PreTrainedModel) -> None:
        adapters = Adapters.for_model(empty, self.model.untrained, self.config)
        for model in (empty, self.model.model):
            adapters.put_into(model, self.config.seed)
        self.metadata["adapters"] = dataclasses.asdict(adapters)
        log.info("%s", adapters.describe(empty))
        if self.config.learning_rate < LORA_RATE:
            log.warning(
                "learning_rate %g is one for training all parameters: LoRA learns at about 10 times that, such as 2e-5 to 5e-4 "
                '(Schulman et al. 2025, "LoRA Without Regret")', self.config.learning_rate,
            )  # fmt: skip

    def _publisher(self, empty: PreTrainedModel, precision: str) -> Publisher | None:
        if self.config.publish_folder is None and self.config.publish_to is None:
            return None
        bucket_bytes, name = self.config.publish_bucket_mib * 2**20, self.config.model_name
        tensors = TrainedTensors(self.model.model, empty, name, self.engine.gathered, bucket_bytes)
        path = Path(self.config.publish_folder or self.folder.path / "published")
        folder, adapters = PublishFolder(path, self.config.publish_keep, tensors, self.base_files, self.world), None
        if self.config.lora_rank:
            contents = peft_config(self.metadata | {"config": self.config.public()}, empty)
            run, start = str(self.folder.path.absolute()), self.folder.token or ""
            adapters = AdapterFolder(path, run, start, contents, tensors, self.world)
        stopping = lambda: bool(self.stop.code)  # noqa: E731
        verification = Verification(self.config, self.model, self.tokenizer, precision, self.world)
        try:
            return Publisher(self.config, tensors, folder, adapters, verification, stopping, self.world)
        except (UserError, PeerFailed):
            self._stop_if_asked()
            raise

    def _publish(self, always: bool = False) -> tuple[dict[str, float], str]:
        """Publish the weights if it is their turn. Returns metrics, and why the run must end (empty: it need not). A
        collective."""
        if self.publisher is None:
            return {}, ""
        with self.world.extended_timeout():
            if not always and not self._is_due(self.config.publish_steps):
                return self.publisher.reload_restarted(self.step_number)
            self.metrics.set_status("publishing weights")
            values, failure = self.publisher.publish(self.step_number)
        if not failure:
            self.callbacks.call("on_publish", self, self.step_number)
        return values, failure

    def _end_unless_published(self, failure: str) -> None:
        if failure:
            self.save()
            raise UserError(failure)

    def _load_reference(self, ds: dict[str, Any], vocab_size: int) -> Reference | None:
        if self.config.ref_model_name is None:
            return None
        log.info("loading the reference model %s", self.config.ref_model_name)
        ds = deepspeed_config.for_reference(ds)
        model = load_reference(self.config, ds, vocab_size)
        fuse(model.model, self.config, self.world.device, self.world.all_true)
        reference = Reference(ds, model, self.world)
        self._stop_if_asked()
        return reference

    def _stop_if_asked(self) -> None:
        """Called between the stages of start-up, since loading a large model takes minutes."""
        if any(self.world.all_gather_int(self.stop.code)):
            raise Stopped

    def _loop(self) -> None:
        while self.step_number < self.config.training_steps and self._train_on_next():
            pass

    def _train_on_next(self) -> bool:
        """Train on the next batch. False at the end of the data; Stopped if the run was asked to stop."""
        start = time.monotonic()
        self.metrics.set_status("waiting for a batch")
        batch = self.feed.next(self.step_number, waiting=self.metrics.set_status)
        if self.feed.stopped:
            raise Stopped
        if batch is None:
            return False
        if batch.plans:
            self._train_on(batch, start, time.monotonic() - start)
            if self.feed.journal_is_full():  # a checkpoint makes room
                self._finish_save()
            if self._is_due(self.config.save_steps) or self.feed.journal_is_full():
                self._finish_save()
                self._begin_save(waits=False)
        return True

    def _is_due(self, every: int) -> bool:
        """Whether the steps on the last batch reached a multiple of `every`."""
        return self.step_number // every > (self.step_number - self.config.updates_per_batch) // every

    def _train_on(self, batch: PlannedBatch, start: float, wait: float) -> None:
        """The optimizer steps on a batch, and publishing. `start`: when waiting for the batch began; `wait`: seconds of it."""
        self.step_log.expect(self.step_number + 1, batch.missing, batch.plans)
        self.metrics.set_status("training")
        proximal = [plan.at_start and self.take_step.score(plan.at_start) for plan in batch.plans]
        for number, (plan, prox_logp_N) in enumerate(zip(batch.plans, proximal, strict=True), 1):
            result = self.take_step(plan, prox_logp_N)
            self.step_number += 1
            spent, last, failure = time.monotonic() - start, number == len(batch.plans), ""
            values = plan.metrics | {
                "step": self.step_number,
                "data/possibly_lost_batches": self.feed.possibly_lost,
                "journal/gib": self.feed.journal_gib,
            }
            if last and self.evaluation and self._is_due(self.config.eval_steps):
                values |= self.evaluation.metrics()
            if last:
                published, failure = self._publish()
                values |= published
            values |= of_speed(values["tokens/total"], plan.flops, spent, wait, self.world.size, self.rated_flops)
            if result.saved:
                self._finish_save()
            try:
                self._metrics = self.step_log.write(values, result)
            except TrainingDiverged:
                self._finish_save()
                raise
            self.callbacks.call("on_step", self, self._metrics)
            self._end_unless_published(failure)
            start, wait = time.monotonic(), 0.0

    def _wind_up(self) -> None:
        """Save the last checkpoint, and record why the run ended."""
        self.save()
        if self.feed.stopped:
            reason = name_of(self.feed.stopped)
            log.info("stopped after step %d (%s); continue with --resume", self.step_number, reason)
            self.world.on_rank_0(lambda: self.folder.write_state("preempted", reason))
            self.feed.close()
        else:
            self.world.on_rank_0(lambda: self.folder.write_state("finished", "training_steps reached or data at its end"))
            self.callbacks.call("on_end", self, self._exported)
        self.metrics.close()

    def _begin_save(self, waits: bool) -> None:
        try:
            caller = json.loads(json.dumps(self.state))
        except (TypeError, ValueError) as error:
            raise UserError(f"trainer.state cannot be saved as JSON: {error}") from error
        self.metrics.set_status("saving a checkpoint")
        start = time.monotonic()
        self.metrics.sync()
        metadata = self.metadata | {"step": self.step_number, "feed": self.feed.begin_checkpoint(), "caller": caller}
        metadata |= self.step_log.counts
        metadata["config"] = self.config.public()
        metadata["versions"] = {name: version(name) for name in PACKAGES}
        with self.world.extended_timeout():
            self._saving = Save(self.folder.checkpoints, metadata, self.engine, self.base_files, self.world, waits)
        self._save_began, self._save_waited = start, time.monotonic() - start

    def _finish_save(self) -> None:
        """Make the checkpoint complete that is being saved, if any."""
        if self._saving is None:
            return
        start = time.monotonic()
        with self.world.extended_timeout():
            self.saved, self._saving = self._saving.finish(), None
        self.folder.step = self.saved.step
        self.world.on_rank_0(lambda: self.folder.write_state("running", ""))
        kept = self.world.on_rank_0(lambda: prune(self.folder.checkpoints, self.config.keep_checkpoints))
        self.feed.prune(self.world.all_gather_int(kept[0].metadata["feed"]["batches"] if kept else 0)[0])
        size, now = sum(self.saved.metadata["files"].values()) / 2**30, time.monotonic()
        self.callbacks.call("on_save", self, self.saved.folder)
        log.info(
            "saved %s: %.2f GiB in %.1f s, of which training waited %.1f s; journal %.2f GiB",
            self.saved.folder, size, now - self._save_began, self._save_waited + now - start, self.feed.journal_gib,
        )  # fmt: skip


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Files created inside are readable by their owner only, since rollouts may hold anything. Used for output_dir, not for
    downloads and compiled ops, whose caches may be shared."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
