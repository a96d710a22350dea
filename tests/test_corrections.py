"""Corrections for tokens of another policy, under every objective, against plain definitions of one sequence at a time."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from surrogates import CASES
from test_objectives import LENGTHS, SEEDS, N, assert_close, make, through_the_head

from wsft import WeightedSFTConfig
from wsft.loss.corrections import Corrections
from wsft.loss.objectives import OBJECTIVES, Objective
from wsft.loss.terms import LossSettings
from wsft.rollouts.batch import AtroposBatchProcessor, token_terms

# -- definitions, of the known ratios of one sequence ----------------------------------------------------------------------

BANDS = {  # setting -> whether a sequence of these ratios is kept
    "product": ((0.7, 1.6), lambda rho: 0.7 <= math.prod(rho) <= 1.6),
    "geometric": ((0.9, 1.15), lambda rho: 0.9 <= math.prod(rho) ** (1 / len(rho)) <= 1.15),
    "any_token": ((0.4, 1.7), lambda rho: all(0.4 <= r <= 1.7 for r in rho)),
    "k3": ((0.0, 0.05), lambda rho: sum(r - 1 - math.log(r) for r in rho) / len(rho) <= 0.05),
}
CORRECTIONS = {  # name -> corrections, and the factor of token t with the ratio r (None: unknown) in its sequence
    "token_mask": (Corrections(token_mask=(0.8, 1.2)), lambda r, rho, A: r is None or 0.8 <= r <= 1.2),
    "cap": (Corrections(cap=1.2), lambda r, rho, A: 1 if r is None else min(r, 1.2)),
    "cap_below_1": (Corrections(cap=0.5), lambda r, rho, A: 1 if r is None else min(r, 0.5)),
    "cap_of_sequences": (Corrections(cap=1.2, cap_level="sequence"), lambda r, rho, A: min(math.prod(rho), 1.2)),
    "icepop": (Corrections(icepop=(0.8, 1.2)), lambda r, rho, A: 1 if r is None else r if 0.8 <= r <= 1.2 else 0),
    "off_policy": (
        Corrections(off_policy_mask=0.1),
        lambda r, rho, A: not (A < 0 and rho and -sum(map(math.log, rho)) / len(rho) > 0.1),
    ),
    **{
        kind: (Corrections(sequence_mask={kind: bounds}), lambda r, rho, A, keeps=keeps: not rho or keeps(rho))
        for kind, (bounds, keeps) in BANDS.items()
    },
}
ALL = Corrections(
    token_mask=(0.5, 1.5), icepop=(0.6, 2.0), off_policy_mask=0.3, sequence_mask={kind: x[0] for kind, x in BANDS.items()}
)


def factors_by_hand(factor, logp, mu, advantages):
    found = []
    for row in zip(*(x.split(LENGTHS) for x in (logp, mu, advantages)), strict=True):
        ratios = [None if math.isnan(m) else math.exp(p - m) for p, m in zip(row[0].tolist(), row[1].tolist(), strict=True)]
        known = [r for r in ratios if r is not None]
        found += [float(factor(r, known, A)) for r, A in zip(ratios, row[2].tolist(), strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def of_all(name):
    """The factor of every token, made of those of its parts."""
    if name != "all":
        return CORRECTIONS[name][1]
    bands = [CORRECTIONS[kind][1] for kind in BANDS]
    return lambda r, rho, A: (
        (r is None or 0.5 <= r <= 1.5)
        * (1 if r is None else r if 0.6 <= r <= 2.0 else 0)
        * (not (A < 0 and rho and -sum(map(math.log, rho)) / len(rho) > 0.3))
        * math.prod(band(r, rho, A) for band in bands)
    )


NAMES = [*CORRECTIONS, "all"]


def corrections_of(name):
    return ALL if name == "all" else CORRECTIONS[name][0]


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_those_of_the_plain_definitions_and_every_branch_occurs(name):
    met, corrections = set(), corrections_of(name)
    for seed in SEEDS:
        data = make(seed)
        logp, mu, advantages = data.logp(), *(data.tensors[x] for x in ("behavior_logp_N", "advantages_N"))
        wanted = factors_by_hand(of_all(name), logp, mu, advantages)
        found = data.terms(CASES["weighted_sft"], corrections=corrections).factors(logp)
        torch.testing.assert_close(found.factor_N, wanted)
        if not corrections.reweighs:
            assert found.masked_N.tolist() == (wanted == 0).tolist()
        met |= set(zip((wanted == 0).tolist(), (wanted == 1).tolist(), mu.isnan().tolist(), strict=True))
    assert (False, True, True) in met or name in ("cap_of_sequences", "all")  # of unknown logps
    capped = any(not zero and not one for zero, one, _ in met)
    assert capped == corrections.reweighs and (any(zero for zero, _, _ in met) or name.startswith("cap"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["weighted_sft", "ppo", "gspo_token", "dppo_near"])
def test_the_gradient_is_that_of_the_surrogate_times_the_factors(case, name):
    """Where rho is a factor, the surrogate's own ratio is 1 in value, and has its gradient."""
    case, corrections = CASES[case], corrections_of(name)
    for seed in SEEDS:
        data = make(seed)
        logp, mu = data.logp(), data.tensors["behavior_logp_N"]
        factor = factors_by_hand(of_all(name), logp, mu, data.tensors["advantages_N"])
        leaves = data.leaves()
        own = data._replace(tensors=data.tensors | {"behavior_logp_N": logp}) if corrections.reweighs else data
        maximised = own.maximised(case, data.log_softmax(*leaves)[1])
        wanted = torch.autograd.grad(-(data.tensors["scale_N"] * factor * maximised).sum(), leaves)
        if case.objective == "gspo":  # its tokens share one surrogate: the factor is of each token's own part of the gradient
            weights = data.terms(case, behavior_logp_N=logp if corrections.reweighs else mu).weigh(logp)[0]
            loss = -(data.tensors["scale_N"] * factor * weights * data.log_softmax(*leaves)[1]).sum()
            wanted = torch.autograd.grad(loss, leaves)
        _, found = through_the_head(data, data.terms(case, corrections=corrections))
        assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_with_logps_of_the_start_of_the_batch_factors_are_theirs_and_the_ratio_is_to_them(name):
    """Also where the head gives the tokens chunk by chunk."""
    data, corrections = make(1), corrections_of(name)
    prox = data.logp() + 0.2 * torch.from_numpy(np.random.default_rng(0).normal(size=N))
    mu, advantages = data.tensors["behavior_logp_N"], data.tensors["advantages_N"]
    factor = factors_by_hand(of_all(name), prox, mu, advantages)
    terms = data.terms(CASES["ppo"], corrections=corrections, prox_logp_N=prox)
    assert not terms.of_sequences
    anchor = prox if corrections.reweighs else mu.where(~mu.isnan(), prox)
    weights, clipped = data.terms(CASES["ppo"], behavior_logp_N=anchor).weigh(data.logp())
    for rows in (slice(0, 7), slice(7, N)):
        found = terms.weigh(data.logp()[rows], rows)
        torch.testing.assert_close(found[0], (weights * factor)[rows])
        assert found[1].tolist() == clipped[rows].tolist()
    through_the_head(data, terms, chunk_tokens=13)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_under_an_override_are_touched_by_no_correction(name):
    data = make(1)
    one = torch.isin(data.tensors["sequence_N"], torch.tensor([8, 9]))
    fixed = data.tensors["fixed_weights_N"].masked_fill(one, 1.0)
    stale = torch.ones(N, dtype=bool)
    weights, _ = data.terms(CASES["ppo"], fixed_weights_N=fixed, corrections=corrections_of(name), stale_N=stale).weigh(
        data.logp()
    )
    assert (weights[one] == 1).all() and not weights[~one].any()


@pytest.mark.parametrize("gap", [-math.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_an_absurd_logp_of_the_sampler_gives_finite_gradients_in_float32(name, gap):
    data = make()
    data.tensors["behavior_logp_N"][::3] = gap
    for objective in OBJECTIVES:
        terms = data.terms(CASES["ppo"], dtype=torch.float32, corrections=corrections_of(name))
        terms = dataclasses.replace(terms, objective=Objective(objective))
        out, gradients = through_the_head(data, terms, torch.float32)
        assert all(x.isfinite().all() for x in (out.loss, *gradients)), objective


def test_sums_count_what_is_masked_among_known_tokens_without_override():
    data = make()
    fixed = data.tensors["fixed_weights_N"].clone()
    fixed[10:20] = 1.0
    terms = data.terms(CASES["weighted_sft"], fixed_weights_N=fixed, corrections=ALL)
    sums, _ = terms.sums(through_the_head(data, terms)[0])
    factors = terms.factors(data.logp())
    free = ~data.tensors["behavior_logp_N"].isnan() & fixed.isnan()
    assert 0 < int(sums["corrected"]) == int(free.sum()) < N
    for kind in ("token_masked", "icepop_masked", "off_policy_masked", *(f"{kind}_masked" for kind in BANDS)):
        assert 0 < int(sums[kind]) == int((factors.hits[kind] & free).sum()) < int(free.sum()), kind
    assert float(sums["factor_squared"]) == pytest.approx(float((factors.factor_N[free] ** 2).sum()))


def test_masks_and_staleness_change_no_denominator(rng):
    """Nor does it matter how sequences are split: weights with them are those without, or 0."""
    from test_objectives import RUN_TEMPERATURE, SPLITS, make_policy, make_records

    batch = AtroposBatchProcessor().process_atropos_batch(make_records(rng))
    versions = np.where(rng.random(len(batch.tokens)) < 0.1, np.nan, rng.integers(0, 10, len(batch.tokens)))
    batch = dataclasses.replace(batch, weight_versions=versions)
    stale = batch.stale(10, 4)
    assert stale.tolist() == [version < 6 for version in versions] and batch.stale(10, None) is None
    hidden, lm_head = make_policy(batch, rng)
    rollout = np.repeat(np.arange(len(batch.lengths)), batch.trained_tokens)
    targets = torch.from_numpy(batch.tokens[batch.loss_mask])
    corrections, found = Corrections(sequence_mask={"geometric": (0.5, 1.4)}, token_mask=(0.3, 2.0)), []
    settings = LossSettings(Objective("ppo_clip"), temperature=RUN_TEMPERATURE, corrections=corrections)
    for split in SPLITS:
        weights = np.zeros(len(targets))
        for rows in filter(None, split):
            at = np.concatenate([np.flatnonzero(rollout == i) for i in rows])
            terms = token_terms(batch, rows, batch.scales("mean", 30), settings, stale)
            log_p = (hidden[at] @ lm_head.T / terms.temperature_N[:, None]).log_softmax(-1)
            logp = log_p.gather(1, targets[at, None]).squeeze(1)
            weights[at] = terms.weigh(logp)[0] * terms.scale_N
        found.append(weights)
    assert all(np.allclose(found[0], other, rtol=1e-6) for other in found[1:]) and found[0].any()
    free = np.repeat(batch.overrides == 0, batch.lengths)[batch.loss_mask]
    assert (
        not found[0][stale[batch.loss_mask] & free].any()
        and (found[0][free] == 0).sum() > (stale[batch.loss_mask] & free).sum()
    )
    kept = batch.of_weight(Objective("ppo_clip"), Corrections(), stale).loss_mask
    assert not (kept & stale & (np.repeat(batch.overrides == 0, batch.lengths))).any() and kept.any()
    whole = batch.of_weight(Objective("ppo_clip"), corrections, stale)
    assert set(whole.trained_tokens) <= {0, *batch.trained_tokens}


# -- settings --------------------------------------------------------------------------------------------------------------


def test_settings_are_read_from_flags_and_yaml_alike():
    settings = {"mismatch_mask": "[0.5, 2]", "mismatch_cap": "2", "mismatch_cap_level": "sequence", "off_policy_mask": 0.5}
    found = WeightedSFTConfig(model_name="m", sequence_mask="{geometric: [0.999, 1.001], k3: null}", **settings).corrections
    masks = {"geometric": (0.999, 1.001), "k3": (0.0, 0.01)}
    assert found == Corrections((0.5, 2.0), 2.0, "sequence", None, masks, 0.5) and found.of_sequences and found.reweighs
    assert WeightedSFTConfig(model_name="m", sequence_mask="product").corrections.sequence_mask == {"product": (0.5, 2.0)}
    assert WeightedSFTConfig(model_name="m", icepop=[0.5, 5]).corrections == Corrections(icepop=(0.5, 5.0))
    assert not WeightedSFTConfig(model_name="m").corrections and not Corrections().of_sequences


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"mismatch_mask": "[2, 0.5]"}, "0 <= low < high"),
        ({"icepop": "[-1, 0.5]"}, "0 <= low < high"),
        ({"icepop": "0.5"}, "icepop is 0.5: "),
        ({"sequence_mask": "geo"}, "expected product, geometric, any_token, k3"),
        ({"sequence_mask": "{k3: [1, 0]}"}, "0 <= low < high"),
        ({"mismatch_cap": 2.0, "icepop": [0.5, 2.0]}, "mismatch_cap and icepop both multiply by the ratio"),
        ({"mismatch_cap_level": "sequence"}, "mismatch_cap_level is set, but mismatch_cap is not"),
        ({"mismatch_cap": 0}, "greater than 0"),
        ({"max_staleness": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, says, capsys):
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    with pytest.raises(SystemExit):
        WeightedSFTConfig.from_args(["--model_name", "m", *flags])
    assert says in capsys.readouterr().err
