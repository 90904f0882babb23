"""Decoding of all completions of a batch together."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.policies import Cache, Policy
from grpo_jax.sampling import routes, stopping
from grpo_jax.sampling.drawing import completion_keys, is_any, next_token
from grpo_jax.types import Array, Params, PRNGKey, Prompts, Rollout

if TYPE_CHECKING:
    from grpo_jax.sampling.samplers import PolicySampler


class _Decoding(NamedTuple):
    """The state of the decoding loop."""

    t: Array  # [] int32
    last: Array  # [B, G] int32, the token to be read next
    ended: Array  # [B, G] bool
    tokens: Array  # [B, G, T] int32
    log_probs: Array  # [B, G, T] float32
    lengths: Array  # [B, G] int32
    experts: Array | None  # [B, G, T, L, k] int16
    stopping: Array | None  # [B, G] int32, what of a stop string has come
    cache: Cache


@functools.partial(jax.jit, static_argnums=0)
def decode_together(
    policy: Policy, sampler: "PolicySampler", params: Params, prompts: Prompts, key: PRNGKey
) -> Rollout:
    """The rollout of a sampler: all completions are decoded together, until every one of them has ended."""
    G, T = sampler.group_size, sampler.max_tokens
    B = prompts.tokens.shape[0]
    params = policy.cast(params)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
    params = policy.for_decoding(params)
    keys = completion_keys(key, B, G)

    def unfinished(columns: int, state: _Decoding) -> Array:
        return (state.t < columns) & ~jnp.all(state.ended)

    def decode(columns: int, state: _Decoding) -> _Decoding:
        positions = jnp.broadcast_to(prompts.lengths[:, None] - 1 + state.t, (B, G))
        hidden, cache, experts = routes.extend(
            policy, sampler, params, state.last[..., None], positions[..., None], prompt_cache, state.cache,
            columns=columns,
        )  # fmt: skip
        token, log_prob = next_token(policy, sampler, params, hidden[:, :, 0], keys, state.t)
        token = jnp.where(state.ended, 0, token)
        stop_state, stopped = stopping.follow(sampler.stop, state.stopping, token)
        return _Decoding(
            t=state.t + 1,
            last=token,
            ended=state.ended | is_any(token, sampler.eos_ids) | stopped,
            tokens=state.tokens.at[:, :, state.t].set(token),
            log_probs=state.log_probs.at[:, :, state.t].set(jnp.where(state.ended, 0.0, log_prob)),
            lengths=state.lengths + ~state.ended,
            experts=jax.tree.map(lambda held, new: held.at[:, :, state.t].set(new[:, :, 0]), state.experts, experts),
            stopping=stop_state,
            cache=cache,
        )

    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
    state = _Decoding(
        t=jnp.zeros((), jnp.int32),
        last=jnp.broadcast_to(last, (B, G)),
        ended=jnp.zeros((B, G), bool),
        tokens=jnp.zeros((B, G, T), jnp.int32),
        log_probs=jnp.zeros((B, G, T), jnp.float32),
        lengths=jnp.zeros((B, G), jnp.int32),
        experts=routes.start(policy, sampler, params, prompt_cache, B, (B, G, T)),
        stopping=stopping.start(sampler.stop, (B, G)),
        cache=policy.init_cache(B, G, T),
    )
    for columns in live_columns(T):
        state = jax.lax.while_loop(functools.partial(unfinished, columns), functools.partial(decode, columns), state)
    mask = jnp.arange(T) < state.lengths[..., None]
    rollout = Rollout(prompts, state.tokens, state.lengths, mask, state.log_probs, truncated=~state.ended)
    return rollout._replace(experts=state.experts)


def live_columns(T: int, first: int = 128) -> list[int]:
    """How far the cache is looked at, one loop after the other: doubled whenever the completions have filled it."""
    widths = [first]
    while widths[-1] < T:
        widths.append(2 * widths[-1])
    return [min(width, T) for width in widths]
