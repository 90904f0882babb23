"""What an attention is, and what a query may see."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from grpo_jax.types import Array

# Finite, so that a query that sees nothing of one part gets weight 0 there instead of NaN.
NEVER = -1e30


class KeyValues(NamedTuple):
    """What a query attends to; `K` key-value heads of width `h`."""

    keys: Array  # [B, P, K, h] of a prompt, [B, G, C, K, h] of completions
    values: Array


class MaskInputs(NamedTuple):
    """What each query may see: by positions, never by columns.

    A query sees the prompt's tokens and its own completion's at its own and earlier
    positions; with segments those of its segment alone, with a window the last `window` of all these. Where segments
    are those of a tree, each goes on after tokens of earlier ones: a query of segment `s` sees keys of the segments
    from which `s` descends, `segments[key] <= s <= descendants[key]`.
    """

    queries: Array  # [B, G, S] int32 positions
    own: Array  # [B, G, C] int32 positions of the own keys, -1 where a column is empty
    prompt: Array | None = None  # [B, G] int32, how many tokens the prompt's keys hold
    segments: Array | None = None  # [B, G, S] int32, of packed completions; the own keys are then the queries' own
    window: Array | None = None  # [] int32
    own_segments: Array | None = None  # [B, G, C] int32, of the own keys where those are not the queries' own
    descendants: Array | None = None  # [B, G, C] int32, the last segment that goes on after an own key; its own if None


# (query, own, prompt or None, mask_inputs), and `soft_cap=` or `sinks=` where a model has them.
Attention = Callable[..., Array]


def refuse_options(form: str, *, soft_cap: float | None = None, sinks: Array | None = None) -> None:
    """Says what to take where a form of attention has no soft cap and no sinks.

    Raises:
      ValueError: if the model has one of them.
    """
    if sinks is not None:
        raise ValueError(
            f"{form} has no sinks of the attention, which this model has: take attention=attention.auto or "
            "attention.reference"
        )
    if soft_cap is not None:
        raise ValueError(
            f"{form} has no soft cap of the attention's logits, which this model has ({soft_cap}): take "
            "attention=attention.auto or attention.reference"
        )


def completion_mask(mask_inputs: MaskInputs) -> Array:
    """`[B, G, S, C]` bool: which of its own keys a query sees; leading axes may be missing."""
    queries, own = mask_inputs.queries[..., :, None], mask_inputs.own[..., None, :]
    seen = (own <= queries) & (own >= 0)
    if mask_inputs.segments is not None:
        of_queries, of_keys = mask_inputs.segments[..., :, None], mask_inputs.segments[..., None, :]
        if mask_inputs.own_segments is not None:
            of_keys = mask_inputs.own_segments[..., None, :]
        last = of_keys if mask_inputs.descendants is None else mask_inputs.descendants[..., None, :]
        seen &= (of_keys <= of_queries) & (of_queries <= last)
    if mask_inputs.window is not None:
        seen &= queries - own < mask_inputs.window[..., None, None]
    return seen


def prompt_mask(mask_inputs: MaskInputs, P: int) -> Array:
    """`[B, G, S, P]` bool: which of the prompt's keys a query sees; leading axes may be missing."""
    assert mask_inputs.prompt is not None
    columns = jnp.arange(P)
    seen = jnp.broadcast_to(columns < mask_inputs.prompt[..., None, None], (*mask_inputs.queries.shape, P))
    if mask_inputs.window is not None:
        seen &= mask_inputs.queries[..., :, None] - columns < mask_inputs.window[..., None, None]
    return seen
