"""Logits to tokens: the draw, and the noise that belongs to one token of one completion."""

import math
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

    By the Gumbel trick in two levels, with the noise of place `t` under each of `keys [...]`: first among `K` blocks
    of `W` tokens, then among the tokens of the block drawn.

        mass[k] = log sum_{v in block k} exp(logits[v])
        block   = argmax_k (mass[k] + noise[k])
        token   = argmax_{v in block} (logits[v] + noise[K + place of v in the block])

    These are draws of the softmax, for `K + W` numbers, some two roots of `V`, in place of one for each token. Nothing
    is summed up from block to block, so that the unlikely ones are not lost in the rounding of a sum. A vocabulary of
    fewer than 512 tokens is one block.
    """
    V = logits.shape[-1]
    if greedy:
        log_prob = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), log_prob
    token_keys = jax.vmap(jax.random.fold_in)(keys.reshape(-1), jnp.broadcast_to(t, keys.shape).reshape(-1))
    if V < 512:
        token = jax.vmap(jax.random.categorical)(token_keys, logits.reshape(-1, V)).reshape(keys.shape)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)[..., 0]
        return token.astype(jnp.int32), log_prob
    K, W = _blocks(V)
    blocks = jnp.pad(logits.reshape(-1, V), ((0, 0), (0, K * W - V)), constant_values=-jnp.inf).reshape(-1, K, W)
    most = jnp.max(blocks, axis=(1, 2))
    mass = most[:, None] + jnp.log(jnp.sum(jnp.exp(blocks - most[:, None, None]), axis=-1))
    # In its usual mode no noise is above 16.6: what is less likely than e^-16.6 would be drawn too seldom.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (K + W,), mode="high"))(token_keys)
    block = jnp.argmax(mass + noise[:, :K], axis=-1)
    of_block = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jnp.argmax(of_block + noise[:, K:], axis=-1)
    drawn = jnp.take_along_axis(of_block, place[:, None], axis=-1)[:, 0]
    # Of the masses, not of `blocks` over again: XLA would make one pass over all tokens of a sum of their sums.
    log_prob = drawn - jax.nn.logsumexp(mass, axis=-1)
    return (block * W + place).astype(jnp.int32).reshape(keys.shape), log_prob.reshape(keys.shape)


def _blocks(V: int) -> tuple[int, int]:
    """`K` blocks of `W` tokens for `V`, the last of them padded where `V` does not divide.

    `K` is the power of two near the root of `V`, or one that divides `V`, if it is not much smaller: such a number
    divides the vocabularies of most models, and over devices.
    """
    K = 2 ** (V.bit_length() // 2)
    divisor = math.gcd(V, K)
    K = divisor if 4 * divisor >= K else K
    return K, -(-V // K)


def is_any(tokens: Array, ids: tuple[int, ...]) -> Array:
    """True where a token is one of the ids; nowhere, if there are none."""
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))
