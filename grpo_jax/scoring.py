"""Rollouts to per-token log-probs and entropies, without ever holding `[B, G, T, V]`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.policies import Policy, forward
from grpo_jax.protocols import VocabularyDivergence
from grpo_jax.truncation import Truncation, replay
from grpo_jax.types import Array, Likeliest, Packing, Params, Prompts, Rollout, Routers, Scores

CHUNK_TOKENS = 1024  # tokens whose logits are held at a time, unless told otherwise


class Teacher(NamedTuple):
    """Whom a policy is compared with: static, and hashable, as a policy is."""

    policy: Policy  # of the same tokenizer; its params come as an argument
    divergence: VocabularyDivergence | None = None  # None compares the token drawn only, by its log-prob


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("entropy", "chunk_tokens", "teacher"))
def score(
    policy: Policy,
    params: Params,
    rollout: Rollout,
    *,
    packing: Packing | None = None,
    temperature: float | Array = 1.0,
    truncation: Truncation | None = None,
    entropy: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
    teacher: Teacher | None = None,
    teacher_params: Params | None = None,
    teacher_prompts: Prompts | None = None,
    top_tokens: Array | None = None,
) -> Scores:
    """What the policy says of the completions of a rollout.

        log_probs[b, g, t] = log softmax(logits[b, g, t] / temperature)[tokens[b, g, t]]
        entropy[b, g, t]   = -sum_v p[v] log p[v],  p = softmax(logits[b, g, t] / temperature)
        collision[b, g, t] = sum_v p[v]^2
        divergence[b, g, t] = teacher.divergence(log p, log q),  q = softmax(the teacher's logits / temperature)

    Runs the network code that the sampler runs, with each prompt read once for
    its group. The head is applied to about `chunk_tokens` tokens at a time, and
    its logits are recomputed in the backward pass.

    With a `truncation`, `p` is the distribution that was drawn from: the softmax of the tokens that are kept, found
    anew from these parameters' logits. The token that was drawn is kept in any case. Under the parameters that sampled
    it is among them, up to a tie at the edge that rounding decides; under others it need not be, and its log-prob is
    then that beside the kept ones, so that ratios are finite and the gradient can bring it back. `outside` tells where.
    (NeMo-RL gives it -inf and masks it; TRL and verl score the whole distribution.) A divergence and `top_log_probs`
    are of whole distributions.

    Args:
      policy: the network, static.
      params: its parameters, differentiable.
      rollout: the completions; only those positions are scored.
      packing: several completions in a row, so that little padding is computed, or as a tree; what
        comes out is the same, to rounding. See `packing.pack` and `packing.tree`.
      temperature: the one that the rollout was sampled at.
      truncation: the one that the rollout was sampled under; None where every token could be drawn. Fills `outside`.
      entropy: False leaves it and `collision` out.
      chunk_tokens: tokens whose logits a device holds at a time.
      teacher: with a divergence, fills `divergence`; both heads are then applied a chunk at a time. Of vocabularies
        of different sizes (rows that some checkpoints pad with) the smaller one counts.
      teacher_params: the teacher's parameters, not differentiated.
      teacher_prompts: what the teacher reads in place of the rollout's prompts, `B` of any width.
      top_tokens: `[B, G, T, K]`, fills `top_log_probs` with the policy's log-probs of these tokens.

    Returns:
      Scores `[B, G, T]` in float32, 0 on padding. Where the rollout holds the experts that the sampler chose, tokens
      go to these (router replay; Ma et al. 2025, arXiv:2510.11370), and those of the prompts to experts chosen anew.
    """
    T = rollout.tokens.shape[-1]
    held = jnp.arange(T) < rollout.lengths[..., None]
    tokens = jnp.where(held, rollout.tokens, 0)
    if packing is not None:
        tokens = _take(tokens, packing.tokens)
        top_tokens = None if top_tokens is None else _of_each(_take, top_tokens, packing.tokens)
    hidden, routers = _hidden(policy, params, rollout, packing)
    beside: Array | None = None
    if teacher is not None and teacher.divergence is not None:
        other = rollout if teacher_prompts is None else rollout._replace(prompts=teacher_prompts)
        other = other._replace(experts=None)  # it chooses its own
        beside = jax.lax.stop_gradient(_hidden(teacher.policy, teacher_params, other, packing)[0])

    def score_rows(
        params: Params,
        of_rows: tuple[Array, Array, Array | None, Array | None],
        temperature: float | Array,
        truncation: Truncation | None,
    ) -> Scores:
        @jax.checkpoint
        def score_chunk(hidden: Array, tokens: Array, beside: Array | None, top_tokens: Array | None) -> Scores:
            shape = tokens.shape
            # In rows: XLA sums over the last of four axes with a scratch of five times the array on CPUs.
            hidden, tokens = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
            whole = logits = policy.unembed(params["policy"], hidden).astype(jnp.float32) / temperature
            outside = None
            if truncation is not None:
                logits, outside = replay(whole, tokens, truncation)
                outside = outside.astype(jnp.float32).reshape(shape)
            normaliser = jax.nn.logsumexp(logits, axis=-1)
            log_probs = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - normaliser
            scores = Scores(log_probs.reshape(shape), outside=outside)
            if entropy:
                probs = jax.nn.softmax(logits)
                # A network may rule a token out by a logit of -inf; 0 * -inf is NaN.
                entropies = normaliser - jnp.sum(probs * jnp.where(probs > 0, logits, 0.0), axis=-1)
                collision = jnp.sum(probs**2, axis=-1)
                scores = scores._replace(entropy=entropies.reshape(shape), collision=collision.reshape(shape))
            if teacher is not None and teacher.divergence is not None and beside is not None:
                theirs = teacher.policy.unembed(params["teacher"], beside.reshape(-1, beside.shape[-1]))
                theirs = jax.lax.stop_gradient(theirs.astype(jnp.float32)) / temperature
                V = min(whole.shape[-1], theirs.shape[-1])
                log_p, log_q = jax.nn.log_softmax(whole[:, :V]), jax.nn.log_softmax(theirs[:, :V])
                scores = scores._replace(divergence=teacher.divergence(log_p, log_q).reshape(shape))
            if top_tokens is not None:
                picked = jnp.take_along_axis(whole, top_tokens.reshape(-1, top_tokens.shape[-1]), axis=-1)
                of_all = normaliser if truncation is None else jax.nn.logsumexp(whole, axis=-1)
                scores = scores._replace(top_log_probs=(picked - of_all[:, None]).reshape(top_tokens.shape))
            return scores

        # Chunks are cut along the rows, which leaves the axis that devices share, B, in one piece.
        B, rows, length = jax.tree.leaves(of_rows)[1].shape
        width = min(length, max(1, chunk_tokens // (B * rows)))
        chunks = -(-length // width)
        cut = jax.tree.map(lambda x: _cut(x, chunks, width), of_rows)
        scores = jax.lax.map(lambda chunk: score_chunk(*chunk), cut)
        return jax.tree.map(lambda x: _uncut(x)[:, :, :length], scores)

    read = {"policy": params, "teacher": teacher_params}
    scores = policy.by_rows(score_rows)(read, (hidden, tokens, beside, top_tokens), temperature, truncation)

    def join(scores: Array) -> Array:
        if packing is not None:
            scores = _take(scores, packing.places)
        return jnp.where(held, scores, 0.0)

    scores = jax.tree.map(lambda x: join(x) if x.ndim == 3 else _of_each(join, x), scores)
    return scores._replace(routers=routers)


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames=("k", "chunk_tokens"))
def likeliest(
    policy: Policy,
    params: Params,
    rollout: Rollout,
    k: int,
    *,
    temperature: float | Array = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Likeliest:
    """The `k` likeliest tokens at each place of the completions, a chunk of tokens at a time.

    For a teacher that is scored once: `experience._replace(teacher_top=...)` and `losses.distill_top`.

    Args:
      policy: the network, static.
      params: its parameters.
      rollout: the completions.
      k: below the size of the vocabulary.
      temperature: as in `score`.
      chunk_tokens: as in `score`.
    """
    B, G, T = rollout.tokens.shape
    hidden, _ = _hidden(policy, params, rollout._replace(experts=None), None)  # a teacher chooses its own

    def of_chunk(hidden: Array) -> Likeliest:
        logits = policy.unembed(params, hidden.reshape(-1, hidden.shape[-1])).astype(jnp.float32) / temperature
        log_probs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), k)
        return Likeliest(*(x.reshape(*hidden.shape[:-1], k) for x in (tokens, log_probs)))

    width = min(T, max(1, chunk_tokens // (B * G)))
    top = jax.lax.map(of_chunk, _cut(hidden, -(-T // width), width))
    held = (jnp.arange(T) < rollout.lengths[..., None])[..., None]
    return jax.tree.map(lambda x: jnp.where(held, _uncut(x)[:, :, :T], jnp.zeros((), x.dtype)), top)


def _hidden(policy: Policy, params: Params, rollout: Rollout, packing: Packing | None) -> tuple[Array, Routers | None]:
    """What predicts each token: `[B, G, T, D]`, or `[B, R, W, D]` packed; and the routers, if there are some."""
    prompts = rollout.prompts
    read, positions = decoder_inputs(prompts, rollout.tokens[..., :-1], rollout.lengths)
    layout: dict[str, Array | None] = {"segments": None}
    given = rollout.experts
    counted = jnp.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None]
    if packing is not None:
        layout = {"segments": packing.segments}
        if packing.descendants is not None:
            layout["descendants"] = packing.descendants
        counted = packing.segments >= 0
        read, positions = (_take(x, packing.tokens) for x in (read, positions))
        if given is not None:
            of_each = _of_each(_take, given.reshape(*given.shape[:3], -1), packing.tokens)
            given = of_each.reshape(*packing.tokens.shape, *given.shape[3:])
    if policy.extend_routed is None:
        if given is not None:
            raise ValueError("the rollout has experts, and this policy has none: rollout._replace(experts=None)")
        return forward(policy, params, prompts, read, positions, **layout)[0], None
    if "descendants" in layout:
        raise ValueError(
            "a tree reads a shared token once, and the sums of the routers of this policy's experts would count it "
            "once: take packing.pack, or no packing"
        )
    hidden, routes = forward(policy, params, prompts, read, positions, given=given, counted=counted, **layout)
    assert routes is not None
    assert routes.probabilities is not None
    assert routes.choices is not None
    return hidden, Routers(jnp.sum(routes.probabilities, axis=1), jnp.sum(routes.choices, axis=1))


def decoder_inputs(prompts: Prompts, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """What `policy.extend` reads of completions or their beginnings `[B, G, S]`, and where: two arrays `[B, G, S + 1]`.

    The prompt's last token and then theirs, so that what comes of place `t` predicts token `t`.

    Args:
      prompts: `B` prompts.
      tokens: `[B, G, S]`.
      lengths: `[B, G]`, of the completions; what lies behind is padding.
    """
    B, G, S = tokens.shape
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
    held = jnp.arange(S) < lengths[..., None]
    tokens = jnp.where(held, tokens, 0)  # a pad id may lie outside the vocabulary, whose embedding is NaN
    read = jnp.concatenate([jnp.broadcast_to(last[:, None], (B, G, 1)), tokens], axis=-1)
    return read, jnp.broadcast_to(prompts.lengths[:, None, None] - 1 + jnp.arange(S + 1), read.shape)


def _take(x: Array, places: Array) -> Array:
    """`x[b].flatten()[places[b]]` for each `b`; places past the end read the last."""
    return jax.vmap(lambda x, places: jnp.take(x.reshape(-1), places, mode="clip"))(x, places)


def _of_each(f: Callable[..., Array], x: Array, *others: Array) -> Array:
    """`f` of each slice along the last axis."""
    return jax.vmap(f, in_axes=(-1, *(None for _ in others)), out_axes=-1)(x, *others)


def _uncut(x: Array) -> Array:
    """`[chunks, B, G, width, ...]` to `[B, G, chunks * width, ...]`."""
    chunks, B, G, width = x.shape[:4]
    return jnp.moveaxis(x, 0, 2).reshape(B, G, chunks * width, *x.shape[4:])


def _cut(x: Array, chunks: int, width: int) -> Array:
    """`[B, G, T, ...]` to `[chunks, B, G, width, ...]`, the last chunk padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, chunks * width - x.shape[2])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, width, *x.shape[3:]), 2, 0)
