"""Attention of a group of completions to their one prompt and to their own past."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.types import Array

# Finite, so that a query that sees nothing of one part gets weight 0 there instead of NaN.
_NEVER = -1e30


class KeyValues(NamedTuple):
    """What a query attends to; `K` key-value heads of width `h`."""

    keys: Array  # [B, P, K, h] of a prompt, [B, G, C, K, h] of completions
    values: Array


def attend(
    query: Array, own: KeyValues, own_mask: Array, prompt: KeyValues | None = None, prompt_mask: Array | None = None
) -> Array:
    """Softmax attention over the prompt and the completion's own tokens together.

        out = softmax([q k_prompt, q k_own] / sqrt(h)) [v_prompt; v_own]

    The prompt is stored once and read by the whole group in one matrix product;
    both parts share one maximum and one denominator, so that this is the softmax
    over their concatenation without concatenating.

    Args:
      query: `[B, G, S, N, h]`; head `n` reads key-value head `n // (N / K)`.
      own: keys and values `[B, G, C, K, h]`.
      own_mask: `[B, G, S, C]` bool; each query sees at least one.
      prompt: keys and values `[B, P, K, h]`, or None.
      prompt_mask: `[B, G, S, P]` bool.

    Returns:
      `[B, G, S, N, h]` in the dtype of `query`.
    """
    B, G, S, N, h = query.shape
    K = own.keys.shape[-2]
    query = (query * h**-0.5).reshape(B, G, S, K, N // K, h)
    products = {"preferred_element_type": jnp.float32}

    own_logits = jnp.einsum("bgskrh,bgckh->bgksrc", query, own.keys, **products)
    own_logits = jnp.where(own_mask[:, :, None, :, None, :], own_logits, _NEVER)
    maximum = jnp.max(own_logits, axis=-1, initial=_NEVER)  # [B, G, K, S, R]
    if prompt is not None and prompt_mask is not None:
        prompt_logits = jnp.einsum("bgskrh,bpkh->bkgsrp", query, prompt.keys, **products)
        prompt_logits = jnp.where(prompt_mask[:, None, :, :, None, :], prompt_logits, _NEVER)
        maximum = jnp.maximum(maximum, jnp.max(prompt_logits, axis=-1, initial=_NEVER).swapaxes(1, 2))
    maximum = jax.lax.stop_gradient(maximum)  # cancels in the quotient

    weights = jnp.exp(own_logits - maximum[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("bgksrc,bgckh->bgksrh", weights.astype(query.dtype), own.values, **products)
    if prompt is not None:
        weights = jnp.exp(prompt_logits - maximum.swapaxes(1, 2)[..., None])
        total += jnp.sum(weights, axis=-1).swapaxes(1, 2)
        shared = jnp.einsum("bkgsrp,bpkh->bkgsrh", weights.astype(query.dtype), prompt.values, **products)
        out += shared.swapaxes(1, 2)
    out = (out / total[..., None]).astype(query.dtype)
    return jnp.moveaxis(out, 2, 3).reshape(B, G, S, N, h)
