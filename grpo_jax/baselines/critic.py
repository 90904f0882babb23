"""A critic: values of tokens, the loss that fits them, and advantages made of them (GAE)."""

import functools

import chex
import jax
import jax.numpy as jnp

from grpo_jax.advantages import batch_normalised_advantages
from grpo_jax.baselines.heads import hidden_states, scalar
from grpo_jax.losses.contract import check_positive, check_shares, masked_sum
from grpo_jax.policies import Policy
from grpo_jax.types import Array, Number, Params, Rollout

# ------------------------------------------------------------------ rewards to advantages


def token_rewards(total: Array, mask: Array, cost: Array | None = None) -> Array:
    """The rewards of the tokens: the completion's at its last token, less what each token costs.

        r[t] = total * [t is the last token that counts] - cost[t]

    With the divergence from a reference as the cost this is the reward of InstructGPT
    (Ouyang et al. 2022, arXiv:2203.02155, equation 2), token by token.

    Args:
      total: `[B, G]` float, in reward units.
      mask: `[B, G, T]` bool.
      cost: `[B, G, T]` float; None for no cost.

    Returns:
      `[B, G, T]`, 0 where nothing counts.
    """
    chex.assert_shape(total, mask.shape[:2])
    to_come = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    rewards = jnp.where(to_come == 1, total[..., None], 0.0)
    return jnp.where(mask, rewards if cost is None else rewards - cost, 0.0)


def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: Number = 0.99, gae_lambda: Number = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16).

        delta[t] = r[t] + gamma * V[t + 1] - V[t]
        A[t]     = delta[t] + gamma * gae_lambda * A[t + 1]
        R[t]     = A[t] + V[t]

    where `t + 1` is the next token that counts. A completion ends at the last one, cut
    off or not: the value after it is 0.

    Args:
      rewards: `[B, G, T]` float, at the token that each was given for.
      values: `[B, G, T]` float, of the state before the token, in reward units.
      mask: `[B, G, T]` bool.
      gamma: the discount of a token, from 0 to 1. Work on language models mostly takes 1.
      gae_lambda: from 0, which trusts the critic, to 1, which trusts the rewards alone.

    Returns:
      Advantages and returns `[B, G, T]`, both in reward units and 0 where nothing counts.

    Raises:
      AssertionError: if the shapes differ or are not of rank 3.
      ValueError: for a gamma or gae_lambda out of range.
    """
    chex.assert_rank([rewards, values, mask], 3)
    chex.assert_equal_shape([rewards, values, mask])
    check_shares(gamma=gamma, gae_lambda=gae_lambda)

    def earlier(later: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (value_after, advantage_after), (reward, value, counted) = later, token
        advantage = reward + gamma * value_after - value + gamma * gae_lambda * advantage_after
        later = jnp.where(counted, value, value_after), jnp.where(counted, advantage, advantage_after)
        return later, jnp.where(counted, advantage, 0.0)

    by_token = jnp.moveaxis(rewards, -1, 0), jnp.moveaxis(values, -1, 0), jnp.moveaxis(mask, -1, 0)
    nothing = jnp.zeros(mask.shape[:2], jnp.result_type(rewards, values, float))
    _, advantages = jax.lax.scan(earlier, (nothing, nothing), by_token, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def whitened(advantages: Array, mask: Array) -> Array:
    """Advantages of mean 0 and deviation 1 over the tokens of the batch that count; 0 where they are all equal.

    Args:
      advantages: `[B, G, T]`.
      mask: `[B, G, T]` bool.
    """
    row = (1, -1)
    return batch_normalised_advantages(advantages.reshape(row), mask.reshape(row)).reshape(mask.shape)


# ---------------------------------------------------------------------------- the critic


@functools.partial(jax.jit, static_argnums=0)
def values(critic: Policy, params: Params, rollout: Rollout) -> Array:
    """`[B, G, T]` float32: what the critic expects before each token, from the state that predicts it; 0 on padding.

    Args:
      critic: the network, static.
      params: `{"network", "head"}`; see `heads`.
      rollout: the completions.
    """
    read = rollout.tokens[..., :-1]
    hidden = hidden_states(critic, params["network"], rollout.prompts, read, rollout.lengths)
    held = jnp.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None]
    return jnp.where(held, scalar(params["head"], hidden), 0.0)


def value_loss(values: Array, old_values: Array, returns: Array, *, epsilon: Number | None = 0.2) -> Array:
    """The squared error of the critic, clipped as the policy's ratio is.

        near = old + clip(V - old, -epsilon, epsilon)
        loss = max((V - R)^2, (near - R)^2) / 2

    A value that has moved further than `epsilon` towards its return gets no gradient.
    The clip is that of OpenAI's `ppo2`, not of the paper (arXiv:1707.06347, equation 9),
    whose squared error is `epsilon=None` without the half.

    Args:
      values: `[B, G, T]`, of the critic that learns.
      old_values: `[B, G, T]`, of the critic before the first update.
      returns: `[B, G, T]`.
      epsilon: in reward units, above 0; None does not clip.

    Returns:
      `[B, G, T]`, for an aggregate.

    Raises:
      ValueError: for an epsilon that is not above 0.
    """
    check_positive(epsilon=epsilon)
    error = (values - returns) ** 2
    if epsilon is not None:
        near = old_values + jnp.clip(values - old_values, -epsilon, epsilon)
        error = jnp.maximum(error, (near - returns) ** 2)
    return error / 2


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """`1 - Var(returns - values) / Var(returns)`, 0 where the returns do not vary."""

    def deviation(x: Array) -> Array:
        return masked_sum((x - masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)) ** 2, mask)

    whole = deviation(returns)
    return jnp.where(whole > 0, 1 - deviation(returns - values) / jnp.where(whole > 0, whole, 1.0), 0.0)
