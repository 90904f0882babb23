"""Advantages that are normalised over the whole batch: each reward apart (GDPO), or each token (REINFORCE++)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grpo_jax.advantages.divergences import token_kl
from grpo_jax.advantages.estimators import batch_normalised_advantages, group_advantages
from grpo_jax.advantages.spread import check_deviation, from_mean, has_variance, root_mean_square, where_variance
from grpo_jax.advantages.totals import Weights, as_array, moments, reward_metrics, rewards_of, total_reward
from grpo_jax.losses import kl_k1
from grpo_jax.losses.contract import check_not_negative, check_shares, weighted
from grpo_jax.protocols import Advantage, KLEstimate
from grpo_jax.types import Array, Experience, Metrics


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

    Raises:
      ValueError: as `group_advantages`.
    """
    check_deviation(ddof, eps)

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        rewards, reward_mask = rewards_of(experience)
        R = rewards.shape[-1]
        normalised = [group_advantages(rewards[..., k], reward_mask[..., k], ddof=ddof, eps=eps) for k in range(R)]
        summed = jnp.sum(jnp.stack(normalised, axis=-1) * as_array(weights, R), axis=-1)
        advantages = batch_normalised_advantages(summed, scored, ddof=ddof, eps=eps)
        return where_variance(summed, scored, advantages), reward_metrics(experience, total, scored, names)

    return advantage


def reinforce_plus_plus(
    beta: float | Array = 0.0,
    *,
    gamma: float | Array = 1.0,
    estimate: KLEstimate = kl_k1,
    ddof: int = 0,
    eps: float | Array = 1e-8,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
) -> Advantage:
    """The reward less the divergence still to come, normalised over all tokens (REINFORCE++, arXiv:2501.03262).

        R[t] = r at the last token that counts, else 0, - beta * estimate(log p[t], log ref[t])
        G[t] = sum over s >= t of gamma^(s - t) R[s], over tokens that count
        A[t] = (G[t] - mean(G)) / sqrt(var(G) + eps)        over the tokens that count of the batch

    (Hu et al. 2025.) It knows no groups. `p` is the policy that sampled, as in `kl_cost`. Tokens that the policy did
    not write take no step of the discount, as in verl, which normalises with the sample's variance (`ddof=1`). `eps` is
    under the root, as in verl: with equal rewards and a policy that is still the reference, the returns differ by
    rounding alone, which a deviation below `sqrt(eps)` leaves small.

    Args:
      beta: weight of the divergence, at least 0; above 0 it needs a reference.
      gamma: discount per token, from 0 to 1.
      estimate: of the divergence; `kl_k1` in the paper.
      ddof: of the variance.
      eps: added to the variance.
      weights: as in `from_rewards`.
      names: as in `from_rewards`.

    Returns:
      As `from_rewards`, with advantages `[B, G, T]`. A batch of equal returns gets exactly 0.

    Raises:
      ValueError: for a setting out of range; when called, for a `beta` above 0 without `ref_log_probs`.
    """
    check_not_negative(beta=beta)
    check_shares(gamma=gamma)
    check_deviation(ddof, eps)

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        metrics = reward_metrics(experience, total, scored, names)
        counted = experience.rollout.mask & scored[..., None]
        T = counted.shape[-1]
        last = jnp.max(jnp.where(counted, jnp.arange(T), -1), axis=-1, keepdims=True)
        per_step = jnp.where(jnp.arange(T) == last, total[..., None], 0.0)
        if not (isinstance(beta, int | float) and beta == 0):
            kl = token_kl(experience, estimate)
            cost = weighted(beta, jnp.where(counted, kl, 0.0))
            per_step = per_step - cost
            metrics = metrics | moments("cost", jnp.sum(cost, axis=-1), scored)
        returns = _over_counted(per_step, counted, gamma)
        row = (1, -1)  # the tokens of the batch are one group
        centered = from_mean(returns.reshape(row), counted.reshape(row), axis=None)
        deviation = root_mean_square(centered, counted.reshape(row), axis=None, ddof=ddof)
        varies = has_variance(returns.reshape(row), counted.reshape(row))
        normalised = jnp.where(varies, centered / jnp.hypot(deviation, jnp.sqrt(eps)), 0.0).reshape(counted.shape)
        return jnp.where(counted, normalised, 0.0), metrics

    return advantage


def _over_counted(rewards: Array, counted: Array, gamma: float | Array) -> Array:
    """`rewards_to_go` that passes tokens that do not count without a step of the discount."""

    def earlier(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, counts = step
        total = jnp.where(counts, reward + gamma * later, later)
        return total, total

    steps = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, counted))
    _, to_go = jax.lax.scan(earlier, jnp.zeros_like(rewards[..., 0]), steps, reverse=True)
    return jnp.moveaxis(to_go, 0, -1)
