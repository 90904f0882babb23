"""Rewards to advantages: how much better a completion is than the others of its group."""

from collections.abc import Callable, Sequence

import chex
import jax.numpy as jnp

from grpo_jax.types import Array, Experience, Mean, Metrics

Estimator = Callable[[Array, Array | None], Array]  # (rewards [B, G], mask [B, G]) -> advantages [B, G]
Advantage = Callable[[Experience], tuple[Array, Metrics]]  # [B, G] or [B, G, T]


def group_advantages(rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4) -> Array:
    """Scores each completion against the other completions of its prompt.

        A[b, g] = (r[b, g] - mean(r[b])) / (std(r[b]) + eps)

    Follows the outcome-supervision advantage of GRPO (Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2). The paper leaves two choices open, so both
    are arguments: TRL and verl divide by the sample deviation (`ddof=1`).

    Args:
      rewards: `[B, G]` float, one a completion, in the task's own units.
      mask: `[B, G]` bool, False where no reward could be given; those get 0 and
        count in no mean or deviation.
      ddof: 0 for the population deviation, 1 for the sample deviation.
      eps: added to the deviation, in reward units.

    Returns:
      `[B, G]` advantages, unitless. A group of equal rewards gets exactly 0.

    Raises:
      AssertionError: if `rewards` is not a rank-2 float array.
      ValueError: if `G < 2`; one completion has nothing to be compared with.
    """
    rewards, mask = _checked(rewards, mask)
    centered = _centered(rewards, mask)
    scale = jnp.sqrt(_mean(centered**2, mask, axis=1, ddof=ddof)) + eps
    return _where_spread(rewards, mask, centered / scale)


def centered_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """The distance to the group's mean, without a deviation (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.2).

        A[b, g] = r[b, g] - mean(r[b])

    Arguments, result and errors as in `group_advantages`; in reward units.
    """
    rewards, mask = _checked(rewards, mask)
    return _where_spread(rewards, mask, _centered(rewards, mask))


def batch_scaled_advantages(
    rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4
) -> Array:
    """Centered on the group, scaled by the batch (Lite PPO, Liu et al. 2025, arXiv:2508.08221, section 4.1).

        A[b, g] = (r[b, g] - mean(r[b])) / (std(r) + eps)

    `std(r)` is that of all rewards of the batch about the batch's mean, as in TRL's
    `scale_rewards="batch"` (which has `ddof=1`). Arguments, result and errors as in
    `group_advantages`.
    """
    rewards, mask = _checked(rewards, mask)
    from_batch_mean = rewards - _mean(rewards, mask, axis=None)
    scale = jnp.sqrt(_mean(from_batch_mean**2, mask, axis=None, ddof=ddof)) + eps
    return _where_spread(rewards, mask, _centered(rewards, mask) / scale)


def leave_one_out_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """The distance to the mean of the others (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, section 3.3).

        A[b, g] = r[b, g] - mean(r[b, h] for h != g) = (r[b, g] - mean(r[b])) G / (G - 1)

    Arguments, result and errors as in `group_advantages`; in reward units.
    """
    rewards, mask = _checked(rewards, mask)
    count = jnp.sum(mask, axis=1, keepdims=True)
    return _where_spread(rewards, mask, _centered(rewards, mask) * count / jnp.maximum(count - 1, 1))


def from_rewards(
    estimator: Estimator = group_advantages,
    *,
    weights: Sequence[float | Array] | None = None,
    names: Sequence[str] | None = None,
) -> Advantage:
    """Makes the advantage function of a train step: weighs the rewards, then calls `estimator`.

        r[b, g] = sum over k of weights[k] * rewards[b, g, k]

    A reward that could not be given is left out of the sum, as in TRL; a completion
    that no reward function could score is left out of its group.

    Args:
      estimator: `(rewards [B, G], mask [B, G]) -> [B, G]`.
      weights: one a reward function; all 1 if None.
      names: one a reward function, for the metrics; their index if None.

    Returns:
      `f(experience) -> (advantages [B, G], metrics)`, with the mean and deviation of
      the total and of each reward, and the share of groups without spread, which
      teach nothing.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        rewards, given = experience.rewards, experience.reward_mask
        if rewards is None or given is None:
            raise ValueError("the experience has no rewards: put rewards and reward_mask [B, G, R] into it")
        chex.assert_rank([rewards, given], 3)
        R = rewards.shape[-1]
        for setting, value in (("weights", weights), ("names", names)):
            if value is not None and len(value) != R:
                raise ValueError(f"{len(value)} {setting} for {R} reward functions: {value}")
        rewards = jnp.where(given, rewards, 0.0)
        weighted = rewards * jnp.asarray([1.0] * R if weights is None else weights, jnp.float32)
        total = jnp.sum(weighted, axis=-1)  # a matrix product may round equal rows apart, and in bfloat16 on a TPU
        scored = jnp.any(given, axis=-1)
        metrics = _moments("reward", total, scored) | {
            "groups_without_spread": Mean(jnp.sum(~_has_spread(total, scored)), jnp.asarray(total.shape[0]))
        }
        for k, name in enumerate(names or range(R)):
            metrics |= _moments(f"reward/{name}", rewards[..., k], given[..., k])
        return estimator(total, scored), metrics

    return advantage


def _checked(rewards: Array, mask: Array | None) -> tuple[Array, Array]:
    chex.assert_rank(rewards, 2)
    chex.assert_type(rewards, float)
    if rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least 2 completions, got rewards of shape {rewards.shape}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    return jnp.where(mask, rewards, 0.0), mask


def _mean(x: Array, mask: Array, *, axis: int | None, ddof: int = 0) -> Array:
    count = jnp.sum(mask, axis=axis, keepdims=True) - ddof
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _centered(rewards: Array, mask: Array) -> Array:
    return jnp.where(mask, rewards - _mean(rewards, mask, axis=1), 0.0)


def _has_spread(rewards: Array, mask: Array) -> Array:
    """`[B]`, by comparison: the mean of eight 1.1s is not 1.1, and that rounding would be divided by `eps`."""
    highest = jnp.max(jnp.where(mask, rewards, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1)
    return ~(highest <= lowest)  # a NaN is not to pass for equal rewards: its update is refused


def _where_spread(rewards: Array, mask: Array, advantages: Array) -> Array:
    return jnp.where(mask & _has_spread(rewards, mask)[:, None], advantages, 0.0)


def _moments(name: str, x: Array, mask: Array) -> Metrics:
    count = jnp.sum(mask)
    deviation = jnp.sqrt(_mean((x - _mean(x, mask, axis=None)) ** 2, mask, axis=None))[0, 0]
    return {name: Mean(jnp.sum(jnp.where(mask, x, 0.0)), count), f"{name}_std": deviation}
