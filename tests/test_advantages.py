"""Advantages, against their formulas in plain Python."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax import types
from grpo_jax.advantages import (
    batch_scaled_advantages,
    centered_advantages,
    from_rewards,
    group_advantages,
    leave_one_out_advantages,
)
from grpo_jax.types import Experience, Mean, Prompts, Rollout

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
    shifted = rewards + jnp.array([[8.0], [0.0]])
    same = np.allclose(estimator(shifted), estimator(rewards), rtol=1e-5)
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

    numbers = types.summary(metrics)
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
    assert set(metrics) == {"reward", "reward_std", "groups_without_spread"} | {
        f"reward/{name}{suffix}" for name in ("right", "brief") for suffix in ("", "_std")
    }
    assert types.summary(metrics)["groups_without_spread"] == 0.75
    assert metrics["reward/right"] == Mean(9.5, 7)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("G", "R"), [(8, 2), (5, 5), (9, 9), (13, 9)])
def test_equal_rewards_get_exactly_0_after_weighting_too(G, R, transform):
    """A matrix product sums some rows in another order, and that rounding would be divided by eps."""
    rng = np.random.default_rng(R)
    rewards = np.broadcast_to(rng.normal(size=(3, 1, R)), (3, G, R))
    advantages, metrics = transform(from_rewards(weights=rng.normal(size=R).tolist()))(experience_of(rewards))
    np.testing.assert_array_equal(advantages, 0.0)
    assert types.summary(metrics)["groups_without_spread"] == 1


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
