"""The policy contract: what a network must offer to be sampled, scored and trained.

A policy is a hashable static configuration and pure functions of it, so that it
can be a static argument of `jax.jit`. Params are a plain pytree of arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Params, PRNGKey, Prompts

PromptCache = Any  # pytree of arrays
Cache = Any  # pytree of arrays


class Routes(NamedTuple):
    """What the routers of a mixture of experts did with the tokens that `extend_routed` read."""

    experts: Array  # [B, G, S, L, k] int16, those that each layer chose
    probabilities: Array | None = None  # [B, G, L, E] float32, of each expert, summed over the tokens that count
    choices: Array | None = None  # [B, G, L, E] float32, how many of these tokens chose it


class Policy(NamedTuple):
    """A causal language model as functions.

    A completion is read against the one prompt of its group: `prefill` reads all
    but the last prompt token, once for the group; `extend` reads the last prompt
    token and then the completion without its last token, so that
    `hidden[..., t, :]` predicts completion token `t`. With `S = T` and no cache
    that is the training forward, with `S = 1` and a cache it is one step of
    decoding, and gradients flow through the one prompt.

    Attributes:
      config: hashable: sizes, dtypes and whatever else the functions need.
      init: `key -> params`.
      cast: `params -> params` in the dtypes that the network computes in: the
        sampler's copy, made once a rollout.
      prefill: `(params, tokens [B, P], lengths [B]) -> prompt_cache`.
      init_cache: `(B, G, T) -> cache` for `T` tokens of each completion.
      extend: `(params, tokens [B, G, S], positions [B, G, S], prompt_cache,
        cache=None, segments=None, columns=None, descendants=None) -> (hidden [B, G, S, D], cache)`. A
        token attends to its group's prompt and to tokens of its own completion at its
        own or earlier positions. A cache is written as a ring: after its `T` columns
        it goes on with the first; a write does not cross the end. `columns`, static, says that no column from there on
        is in use, so that they need not be looked at. `segments [B, G, S]`, without a
        cache, also keeps apart several completions packed in one row; with `descendants [B, G, S]`, given for trees
        alone, a token of segment `s` sees those of the segments it goes on after: `segments <= s <= descendants`.
      unembed: `(params, hidden [..., D]) -> logits [..., V]`.
      gather_prompts: `(prompt_cache, rows [N]) -> prompt_cache` of those rows.
      reset_rows: `(cache, rows [B, G] bool) -> cache` that is empty in those rows.
      gather_rows: `(cache, rows [N]) -> cache` of those of its `B` rows, in that order.
      compact: `(cache, ends [B, G]) -> cache` that keeps of each row the tokens at positions before its end, in
        order, in its first columns; writing goes on after the longest row.
      for_decoding: `params -> params`, of `cast`'s result, in the form that `extend` reads fastest with a cache, token
        by token; made once a rollout, after `prefill`, which does not take that form.
      by_rows: makes of `f(params, of_rows, *others)` the function that computes it on each device for the rows `[B, G]`
        there; `f` may call `unembed` and nothing else of the policy. Only a policy of several devices has one.
      extend_routed: `extend` of a policy with experts, else None; returns `Routes` as a third. With `given
        [B, G, S, L, k]`, tokens go to these experts, weighted as the router now weighs them; `counted [B, G, S]`
        says over which tokens the routes' sums are.
      forward: `(params, prompts [B, P], lengths [B], tokens [B, G, S], positions [B, G, S], segments=None,
        descendants=None, given=None, counted=None) -> (hidden [B, G, S, D], routes or None)`: what `extend`, or
        `extend_routed`, gives with `prefill`'s cache, in one go through the layers. None leaves it to the two, one
        after the other: who replaces one of them in a policy that has a `forward` sets this to None. Scoring calls
        it by `policies.forward`, sampling never.
    """

    config: Any
    init: Callable[[PRNGKey], Params]
    cast: Callable[[Params], Params]
    prefill: Callable[[Params, Array, Array], PromptCache]
    init_cache: Callable[[int, int, int], Cache]
    extend: Callable[..., tuple[Array, Cache]]
    unembed: Callable[[Params, Array], Array]
    gather_prompts: Callable[[PromptCache, Array], PromptCache]
    reset_rows: Callable[[Cache, Array], Cache]
    gather_rows: Callable[[Cache, Array], Cache]
    compact: Callable[[Cache, Array], Cache]
    for_decoding: Callable[[Params], Params] = lambda params: params
    by_rows: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f
    extend_routed: Callable[..., tuple[Array, Cache, Any]] | None = None
    forward: Callable[..., tuple[Array, Routes | None]] | None = None


def forward(
    policy: Policy, params: Params, prompts: Prompts, tokens: Array, positions: Array, **options: Any
) -> tuple[Array, Routes | None]:
    """Reads completions after their prompts, all tokens at once: what training differentiates.

    Args:
      policy: any.
      params: its parameters.
      prompts: `B` prompts.
      tokens: `[B, G, S]`, the prompt's last token and those of the completion, see `scoring.decoder_inputs`.
      positions: theirs.
      options: `segments` and `descendants` of packed completions; `given` and `counted` of a policy with experts.

    Returns:
      Hidden states `[B, G, S, D]`; and of a policy with experts its routes.
    """
    if policy.forward is not None:
        return policy.forward(params, prompts.tokens, prompts.lengths, tokens, positions, **options)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
    if policy.extend_routed is None:
        return policy.extend(params, tokens, positions, prompt_cache, **options)[0], None
    hidden, _, routes = policy.extend_routed(params, tokens, positions, prompt_cache, **options)
    return hidden, routes


class TokenCache(NamedTuple):
    """The tokens of the completions so far, in the order in which they came."""

    tokens: Array  # [B, G, C] int32
    positions: Array  # [B, G, C] int32, -1 where empty
    column: Array  # [] int32, the next to be written


def _no_init(key: PRNGKey) -> Params:
    raise ValueError("this policy has no init: pass from_logits_fn(f, init=...), or bring params of your own")


@functools.cache
def from_logits_fn(
    f: Callable[[Params, Array, Array], Array], *, init: Callable[[PRNGKey], Params] = _no_init
) -> Policy:
    """Any causal network as a policy: flax.nnx, Equinox, plain JAX.

        hidden[b, g, s] = f(params, [prompt[b]; completion[b, g]], mask)[positions[b, g, s]]

    Prompt and completion are packed into one row without a gap. Nothing is cached
    but tokens, so the whole row is computed again for each decoded token, its
    prompt once for each completion, and a row's logits are held at once. A
    network that this is too slow for implements `Policy` itself.

    Args:
      f: `(params, tokens [N, S], mask [N, S]) -> logits [N, S, V]`. Rows are
        right-padded, `mask` is True on tokens, and `logits[:, s]` predict token
        `s + 1` from tokens `0..s` alone. Arrays belong in `params`: with nnx,
        `graph, params = nnx.split(model)` and `f` merges them again.
      init: `key -> params`, for whoever calls the policy's own.

    Returns:
      A policy. The same `f` gives the same policy, so that jit does not compile
      again: define `f` once, not in a loop.

    Raises:
      ValueError: from `extend`, if it is given `segments`; from `init`, if there is none.
      AssertionError: from `extend`, if `f` does not return logits `[N, S, V]`.
    """

    def extend(
        params: Params,
        tokens: Array,
        positions: Array,
        prompt_cache: Prompts,
        cache: TokenCache | None = None,
        segments: Array | None = None,
        columns: int | None = None,
        descendants: Array | None = None,
    ) -> tuple[Array, TokenCache | None]:
        if segments is not None:
            raise ValueError("from_logits_fn cannot tell packed completions apart: one per row, segments=None")
        held = tokens, positions
        if cache is not None:
            column = cache.column % cache.positions.shape[-1]
            write = functools.partial(jax.lax.dynamic_update_slice, start_indices=(0, 0, column))
            held = write(cache.tokens, tokens), write(cache.positions, positions)
            cache = TokenCache(*held, cache.column + tokens.shape[-1])
        rows, mask = _pack(prompt_cache, *held)
        B, G, S = rows.shape
        logits = f(params, rows.reshape(B * G, S), mask.reshape(B * G, S))
        chex.assert_shape(logits, (B * G, S, None))
        return jnp.take_along_axis(logits.reshape(B, G, S, -1), positions[..., None], axis=2), cache

    def compact(cache: TokenCache, ends: Array) -> TokenCache:
        order, positions, column = kept_columns(cache.positions, ends)
        return TokenCache(jnp.take_along_axis(cache.tokens, order, axis=-1), positions, column)

    def init_cache(B: int, G: int, T: int) -> TokenCache:
        return TokenCache(jnp.zeros((B, G, T), jnp.int32), jnp.full((B, G, T), -1, jnp.int32), jnp.zeros((), jnp.int32))

    return Policy(
        config=f,
        init=init,
        cast=lambda params: params,
        prefill=lambda params, tokens, lengths: Prompts(tokens, lengths),
        init_cache=init_cache,
        extend=extend,
        unembed=lambda params, hidden: hidden.astype(jnp.float32),
        gather_prompts=lambda prompt_cache, rows: Prompts(prompt_cache.tokens[rows], prompt_cache.lengths[rows]),
        reset_rows=reset_rows,
        gather_rows=lambda cache, rows: cache._replace(tokens=cache.tokens[rows], positions=cache.positions[rows]),
        compact=compact,
    )


@functools.cache
def within(policy: Policy, name: str) -> Policy:
    """The same policy with its parameters at `params[name]`, beside those of other networks."""

    def at_name(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *arguments, **options: f(params[name], *arguments, **options)

    return policy._replace(
        init=lambda key: {name: policy.init(key)},
        cast=lambda params: {name: policy.cast(params[name])},
        for_decoding=lambda params: {name: policy.for_decoding(params[name])},
        prefill=at_name(policy.prefill),
        extend=at_name(policy.extend),
        extend_routed=None if policy.extend_routed is None else at_name(policy.extend_routed),
        forward=None if policy.forward is None else at_name(policy.forward),
        unembed=at_name(policy.unembed),
    )


def reset_rows(cache: Any, rows: Array) -> Any:
    """Empties rows of a cache that tells by its `positions [B, G, C]` which columns hold a token."""
    return cache._replace(positions=jnp.where(rows[..., None], -1, cache.positions))


def kept_columns(positions: Array, ends: Array) -> tuple[Array, Array, Array]:
    """For `compact`: where each column is taken from, its position, and the next column to be written.

    Args:
      positions: `[B, G, C]`, -1 where empty.
      ends: `[B, G]`; what stands at these positions or later goes.
    """
    kept = (positions >= 0) & (positions < ends[..., None])
    order = jnp.argsort(jnp.where(kept, positions, jnp.iinfo(jnp.int32).max), axis=-1)
    count = jnp.sum(kept, axis=-1, keepdims=True)
    moved = jnp.take_along_axis(positions, order, axis=-1)
    return order, jnp.where(jnp.arange(positions.shape[-1]) < count, moved, -1), jnp.max(count).astype(jnp.int32)


def _pack(prompts: Prompts, tokens: Array, positions: Array) -> tuple[Array, Array]:
    """Rows `[B, G, P + C - 1]` of prompts and the tokens `[B, G, C]` at their positions; True where there is one."""
    B, G, C = tokens.shape
    width = prompts.tokens.shape[1] + C - 1  # the first of the C is the prompt's last token
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, C - 1)))[:, None]
    known = jnp.broadcast_to(jnp.arange(width) < prompts.lengths[:, None, None], (B, G, width))
    places = jnp.where(positions < 0, width, positions)  # an empty column is dropped; -1 would wrap around
    put = jax.vmap(jax.vmap(lambda row, places, values: row.at[places].set(values, mode="drop")))
    return put(jnp.where(known, padded, 0), places, tokens), put(known, places, jnp.ones_like(tokens, bool))
