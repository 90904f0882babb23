"""Objectives, every composition in one table, against their formulas written out token by token in NumPy float64."""

import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_reference import (
    MAX_TOKENS,
    UNOPTIMISED,
    Case,
    Term,
    all_of,
    assert_close,
    bonus,
    case_of,
    cispo_weight,
    clip,
    completion_losses,
    distance_of_marked,
    evaluate,
    experience_of,
    gamma,
    geometric,
    kl,
    likelihood,
    masked,
    near_policy,
    policy,
    reference,
    region,
    row_of,
    run,
    score,
    shift,
    smoothed,
    soft,
    square,
    to_corrected,
    to_old,
    to_sampler,
    token_weights,
    truncated,
    unclipped,
)

from grpo_jax import losses, statistics
from grpo_jax.losses import (
    binary_kl,
    bnpo,
    cispo,
    completion_mean,
    completion_mean_of_all,
    completion_sum,
    constant_length,
    corrected,
    covariant_kl,
    dapo,
    dppo,
    dr_grpo,
    dro,
    drpo,
    entropy_bonus,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    k1,
    k2,
    k3,
    kl_cov,
    kl_k3,
    luspo,
    m2po,
    masked_importance,
    normalize_by_rollout_tokens,
    off_policy_mask,
    old_policy,
    penalty_loss,
    per_prompt_count,
    plus,
    policy_loss,
    ppo_clip,
    product,
    product_ratio,
    prompt_mean,
    pspo,
    reinforce,
    sampler,
    sapo,
    sequence_ratio,
    sft,
    squared_log_ratio,
    token_mean,
    token_ratio,
    truncated_importance,
    vespo,
)
from grpo_jax.statistics import Mean
from grpo_jax.types import Scores

# ---------------------------------------------------------------------- the objectives


class Objective(NamedTuple):
    """An objective, and the terms that its formula has."""

    loss: Any
    terms: tuple[Term, ...]
    detached: bool = False  # holds a ratio still, so that its gradient is not the slope of its value


def row(loss, count, cost, *others, detached=False):
    """An objective whose first term is that of the policy."""
    return Objective(loss, (Term(count, cost), *others), detached)


def other(count, cost):
    """A term without advantages."""
    return Term(count, cost, of_policy=False)


PPO = policy(clip(0.2, 0.2))
DAPO = policy(clip(0.2, 0.28))
WIDE = {"epsilon": 0.1, "epsilon_high": 0.2}  # of a sequence's ratio, so that many are within
WIDE_CLIP = clip(0.1, 0.2)

OBJECTIVES = {
    # the clipped ratio of a token
    "grpo": row(grpo(), "completion", PPO),
    "grpo_high": row(grpo(epsilon=0.1, epsilon_high=0.4), "completion", policy(clip(0.1, 0.4))),
    "grpo_one_sided": row(grpo(epsilon=1.5, epsilon_high=0.3), "completion", policy(clip(1.5, 0.3))),
    "grpo_delta": row(grpo(delta=1.5), "completion", policy(clip(0.2, 0.2, 1.5))),
    "dapo_delta": row(dapo(delta=4.0), "token", policy(clip(0.2, 0.28, 4.0))),
    "bnpo": row(bnpo(), "token", PPO),
    "bnpo_high_delta": row(bnpo(epsilon=0.3, epsilon_high=0.1, delta=1.5), "token", policy(clip(0.3, 0.1, 1.5))),
    "dapo": row(dapo(), "token", DAPO),
    "dr_grpo": row(dr_grpo(MAX_TOKENS), "constant", PPO),
    "dr_grpo_delta": row(dr_grpo(MAX_TOKENS, epsilon_high=0.3, delta=1.5), "constant", policy(clip(0.2, 0.3, 1.5))),
    # other levels
    "grpo_sequence": row(grpo(ratio=sequence_ratio), "completion", policy(clip(0.2, 0.2), "sequence")),
    "grpo_product": row(grpo(ratio=product_ratio), "completion", policy(clip(0.2, 0.2), "product")),
    "gspo": row(gspo(), "completion", policy(clip(3e-4, 4e-4), "sequence")),
    "gspo_wide": row(gspo(**WIDE), "completion", policy(WIDE_CLIP, "sequence")),
    "gspo_wide_by_token": row(gspo(**WIDE, aggregate=token_mean), "token", policy(WIDE_CLIP, "sequence")),
    "gspo_token": row(gspo_token(), "completion", policy(clip(3e-4, 4e-4), "sequence_token"), detached=True),
    "gspo_token_wide": row(
        gspo_token(**WIDE, aggregate=token_mean), "token", policy(WIDE_CLIP, "sequence_token"), detached=True
    ),
    "luspo": row(luspo(), "completion_sum", policy(clip(2e-3, 2.5e-3), "sequence")),
    "luspo_wide": row(luspo(**WIDE), "completion_sum", policy(WIDE_CLIP, "sequence")),
    "gmpo": row(gmpo(), "completion", geometric()),
    "gmpo_uneven": row(gmpo(epsilon=0.2, epsilon_high=0.5), "completion", geometric(0.2, 0.5)),
    "gmpo_product": row(gmpo(ratio=product_ratio), "completion", geometric(level="product")),
    # no hard clip
    "reinforce": row(reinforce(), "completion_sum", policy(score())),
    "reinforce_by_token": row(reinforce(aggregate=token_mean), "token", policy(score())),
    "cispo": row(cispo(), "token", policy(cispo_weight(5.0)), detached=True),
    "cispo_1_28": row(cispo(max_ratio=1.28), "token", policy(cispo_weight(1.28)), detached=True),
    "cispo_floor": row(cispo(max_ratio=1.28, min_ratio=0.5), "token", policy(cispo_weight(1.28, 0.5)), detached=True),
    "cispo_sequence": row(
        cispo(max_ratio=1.2, ratio=sequence_ratio), "token", policy(cispo_weight(1.2), "sequence"), detached=True
    ),
    "sapo": row(sapo(), "completion", policy(soft())),
    "sapo_cold": row(sapo(tau_pos=3.0, tau_neg=0.4), "completion", policy(soft(3.0, 0.4))),
    "sapo_sequence": row(sapo(ratio=sequence_ratio), "completion", policy(soft(), "sequence")),
    "vespo": row(vespo(), "token", policy(gamma(), "product"), detached=True),
    "vespo_own": row(
        vespo(k_pos=0.5, lambda_pos=1.5, k_neg=1.0, lambda_neg=0.7),
        *("token", policy(gamma(0.5, 1.5, 1.0, 0.7), "product")),
        detached=True,
    ),
    "vespo_by_token": row(vespo(ratio=token_ratio), "token", policy(gamma(), "token"), detached=True),
    # the ratio against something else
    "vespo_corrected": row(
        vespo(anchor=corrected(truncated_importance(2.0, low=0.5))),
        *("token", policy(gamma(), "product", anchor=to_corrected(truncated(2.0, 0.5)))),
        detached=True,
    ),
    "grpo_to_sampler": row(grpo(anchor=sampler), "completion", policy(clip(0.2, 0.2), anchor=to_sampler)),
    "gmpo_to_sampler": row(gmpo(anchor=sampler), "completion", geometric(anchor=to_sampler)),
    # trust regions other than a band of the ratio
    "dppo": row(dppo(), "token", policy(region(0.2, 0.2), anchor=to_sampler), detached=True),
    "dppo_old_capped": row(
        dppo(low=0.05, high=0.1, max_ratio=1.5, anchor=old_policy),
        *("token", policy(region(0.05, 0.1, cap=1.5))),
        detached=True,
    ),
    "dppo_kl": row(
        dppo(low=0.02, high=0.05, divergence=binary_kl),
        *("token", policy(region(0.02, 0.05, "binary_kl"), anchor=to_sampler)),
        detached=True,
    ),
    "dppo_prime_rl": row(
        dppo(penalty=squared_log_ratio(1e-3)),
        *("token", policy(region(0.2, 0.2), anchor=to_sampler), other("token", square(1e-3))),
        detached=True,
    ),
    "squared_log_ratio_old": row(
        grpo(penalty=squared_log_ratio(0.3, anchor=old_policy)),
        *("completion", PPO, other("completion", square(0.3, to_old))),
    ),
    "drpo": row(drpo(), "token", policy(shift(0.2), anchor=to_sampler)),
    "drpo_old": row(drpo(delta=0.05, anchor=old_policy), "token", policy(shift(0.05))),
    "dro": row(dro(), "token", policy(score()), other("token", square(0.025, to_old, weighted=True))),
    "dro_sampler": row(
        dro(beta=0.5, anchor=sampler), "token", policy(score()), other("token", square(0.25, weighted=True))
    ),
    "pspo": row(pspo(), "completion", policy(smoothed(0.1))),
    "pspo_half_by_token": row(pspo(alpha=0.5, aggregate=token_mean), "token", policy(smoothed(0.5))),
    "m2po": row(m2po(), "token", policy(unclipped(), anchor=to_sampler)),
    "kl_cov": row(kl_cov(), "token", policy(unclipped()), other("token", distance_of_marked(1.0))),
    "covariant_kl": row(
        grpo(penalty=covariant_kl(0.3)), "completion", PPO, other("completion", distance_of_marked(0.3))
    ),
    # how tokens count
    "completion_mean_of_all": row(grpo(aggregate=completion_mean_of_all), "completion_of_all", PPO),
    "completion_sum": row(grpo(aggregate=completion_sum), "completion_sum", PPO),
    "prompt_mean": row(
        policy_loss(ppo_clip(0.2), prompt_mean, penalty=k1(0.1)), "prompt", PPO, other("prompt", kl("k1", 0.1))
    ),
    "per_prompt_count": row(grpo(aggregate=per_prompt_count(13.5)), ("per_prompt", 13.5), PPO),
    "normalize_by_rollout_tokens": row(normalize_by_rollout_tokens(lambda mean: dapo(aggregate=mean)), "rollout", DAPO),
    "over_rollout_k3": row(
        normalize_by_rollout_tokens(lambda mean: cispo(aggregate=mean, penalty=k3(0.5))),
        *("rollout", policy(cispo_weight(5.0)), other("rollout", kl("k3", 0.5))),
        detached=True,
    ),
    # KL
    "grpo_r1": row(
        grpo(epsilon=10.0, penalty=k3(0.001)), "completion", policy(clip(10, 10)), other("completion", kl("k3", 0.001))
    ),
    "grpo_k1": row(grpo(penalty=k1(0.3)), "completion", PPO, other("completion", kl("k1", 0.3))),
    "grpo_k2": row(grpo(penalty=k2(0.3)), "completion", PPO, other("completion", kl("k2", 0.3))),
    "grpo_k3": row(grpo(penalty=k3(0.3)), "completion", PPO, other("completion", kl("k3", 0.3))),
    "dr_grpo_k3": row(
        dr_grpo(MAX_TOKENS, epsilon=0.3, penalty=k3(0.5)),
        *("constant", policy(clip(0.3, 0.3)), other("constant", kl("k3", 0.5))),
    ),
    "dapo_k1_token": row(
        dapo(penalty=k1(0.5, correction=token_ratio)), "token", DAPO, other("token", kl("k1", 0.5, "token"))
    ),
    "dapo_k2_token": row(
        dapo(penalty=k2(0.5, correction=token_ratio)), "token", DAPO, other("token", kl("k2", 0.5, "token"))
    ),
    "dapo_k3_token": row(
        dapo(penalty=k3(0.5, correction=token_ratio)), "token", DAPO, other("token", kl("k3", 0.5, "token"))
    ),
    "gspo_k1_sequence": row(
        gspo(**WIDE, penalty=k1(0.5, correction=sequence_ratio)),
        *("completion", policy(WIDE_CLIP, "sequence"), other("completion", kl("k1", 0.5, "sequence"))),
    ),
    "gspo_k2_sequence": row(
        gspo(**WIDE, penalty=k2(0.5, correction=sequence_ratio)),
        *("completion", policy(WIDE_CLIP, "sequence"), other("completion", kl("k2", 0.5, "sequence"))),
    ),
    "gspo_k3_sequence": row(
        gspo(**WIDE, penalty=k3(0.5, correction=sequence_ratio)),
        *("completion", policy(WIDE_CLIP, "sequence"), other("completion", kl("k3", 0.5, "sequence"))),
    ),
    "gmpo_k3": row(gmpo(penalty=k3(0.5)), "completion", geometric(), other("completion", kl("k3", 0.5))),
    "dapo_k3_by_completion": row(
        plus(dapo(), penalty_loss(k3(0.5, correction=sequence_ratio), completion_mean_of_all)),
        *("token", DAPO, other("completion_of_all", kl("k3", 0.5, "sequence"))),
    ),
    # entropy, and sums of losses
    "grpo_entropy": row(plus(grpo(), entropy_bonus(0.3)), "completion", PPO, other("token", bonus(0.3))),
    "dapo_entropy_penalty": row(
        plus(dapo(penalty=k3(0.5)), entropy_bonus(-0.5, aggregate=completion_mean)),
        *("token", DAPO, other("token", kl("k3", 0.5)), other("completion", bonus(-0.5))),
    ),
    "grpo_entropy_sft": row(
        plus(grpo(), entropy_bonus(0.1, aggregate=prompt_mean), sft()),
        *("completion", PPO, other("prompt", bonus(0.1)), other("token", likelihood)),
    ),
    "sft": Objective(sft(), (other("token", likelihood),)),
    # corrections for what the sampler and an older policy did otherwise
    "truncated_token": row(
        grpo(weight=truncated_importance(2.0)), "completion", policy(clip(0.2, 0.2), correction=truncated(2.0))
    ),
    "truncated_token_low_k3": row(
        dapo(weight=truncated_importance(2.0, low=0.5), penalty=k3(0.5)),
        *("token", policy(clip(0.2, 0.28), correction=truncated(2.0, 0.5)), other("token", kl("k3", 0.5))),
    ),
    "truncated_sequence": row(
        grpo(weight=truncated_importance(1.25, low=0.8, ratio=sequence_ratio)),
        *("completion", policy(clip(0.2, 0.2), correction=truncated(1.25, 0.8, "sequence"))),
    ),
    "truncated_product": row(
        grpo(weight=truncated_importance(2.0, ratio=product_ratio)),
        *("completion", policy(clip(0.2, 0.2), correction=truncated(2.0, 0.0, "product"))),
    ),
    "truncated_product_low_vespo": row(
        vespo(weight=truncated_importance(2.0, low=0.5, ratio=product_ratio)),
        *("token", policy(gamma(), "product", truncated(2.0, 0.5, "product"))),
        detached=True,
    ),
    "masked_token_cispo": row(
        cispo(weight=masked_importance(0.5, 2.0)),
        *("token", policy(cispo_weight(5.0), correction=masked(0.5, 2.0))),
        detached=True,
    ),
    "masked_token_gmpo": row(
        gmpo(weight=masked_importance(0.5, 2.0)), "completion", geometric(correction=masked(0.5, 2.0))
    ),
    "masked_sequence_k3": row(
        gspo(**WIDE, weight=masked_importance(0.8, 1.25, ratio=sequence_ratio), penalty=k3(0.5)),
        *("completion", policy(WIDE_CLIP, "sequence", masked(0.8, 1.25, "sequence"))),
        other("completion", kl("k3", 0.5)),
    ),
    "masked_product_sapo": row(
        sapo(weight=masked_importance(0.0, 2.0, ratio=product_ratio)),
        *("completion", policy(soft(), correction=masked(0.0, 2.0, "product"))),
    ),
    "off_policy_k3": row(
        grpo(weight=off_policy_mask(0.1), penalty=k3(0.5)),
        *("completion", policy(clip(0.2, 0.2), correction=near_policy(0.1)), other("completion", kl("k3", 0.5))),
    ),
    "off_policy_truncated": row(
        reinforce(weight=product(off_policy_mask(0.1), truncated_importance(2.0))),
        *("completion_sum", policy(score(), correction=all_of(near_policy(0.1), truncated(2.0)))),
    ),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_kind = pytest.mark.parametrize("full", [False, True], ids=["per_completion", "per_token_and_weighted"])


# --------------------------------------------------- values and gradients of objectives


@every_kind
@every_objective
def test_value_and_gradient_match_the_formula_in_float64(name, full):
    case = case_of(full=full)
    with jax.enable_x64(True):
        value, gradient, _ = evaluate(OBJECTIVES[name].loss, case, once=True)
    assert gradient.dtype == np.float64
    assert_close((value, gradient), reference(OBJECTIVES[name].terms, case), 1e-12)


@every_kind
@every_objective
def test_value_and_gradient_match_the_formula_in_float32(name, full):
    case = case_of(154, full=full, precision=np.float32)
    value, gradient, _ = evaluate(OBJECTIVES[name].loss, case)
    assert gradient.dtype == np.float32
    losses_of_completions, expected = completion_losses(OBJECTIVES[name].terms, case)
    size = np.abs(losses_of_completions).sum()  # good and bad ones cancel, their rounding does not
    assert_close((value, gradient), (losses_of_completions.sum(), expected), 1e-6, size)


@every_kind
@every_objective
def test_the_gradient_of_the_reference_is_the_slope_of_its_value(name, full):
    """So that the gradient worked out by hand is not an error of its own; what is detached is held where it is."""
    terms, case = OBJECTIVES[name].terms, case_of(full=full)
    _, gradient = reference(terms, case)
    step = 1e-6
    for field, by_field in (("log_probs", gradient[..., 0]), ("entropy", gradient[..., 1])):
        for t in range(case.mask.shape[-1]):  # token t of every completion at once: they do not touch each other
            there, back = getattr(case, field).copy(), getattr(case, field).copy()
            there[..., t] += step
            back[..., t] -= step
            rise = (
                completion_losses(terms, case._replace(**{field: there}), held=case)[0]
                - completion_losses(terms, case._replace(**{field: back}), held=case)[0]
            )
            np.testing.assert_allclose(by_field[..., t], rise / (2 * step), atol=3e-8 * max(1, np.abs(by_field).max()))


@every_objective
def test_the_table_says_which_objectives_hold_something_still(name):
    """The slope of the value, all of it moving, is the gradient unless something is detached."""
    terms, case = OBJECTIVES[name].terms, case_of(full=True)
    _, gradient = reference(terms, case)
    direction = np.where(case.mask, np.random.default_rng(0).normal(size=case.mask.shape), 0.0)
    there, back = (
        reference(terms, case._replace(log_probs=case.log_probs + step * direction))[0] for step in (1e-6, -1e-6)
    )
    slope, expected = (there - back) / 2e-6, np.sum(gradient[..., 0] * direction)
    assert np.isclose(slope, expected, rtol=1e-5, atol=1e-7) != OBJECTIVES[name].detached


def test_the_table_has_every_objective_and_every_part():
    """A function of the package without a row would go unchecked."""
    in_other_tests = {"value", "kl_k1", "kl_k2", "kl_k3", "echo", "load_balance", "total_variation"}
    in_other_tests |= {
        "distill",
        "distill_top",
        "forward_kl",
        "generalised_jsd",
        "of_top_k",
        "reverse_kl",
        "sampled_reverse_kl",
    }
    of_objectives = {"ppo_clip", "policy_loss", "clipped_importance", "soft_gate", "gamma_weight", "policy_gradient"}
    of_objectives |= {"importance", "smoothed_importance", "squared_policy_gradient"}
    of_objectives |= {"divergence_mask", "quadratic_shift"}
    source = inspect.getsource(inspect.getmodule(Objective))
    table = source[source.index("OBJECTIVES = {") : source.index("every_objective =")]
    for name in set(losses.__all__) - in_other_tests - of_objectives - {"sequence_token_ratio", "constant_length"}:
        assert name in table, name


def edges_of(case):
    """Numbers that some objective compares, one a token, with the bounds it compares them with."""
    rows = [row_of(case, b, g) for b, g in np.argwhere(case.mask.any(-1))]

    def of_tokens(f):
        return np.concatenate([np.broadcast_to(f(r), r.old.shape) for r in rows])

    log_ratio, gap = (of_tokens(f) for f in (lambda r: r.log_probs - r.old, lambda r: r.old - r.sampler))
    mean, total = (of_tokens(lambda r, f=f: f(r.log_probs - r.old)) for f in (np.mean, np.sum))
    mean_gap, total_gap = (of_tokens(lambda r, f=f: f(r.old - r.sampler)) for f in (np.mean, np.sum))
    drift = of_tokens(lambda r: np.mean(r.sampler - r.log_probs))

    def shift_of(anchor):
        return of_tokens(lambda r: np.exp(r.log_probs) - np.exp(anchor(r)))

    edges = [
        *((np.exp(log_ratio), bounds) for bounds in ([0.8, 1.2], [0.8, 1.28], [0.9, 1.4], [0.7, 1.3], [0.7, 1.1])),
        *((np.exp(log_ratio), bounds) for bounds in ([1.28, 5.0], [0.5, 1.28])),
        *((log_ratio, bounds) for bounds in ([-0.4, 0.4], [-0.2, 0.5])),
        *((np.exp(mean), bounds) for bounds in ([0.9, 1.2], [1 - 3e-4, 1 + 4e-4], [1 - 2e-3, 1 + 2.5e-3])),
        (np.exp(total), [0.8, 1.2]),
        (np.exp(gap), [0.5, 2.0]),
        (np.exp(mean_gap), [0.8, 1.25]),
        (np.exp(total_gap), [0.5, 2.0]),
        (drift, [0.1]),
        *((shift_of(lambda r: r.sampler), bounds) for bounds in ([-0.2, 0.2],)),
        *((shift_of(lambda r: r.old), bounds) for bounds in ([-0.05, 0.1],)),
    ]
    return np.concatenate([r.advantages for r in rows]), edges, log_ratio


@every_kind
@pytest.mark.parametrize("seed", [69, 154])
def test_the_cases_reach_every_side_of_every_bound(seed, full):
    """Good and bad tokens below, within and above: were one missing, an error there would go unseen."""
    case = case_of(seed, full=full)
    advantages, edges, log_ratio = edges_of(case)
    for numbers, bounds in edges:
        sides = set(zip(advantages > 0, np.digitize(numbers, bounds), strict=True))
        assert len(sides) == 2 * (len(bounds) + 1), bounds
        assert min(np.abs(numbers - bound).min() for bound in bounds) > 2e-5  # and float32 takes the same side
    assert len(set(np.digitize(np.exp(log_ratio[advantages < 0]), [1.2, 1.5, 4.0]))) == 4  # beyond each delta
    lengths = case.mask.sum(-1)
    assert len(set(lengths[lengths > 0].tolist())) >= 4
    assert (lengths[:3] == 0).any()  # an empty completion
    assert not lengths[3].any()  # an empty prompt
    assert any((np.diff(np.flatnonzero(case.mask[b, g])) > 1).any() for b, g in np.ndindex(4, 4))  # a hole
    if full:
        assert {0.0, 0.25, 1.0, 1.75} == set(case.weights[case.mask].tolist())
        assert all(len(set(np.sign(row_of(case, b, g).advantages))) == 2 for b, g in ((0, 0), (2, 0)))


# ------------------------------------------------------------ errors that others made


def clipped_on_the_wrong_side(log_ratio, advantages, log_probs):
    """The maximum for negative advantages (EasyDeL at 090a03b)."""
    ratio = jnp.exp(log_ratio)
    plain, clipped = ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages
    return jnp.where(advantages >= 0, jnp.minimum(plain, clipped), jnp.maximum(plain, clipped)), {}


def clipped_on_both_sides(log_ratio, advantages, log_probs):
    """Without the minimum."""
    return jnp.clip(jnp.exp(log_ratio), 0.8, 1.2) * advantages, {}


def mean_over_padding(per_token, mask):
    """Padding in the denominator (lmpo at bdffa7b)."""
    return Mean(jnp.sum(jnp.where(mask, per_token, 0.0)), jnp.asarray(mask.size))


def mean_over_prompts_too(per_token, mask):
    """Prompt tokens, three each, in the denominator."""
    return Mean(jnp.sum(jnp.where(mask, per_token, 0.0)), jnp.sum(mask) + 3 * mask.shape[0] * mask.shape[1])


def completion_mean_with_the_excluded(per_token, mask):
    """Excluded completions are out of the numerator only."""
    means = jnp.sum(jnp.where(mask, per_token, 0.0), -1) / jnp.maximum(jnp.sum(mask, -1), 1)
    return Mean(jnp.sum(means), jnp.asarray(means.size))


def length_of_the_batch(per_token, mask):
    """Dr. GRPO by the padded width (Tunix at c7d8950)."""
    return constant_length(mask.shape[-1])(per_token, mask)


def differentiated_importance(log_ratio, advantages, log_probs):
    """CISPO without the stop-gradient."""
    return jnp.exp(jnp.minimum(log_ratio, jnp.log(5.0))) * advantages * log_probs, {}


def differentiated_gamma(log_ratio, advantages, log_probs):
    """VESPO without the stop-gradient."""
    k, rate = jnp.where(advantages < 0, 3.0, 2.0), jnp.where(advantages < 0, 2.0, 3.0)
    return jnp.exp(k * log_ratio - rate * jnp.expm1(log_ratio)) * advantages * log_probs, {}


def unscaled_gate(log_ratio, advantages, log_probs):
    """SAPO without `4 / tau`."""
    tau = jnp.where(advantages > 0, 1.0, 1.05)
    return jax.nn.sigmoid(tau * jnp.expm1(log_ratio)) * advantages, {}


def reversed_k3(scores, experience):
    """The difference with the wrong sign, in k3."""
    return 0.3 * kl_k3(experience.ref_log_probs, scores.log_probs), {}


def detached_correction(scores, experience):
    """A KL estimate times a ratio that is not differentiated: the value of the unbiased one, with another gradient."""
    ratio = jax.lax.stop_gradient(jnp.exp(scores.log_probs - experience.old_log_probs))
    return 0.5 * ratio * kl_k3(scores.log_probs, experience.ref_log_probs), {}


def weighted_penalty(scores, experience):
    """The off-policy mask on the penalty as well."""
    (weight, _), (cost, _) = off_policy_mask(0.1)(scores, experience), k3(0.5)(scores, experience)
    return weight * cost, {}


def inverse_importance(scores, experience):
    """The sampler over the old policy."""
    return jnp.minimum(jnp.exp(experience.rollout.log_probs - experience.old_log_probs), 2.0), {}


def masked_good_and_bad(scores, experience):
    """The off-policy mask without a look at the advantage."""
    worse = experience._replace(advantages=-jnp.ones_like(experience.advantages))
    return off_policy_mask(0.1)(scores, worse)


# name -> an erroneous loss, the objective it should have been, and whether its value shows it as well
OTHERS_ERRORS = {
    "wrong_side": (policy_loss(clipped_on_the_wrong_side, completion_mean), "grpo", True),
    "both_sides": (policy_loss(clipped_on_both_sides, completion_mean), "grpo", True),
    "mean_over_padding": (policy_loss(ppo_clip(0.2), mean_over_padding), "bnpo", True),
    "mean_over_prompts": (policy_loss(ppo_clip(0.2), mean_over_prompts_too), "bnpo", True),
    "excluded_count": (policy_loss(ppo_clip(0.2), completion_mean_with_the_excluded), "grpo", True),
    "padded_width": (policy_loss(ppo_clip(0.2), length_of_the_batch), "dr_grpo", True),
    "update_for_rollout": (dapo(), "normalize_by_rollout_tokens", True),
    "no_delta": (grpo(), "grpo_delta", True),
    "delta_as_a_distance": (grpo(delta=2.5), "grpo_delta", True),
    "sum_for_mean": (gspo(**WIDE, ratio=product_ratio), "gspo_wide", True),
    "sequence_for_gspo_token": (gspo(**WIDE, aggregate=token_mean), "gspo_token_wide", False),
    "luspo_without_length": (gspo(**WIDE), "luspo_wide", True),
    "cispo_differentiated": (policy_loss(differentiated_importance, token_mean), "cispo", False),
    "cispo_cap_as_a_distance": (cispo(max_ratio=2.28), "cispo_1_28", True),
    "cispo_with_ppo": (bnpo(epsilon_high=0.28), "cispo_1_28", True),
    "vespo_differentiated": (policy_loss(differentiated_gamma, token_mean, ratio=product_ratio), "vespo", False),
    "vespo_of_the_mean": (vespo(ratio=sequence_ratio), "vespo", True),
    "vespo_swapped": (vespo(k_pos=3.0, lambda_pos=2.0, k_neg=2.0, lambda_neg=3.0), "vespo", True),
    "sapo_unscaled": (policy_loss(unscaled_gate, completion_mean), "sapo", True),
    "gmpo_bounds_on_the_ratio": (gmpo(epsilon=-np.log(0.6), epsilon_high=np.log(1.4)), "gmpo", True),
    "gmpo_arithmetic": (grpo(epsilon=1 - np.exp(-0.4), epsilon_high=np.exp(0.4) - 1), "gmpo", True),
    "k3_reversed": (grpo(penalty=reversed_k3), "grpo_k3", True),
    "k3_not_corrected": (dapo(penalty=k3(0.5)), "dapo_k3_token", True),
    "k3_correction_detached": (dapo(penalty=detached_correction), "dapo_k3_token", False),
    "penalty_weighted": (grpo(weight=off_policy_mask(0.1), penalty=weighted_penalty), "off_policy_k3", True),
    "entropy_penalised": (plus(grpo(), entropy_bonus(-0.3)), "grpo_entropy", True),
    "importance_inverse": (grpo(weight=inverse_importance), "truncated_token", True),
    "importance_clipped_for_masked": (cispo(weight=truncated_importance(2.0, low=0.5)), "masked_token_cispo", True),
    "off_policy_of_good": (grpo(weight=masked_good_and_bad, penalty=k3(0.5)), "off_policy_k3", True),
}


@pytest.mark.parametrize("name", OTHERS_ERRORS)
def test_the_reference_tells_the_errors_of_other_libraries_apart(name):
    loss, objective, in_value = OTHERS_ERRORS[name]
    case = case_of(full=True)
    value, gradient, _ = evaluate(loss, case, once=True)
    expected_value, expected_gradient = reference(OBJECTIVES[objective].terms, case)
    assert np.abs(gradient - expected_gradient).max() > 0.02 * np.abs(expected_gradient).max()
    assert (abs(value - expected_value) > 5e-4) == in_value


# Every keyword of every objective and part, with another value than the one it starts from.
SETTINGS = {
    "grpo": (grpo, {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0}),
    "bnpo": (bnpo, {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0}),
    "dr_grpo": (
        functools.partial(dr_grpo, max_tokens=MAX_TOKENS),
        {"max_tokens": 12, "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0},
    ),
    "dapo": (dapo, {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 2.0}),
    "gspo": (gspo, {"epsilon": 0.5, "epsilon_high": 0.5}),
    "gspo_token": (gspo_token, {"epsilon": 0.5, "epsilon_high": 0.5}),
    "luspo": (luspo, {"epsilon": 0.5, "epsilon_high": 0.5}),
    "gmpo": (gmpo, {"epsilon": 0.1, "epsilon_high": 0.1}),
    "reinforce": (reinforce, {}),
    "cispo": (cispo, {"max_ratio": 1.5, "min_ratio": 0.7}),
    "sapo": (sapo, {"tau_pos": 2.0, "tau_neg": 2.0}),
    "vespo": (vespo, {"k_pos": 1.0, "lambda_pos": 1.0, "k_neg": 1.0, "lambda_neg": 1.0}),
    "dppo": (dppo, {"low": 0.05, "high": 0.05, "divergence": binary_kl, "max_ratio": 1.5}),
    "drpo": (drpo, {"delta": 0.05}),
    "dro": (dro, {"beta": 0.5}),
    "pspo": (pspo, {"alpha": 0.5}),
    "m2po": (m2po, {}),
    "kl_cov": (kl_cov, {"coefficient": 0.5}),
}
# Those of `policy_loss`, which every objective passes on.
PARTS = {
    "aggregate": per_prompt_count(7.0),
    "ratio": product_ratio,
    "weight": truncated_importance(1.5),
    "penalty": k3(0.5),
    "anchor": corrected(truncated_importance(1.5)),
}
WITHOUT = {  # what an objective refuses, has none of, or already is
    "reinforce": {"ratio", "anchor"},
    "vespo": {"ratio"},
    "dppo": {"ratio"},
    "drpo": {"ratio"},
    "kl_cov": {"penalty"},
}
OF_WEIGHTS = {
    "truncated_importance": (truncated_importance, {"limit": 1.2, "low": 0.8, "ratio": product_ratio}),
    "masked_importance": (masked_importance, {"low": 0.9, "high": 1.5, "ratio": product_ratio}),
    "off_policy_mask": (off_policy_mask, {"threshold": 0.0}),
}
OF_PENALTIES = {
    name: (lambda f=f, **changed: f(**{"beta": 0.5} | changed), {"beta": 0.4, "correction": token_ratio})
    for name, f in (("k1", k1), ("k2", k2), ("k3", k3))
} | {
    "squared_log_ratio": (
        lambda **changed: squared_log_ratio(**{"tau": 0.5} | changed),
        {"tau": 0.4, "anchor": old_policy},
    ),
    "covariant_kl": (covariant_kl, {"coefficient": 0.4}),
}
OF_ENTROPY = (
    lambda **changed: plus(grpo(), entropy_bonus(**{"coefficient": 0.5} | changed)),
    {"coefficient": 0.4, "aggregate": completion_mean},
)


def list_settings():
    """Identifier, the loss as it comes, and the loss with one setting changed."""
    for name, (make, changes) in SETTINGS.items():
        base = make()
        for setting, value in changes.items():
            yield f"{name}-{setting}", base, make(**{setting: value})
        for part, value in PARTS.items():
            if part not in WITHOUT.get(name, ()):
                yield f"{name}-{part}", base, make(**{part: value})
    for argument, table in (("weight", OF_WEIGHTS), ("penalty", OF_PENALTIES)):
        for name, (make, changes) in table.items():
            base = reinforce(**{argument: make()})
            for setting, value in changes.items():
                yield f"{name}-{setting}", base, reinforce(**{argument: make(**{setting: value})})
    make, changes = OF_ENTROPY
    base = make()
    for setting, value in changes.items():
        yield f"entropy_bonus-{setting}", base, make(**{setting: value})


EFFECTS = {name: pair for name, *pair in list_settings()}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_setting_has_an_effect_on_the_gradient(name):
    base, changed = EFFECTS[name]
    case = case_of(154, precision=np.float32)
    _, before, _ = evaluate(base, case)
    _, after, _ = evaluate(changed, case, once=True)
    assert np.abs(after - before).max() > 1e-3 * np.abs(before).max()


def test_every_setting_of_every_objective_is_in_the_table():
    functions = {name: f for name, f in vars(losses.objectives).items() if inspect.isfunction(f)}
    assert set(SETTINGS) == {name for name, f in functions.items() if "parts" in inspect.signature(f).parameters}
    for name, (_, changes) in (SETTINGS | OF_WEIGHTS).items():
        named = inspect.signature(getattr(losses, name)).parameters.values()
        assert {p.name for p in named if p.kind != p.VAR_KEYWORD} == set(changes), name
    assert set(inspect.signature(policy_loss).parameters) - {"surrogate"} == set(PARTS)


def test_gspo_token_is_gspo_where_a_completion_has_one_advantage():
    """As the paper says (section 4.3), under the mean over completions; else they differ (see the errors)."""
    case = case_of()
    with jax.enable_x64(True):
        a, b = (evaluate(make(**WIDE), case)[:2] for make in (gspo, gspo_token))
    assert_close(a, b, 1e-12)


def test_weights_of_a_rollout_are_left_alone_by_supervised_learning_and_penalties():
    """They correct the policy's gain; a zero weight takes a token out of it, not out of a denominator."""
    case = case_of()
    nothing = case._replace(weights=np.zeros(case.mask.shape))
    for loss, count in ((sft(), "token"), (grpo(penalty=k1(1.0)), "completion")):
        _, gradient, _ = evaluate(loss, nothing)
        weight = token_weights(count, case)
        np.testing.assert_allclose(gradient[..., 0], -weight if count == "token" else weight, rtol=1e-6)


# ---------------------------------------------------------------- properties of every objective


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e4, -1e4])
@every_objective
def test_what_padding_holds_changes_neither_value_nor_gradient_nor_metric(name, garbage):
    loss = OBJECTIVES[name].loss
    case = case_of(154, full=True)

    def spoil(**fields):
        return case._replace(**{f: np.where(case.mask, getattr(case, f), bad) for f, bad in fields.items()})

    clean_value, clean_gradient, clean_metrics = evaluate(loss, case)
    for spoiled in (
        spoil(log_probs=garbage),  # a log-ratio that overflows
        spoil(log_probs=garbage, old=-garbage, ref=0.5, entropy=garbage, advantages=garbage, sampler=garbage),
        spoil(ref=garbage, advantages=-1.0, old=-garbage, sampler=garbage, weights=garbage),
        spoil(sampler=-garbage, weights=1.0, entropy=-garbage),
    ):
        value, gradient, metrics = evaluate(loss, spoiled)
        np.testing.assert_array_equal(value, clean_value)
        np.testing.assert_array_equal(gradient, clean_gradient)
        np.testing.assert_array_equal(gradient[~case.mask], 0.0)
        chex.assert_trees_all_equal(metrics, clean_metrics)


@every_objective
def test_wider_padding_changes_nothing(name):
    """Not even of a constant length, which is the limit of sampling and not the width of the batch."""
    loss = OBJECTIVES[name].loss
    case = case_of(full=True)
    wide = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 0), (0, 4))) if x.ndim == 3 else x, case)
    with jax.enable_x64(True):
        value, gradient, metrics = evaluate(loss, case, once=True)
        wide_value, wide_gradient, wide_metrics = evaluate(loss, wide, once=True)
    assert_close((wide_value, wide_gradient[:, :, :-4]), (value, gradient), 1e-12)
    np.testing.assert_array_equal(wide_gradient[:, :, -4:], 0.0)
    chex.assert_trees_all_close(wide_metrics, metrics, rtol=1e-12)


@every_objective
def test_reordering_a_group_or_the_prompts_reorders_the_gradient(name):
    loss = OBJECTIVES[name].loss
    case = case_of()
    prompts, group = [2, 0, 3, 1], [1, 3, 2, 0]
    order = np.ix_(prompts, group)
    reordered = jax.tree.map(lambda x: x[order] if x.ndim > 1 else x[prompts], case)
    with jax.enable_x64(True):
        value, gradient, metrics = evaluate(loss, case, once=True)
        other_value, other_gradient, other_metrics = evaluate(loss, reordered, once=True)
    assert_close((other_value, other_gradient), (value, gradient[order]), 1e-12)
    chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-12)


@every_objective
def test_parts_of_a_batch_add_up_to_the_whole_batch(name):
    """Sums over total counts: value, gradient and metrics of unequal parts, one without a single token."""
    loss = OBJECTIVES[name].loss
    case = case_of(full=True)
    parts = [jax.tree.map(lambda x, b=b: x[b : b + 1], case) for b in range(4)]
    assert sorted({int(part.mask.sum()) for part in parts})[0] == 0

    def evaluate_part(log_probs, entropy, experience, counts):
        terms, metrics = loss(Scores(log_probs, entropy), experience)
        return losses.value(terms, counts), (terms, metrics)

    of_part = jax.jit(jax.value_and_grad(evaluate_part, (0, 1), has_aux=True), compiler_options=UNOPTIMISED)
    with jax.enable_x64(True):
        value, gradient, whole_metrics, whole = run(loss, case, once=True)
        counts = tuple(term.count for term in whole)
        values, gradients = zip(
            *(of_part(jnp.asarray(p.log_probs), jnp.asarray(p.entropy), experience_of(p), counts) for p in parts),
            strict=True,
        )
        of_parts = jax.tree.map(lambda *x: np.stack(x), *(aux for _, aux in values))
        terms, merged = statistics.merge(of_parts)
        gradients = np.concatenate([np.stack(g, -1) for g in gradients])
        assert_close((sum(float(v) for v, _ in values), gradients), (value, gradient), 1e-12)
        assert_close((losses.value(terms), gradient), (value, gradient), 1e-12)
        chex.assert_trees_all_close(tuple(term.count for term in terms), counts, rtol=1e-14)
        chex.assert_trees_all_close(statistics.summary(merged), statistics.summary(whole_metrics), rtol=1e-12)


@every_objective
def test_a_batch_without_a_token_that_counts_has_value_0_and_gradient_0(name):
    case = case_of(154)
    value, gradient, metrics = evaluate(OBJECTIVES[name].loss, case._replace(mask=np.zeros_like(case.mask)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)
    assert all(number == 0 for number in metrics.values())


@every_objective
def test_advantages_of_0_give_no_gradient_but_that_of_the_penalty(name):
    loss, terms, _ = OBJECTIVES[name]
    case = case_of(154)
    case = case._replace(advantages=np.zeros_like(case.advantages))
    value, gradient, _ = evaluate(loss, case)
    assert_close((value, gradient), reference(tuple(t for t in terms if not t.of_policy), case), 1e-6)
    if all(term.of_policy for term in terms):
        assert value == 0
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if not objective.detached])
def test_the_gradient_is_the_slope_of_the_value(name):
    """Where nothing is detached; the others are held against the reference, which holds still what they detach."""
    loss, case = OBJECTIVES[name].loss, case_of()
    with jax.enable_x64(True):
        experience = experience_of(case)

        def value(log_probs, entropy):
            return losses.value(loss(Scores(log_probs, entropy), experience)[0])

        of = jnp.asarray(case.log_probs), jnp.asarray(case.entropy)
        chex.assert_numerical_grads(value, of, order=1, atol=1e-6, eps=1e-6, modes="rev")


@every_objective
def test_equal_policies_have_ratio_1_and_the_gradient_of_the_plain_policy_gradient(name):
    """Whatever the objective, its first update on its own samples is REINFORCE's, summed over each completion."""
    loss, terms, _ = OBJECTIVES[name]
    case = case_of(154, precision=np.float32)
    case = case._replace(old=case.log_probs, ref=case.log_probs, sampler=case.log_probs)
    value, gradient, metrics = evaluate(loss, case)
    assert_close((value, gradient), reference(terms, case), 3e-6)
    if "ratio_max" in metrics:
        assert metrics["ratio_max"] == 1
    assert all(metrics[m] == 0 for m in ("clip_low", "clip_high", "clip_delta", "off_policy") if m in metrics)
    assert metrics.get("importance", 1) == metrics.get("correction", 1) == 1
    assert metrics.get("correction_bounded", 0) == 0
    if name in ("grpo_product", "gmpo_product"):  # each token's ratio is that of all
        terms = (terms[0]._replace(count="completion_sum"),)
    plain = [t._replace(cost=policy(score())) if t.of_policy else t for t in terms]
    _, expected = reference(plain, case)
    expected = expected * {"pspo": 0.9, "pspo_half_by_token": 0.5}.get(name, 1.0)  # 1 - alpha of it
    np.testing.assert_allclose(gradient.sum(2), expected.sum(2), atol=1e-6 * np.abs(expected).max() * 8)


@every_objective
def test_old_and_reference_policies_and_advantages_get_no_say_in_the_count(name):
    """A term's count is of the mask alone (and of the rollout's), so that it can be totalled ahead of all else."""
    loss = OBJECTIVES[name].loss
    a = case_of(154)
    b = case_of(69)._replace(mask=a.mask, token_share=a.token_share)
    chex.assert_trees_all_equal(*([term.count for term in run(loss, case)[3]] for case in (a, b)))


# --------------------------------------------------------------------------- extremes


def one_token(log_ratio, advantage, loss, gap=0.0):
    """Value, gradient by log-probs and metrics for two tokens of one completion, of which the second has these.

    Args:
      log_ratio: policy over old policy.
      advantage: of the completion.
      loss: what to evaluate.
      gap: old policy over sampler, in logarithms.
    """
    case = Case(
        log_probs=np.array([[[-1.0, -1.0]]]),
        old=np.array([[[-1.0, -1.0 - log_ratio]]]),
        ref=np.full((1, 1, 2), -1.0),
        sampler=np.array([[[-1.0, -1.0 - log_ratio - gap]]]),
        entropy=np.zeros((1, 1, 2)),
        advantages=np.array([[advantage]]),
        mask=np.ones((1, 1, 2), bool),
        token_share=np.full(1, 2.0),
    )
    value, gradient, metrics = evaluate(loss, case)
    return value, gradient[0, 0, :, 0], metrics


R1 = grpo(epsilon=10.0)
DR_GRPO_2 = dr_grpo(2)


@pytest.mark.parametrize("log_ratio", [50.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize(
    "loss",
    [OBJECTIVES["grpo"].loss, OBJECTIVES["dapo"].loss, DR_GRPO_2, R1, OBJECTIVES["bnpo"].loss],
    ids=["grpo", "dapo", "dr_grpo", "r1", "bnpo"],
)
def test_a_good_token_of_enormous_ratio_has_a_finite_value_and_gradient_exactly_0(loss, log_ratio):
    value, gradient, _ = one_token(log_ratio, 1.0, loss)
    assert np.isfinite(value)
    assert gradient[1] == 0
    np.testing.assert_allclose(gradient[0], -0.5)


@pytest.mark.parametrize("log_ratio", [-50.0, -100.0, -1e4, -1e30])
def test_a_bad_token_of_vanishing_ratio_has_a_finite_value_and_gradient_exactly_0(log_ratio):
    value, gradient, _ = one_token(log_ratio, -1.0, OBJECTIVES["grpo"].loss)
    np.testing.assert_allclose(value, (1 + 0.8) / 2)
    np.testing.assert_allclose(gradient, [0.5, 0.0])


@pytest.mark.parametrize("log_ratio", [50.0, 100.0, 1e4])
def test_a_bad_token_beyond_delta_costs_delta_and_has_gradient_exactly_0(log_ratio):
    value, gradient, metrics = one_token(log_ratio, -1.0, OBJECTIVES["grpo_delta"].loss)
    np.testing.assert_allclose(value, (1 + 1.5) / 2)
    np.testing.assert_allclose(gradient, [0.5, 0.0])
    assert metrics["clip_delta"] == 0.5


# Those whose cost of a bad token grows without bound are left out for it.
BOUNDED = {
    **{
        f"{name}{sign}": (OBJECTIVES[name].loss, sign)
        for name in ("grpo_delta", "dapo_delta", "cispo", "cispo_floor", "cispo_sequence", "reinforce")
        for sign in "+-"
    },
    **{f"{name}{sign}": (OBJECTIVES[name].loss, sign) for name in ("sapo", "sapo_cold", "vespo") for sign in "+-"},
    **{f"{name}{sign}": (OBJECTIVES[name].loss, sign) for name in ("sapo_sequence", "vespo_own") for sign in "+-"},
    **{
        f"{name}+": (OBJECTIVES[name].loss, "+")
        for name in ("gspo", "gspo_wide", "gspo_token", "luspo", "gmpo", "gmpo_product", "grpo_product")
    },
}


@pytest.mark.parametrize("log_ratio", [50.0, 100.0, 1e4, -50.0, -100.0, -1e4])
@pytest.mark.parametrize("name", BOUNDED)
def test_an_objective_that_is_bounded_is_finite_at_any_ratio(name, log_ratio):
    loss, sign = BOUNDED[name]
    value, gradient, _ = one_token(log_ratio, 1.0 if sign == "+" else -1.0, loss)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("log_ratio", [-50.0, -100.0, -1e4])
@pytest.mark.parametrize("name", ["gspo", "gspo_wide", "gspo_token", "luspo", "gmpo", "grpo_product", "dapo", "bnpo"])
def test_a_bad_token_of_vanishing_ratio_is_finite_in_every_clipped_objective(name, log_ratio):
    value, gradient, _ = one_token(log_ratio, -1.0, OBJECTIVES[name].loss)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [21.0, 50.0, 100.0, 1e4])
def test_the_soft_gate_is_open_above_20_and_shut_far_below(advantage, log_ratio):
    tau = 1.0 if advantage > 0 else 1.05
    value, gradient, _ = one_token(log_ratio, advantage, OBJECTIVES["sapo"].loss)
    np.testing.assert_allclose(value, -(2 / tau + 4 / tau) * advantage / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-advantage / 2, 0.0], rtol=1e-6)
    value, gradient, _ = one_token(-log_ratio, advantage, OBJECTIVES["sapo"].loss)
    np.testing.assert_allclose(value, -(2 / tau + 4 / tau / (1 + np.exp(tau))) * advantage / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-advantage / 2, 0.0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [50.0, 100.0, 1e4])
def test_the_gamma_weight_is_that_at_1e_minus_8_below_and_0_above(advantage, log_ratio):
    k, rate = (0.5, 1.5) if advantage > 0 else (1.0, 0.7)
    loss = OBJECTIVES["vespo_own"].loss
    _, gradient, metrics = one_token(-log_ratio, advantage, loss)
    weight = 1e-8**k * np.exp(rate * (1 - 1e-8))
    np.testing.assert_allclose(gradient, np.full(2, -weight * advantage / 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["importance"], weight, rtol=1e-5)
    _, gradient, metrics = one_token(log_ratio, advantage, loss)
    np.testing.assert_array_equal(gradient, 0.0)
    assert metrics["importance"] == 0


@pytest.mark.parametrize("log_ratio", [100.0, 1e4, -100.0, -1e4])
@pytest.mark.parametrize("name", ["grpo", "gspo", "grpo_delta", "cispo", "sapo", "vespo", "gmpo", "luspo", "reinforce"])
def test_an_advantage_of_0_has_value_and_gradient_0_whatever_the_ratio(name, log_ratio):
    """A group of equal rewards has it, and an overflowing ratio times 0 would be NaN."""
    value, gradient, _ = one_token(log_ratio, 0.0, OBJECTIVES[name].loss)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("log_ratio", [-100.0, -1.0])
def test_an_epsilon_of_1_or_more_has_no_lower_bound(log_ratio):
    for epsilon in (1.0, 10.0):
        value, gradient, _ = one_token(log_ratio, -1.0, grpo(epsilon=epsilon))
        np.testing.assert_allclose(value, (1 + np.exp(log_ratio)) / 2, rtol=1e-6)
        np.testing.assert_allclose(gradient, [0.5, np.exp(log_ratio) / 2], rtol=1e-6, atol=1e-40)


DROPPING = {
    "grpo": (grpo(weight=masked_importance()), [0.5, 0.0]),
    "dapo_product": (dapo(weight=masked_importance(ratio=product_ratio)), [0.0, 0.0]),
    "gspo_sequence": (gspo(weight=masked_importance(ratio=sequence_ratio)), [0.0, 0.0]),
    "cispo": (cispo(weight=masked_importance()), [0.5, 0.0]),
    "sapo": (sapo(weight=masked_importance()), [0.5, 0.0]),
    "gmpo_sequence": (gmpo(weight=masked_importance(ratio=sequence_ratio)), [0.0, 0.0]),
    "k3": (grpo(weight=masked_importance(), penalty=k3(0.5)), [0.5, 0.0]),
}


@pytest.mark.parametrize("size", [50.0, 100.0, 1e4])
@pytest.mark.parametrize("name", DROPPING)
def test_a_token_left_out_leaves_no_trace_even_where_its_ratio_overflows(name, size):
    loss, expected = DROPPING[name]
    for log_ratio, gap in ((size, size), (size, -size), (-size, size), (-size, -size)):
        value, gradient, metrics = one_token(log_ratio, -1.0, loss, gap)
        assert np.isfinite(value)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
        assert metrics["correction_bounded"] == np.mean(np.equal(expected, 0))


@pytest.mark.parametrize("size", [50.0, 100.0, 1e4])
def test_truncation_bounds_a_gap_of_any_size(size):
    loss = reinforce(weight=truncated_importance(2.0, low=0.25))
    for gap, weight in ((size, 2.0), (-size, 0.25)):
        _, gradient, metrics = one_token(0.0, 1.0, loss, gap)
        np.testing.assert_allclose(gradient, [-1.0, -weight])
        np.testing.assert_allclose(metrics["correction"], (1 + weight) / 2)
        assert metrics["correction_bounded"] == 0.5


def test_settings_can_be_traced_and_vmapped():
    case = case_of(154)
    scores, experience = Scores(jnp.asarray(case.log_probs)), experience_of(case)

    def value(epsilon, epsilon_high, beta):
        return losses.value(grpo(epsilon=epsilon, epsilon_high=epsilon_high, penalty=k3(beta))(scores, experience)[0])

    grid = np.array([[0.1, 0.3, 0.0], [0.2, 0.2, 0.5], [1.5, 0.4, 1.0]])
    together = jax.jit(jax.vmap(value))(*map(jnp.asarray, grid.T))
    for (low, high, beta), actual in zip(grid.tolist(), together, strict=True):
        terms = (Term("completion", policy(clip(low, high))), other("completion", kl("k3", beta)))
        np.testing.assert_allclose(actual, reference(terms, case)[0], rtol=1e-5)


TRACED = {
    "delta": (lambda x: grpo(delta=x), 1.5, grpo(delta=1.5)),
    "max_ratio": (lambda x: cispo(max_ratio=x), 1.28, cispo(max_ratio=1.28)),
    "min_ratio": (lambda x: cispo(min_ratio=x), 0.5, cispo(min_ratio=0.5)),
    "tau_pos": (lambda x: sapo(tau_pos=x), 3.0, sapo(tau_pos=3.0)),
    "k_neg": (lambda x: vespo(k_neg=x), 1.0, vespo(k_neg=1.0)),
    "lambda_pos": (lambda x: vespo(lambda_pos=x), 1.0, vespo(lambda_pos=1.0)),
    "gmpo": (lambda x: gmpo(epsilon=x), 0.2, gmpo(epsilon=0.2)),
    "coefficient": (lambda x: entropy_bonus(x), 0.3, entropy_bonus(0.3)),
    "limit": (lambda x: grpo(weight=truncated_importance(x)), 2.0, grpo(weight=truncated_importance(2.0))),
    "low": (lambda x: grpo(weight=masked_importance(x)), 0.8, grpo(weight=masked_importance(0.8))),
    "threshold": (lambda x: grpo(weight=off_policy_mask(x)), 0.1, grpo(weight=off_policy_mask(0.1))),
    "low_of_dppo": (lambda x: dppo(low=x), 0.1, dppo(low=0.1)),
    "cap_of_dppo": (lambda x: dppo(max_ratio=x), 1.5, dppo(max_ratio=1.5)),
    "delta_of_drpo": (lambda x: drpo(delta=x), 0.1, drpo(delta=0.1)),
    "beta_of_dro": (lambda x: dro(beta=x), 0.3, dro(beta=0.3)),
    "alpha": (lambda x: pspo(alpha=x), 0.3, pspo(alpha=0.3)),
    "tau": (lambda x: grpo(penalty=squared_log_ratio(x)), 0.3, grpo(penalty=squared_log_ratio(0.3))),
    "coefficient_of_kl_cov": (lambda x: kl_cov(coefficient=x), 0.3, kl_cov(coefficient=0.3)),
    "count": (lambda x: grpo(aggregate=per_prompt_count(x)), 7.0, grpo(aggregate=per_prompt_count(7.0))),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_traced_setting_is_that_setting(name):
    make, setting, same = TRACED[name]
    case = case_of(154)
    scores, experience = Scores(jnp.asarray(case.log_probs), jnp.asarray(case.entropy)), experience_of(case)
    traced = jax.jit(lambda x: losses.value(make(x)(scores, experience)[0]), compiler_options=UNOPTIMISED)
    np.testing.assert_allclose(traced(setting), evaluate(same, case)[0], rtol=1e-6)


# ------------------------------------------------- properties of any case, not of the chosen ones


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    seed=st.integers(0, 10**6),
    garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
)
def test_no_case_is_changed_by_what_padding_holds(name, seed, garbage):
    case = case_of(seed, full=True)
    spoiled = {f: np.where(case.mask, getattr(case, f), garbage) for f in ("log_probs", "old", "ref", "sampler")}
    value, gradient, _ = evaluate(OBJECTIVES[name].loss, case)
    spoiled_value, spoiled_gradient, _ = evaluate(OBJECTIVES[name].loss, case._replace(**spoiled))
    np.testing.assert_array_equal(spoiled_value, value)
    np.testing.assert_array_equal(spoiled_gradient, gradient)
    np.testing.assert_array_equal(gradient[~case.mask], 0.0)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    seed=st.integers(0, 10**6),
    group=st.permutations(range(4)),
    prompts=st.permutations(range(4)),
)
def test_no_case_depends_on_the_order_of_prompts_or_of_a_group(name, seed, group, prompts):
    case = case_of(seed)
    order = np.ix_(prompts, group)
    shuffled = jax.tree.map(lambda x: x[order] if x.ndim > 1 else x[prompts], case)
    value, gradient, _ = evaluate(OBJECTIVES[name].loss, case)
    other_value, other_gradient, _ = evaluate(OBJECTIVES[name].loss, shuffled)
    np.testing.assert_allclose(other_value, value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other_gradient, gradient[order], rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(OBJECTIVES)), seed=st.integers(0, 10**6))
def test_in_every_case_equal_policies_have_ratio_1_and_clip_nothing(name, seed):
    case = case_of(seed)
    _, gradient, metrics = evaluate(OBJECTIVES[name].loss, case._replace(old=case.log_probs, sampler=case.log_probs))
    assert np.all(np.isfinite(gradient))
    assert metrics.get("ratio_max", 1) == 1
    assert not any(metrics.get(clip, 0) for clip in ("clip_low", "clip_high", "clip_delta", "correction_bounded"))
