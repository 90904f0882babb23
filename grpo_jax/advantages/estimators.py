"""Rewards of completions to advantages, `(rewards [B, G], mask [B, G]) -> [B, G]`."""

import jax
import jax.numpy as jnp

from grpo_jax.advantages.spread import (
    check_deviation,
    checked,
    from_mean,
    has_variance,
    mean,
    root_mean_square,
    where_no_nan,
    where_variance,
)
from grpo_jax.protocols import Estimator
from grpo_jax.types import Array


def group_advantages(rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4) -> Array:
    """Scores each completion against the other completions of its prompt.

        A[b, g] = (r[b, g] - mean(r[b])) / (std(r[b]) + eps)

    Follows the outcome-supervision advantage of GRPO (Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2). The paper leaves two choices open, so both
    are arguments: TRL and verl divide by the sample deviation (`ddof=1`).

    Args:
      rewards: `[B, G]` float, one per completion, in the task's own units.
      mask: `[B, G]` bool, False where no reward could be given; those get 0 and
        count in no mean or deviation.
      ddof: 0 for the population deviation, 1 for the sample deviation.
      eps: added to the deviation, in reward units.

    Returns:
      `[B, G]` advantages, unitless. A group of equal rewards gets exactly 0.

    Raises:
      AssertionError: if `rewards` is not a rank-2 float array.
      ValueError: if `G < 2`; one completion has nothing to be compared with. For another `ddof`, or an `eps` below 0.
    """
    check_deviation(ddof, eps)
    rewards, mask = checked(rewards, mask)
    centered = from_mean(rewards, mask, axis=1)
    deviation = root_mean_square(centered, mask, axis=1, ddof=ddof)
    return where_variance(rewards, mask, centered / (deviation + eps))


def centered_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """The distance to the group's mean, without a deviation (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.2).

        A[b, g] = r[b, g] - mean(r[b])

    Arguments, result and errors as in `group_advantages`; in reward units.
    """
    rewards, mask = checked(rewards, mask)
    return where_variance(rewards, mask, from_mean(rewards, mask, axis=1))


def batch_scaled_advantages(
    rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4
) -> Array:
    """Centered on the group, scaled by the batch (Lite PPO, Liu et al. 2025, arXiv:2508.08221, section 4.1).

        A[b, g] = (r[b, g] - mean(r[b])) / (std(r) + eps)

    `std(r)` is that of all rewards of the batch about the batch's mean, as in TRL's
    `scale_rewards="batch"` (which has `ddof=1`). Arguments, result and errors as in
    `group_advantages`.
    """
    check_deviation(ddof, eps)
    rewards, mask = checked(rewards, mask)
    deviation = root_mean_square(from_mean(rewards, mask, axis=None), mask, axis=None, ddof=ddof)
    return where_variance(rewards, mask, from_mean(rewards, mask, axis=1) / (deviation + eps))


def leave_one_out_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """The distance to the mean of the others (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, section 3.3).

        A[b, g] = r[b, g] - mean(r[b, h] for h != g) = (r[b, g] - mean(r[b])) G / (G - 1)

    Arguments, result and errors as in `group_advantages`; in reward units.
    """
    rewards, mask = checked(rewards, mask)
    count = jnp.sum(mask, axis=1, keepdims=True)
    return where_variance(rewards, mask, from_mean(rewards, mask, axis=1) * (count / jnp.maximum(count - 1, 1)))


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
    check_deviation(ddof, eps)
    rewards, mask = checked(rewards, mask, at_least=1)
    centered = from_mean(rewards, mask, axis=None)
    deviation = root_mean_square(centered, mask, axis=None, ddof=ddof)
    varies = has_variance(rewards.reshape(1, -1), mask.reshape(1, -1))
    return jnp.where(mask & varies, centered / (deviation + eps), 0.0)


def max_rl_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """Maximum likelihood by reinforcement: the advantage in units of the success rate (MaxRL, 2026, arXiv:2602.02710).

        A[b, g] = (r[b, g] - mean(r[b])) / mean(r[b]), and 0 where the mean is not above 0

    A prompt that one completion in `G` solves weighs `G` times as much as by `centered_advantages`. For rewards of 0
    and 1, or others that are not negative: a mean below 0, which a cost may leave of them, is no success rate, and
    dividing by it would teach the worst. Arguments, result and errors as in `group_advantages`.
    """
    rewards, mask = checked(rewards, mask)
    centered, average = from_mean(rewards, mask, axis=1), mean(rewards, mask, axis=1)
    failed = average <= 0
    return where_variance(rewards, mask, jnp.where(failed, 0.0, centered / jnp.where(failed, 1.0, average)))


def best_minus_second_advantages(
    rewards: Array, mask: Array | None = None, *, scaled: bool = False, ddof: int = 1, eps: float | Array = 1e-6
) -> Array:
    """Only the best of a group has an advantage, by how far it beats the second (Tang et al. 2025, arXiv:2503.19595).

        A[b, g] = r[b, g] - max(r[b, h] for h != g) where that is above 0, else 0

    The leave-one-out estimate of the gradient of `E[max of G]`, so of pass@G for rewards of 0 and 1. Where two are
    equally good all get 0. verl's `grpo_passk` divides by the group's sample deviation plus 1e-6 unless told
    otherwise: `scaled=True`.

    Args:
      rewards: as in `group_advantages`.
      mask: as in `group_advantages`.
      scaled: True divides by the group's deviation plus `eps`.
      ddof: of the deviation.
      eps: added to the deviation.

    Returns:
      As `group_advantages`, in reward units unless scaled.
    """
    check_deviation(ddof, eps)
    rewards, mask = checked(rewards, mask)
    highest_two, _ = jax.lax.top_k(jnp.where(mask, rewards, -jnp.inf), 2)
    lead = jnp.where(rewards == highest_two[:, :1], highest_two[:, :1] - highest_two[:, 1:], 0.0)
    if scaled:
        lead = lead / (root_mean_square(from_mean(rewards, mask, axis=1), mask, axis=1, ddof=ddof) + eps)
    return where_no_nan(rewards, mask, where_variance(rewards, mask, lead))


def pass_at_k(k: int) -> Estimator:
    """Makes the unbiased estimator of the gradient of pass@k (PKPO, Walder and Karkhanis 2025, arXiv:2505.15201).

        A[b, g] = k * r[b, g] * C(G - c, k - 1) / C(G - 1, k - 1),    c the completions of the group that are right

    Right completions share what the group lacked: of the `k - 1` others drawn with one, the share of draws in which
    none is right. It is the paper's form whose baseline leaves the completion out and draws `k - 1` others, times
    `G`, since the losses average over the group. Wrong completions get 0. With `k = G` only a sole right one gets
    more, as by `best_minus_second_advantages`, times `G`; with `k = 1` it is the reward without a baseline.

    Args:
      k: from 1 to `G`.

    Returns:
      `(rewards [B, G] of 0 and 1, mask) -> [B, G]`; in units of pass@k. A completion counts as right above 0.5.
      Where the mask leaves fewer than `k`, the group gets 0. It gives no group of equal rewards 0 by itself: with
      `k = 1`, all right, each gets 1.

    Raises:
      ValueError: for a `k` below 1; when called, for a group of fewer than `k`.
    """
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")

    def estimator(rewards: Array, mask: Array | None = None) -> Array:
        rewards, mask = checked(rewards, mask)
        if rewards.shape[1] < k:
            raise ValueError(f"pass@{k} needs groups of at least {k} completions, got rewards of {rewards.shape}")
        right = mask & (rewards > 0.5)
        size = jnp.sum(mask, axis=1, keepdims=True)
        wrong = size - jnp.sum(right, axis=1, keepdims=True)
        drawn = jnp.arange(k - 1)  # C(wrong, k - 1) / C(size - 1, k - 1), factor by factor
        none = jnp.prod(jnp.maximum(wrong[..., None] - drawn, 0) / jnp.maximum(size[..., None] - 1 - drawn, 1), axis=-1)
        return where_no_nan(rewards, mask, jnp.where(right & (size >= k), k * none, 0.0))

    return estimator
