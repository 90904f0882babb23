"""A mixture of experts in place of an MLP: a router chooses a few for each token, and their outputs are weighted.

    y = sum over e in top_k(x W): weight_e * down_e(activation(gate_e(x)) * up_e(x))

Shazeer et al. 2017, arXiv:1701.06538, without noise and without a capacity: no token is dropped, so that a token's
output depends on no other token, and sampler and scorer agree. Tokens are sorted by expert, and each expert's are one
block of a grouped matrix product (`models.mixture`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.types import Array


class Experts(NamedTuple):
    """The experts of a layer."""

    number: int  # E
    per_token: int  # k
    width: int  # of an expert's MLP
    normalised: bool  # a token's weights sum to 1; else each is its share of all experts
    bias: bool = False  # of router and experts
    clip: tuple[float, float] | None = None  # (alpha, limit) of gpt-oss's clipped gate; None: activation(gate) * up


LAYERS = ("experts_gate", "experts_up", "experts_down")


def shapes(experts: Experts, D: int) -> dict[str, tuple[int, int, int]]:
    """The shapes of the kernels of a layer's experts."""
    E, width = experts.number, experts.width
    return dict(zip(LAYERS, ((E, D, width), (E, D, width), (E, width, D)), strict=True))


class Routing(NamedTuple):
    """What a router chooses for `R` tokens."""

    experts: Array  # [R, k] int32
    weights: Array  # [R, k] float32


def route(logits: Array, experts: Experts, given: Array | None = None) -> Routing:
    """The `k` experts of the largest logits `[R, E]` float32, or those given `[R, k]`, and their weights."""
    if given is None:
        chosen, indices = jax.lax.top_k(logits, experts.per_token)
    else:
        chosen, indices = jnp.take_along_axis(logits, given, axis=-1), given
    total = jax.nn.logsumexp(chosen if experts.normalised else logits, axis=-1, keepdims=True)
    return Routing(indices, jnp.exp(chosen - total))


def clipped_gate(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    """`(up + 1) * gate * sigmoid(alpha * gate)`, both limited: gpt-oss (OpenAI 2025, arXiv:2508.10925, section 2.2)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


class Grouped(NamedTuple):
    """Tokens sorted by expert."""

    rows: Array  # [R k, D]
    sizes: Array  # [E] int32, how many of the rows are an expert's
    experts: Array  # [R k] int32, each row's
    back: Array  # [R k] int32, where the choice `r k + j` is among the rows
    held: Array | None = None  # [R k] bool, whether a row's expert is among the `E`; None: all are


def group(x: Array, chosen: Array, number: int) -> Grouped:
    """Sorts copies of tokens `x [R, D]`, one for each choice `[R, k]`, by expert."""
    choices = chosen.reshape(-1)
    order = jnp.argsort(choices)
    sizes = jnp.bincount(choices, length=number).astype(jnp.int32)
    return Grouped(x[order // chosen.shape[-1]], sizes, choices[order], jnp.argsort(order))


def group_of_part(x: Array, chosen: Array, number: int, first: Array) -> Grouped:
    """As `group`, for the `number` experts from `first` on: their tokens come first, and all others are zeros."""
    beyond = (chosen < first) | (chosen >= first + number)
    sorted_rows = group(x, jnp.where(beyond, number, chosen - first), number)
    held = sorted_rows.experts < number
    own = jnp.where(held[:, None], sorted_rows.rows, 0)
    return sorted_rows._replace(rows=own, experts=jnp.minimum(sorted_rows.experts, number - 1), held=held)


def combine(outputs: Array, back: Array, weights: Array) -> Array:
    """`[R, D]` of experts' outputs `[R k, D]` in sorted order: summed in float32 by the weights `[R, k]`.

    Gathered, not scattered: sums have the same order in every run.
    """
    of_choices = outputs[back].reshape(*weights.shape, outputs.shape[-1]).astype(jnp.float32)
    return jnp.einsum("rkd,rk->rd", of_choices, weights)
