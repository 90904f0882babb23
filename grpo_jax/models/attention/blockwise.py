"""Attention a completion and head at a time, without keeping logits."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.models.attention.contract import (
    NEVER,
    KeyValues,
    MaskInputs,
    completion_mask,
    prompt_mask,
    refuse_options,
)
from grpo_jax.models.attention.joint_softmax import reference
from grpo_jax.types import Array


def blockwise(
    query: Array,
    own: KeyValues,
    prompt: KeyValues | None,
    mask_inputs: MaskInputs,
    *,
    queries: int = 512,
    **options: Any,
) -> Array:
    """One completion and key-value head after the other, `queries` at a time, by plain matrix products; for CPUs.

    XLA runs batched products there at a fraction of the speed of plain ones, and a
    block's logits stay in the processor's cache: no array grows with `S C`. The backward pass computes them again
    from the denominators of the forward pass (Dao et al. 2022, arXiv:2205.14135,
    appendix B), so that nothing is kept that grows with `S C`.
    The output and the denominators are named `attention`, for policies of `jax.checkpoint`. One block
    follows the other; over a mesh each device has its own (`over_mesh`). Soft caps and sinks are refused.
    """
    refuse_options("attention.blockwise", **options)
    B, G, S, N, h = query.shape
    K = own.keys.shape[-2]
    R = N // K
    blocks = max(1, -(-S // queries))
    width = -(-S // blocks)

    def cut(x: Array) -> Array:
        """`[B, G, S, ...]` to `[B, G, blocks, width, ...]`, the last of them filled up by queries that see nothing."""
        padding = [(0, 0)] * x.ndim
        padding[2] = (0, blocks * width - S)
        return jnp.pad(x, padding, constant_values=-1).reshape(B, G, blocks, width, *x.shape[3:])

    def by_head(x: Array) -> Array:
        """`[B, ..., K, h]` to `[B K, ..., h]`."""
        by_head = jnp.moveaxis(x, -2, 1)
        return by_head.reshape(B * K, *by_head.shape[2:])

    # The queries of the R heads that read the same keys, one head after the other.
    query = cut(query * h**-0.5).reshape(B, G, blocks, width, K, R, h).transpose(0, 4, 1, 2, 5, 3, 6)
    query = query.reshape(B * K, G, blocks, R * width, h)
    own, prompt = jax.tree.map(by_head, (own, prompt))
    if mask_inputs.window is not None:
        mask_inputs = mask_inputs._replace(window=jnp.broadcast_to(mask_inputs.window, (B, G)))
    if mask_inputs.segments is not None:
        mask_inputs = mask_inputs._replace(segments=cut(mask_inputs.segments), own_segments=mask_inputs.segments)
    mask_inputs = mask_inputs._replace(queries=cut(mask_inputs.queries))
    mask_inputs = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), mask_inputs)
    out = _blocks(query, own, prompt, mask_inputs).reshape(B, K, G, blocks, R, width, h)
    return out.transpose(0, 2, 3, 5, 1, 4, 6).reshape(B, G, blocks * width, N, h)[:, :, :S]


def auto(
    query: Array,
    own: KeyValues,
    prompt: KeyValues | None,
    mask_inputs: MaskInputs,
    **options: Any,
) -> Array:
    """`blockwise` on CPUs; `reference` elsewhere, for caps and sinks, and for single queries, small in any form."""
    if query.shape[2] <= 1 or any(option is not None for option in options.values()):
        return reference(query, own, prompt, mask_inputs, **options)
    return jax.lax.platform_dependent(query, own, prompt, mask_inputs, cpu=blockwise, default=reference)


class _Block(NamedTuple):
    """One part of what a block of queries sees."""

    held: KeyValues  # [C, h]
    mask: Array  # [S, C] bool


def _logits(query: Array, part: _Block) -> Array:
    """`[R S, C]` float32 of the queries `[R S, h]`."""
    logits = jnp.matmul(query, part.held.keys.T, preferred_element_type=jnp.float32)
    S, C = part.mask.shape
    heads = query.shape[0] // max(S, 1)
    return jnp.where(part.mask, logits.reshape(heads, S, C), NEVER).reshape(heads * S, C)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _zeros(held: KeyValues | None) -> Any:
    """To add gradients to, in float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), held)


@jax.custom_vjp
def _blocks(query: Array, own: KeyValues, prompt: KeyValues | None, mask_inputs: MaskInputs) -> Array:
    """`[H, G, blocks, R S, h]` of queries of that shape, scaled; `S` here those of a block.

    Args:
      query: `[H, G, blocks, R S, h]`, `H` the prompts' key-value heads.
      own: `[H, G, C, h]`.
      prompt: `[H, P, h]`.
      mask_inputs: with leading axes `[H, G]`, the window included; queries and segments `[H, G, blocks, S]`.
    """
    return _forward(query, own, prompt, mask_inputs)[0]


def _parts(own: KeyValues, prompt: KeyValues | None, mask_inputs: MaskInputs) -> list[_Block]:
    """What the queries of one block see."""
    parts = [_Block(own, completion_mask(mask_inputs))]
    if prompt is not None:
        parts.append(_Block(prompt, prompt_mask(mask_inputs, prompt.keys.shape[0])))
    return parts


def _forward(query: Array, own: KeyValues, prompt: KeyValues | None, mask_inputs: MaskInputs) -> tuple[Array, Any]:
    def of_head(x: Any) -> Any:
        query, own, prompt, mask_inputs = x

        def of_completion(x: Any) -> Any:
            query, own, mask_inputs = x

            def of_block(x: Any) -> Any:
                query, queries, segments = x
                parts = _parts(own, prompt, mask_inputs._replace(queries=queries, segments=segments))
                logits = [_logits(query, part) for part in parts]
                maximum = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, initial=NEVER) for x in logits])[:, None]
                weights = [jnp.exp(x - maximum) for x in logits]
                total = _sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
                out = _sum(_matmul(w, part.held.values) for w, part in zip(weights, parts, strict=True)) / total
                return out.astype(query.dtype), maximum + jnp.log(total)

            return jax.lax.map(of_block, (query, mask_inputs.queries, mask_inputs.segments))

        return jax.lax.map(of_completion, (query, own, mask_inputs))

    out, normaliser = jax.lax.map(of_head, (query, own, prompt, mask_inputs))
    out, normaliser = checkpoint_name(out, "attention"), checkpoint_name(normaliser, "attention")
    return out, (query, own, prompt, mask_inputs, out, normaliser)


def _backward(kept: Any, cotangent: Array) -> Any:
    def of_head(x: Any) -> Any:
        (query, own, prompt, mask_inputs, out, normaliser), cotangent = x

        def of_completion(of_prompt: Any, x: Any) -> Any:
            query, own, mask_inputs, out, normaliser, cotangent = x

            def of_block(totals: Any, x: Any) -> Any:
                query, queries, segments, out, normaliser, cotangent = x
                delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1, keepdims=True)

                def of_part(part: _Block) -> tuple[Array, KeyValues]:
                    weights = jnp.exp(_logits(query, part) - normaliser)
                    of_logits = weights * (_matmul(cotangent, part.held.values.T) - delta)
                    return _matmul(of_logits, part.held.keys), KeyValues(
                        _matmul(of_logits.T, query), _matmul(weights.T, cotangent)
                    )

                parts = _parts(own, prompt, mask_inputs._replace(queries=queries, segments=segments))
                of_query, of_held = zip(*map(of_part, parts), strict=True)
                totals = jax.tree.map(jnp.add, totals, of_held if prompt is not None else (*of_held, None))
                return totals, _sum(of_query)

            each = query, mask_inputs.queries, mask_inputs.segments, out, normaliser, cotangent
            (of_own, of_prompt), of_query = jax.lax.scan(of_block, (_zeros(own), of_prompt), each)
            return of_prompt, (of_query, of_own)

        each = query, own, mask_inputs, out, normaliser, cotangent
        of_prompt, (of_query, of_own) = jax.lax.scan(of_completion, _zeros(prompt), each)
        cast = functools.partial(jax.tree.map, lambda g, x: g.astype(x.dtype))
        return cast(of_query, query), cast(of_own, own), cast(of_prompt, prompt)

    of_query, of_own, of_prompt = jax.lax.map(of_head, (kept, cotangent))
    return of_query, of_own, of_prompt, None


_blocks.defvjp(_forward, _backward)
