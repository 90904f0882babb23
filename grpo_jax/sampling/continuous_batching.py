"""Sampling in slots: as soon as a completion ends, another takes its place."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.policies import Cache, Policy, PromptCache
from grpo_jax.sampling import check_settings, completion_keys, draw, is_any, truncate
from grpo_jax.types import Array, Params, PRNGKey, Prompts, Rollout


def sample_in_slots(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: PRNGKey,
    *,
    slots: int,
    group_size: int,
    max_tokens: int,
    eos_ids: Sequence[int],
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
    greedy: bool = False,
) -> Rollout:
    """What `sampling.sample` draws, by a few slots that are refilled from the queue of all completions.

    `sample` decodes until the longest of its `B G` completions ends, and computes the others
    along. Here no slot idles for long while completions wait: whenever an eighth of the slots are
    idle, they take the next completions; when none waits, the slots are halved as work runs out.
    The noise of a token belongs to its completion, so that the number of slots changes neither
    tokens nor, but for rounding, log-probs.

    It pays where lengths differ much and the batch is larger than what the device
    decodes at once. Each slot holds a copy of its prompt's keys and values, which `sample` stores once for a
    group. As a step's sampler:

        make_collect(policy, sampler=functools.partial(sample_in_slots, slots=64), ...)

    Args:
      policy: as in `sample`.
      params: as in `sample`.
      prompts: as in `sample`.
      key: as in `sample`.
      slots: completions that are decoded at a time, as long as others wait.
      group_size: as in `sample`, and so are the others.
      max_tokens: `T`, the longest completion.
      eos_ids: tokens that end a completion.
      temperature: divides the logits; above 0.
      top_k: see `sample`.
      top_p: see `sample`.
      min_p: see `sample`.
      greedy: take the likeliest token instead of drawing.

    Raises:
      ValueError: for a setting out of range.
    """
    check_settings(group_size, max_tokens, temperature, top_k, top_p, min_p)
    if slots < 1:
        raise ValueError(f"slots is at least 1, got {slots}")
    slots = min(slots, prompts.tokens.shape[0] * group_size)
    return _sample(
        policy, slots, group_size, max_tokens, tuple(eos_ids), top_k, greedy, params, prompts, key, temperature,
        top_p, min_p,
    )  # fmt: skip


class _Slots(NamedTuple):
    """The state of the decoding loop; `N` slots, `B G` completions."""

    completion: Array  # [N] int32, in the slot; B G where it is idle
    t: Array  # [N] int32, its tokens so far
    last: Array  # [N] int32, the token to be read next
    waiting: Array  # [] int32, the first completion of the queue
    tokens: Array  # [B G, T] int32
    log_probs: Array  # [B G, T] float32
    lengths: Array  # [B G] int32
    ended: Array  # [B G] bool
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _sample(
    policy: Policy,
    N: int,
    G: int,
    T: int,
    eos_ids: tuple[int, ...],
    top_k: int | None,
    greedy: bool,
    params: Params,
    prompts: Prompts,
    key: PRNGKey,
    temperature: float | Array,
    top_p: float | Array | None,
    min_p: float | Array | None,
) -> Rollout:
    B = prompts.tokens.shape[0]
    count = B * G
    params = policy.cast(params)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
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
            waiting=jnp.minimum(state.waiting + jnp.sum(idle), count),
            cache=policy.forget(state.cache, idle[:, None]),
        )

    def decode(of_slots: PromptCache, state: _Slots) -> _Slots:
        busy = state.completion < count
        positions = prompts.lengths[prompt_of(state.completion)] - 1 + state.t
        hidden, cache = policy.extend(
            params, state.last[:, None, None], positions[:, None, None], of_slots, state.cache
        )
        logits = policy.unembed(params, hidden[:, 0, 0]).astype(jnp.float32) / temperature
        of_completion = keys[jnp.minimum(state.completion, count - 1)]
        token, log_prob = draw(of_completion, state.t, truncate(logits, top_k, top_p, min_p), greedy)
        ended = is_any(token, eos_ids)
        # What an idle slot computes has no place and is dropped.
        return state._replace(
            completion=jnp.where(busy & ~ended & (state.t + 1 < T), state.completion, count),
            t=state.t + 1,
            last=token,
            tokens=state.tokens.at[state.completion, state.t].set(token, mode="drop"),
            log_probs=state.log_probs.at[state.completion, state.t].set(log_prob, mode="drop"),
            lengths=state.lengths.at[state.completion].set(state.t + 1, mode="drop"),
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
            of_slots = policy.take(prompt_cache, prompt_of(state.completion))
            return jax.lax.while_loop(keep_on, functools.partial(decode, of_slots), state)

        return jax.lax.while_loop(too_many, decode_until_some_are_idle, state)

    def narrow(state: _Slots, width: int) -> _Slots:
        rows = jnp.argsort(state.completion == count)[:width]  # the slots at work come first
        return state._replace(
            completion=state.completion[rows],
            t=state.t[rows],
            last=state.last[rows],
            cache=policy.keep(state.cache, rows),
        )

    state = _Slots(
        completion=jnp.full((N,), count, jnp.int32),
        t=jnp.zeros((N,), jnp.int32),
        last=jnp.zeros((N,), jnp.int32),
        waiting=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((count, T), jnp.int32),
        log_probs=jnp.zeros((count, T), jnp.float32),
        lengths=jnp.zeros((count,), jnp.int32),
        ended=jnp.zeros((count,), bool),
        cache=policy.init_cache(N, 1, T),
    )
    for width, following in itertools.pairwise((*halvings(N), 0)):
        state = decode_until(following, width, narrow(state, width) if width < N else state)
    tokens, log_probs, lengths, ended = (
        x.reshape(B, G, *x.shape[1:]) for x in (state.tokens, state.log_probs, state.lengths, state.ended)
    )
    return Rollout(prompts, tokens, lengths, jnp.arange(T) < lengths[..., None], log_probs, truncated=~ended)


def halvings(slots: int) -> list[int]:
    """How many slots are decoded, one loop after the other as work runs out; down to an eighth, as each is compiled."""
    return [slots // parts for parts in (1, 2, 4, 8) if slots // parts]
