"""The device's part in conversations: decoding turns, and reading what comes between them into the same cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.policies import Cache, Policy, PromptCache
from grpo_jax.sampling import stopping
from grpo_jax.sampling.batch import live_columns
from grpo_jax.sampling.drawing import is_any, next_token
from grpo_jax.sampling.samplers import PolicySampler
from grpo_jax.types import Array, Params, PRNGKey


class Rows(NamedTuple):
    """The conversations at work, in the shape of the cache."""

    last: Array  # [B, G] int32, the token to be read next
    t: Array  # [B, G] int32, tokens so far
    stopping: Array | None  # [B, G] int32, what of a stop string has come
    cache: Cache


class Written(NamedTuple):
    """What was decoded at one go."""

    tokens: Array  # [B, G, T] int32
    log_probs: Array  # [B, G, T] float32
    counts: Array  # [B, G] int32
    ended: Array  # [B, G] bool, by an end token or a stop string


def decode_turns(
    policy: Policy, sampler: PolicySampler, params: Params, prompt_cache: PromptCache, lengths: Array, keys: PRNGKey,
    rows: Rows, active: Array, enough: Array, *, longest: int, width: int,
) -> tuple[Rows, Written]:  # fmt: skip
    """Decodes the `active [B, G]` conversations until `enough []` turns have ended, or `width` columns are in use.

    No turn goes on beyond `longest` tokens, and no conversation beyond `sampler.max_tokens`.
    """
    # A conversation's tokens may lie anywhere in its columns, with gaps where others were at work.
    cache = policy.compact(rows.cache, jnp.where(active, lengths - 1 + rows.t, 0))
    empty = jnp.zeros((*active.shape, longest), jnp.int32)
    written = Written(empty, empty.astype(jnp.float32), jnp.zeros_like(rows.t), jnp.zeros_like(active))
    Carry = tuple[Array, Array, Rows, Written]

    def unfinished(columns: int, carry: Carry) -> Array:
        column, going, _, _ = carry
        return (column < columns) & jnp.any(going) & (jnp.sum(active & ~going) < enough)

    def decode(columns: int, carry: Carry) -> Carry:
        column, going, rows, written = carry
        positions = jnp.where(going[..., None], (lengths - 1 + rows.t)[..., None], _nowhere(sampler, lengths))
        hidden, cache = policy.extend(
            params, rows.last[..., None], positions, prompt_cache, rows.cache, columns=columns
        )
        token, log_prob = next_token(policy, sampler, params, hidden[:, :, 0], keys, rows.t)
        state, stopped = stopping.follow(sampler.stop, rows.stopping, token)
        ended = going & (is_any(token, sampler.eos_ids) | stopped)
        place = jnp.where(going, written.counts, longest)[..., None]
        put = functools.partial(jnp.put_along_axis, axis=-1, inplace=False, mode="drop")
        written = Written(
            tokens=put(written.tokens, place, token[..., None]),
            log_probs=put(written.log_probs, place, log_prob[..., None]),
            counts=written.counts + going,
            ended=written.ended | ended,
        )
        rows = Rows(
            last=jnp.where(going, token, rows.last),
            t=rows.t + going,
            stopping=jax.tree.map(functools.partial(jnp.where, going), state, rows.stopping),
            cache=cache,
        )
        going = going & ~ended & (rows.t < sampler.max_tokens) & (written.counts < longest)
        return column + 1, going, rows, written

    column = jnp.max(jnp.where(active, rows.t, 0))
    carry = column, active, rows._replace(cache=cache), written
    for columns in live_columns(width):
        carry = jax.lax.while_loop(functools.partial(unfinished, columns), functools.partial(decode, columns), carry)
    return carry[2], carry[3]


def read_texts(
    policy: Policy, sampler: PolicySampler, params: Params, prompt_cache: PromptCache, lengths: Array, rows: Rows,
    texts: Array, counts: Array,
) -> Rows:  # fmt: skip
    """Reads what environments answered, `counts [B, G]` of `texts [B, G, S]`; 0 changes nothing of a conversation."""
    reading = jnp.concatenate([rows.last[..., None], texts[..., :-1]], axis=-1)
    places = jnp.arange(texts.shape[-1])
    positions = jnp.where(
        places < counts[..., None], lengths[..., None] - 1 + rows.t[..., None] + places, _nowhere(sampler, lengths)
    )
    _, cache = policy.extend(params, reading, positions, prompt_cache, rows.cache)
    last = jnp.take_along_axis(texts, jnp.maximum(counts - 1, 0)[..., None], axis=-1)[..., 0]
    return Rows(
        last=jnp.where(counts > 0, last, rows.last),
        t=rows.t + counts,
        stopping=None if rows.stopping is None else jnp.where(counts > 0, 0, rows.stopping),
        cache=cache,
    )


def _nowhere(sampler: PolicySampler, lengths: Array) -> Array:
    """A position `[B, G, 1]` behind all that count, which nothing looks back at, for columns that are to be dropped."""
    return (lengths - 1 + sampler.max_tokens)[..., None]
