"""Any attention over the devices of a mesh: each computes its own rows and heads, and nothing is sent.

Mosaic and cuDNN kernels are calls that JAX cannot divide by itself, and what goes block by block would go through the
blocks of all devices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from grpo_jax.models import sharding
from grpo_jax.models.attention.contract import Attention, KeyValues, MaskInputs
from grpo_jax.types import Array


def over_mesh(attention: Attention, mesh: Mesh | None) -> Attention:
    """The same attention, divided by prompts, completions and heads over the devices of a mesh.

    Args:
      attention: any.
      mesh: of `sharding.mesh`; None gives the attention itself.
    """
    if mesh is None:
        return attention

    def divided(
        query: Array,
        own: KeyValues,
        prompt: KeyValues | None,
        mask_inputs: MaskInputs,
        *,
        sinks: Array | None = None,
        **options: Any,
    ) -> Array:
        B, G, _, N, _ = query.shape
        times = head_copies(mesh.shape["tensor"], N, own.keys.shape[-2])
        own, prompt = jax.tree.map(lambda x: jnp.repeat(x, times, axis=-2), (own, prompt))
        prompts, completions = sharding.rows(mesh, B, G)
        of_rows = PartitionSpec(prompts, completions)
        of_heads = PartitionSpec(prompts, completions, None, "tensor")
        of_prompt = PartitionSpec(prompts, None, "tensor")
        specs = (
            of_heads,
            of_heads,  # of keys and values alike
            of_prompt,
            jax.tree.map(lambda x: of_rows if x.ndim else PartitionSpec(), mask_inputs),
            PartitionSpec("tensor"),  # of sinks
        )

        def of_device(query: Array, own: KeyValues, prompt: Any, mask_inputs: MaskInputs, sinks: Array | None) -> Array:
            given = options if sinks is None else options | {"sinks": sinks}
            return attention(query, own, prompt, mask_inputs, **given)

        on_a_device = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=of_heads, check_vma=False)
        return on_a_device(query, own, prompt, mask_inputs, sinks)

    return divided


def head_copies(tensor: int, N: int, K: int) -> int:
    """How many copies of each of `K` key-value heads make them divide over `tensor` devices; 1 where they do.

    Raises:
      ValueError: if the `N` query heads do not divide over the devices. If they do, so do the copies over them.
    """
    if N % tensor:
        raise ValueError(
            f"{N} query heads and {K} key-value heads do not divide over tensor={tensor}: take a divisor of {N}, and "
            "more of fsdp"
        )
    return tensor // math.gcd(tensor, K)
