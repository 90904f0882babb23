"""What the parts of an objective hand to each other.

Axes: `B` prompts, `G` completions in a group, `T` completion tokens.
"""

import chex
import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Array, Number


def masked_sum(x: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The sum where `mask` is True, in float32 at least; `where`, not `x * mask`: NaN * 0 is NaN."""
    return jnp.sum(widened(jnp.where(mask, x, 0.0)), axis=axis)


def widened(x: Array) -> Array:
    """In float32 at least: in 16 bits e^20 is no number, and a sum over tokens has two digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_ratio(log_probs: Array, other_log_probs: Array) -> Array:
    """`log_probs - other_log_probs`; 0 where both are -inf: two policies that agree on a token of probability 0."""
    both = (log_probs == -jnp.inf) & (other_log_probs == -jnp.inf)
    return widened(jnp.where(both, 0.0, log_probs)) - widened(jnp.where(both, 0.0, other_log_probs))


def difference(log_probs: Array, other_log_probs: Array, mask: Array) -> Array:
    """`log_ratio` where `mask` is True, else 0: padding may hold anything, which no exponential may see."""
    chex.assert_equal_shape([log_probs, other_log_probs, mask])
    return log_ratio(jnp.where(mask, log_probs, 0.0), jnp.where(mask, other_log_probs, 0.0))


def weighted(weight: Number, x: Array) -> Array:
    """`weight * x`; 0 where the weight is 0, also for an infinite `x`, such as the log-prob of a token that is cut."""
    return weight * jnp.where(weight == 0, 0.0, x)


def per_token(advantages: Array) -> Array:
    """`[B, G]` to `[B, G, 1]`, which broadcasts; `[B, G, T]` as it is."""
    if advantages.ndim not in (2, 3):
        raise ValueError(f"advantages are [B, G] or [B, G, T], got shape {advantages.shape}")
    return advantages[..., None] if advantages.ndim == 2 else advantages


def check_positive(**settings: Number | None) -> None:
    """Refuses numbers of Python and NumPy that are not above 0; traced ones cannot be looked at and pass."""
    for name, setting in settings.items():
        if isinstance(setting, int | float | np.number) and not setting > 0:
            raise ValueError(f"{name} is above 0, got {setting}")


def check_not_negative(**settings: Number | None) -> None:
    """Refuses numbers of Python and NumPy that are below 0; traced ones pass."""
    for name, setting in settings.items():
        if isinstance(setting, int | float | np.number) and not setting >= 0:
            raise ValueError(f"{name} is at least 0, got {setting}")


def check_shares(**settings: Number) -> None:
    """Refuses numbers of Python and NumPy outside 0 to 1; traced ones pass."""
    for name, setting in settings.items():
        if isinstance(setting, int | float | np.number) and not 0 <= setting <= 1:
            raise ValueError(f"{name} is from 0 to 1, got {setting}")
