"""The parts of objectives: ratios, surrogates, weights, penalties and aggregates, their metrics and their settings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_reference import KLS, MAX_TOKENS, Case, case_of, evaluate, experience_of, row_of, token_weights
from losses_reference import importance as importance_of

from grpo_jax import losses, statistics
from grpo_jax.losses import (
    cispo,
    clipped_importance,
    completion_mean,
    completion_mean_of_all,
    completion_sum,
    constant_length,
    dapo,
    divergence_mask,
    dppo,
    dr_grpo,
    dro,
    drpo,
    echo,
    entropy_bonus,
    gamma_weight,
    gmpo,
    grpo,
    gspo,
    importance,
    k1,
    k2,
    k3,
    kl_cov,
    kl_k1,
    kl_k2,
    kl_k3,
    luspo,
    masked_importance,
    normalize_by_rollout_tokens,
    off_policy_mask,
    per_prompt_count,
    plus,
    policy_gradient,
    ppo_clip,
    product,
    product_ratio,
    prompt_mean,
    pspo,
    quadratic_shift,
    reinforce,
    sapo,
    sequence_ratio,
    sequence_token_ratio,
    sft,
    soft_gate,
    squared_log_ratio,
    token_mean,
    token_ratio,
    truncated_importance,
    vespo,
)
from grpo_jax.statistics import Mean
from grpo_jax.types import Scores

# -------------------------------------------------------------------------- surrogates


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_the_clipped_surrogate_is_the_minimum_of_the_formula(transform, delta):
    ratio, advantages = np.meshgrid([0.01, 0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0, 50.0], [-3.0, -0.5, 0.0, 0.5, 3.0])
    first = ratio if delta is None else np.minimum(ratio, delta)
    expected = np.minimum(first * advantages, np.clip(ratio, 0.8, 1.3) * advantages)
    gain, metrics = transform(ppo_clip(0.2, 0.3, delta))(jnp.log(ratio), jnp.asarray(advantages), None)
    np.testing.assert_allclose(gain, expected, rtol=1e-6)
    np.testing.assert_array_equal(metrics["clip_low"], (advantages < 0) & (ratio < 0.8))
    np.testing.assert_array_equal(metrics["clip_high"], (advantages > 0) & (ratio > 1.3))
    assert ("clip_delta" in metrics) == (delta is not None)
    if delta is not None:
        np.testing.assert_array_equal(metrics["clip_delta"], (advantages < 0) & (ratio > delta))


# The weight that a token's `A * grad log_prob` gets, of ratio and sign of the advantage, as the docstrings state it.
def _of_gate(ratio, good):
    tau = 1.0 if good else 1.05
    p = 1 / (1 + np.exp(-tau * (ratio - 1)))
    return 4 * p * (1 - p) * ratio


TOKEN_WEIGHTS = {
    "ppo_clip": (ppo_clip(0.2, 0.3), lambda r, good: r * (r <= 1.3 if good else r >= 0.8)),
    "ppo_clip_delta": (ppo_clip(0.2, 0.3, 1.5), lambda r, good: r * (r <= 1.3 if good else 0.8 <= r <= 1.5)),
    "policy_gradient": (policy_gradient(), lambda r, good: 1.0),
    "clipped_importance": (clipped_importance(1.28, 0.5), lambda r, good: min(max(r, 0.5), 1.28)),
    "soft_gate": (soft_gate(), _of_gate),
    "importance": (importance(), lambda r, good: r),
    "divergence_mask": (  # the old probability is e^-4, which a shift of 0.004 leaves at ratios 0.78 and 1.22
        divergence_mask(0.004, max_ratio=1.1),
        lambda r, good: 0.0 if (r > 1.22 if good else r < 0.78) else min(r, 1.1),
    ),
    "quadratic_shift": (
        quadratic_shift(0.01),
        lambda r, good: r * (1 - (1 if good else -1) * np.exp(-4) * (r - 1) / 0.01),
    ),
    "gamma_weight": (gamma_weight(), lambda r, good: r**2 * np.exp(3 - 3 * r) if good else r**3 * np.exp(2 - 2 * r)),
}


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_a_surrogate_gives_a_token_the_weight_that_its_docstring_states(name):
    surrogate, weight = TOKEN_WEIGHTS[name]
    old = -4.0
    with jax.enable_x64(True):
        by_log_prob = jax.jit(jax.grad(lambda log_prob, A: surrogate(log_prob - old, A, log_prob)[0]))
        for A in (2.0, -0.5):
            for ratio in (0.1, 0.45, 0.79, 0.81, 1.0, 1.27, 1.31, 1.6, 3.0, 20.0):
                actual = by_log_prob(old + np.log(ratio), A)
                np.testing.assert_allclose(actual, weight(ratio, A > 0) * A, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_the_weight_of_a_token_is_1_at_ratio_1(name):
    """So that every objective's first update is the policy gradient's."""
    surrogate, weight = TOKEN_WEIGHTS[name]
    slope = jax.jit(jax.grad(lambda log_prob, A: surrogate(log_prob + 3.0, A, log_prob)[0]))
    for A in (1.0, -1.0):
        np.testing.assert_allclose(slope(-3.0, A), A, rtol=1e-6)
        np.testing.assert_allclose(weight(1.0, A > 0), 1.0)


# ------------------------------------------------------------------------------ ratios


def test_the_sequence_ratio_is_the_geometric_mean_of_the_completion_and_is_for_its_tokens_only():
    case = case_of()
    log_ratio = case.log_probs - case.old
    levels = {f: jax.jit(f)(jnp.asarray(log_ratio), jnp.asarray(case.mask)) for f in (sequence_ratio, product_ratio)}
    for b, g in np.ndindex(case.mask.shape[:2]):
        kept = case.mask[b, g]
        ratios = np.exp(log_ratio[b, g][kept])
        if ratios.size:
            geometric = np.prod(ratios) ** (1 / ratios.size)
            np.testing.assert_allclose(np.exp(levels[sequence_ratio][b, g][kept]), geometric, rtol=1e-6)
            np.testing.assert_allclose(np.exp(levels[product_ratio][b, g][kept]), np.prod(ratios), rtol=1e-5)
    for actual in levels.values():
        np.testing.assert_array_equal(np.asarray(actual)[~case.mask], 0.0)
    np.testing.assert_array_equal(token_ratio(log_ratio, case.mask), log_ratio)


def test_the_sequence_token_ratio_has_the_value_of_the_completion_and_the_slope_of_the_token():
    case = case_of()
    log_ratio, mask = jnp.asarray(case.log_probs - case.old), jnp.asarray(case.mask)
    weight = jnp.asarray(case.entropy)  # any numbers
    value, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weight * sequence_token_ratio(x, mask))))(log_ratio)
    np.testing.assert_allclose(value, np.sum(weight * sequence_ratio(log_ratio, mask)), rtol=1e-5)
    np.testing.assert_allclose(slope, np.where(case.mask, case.entropy, 0.0), rtol=1e-6)


# -------------------------------------------------------------------------- aggregates

AGGREGATES = {
    "completion": (completion_mean, "completion"),
    "completion_of_all": (completion_mean_of_all, "completion_of_all"),
    "completion_sum": (completion_sum, "completion_sum"),
    "token": (token_mean, "token"),
    "prompt": (prompt_mean, "prompt"),
    "constant": (constant_length(MAX_TOKENS), "constant"),
    "per_prompt": (per_prompt_count(13.5), ("per_prompt", 13.5)),
}
every_aggregate = pytest.mark.parametrize("kind", AGGREGATES)


@every_aggregate
def test_an_aggregate_weighs_tokens_as_its_formula(kind):
    aggregate, count = AGGREGATES[kind]
    case = case_of()
    expected = np.sum(token_weights(count, case) * case.entropy)
    term = aggregate(jnp.asarray(case.entropy), jnp.asarray(case.mask))
    np.testing.assert_allclose(losses.value((term,)), expected, rtol=1e-6)
    np.testing.assert_allclose(statistics.summary({"x": term})["x"], expected, rtol=1e-6)
    # the reference is checked, too: in words, by the numbers of the docstrings
    B, G, T = case.mask.shape
    rows = list(zip(case.entropy.reshape(B * G, T), case.mask.reshape(B * G, T), strict=True))
    per_completion = [np.mean(x[m]) for x, m in rows if m.any()]
    per_prompt = [np.mean(x[m]) for x, m in zip(case.entropy, case.mask, strict=True) if m.any()]
    everything = case.entropy[case.mask]
    in_words = {
        "completion": np.mean(per_completion),
        "completion_of_all": np.sum(per_completion) / (B * G),
        "completion_sum": np.mean([np.sum(x[m]) for x, m in rows if m.any()]),
        "token": np.mean(everything),
        "prompt": np.mean(per_prompt),
        "constant": np.sum(everything) / (MAX_TOKENS * len(per_completion)),
        "per_prompt": np.sum(everything) / (13.5 * B),
    }
    np.testing.assert_allclose(expected, in_words[kind], rtol=1e-12)


@every_aggregate
def test_an_aggregate_of_nothing_is_0_and_its_count_that_of_the_mask_alone(kind):
    aggregate, _ = AGGREGATES[kind]
    per_token, mask = jnp.full((2, 3, 4), jnp.nan), jnp.zeros((2, 3, 4), bool)
    assert losses.value((aggregate(per_token, mask),)) == 0
    assert aggregate(per_token, mask).count == {"completion_of_all": 6, "per_prompt": 27.0}.get(kind, 0)


def test_a_divisor_may_be_beyond_what_int32_holds():
    """4096 completions of a million tokens."""
    ones = jnp.ones((1, 4096, 1))
    counts = [f(ones, ones > 0).count for f in (constant_length(2**20), per_prompt_count(4096 * 2**20))]
    np.testing.assert_array_equal(counts, 2.0**32)


def test_where_completions_are_of_one_length_the_means_agree():
    x, mask = np.random.default_rng(0).normal(size=(3, 2, 5)), np.ones((3, 2, 5), bool)
    aggregates = (completion_mean, completion_mean_of_all, token_mean, prompt_mean, constant_length(5))
    for aggregate in (*aggregates, per_prompt_count(2 * 5)):
        np.testing.assert_allclose(losses.value((aggregate(jnp.asarray(x), jnp.asarray(mask)),)), np.mean(x), rtol=1e-5)
    total = losses.value((completion_sum(jnp.asarray(x), jnp.asarray(mask)),))
    np.testing.assert_allclose(total, 5 * np.mean(x), rtol=1e-5)


def test_a_loss_is_the_sum_over_terms_of_sum_over_count_whatever_unit_the_count_has():
    """A count below 1, as of tokens that are weighted, is divided by like any other."""
    terms = (Mean(jnp.float32(3.0), jnp.int32(4)), Mean(jnp.float32(0.25), jnp.float32(0.5)), Mean(0.0, jnp.int32(0)))
    np.testing.assert_allclose(losses.value(terms), 3 / 4 + 0.25 / 0.5 + 0)
    np.testing.assert_allclose(losses.value(terms, (jnp.int32(6), jnp.float32(2.5), jnp.int32(1))), 3 / 6 + 0.1 + 0)


# --------------------------------------------------------------------------- penalties


@pytest.mark.parametrize(("estimate", "name"), [(kl_k1, "k1"), (kl_k2, "k2"), (kl_k3, "k3")])
def test_a_kl_estimate_matches_its_formula(estimate, name):
    log_probs, ref = np.random.default_rng(0).normal(-2, 1, (2, 50))
    value, slope = KLS[name]
    with jax.enable_x64(True):
        np.testing.assert_allclose(estimate(log_probs, ref), value(log_probs - ref), rtol=1e-12)
        actual = jax.vmap(jax.grad(estimate))(jnp.asarray(log_probs), jnp.asarray(ref))
        np.testing.assert_allclose(actual, np.vectorize(slope)(log_probs - ref), rtol=1e-12)


@settings(deadline=None, max_examples=200)
@given(
    log_probs=st.floats(-30, 0, width=32),
    exponent=st.floats(-10, 1),
    sign=st.sampled_from([-1, 1]),
)
def test_k3_is_never_negative(log_probs, exponent, sign):
    ref = np.float32(log_probs + sign * 10**exponent)
    assert kl_k3(np.float32(log_probs), ref) >= 0


def test_k3_is_not_negative_where_the_formula_as_written_is():
    difference = np.linspace(-1e-3, 1e-3, 20001, dtype=np.float32)
    as_written = jnp.exp(difference) - difference - 1
    assert np.min(as_written) < 0
    ours = kl_k3(jnp.zeros_like(difference), difference)
    assert np.min(ours) >= 0
    np.testing.assert_allclose(ours, difference.astype(np.float64) ** 2 / 2, atol=1e-9)


@functools.cache
def enumerated(make, correction, on_policy=True):
    """Expected value and gradient by theta of a penalty on a categorical whose every outcome is a completion.

    Returns:
      value, gradient, and what the docstring names: KL(p, ref), the gradients of KL(p, ref) and KL(ref, p).
    """
    theta, drawn, ref = np.random.default_rng(0).normal(size=(3, 5))
    p, q, ref = (np.exp(x) / np.exp(x).sum() for x in (theta, theta if on_policy else drawn, ref))
    forward = np.sum(p * np.log(p / ref))
    of_forward, of_reverse = p * (np.log(p / ref) - forward), p - ref
    outcomes = np.zeros((1, 5, 1))
    case = Case(*(outcomes,) * 5, outcomes[..., 0], np.ones((1, 5, 1), bool), np.ones(1))
    penalty = make(1.0, correction=correction)

    with jax.enable_x64(True):
        experience = experience_of(case)._replace(
            old_log_probs=jnp.asarray(np.log(q))[None, :, None], ref_log_probs=jnp.asarray(np.log(ref))[None, :, None]
        )

        def sampled(theta):  # the mean over samples of q; the sampling is not differentiated
            cost, _ = penalty(Scores(jax.nn.log_softmax(theta)[None, :, None]), experience)
            return jnp.sum(q * cost[0, :, 0])

        value, gradient = jax.tree.map(np.asarray, jax.value_and_grad(sampled)(jnp.asarray(theta)))
    return value, gradient, forward, of_forward, of_reverse


def test_the_docstring_tells_the_expected_value_and_gradient_of_each_kl_estimate():
    """On a categorical distribution whose every outcome is enumerated, in float64; line by line of the table."""
    for correction in (None, token_ratio):
        for make, unbiased in ((k1, True), (k2, False), (k3, True)):
            value, _, forward, _, _ = enumerated(make, correction)
            assert np.isclose(value, forward, rtol=1e-12, atol=0) == unbiased
            assert unbiased or abs(value - forward) > 0.01

    _, gradient, forward, of_forward, of_reverse = enumerated(k1, None)
    assert np.abs(of_forward - of_reverse).max() > 0.01
    np.testing.assert_allclose(gradient, 0.0, atol=1e-14)
    np.testing.assert_allclose(enumerated(k2, None)[1], of_forward, atol=1e-14)
    np.testing.assert_allclose(enumerated(k3, None)[1], of_reverse, atol=1e-14)
    np.testing.assert_allclose(enumerated(k1, token_ratio)[1], of_forward, atol=1e-14)
    np.testing.assert_allclose(enumerated(k3, token_ratio)[1], of_forward, atol=1e-14)
    for neither in (of_forward, of_reverse, 0 * of_forward):
        assert np.abs(enumerated(k2, token_ratio)[1] - neither).max() > 0.01


def test_corrected_kl_estimates_are_right_off_policy_and_the_plain_ones_are_not():
    for make in (k1, k3):
        value, gradient, forward, of_forward, of_reverse = enumerated(make, token_ratio, on_policy=False)
        np.testing.assert_allclose(value, forward, rtol=1e-12)
        np.testing.assert_allclose(gradient, of_forward, atol=1e-14)
        value, gradient, *_ = enumerated(make, None, on_policy=False)
        assert abs(value - forward) > 0.01
        assert min(np.abs(gradient - of_forward).max(), np.abs(gradient - of_reverse).max()) > 0.01


def test_a_corrected_penalty_has_the_value_of_the_plain_one_on_policy_and_another_gradient():
    """The trap of TRL's `use_bias_correction_kl`: nothing to be seen in the loss."""
    case = case_of()
    case = case._replace(old=case.log_probs)
    plain, by_plain, metrics = evaluate(grpo(penalty=k3(0.5)), case)
    corrected, by_corrected, corrected_metrics = evaluate(grpo(penalty=k3(0.5, correction=token_ratio)), case)
    np.testing.assert_allclose(corrected, plain, rtol=1e-6)
    np.testing.assert_allclose(corrected_metrics["kl"], metrics["kl"], rtol=1e-6)
    assert np.abs(by_corrected - by_plain).max() > 0.01


# ----------------------------------------------------------------------------- metrics


RATIOS = np.array([0.5, 0.9, 1.0, 2.0, 1.21, 99.0])


def case_of_ratios():
    """A good and a bad completion of five tokens with these ratios, and one of padding."""
    shape = (1, 2, 6)
    return Case(
        log_probs=np.full(shape, -1.0),
        old=np.broadcast_to(-1.0 - np.log(RATIOS), shape),
        ref=np.full(shape, -1.5),
        sampler=np.full(shape, -1.0),  # so that old over sampler is 1 / RATIOS
        entropy=np.broadcast_to([1.0, 2.0, 3.0, 4.0, 5.0, 77.0], shape),
        advantages=np.array([[1.0, -2.0]]),
        mask=np.broadcast_to([True] * 5 + [False], shape),
        token_share=np.full(1, 10.0),
    )


def metrics_of(loss, case=None):
    """Of the two completions."""
    return evaluate(loss, case_of_ratios() if case is None else case)[2]


def test_metrics_tell_which_tokens_were_clipped_and_the_mean_kl_and_entropy():
    value, _, metrics = evaluate(grpo(penalty=k3(0.1)), case_of_ratios())
    kl = np.exp(-0.5) - 1 + 0.5
    np.testing.assert_allclose(metrics["clip_low"], 1 / 10)  # of the bad completion, the 0.5
    np.testing.assert_allclose(metrics["clip_high"], 2 / 10)  # of the good one, the 2 and the 1.21
    np.testing.assert_allclose(metrics["ratio_max"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], 3.0)
    good, bad = np.mean([0.5, 0.9, 1.0, 1.2, 1.2]), -2 * np.mean([0.8, 0.9, 1.0, 2.0, 1.21])
    np.testing.assert_allclose(metrics["policy_loss"], -(good + bad) / 2, rtol=1e-6)
    np.testing.assert_allclose(value, metrics["policy_loss"] + 0.1 * kl, rtol=1e-6)


CLIPPED = {"grpo": grpo(), "gmpo": gmpo(epsilon=0.4, epsilon_high=0.15), "cispo": cispo(max_ratio=1.2)}


@pytest.mark.parametrize("name", CLIPPED)
def test_shares_of_clipped_tokens_count_only_tokens_with_a_weight(name):
    """A token that a weight leaves out is neither clipped nor unclipped."""
    case = case_of_ratios()
    kept = np.broadcast_to([True, False, False, True, False, True], case.mask.shape)
    with_weights = case._replace(weights=np.where(kept, 0.7, 0.0))
    metrics, all_metrics = metrics_of(CLIPPED[name], with_weights), metrics_of(CLIPPED[name], case)
    expected = {"clip_low": 1 / 4, "clip_high": 1 / 4}  # of 4 tokens the 0.5 of one completion, the 2 of the other
    expected = {"clip_high": 2 / 4} if name == "cispo" else expected
    for metric, share in expected.items():
        np.testing.assert_allclose(metrics[metric], share)
        assert metrics[metric] != all_metrics[metric]
    for metric in ("entropy",):  # of the policy, at every token that it wrote
        np.testing.assert_allclose(metrics[metric], all_metrics[metric])


def test_ratio_max_is_that_of_the_tokens_with_a_weight():
    case = case_of_ratios()
    without_the_2 = np.broadcast_to([1.0, 1.0, 1.0, 0.0, 1.0, 1.0], case.mask.shape)
    np.testing.assert_allclose(metrics_of(grpo(), case._replace(weights=without_the_2))["ratio_max"], 1.21, rtol=1e-6)


def test_clips_under_the_off_policy_mask_are_those_of_the_completions_that_stay():
    case = case_of_ratios()._replace(sampler=np.full((1, 2, 6), 0.0))  # a distance of 1 nat
    metrics = metrics_of(grpo(weight=off_policy_mask(0.5)), case)
    assert metrics["off_policy"] == 0.5  # of all tokens: those of the completion with a negative advantage
    np.testing.assert_allclose(metrics["clip_high"], 2 / 5)
    assert metrics["clip_low"] == 0


def test_clip_delta_is_the_share_of_bad_tokens_beyond_delta():
    metrics = metrics_of(dapo(delta=1.5))
    np.testing.assert_allclose(metrics["clip_delta"], 1 / 10)  # of the bad completion, the 2
    np.testing.assert_allclose(metrics["clip_low"], 1 / 10)
    np.testing.assert_allclose(metrics["clip_high"], 1 / 10)  # 1.21 is below 1.28
    bad = 0.8 + 0.9 + 1.0 + 1.5 + 1.21
    np.testing.assert_allclose(metrics["policy_loss"], -(0.5 + 0.9 + 1.0 + 1.28 + 1.21 - 2 * bad) / 10, rtol=1e-6)


def test_clip_high_of_cispo_is_the_share_of_tokens_above_the_cap_whatever_their_advantage():
    metrics = metrics_of(cispo(max_ratio=1.2, min_ratio=0.7))
    assert set(metrics) == {"policy_loss", "ratio_max", "clip_high", "entropy"}
    np.testing.assert_allclose(metrics["clip_high"], 4 / 10)
    np.testing.assert_allclose(metrics["policy_loss"], -(0.7 + 0.9 + 1.0 + 1.2 + 1.2) * (1 - 2) * -1 / 10, rtol=1e-6)


def test_clips_of_gmpo_are_of_log_ratios_beyond_its_bounds():
    metrics = metrics_of(gmpo(epsilon=0.4, epsilon_high=0.15))
    np.testing.assert_allclose(metrics["clip_low"], 1 / 10)  # log 0.5 = -0.69
    np.testing.assert_allclose(metrics["clip_high"], 2 / 10)  # log 1.21 = 0.19
    good = (0.5 * 0.9 * 1.0 * np.exp(0.15) ** 2) ** 0.2
    bad = (np.exp(-0.4) * 0.9 * 1.0 * 2.0 * 1.21) ** 0.2
    np.testing.assert_allclose(metrics["policy_loss"], -(good - 2 * bad) / 2, rtol=1e-6)


def test_the_importance_of_vespo_is_its_mean_weight():
    total = np.prod(RATIOS[:5])
    good, bad = total**2 * np.exp(3 * (1 - total)), total**3 * np.exp(2 * (1 - total))
    metrics = metrics_of(vespo())
    np.testing.assert_allclose(metrics["importance"], (good + bad) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], total, rtol=1e-6)


def test_importance_is_the_mean_weight_and_importance_bounded_the_share_that_a_bound_binds():
    """Old over sampler is 2, 1.11, 1, 0.5, 0.83 in both completions, and 1 / 99 in the padding."""
    weights = 1 / RATIOS[:5]
    expected = {
        truncated_importance(1.5): (np.minimum(weights, 1.5), 0.2),
        truncated_importance(1.5, low=0.6): (np.clip(weights, 0.6, 1.5), 0.4),
        truncated_importance(0.9, ratio=product_ratio): (np.full(5, 0.9), 1.0),  # 0.918
        truncated_importance(0.95, ratio=product_ratio): (np.full(5, np.prod(weights)), 0.0),
        truncated_importance(2.0, low=0.99, ratio=sequence_ratio): (np.full(5, 0.99), 1.0),  # 0.983
        masked_importance(0.6, 1.5): (np.where((weights > 0.6) & (weights < 1.5), weights, 0.0), 0.4),
        masked_importance(0.0, 1.5): (np.where(weights < 1.5, weights, 0.0), 0.2),
        masked_importance(0.95, 1.5, ratio=product_ratio): (np.zeros(5), 1.0),
        masked_importance(0.95, 1.5, ratio=sequence_ratio): (np.full(5, np.prod(weights) ** 0.2), 0.0),
    }
    for weight, (values, bounded) in expected.items():
        metrics = metrics_of(reinforce(aggregate=token_mean, weight=weight))
        np.testing.assert_allclose(metrics["correction"], np.mean(values), rtol=1e-5)
        np.testing.assert_allclose(metrics["correction_bounded"], bounded, rtol=1e-6)
        # log-probs are -1 and advantages 1 and -2
        np.testing.assert_allclose(metrics["policy_loss"], np.sum(values) * (1 - 2) / 10, rtol=1e-5)


def test_a_weight_on_the_bound_of_a_band_is_kept():
    case = case_of_ratios()._replace(old=np.full((1, 2, 6), -1.0))  # weights of exactly 1
    for band in ((1.0, 2.0), (0.5, 1.0)):
        metrics = metrics_of(reinforce(weight=masked_importance(*band)), case)
        assert metrics["correction_bounded"] == 0
        assert metrics["correction"] == 1


def test_off_policy_is_the_share_of_tokens_in_bad_completions_that_the_policy_has_left():
    case = case_of_ratios()
    gaps = [[0.4, 0.4], [0.2, 0.4], [-0.4, -0.4]]  # sampler over policy, of the good and of the bad completion
    for (good, bad), share in zip(gaps, (0.5, 0.5, 0.0), strict=True):
        sampler = case.log_probs + np.array([good, bad])[None, :, None] * np.array([0.5, 1.5, 1.0, 1.0, 1.0, 50.0])
        metrics = metrics_of(grpo(weight=off_policy_mask(0.3)), case._replace(sampler=sampler))
        np.testing.assert_allclose(metrics["off_policy"], share)
        assert metrics_of(grpo(weight=off_policy_mask(0.5)), case._replace(sampler=sampler))["off_policy"] == 0


def test_without_scored_entropy_there_is_no_entropy_metric():
    case = case_of()
    _, metrics = grpo()(Scores(jnp.asarray(case.log_probs)), experience_of(case))
    assert set(metrics) == {"policy_loss", "ratio_max", "clip_low", "clip_high"}


METRICS = {
    "delta": (dapo(delta=3.0), {"clip_low", "clip_high", "clip_delta"}),
    "gspo_k1": (gspo(penalty=k1(0.1)), {"clip_low", "clip_high", "kl"}),
    "sapo": (sapo(), set()),
    "reinforce_k2": (reinforce(penalty=k2(0.1)), {"kl"}),
    "truncated": (luspo(weight=truncated_importance()), {"clip_low", "clip_high", "correction", "correction_bounded"}),
    "product": (
        sapo(weight=product(off_policy_mask(), masked_importance())),
        {"off_policy", "correction", "correction_bounded"},
    ),
    "plus": (plus(sapo(), entropy_bonus(0.1), sft()), set()),
    "dppo": (dppo(penalty=squared_log_ratio(0.1)), {"clip_low", "clip_high", "squared_log_ratio"}),
}


@pytest.mark.parametrize("name", METRICS)
def test_an_objective_reports_the_metrics_of_its_parts(name):
    loss, expected = METRICS[name]
    assert set(metrics_of(loss)) == expected | {"policy_loss", "ratio_max", "entropy"}


def test_echo_is_the_cross_entropy_of_the_tokens_that_others_wrote_over_those_tokens():
    """In NumPy; the policy's own tokens have no say, and no gradient."""
    case = case_of()
    written = ~case.mask & (np.arange(8) < 6)
    log_probs = np.where(case.mask, case.log_probs, -np.random.default_rng(0).exponential(2.0, case.mask.shape))
    experience = experience_of(case)._replace(environment_mask=jnp.asarray(written))

    def value(log_probs):
        return losses.value(echo(0.3)(Scores(log_probs), experience)[0])

    actual, gradient = jax.value_and_grad(value)(jnp.asarray(log_probs))
    np.testing.assert_allclose(actual, -0.3 * log_probs[written].mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.where(written, -0.3 / written.sum(), 0.0), rtol=1e-5)
    both = losses.value(plus(dapo(), echo(0.3))(Scores(jnp.asarray(log_probs)), experience)[0])
    alone = losses.value(dapo()(Scores(jnp.asarray(log_probs)), experience)[0])
    np.testing.assert_allclose(both, alone + actual, rtol=1e-5)


def test_sft_reports_nothing_beside_its_loss():
    assert metrics_of(sft()) == {}


# ----------------------------------------------------------------------------- weights


def bare(make, case):
    """The weights alone, with the metrics per token."""
    weight, metrics = make(Scores(jnp.asarray(case.log_probs)), experience_of(case))
    return np.broadcast_to(weight, case.mask.shape), metrics


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
def test_an_importance_weight_is_old_over_sampler_of_its_level_within_the_bounds(level):
    case = case_of()
    ratio = {"token": token_ratio, "sequence": sequence_ratio, "product": product_ratio}[level]
    truncated_weight, _ = bare(truncated_importance(1.25, low=0.8, ratio=ratio), case)
    masked_weight, _ = bare(masked_importance(0.8, 1.25, ratio=ratio), case)
    for b, g in np.argwhere(case.mask.any(-1)):
        expected = importance_of(row_of(case, b, g), level)
        kept = case.mask[b, g]
        np.testing.assert_allclose(truncated_weight[b, g, kept], np.clip(expected, 0.8, 1.25), rtol=1e-5)
        inside = (expected >= 0.8) & (expected <= 1.25)
        np.testing.assert_allclose(masked_weight[b, g, kept], np.where(inside, expected, 0.0), rtol=1e-5)


def test_a_weight_is_not_differentiated():
    """Not even one that looks at the policy; the penalty is exempt from it."""

    def of_policy(scores, experience):
        return jnp.exp(scores.log_probs - experience.old_log_probs), {}

    case = case_of()
    _, gradient, _ = evaluate(reinforce(weight=of_policy), case)
    weight = np.exp(case.log_probs - case.old) * token_weights("completion_sum", case)
    np.testing.assert_allclose(gradient[..., 0], -weight * case.advantages[..., None], rtol=1e-5)
    _, gradient, _ = evaluate(grpo(weight=lambda s, e: (jnp.zeros(()), {}), penalty=k1(1.0)), case)
    np.testing.assert_allclose(gradient[..., 0], token_weights("completion", case), rtol=1e-6)


def test_the_weights_of_a_product_multiply_and_so_do_those_of_the_experience():
    case = case_of(full=True)
    both = product(truncated_importance(1.5), off_policy_mask(0.1))
    together, _ = bare(both, case)
    apart = [bare(f, case)[0] for f in (truncated_importance(1.5), off_policy_mask(0.1))]
    np.testing.assert_allclose(together, apart[0] * apart[1], rtol=1e-6)
    assert 0 < np.sum(together == 0) < together.size
    _, gradient, _ = evaluate(reinforce(weight=both), case)
    expected = -token_weights("completion_sum", case) * together * case.weights * case.advantages
    np.testing.assert_allclose(gradient[..., 0], expected, rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------- settings

NAN = float("nan")
REFUSED = {
    r"epsilon is above 0, got 0": lambda: grpo(epsilon=0),
    r"epsilon is above 0, got -0.2": lambda: grpo(epsilon=-0.2),
    r"epsilon is above 0, got nan": lambda: gspo(epsilon=NAN),
    r"epsilon is above 0, got -1": lambda: gmpo(epsilon=-1),
    r"epsilon_high is above 0, got -0.1": lambda: dapo(epsilon_high=-0.1),
    r"epsilon_high is above 0, got 0.0": lambda: gmpo(epsilon_high=0.0),
    r"delta is a bound above 1 + epsilon_high = 1.2, got 1.2": lambda: grpo(delta=1.2),
    r"delta is a bound above 1 + epsilon_high = 1.28, got 0.5": lambda: dapo(delta=0.5),
    r"delta is a bound above 1 + epsilon_high = 1.5, got nan": lambda: ppo_clip(0.2, 0.5, NAN),
    r"max_tokens is above 0, got 0": lambda: dr_grpo(0),
    r"max_tokens is above 0, got -5": lambda: constant_length(-5),
    r"count is above 0, got 0": lambda: per_prompt_count(0),
    r"count is above 0, got nan": lambda: per_prompt_count(NAN),
    r"max_ratio is above 0, got 0": lambda: cispo(max_ratio=0),
    r"max_ratio is above 0, got -5": lambda: clipped_importance(-5),
    r"min_ratio is at least 0, got -0.5": lambda: cispo(min_ratio=-0.5),
    r"max_ratio is above min_ratio = 2.0, got 2.0": lambda: cispo(max_ratio=2.0, min_ratio=2.0),
    r"tau_pos is above 0, got 0": lambda: sapo(tau_pos=0),
    r"tau_neg is above 0, got -1": lambda: soft_gate(tau_neg=-1),
    r"k_pos is at least 0, got -1": lambda: vespo(k_pos=-1),
    r"lambda_pos is at least 0, got -0.5": lambda: vespo(lambda_pos=-0.5),
    r"k_neg is at least 0, got nan": lambda: vespo(k_neg=NAN),
    r"lambda_neg is at least 0, got -2": lambda: gamma_weight(lambda_neg=-2),
    r"beta is at least 0, got -0.1": lambda: k1(-0.1),
    r"beta is at least 0, got -1": lambda: k2(-1),
    r"beta is at least 0, got nan": lambda: k3(NAN),
    r"low is at least 0, got -0.2": lambda: dppo(low=-0.2),
    r"high is at least 0, got -0.3": lambda: dppo(high=-0.3),
    r"max_ratio is above 0, got -2": lambda: dppo(max_ratio=-2),
    r"delta is above 0, got 0": lambda: drpo(delta=0),
    r"beta is above 0, got 0": lambda: dro(beta=0),
    r"alpha is from 0 to 1, got 1.5": lambda: pspo(alpha=1.5),
    r"tau is at least 0, got -1": lambda: squared_log_ratio(-1),
    r"coefficient is at least 0, got -1": lambda: kl_cov(coefficient=-1),
    r"coefficient is at least 0, got -2": lambda: echo(-2),
    r"dppo looks at the probability of single tokens and has no ratio to replace": lambda: dppo(ratio=sequence_ratio),
    r"drpo looks at the probability of single tokens and has no ratio to replace": lambda: drpo(ratio=sequence_ratio),
    r"kl_cov has a penalty of its own; plus(kl_cov(), penalty_loss(...)) adds another": lambda: kl_cov(penalty=k3(0.1)),
    r"reinforce has no ratio, so none to replace; grpo(ratio=..., anchor=...) has one": lambda: reinforce(
        anchor=losses.sampler
    ),
    r"limit is above 0, got 0": lambda: truncated_importance(0),
    r"low is at least 0, got -0.1": lambda: truncated_importance(low=-0.1),
    r"low is below limit = 2.0, got 2.0": lambda: truncated_importance(2.0, low=2.0),
    r"high is above 0, got -1": lambda: masked_importance(-2, -1),
    r"low is at least 0, got -2": lambda: masked_importance(-2, 1),
    r"low is below high = 5.0, got 6": lambda: masked_importance(6),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_a_setting_out_of_range_and_names_it(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        REFUSED[message]()


NEEDED = {
    "advantages": (grpo(), {"advantages": None}, "a policy loss needs advantages; make_learn"),
    "old": (reinforce(), {"old_log_probs": None}, r"need the old_log_probs .*score_old=True"),
    "gmpo": (gmpo(), {"advantages": None}, "a policy loss needs advantages; make_learn"),
    **{
        f"reference_{f.__name__}": (grpo(penalty=f(0.1)), {"ref_log_probs": None}, r"reference=True")
        for f in (k1, k2, k3)
    },
    "marks": (kl_cov(), {"high_covariance": None}, r"transforms.high_covariance\(\)"),
    "environment": (echo(), {"environment_mask": None}, "environment_mask"),
    "token_share": (
        normalize_by_rollout_tokens(lambda mean: dapo(aggregate=mean)),
        {"token_share": None},
        "share_tokens",
    ),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_loss_without_what_it_needs_says_what_to_do(name):
    loss, missing, message = NEEDED[name]
    case = case_of()
    with pytest.raises(ValueError, match=message):
        loss(Scores(jnp.asarray(case.log_probs)), experience_of(case)._replace(**missing))


PARTS_THAT_NEED = {
    "importance": (truncated_importance(), {"old_log_probs": None}, "an importance weight needs old_log_probs: make_"),
    "masked": (
        masked_importance(),
        {"old_log_probs": None},
        "an importance weight needs old_log_probs: make_train_step",
    ),
    "off_policy": (off_policy_mask(), {"advantages": None}, "off_policy_mask needs advantages; make_learn"),
    "correction": (k3(0.1, correction=token_ratio), {"old_log_probs": None}, "a correction needs old_log_probs: make_"),
    "entropy": (entropy_bonus(0.1), {}, "an entropy bonus needs entropies: score with entropy=True"),
}


@pytest.mark.parametrize("name", PARTS_THAT_NEED)
def test_a_part_without_what_it_needs_says_what_to_do(name):
    part, missing, message = PARTS_THAT_NEED[name]
    case = case_of()
    with pytest.raises(ValueError, match=f"^{message}"):
        part(Scores(jnp.asarray(case.log_probs)), experience_of(case)._replace(**missing))
