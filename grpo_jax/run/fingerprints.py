"""Whether a step has changed the parameters, without keeping those from before."""

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Params

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def fingerprint(params: Params) -> Array:
    """A number for each array, `[leaves]` uint32: the sum of its elements' bits, modulo 2^32.

    Of arrays that devices share it is of what the first device of this process has: no device waits for another.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return _sums([leaf.addressable_data(0) if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves])


@jax.jit
def _sums(leaves: list[Array]) -> Array:
    bits = (jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize]) for leaf in leaves)
    return jnp.array([jnp.sum(each, dtype=jnp.uint32) for each in bits], jnp.uint32)
