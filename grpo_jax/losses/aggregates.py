"""Aggregates: how tokens count, `(per_token [B, G, T], mask [B, G, T]) -> Mean(sum, count)`.

Sum and count are kept apart, so that the parts of a batch add up to exactly the whole
batch's loss and gradient. Padding and prompts count nowhere.
"""

import jax.numpy as jnp

from grpo_jax.losses.contract import check_positive, masked_sum
from grpo_jax.protocols import Aggregate
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Number


def completion_mean(per_token: Array, mask: Array) -> Mean:
    """The mean over completions of each one's mean over tokens (Shao et al. 2024, arXiv:2402.03300, equation 3).

    A token of a long completion weighs less than one of a short completion. A
    completion without a token that counts is left out; `completion_mean_of_all` keeps
    it in the denominator, as TRL does.
    """
    tokens = jnp.sum(mask, axis=-1)
    means = masked_sum(per_token, mask, axis=-1) / jnp.maximum(tokens, 1)
    return Mean(jnp.sum(means), jnp.sum(tokens > 0))


def completion_mean_of_all(per_token: Array, mask: Array) -> Mean:
    """`completion_mean` over all `B * G` completions, those without a token that counts included, as in TRL."""
    total, _ = completion_mean(per_token, mask)
    return Mean(total, jnp.asarray(mask.shape[0] * mask.shape[1]))


def completion_sum(per_token: Array, mask: Array) -> Mean:
    """The mean over completions of each one's sum over tokens: a log-prob becomes that of the whole completion.

    A completion without a token that counts is left out; TRL counts it.
    """
    return Mean(masked_sum(per_token, mask), jnp.sum(jnp.any(mask, axis=-1)))


def token_mean(per_token: Array, mask: Array) -> Mean:
    """The mean over all tokens, each alike (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.3)."""
    return Mean(masked_sum(per_token, mask), jnp.sum(mask))


def prompt_mean(per_token: Array, mask: Array) -> Mean:
    """The mean over prompts of the mean over the tokens of the prompt's group.

    Every prompt weighs alike however long its completions are (ScaleRL, Khatri et al.
    2025, arXiv:2510.13786, section 3.2). A prompt without a token that counts is left
    out.
    """
    tokens = jnp.sum(mask, axis=(1, 2))
    means = masked_sum(per_token, mask, axis=(1, 2)) / jnp.maximum(tokens, 1)
    return Mean(jnp.sum(means), jnp.sum(tokens > 0))


def constant_length(max_tokens: int) -> Aggregate:
    """The sum over tokens over `max_tokens` times completions (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    The divisor knows no length, so that no completion gains by being long or short
    (section 3.2).

    Args:
      max_tokens: the limit that completions were sampled under, not the batch's width.

    Returns:
      An aggregate. A completion without a token that counts is left out of the count
      of completions; TRL counts it.

    Raises:
      ValueError: for a `max_tokens` that is not above 0.
    """
    check_positive(max_tokens=max_tokens)

    def aggregate(per_token: Array, mask: Array) -> Mean:
        completions = jnp.sum(jnp.any(mask, axis=-1)).astype(jnp.float32)  # 2^31 tokens are no int32
        return Mean(masked_sum(per_token, mask), max_tokens * completions)

    return aggregate


def per_prompt_count(count: Number) -> Aggregate:
    """The sum over tokens over `count` times prompts, a divisor that the caller chooses.

    With `count = G * max_tokens` it is Dr. GRPO's with empty completions counted, as in
    TRL.

    Raises:
      ValueError: for a `count` that is not above 0.
    """
    check_positive(count=count)

    def aggregate(per_token: Array, mask: Array) -> Mean:
        return Mean(masked_sum(per_token, mask), jnp.asarray(count * mask.shape[0], jnp.float32))

    return aggregate
