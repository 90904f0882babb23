"""Pairs of completions of which one was preferred: groups of `[chosen, rejected]`."""

import jax
import jax.numpy as jnp

from grpo_jax.advantages import Weights
from grpo_jax.baselines.selection import candidates, select
from grpo_jax.losses.contract import masked_sum
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics, Number, Prompts, Rollout


def pairs(experience: Experience, *, weights: Weights | None = None) -> Experience:
    """The best and the worst completion of each group, by total reward, on device.

        chosen[b], rejected[b] = argmax_g r[b, g], argmin_g r[b, g]

    Online DPO makes its pairs so, of the policy's own samples (Guo et al. 2024,
    arXiv:2402.04792, algorithm 1, where a group is of 2). A tie goes to the earlier
    completion.

    Args:
      experience: groups of at least 2 with rewards.
      weights: as in `advantages.from_rewards`.

    Returns:
      The experience with `G = 2`. A group whose rewards are all equal, or of which fewer
      than two completions have a reward, keeps its place with an empty mask.

    Raises:
      ValueError: if `G < 2`, or without rewards.
    """
    total, counted = candidates(experience, weights)
    if total.shape[1] < 2:
        raise ValueError(f"a pair needs a group of at least 2 completions, got rewards of shape {total.shape}")
    best = jnp.argmax(jnp.where(counted, total, -jnp.inf), axis=1)
    worst = jnp.argmin(jnp.where(counted, total, jnp.inf), axis=1)
    places = jnp.stack([best, worst], axis=1)
    rewards, given = (jnp.take_along_axis(x, places, axis=1) for x in (total, counted))
    differ = jnp.all(given, axis=1) & (rewards[:, 0] > rewards[:, 1])
    return select(experience, places, jnp.broadcast_to(differ[:, None], places.shape))


def from_demonstrations(chosen: Rollout, rejected: Rollout) -> Experience:
    """Pairs that were given, such as a data set's: two of `data.make_demonstrations`, of the same prompts.

    Raises:
      ValueError: if they are not of one completion per prompt and of the same widths, or of other prompts.
    """
    if chosen.tokens.shape != rejected.tokens.shape or chosen.tokens.shape[1] != 1:
        raise ValueError(
            "chosen and rejected have one completion per prompt and the same shape, got "
            f"{chosen.tokens.shape} and {rejected.tokens.shape}; make_demonstrations(..., max_tokens=) sets the width"
        )
    if not _same(chosen.prompts, rejected.prompts):
        raise ValueError("chosen and rejected are completions of the same prompts, in one order; these are of others")
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), chosen[1:], rejected[1:])
    return Experience(Rollout(chosen.prompts, *joined))


def _same(a: Prompts, b: Prompts) -> bool:
    """Whether the tokens are the same; traced ones cannot be looked at and pass."""
    held = (a.tokens, a.lengths, b.tokens, b.lengths)
    if any(isinstance(x, jax.core.Tracer) for x in held):
        return True
    return bool(jnp.array_equal(a.tokens, b.tokens) and jnp.array_equal(a.lengths, b.lengths))


def whole_pairs(experience: Experience) -> Array:
    """`[B]` bool, whether both completions of a pair have a token that counts.

    Raises:
      ValueError: if the groups are not pairs.
    """
    mask = experience.rollout.mask
    if mask.shape[1] != 2:
        raise ValueError(f"groups of [chosen, rejected] have 2 completions, got a mask of shape {mask.shape}")
    return jnp.all(jnp.any(mask, axis=-1), axis=1)


def bradley_terry(preferred_by: Array, counted: Array, *, label_smoothing: Number = 0.0) -> tuple[Mean, Metrics]:
    """The negative log-likelihood that the chosen one wins (Bradley and Terry 1952).

        loss = -(1 - s) log sigmoid(d) - s log sigmoid(-d),   d = score(chosen) - score(rejected)

    Args:
      preferred_by: `[B]` float, the differences `d`, in nats.
      counted: `[B]` bool, which pairs count.
      label_smoothing: `s`, the share of labels taken to be wrong (Mitchell 2023,
        ericmitchell.ai/cdpo.pdf).

    Returns:
      The mean over pairs, and the metrics `accuracy`, the share of pairs whose chosen
      one is scored higher, and `margin`, the mean difference.

    Raises:
      ValueError: for a `label_smoothing` below 0, or not below 0.5, where it says nothing.
    """
    check_label_smoothing(label_smoothing)
    d = jnp.where(counted, preferred_by, 0.0)  # before the exponential
    cost = (1 - label_smoothing) * jax.nn.softplus(-d) + label_smoothing * jax.nn.softplus(d)
    count = jnp.sum(counted)
    metrics = {"accuracy": Mean(masked_sum(d > 0, counted), count), "margin": Mean(jnp.sum(d), count)}
    return Mean(masked_sum(cost, counted), count), metrics


def check_label_smoothing(label_smoothing: Number) -> None:
    """Refuses a Python number that is no share below one half; a traced one passes."""
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is at least 0 and below 0.5, got {label_smoothing}")
