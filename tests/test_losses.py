"""Objectives, against their formulas written out token by token in NumPy float64."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import losses, types
from grpo_jax.losses import (
    completion_mean,
    constant_length,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    k1,
    k2,
    k3,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    ppo_clip,
    prompt_mean,
    sequence_ratio,
    sft,
    token_mean,
    token_ratio,
)
from grpo_jax.types import Experience, Mean, Prompts, Rollout, Scores

MAX_TOKENS = 11  # the limit of sampling; the batches here are narrower


# ------------------------------------------------------------------- the reference


class Case(NamedTuple):
    """What a loss sees, in float64."""

    log_probs: Any  # [B, G, T], and so old, ref and entropy
    old: Any
    ref: Any
    entropy: Any
    advantages: Any  # [B, G] or [B, G, T]
    mask: Any  # [B, G, T]


class Formula(NamedTuple):
    """An objective in numbers and words."""

    weight: str  # how tokens count
    low: float = 0.2
    high: float = 0.2
    ratio: str = "token"
    kl: str | None = None
    beta: float = 0.0
    supervised: bool = False


OBJECTIVES = {
    "grpo": (grpo(), Formula("completion")),
    "grpo_high": (grpo(epsilon=0.1, epsilon_high=0.4), Formula("completion", 0.1, 0.4)),
    "grpo_one_sided": (grpo(epsilon=1.5, epsilon_high=0.3), Formula("completion", 1.5, 0.3)),
    "grpo_r1": (grpo(epsilon=10.0, penalty=k3(0.001)), Formula("completion", 10.0, 10.0, kl="k3", beta=0.001)),
    "grpo_k1": (grpo(penalty=k1(0.3)), Formula("completion", kl="k1", beta=0.3)),
    "grpo_k2": (grpo(penalty=k2(0.3)), Formula("completion", kl="k2", beta=0.3)),
    "grpo_k3": (grpo(penalty=k3(0.04)), Formula("completion", kl="k3", beta=0.04)),
    "dr_grpo": (dr_grpo(MAX_TOKENS), Formula("constant")),
    "dr_grpo_k3": (dr_grpo(MAX_TOKENS, epsilon=0.3, penalty=k3(0.5)), Formula("constant", 0.3, 0.3, kl="k3", beta=0.5)),
    "dapo": (dapo(), Formula("token", 0.2, 0.28)),
    "dapo_k2": (dapo(penalty=k2(0.5)), Formula("token", 0.2, 0.28, kl="k2", beta=0.5)),
    "gspo": (gspo(), Formula("completion", 3e-4, 4e-4, "sequence")),
    "gspo_wide_k3": (
        gspo(epsilon=0.1, epsilon_high=0.2, penalty=k3(0.5)),
        Formula("completion", 0.1, 0.2, "sequence", "k3", 0.5),
    ),
    "by_prompt": (
        policy_loss(ppo_clip(0.2), prompt_mean, penalty=k1(0.1)),
        Formula("prompt", kl="k1", beta=0.1),
    ),
    "sequence_by_token": (
        policy_loss(ppo_clip(0.1), token_mean, ratio=sequence_ratio),
        Formula("token", 0.1, 0.1, "sequence"),
    ),
    "sft": (sft(), Formula("token", supervised=True)),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)

# name -> value and slope, with d = log p - log ref
KLS = {
    "k1": (lambda d: d, lambda d: 1.0),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: np.exp(-d) - 1 + d, lambda d: 1 - np.exp(-d)),
}


def weights(kind, mask, max_tokens=MAX_TOKENS):
    """What each token's cost is multiplied by, `[B, G, T]`."""
    B, lengths = len(mask), mask.sum(-1)
    completions = int((lengths > 0).sum())
    prompts = sum(bool(mask[b].any()) for b in range(B))
    weight = np.zeros(mask.shape)
    for b, g, t in np.argwhere(mask):
        weight[b, g, t] = {
            "completion": 1 / (completions * lengths[b, g]) if completions else 0,
            "token": 1 / lengths.sum() if completions else 0,
            "prompt": 1 / (prompts * lengths[b].sum()) if prompts else 0,
            "constant": 1 / (max_tokens * completions) if completions else 0,
        }[kind]
    return weight


def reference(formula, case):
    """The loss, and its gradient with respect to `log_probs` worked out by hand."""
    log_probs, old, ref, _, advantages, mask = case
    weight = weights(formula.weight, mask)
    loss, gradient = 0.0, np.zeros(mask.shape)
    for b, g in np.ndindex(mask.shape[:2]):
        kept = np.flatnonzero(mask[b, g])
        log_ratios = log_probs[b, g, kept] - old[b, g, kept]
        for t, log_ratio in zip(kept, log_ratios, strict=True):
            w, log_prob = weight[b, g, t], log_probs[b, g, t]
            if formula.supervised:
                loss, gradient[b, g, t] = loss - w * log_prob, gradient[b, g, t] - w
                continue
            A = advantages[b, g] if advantages.ndim == 2 else advantages[b, g, t]
            ratio = np.exp(log_ratio if formula.ratio == "token" else np.mean(log_ratios))
            clipped = min(max(ratio, 1 - formula.low), 1 + formula.high)
            loss -= w * min(ratio * A, clipped * A)
            slope = -w * ratio * A if ratio * A <= clipped * A else 0.0  # of the log of the ratio
            if formula.ratio == "token":
                gradient[b, g, t] += slope
            else:
                gradient[b, g, kept] += slope / len(kept)
            if formula.kl is not None:
                value, derivative = KLS[formula.kl]
                loss += w * formula.beta * value(log_prob - ref[b, g, t])
                gradient[b, g, t] += w * formula.beta * derivative(log_prob - ref[b, g, t])
    return loss, gradient


def case_of(seed=1, B=4, G=3, T=7, *, per_token=False, spread=0.6, precision=np.float64):
    """A random case of unequal lengths, with holes, empty completions and an empty prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, T + 1, (B, G))
    lengths[0, 0], lengths[1, 1], lengths[B - 1] = T, 0, 0
    mask = np.arange(T) < lengths[..., None]
    mask[2, 0, 1] = False  # a token that the policy did not write
    old = -rng.exponential(2.0, (B, G, T))
    log_probs = np.minimum(old + spread * rng.normal(size=(B, G, T)), -1e-3)
    ref = np.minimum(old + spread * rng.normal(size=(B, G, T)), -1e-3)
    advantages = rng.normal(size=(B, G, T) if per_token else (B, G))
    entropy = rng.exponential(1.0, (B, G, T))
    numbers = [np.where(mask, x, 0.0) for x in (log_probs, old, ref, entropy)]
    # Rounded here, so that the reference starts from the very numbers that the code sees.
    numbers = [x.astype(precision).astype(np.float64) for x in (*numbers, advantages)]
    return Case(*numbers, mask)


def experience_of(case):
    """As jax arrays, in float64 where that is enabled."""
    case = Case(*map(jnp.asarray, case))
    B, G, T = case.mask.shape
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    tokens, lengths = jnp.zeros((B, G, T), jnp.int32), jnp.sum(case.mask, -1)
    rollout = Rollout(prompts, tokens, lengths, case.mask, case.old, lengths == T)
    return Experience(rollout, old_log_probs=case.old, ref_log_probs=case.ref, advantages=case.advantages)


@functools.cache
def compiled(loss):
    """`(log_probs, entropy, experience) -> ((value, (terms, metrics)), gradient)`."""

    def value(log_probs, entropy, experience):
        terms, metrics = loss(Scores(log_probs, entropy), experience)
        return losses.value(terms), (terms, metrics)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def evaluate(loss, case):
    """Value, gradient and metrics of a case."""
    (value, (_, metrics)), gradient = compiled(loss)(
        jnp.asarray(case.log_probs), jnp.asarray(case.entropy), experience_of(case)
    )
    return np.asarray(value), np.asarray(gradient), types.summary(metrics)


def assert_close(actual, expected, tolerance):
    """Value and gradient agree to `tolerance` of the largest gradient (and of the loss, if that is larger)."""
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(loss, expected_loss, rtol=0, atol=tolerance * max(largest, abs(expected_loss)))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=tolerance * largest)


# --------------------------------------------------- values and gradients of objectives


@pytest.mark.parametrize("per_token", [False, True], ids=["per_completion", "per_token"])
@every_objective
def test_value_and_gradient_match_the_formula_in_float64(name, per_token):
    loss, formula = OBJECTIVES[name]
    case = case_of(per_token=per_token)
    with jax.enable_x64(True):
        value, gradient, _ = evaluate(loss, case)
    assert gradient.dtype == np.float64
    assert_close((value, gradient), reference(formula, case), 1e-12)


@pytest.mark.parametrize("per_token", [False, True], ids=["per_completion", "per_token"])
@every_objective
def test_value_and_gradient_match_the_formula_in_float32(name, per_token):
    loss, formula = OBJECTIVES[name]
    case = case_of(5, per_token=per_token, precision=np.float32)
    value, gradient, _ = evaluate(loss, case)
    assert gradient.dtype == np.float32
    assert_close((value, gradient), reference(formula, case), 1e-6)


@every_objective
def test_the_gradient_of_the_reference_is_the_slope_of_its_value(name):
    """So that the gradient worked out by hand is not an error of its own."""
    _, formula = OBJECTIVES[name]
    case = case_of(per_token=True)
    _, gradient = reference(formula, case)
    step = 1e-6
    for index in map(tuple, np.argwhere(case.mask)):
        there, back = case.log_probs.copy(), case.log_probs.copy()
        there[index] += step
        back[index] -= step
        rise = (
            reference(formula, case._replace(log_probs=there))[0] - reference(formula, case._replace(log_probs=back))[0]
        )
        np.testing.assert_allclose(gradient[index], rise / (2 * step), atol=1e-8)


def test_the_cases_reach_every_side_of_the_clip():
    """A good or bad token below, within or above the bounds: were one missing, an error there would go unseen."""
    for case in (case_of(), case_of(per_token=True), case_of(5), case_of(5, per_token=True)):
        advantages = np.broadcast_to(case.advantages.reshape(*case.mask.shape[:2], -1), case.mask.shape)[case.mask]
        ratio = np.exp(case.log_probs - case.old)[case.mask]
        sides = set(zip(advantages > 0, np.digitize(ratio, [0.8, 1.28]), strict=True))
        assert len(sides) == 6


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_the_clipped_surrogate_is_the_minimum_of_the_formula(transform):
    ratio, advantages = np.meshgrid([0.01, 0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0, 50.0], [-3.0, -0.5, 0.0, 0.5, 3.0])
    expected = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages)
    gain, _ = transform(ppo_clip(0.2, 0.3))(jnp.log(ratio), jnp.asarray(advantages), None)
    np.testing.assert_allclose(gain, expected, rtol=1e-6)


def test_the_sequence_ratio_is_the_geometric_mean_of_the_completion_and_is_for_its_tokens_only():
    case = case_of()
    log_ratio = case.log_probs - case.old
    actual = sequence_ratio(jnp.asarray(log_ratio), jnp.asarray(case.mask))
    for b, g in np.ndindex(case.mask.shape[:2]):
        ratios = np.exp(log_ratio[b, g][case.mask[b, g]])
        if ratios.size:
            geometric = np.prod(ratios) ** (1 / ratios.size)
            np.testing.assert_allclose(np.exp(actual[b, g][case.mask[b, g]]), geometric, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(actual)[~case.mask], 0.0)
    np.testing.assert_array_equal(token_ratio(log_ratio, case.mask), log_ratio)


@pytest.mark.parametrize(("estimate", "name"), [(kl_k1, "k1"), (kl_k2, "k2"), (kl_k3, "k3")])
def test_a_kl_estimate_matches_its_formula(estimate, name):
    log_probs, ref = np.random.default_rng(0).normal(-2, 1, (2, 50))
    value, slope = KLS[name]
    with jax.enable_x64(True):
        np.testing.assert_allclose(estimate(log_probs, ref), value(log_probs - ref), rtol=1e-12)
        actual = jax.vmap(jax.grad(estimate))(jnp.asarray(log_probs), jnp.asarray(ref))
        np.testing.assert_allclose(actual, np.vectorize(slope)(log_probs - ref), rtol=1e-12)


AGGREGATES = {
    "completion": completion_mean,
    "token": token_mean,
    "prompt": prompt_mean,
    "constant": constant_length(MAX_TOKENS),
}
every_aggregate = pytest.mark.parametrize("kind", AGGREGATES)


@every_aggregate
def test_an_aggregate_weighs_tokens_as_its_formula(kind):
    case = case_of()
    expected = np.sum(weights(kind, case.mask) * case.entropy)
    term = AGGREGATES[kind](jnp.asarray(case.entropy), jnp.asarray(case.mask))
    np.testing.assert_allclose(losses.value((term,)), expected, rtol=1e-6)
    np.testing.assert_allclose(types.summary({"x": term})["x"], expected, rtol=1e-6)
    # the reference is checked, too: in words, by the numbers of the docstrings
    per_completion = [
        np.mean(x[m]) for x, m in zip(case.entropy.reshape(12, 7), case.mask.reshape(12, 7), strict=True) if m.any()
    ]
    per_prompt = [np.mean(x[m]) for x, m in zip(case.entropy, case.mask, strict=True) if m.any()]
    everything = case.entropy[case.mask]
    in_words = {
        "completion": np.mean(per_completion),
        "token": np.mean(everything),
        "prompt": np.mean(per_prompt),
        "constant": np.sum(everything) / (MAX_TOKENS * len(per_completion)),
    }
    np.testing.assert_allclose(expected, in_words[kind], rtol=1e-12)


def test_a_loss_is_the_sum_over_terms_of_sum_over_count_whatever_unit_the_count_has():
    """A count below 1, as of tokens that are weighted, is divided by like any other."""
    terms = (Mean(jnp.float32(3.0), jnp.int32(4)), Mean(jnp.float32(0.25), jnp.float32(0.5)), Mean(0.0, jnp.int32(0)))
    np.testing.assert_allclose(losses.value(terms), 3 / 4 + 0.25 / 0.5 + 0)
    np.testing.assert_allclose(losses.value(terms, (jnp.int32(6), jnp.float32(2.5), jnp.int32(1))), 3 / 6 + 0.1 + 0)


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


def completion_mean_with_the_excluded(per_token, mask):
    """Excluded completions are out of the numerator only."""
    means = jnp.sum(jnp.where(mask, per_token, 0.0), -1) / jnp.maximum(jnp.sum(mask, -1), 1)
    return Mean(jnp.sum(means), jnp.asarray(means.size))


def length_of_the_batch(per_token, mask):
    """Dr. GRPO by the padded width (Tunix at c7d8950)."""
    return constant_length(mask.shape[-1])(per_token, mask)


OTHERS_ERRORS = {
    "wrong_side": (policy_loss(clipped_on_the_wrong_side, completion_mean), Formula("completion")),
    "both_sides": (policy_loss(clipped_on_both_sides, completion_mean), Formula("completion")),
    "mean_over_padding": (policy_loss(ppo_clip(0.2), mean_over_padding), Formula("token")),
    "excluded_count": (policy_loss(ppo_clip(0.2), completion_mean_with_the_excluded), Formula("completion")),
    "padded_width": (policy_loss(ppo_clip(0.2), length_of_the_batch), Formula("constant")),
}


@pytest.mark.parametrize("name", OTHERS_ERRORS)
def test_the_reference_tells_the_errors_of_other_libraries_apart(name):
    loss, formula = OTHERS_ERRORS[name]
    case = case_of()
    value, gradient, _ = evaluate(loss, case)
    expected_value, expected_gradient = reference(formula, case)
    assert np.abs(gradient - expected_gradient).max() > 0.1 * np.abs(expected_gradient).max()
    assert abs(value - expected_value) > 1e-3


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


# ------------------------------------------------- what the KL estimates' gradients are


def test_the_docstrings_tell_the_expected_value_and_gradient_of_each_kl_estimate():
    """On a categorical distribution whose every outcome is enumerated, in float64."""
    theta, ref = np.random.default_rng(0).normal(size=(2, 5))
    p, ref = np.exp(theta) / np.exp(theta).sum(), np.exp(ref) / np.exp(ref).sum()
    forward = np.sum(p * np.log(p / ref))  # KL(p, ref)
    of_forward = p * (np.log(p / ref) - forward)  # its gradient by theta
    of_reverse = p - ref  # that of KL(ref, p)

    def expected(estimate):
        """The mean over samples of p of the estimate and of its gradient: the sampling is not differentiated."""

        def sampled(theta):
            return jnp.sum(p * estimate(jax.nn.log_softmax(theta), jnp.log(ref)))

        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, jax.value_and_grad(sampled)(jnp.asarray(theta)))

    k1_value, k1_gradient = expected(kl_k1)
    k2_value, k2_gradient = expected(kl_k2)
    k3_value, k3_gradient = expected(kl_k3)
    np.testing.assert_allclose(k1_value, forward, rtol=1e-12)
    np.testing.assert_allclose(k1_gradient, 0.0, atol=1e-14)
    assert abs(k2_value - forward) > 0.01
    np.testing.assert_allclose(k2_gradient, of_forward, atol=1e-14)
    np.testing.assert_allclose(k3_value, forward, rtol=1e-12)
    np.testing.assert_allclose(k3_gradient, of_reverse, atol=1e-14)
    assert np.abs(of_forward - of_reverse).max() > 0.01


# ---------------------------------------------------------------- properties of every objective


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e4, -1e4])
@every_objective
def test_what_padding_holds_changes_neither_value_nor_gradient_nor_metric(name, garbage):
    loss, _ = OBJECTIVES[name]
    case = case_of(per_token=True)

    def spoil(**fields):
        return case._replace(**{f: np.where(case.mask, getattr(case, f), bad) for f, bad in fields.items()})

    clean_value, clean_gradient, clean_metrics = evaluate(loss, case)
    for spoiled in (
        spoil(log_probs=garbage),  # a log-ratio that overflows
        spoil(log_probs=garbage, old=-garbage, ref=0.5, entropy=garbage, advantages=garbage),
        spoil(ref=garbage, advantages=-1.0, old=-garbage),
    ):
        value, gradient, metrics = evaluate(loss, spoiled)
        np.testing.assert_array_equal(value, clean_value)
        np.testing.assert_array_equal(gradient, clean_gradient)
        np.testing.assert_array_equal(gradient[~case.mask], 0.0)
        chex.assert_trees_all_equal(metrics, clean_metrics)


@every_objective
def test_wider_padding_changes_nothing(name):
    """Not even of a constant length, which is the limit of sampling and not the width of the batch."""
    loss, _ = OBJECTIVES[name]
    case = case_of(per_token=True)
    wide = Case(*(np.pad(x, ((0, 0), (0, 0), (0, 4))) if x.ndim == 3 else x for x in case))
    with jax.enable_x64(True):
        value, gradient, metrics = evaluate(loss, case)
        wide_value, wide_gradient, wide_metrics = evaluate(loss, wide)
    assert_close((wide_value, wide_gradient[..., :-4]), (value, gradient), 1e-12)
    chex.assert_trees_all_close(wide_metrics, metrics, rtol=1e-12)


@every_objective
def test_reordering_a_group_or_the_prompts_reorders_the_gradient(name):
    loss, _ = OBJECTIVES[name]
    case = case_of()
    order = np.ix_([2, 0, 3, 1], [1, 2, 0])
    with jax.enable_x64(True):
        value, gradient, metrics = evaluate(loss, case)
        other_value, other_gradient, other_metrics = evaluate(loss, Case(*(x[order] for x in case)))
    assert_close((other_value, other_gradient), (value, gradient[order]), 1e-12)
    chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-12)


@every_objective
def test_parts_of_a_batch_add_up_to_the_whole_batch(name):
    """Sums over total counts: value, gradient and metrics of unequal parts, one without a single token."""
    loss, _ = OBJECTIVES[name]
    case = case_of()
    parts = [Case(*(x[b : b + 1] for x in case)) for b in range(4)]
    assert sorted({int(part.mask.sum()) for part in parts})[0] == 0

    def evaluate_part(log_probs, entropy, experience, counts):
        terms, metrics = loss(Scores(log_probs, entropy), experience)
        return losses.value(terms, counts), (terms, metrics)

    of_part = jax.jit(jax.value_and_grad(evaluate_part, has_aux=True))
    with jax.enable_x64(True):
        value, gradient, metrics = evaluate(loss, case)
        whole = loss(Scores(jnp.asarray(case.log_probs)), experience_of(case))[0]
        counts = tuple(term.count for term in whole)
        values, gradients = zip(
            *(of_part(jnp.asarray(p.log_probs), jnp.asarray(p.entropy), experience_of(p), counts) for p in parts),
            strict=True,
        )
        of_parts = jax.tree.map(lambda *x: jnp.stack(x), *(aux for _, aux in values))
        terms, merged = types.merge(of_parts)
        assert_close((sum(v for v, _ in values), np.concatenate(gradients)), (value, gradient), 1e-12)
        assert_close((losses.value(terms), gradient), (value, gradient), 1e-12)
        chex.assert_trees_all_equal(tuple(term.count for term in terms), counts)
        chex.assert_trees_all_close(types.summary(merged), metrics, rtol=1e-12)


@every_objective
def test_a_batch_without_a_token_that_counts_has_value_0_and_gradient_0(name):
    loss, _ = OBJECTIVES[name]
    case = case_of()
    value, gradient, metrics = evaluate(loss, case._replace(mask=np.zeros_like(case.mask)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)
    assert all(number == 0 for number in metrics.values())


@every_objective
def test_advantages_of_0_give_no_gradient_but_that_of_the_penalty(name):
    loss, formula = OBJECTIVES[name]
    case = case_of()
    case = case._replace(advantages=np.zeros_like(case.advantages))
    value, gradient, _ = evaluate(loss, case)
    assert_close((value, gradient), reference(formula, case), 1e-6)
    if formula.kl is None and not formula.supervised:
        assert value == 0
        np.testing.assert_array_equal(gradient, 0.0)


@every_objective
def test_the_gradient_is_the_slope_of_the_value(name):
    loss, _ = OBJECTIVES[name]
    case = case_of()

    with jax.enable_x64(True):
        experience, entropy = experience_of(case), jnp.asarray(case.entropy)

        def value(log_probs):
            return losses.value(loss(Scores(log_probs, entropy), experience)[0])

        chex.assert_numerical_grads(
            jax.jit(value), (jnp.asarray(case.log_probs),), order=1, atol=1e-6, eps=1e-6, modes="rev"
        )


@every_objective
def test_equal_policies_have_ratio_1_and_the_gradient_of_the_plain_policy_gradient(name):
    loss, formula = OBJECTIVES[name]
    case = case_of()
    case = case._replace(old=case.log_probs, ref=case.log_probs)
    value, gradient, metrics = evaluate(loss, case)
    weight = weights(formula.weight, case.mask)
    if formula.supervised:
        assert_close((value, gradient), (-np.sum(weight * case.log_probs), -weight), 1e-6)
        return
    assert metrics["ratio_max"] == 1
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    np.testing.assert_allclose(value, -np.sum(weight * case.advantages[..., None]), rtol=1e-5)
    expected = -weight * case.advantages[..., None]  # k2 and k3 are flat where the policies are equal
    expected += formula.beta * weight if formula.kl == "k1" else 0.0
    if formula.ratio == "sequence":  # each token has its completion's mean
        tokens = np.maximum(case.mask.sum(-1, keepdims=True), 1)
        expected = case.mask * expected.sum(-1, keepdims=True) / tokens
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


@every_objective
def test_old_and_reference_policies_and_advantages_get_no_say_in_the_count(name):
    """A term's count is of the mask alone, so that it can be totalled before anything is computed."""
    loss, _ = OBJECTIVES[name]
    a, b = case_of(1), case_of(5)._replace(mask=case_of(1).mask)
    counts = [[term.count for term in loss(Scores(jnp.asarray(c.log_probs)), experience_of(c))[0]] for c in (a, b)]
    chex.assert_trees_all_equal(*counts)


# --------------------------------------------------------------------------- extremes


def one_token(log_ratio, advantage, loss):
    """Value and gradient for two tokens of one completion, of which the second has this log-ratio."""
    case = Case(
        log_probs=np.array([[[-1.0, -1.0]]]),
        old=np.array([[[-1.0, -1.0 - log_ratio]]]),
        ref=np.full((1, 1, 2), -1.0),
        entropy=np.zeros((1, 1, 2)),
        advantages=np.array([[advantage]]),
        mask=np.ones((1, 1, 2), bool),
    )
    value, gradient, _ = evaluate(loss, case)
    return value, gradient[0, 0]


@pytest.mark.parametrize("log_ratio", [50.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize(
    "loss", [grpo(), dapo(), dr_grpo(2), grpo(epsilon=10.0)], ids=["grpo", "dapo", "dr_grpo", "r1"]
)
def test_a_good_token_of_enormous_ratio_has_a_finite_value_and_gradient_exactly_0(loss, log_ratio):
    value, gradient = one_token(log_ratio, 1.0, loss)
    assert np.isfinite(value)
    assert gradient[1] == 0
    np.testing.assert_allclose(gradient[0], -0.5)


@pytest.mark.parametrize("log_ratio", [-50.0, -100.0, -1e4, -1e30])
def test_a_bad_token_of_vanishing_ratio_has_a_finite_value_and_gradient_exactly_0(log_ratio):
    value, gradient = one_token(log_ratio, -1.0, grpo())
    np.testing.assert_allclose(value, (1 + 0.8) / 2)
    np.testing.assert_allclose(gradient, [0.5, 0.0])


@pytest.mark.parametrize("log_ratio", [100.0, 1e4, -100.0, -1e4])
@pytest.mark.parametrize("loss", [grpo(), gspo()], ids=["grpo", "gspo"])
def test_an_advantage_of_0_has_value_and_gradient_0_whatever_the_ratio(loss, log_ratio):
    """A group of equal rewards has it, and an overflowing ratio times 0 would be NaN."""
    value, gradient = one_token(log_ratio, 0.0, loss)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("log_ratio", [-100.0, -1.0])
def test_an_epsilon_of_1_or_more_has_no_lower_bound(log_ratio):
    for epsilon in (1.0, 10.0):
        value, gradient = one_token(log_ratio, -1.0, grpo(epsilon=epsilon))
        np.testing.assert_allclose(value, (1 + np.exp(log_ratio)) / 2, rtol=1e-6)
        np.testing.assert_allclose(gradient, [0.5, np.exp(log_ratio) / 2], rtol=1e-6, atol=1e-40)


# ---------------------------------------------------------------------------- metrics


def test_metrics_tell_which_tokens_were_clipped_and_the_mean_kl_and_entropy():
    ratio = np.array([0.5, 0.9, 1.0, 2.0, 1.21, 99.0])
    mask = np.array([True] * 5 + [False])
    shape = (1, 2, 6)
    case = Case(
        log_probs=np.full(shape, -1.0),
        old=np.broadcast_to(-1.0 - np.log(ratio), shape),
        ref=np.full(shape, -1.5),
        entropy=np.broadcast_to([1.0, 2.0, 3.0, 4.0, 5.0, 77.0], shape),
        advantages=np.array([[1.0, -2.0]]),
        mask=np.broadcast_to(mask, shape),
    )
    value, _, metrics = evaluate(grpo(penalty=k3(0.1)), case)
    kl = np.exp(-0.5) - 1 + 0.5
    np.testing.assert_allclose(metrics["clip_low"], 1 / 10)  # of the bad completion, the 0.5
    np.testing.assert_allclose(metrics["clip_high"], 2 / 10)  # of the good one, the 2 and the 1.21
    np.testing.assert_allclose(metrics["ratio_max"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], 3.0)
    good, bad = np.mean([0.5, 0.9, 1.0, 1.2, 1.2]), -2 * np.mean([0.8, 0.9, 1.0, 2.0, 1.21])
    np.testing.assert_allclose(metrics["policy_loss"], -(good + bad) / 2, rtol=1e-6)
    np.testing.assert_allclose(value, metrics["policy_loss"] + 0.1 * kl, rtol=1e-6)


def test_without_scored_entropy_there_is_no_entropy_metric():
    case = case_of()
    _, metrics = grpo()(Scores(jnp.asarray(case.log_probs)), experience_of(case))
    assert set(metrics) == {"policy_loss", "ratio_max", "clip_low", "clip_high"}


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (lambda: grpo(epsilon=0), r"^epsilon is above 0, got 0$"),
        (lambda: grpo(epsilon=-0.2), r"^epsilon is above 0, got -0.2$"),
        (lambda: dapo(epsilon_high=-0.1), r"^epsilon_high is above 0, got -0.1$"),
        (lambda: gspo(epsilon=float("nan")), r"^epsilon is above 0, got nan$"),
        (lambda: dr_grpo(0), r"^max_tokens is above 0, got 0$"),
        (lambda: constant_length(-5), r"^max_tokens is above 0, got -5$"),
        (lambda: k1(-0.1), r"^beta is at least 0, got -0.1$"),
        (lambda: k2(-1), r"^beta is at least 0, got -1$"),
        (lambda: k3(float("nan")), r"^beta is at least 0, got nan$"),
    ],
)
def test_refuses_a_setting_out_of_range_and_names_it(setting, message):
    with pytest.raises(ValueError, match=message):
        setting()


@pytest.mark.parametrize("penalty", [k1, k2, k3])
def test_a_kl_penalty_without_a_reference_policy_says_what_to_do(penalty):
    case = case_of()
    experience = experience_of(case)._replace(ref_log_probs=None)
    with pytest.raises(ValueError, match="reference=True"):
        grpo(penalty=penalty(0.1))(Scores(jnp.asarray(case.log_probs)), experience)


def test_settings_can_be_traced_and_vmapped():
    case = case_of()
    scores, experience = Scores(jnp.asarray(case.log_probs)), experience_of(case)

    def value(epsilon, epsilon_high, beta):
        return losses.value(grpo(epsilon=epsilon, epsilon_high=epsilon_high, penalty=k3(beta))(scores, experience)[0])

    grid = np.array([[0.1, 0.3, 0.0], [0.2, 0.2, 0.5], [1.5, 0.4, 1.0]])
    together = jax.jit(jax.vmap(value))(*map(jnp.asarray, grid.T))
    for (low, high, beta), actual in zip(grid.tolist(), together, strict=True):
        expected, _ = reference(Formula("completion", low, high, kl="k3", beta=beta), case)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
