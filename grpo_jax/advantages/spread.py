"""How far apart rewards are: masked means and deviations that do not overflow, and exactly 0 where all are equal."""

import chex
import jax.numpy as jnp

from grpo_jax.losses.contract import check_not_negative
from grpo_jax.types import Array, Number


def has_variance(rewards: Array, mask: Array) -> Array:
    """`[B]`, whether the rewards `[B, G]` of a group differ.

    By comparison: the mean of eight 1.1s is not 1.1, and that rounding would be divided by
    `eps`. A NaN does not pass for equal rewards: its update is refused.
    """
    highest = jnp.max(jnp.where(mask, rewards, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1)
    return ~(highest <= lowest)


def where_variance(rewards: Array, mask: Array, advantages: Array) -> Array:
    """The advantages, and exactly 0 in groups of equal rewards and where there is no reward."""
    return jnp.where(mask & has_variance(rewards, mask)[:, None], advantages, 0.0)


def checked(rewards: Array, mask: Array | None, *, at_least: int = 2) -> tuple[Array, Array]:
    """Rewards with 0 where there is none, and the mask; refuses groups of fewer than `at_least` completions.

    In float32 at least: the sum of a group overflows in float16.
    """
    chex.assert_rank(rewards, 2)
    chex.assert_type(rewards, float)
    if rewards.shape[1] < at_least:
        raise ValueError(f"a group needs at least {at_least} completions, got rewards of shape {rewards.shape}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    chex.assert_equal_shape([rewards, mask])
    return jnp.where(mask, jnp.asarray(rewards, jnp.promote_types(rewards.dtype, jnp.float32)), 0.0), mask


def check_deviation(ddof: int, eps: Number) -> None:
    """Refuses a `ddof` other than 0 and 1 and an `eps` below 0, which would turn advantages around."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof is 0, the population's deviation, or 1, the sample's, got {ddof}")
    check_not_negative(eps=eps)


def where_no_nan(rewards: Array, mask: Array, advantages: Array) -> Array:
    """The advantages, and NaN in groups of which a reward is NaN: a comparison takes it for a low one."""
    broken = jnp.any(mask & jnp.isnan(rewards), axis=1, keepdims=True)
    return jnp.where(mask & broken, jnp.nan, advantages)


def mean(x: Array, mask: Array, *, axis: int | None, ddof: int = 0) -> Array:
    """Over what the mask keeps, with the axis kept; 0 where it keeps nothing."""
    count = jnp.sum(mask, axis=axis, keepdims=True) - ddof
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def from_mean(x: Array, mask: Array, *, axis: int | None) -> Array:
    """`x - mean(x)`. The least is subtracted first: the sum of 1.6e7 + {0, 1, 2, 3} is not exact in float32."""
    scale = _power_of_two(x, mask, axis=axis)
    from_least = x / scale - jnp.min(jnp.where(mask, x, jnp.inf), axis=axis, keepdims=True) / scale
    from_least = jnp.where(mask, from_least, 0.0)
    return scale * jnp.where(mask, from_least - mean(from_least, mask, axis=axis), 0.0)


def root_mean_square(x: Array, mask: Array, *, axis: int | None, ddof: int = 0) -> Array:
    """`sqrt(mean(x^2))`, the deviation of what is centered, without the overflow of a square."""
    scale = _power_of_two(x, mask, axis=axis)
    return scale * jnp.sqrt(mean((x / scale) ** 2, mask, axis=axis, ddof=ddof))


def _power_of_two(x: Array, mask: Array, *, axis: int | None) -> Array:
    """A power of two near the largest absolute value, by which division is exact."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=axis, keepdims=True, where=mask, initial=0.0))
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent - 1, -100, 100))
