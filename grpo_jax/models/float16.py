"""Arithmetic within float16, which ends at 65504."""

from collections.abc import Callable

import jax.numpy as jnp

from grpo_jax.types import Array

LARGEST = 65504


def within(x: Array) -> Array:
    """What overflows float16 as its largest number, 65504, so that no infinity goes on; other dtypes as they are."""
    return jnp.clip(x, -LARGEST, LARGEST) if x.dtype == jnp.float16 else x


def in_float32(f: Callable[..., Array], *arrays: Array) -> Array:
    """`f(*arrays)`, of float16 in float32: products, of its derivative too, overflow where it does not."""
    if arrays[0].dtype != jnp.float16:
        return f(*arrays)
    return jnp.clip(f(*(within(x).astype(jnp.float32) for x in arrays)), -LARGEST, LARGEST).astype(jnp.float16)
