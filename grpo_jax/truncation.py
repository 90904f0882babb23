"""Which tokens may be drawn: top-k, top-p and min-p, the same where tokens are drawn and where they are scored."""

import dataclasses

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncation:
    """The tokens that are kept, in the order of the fields; a sampler's is its `truncation`.

    A pytree whose leaves are `top_p` and `min_p`, so that they may be traced.

    Raises:
      ValueError: for a setting out of range; traced ones cannot be checked and pass.
    """

    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})  # the likeliest
    top_p: Number | None = None  # the likeliest that together reach it, always at least one
    min_p: Number | None = None  # those at least so many times as likely as the likeliest

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}; None keeps every token")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if isinstance(value, int | float) and not 0 < value <= 1:
                raise ValueError(f"{name} is above 0 and at most 1, got {value}; None keeps every token")


def truncate(logits: Array, truncation: Truncation | None) -> Array:
    """Sets to -inf the logits `[..., V]` of the tokens that are not kept; None keeps all of them."""
    if truncation is None:
        return logits
    top_k, top_p, min_p = truncation.top_k, truncation.top_p, truncation.min_p
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(descending)
        before = jnp.cumsum(probs, axis=-1) - probs  # of the likelier tokens; 0 for the likeliest, which stays
        within = (before < top_p) | (top_p >= 1)  # in float32 the sum of many reaches 1 before the last of them
        least = jnp.min(jnp.where(within, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def replay(logits: Array, tokens: Array, truncation: Truncation) -> tuple[Array, Array]:
    """What of `logits [N, V]` is kept, the token that was drawn in any case, and whether that was not kept: `[N]`.

    Which tokens are kept is a constant: the gradient is that of the renormalised distribution on them.
    """
    kept = truncate(jax.lax.stop_gradient(logits), truncation) > -jnp.inf
    drawn = jnp.arange(logits.shape[-1]) == tokens[:, None]
    outside = ~jnp.any(kept & drawn, axis=-1)
    return jnp.where(kept | drawn, logits, -jnp.inf), outside
