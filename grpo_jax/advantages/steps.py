"""Rewards of the steps of a completion: process supervision, and rewards to go."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from grpo_jax.advantages.estimators import group_advantages
from grpo_jax.losses.contract import check_shares, widened
from grpo_jax.protocols import Advantage
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics


def rewards_to_go(rewards: Array, mask: Array, *, gamma: float | Array = 1.0) -> Array:
    """The discounted sum of a token's reward and those after it (Sutton and Barto 2018, equation 3.8).

        A[t] = sum over s >= t of gamma^(s - t) * r[s]

    Args:
      rewards: `[B, G, T]` float, each at the token that is rewarded.
      mask: `[B, G, T]` bool, False where there is no reward.
      gamma: discount per token, from 0 to 1; 1 for none.

    Returns:
      `[B, G, T]`, in reward units.

    Raises:
      ValueError: for a `gamma` out of range.
    """
    chex.assert_rank([rewards, mask], 3)
    chex.assert_equal_shape([rewards, mask])
    check_shares(gamma=gamma)

    def earlier(later: Array, reward: Array) -> tuple[Array, Array]:
        total = reward + gamma * later
        return total, total

    by_token = jnp.moveaxis(widened(jnp.where(mask, rewards, 0.0)), -1, 0)
    _, to_go = jax.lax.scan(earlier, jnp.zeros_like(by_token[0]), by_token, reverse=True)
    return jnp.moveaxis(to_go, 0, -1)


def process_advantages(rewards: Array, mask: Array, *, ddof: int = 0, eps: float | Array = 1e-4) -> Array:
    """Process supervision: the normalised rewards of the steps that are still to end (DeepSeekMath, section 4.1.3).

        z[j] = (r[j] - mean(r of the group's steps)) / (std(r of the group's steps) + eps)
        A[t] = sum over steps j that end at t or later of z[j]

    (Shao et al. 2024, arXiv:2402.03300.)

    Args:
      rewards: `[B, G, T]` float, each at the token that ends its step.
      mask: `[B, G, T]` bool, True at the tokens that end a step.
      ddof: as in `group_advantages`.
      eps: as in `group_advantages`.

    Returns:
      `[B, G, T]`, unitless.
    """
    chex.assert_equal_shape([rewards, mask])
    group = (rewards.shape[0], -1)
    normalised = group_advantages(rewards.reshape(group), mask.reshape(group), ddof=ddof, eps=eps)
    return rewards_to_go(normalised.reshape(rewards.shape), mask)


def from_steps(
    estimator: Callable[[Array, Array], Array] = process_advantages,
    *,
    weight: float | Array = 1.0,
    outcome: Advantage | None = None,
) -> Advantage:
    """An advantage of the rewards of steps, alone or beside that of the outcome.

        A[b, g, t] = weight * estimator(step rewards)[b, g, t] + outcome[b, g]

    Args:
      estimator: `(rewards [B, G, T], mask [B, G, T]) -> [B, G, T]`: `process_advantages`, or `rewards_to_go` for the
        sum that is still to come, without a baseline.
      weight: of the steps.
      outcome: of the whole completion, such as `from_rewards()`; None for the steps alone.

    Returns:
      The advantage, `[B, G, T]`, 0 on padding. It needs `experience.step_rewards` and `step_mask`, as `rewards.steps`
      makes them, and adds the metrics `step_reward`, the mean over steps, and `steps`, their number in a completion.

    Raises:
      ValueError: when called, for an experience without step rewards.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        rewards, mask, rollout = experience.step_rewards, experience.step_mask, experience.rollout
        if rewards is None or mask is None:
            raise ValueError("the experience has no step rewards: put step_rewards and step_mask [B, G, T] into it")
        held = jnp.arange(rewards.shape[-1]) < rollout.lengths[..., None]
        advantages = weight * jnp.where(held, estimator(rewards, mask), 0.0)
        metrics: Metrics = {
            "step_reward": Mean(jnp.sum(jnp.where(mask, rewards, 0.0)), jnp.sum(mask)),
            "steps": Mean(jnp.sum(mask), jnp.sum(rollout.lengths > 0)),
        }
        if outcome is not None:
            of_outcome, more = outcome(experience)
            of_outcome = of_outcome if of_outcome.ndim == 3 else of_outcome[..., None]
            advantages, metrics = jnp.where(held, advantages + of_outcome, 0.0), metrics | more
        return advantages, metrics

    return advantage
