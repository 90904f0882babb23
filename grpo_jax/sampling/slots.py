"""Continuous batching: as soon as some completions have ended, others take their slots."""

import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.policies import Cache, Policy, PromptCache
from grpo_jax.sampling import routes, stopping
from grpo_jax.sampling.drawing import completion_keys, is_any, next_token
from grpo_jax.types import Array, Params, PRNGKey, Prompts, Rollout

if TYPE_CHECKING:
    from grpo_jax.sampling.samplers import PolicySampler


class _Slots(NamedTuple):
    """The state of the decoding loop; `N` slots, `B G` completions."""

    completion: Array  # [N] int32, in the slot; B G where it is idle
    t: Array  # [N] int32, its tokens so far
    last: Array  # [N] int32, the token to be read next
    stopping: Array | None  # [N] int32, what of a stop string has come
    waiting: Array  # [] int32, the first completion of the queue
    tokens: Array  # [B G, T] int32
    log_probs: Array  # [B G, T] float32
    lengths: Array  # [B G] int32
    experts: Array | None  # [B G, T, L, k] int16
    ended: Array  # [B G] bool
    cache: Cache


@functools.partial(jax.jit, static_argnums=0)
def decode_in_slots(
    policy: Policy, sampler: "PolicySampler", params: Params, prompts: Prompts, key: PRNGKey
) -> Rollout:
    """The rollout of a sampler: `sampler.slots` completions are decoded at a time, as long as others wait."""
    assert sampler.slots is not None
    G, T = sampler.group_size, sampler.max_tokens
    N = min(sampler.slots, prompts.tokens.shape[0] * G)
    B = prompts.tokens.shape[0]
    count = B * G
    params = policy.cast(params)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
    params = policy.for_decoding(params)
    keys = completion_keys(key, B, G).reshape(-1)
    last_of_prompt = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]

    def prompt_of(completion: Array) -> Array:
        return jnp.minimum(completion, count - 1) // G  # an idle slot reads along with the last

    def refill(state: _Slots) -> _Slots:
        idle = state.completion == count
        following = jnp.minimum(state.waiting + jnp.cumsum(idle) - 1, count)
        completion = jnp.where(idle, following, state.completion)
        return state._replace(
            completion=completion,
            t=jnp.where(idle, 0, state.t),
            last=jnp.where(idle, last_of_prompt[prompt_of(completion)], state.last),
            stopping=None if state.stopping is None else jnp.where(idle, 0, state.stopping),
            waiting=jnp.minimum(state.waiting + jnp.sum(idle), count),
            cache=policy.reset_rows(state.cache, idle[:, None]),
        )

    def decode(slot_prompts: PromptCache, state: _Slots) -> _Slots:
        busy = state.completion < count
        positions = prompts.lengths[prompt_of(state.completion)] - 1 + state.t
        hidden, cache, experts = routes.extend(
            policy, sampler, params, state.last[:, None, None], positions[:, None, None], slot_prompts, state.cache
        )
        slot_keys = keys[jnp.minimum(state.completion, count - 1)]
        token, log_prob = next_token(policy, sampler, params, hidden[:, 0, 0], slot_keys, state.t)
        stop_state, stopped = stopping.follow(sampler.stop, state.stopping, token)
        ended = is_any(token, sampler.eos_ids) | stopped
        # What an idle slot computes has no place and is dropped.
        return state._replace(
            completion=jnp.where(busy & ~ended & (state.t + 1 < T), state.completion, count),
            t=state.t + 1,
            last=token,
            stopping=stop_state,
            tokens=state.tokens.at[state.completion, state.t].set(token, mode="drop"),
            log_probs=state.log_probs.at[state.completion, state.t].set(log_prob, mode="drop"),
            lengths=state.lengths.at[state.completion].set(state.t + 1, mode="drop"),
            experts=jax.tree.map(
                lambda held, new: held.at[state.completion, state.t].set(new[:, 0, 0], mode="drop"),
                state.experts,
                experts,
            ),
            ended=state.ended.at[state.completion].set(ended, mode="drop"),
            cache=cache,
        )

    def decode_until(busy: int, width: int, state: _Slots) -> _Slots:
        """Until no completion waits and no more than `busy` of the slots, `width`, are at work."""

        def too_many(state: _Slots) -> Array:
            return (state.waiting < count) | (jnp.sum(state.completion < count) > busy)

        def keep_on(state: _Slots) -> Array:
            idle = jnp.sum(state.completion == count)
            return too_many(state) & ((8 * idle < width) | (state.waiting == count))

        def decode_until_some_are_idle(state: _Slots) -> _Slots:
            state = refill(state)
            slot_prompts = policy.gather_prompts(prompt_cache, prompt_of(state.completion))
            return jax.lax.while_loop(keep_on, functools.partial(decode, slot_prompts), state)

        return jax.lax.while_loop(too_many, decode_until_some_are_idle, state)

    def narrow(state: _Slots, width: int) -> _Slots:
        rows = jnp.argsort(state.completion == count)[:width]  # the slots at work come first
        return state._replace(
            completion=state.completion[rows],
            t=state.t[rows],
            last=state.last[rows],
            stopping=None if state.stopping is None else state.stopping[rows],
            cache=policy.gather_rows(state.cache, rows),
        )

    state = _Slots(
        completion=jnp.full((N,), count, jnp.int32),
        t=jnp.zeros((N,), jnp.int32),
        last=jnp.zeros((N,), jnp.int32),
        stopping=stopping.start(sampler.stop, (N,)),
        waiting=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((count, T), jnp.int32),
        log_probs=jnp.zeros((count, T), jnp.float32),
        lengths=jnp.zeros((count,), jnp.int32),
        experts=routes.start(policy, sampler, params, prompt_cache, B, (count, T)),
        ended=jnp.zeros((count,), bool),
        cache=policy.init_cache(N, 1, T),
    )
    for width, following in itertools.pairwise((*halvings(N), 0)):
        state = decode_until(following, width, narrow(state, width) if width < N else state)
    tokens, log_probs, lengths, ended = (
        x.reshape(B, G, *x.shape[1:]) for x in (state.tokens, state.log_probs, state.lengths, state.ended)
    )
    rollout = Rollout(prompts, tokens, lengths, jnp.arange(T) < lengths[..., None], log_probs, truncated=~ended)
    return rollout._replace(experts=jax.tree.map(lambda x: x.reshape(B, G, *x.shape[1:]), state.experts))


def halvings(slots: int) -> list[int]:
    """The numbers of slots, one loop after the other as completions end; down to an eighth, as each is compiled."""
    return [slots // parts for parts in (1, 2, 4, 8) if slots // parts]
