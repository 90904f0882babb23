"""All queries at once, prompt and own part under one softmax."""

import jax
import jax.numpy as jnp

from grpo_jax.models.attention.contract import NEVER, KeyValues, MaskInputs, completion_mask, prompt_mask
from grpo_jax.types import Array


def reference(
    query: Array,
    own: KeyValues,
    prompt: KeyValues | None,
    mask_inputs: MaskInputs,
    *,
    soft_cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """All queries at once, by two matrix products for each part; the reference for every other attention.

    The prompt is stored once and read by the whole group in one matrix product. Prompt and own part share
    one maximum and one denominator: this is the softmax over their concatenation, without concatenating.
    """
    B, G, S, N, h = query.shape
    K = own.keys.shape[-2]
    query = (query * h**-0.5).reshape(B, G, S, K, N // K, h)
    products = {"preferred_element_type": jnp.float32}

    def capped(logits: Array) -> Array:
        return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)

    own_logits = jnp.einsum("bgskrh,bgckh->bgksrc", query, own.keys, **products)
    own_logits = capped(own_logits)
    own_logits = jnp.where(completion_mask(mask_inputs)[:, :, None, :, None, :], own_logits, NEVER)
    maximum = jnp.max(own_logits, axis=-1, initial=NEVER)  # [B, G, K, S, R]
    if prompt is not None:
        prompt_logits = jnp.einsum("bgskrh,bpkh->bkgsrp", query, prompt.keys, **products)
        prompt_logits = capped(prompt_logits)
        seen = prompt_mask(mask_inputs, prompt.keys.shape[1])
        prompt_logits = jnp.where(seen[:, None, :, :, None, :], prompt_logits, NEVER)
        maximum = jnp.maximum(maximum, jnp.max(prompt_logits, axis=-1, initial=NEVER).swapaxes(1, 2))
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(K, 1, N // K)
        maximum = jnp.maximum(maximum, sinks)
    maximum = jax.lax.stop_gradient(maximum)  # cancels in the quotient

    weights = jnp.exp(own_logits - maximum[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - maximum)
    out = jnp.einsum("bgksrc,bgckh->bgksrh", weights.astype(query.dtype), own.values, **products)
    if prompt is not None:
        weights = jnp.exp(prompt_logits - maximum.swapaxes(1, 2)[..., None])
        total += jnp.sum(weights, axis=-1).swapaxes(1, 2)
        shared = jnp.einsum("bkgsrp,bpkh->bkgsrh", weights.astype(query.dtype), prompt.values, **products)
        out += shared.swapaxes(1, 2)
    out = (out / total[..., None]).astype(query.dtype)
    return jnp.moveaxis(out, 2, 3).reshape(B, G, S, N, h)
