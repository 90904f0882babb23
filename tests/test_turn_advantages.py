"""Rewards of turns to advantages of tokens, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.advantages import centered_advantages, from_rewards, group_advantages, leave_one_out_advantages
from grpo_jax.sampling import turn_rewards
from grpo_jax.statistics import summary
from grpo_jax.turn_advantages import by_role, by_turn, from_turns, pooled, to_tokens
from grpo_jax.types import Experience, Prompts, Rollout, Turns

B, G, K, T = 2, 4, 3, 20


def experience_of(seed):
    """Conversations of 1 to 3 turns of 1 to 4 tokens, with answers of 1 to 2 between them; one environment failed."""
    rng = np.random.default_rng(seed)
    ends, mask = np.zeros((B, G, K), np.int32), np.zeros((B, G, T), bool)
    for b, g in np.ndindex(B, G):
        place = 0
        for k in range(rng.integers(1, K + 1)):
            start = place + (rng.integers(1, 3) if k else 0)
            place = start + rng.integers(1, 5)
            mask[b, g, start:place], ends[b, g, k] = True, place
    given = (ends > 0) & (rng.random((B, G, K)) < 0.8)
    given[..., 0] = True
    failed = np.zeros((B, G), bool)
    failed[1, 2], given[1, 2], mask[1, 2] = True, False, False
    rewards = np.where(given, rng.normal(size=(B, G, K)), 0).astype(np.float32)
    turns = Turns(*map(jnp.asarray, (ends, rewards, given, failed)))
    zeros = jnp.zeros((B, G, T))
    rollout = Rollout(
        Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)), zeros.astype(jnp.int32),
        jnp.asarray(ends.max(-1)), jnp.asarray(mask), zeros, jnp.zeros((B, G), bool), turns,
    )  # fmt: skip
    return Experience(rollout)


def returns_of(turns, gamma):
    rewards = np.asarray(turns.rewards, np.float64)
    later = [sum(gamma ** (j - k) * rewards[..., j] for j in range(k, K)) for k in range(K)]
    return np.stack(later, axis=-1)


def expected_tokens(experience, values):
    """Turn by turn, token by token."""
    out = np.zeros((B, G, T))
    for b, g in np.ndindex(B, G):
        start = 0
        for k in range(K):
            end = int(experience.rollout.turns.ends[b, g, k])
            out[b, g, start:end] = values[b, g, k]
            start = max(start, end)
    return out


def normalised(values):
    return (values - values.mean()) / (values.std() + 1e-4)


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_each_turn_is_compared_with_the_same_turn_of_the_others(gamma, transform):
    experience = experience_of(0)
    turns = experience.rollout.turns
    took_place = np.asarray(turns.ends > 0) & ~np.asarray(turns.failed)[..., None]
    values, returns = np.zeros((B, G, K)), returns_of(turns, gamma)
    for b, k in np.ndindex(B, K):
        there = took_place[b, :, k]
        if there.sum() > 1:
            values[b, there, k] = normalised(returns[b, there, k])
    advantages, metrics = transform(from_turns(gamma=gamma))(experience)
    np.testing.assert_allclose(advantages, expected_tokens(experience, values), atol=2e-5)
    assert np.unique(took_place.sum(1)).size > 2
    scored = np.asarray(turns.rewards).sum(-1)[~np.asarray(turns.failed)]
    assert summary(metrics)["reward"] == pytest.approx(scored.mean(), abs=1e-6)


def test_each_role_has_a_baseline_of_its_own():
    experience = experience_of(2)
    turns = experience.rollout.turns
    took_place = np.asarray(turns.ends > 0) & ~np.asarray(turns.failed)[..., None]
    values, rewards = np.zeros((B, G, K)), np.asarray(turns.rewards, np.float64)
    for b, role in np.ndindex(B, 2):
        there = took_place[b] & (np.arange(K) % 2 == role)
        if there.any():
            values[b][there] = rewards[b][there] - rewards[b][there].mean()
    advantages, _ = from_turns(gamma=0.0, compare=by_role(centered_advantages))(experience)
    np.testing.assert_allclose(advantages, expected_tokens(experience, values), atol=1e-5)


def test_all_turns_of_a_group_are_pooled():
    experience = experience_of(1)
    turns = experience.rollout.turns
    took_place = np.asarray(turns.ends > 0) & ~np.asarray(turns.failed)[..., None]
    values, returns = np.zeros((B, G, K)), returns_of(turns, 0.9)
    for b in range(B):
        values[b][took_place[b]] = normalised(returns[b][took_place[b]])
    advantages, _ = from_turns(gamma=0.9, compare=pooled(group_advantages))(experience)
    np.testing.assert_allclose(advantages, expected_tokens(experience, values), atol=2e-5)


def test_returns_may_be_taken_as_they_are():
    experience = experience_of(2)
    advantages, _ = from_turns(gamma=0.5, compare=lambda returns, mask: returns)(experience)
    expected = expected_tokens(experience, returns_of(experience.rollout.turns, 0.5))
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


@pytest.mark.parametrize("estimator", [centered_advantages, leave_one_out_advantages])
def test_with_one_turn_each_it_is_the_estimator_of_the_outcome(estimator):
    experience = experience_of(3)
    turns = experience.rollout.turns
    one = Turns(turns.ends.at[..., 1:].set(0), turns.rewards, turns.mask.at[..., 1:].set(False), turns.failed)
    experience = experience._replace(rollout=experience.rollout._replace(turns=one))
    advantages, _ = from_turns(compare=by_turn(estimator))(experience)
    expected = estimator(one.rewards[..., 0], one.mask[..., 0])
    np.testing.assert_allclose(advantages[..., 0], expected, atol=1e-6)


def test_the_outcome_alone_counts_for_all_turns_of_a_conversation():
    experience = experience_of(4)
    turns = experience.rollout.turns
    rewards, mask = turn_rewards(experience.rollout)
    advantages, _ = from_rewards(group_advantages)(experience._replace(rewards=rewards, reward_mask=mask))
    expected = np.zeros((B, G))
    for b in range(B):
        there = ~np.asarray(turns.failed[b])
        expected[b, there] = normalised(np.asarray(turns.rewards[b], np.float64).sum(-1)[there])
    np.testing.assert_allclose(advantages, expected, atol=2e-5)


def test_what_follows_the_last_turn_has_no_value():
    rollout = experience_of(0).rollout
    values = to_tokens(jnp.ones((B, G, K)), rollout)
    np.testing.assert_array_equal(values, np.arange(T) < np.asarray(rollout.turns.ends).max(-1)[..., None])


def test_a_rollout_without_turns_is_refused():
    experience = experience_of(0)
    experience = experience._replace(rollout=experience.rollout._replace(turns=None))
    with pytest.raises(ValueError, match="has no turns"):
        from_turns()(experience)
