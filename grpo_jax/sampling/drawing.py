"""Logits to tokens: the draw, and the noise that belongs to one token of one completion."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from grpo_jax.policies import Policy
from grpo_jax.truncation import truncate
from grpo_jax.types import Array, Params, PRNGKey

if TYPE_CHECKING:
    from grpo_jax.sampling.samplers import PolicySampler


def next_token(
    policy: Policy, sampler: "PolicySampler", params: Params, hidden: Array, keys: PRNGKey, t: Array
) -> tuple[Array, Array]:
    """Draws the token at place `t` from each of `hidden [..., D]`; returns tokens and log-probs `[...]`."""
    logits = policy.unembed(params, hidden).astype(jnp.float32) / sampler.temperature
    return draw(keys, t, truncate(logits, sampler.truncation), sampler.greedy)


def completion_keys(key: PRNGKey, B: int, G: int) -> PRNGKey:
    """`[B, G]` keys, each of its own prompt and completion whatever `B` and `G` are."""
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(prompt_keys, jnp.arange(G))


def draw(keys: PRNGKey, t: Array, logits: Array, greedy: bool) -> tuple[Array, Array]:
    """Draws one token from each of `logits [..., V]`; returns the tokens and their log-probs.

    By the Gumbel trick, without a sort, with the noise of place `t` under each of `keys [...]`.
    """
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        token_keys = jax.vmap(jax.random.fold_in)(keys.reshape(-1), jnp.broadcast_to(t, keys.shape).reshape(-1))
        token = jax.vmap(jax.random.categorical)(token_keys, logits.reshape(-1, logits.shape[-1])).reshape(keys.shape)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)[..., 0]


def is_any(tokens: Array, ids: tuple[int, ...]) -> Array:
    """True where a token is one of the ids; nowhere, if there are none."""
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))
