"""Prompts to rollouts: one jitted program that draws a group of completions for each prompt."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.policies import Cache, Policy
from grpo_jax.types import Array, Params, PRNGKey, Prompts, Rollout


def sample(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: PRNGKey,
    *,
    group_size: int,
    max_tokens: int,
    eos_ids: Sequence[int],
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
    greedy: bool = False,
) -> Rollout:
    """Draws `group_size` completions for each prompt.

        token[t] ~ truncate(softmax(logits[t] / temperature))

    Each prompt is read once and its cache is shared by its group; decoding stops
    when every completion has ended. The noise of a token depends on `key`, the
    prompt's place in the batch, the completion's place in the group and `t`, and
    on nothing else: neither the group's size nor the batch's changes it.

    Args:
      policy: the network, static.
      params: its parameters; cast once to the dtypes that the network computes in.
      prompts: `B` prompts.
      key: the noise; the same key gives the same completions.
      group_size: `G`, completions of each prompt.
      max_tokens: `T`, the longest completion, its end-of-sequence token included.
      eos_ids: tokens that end a completion; all of them, where a model has several.
      temperature: divides the logits; above 0.
      top_k: keep the `top_k` most likely tokens (Fan et al. 2018, arXiv:1805.04833).
      top_p: keep the most likely tokens that together reach `top_p` (Holtzman et al.
        2019, arXiv:1904.09751), always at least one.
      min_p: keep tokens at least `min_p` times as likely as the likeliest (Nguyen et
        al. 2024, arXiv:2407.01082).
      greedy: take the likeliest token instead of drawing.

    Returns:
      A rollout. Its log-probs are those of the distribution that was drawn from, the
      truncated one under `top_k`, `top_p` or `min_p`, renormalised: `scoring.score`,
      which knows no truncation, gives lower ones there. Under `greedy`, whose own
      log-probs would all be 0, they are those of the distribution passed over.

    Raises:
      ValueError: for a setting out of range.
    """
    check_settings(group_size, max_tokens, temperature, top_k, top_p, min_p)
    return _sample(
        policy, group_size, max_tokens, tuple(eos_ids), top_k, greedy, params, prompts, key, temperature, top_p, min_p
    )


def check_settings(
    group_size: int,
    max_tokens: int,
    temperature: float | Array,
    top_k: int | None,
    top_p: float | Array | None,
    min_p: float | Array | None,
) -> None:
    """Refuses settings out of range; traced ones cannot be looked at and pass."""
    if group_size < 1 or max_tokens < 1:
        raise ValueError(f"group_size and max_tokens are at least 1, got {group_size} and {max_tokens}")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature is above 0, got {temperature}; for the likeliest token pass greedy=True")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is at least 1, got {top_k}; None keeps every token")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if isinstance(value, int | float) and not 0 < value <= 1:
            raise ValueError(f"{name} is above 0 and at most 1, got {value}; None keeps every token")


class _Decoding(NamedTuple):
    """The state of the decoding loop."""

    t: Array  # [] int32
    last: Array  # [B, G] int32, the token to be read next
    ended: Array  # [B, G] bool
    tokens: Array  # [B, G, T] int32
    log_probs: Array  # [B, G, T] float32
    lengths: Array  # [B, G] int32
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _sample(
    policy: Policy,
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
    params = policy.cast(params)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
    keys = completion_keys(key, B, G)

    def unfinished(columns: int, state: _Decoding) -> Array:
        return (state.t < columns) & ~jnp.all(state.ended)

    def decode(columns: int, state: _Decoding) -> _Decoding:
        positions = jnp.broadcast_to(prompts.lengths[:, None] - 1 + state.t, (B, G))
        hidden, cache = policy.extend(
            params, state.last[..., None], positions[..., None], prompt_cache, state.cache, columns=columns
        )
        logits = policy.unembed(params, hidden[:, :, 0]).astype(jnp.float32) / temperature
        token, log_prob = draw(keys, state.t, truncate(logits, top_k, top_p, min_p), greedy)
        token = jnp.where(state.ended, 0, token)
        return _Decoding(
            t=state.t + 1,
            last=token,
            ended=state.ended | is_any(token, eos_ids),
            tokens=state.tokens.at[:, :, state.t].set(token),
            log_probs=state.log_probs.at[:, :, state.t].set(jnp.where(state.ended, 0.0, log_prob)),
            lengths=state.lengths + ~state.ended,
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
        cache=policy.init_cache(B, G, T),
    )
    for columns in live_columns(T):
        state = jax.lax.while_loop(functools.partial(unfinished, columns), functools.partial(decode, columns), state)
    mask = jnp.arange(T) < state.lengths[..., None]
    return Rollout(prompts, state.tokens, state.lengths, mask, state.log_probs, truncated=~state.ended)


def live_columns(T: int, first: int = 128) -> list[int]:
    """How far the cache is looked at, one loop after the other: doubled whenever the completions have filled it."""
    widths = [first]
    while widths[-1] < T:
        widths.append(2 * widths[-1])
    return [min(width, T) for width in widths]


def completion_keys(key: PRNGKey, B: int, G: int) -> PRNGKey:
    """`[B, G]` keys, each of its own prompt and completion whatever `B` and `G` are."""
    of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_prompt, jnp.arange(G))


def draw(keys: PRNGKey, t: Array, logits: Array, greedy: bool) -> tuple[Array, Array]:
    """Draws one token of each of `logits [..., V]`, and gives its log-prob.

    By the Gumbel trick, without a sort, with the noise of place `t` under each of `keys [...]`.
    """
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        of_place = jax.vmap(jax.random.fold_in)(keys.reshape(-1), jnp.broadcast_to(t, keys.shape).reshape(-1))
        token = jax.vmap(jax.random.categorical)(of_place, logits.reshape(-1, logits.shape[-1])).reshape(keys.shape)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)[..., 0]


def truncate(logits: Array, top_k: int | None, top_p: float | Array | None, min_p: float | Array | None) -> Array:
    """Sets to -inf the logits `[..., V]` of the tokens that are not to be drawn, in the order of the arguments."""
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


def is_any(tokens: Array, ids: tuple[int, ...]) -> Array:
    """True where a token is one of the ids; nowhere, if there are none."""
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))
