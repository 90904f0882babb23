"""Rewards to advantages: how much better a completion is than the others of its group."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from grpo_jax.losses import kl_k1
from grpo_jax.protocols import Advantage, Cost, Estimator, KLEstimate
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics

Weights = Sequence[float | Array]  # one a reward function


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


def batch_normalised_advantages(
    rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4
) -> Array:
    """Centered on the batch and scaled by it (REINFORCE++, Hu et al. 2025, arXiv:2501.03262, equation 5).

        A[b, g] = (r[b, g] - mean(r)) / (std(r) + eps)

    It knows no groups. REINFORCE++-baseline centers on the group first:
    `lambda r, mask: batch_normalised_advantages(centered_advantages(r, mask), mask)`.
    Arguments, result and errors as in `group_advantages`, but that `G` may be 1; a batch of
    equal rewards gets exactly 0.
    """
    rewards, mask = _checked(rewards, mask, at_least=1)
    centered = rewards - _mean(rewards, mask, axis=None)
    scale = jnp.sqrt(_mean(centered**2, mask, axis=None, ddof=ddof)) + eps
    spread = has_variance(rewards.reshape(1, -1), mask.reshape(1, -1))
    return jnp.where(mask & spread, centered / scale, 0.0)


# ---------------------------------------------------------- rewards of steps and tokens


def rewards_to_go(rewards: Array, mask: Array, *, discount: float | Array = 1.0) -> Array:
    """What each token still earns (Sutton and Barto 2018, equation 3.8).

        A[t] = sum over s >= t of discount^(s - t) * r[s]

    Args:
      rewards: `[B, G, T]` float, given at the token that earned them.
      mask: `[B, G, T]` bool, False where there is no reward.
      discount: of a token.

    Returns:
      `[B, G, T]`, in reward units.
    """
    chex.assert_rank([rewards, mask], 3)

    def earlier(later: Array, reward: Array) -> tuple[Array, Array]:
        total = reward + discount * later
        return total, total

    by_token = jnp.moveaxis(jnp.where(mask, rewards, 0.0), -1, 0)
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


# ------------------------------------------------------------------- of an experience


def from_rewards(
    estimator: Estimator = group_advantages,
    *,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
    cost: Cost | None = None,
) -> Advantage:
    """Makes the advantage function of a train step: weighs the rewards, then calls `estimator`.

        r[b, g] = sum over k of weights[k] * rewards[b, g, k] - cost[b, g]

    A reward that could not be given is left out of the sum, as in TRL; a completion
    that no reward function could score is left out of its group.

    Args:
      estimator: `(rewards [B, G], mask [B, G]) -> [B, G]`.
      weights: one a reward function; all 1 if None.
      names: one a reward function, for the metrics; their index if None.
      cost: `experience -> [B, G]`, such as `kl_cost(beta)`.

    Returns:
      `f(experience) -> (advantages [B, G], metrics)`, with the mean and deviation of
      the total, of each reward and of the cost, and the share of judged groups without
      spread, which teach nothing.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        metrics = {}
        if cost is not None:
            paid = cost(experience)
            total, metrics = total - paid, _moments("cost", paid, scored)
        return estimator(total, scored), _reward_metrics(experience, total, scored, names) | metrics

    return advantage


def from_normalised_rewards(
    *,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
    ddof: int = 0,
    eps: float | Array = 1e-4,
) -> Advantage:
    """Each reward is normalised in its group before they are added (GDPO, 2026, arXiv:2601.05242).

        z[b, g] = sum over k of weights[k] * group_advantages(rewards[..., k])[b, g]
        A[b, g] = (z[b, g] - mean(z)) / (std(z) + eps)

    with mean and deviation over the batch. Rewards of different scales, whose sum would
    be decided by the widest, keep a say. TRL's `normalize_then_sum`, which has `ddof=1`.

    Args:
      weights: as in `from_rewards`.
      names: as in `from_rewards`.
      ddof: as in `group_advantages`, for groups and batch.
      eps: as in `group_advantages`, for groups and batch.

    Returns:
      As `from_rewards`. A group in which every reward is equal gets exactly 0.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        rewards, given = _given(experience)
        R = rewards.shape[-1]
        normalised = [group_advantages(rewards[..., k], given[..., k], ddof=ddof, eps=eps) for k in range(R)]
        summed = jnp.sum(jnp.stack(normalised, axis=-1) * _as_array(weights, R), axis=-1)
        advantages = batch_normalised_advantages(summed, scored, ddof=ddof, eps=eps)
        return _where_spread(summed, scored, advantages), _reward_metrics(experience, total, scored, names)

    return advantage


def kl_cost(beta: float | Array, *, estimate: KLEstimate = kl_k1) -> Cost:
    """The divergence from the reference policy as a cost of the reward, not a term of the loss.

        cost[b, g] = beta * sum_t estimate(log p[t], log ref[t])

    As in RLOO (Ahmadian et al. 2024, arXiv:2402.14740, equation 1). Not differentiated:
    the policy gradient does that, so that `kl_k1`, whose own gradient is 0 on average, is
    the right one here. `p` is the policy that sampled, `old_log_probs`, or the sampler's
    log-probs where those were not scored.

    Args:
      beta: at least 0.
      estimate: `kl_k1`, `kl_k2` or `kl_k3` of `losses`.

    Raises:
      ValueError: for a `beta` below 0; when called, without `ref_log_probs`.
    """
    if isinstance(beta, int | float) and not beta >= 0:
        raise ValueError(f"beta is at least 0, got {beta}")

    def cost(experience: Experience) -> Array:
        rollout, ref = experience.rollout, experience.ref_log_probs
        if ref is None:
            raise ValueError("a KL cost needs a reference policy: init_state(..., reference=True)")
        log_probs = rollout.log_probs if experience.old_log_probs is None else experience.old_log_probs
        kl = estimate(jnp.where(rollout.mask, log_probs, 0.0), jnp.where(rollout.mask, ref, 0.0))
        return beta * jnp.sum(kl, axis=-1)

    return cost


def total_reward(experience: Experience, weights: Weights | None = None) -> tuple[Array, Array]:
    """The weighted sum of an experience's rewards `[B, G]`, and where there is any `[B, G]`."""
    rewards, given = _given(experience)
    # A matrix product may round equal rows apart, and in bfloat16 on a TPU.
    total = jnp.sum(jnp.where(given, rewards, 0.0) * _as_array(weights, rewards.shape[-1]), axis=-1)
    return total, jnp.any(given, axis=-1)


def has_variance(rewards: Array, mask: Array) -> Array:
    """`[B]`, whether the rewards `[B, G]` of a group differ.

    By comparison: the mean of eight 1.1s is not 1.1, and that rounding would be divided by
    `eps`. A NaN does not pass for equal rewards: its update is refused.
    """
    highest = jnp.max(jnp.where(mask, rewards, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1)
    return ~(highest <= lowest)


def _given(experience: Experience) -> tuple[Array, Array]:
    rewards, given = experience.rewards, experience.reward_mask
    if rewards is None or given is None:
        raise ValueError("the experience has no rewards: put rewards and reward_mask [B, G, R] into it")
    chex.assert_rank([rewards, given], 3)
    return rewards, given


def _as_array(weights: Weights | None, R: int) -> Array:
    if weights is not None and len(weights) != R:
        raise ValueError(f"{len(weights)} weights for {R} reward functions: {weights}")
    return jnp.asarray([1.0] * R if weights is None else weights, jnp.float32)


def _reward_metrics(experience: Experience, total: Array, scored: Array, names: Sequence[str] | None) -> Metrics:
    rewards, given = _given(experience)
    R = rewards.shape[-1]
    if names is not None and len(names) != R:
        raise ValueError(f"{len(names)} names for {R} reward functions: {names}")
    if names is not None and len(set(names)) != len(names):
        raise ValueError(f"reward functions have a name each, got {names}; set their __name__")
    judged = jnp.any(scored, axis=1)
    metrics = _moments("reward", total, scored) | {
        "zero_variance_groups": Mean(jnp.sum(~has_variance(total, scored) & judged), jnp.sum(judged))
    }
    for k, name in enumerate(names or range(R)):
        metrics |= _moments(f"reward/{name}", rewards[..., k], given[..., k])
    return metrics


def _checked(rewards: Array, mask: Array | None, *, at_least: int = 2) -> tuple[Array, Array]:
    chex.assert_rank(rewards, 2)
    chex.assert_type(rewards, float)
    if rewards.shape[1] < at_least:
        raise ValueError(f"a group needs at least {at_least} completions, got rewards of shape {rewards.shape}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    return jnp.where(mask, rewards, 0.0), mask


def _mean(x: Array, mask: Array, *, axis: int | None, ddof: int = 0) -> Array:
    count = jnp.sum(mask, axis=axis, keepdims=True) - ddof
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _centered(rewards: Array, mask: Array) -> Array:
    return jnp.where(mask, rewards - _mean(rewards, mask, axis=1), 0.0)


def _where_spread(rewards: Array, mask: Array, advantages: Array) -> Array:
    return jnp.where(mask & has_variance(rewards, mask)[:, None], advantages, 0.0)


def _moments(name: str, x: Array, mask: Array) -> Metrics:
    count = jnp.sum(mask)
    deviation = jnp.sqrt(_mean((x - _mean(x, mask, axis=None)) ** 2, mask, axis=None))[0, 0]
    return {name: Mean(jnp.sum(jnp.where(mask, x, 0.0)), count), f"{name}_std": deviation}
