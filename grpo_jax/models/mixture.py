"""What a layer of experts computes: grouped matrix products, over codes and with adapters, too."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.models import experts, float16, grouped, lora, quantized
from grpo_jax.models.experts import Experts
from grpo_jax.types import Array, Params


def linear(x: Array, rows: experts.Grouped, leaves: Params) -> Array:
    """`x[i] @ kernel[e] + bias[e] + scale * (x[i] @ lora_a[e]) @ lora_b[e]`, with `e` the expert of row `i`; or 0.

    Args:
      x: `[R k, in]`, in the order of `rows`.
      rows: whose row each is.
      leaves: `kernel [E, in, out]`, quantised or not; `bias [E, out]` and adapters, if there are some.
    """
    kernel = quantized.dequantize(leaves["kernel"]).astype(x.dtype)
    y = grouped.product(x, kernel, rows.sizes)
    if "bias" in leaves:
        y = y + leaves["bias"].astype(x.dtype)[rows.experts]
    if lora.A in leaves:
        inner = grouped.product(x, leaves[lora.A].astype(x.dtype), rows.sizes)
        added = grouped.product(inner, leaves[lora.B].astype(x.dtype), rows.sizes)
        y = y + leaves[lora.SCALE].astype(x.dtype) * added
    # A product leaves rows without an expert as they happen to be.
    return y if rows.held is None else jnp.where(rows.held[:, None], y, 0)


class Mixed(NamedTuple):
    """What a layer of experts made of tokens."""

    rows: Array  # [R, D] float32
    experts: Array  # [R, k] int32, those that were chosen
    logits: Array  # [R, E] float32, of the router


def mixture(
    x: Array,
    weights: Params,
    settings: Experts,
    activation: Callable[[Array], Array],
    given: Array | None = None,
) -> Mixed:
    """The weighted sum of the chosen experts' outputs.

    Where experts are divided over the axis `tensor` of a mesh, each device computes the tokens of its own, and the sums
    are added up.

    Args:
      x: `[R, D]`, tokens.
      weights: `router [D, E]` and perhaps `router_bias [E]` in float32; and of each of `experts.LAYERS` what `linear`
        takes.
      settings: what the experts are.
      activation: of the gate, where it is not clipped.
      given: `[R, k]`, experts to be taken in place of the router's; their weights stay the router's.
    """
    logits = jnp.matmul(x.astype(jnp.float32), weights["router"], precision="highest")
    logits = logits + weights["router_bias"] if settings.bias else logits
    routing = experts.route(logits, settings, given)
    number = jax.tree.leaves(weights["experts_gate"]["kernel"])[0].shape[0]  # that this device has
    if number == settings.number:
        sorted_rows = experts.group(x, routing.experts, number)
    else:
        first = number * jax.lax.axis_index("tensor")
        sorted_rows = experts.group_of_part(x, routing.experts, number, first)
    gate, up = (linear(sorted_rows.rows, sorted_rows, weights[name]) for name in ("experts_gate", "experts_up"))

    def gated(gate: Array, up: Array) -> Array:
        return activation(gate) * up if settings.clip is None else experts.clipped_gate(gate, up, *settings.clip)

    inner = float16.in_float32(gated, gate, up)
    down = float16.within(linear(inner, sorted_rows, weights["experts_down"]))
    rows = experts.combine(down, sorted_rows.back, routing.weights)
    rows = rows if number == settings.number else jax.lax.psum(rows, "tensor")
    return Mixed(rows, routing.experts, logits)
