"""Attention of a group of completions to their one prompt and to their own past.

An attention is a function

    (query [B, G, S, N, h], own, own_mask [B, G, S, C], prompt=None, prompt_mask [B, G, S, P]) -> [B, G, S, N, h]

    out = softmax([q k_prompt, q k_own] / sqrt(h)) [v_prompt; v_own]

in the dtype of the query. Head `n` reads key-value head `n // (N / K)`; each query sees
at least one of its own keys. Prompt and own part share one maximum and one denominator: this is the
softmax over their concatenation, without concatenating.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.types import Array

# Finite, so that a query that sees nothing of one part gets weight 0 there instead of NaN.
_NEVER = -1e30


class KeyValues(NamedTuple):
    """What a query attends to; `K` key-value heads of width `h`."""

    keys: Array  # [B, P, K, h] of a prompt, [B, G, C, K, h] of completions
    values: Array


Attention = Callable[[Array, KeyValues, Array, KeyValues | None, Array | None], Array]


def joint(
    query: Array, own: KeyValues, own_mask: Array, prompt: KeyValues | None = None, prompt_mask: Array | None = None
) -> Array:
    """All queries at once, by two matrix products for each part; the reference for every other attention.

    The prompt is stored once and read by the whole group in one matrix product.
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


def blockwise(
    query: Array, own: KeyValues, own_mask: Array, prompt: KeyValues | None = None, prompt_mask: Array | None = None
) -> Array:
    """One completion and key-value head after the other, by plain matrix products; for CPUs.

    XLA runs batched products there at a fraction of the speed of plain ones, and a
    block's logits stay in the processor's cache. The backward pass computes them again
    from the denominators of the forward pass (Dao et al. 2022, arXiv:2205.14135,
    appendix B), so that no logits are kept; of what grows with `S C` there are the masks alone.
    The output and the denominators are named `attention`, for policies of `jax.checkpoint`. One block
    follows the other on one device: with `B` over several, use `joint`.
    """
    B, G, S, N, h = query.shape
    K = own.keys.shape[-2]
    R = N // K

    def by_head(x: Array) -> Array:
        """`[B, ..., K, h]` to `[B K, ..., h]`."""
        by_head = jnp.moveaxis(x, -2, 1)
        return by_head.reshape(B * K, *by_head.shape[2:])

    # The queries of the R heads that read the same keys, one head after the other.
    query = (query * h**-0.5).reshape(B, G, S, K, R, h).transpose(0, 3, 1, 4, 2, 5).reshape(B * K, G, R * S, h)
    own_mask, prompt_mask = jax.tree.map(lambda mask: jnp.repeat(mask, K, axis=0), (own_mask, prompt_mask))
    own, prompt = jax.tree.map(by_head, (own, prompt))
    out = _blocks(query, own, own_mask, prompt, prompt_mask)
    return out.reshape(B, K, G, R, S, h).transpose(0, 2, 4, 1, 3, 5).reshape(B, G, S, N, h)


def by_platform(
    query: Array, own: KeyValues, own_mask: Array, prompt: KeyValues | None = None, prompt_mask: Array | None = None
) -> Array:
    """`blockwise` on CPUs, `joint` elsewhere and for single queries, whose products are small in any form."""
    if query.shape[2] <= 1:
        return joint(query, own, own_mask, prompt, prompt_mask)
    return jax.lax.platform_dependent(query, own, own_mask, prompt, prompt_mask, cpu=blockwise, default=joint)


class _Block(NamedTuple):
    """One part of what a block of queries sees."""

    held: KeyValues  # [C, h]
    mask: Array  # [S, C] bool


def _logits(query: Array, part: _Block) -> Array:
    """`[R S, C]` float32 of the queries `[R S, h]`."""
    logits = jnp.matmul(query, part.held.keys.T, preferred_element_type=jnp.float32)
    S, C = part.mask.shape
    heads = query.shape[0] // max(S, 1)
    return jnp.where(part.mask, logits.reshape(heads, S, C), _NEVER).reshape(heads * S, C)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


@jax.custom_vjp
def _blocks(
    query: Array, own: KeyValues, own_mask: Array, prompt: KeyValues | None, prompt_mask: Array | None
) -> Array:
    """`[H, G, R S, h]` of queries of that shape, scaled.

    Args:
      query: `[H, G, R S, h]`, `H` the prompts' key-value heads.
      own: `[H, G, C, h]`.
      own_mask: `[H, G, S, C]`.
      prompt: `[H, P, h]`.
      prompt_mask: `[H, G, S, P]`.
    """
    return _forward(query, own, own_mask, prompt, prompt_mask)[0]


def _forward(
    query: Array, own: KeyValues, own_mask: Array, prompt: KeyValues | None, prompt_mask: Array | None
) -> tuple[Array, Any]:
    def of_head(x: Any) -> Any:
        query, own, own_mask, prompt, prompt_mask = x

        def of_completion(x: Any) -> Any:
            query, own, own_mask, prompt_mask = x
            parts = [_Block(own, own_mask)] + ([] if prompt is None else [_Block(prompt, prompt_mask)])
            logits = [_logits(query, part) for part in parts]
            maximum = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, initial=_NEVER) for x in logits])[:, None]
            weights = [jnp.exp(x - maximum) for x in logits]
            total = _sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
            out = _sum(_matmul(w, part.held.values) for w, part in zip(weights, parts, strict=True)) / total
            return out.astype(query.dtype), maximum + jnp.log(total)

        return jax.lax.map(of_completion, (query, own, own_mask, prompt_mask))

    out, normaliser = jax.lax.map(of_head, (query, own, own_mask, prompt, prompt_mask))
    out, normaliser = checkpoint_name(out, "attention"), checkpoint_name(normaliser, "attention")
    return out, (query, own, own_mask, prompt, prompt_mask, out, normaliser)


def _backward(kept: Any, cotangent: Array) -> Any:
    def of_head(x: Any) -> Any:
        (query, own, own_mask, prompt, prompt_mask, out, normaliser), cotangent = x

        def of_completion(total: Any, x: Any) -> Any:
            query, own, own_mask, prompt_mask, out, normaliser, cotangent = x
            delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1, keepdims=True)

            def of_part(part: _Block) -> tuple[Array, KeyValues]:
                weights = jnp.exp(_logits(query, part) - normaliser)
                of_logits = weights * (_matmul(cotangent, part.held.values.T) - delta)
                return _matmul(of_logits, part.held.keys), KeyValues(
                    _matmul(of_logits.T, query), _matmul(weights.T, cotangent)
                )

            of_query, of_own = of_part(_Block(own, own_mask))
            if prompt is not None:
                more, of_prompt = of_part(_Block(prompt, prompt_mask))
                of_query, total = of_query + more, jax.tree.map(jnp.add, total, of_prompt)
            return total, (of_query, of_own)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), prompt)
        each = query, own, own_mask, prompt_mask, out, normaliser, cotangent
        of_prompt, (of_query, of_own) = jax.lax.scan(of_completion, zeros, each)
        cast = functools.partial(jax.tree.map, lambda g, x: g.astype(x.dtype))
        return cast(of_query, query), cast(of_own, own), cast(of_prompt, prompt)

    of_query, of_own, of_prompt = jax.lax.map(of_head, (kept, cotangent))
    return of_query, of_own, None, of_prompt, None


_blocks.defvjp(_forward, _backward)
