"""Advantages, against their formulas in plain Python."""

import functools
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax import turn_advantages
from grpo_jax.advantages import (
    batch_normalised_advantages,
    batch_scaled_advantages,
    best_minus_second_advantages,
    centered_advantages,
    distillation_advantages,
    from_experience,
    from_function,
    from_normalised_rewards,
    from_rewards,
    from_steps,
    group_advantages,
    kl_cost,
    leave_one_out_advantages,
    length_weighted_advantages,
    max_rl_advantages,
    optimal_token_advantages,
    pass_at_k,
    process_advantages,
    reinforce_plus_plus,
    reward_metrics,
    rewards_to_go,
    total_reward,
)
from grpo_jax.advantages.totals import as_array
from grpo_jax.losses import kl_k1, kl_k2, kl_k3
from grpo_jax.statistics import Mean, summary
from grpo_jax.types import Experience, Prompts, Rollout

mean, population, sample = statistics.fmean, statistics.pstdev, statistics.stdev


def of_others(r, group):
    others = list(group)
    others.remove(r)
    return others


# name -> the function, and its formula for one reward of a group of a batch
ESTIMATORS = {
    "group": (group_advantages, lambda r, group, batch: (r - mean(group)) / (population(group) + 1e-4)),
    "group_ddof1": (
        functools.partial(group_advantages, ddof=1),
        lambda r, group, batch: (r - mean(group)) / (sample(group) + 1e-4),
    ),
    "group_eps": (
        functools.partial(group_advantages, eps=0.5),
        lambda r, group, batch: (r - mean(group)) / (population(group) + 0.5),
    ),
    "centered": (centered_advantages, lambda r, group, batch: r - mean(group)),
    "batch": (batch_scaled_advantages, lambda r, group, batch: (r - mean(group)) / (population(batch) + 1e-4)),
    "batch_ddof1_eps": (
        functools.partial(batch_scaled_advantages, ddof=1, eps=0.25),
        lambda r, group, batch: (r - mean(group)) / (sample(batch) + 0.25),
    ),
    "leave_one_out": (leave_one_out_advantages, lambda r, group, batch: r - mean(of_others(r, group))),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
REWARDS = [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 2.5], [0.0, 0.0, -8.0, 0.125], [0.5, 0.5, 0.5, 0.5]]


def in_plain_python(formula, rewards, mask=None):
    mask = [[True] * len(row) for row in rewards] if mask is None else mask
    groups = [[r for r, kept in zip(*pair, strict=True) if kept] for pair in zip(rewards, mask, strict=True)]
    batch = [r for group in groups for r in group]

    def one(r, kept, group):
        return formula(r, group, batch) if kept and len(set(group)) > 1 else 0.0

    return np.array(
        [
            [one(r, kept, group) for r, kept in zip(row, kept_row, strict=True)]
            for row, kept_row, group in zip(rewards, mask, groups, strict=True)
        ]
    )


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@every_estimator
def test_matches_the_formula_written_out_in_plain_python(name, transform):
    estimator, formula = ESTIMATORS[name]
    actual = transform(estimator)(jnp.array(REWARDS))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, in_plain_python(formula, REWARDS), rtol=2e-6)


@every_estimator
@settings(deadline=None, max_examples=30)
@given(
    rewards=hnp.arrays(np.float32, (3, 4), elements=st.integers(-4, 4)),
    mask=hnp.arrays(bool, (3, 4)),
    garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]),
)
def test_a_masked_completion_counts_in_nothing_and_gets_exactly_0(name, rewards, mask, garbage):
    estimator, formula = ESTIMATORS[name]
    actual = estimator(jnp.where(mask, rewards, garbage), jnp.array(mask))
    expected = in_plain_python(formula, rewards.tolist(), mask.tolist())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(actual)[~mask], 0.0)


@every_estimator
@settings(deadline=None, max_examples=20)
@given(
    rewards=hnp.arrays(np.float32, (3, 4), elements=st.integers(-4, 4)),
    order=st.permutations(range(4)).map(np.array),
)
def test_reordering_a_group_reorders_its_advantages(name, rewards, order):
    estimator, _ = ESTIMATORS[name]
    np.testing.assert_allclose(estimator(rewards[:, order]), estimator(rewards)[:, order], atol=1e-5)


@every_estimator
@settings(deadline=None, max_examples=20)
@given(
    rewards=hnp.arrays(np.float32, (3, 4), elements=st.integers(-4, 4)),
    mask=hnp.arrays(bool, (3, 4)),
    shift=st.integers(-100, 100),
)
def test_a_constant_added_to_all_rewards_changes_nothing(name, rewards, mask, shift):
    estimator, _ = ESTIMATORS[name]
    np.testing.assert_allclose(estimator(rewards + shift, mask), estimator(rewards, mask), rtol=1e-4, atol=1e-4)


@every_estimator
def test_a_shift_of_one_group_alone_changes_the_batch_deviation_and_no_group_advantage(name):
    """The batch deviation is about the batch's mean, so that the distance between groups counts in it."""
    estimator, _ = ESTIMATORS[name]
    rewards = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    ood = rewards + jnp.array([[8.0], [0.0]])
    same = np.allclose(estimator(ood), estimator(rewards), rtol=1e-5)
    assert same != name.startswith("batch")


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@every_estimator
def test_equal_rewards_get_exactly_0(name, transform):
    estimator, _ = ESTIMATORS[name]
    reward = jnp.array([[0.1], [1.1], [-0.7], [0.0], [1e-30], [3e7]])
    for G in (3, 8):
        np.testing.assert_array_equal(transform(estimator)(jnp.broadcast_to(reward, (6, G))), 0.0)
    mask = jnp.arange(8) < jnp.array([[7], [3], [1], [0], [2], [6]])  # one scorable completion, and none, too
    np.testing.assert_array_equal(transform(estimator)(jnp.where(mask, reward, 5.0), mask), 0.0)


@every_estimator
def test_a_group_of_equal_rewards_gets_exactly_0_beside_groups_with_spread(name):
    estimator, _ = ESTIMATORS[name]
    advantages = np.asarray(estimator(jnp.array([[1.1] * 8, [0.0, 1.0] * 4], jnp.float32)))
    np.testing.assert_array_equal(advantages[0], 0.0)
    assert np.all(advantages[1] != 0)


@every_estimator
def test_a_reward_of_nan_that_is_not_masked_does_not_pass_for_a_group_without_spread(name):
    """The non-finite guard then refuses the update, and counts it, instead of nobody noticing."""
    estimator, _ = ESTIMATORS[name]
    advantages = estimator(jnp.array([[1.0, jnp.nan, 0.0], [1.0, 0.0, 0.0]]))
    assert np.all(np.isnan(advantages[0]))


@every_estimator
def test_refuses_a_group_of_one(name):
    estimator, _ = ESTIMATORS[name]
    with pytest.raises(ValueError, match=r"at least 2 completions.*\(3, 1\)"):
        estimator(jnp.ones((3, 1)))


@pytest.mark.parametrize("rewards", [np.ones(4, np.float32), np.ones((2, 4, 1), np.float32), np.ones((2, 4), np.int32)])
@every_estimator
def test_refuses_a_wrong_rank_or_type(name, rewards):
    estimator, _ = ESTIMATORS[name]
    with pytest.raises(AssertionError):
        estimator(jnp.asarray(rewards))


@pytest.mark.parametrize("estimator", [group_advantages, batch_scaled_advantages])
def test_eps_can_be_vmapped_and_differentiated_though_a_group_has_no_spread(estimator):
    rewards = jnp.array(REWARDS)
    eps = jnp.array([1e-4, 0.1, 2.0])
    together = jax.vmap(lambda e: estimator(rewards, eps=e))(eps)
    for e, advantages in zip(eps.tolist(), together, strict=True):
        np.testing.assert_allclose(advantages, estimator(rewards, eps=e), rtol=1e-6)
    slope = jax.vmap(jax.jacfwd(lambda e: estimator(rewards, eps=e)))(eps)
    np.testing.assert_array_equal(slope[:, 3], 0.0)
    assert np.all(np.isfinite(slope))
    assert np.all(slope[:, 0] != 0)


# ---------------------------------------------------------------- from_rewards


def experience_of(rewards, given=None):
    """An experience of which only the rewards `[B, G, R]` are of interest."""
    rewards = jnp.asarray(rewards, jnp.float32)
    B, G, _ = rewards.shape
    empty = jnp.zeros((B, G, 1))
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    rollout = Rollout(prompts, empty, empty[..., 0], empty > 0, empty, empty[..., 0] > 0)
    given = jnp.ones(rewards.shape, bool) if given is None else jnp.asarray(given)
    return Experience(rollout, rewards=rewards, reward_mask=given)


def total(rewards, given=None):
    """The reward that the estimator sees, and which completions it is told to leave out."""
    seen = []

    def estimator(rewards, mask):
        seen.append((np.asarray(rewards), np.asarray(mask)))
        return rewards

    def of(**settings):
        from_rewards(estimator, **settings)(experience_of(rewards, given))
        return seen[-1]

    return of


TWO_REWARDS = np.array([[[1.0, 10.0], [2.0, 20.0], [0.0, -5.0]], [[4.0, 0.0], [4.0, 8.0], [1.0, 2.0]]])


def test_the_reward_is_the_weighted_sum_and_weights_are_1_unless_given():
    of = total(TWO_REWARDS)
    np.testing.assert_allclose(of()[0], TWO_REWARDS[..., 0] + TWO_REWARDS[..., 1])
    np.testing.assert_allclose(of(weights=(0.5, -2))[0], 0.5 * TWO_REWARDS[..., 0] - 2 * TWO_REWARDS[..., 1])
    np.testing.assert_allclose(of(weights=(0, jnp.float32(1)))[0], TWO_REWARDS[..., 1])
    assert of()[1].all()


def test_a_reward_that_was_not_given_is_left_out_of_the_sum_and_an_unscored_completion_out_of_the_group():
    given = np.array([[[True, True], [False, True], [False, False]], [[True, False], [True, True], [True, True]]])
    rewards = np.where(given, TWO_REWARDS, np.nan)
    actual, scored = total(rewards, given)(weights=(2.0, 1.0))
    np.testing.assert_allclose(actual, [[12.0, 20.0, 0.0], [8.0, 16.0, 4.0]])
    np.testing.assert_array_equal(scored, [[True, True, False], [True, True, True]])

    advantages, metrics = from_rewards(weights=(2.0, 1.0))(experience_of(rewards, given))
    group = [[12.0, 20.0], [8.0, 16.0, 4.0]]
    expected = [[(r - mean(row)) / (population(row) + 1e-4) for r in row] for row in group]
    np.testing.assert_allclose(advantages[0, :2], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(advantages[0, 2], 0.0)  # nobody scored it
    np.testing.assert_allclose(advantages[1], expected[1], rtol=1e-5)

    numbers = summary(metrics)
    everything = [r for row in group for r in row]
    np.testing.assert_allclose(numbers["reward"], mean(everything), rtol=1e-6)
    np.testing.assert_allclose(numbers["reward_std"], population(everything), rtol=1e-6)
    for k in range(2):
        kept = TWO_REWARDS[..., k][given[..., k]].tolist()
        np.testing.assert_allclose(numbers[f"reward/{k}"], mean(kept), rtol=1e-6)
        np.testing.assert_allclose(numbers[f"reward/{k}_std"], population(kept), rtol=1e-6)


def test_metrics_carry_the_names_of_the_rewards_and_the_share_of_groups_that_teach_nothing():
    rewards = np.zeros((4, 3, 2))
    rewards[0, 1] = [1.0, 0.0]
    rewards[3] = [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]  # without spread in the sum
    given = np.ones((4, 3, 2), bool)
    given[1], given[2, 1:] = False, False  # groups of nobody, and of one, cannot have any
    rewards[2, 0] = 7.0
    _, metrics = jax.jit(from_rewards(names=("right", "brief")))(experience_of(rewards, given))
    assert set(metrics) == {"reward", "reward_std", "zero_variance_groups"} | {
        f"reward/{name}{suffix}" for name in ("right", "brief") for suffix in ("", "_std")
    }
    assert summary(metrics)["zero_variance_groups"] == pytest.approx(2 / 3)  # of those that were judged
    assert metrics["reward/right"] == Mean(9.5, 7)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("G", "R"), [(8, 2), (5, 5), (9, 9), (13, 9)])
def test_equal_rewards_get_exactly_0_after_weighting_too(G, R, transform):
    """A matrix product sums some rows in another order, and that rounding would be divided by eps."""
    rng = np.random.default_rng(R)
    rewards = np.broadcast_to(rng.normal(size=(3, 1, R)), (3, G, R))
    advantages, metrics = transform(from_rewards(weights=rng.normal(size=R).tolist()))(experience_of(rewards))
    np.testing.assert_array_equal(advantages, 0.0)
    assert summary(metrics)["zero_variance_groups"] == 1


def test_weights_can_be_traced():
    experience = experience_of(TWO_REWARDS)

    def advantages(weights):
        return from_rewards(centered_advantages, weights=weights)(experience)[0]

    together = jax.vmap(lambda w: advantages((w, 1.0)))(jnp.array([0.0, 2.0]))
    for w, actual in zip((0.0, 2.0), together, strict=True):
        np.testing.assert_allclose(actual, advantages((w, 1.0)), rtol=1e-6)


@pytest.mark.parametrize("setting", ["weights", "names"])
def test_refuses_a_wrong_number_of_weights_or_names(setting):
    with pytest.raises(ValueError, match=f"3 {setting} for 2 reward functions"):
        from_rewards(**{setting: (1.0, 2.0, 3.0)})(experience_of(TWO_REWARDS))


def test_refuses_rewards_without_an_axis_of_reward_functions():
    experience = experience_of(TWO_REWARDS)
    with pytest.raises(AssertionError):
        from_rewards()(experience._replace(rewards=experience.rewards[..., 0]))


# ------------------------------------------------------------- of the batch, without groups


@settings(deadline=None, max_examples=30)
@given(
    rewards=hnp.arrays(np.float32, (3, 4), elements=st.integers(-4, 4)),
    mask=hnp.arrays(bool, (3, 4)),
    ddof=st.sampled_from([0, 1]),
    garbage=st.sampled_from([np.nan, np.inf, 1e30]),
)
def test_normalised_by_the_batch_knows_no_groups(rewards, mask, ddof, garbage):
    batch = rewards[mask].tolist()
    deviation = {0: population, 1: sample}[ddof]
    expected = np.zeros((3, 4))
    if len(set(batch)) > 1:
        expected = np.where(mask, (rewards - mean(batch)) / (deviation(batch) + 0.25), 0.0)
    actual = batch_normalised_advantages(jnp.where(mask, rewards, garbage), jnp.array(mask), ddof=ddof, eps=0.25)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [1.1, 0.0, 3e7])
def test_a_batch_of_equal_rewards_normalised_gets_exactly_0(reward):
    np.testing.assert_array_equal(batch_normalised_advantages(jnp.full((3, 8), reward)), 0.0)


def test_the_baseline_variant_is_that_of_the_centered_rewards():
    rewards = np.array(REWARDS)
    centered = rewards - rewards.mean(1, keepdims=True)
    actual = batch_normalised_advantages(centered_advantages(jnp.array(REWARDS)), eps=0.0)
    np.testing.assert_allclose(actual, (centered - centered.mean()) / centered.std(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------- each reward by itself (GDPO)


def gdpo_in_plain_python(rewards, given, weights, ddof, eps):
    """Normalised in the group by each reward, added, normalised over the batch."""
    deviation = {0: population, 1: sample}[ddof]
    B, G, R = rewards.shape
    total = np.zeros((B, G))
    for b, k in np.ndindex(B, R):
        kept = [float(rewards[b, g, k]) for g in range(G) if given[b, g, k]]
        for g in range(G):
            if given[b, g, k] and len(set(kept)) > 1:
                total[b, g] += weights[k] * (rewards[b, g, k] - mean(kept)) / (deviation(kept) + eps)
    scored = given.any(-1)
    batch = total[scored].tolist()
    advantages = np.where(scored, (total - mean(batch)) / (deviation(batch) + eps), 0.0)
    for b in range(B):
        if len(set(total[b][scored[b]].tolist())) < 2:
            advantages[b] = 0.0
    return advantages


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("missing", [False, True], ids=["all_given", "some_missing"])
def test_gdpo_matches_the_formula_in_plain_python(ddof, missing):
    rng = np.random.default_rng(0)
    rewards = np.stack([rng.integers(0, 2, (4, 5)), 100 * rng.normal(size=(4, 5))], axis=-1).astype(np.float32)
    rewards[3] = [1.0, 7.0]  # a group without spread
    given = rng.random((4, 5, 2)) < 0.7 if missing else np.ones((4, 5, 2), bool)
    advantage = from_normalised_rewards(weights=(1.0, 0.5), ddof=ddof, eps=1e-4)
    experience = Experience(None, jnp.asarray(np.where(given, rewards, np.nan)), jnp.asarray(given))
    actual, metrics = jax.jit(advantage)(experience)
    expected = gdpo_in_plain_python(rewards.astype(np.float64), given, (1.0, 0.5), ddof, 1e-4)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(actual[3], 0.0)
    assert {"reward", "reward_std", "zero_variance_groups", "reward/0", "reward/1_std"} <= set(metrics)


def test_gdpo_tells_apart_what_the_sum_of_rewards_does_not():
    """Rewards (1, 0) and (0, 1) have one sum; where the second reward is rarer, earning it is worth more."""
    rewards = jnp.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    experience = Experience(None, rewards, jnp.ones(rewards.shape, bool))
    np.testing.assert_array_equal(from_rewards()(experience)[0], 0.0)
    weighted, _ = from_normalised_rewards(weights=(1.0, 2.0))(experience)
    assert weighted[0, 3] > 0 > weighted[0, 0]


# ------------------------------------------------------------- rewards of steps and tokens


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_what_a_token_still_earns_is_the_discounted_sum_from_it_on(gamma):
    rng = np.random.default_rng(0)
    rewards, mask = rng.normal(size=(2, 3, 5)), rng.random((2, 3, 5)) < 0.7
    expected = np.zeros((2, 3, 5))
    for b, g, t in np.ndindex(2, 3, 5):
        for s in range(t, 5):
            if mask[b, g, s]:
                expected[b, g, t] += gamma ** (s - t) * rewards[b, g, s]
    spoiled = jnp.where(mask, rewards, jnp.nan)
    np.testing.assert_allclose(rewards_to_go(spoiled, jnp.array(mask), gamma=gamma), expected, rtol=1e-5, atol=1e-6)


def test_process_supervision_sums_the_normalised_rewards_of_the_steps_still_to_end():
    rng = np.random.default_rng(1)
    rewards, mask = rng.normal(size=(2, 3, 6)), rng.random((2, 3, 6)) < 0.5
    mask[1] = [[False] * 6, [True] + [False] * 5, [False] * 6]  # one step in the whole group
    expected = np.zeros((2, 3, 6))
    steps = rewards[0][mask[0]].tolist()
    for g, t in np.ndindex(3, 6):
        for s in range(t, 6):
            if mask[0, g, s]:
                expected[0, g, t] += (rewards[0, g, s] - mean(steps)) / (population(steps) + 1e-4)
    actual = process_advantages(jnp.where(mask, rewards, jnp.nan), jnp.array(mask))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_process_supervision_of_one_step_each_is_outcome_supervision():
    rewards = jnp.array(REWARDS)
    by_token = jnp.zeros((4, 4, 3)).at[..., 2].set(rewards)
    ends = jnp.zeros((4, 4, 3), bool).at[..., 2].set(True)
    expected = jnp.broadcast_to(group_advantages(rewards)[..., None], (4, 4, 3))
    np.testing.assert_allclose(process_advantages(by_token, ends), expected, rtol=1e-6)


# ------------------------------------------------------------- divergence as a cost of the reward


def of_log_probs(old=True):
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, (2, 3))[..., None]
    sampler, old_log_probs, ref = (jnp.asarray(np.where(mask, x, np.nan)) for x in rng.normal(size=(3, 2, 3, 4)))
    lengths = jnp.asarray(mask.sum(-1))
    prompts = Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    rollout = Rollout(prompts, jnp.zeros(mask.shape, jnp.int32), lengths, jnp.asarray(mask), sampler, lengths == 4)
    rewards = jnp.asarray(rng.normal(size=(2, 3, 1)), jnp.float32)
    experience = Experience(rollout, rewards, jnp.ones((2, 3, 1), bool), old_log_probs, ref)
    return experience if old else experience._replace(old_log_probs=None)


@pytest.mark.parametrize("estimate", [kl_k1, kl_k2, kl_k3])
@pytest.mark.parametrize("old", [True, False], ids=["scored", "sampler"])
def test_the_cost_is_the_divergence_summed_over_the_completion_and_taken_off_the_reward(estimate, old):
    experience = of_log_probs(old)
    log_probs = experience.old_log_probs if old else experience.rollout.log_probs
    d = np.asarray(log_probs - experience.ref_log_probs, np.float64)
    kl = {kl_k1: d, kl_k2: d**2 / 2, kl_k3: np.exp(-d) - 1 + d}[estimate]
    expected = 0.3 * np.nansum(kl, axis=-1)
    np.testing.assert_allclose(kl_cost(0.3, estimate=estimate)(experience), expected, rtol=1e-5)
    actual, metrics = from_rewards(leave_one_out_advantages, cost=kl_cost(0.3, estimate=estimate))(experience)
    net = np.asarray(experience.rewards[..., 0]) - expected
    np.testing.assert_allclose(actual, net - (net.sum(1, keepdims=True) - net) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(summary(metrics)["cost"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(summary(metrics)["reward"], net.mean(), rtol=1e-4)


def test_a_cost_of_the_reward_gives_on_average_the_gradient_of_the_divergence():
    """With every outcome enumerated: the mean of cost * grad log p is the gradient of KL(p, ref)."""
    theta, ref = np.random.default_rng(0).normal(size=(2, 5))
    p, ref = np.exp(theta) / np.exp(theta).sum(), np.exp(ref) / np.exp(ref).sum()
    cost = np.asarray(kl_k1(np.log(p), np.log(ref)))
    by_policy_gradient = sum(p[i] * cost[i] * ((np.arange(5) == i) - p) for i in range(5))
    expected = p * (np.log(p / ref) - np.sum(p * np.log(p / ref)))
    np.testing.assert_allclose(by_policy_gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_cost_without_a_reference_says_what_to_do():
    with pytest.raises(ValueError, match="reference=True"):
        kl_cost(0.1)(of_log_probs()._replace(ref_log_probs=None))
    with pytest.raises(ValueError, match=r"^beta is at least 0, got -0\.1$"):
        kl_cost(-0.1)


# ------------------------------------------------------------------------ extreme rewards


@every_estimator
@pytest.mark.parametrize("scale", [2.7e19, 1e20, 1e30, 2.0**126, 1e-20])
def test_rewards_of_any_size_have_the_advantages_of_the_formula(name, scale):
    """A square of 2.7e19 overflows float32, and that of 1e-20 vanishes."""
    estimator, formula = ESTIMATORS[name]
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.25, 0.0, -1.0]]) * scale
    actual = jax.jit(estimator)(jnp.array(rewards, jnp.float32))
    expected = in_plain_python(formula, rewards.tolist())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=0)


@every_estimator
def test_a_pair_whose_square_overflows_is_told_apart(name):
    advantages = ESTIMATORS[name][0](jnp.array([[2.7e19, 0.0]]))
    assert advantages[0, 0] > 0.7  # with the sample deviation it is the root of a half
    assert advantages[0, 1] < -0.7


@every_estimator
@pytest.mark.parametrize("offset", [1e5, 1.6e7, -1.6e7])
def test_small_differences_of_large_rewards_are_exact(name, offset):
    """Whole numbers below 2^24 are exact in float32; their sum is not."""
    estimator, _ = ESTIMATORS[name]
    differences = jnp.array([[0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 7.0]])
    np.testing.assert_allclose(estimator(offset + differences), estimator(differences), rtol=1e-5)


def test_metrics_of_large_rewards_are_finite():
    _, metrics = from_rewards()(experience_of([[[1e20], [0.0]], [[1e20], [2e20]]]))
    np.testing.assert_allclose(summary(metrics)["reward_std"], population([1e20, 0.0, 1e20, 2e20]), rtol=1e-6)


# ------------------------------------------------------------------------ from_experience


def length_aware(rewards, mask, experience):
    """Centered rewards over the square root of the length."""
    return centered_advantages(rewards, mask) / jnp.sqrt(experience.rollout.lengths)


def with_lengths(rewards, given=None, lengths=((1, 4, 9), (16, 1, 4))):
    experience = experience_of(rewards, given)
    return experience._replace(rollout=experience.rollout._replace(lengths=jnp.array(lengths)))


def test_an_advantage_of_ones_own_sees_lengths_and_logs_the_rewards():
    experience = with_lengths(TWO_REWARDS)
    advantages, metrics = jax.jit(from_experience(length_aware, weights=(0.5, -2), names=("a", "b")))(experience)
    plain, plain_metrics = from_rewards(centered_advantages, weights=(0.5, -2), names=("a", "b"))(experience)
    np.testing.assert_allclose(advantages, plain / np.sqrt([[1, 4, 9], [16, 1, 4]]), rtol=1e-6)
    assert metrics.keys() == plain_metrics.keys()
    for name, number in summary(metrics).items():
        np.testing.assert_allclose(number, summary(plain_metrics)[name], rtol=1e-6)


def test_an_advantage_of_ones_own_may_be_per_token_and_sees_log_probs_and_entropy():
    def surprising(rewards, mask, experience):
        return jnp.where(mask, rewards, 0.0)[..., None] * experience.old_entropy - experience.rollout.log_probs

    experience = with_lengths(TWO_REWARDS)
    entropy = jax.random.uniform(jax.random.key(0), (2, 3, 1))
    advantages, _ = from_experience(surprising)(experience._replace(old_entropy=entropy))
    assert advantages.shape == (2, 3, 1)
    np.testing.assert_allclose(advantages[..., 0], TWO_REWARDS.sum(-1) * entropy[..., 0], rtol=1e-6)


def test_a_completion_that_nobody_scored_gets_0_whatever_the_function_says():
    given = np.ones((2, 3, 2), bool)
    given[1, 2] = False
    advantages, _ = from_experience(lambda rewards, mask, experience: rewards + 1.0)(with_lengths(TWO_REWARDS, given))
    assert advantages[1, 2] == 0
    assert advantages[1, 1] == 13.0


def test_a_cost_is_subtracted_before_the_function_sees_the_reward():
    seen = from_experience(lambda rewards, mask, experience: rewards, cost=lambda experience: jnp.full((2, 3), 4.0))
    np.testing.assert_allclose(seen(with_lengths(TWO_REWARDS))[0], TWO_REWARDS.sum(-1) - 4.0)


def test_refuses_advantages_of_another_shape():
    def by_prompt(rewards, mask, experience):
        return rewards.mean(-1)

    message = r"by_prompt returned shape \(2,\) for \(2, 3\) rewards, expected \[B, G\] or \[B, G, T\]"
    with pytest.raises(ValueError, match=message):
        from_experience(by_prompt)(with_lengths(TWO_REWARDS))


def test_the_kinds_of_a_function_are_told_apart_by_its_parameters():
    experience, settings = with_lengths(TWO_REWARDS), {"weights": (1.0, 0.5), "names": ("a", "b")}
    kinds = {
        centered_advantages: from_rewards(centered_advantages, **settings),
        length_aware: from_experience(length_aware, **settings),
        functools.partial(group_advantages, ddof=1): from_rewards(
            functools.partial(group_advantages, ddof=1), **settings
        ),
        from_normalised_rewards: from_normalised_rewards(**settings),
        functools.partial(from_normalised_rewards, ddof=1): from_normalised_rewards(ddof=1, **settings),
    }
    for function, expected in kinds.items():
        advantages, metrics = from_function(function, **settings)(experience)
        np.testing.assert_array_equal(advantages, expected(experience)[0])
        assert "reward/a" in metrics


def test_reward_metrics_serve_an_advantage_that_is_written_whole():
    experience = with_lengths(TWO_REWARDS)

    def whole(experience):
        total, scored = total_reward(experience)
        return centered_advantages(total, scored), reward_metrics(experience, total, scored, ("a", "b"))

    expected = from_rewards(centered_advantages, names=("a", "b"))(experience)[1]
    assert summary(whole(experience)[1]) == summary(expected)


# ------------------------------------------------ of the best, of what is right, of lengths and log-probs


def test_max_rl_is_the_distance_in_units_of_the_mean():
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0] * 4, [1.0] * 4, [0.5, 0.25, 0.0, 0.0]]
    expected = [[(r - mean(row)) / mean(row) if len(set(row)) > 1 else 0.0 for r in row] for row in rewards]
    np.testing.assert_allclose(max_rl_advantages(jnp.array(rewards)), expected, rtol=1e-6)
    mask = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(max_rl_advantages(jnp.array([[1.0, 0.0, 7.0, 7.0]]), mask), [[1.0, -1.0, 0.0, 0.0]])


@pytest.mark.parametrize("scaled", [False, True])
def test_only_the_best_of_a_group_earns_its_lead_over_the_second(scaled):
    rewards = [[1.0, 4.0, 2.0, 2.5], [1.0, 1.0, 0.0, 0.0], [-3.0, -1.0, -2.0, -5.0], [2.0] * 4]
    mask = [[True] * 4, [True] * 4, [True, False, True, True], [True] * 4]
    actual = best_minus_second_advantages(jnp.array(rewards), jnp.array(mask), scaled=scaled)
    for row, kept, advantages in zip(rewards, mask, actual, strict=True):
        seen = [r for r, k in zip(row, kept, strict=True) if k]
        deviation = sample(seen) + 1e-6 if scaled else 1.0
        for r, k, a in zip(row, kept, advantages, strict=True):
            lead = max(0.0, r - max(of_others(r, seen))) / deviation if k else 0.0
            np.testing.assert_allclose(a, lead, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rewards", [[-1.0, -0.5, 0.0], [-0.02, -0.01, 0.01], [0.0, -3.0, 3.0]], ids=str)
def test_max_rl_never_teaches_the_worst_where_a_cost_has_left_no_success_rate(rewards):
    np.testing.assert_array_equal(max_rl_advantages(jnp.array([rewards])), np.zeros((1, 3)))


@pytest.mark.parametrize(
    "estimator", [max_rl_advantages, best_minus_second_advantages, pass_at_k(2)], ids=["max_rl", "best", "pass_at_k"]
)
def test_a_reward_of_nan_does_not_pass_for_a_low_one(estimator):
    rewards = jnp.array([[np.nan, 1.0, 0.0], [1.0, 0.0, 0.0]])
    advantages = estimator(rewards)
    assert np.isnan(advantages[0]).all()
    assert np.isfinite(advantages[1]).all()
    np.testing.assert_array_equal(np.isfinite(estimator(rewards, ~jnp.isnan(rewards))), True)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_rewards_in_16_bits_have_the_advantages_of_the_same_rewards_in_32(dtype):
    rewards = jnp.array([[1e4, 2e4, 6e4, 6e4], [1e-7, 0.0, 2e-7, 5e-7], [1.0, 0.0, 0.0, 0.5]], dtype)
    for name, (estimator, _) in ESTIMATORS.items():
        expected = estimator(rewards.astype(jnp.float32))
        np.testing.assert_array_equal(estimator(rewards), expected, err_msg=name)
        assert np.isfinite(expected).all()


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (functools.partial(group_advantages, jnp.eye(2)), {"eps": -1e-4}),
        (functools.partial(group_advantages, jnp.eye(2)), {"ddof": 2}),
        (functools.partial(batch_scaled_advantages, jnp.eye(2)), {"eps": float("nan")}),
        (functools.partial(batch_normalised_advantages, jnp.eye(2)), {"ddof": -1}),
        (functools.partial(best_minus_second_advantages, jnp.eye(2)), {"eps": -1.0}),
        (from_normalised_rewards, {"ddof": 3}),
        (reinforce_plus_plus, {"gamma": 1.5}),
        (reinforce_plus_plus, {"eps": -1e-8}),
        (distillation_advantages, {"beta": -1.0}),
        (distillation_advantages, {"gamma": -0.5}),
        (functools.partial(rewards_to_go, jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2), bool)), {"gamma": -0.1}),
        (turn_advantages.from_turns, {"gamma": 2.0}),
        (functools.partial(turn_advantages.by_role, group_advantages), {"roles": 0}),
    ],
    ids=lambda x: "-".join(f"{name}={value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_refuses_settings_out_of_range(make, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make(**setting)


def test_a_divergence_of_weight_0_costs_nothing_though_it_is_infinite():
    experience, _ = experience_with_tokens()
    cut = experience._replace(ref_log_probs=experience.old_log_probs.at[0, 0, 0].set(-jnp.inf))
    assert cut.rollout.mask[0, 0, 0]
    np.testing.assert_array_equal(kl_cost(0.0)(cut), 0.0)
    np.testing.assert_array_equal(distillation_advantages(0.0)(cut)[0], 0.0)
    zero = jnp.zeros(())  # traced, as in a grid over weights
    np.testing.assert_array_equal(reinforce_plus_plus(zero)(cut)[0], reinforce_plus_plus()(cut)[0])


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.ones((2, 1), bool)], ids=["of_a_group", "of_a_prompt"])
def test_refuses_a_mask_of_another_shape(mask):
    with pytest.raises(AssertionError):
        group_advantages(jnp.ones((2, 3)), mask)
    experience = experience_of(np.ones((2, 3, 2)))
    with pytest.raises(AssertionError):
        total_reward(experience._replace(reward_mask=mask[..., None] if mask.ndim == 2 else mask[None, :, None]))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_an_unbiased_gradient_of_pass_at_k(k):
    """Over all outcomes of a group of 5, each right with probability p: the slope of 1 - (1 - p)^k."""
    G, p = 5, 0.3
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=G)))
    advantages = np.asarray(pass_at_k(k)(jnp.asarray(outcomes, jnp.float32)))
    probability = np.prod(np.where(outcomes == 1, p, 1 - p), axis=1)
    score = np.where(outcomes == 1, 1 / p, -1 / (1 - p))  # the slope of the log-probability of an outcome
    estimate = np.sum(probability * np.mean(advantages * score, axis=1))
    np.testing.assert_allclose(estimate, k * (1 - p) ** (k - 1), rtol=1e-5)
    if k == G:
        np.testing.assert_allclose(advantages, G * best_minus_second_advantages(jnp.asarray(outcomes, jnp.float32)))


def test_pass_at_k_leaves_unscored_completions_out():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0, 9.0], [1.0, 1.0, 9.0, 9.0, 9.0]])
    mask = rewards < 9
    actual = pass_at_k(3)(rewards, mask)
    np.testing.assert_allclose(actual[0, :4], pass_at_k(3)(rewards[:1, :4])[0])
    np.testing.assert_array_equal(actual[0, 4:], 0.0)
    np.testing.assert_array_equal(actual[1], 0.0)  # two are too few


def test_pass_at_k_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="k is at least 1, got 0"):
        pass_at_k(0)
    with pytest.raises(ValueError, match="pass@4 needs groups of at least 4"):
        pass_at_k(4)(jnp.ones((2, 3)))


def experience_with_tokens(seed=0, B=3, G=4, T=6):
    """Tokens that count, with a hole, and what the old policy says of them."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T, (B, G))[..., None]
    mask[0, 0], mask[0, 0, 1] = True, False
    probs = rng.dirichlet(np.ones(5), (B, G, T))
    experience = experience_of(rng.integers(0, 2, (B, G, 1)).astype(float))
    rollout = experience.rollout._replace(mask=jnp.asarray(mask), log_probs=jnp.zeros(mask.shape))
    return experience._replace(
        rollout=rollout,
        old_log_probs=jnp.asarray(np.where(mask, np.log(probs[..., 0]), 0.0), jnp.float32),
        old_collision=jnp.asarray(np.sum(probs**2, -1), jnp.float32),
        ref_log_probs=jnp.asarray(np.where(mask, np.log(probs[..., 1]), 0.0), jnp.float32),
    ), probs


def test_opo_subtracts_the_mean_weighed_by_lengths():
    experience, _ = experience_with_tokens()
    lengths, rewards = np.asarray(experience.rollout.mask).sum(-1), np.asarray(experience.rewards)[..., 0]
    mask = np.ones(rewards.shape, bool)
    mask[1, 2] = False
    actual = length_weighted_advantages(jnp.asarray(rewards), jnp.asarray(mask), experience)
    for b in range(3):
        n, r = lengths[b, mask[b]], rewards[b, mask[b]]
        expected = np.where(mask[b], rewards[b] - np.sum(n * r) / np.sum(n), 0.0)
        np.testing.assert_allclose(actual[b], expected if len(set(r)) > 1 else 0.0, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zero_tail", [True, False])
def test_the_optimal_token_baseline_weighs_by_the_squared_score_of_the_logits(zero_tail):
    """The score of a token's logits is `e_token - p`; its square is summed here over the vocabulary."""
    experience, probs = experience_with_tokens()
    rewards = np.asarray(experience.rewards)[..., 0].copy()
    rewards[:, 0], rewards[:, 1] = 1.0, 0.0
    counted = np.asarray(experience.rollout.mask)
    square = np.sum((np.eye(5)[0] - probs) ** 2, axis=-1)
    actual = optimal_token_advantages(
        jnp.asarray(rewards), jnp.ones(rewards.shape, bool), experience, zero_tail=zero_tail
    )
    tails = 0
    for b, g, t in np.ndindex(*counted.shape):
        there = [h for h in range(4) if counted[b, h, t]]
        energy = {h: sum(square[b, h, s] for s in range(t + 1) if counted[b, h, s]) for h in there}
        baseline = sum(energy[h] * rewards[b, h] for h in there) / max(sum(energy.values()), 1e-12)
        if len(there) == 1 and zero_tail:
            baseline, tails = 0.0, tails + 1
        expected = rewards[b, g] - baseline if counted[b, g, t] else 0.0
        np.testing.assert_allclose(actual[b, g, t], expected, rtol=1e-5, atol=1e-6)
    assert tails or not zero_tail


def test_the_optimal_token_baseline_needs_the_old_policys_scores():
    experience, _ = experience_with_tokens()
    with pytest.raises(ValueError, match="score_old=True"):
        optimal_token_advantages(jnp.ones((3, 4)), jnp.ones((3, 4), bool), experience._replace(old_collision=None))


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 1.0), (0.1, 1.0), (0.3, 0.9)])
def test_reinforce_plus_plus_normalises_the_reward_less_the_divergence_still_to_come(beta, gamma):
    experience, _ = experience_with_tokens()
    counted, rewards = np.asarray(experience.rollout.mask), np.asarray(experience.rewards)[..., 0]
    kl = np.asarray(experience.old_log_probs - experience.ref_log_probs, np.float64)
    returns = np.zeros(counted.shape)
    for b, g in np.ndindex(3, 4):
        places = np.flatnonzero(counted[b, g])
        later = 0.0
        for t in reversed(places):
            later = (rewards[b, g] if t == places[-1] else 0.0) - beta * kl[b, g, t] + gamma * later
            returns[b, g, t] = later
    seen = returns[counted]
    expected = np.where(counted, (returns - seen.mean()) / np.sqrt(seen.var() + 1e-8), 0.0)
    actual, metrics = reinforce_plus_plus(beta, gamma=gamma)(experience)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert ("cost" in metrics) == (beta > 0)
    with pytest.raises(ValueError, match="reference"):
        reinforce_plus_plus(0.1)(experience._replace(ref_log_probs=None))
    with pytest.raises(ValueError, match="beta is at least 0, got -1"):
        reinforce_plus_plus(-1)


def test_reinforce_plus_plus_does_not_learn_from_the_rounding_of_a_divergence_of_0():
    experience, _ = experience_with_tokens()
    rounding = 3e-7 * np.random.default_rng(1).normal(size=experience.ref_log_probs.shape)
    same = experience._replace(
        rewards=jnp.zeros_like(experience.rewards), ref_log_probs=experience.old_log_probs + jnp.asarray(rounding)
    )
    advantages, _ = jax.jit(reinforce_plus_plus(0.1))(same)
    assert 0 < np.max(np.abs(advantages)) < 0.01


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_distillation_compares_the_token_drawn_and_weighs_early_ones_more(gamma):
    experience, _ = experience_with_tokens()
    counted = np.asarray(experience.rollout.mask)
    distance = np.asarray(experience.ref_log_probs - experience.old_log_probs, np.float64)
    expected = np.zeros(counted.shape)
    for b, g in np.ndindex(3, 4):
        places = np.flatnonzero(counted[b, g])
        sizes = np.abs(distance[b, g, places])
        for i, t in enumerate(places):
            weight = 1 + gamma * (1 - sizes[:i].sum() / sizes.sum())
            expected[b, g, t] = 2.0 * weight * distance[b, g, t]
    actual, metrics = distillation_advantages(2.0, gamma=gamma)(experience)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert summary(metrics)["reverse_kl"] == pytest.approx(-distance[counted].mean(), rel=1e-5)
    with pytest.raises(ValueError, match="reference"):
        distillation_advantages()(experience._replace(ref_log_probs=None))


def test_rewards_of_steps_are_added_to_the_advantage_of_the_outcome():
    rng = np.random.default_rng(0)
    B, G, T = 2, 3, 5
    lengths = np.array([[5, 3, 4], [2, 5, 5]])
    held = np.arange(T) < lengths[..., None]
    mask = held & (rng.random((B, G, T)) < 0.5)
    rewards = np.where(mask, rng.normal(size=(B, G, T)), 0.0).astype(np.float32)
    outcome = rng.normal(size=(B, G, 1)).astype(np.float32)
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    zeros = jnp.zeros((B, G, T))
    rollout = Rollout(prompts, zeros.astype(int), jnp.asarray(lengths), jnp.asarray(held), zeros, zeros[..., 0] > 0)
    experience = Experience(
        rollout, rewards=jnp.asarray(outcome), reward_mask=jnp.ones((B, G, 1), bool),
        step_rewards=jnp.asarray(rewards), step_mask=jnp.asarray(mask),
    )  # fmt: skip
    expected = np.zeros((B, G, T))
    for b in range(B):
        all_steps = rewards[b][mask[b]].astype(np.float64)
        of_outcome = (outcome[b, :, 0] - outcome[b].mean()) / (outcome[b].std() + 1e-4)
        for g in range(G):
            for t in range(lengths[b, g]):
                later = rewards[b, g, t:][mask[b, g, t:]]
                normalised = (later - all_steps.mean()) / (all_steps.std() + 1e-4)
                expected[b, g, t] = 0.5 * normalised.sum() + of_outcome[g]
    found, metrics = from_steps(weight=0.5, outcome=from_rewards())(experience)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found_summary = summary(metrics)
    assert found_summary["step_reward"] == pytest.approx(rewards[mask].mean(), rel=1e-5)
    assert found_summary["steps"] == pytest.approx(mask.sum() / (B * G))
    with pytest.raises(ValueError, match="no step rewards: put step_rewards"):
        from_steps()(experience._replace(step_mask=None))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), np.float32("nan")], ids=str)
def test_weights_that_are_not_finite_are_refused(weight):
    with pytest.raises(ValueError, match="weights of reward functions are finite numbers"):
        as_array([1.0, weight], 2)
