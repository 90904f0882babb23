"""Baselines of least variance, which weigh the rewards of a group by lengths or by scores of tokens."""

import jax.numpy as jnp

from grpo_jax.advantages.spread import checked, has_variance, where_variance
from grpo_jax.losses.contract import check_not_negative
from grpo_jax.types import Array, Experience


def length_weighted_advantages(rewards: Array, mask: Array, experience: Experience) -> Array:
    """The distance to the mean of the group weighed by lengths (OPO, Hao et al. 2025, arXiv:2505.23585).

        A[b, g] = r[b, g] - sum_h n[b, h] r[b, h] / sum_h n[b, h]

    with `n` the tokens that count. The baseline of least variance where the square of a completion's score grows as
    its length. For `from_experience`.

    Args:
      rewards: `[B, G]` float.
      mask: `[B, G]` bool, False where no reward could be given.
      experience: of which the rollout's mask is read.

    Returns:
      `[B, G]`, in reward units. A group of equal rewards gets exactly 0.
    """
    rewards, mask = checked(rewards, mask)
    lengths = jnp.where(mask, jnp.sum(experience.rollout.mask, axis=-1), 0)
    least = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1, keepdims=True)
    above = jnp.where(mask, rewards - least, 0.0)
    baseline = jnp.sum(lengths * above, axis=1, keepdims=True) / jnp.maximum(jnp.sum(lengths, 1, keepdims=True), 1)
    return where_variance(rewards, mask, above - baseline)


def optimal_token_advantages(
    rewards: Array, mask: Array, experience: Experience, *, zero_tail: bool = True, eps: float | Array = 1e-8
) -> Array:
    """A baseline of least variance for each position of the group (OTB, 2026, arXiv:2602.07078).

        w[t]    = 1 - 2 p_old[t] + sum_v p_old[t, v]^2        the square of the score of the token's logits
        W[g, t] = sum of w[g, s] over the tokens s <= t of completion g that count
        b[t]    = sum_g W[g, t] r[g] / (sum_g W[g, t] + eps)  over completions that have a token that counts at t
        A[g, t] = r[g] - b[t]

    For `from_experience`; needs `make_train_step(..., score_old=True)`. verl's `optimal_token_baseline` for a reward at
    the end of the completion; verl gives the tail of a group of equal rewards the reward itself, here it gets 0.

    Args:
      rewards: `[B, G]` float.
      mask: `[B, G]` bool, False where no reward could be given.
      experience: of which `old_log_probs` and `old_collision` are read.
      zero_tail: True has a baseline of 0 behind the end of the second longest completion, as in verl, where the
        longest one's own reward would be its baseline; False leaves that, so that those tokens get about 0.
      eps: added to the sum of weights.

    Returns:
      `[B, G, T]`, in reward units.

    Raises:
      ValueError: without `old_collision`; for an `eps` below 0.
    """
    check_not_negative(eps=eps)
    rewards, mask = checked(rewards, mask)
    if experience.old_log_probs is None or experience.old_collision is None:
        raise ValueError("optimal_token_advantages needs what make_train_step(..., score_old=True) scores")
    counted = experience.rollout.mask & mask[..., None]
    square = 1 - 2 * jnp.exp(jnp.where(counted, experience.old_log_probs, 0.0)) + experience.old_collision
    weight = jnp.where(counted, jnp.cumsum(jnp.where(counted, square, 0.0), axis=-1), 0.0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    baseline = jnp.sum(weight * rewards[..., None], axis=1, keepdims=True) / (total + eps)
    if zero_tail:
        baseline = jnp.where(jnp.sum(counted, axis=1, keepdims=True) > 1, baseline, 0.0)
    varies = has_variance(rewards, mask)[:, None, None]
    return jnp.where(counted & varies, rewards[..., None] - baseline, 0.0)
