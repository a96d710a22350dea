"""Loads a batch of records from a file, a run's journal or a server, and computes what training would: rollouts, advantages,
weights, and with a model the policy's logps. `checks.py` looks for faults in it. Knows nothing of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from wsft.config import WeightedSFTConfig, without_password
from wsft.device import device_type
from wsft.errors import UserError
from wsft.inspect.checks import BatchView, Finding, SpecialTokens, run_checks
from wsft.loss.objectives import Objective
from wsft.loss.terms import LossSettings, TokenTerms
from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.loading import end_tokens, load_model, load_model_config, load_tokenizer
from wsft.rollouts.answers import decode
from wsft.rollouts.batch import AtroposBatchProcessor, Batch, pad, token_terms
from wsft.rollouts.decoder import Fault, Rollout
from wsft.rollouts.journal import Journal
from wsft.rollouts.sources import FileSource, client_of, data_files_of, processor_of


class Taken(NamedTuple):
    """A batch of records, decoded."""

    title: str
    rollouts: list[Rollout]
    faults: dict[str, list[Fault]]
    counts: np.ndarray  # see `Batch.counts`


# -- where batches are -------------------------------------------------------------------------------------------------------


def take(source: str, number: int | None, config: WeightedSFTConfig, processor: AtroposBatchProcessor) -> Taken:
    """Batch `number` of a file or run, or the group that was posted to a server last. UserError if there is none."""
    if source.startswith(("http://", "https://")):
        record = client_of(config.model_copy(update={"atropos_url": source}), 1, registers=False).latest_example()
        if not record.get("tokens"):
            raise UserError(f"{without_password(source)} has no example yet: no environment has posted since it started")
        rollouts, title = processor.decoder.batch([record]), f"{without_password(source)}, the group posted last"
    elif Path(source).is_dir() and config.data is None:
        rollouts, title = _from_journal(Path(source), number, processor)
    else:
        path = config.data if Path(source).is_dir() else source
        file = FileSource(data_files_of(config.model_copy(update={"data": path})), config.batch_size, processor)
        for _ in range(number or 0):
            file.rollouts()
            processor.decoder.forget()
        rollouts, title = file.rollouts()[0], f"{path}, batch {number or 0} (batch_size {config.batch_size})"
    faults = dict(processor.decoder.faults)
    return Taken(title, rollouts, faults, processor.decoder.take_counts())


def _from_journal(run: Path, number: int | None, processor: AtroposBatchProcessor) -> tuple[list[Rollout], str]:
    journals = [Journal(folder, read_only=True) for folder in sorted((run / "journal").glob("*_of_*"))]
    held = sorted({n for journal in journals for n in journal.numbers})
    number = held[-1] if held and number is None else number
    if number not in held:
        there = f"holds batches {held[0]} to {held[-1]}" if held else "holds none"
        raise UserError(
            f"the journal of {run} {there}{'' if number is None else f', not {number}'}: it goes back to the oldest checkpoint "
            f"kept; more checkpoints (keep_checkpoints) keep more batches"
        )
    bodies = [(journal, journal.read(number)) for journal in journals if number in journal]
    rollouts = []
    for n, (_, body) in enumerate(bodies):
        records = decode(body)
        names = [f"rank {n}, group {i}" if len(bodies) > 1 else f"group {i}" for i in range(len(records))]
        rollouts += processor.decoder.batch(records, names)
    return rollouts, f"{run}, batch {number}"


# -- what training makes of them ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inspected:
    title: str
    config: WeightedSFTConfig
    tokenizer: PreTrainedTokenizerBase
    view: BatchView
    weights_N: np.ndarray  # weight of each token; 0 where untrained

    @functools.cached_property
    def findings(self) -> list[Finding]:
        return run_checks(self.view)


def inspect(source: str, number: int | None, config: WeightedSFTConfig, policy: str | None) -> Inspected:
    """The batch as in training; `policy` is the folder of the model whose logps are compared."""
    tokenizer = load_tokenizer(config)
    processor = processor_of(config, vocab_size_of(config, tokenizer), tokenizer)
    taken = take(source, number, config, processor)
    view = batch_view(taken, config, processor, tokenizer)
    batch = view.batch
    if policy and view.rollouts:
        model = load_policy(policy, config)
        view = dataclasses.replace(view, logp_N=policy_logps(model, config, batch))
        if (np.nan_to_num(batch.temperatures, nan=config.temperature) != 1).any():
            untempered = dataclasses.replace(batch, temperatures=np.ones_like(batch.temperatures))
            view = dataclasses.replace(view, untempered_logp_N=policy_logps(model, config, untempered))
    return Inspected(taken.title, config, tokenizer, view, weights(config, batch, view.logp_N))


def batch_view(
    taken: Taken, config: WeightedSFTConfig, processor: AtroposBatchProcessor, tokenizer: PreTrainedTokenizerBase
) -> BatchView:
    """Without the policy's logps."""
    return BatchView(
        rollouts=taken.rollouts,
        batch=Batch.of(taken.rollouts, taken.counts).with_final_advantages(processor.shaping),
        faults=taken.faults,
        special_tokens=special_tokens_of(tokenizer, config),
        max_token_len=config.max_token_len,
        needs_advantages=Objective(config.objective, config.objective_args).zero_weight_without_advantage,
    )


def vocab_size_of(config: WeightedSFTConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of the model, or of the tokenizer without a model."""
    try:
        return load_model_config(config.model_name, config).get_text_config().vocab_size
    except UserError:
        return len(tokenizer)


def special_tokens_of(tokenizer: PreTrainedTokenizerBase, config: WeightedSFTConfig) -> SpecialTokens:
    ends = end_tokens(config.model_name, tokenizer)
    headers = {}
    with contextlib.suppress(Exception):  # a template is code of the model's author, and may raise anything
        headers = {role: _written_before(tokenizer, role) for role in ("assistant", "user")}
    return SpecialTokens(tokenizer.bos_token_id, ends, frozenset(tokenizer.all_special_ids) - ends, **headers)


def _written_before(tokenizer: PreTrainedTokenizerBase, role: str) -> tuple[int, ...]:
    """What the chat template writes between the end of a turn and the message of the role."""
    turns = [{"role": name, "content": f"<{name}>"} for name in ("user", "assistant", "user")]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    before, _, _ = text.rpartition(f"<{role}>")
    turn = before[before.rfind("<assistant>" if role == "user" else "<user>") :].split(">", 1)[1]
    ids = tokenizer.encode(turn, add_special_tokens=False)
    end = max((n + 1 for n, i in enumerate(ids) if i == tokenizer.eos_token_id), default=0)
    # without what follows the end of the turn before
    return tuple(itertools.dropwhile(lambda i: not tokenizer.decode([i]).strip(), ids[end:]))


def weights(config: WeightedSFTConfig, batch: Batch, logp_N: np.ndarray | None) -> np.ndarray:
    """Weights of tokens [N] before the reduction; without the policy's logps, behavior logps are used in their place."""
    terms = terms_of(config, batch, list(range(len(batch.lengths))))
    at = batch.loss_mask
    known = batch.behavior_logp[at] if logp_N is None else logp_N[at]
    found = np.zeros(len(batch.tokens), dtype=np.float32)
    found[at] = terms.weigh(torch.from_numpy(np.nan_to_num(known, nan=0.0)))[0].numpy()
    return found


def terms_of(config: WeightedSFTConfig, batch: Batch, rows: list[int]) -> TokenTerms:
    scales_R = batch.scales(config.reduction, config.max_token_len)
    objective = Objective(config.objective, config.objective_args)
    settings = LossSettings(objective, temperature=config.temperature, corrections=config.corrections)
    return token_terms(batch, rows, scales_R, settings)


def load_policy(policy: str, config: WeightedSFTConfig) -> WeightedSFTModel:
    device = torch.device(device_type(config.device))
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # transformers imports DeepSpeed, which warns if this is unset
    ds = {"bf16": {"enabled": device.type == "cuda"}, "zero_optimization": {"stage": 0}}
    model = load_model(policy, config, ds).to(device).eval()
    model.check_head(device)
    return model


@torch.no_grad()
def policy_logps(model: WeightedSFTModel, config: WeightedSFTConfig, batch: Batch) -> np.ndarray:
    """The policy's logps of trained tokens [N], at the temperature of their sequences; NaN elsewhere."""
    device, found = next(model.parameters()).device, np.full(len(batch.tokens), np.nan, dtype=np.float32)
    for r, span in enumerate(batch.spans()):
        at = np.flatnonzero(batch.loss_mask[span])
        if len(at):
            inputs = (pad(batch, [r], 0)["tokens"], torch.from_numpy(at), torch.zeros(len(at)))
            temperature_N = terms_of(config, batch, [r]).temperature_N.to(device)
            out = model(*(x.to(device) for x in inputs), temperature=temperature_N)
            found[span.start + at] = out.logp_N.float().cpu().numpy()
    return found
