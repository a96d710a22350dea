"""Checks for faults in a batch that training does not notice, since the loss decreases anyway. Each check is a function that
yields findings with their places. Checks use what the decoder returned; only behavior logps outside the mask are read from the
records. NumPy only: no torch, no tokenizer, no HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from wsft.loss.advantages import Override
from wsft.rollouts import records
from wsft.rollouts.batch import Batch
from wsft.rollouts.decoder import REJECTED, Fault, Rollout
from wsft.rollouts.records import Malformed

Place = tuple[int, int | None]  # index of the rollout in the batch, position in it

SHARED_PROMPT = 8  # a common prefix of so many tokens is not chance
UNCENTRED = 0.5  # mean / standard deviation of the sequences' advantages
FEWEST_FOR_A_MEAN = 8  # fewest sequences for which a mean is meaningful
FAR_LOGP = 0.25  # mean difference of behavior and policy logps, in nats; bf16 rounding gives 0.03
CLOSER = 0.5  # an alternative reading of the behavior logps is suggested if it reduces the difference to this share


@dataclass(frozen=True)
class Finding:
    text: str  # a sentence, without its places
    places: list[Place] = field(default_factory=list)

    def describe(self, names: list[str], most: int = 4) -> str:
        """The sentence with its first places, given the names of the rollouts."""
        where = [names[r] + ("" if position is None else f", position {position}") for r, position in self.places[:most]]
        more = [f"and {len(self.places) - most} more"] if len(self.places) > most else []
        return f"{self.text} ({'; '.join(where + more)})" if where else self.text


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a tokenizer and its chat template."""

    bos: int | None = None
    ends: frozenset[int] = frozenset()  # end of sequence, end of turn
    special: frozenset[int] = frozenset()
    assistant: tuple[int, ...] = ()  # that the chat template writes before an answer
    user: tuple[int, ...] = ()  # and before a user's message; () without a template


@dataclass(frozen=True)
class BatchView:
    """A batch as in training. The policy's logps are NaN where unknown, or None if they were not computed."""

    rollouts: list[Rollout]
    batch: Batch  # the same rollouts, with final advantages
    faults: dict[str, list[Fault]]  # reason -> first examples
    special_tokens: SpecialTokens
    max_token_len: int
    needs_advantages: bool  # whether tokens of advantage 0 have weight 0
    logp_N: np.ndarray | None = None
    untempered_logp_N: np.ndarray | None = None  # at temperature 1, for records with another

    def each(self) -> Iterator[tuple[int, Rollout, np.ndarray]]:
        """Index, rollout, and its final advantages."""
        for r, (rollout, span) in enumerate(zip(self.rollouts, self.batch.spans(), strict=True)):
            yield r, rollout, self.batch.advantages[span]

    @property
    def names(self) -> list[str]:
        return [str(rollout.origin) for rollout in self.rollouts]

    def groups(self) -> list[list[int]]:
        """The rollouts of each record."""
        return [list(rows) for _, rows in itertools.groupby(range(len(self.rollouts)), lambda r: self.rollouts[r].origin.name)]


def run_checks(view: BatchView) -> list[Finding]:
    """Run all checks. Sequences that were left out come first."""
    return [finding for check in CHECKS for finding in check(view)]


def _left_out(view: BatchView) -> Iterator[Finding]:
    counts = view.batch.rejected
    for reason, faults in view.faults.items():
        where = "; ".join(f"{fault.origin}: {fault.detail}" for fault in faults[:3])
        what = f"left out: {reason}" if reason in REJECTED else reason
        yield Finding(f"{counts[reason]} sequence(s) {what} ({where}{'; ...' if counts[reason] > 3 else ''})")


def _borders(view: BatchView) -> Iterator[Finding]:
    """Compare the start of the completion in the mask and in the behavior logps, which have placeholders in the prompt."""
    early, late = [], []
    for r, rollout, _ in view.each():
        trained, sampled = (_starts(known) for known in (rollout.loss_mask, _sampled(rollout)))
        if len(trained) == len(sampled) > 0:
            apart = trained - sampled
            if (apart == -1).all():
                early.append((r, int(trained[0])))
            elif (apart == 1).all():
                late.append((r, int(sampled[0])))
    if early:
        yield Finding(
            f"the mask starts one token before the behavior logps in {len(early)} sequence(s): the last token of the prompt "
            f"is trained, or the logps are shifted by one to the right",
            early,
        )
    if late:
        yield Finding(
            f"the mask starts one token after the behavior logps in {len(late)} sequence(s): the first sampled token is not "
            f"trained, or the logps are shifted by one to the left",
            late,
        )


def _template(view: BatchView) -> Iterator[Finding]:
    """Trained tokens that the chat template wrote, not the model: before a turn, and after its end."""
    special, found, users = view.special_tokens, [], []
    for r, rollout, _ in view.each():
        ids, trained = rollout.tokens, rollout.loss_mask
        written = np.isin(ids, list(special.special - special.ends))
        written[2:] |= np.isin(ids[1:-1], list(special.ends))  # one token may be both end and beginning of sequence
        answers = _occurrences(ids, special.assistant)
        for start in answers:
            written[start : start + len(special.assistant)] = True
        wrong = np.flatnonzero(written & trained)
        if len(wrong):
            found.append((r, int(wrong[0])))
        over = np.sort(np.concatenate([np.flatnonzero(np.isin(ids, list(special.ends))), answers]))
        for start in _occurrences(ids, special.user) + len(special.user):
            end = next((int(n) for n in over if n >= start), len(ids))
            if trained[start:end].any():
                users.append((r, int(start + trained[start:end].argmax())))
                break
    if found:
        yield Finding(f"tokens of the chat template are trained in {len(found)} sequence(s)", found)
    if users:
        yield Finding(f"user messages are trained in {len(users)} sequence(s)", users)


def _prompts(view: BatchView) -> Iterator[Finding]:
    """Groups whose prompts are trained: their sequences have a common prefix, and no token is masked."""
    found = []
    for rows in view.groups():
        rollouts = [view.rollouts[r] for r in rows]
        unmasked = all(rollout.loss_mask[1 : SHARED_PROMPT + 1].all() for rollout in rollouts)
        begun = {rollout.tokens[:SHARED_PROMPT].tobytes() for rollout in rollouts}
        if unmasked and len(begun) == 1 and len({rollout.tokens.tobytes() for rollout in rollouts}) > 1:
            found += [(r, 1) for r in rows]
    if found:
        yield Finding(
            f"the prompt is trained in {len(found)} sequence(s): their groups have a common prefix, and no token is masked",
            found,
        )


def _ends(view: BatchView) -> Iterator[Finding]:
    """Completions without an end-of-sequence token, though they were not cut off by a limit."""
    ends, open_, untrained = view.special_tokens.ends, {}, []
    for r, rollout, _ in view.each():
        at = np.flatnonzero(rollout.loss_mask)
        if (
            not ends or not len(at) or np.isin(rollout.tokens[at[-2:]], list(ends)).any()
        ):  # a template may write a line break after it
            continue
        last, size = int(at[-1]), len(rollout.tokens)
        if last + 1 < size and int(rollout.tokens[last + 1]) in ends:
            untrained.append((r, last + 1))
        elif last + 1 == size < view.max_token_len and not _cut_off(rollout, len(at)):
            open_[r] = last
    for rows in view.groups():  # several of equal length, none longer: the sampler's max_tokens
        sizes = [int(view.rollouts[r].loss_mask.sum()) for r in rows]
        for r, size in zip(rows, sizes, strict=True):
            if size == max(sizes) and sizes.count(size) > 1:
                open_.pop(r, None)
    if open_:
        text = f"{len(open_)} sequence(s) end without an end-of-sequence token, though they were not cut off"
        yield Finding(text, list(open_.items()))
    if untrained:
        yield Finding(f"the end-of-sequence token is not trained in {len(untrained)} sequence(s)", untrained)


def _begins(view: BatchView) -> Iterator[Finding]:
    bos = view.special_tokens.bos
    doubled = [(r, 1) for r, rollout, _ in view.each() if bos is not None and (rollout.tokens[:2] == bos).all()]
    if doubled:
        yield Finding(f"the beginning-of-sequence token is doubled in {len(doubled)} sequence(s)", doubled)


def _silent(view: BatchView) -> Iterator[Finding]:
    masked = [(r, None) for r, rollout, _ in view.each() if not rollout.loss_mask.any()]
    if masked:
        yield Finding(f"no token is trained in {len(masked)} sequence(s): all are masked", masked)


def _variance(view: BatchView) -> Iterator[Finding]:
    """Groups without a gradient, since all advantages are 0."""
    if not view.needs_advantages:
        return
    groups, zero_weight = view.groups(), []
    advantages = [advantages for _, _, advantages in view.each()]
    for rows in groups:
        free = [r for r in rows if view.rollouts[r].override is Override.NONE and view.rollouts[r].loss_mask.any()]
        if len(free) == len(rows) and not any(advantages[r].any() for r in rows):
            zero_weight.append((rows[0], None))
    if zero_weight:
        found = f"{len(zero_weight)} of {len(groups)} groups ({len(zero_weight) / len(groups):.0%})"
        text = f"{found} have no gradient: all their advantages are 0 (equal scores?)"
        yield Finding(text, zero_weight)


def _centre(view: BatchView) -> Iterator[Finding]:
    """Advantages with a mean far from 0."""
    free = [(r, rollout, a) for r, rollout, a in view.each() if rollout.override is Override.NONE and rollout.loss_mask.any()]
    means = np.array([advantages[rollout.loss_mask].mean() for _, rollout, advantages in free])
    if not view.needs_advantages or len(means) < FEWEST_FOR_A_MEAN or not means.any():
        return
    mean, std = means.mean(), means.std()
    if abs(mean) > UNCENTRED * std:
        yield Finding(
            f"advantages are not centred: over {len(means)} sequences their mean is {mean:.3g}, their standard deviation "
            f"{std:.3g} (raw rewards? set score_advantages, or advantage_normalization)"
        )


def _policy(view: BatchView) -> Iterator[Finding]:
    """Compare the behavior logps with the policy's, also shifted by one position, or at temperature 1."""
    if view.logp_N is None:
        return
    sampled = [_logps(rollout) for rollout in view.rollouts]

    def distance(logp_N: np.ndarray, shift: int = 0) -> float:
        """With behavior logps shifted by so many positions."""
        moved = np.concatenate([_moved(row, shift) for row in sampled])
        apart = np.abs(moved - logp_N)
        return float(apart[~np.isnan(apart)].mean()) if not np.isnan(apart).all() else np.inf

    here = distance(view.logp_N)
    if not np.isfinite(here) or here <= FAR_LOGP:
        return
    others = {
        "shifted by one to the left they match (they are one position too late)": distance(view.logp_N, 1),
        "shifted by one to the right they match (they are one position too early)": distance(view.logp_N, -1),
    }
    if view.untempered_logp_N is not None:
        others["at temperature 1 they match: set record_temperature false"] = distance(view.untempered_logp_N)
    best = min(others, key=others.get)
    fits = (
        f"{best}, {others[best]:.2f}"
        if others[best] < CLOSER * here
        else "no shift by one matches: other weights or temperature?"
    )
    yield Finding(f"the behavior logps differ from the policy's by {here:.2f} nats on average: {fits}")


CHECKS: tuple[Callable[[BatchView], Iterator[Finding]], ...] = (
    *(_left_out, _borders, _template, _prompts, _ends, _begins, _silent, _variance, _centre, _policy),
)


def _logps(rollout: Rollout) -> np.ndarray:
    """Behavior logps [T], also outside of the mask; NaN where there is none."""
    record, _, i = rollout.origin
    everywhere = np.ones(len(record["tokens"][i]), dtype=bool)
    try:
        return records.logps(record, i, "inference_logprobs", everywhere)[: len(rollout.tokens)]
    except Malformed:
        return np.full(len(rollout.tokens), np.nan, dtype=np.float32)


def _sampled(rollout: Rollout) -> np.ndarray:
    """[T] bool; False at position 0, as in the mask."""
    known = ~np.isnan(_logps(rollout))
    known[0] = False
    return known


def _starts(true_T: np.ndarray) -> np.ndarray:
    """Positions at which a run of True starts."""
    return np.flatnonzero(true_T & ~np.concatenate([[False], true_T[:-1]]))


def _moved(row: np.ndarray, shift: int) -> np.ndarray:
    moved = np.full_like(row, np.nan)
    if shift:
        moved[max(0, -shift) : len(row) - max(0, shift)] = row[max(0, shift) : len(row) - max(0, -shift)]
    return moved if shift else row


def _occurrences(ids: np.ndarray, phrase: tuple[int, ...]) -> np.ndarray:
    """Positions at which the phrase starts in the ids."""
    if not phrase or len(ids) < len(phrase):
        return np.zeros(0, np.int64)
    return np.flatnonzero((np.lib.stride_tricks.sliding_window_view(ids, len(phrase)) == phrase).all(1))


def _cut_off(rollout: Rollout, sampled: int) -> bool:
    """Whether the record's generation limit is so many tokens."""
    params = rollout.origin.record.get("generation_params")
    limit = params.get("max_tokens") if isinstance(params, dict) else None
    return isinstance(limit, int) and sampled >= limit
