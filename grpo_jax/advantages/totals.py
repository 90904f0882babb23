"""Several rewards of a completion to one, and the metrics of both."""

import math
from collections.abc import Sequence

import chex
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages.spread import from_mean, has_variance, root_mean_square
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics

Weights = Sequence[float | Array]  # one per reward function


def total_reward(experience: Experience, weights: Weights | None = None) -> tuple[Array, Array]:
    """The weighted sum of an experience's rewards `[B, G]`, and where there is any `[B, G]`."""
    rewards, reward_mask = rewards_of(experience)
    # A matrix product may round equal rows apart, and in bfloat16 on a TPU.
    total = jnp.sum(jnp.where(reward_mask, rewards, 0.0) * as_array(weights, rewards.shape[-1]), axis=-1)
    return total, jnp.any(reward_mask, axis=-1)


def reward_metrics(experience: Experience, total: Array, scored: Array, names: Sequence[str] | None = None) -> Metrics:
    """The metrics that every advantage logs.

        reward, reward_std                   the total of a completion, after the cost, over completions with a reward
        zero_variance_groups                 share of groups with a reward whose totals are all equal; where rewards are
                                             compared within a group, their advantages are 0
        reward/<name>, reward/<name>_std     one reward function, unweighted, over completions that it scored

    Deviations are over the whole batch with `ddof=0`; TRL's `reward_std` has `ddof=1`.

    Args:
      experience: with rewards.
      total: `[B, G]`, as of `total_reward`.
      scored: `[B, G]` bool, as of `total_reward`.
      names: one per reward function; their index if None.

    Raises:
      ValueError: for a wrong number of names, or one that occurs twice.
    """
    rewards, reward_mask = rewards_of(experience)
    R = rewards.shape[-1]
    if names is not None and len(names) != R:
        raise ValueError(f"{len(names)} names for {R} reward functions: {names}")
    if names is not None and len(set(names)) != len(names):
        raise ValueError(f"each reward function needs a name of its own, got {names}; set their __name__")
    has_reward = jnp.any(scored, axis=1)
    metrics = moments("reward", total, scored) | {
        "zero_variance_groups": Mean(jnp.sum(~has_variance(total, scored) & has_reward), jnp.sum(has_reward))
    }
    for k, name in enumerate(names or range(R)):
        metrics |= moments(f"reward/{name}", rewards[..., k], reward_mask[..., k])
    return metrics


def moments(name: str, x: Array, mask: Array) -> Metrics:
    """The mean of what the mask keeps under its name, and the deviation as `name_std`."""
    count = jnp.sum(mask)
    deviation = root_mean_square(from_mean(x, mask, axis=None), mask, axis=None)[0, 0]
    return {name: Mean(jnp.sum(jnp.where(mask, x, 0.0)), count), f"{name}_std": deviation}


def rewards_of(experience: Experience) -> tuple[Array, Array]:
    """Rewards and mask `[B, G, R]`, which must be there."""
    rewards, reward_mask = experience.rewards, experience.reward_mask
    if rewards is None or reward_mask is None:
        raise ValueError("the experience has no rewards: put rewards and reward_mask [B, G, R] into it")
    chex.assert_rank([rewards, reward_mask], 3)
    chex.assert_equal_shape([rewards, reward_mask])
    return rewards, reward_mask


def as_array(weights: Weights | None, R: int) -> Array:
    """`[R]`, 1 each if not given."""
    if weights is not None and len(weights) != R:
        raise ValueError(f"{len(weights)} weights for {R} reward functions: {weights}")
    known = [weight for weight in (() if weights is None else weights) if isinstance(weight, float | np.floating)]
    if not all(map(math.isfinite, known)):
        raise ValueError(f"weights of reward functions are finite numbers, got {weights}")
    return jnp.asarray([1.0] * R if weights is None else weights, jnp.float32)
