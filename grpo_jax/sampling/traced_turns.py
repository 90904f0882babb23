"""Conversations with an environment that is traced: all turns in one program, under jit, scan and vmap."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from grpo_jax.environments import LARGEST
from grpo_jax.policies import Policy
from grpo_jax.sampling import stopping
from grpo_jax.sampling.drawing import completion_keys
from grpo_jax.sampling.samplers import PolicySampler
from grpo_jax.sampling.turn_decoding import Rows, decode_turns, read_texts
from grpo_jax.truncation import Truncation
from grpo_jax.types import Array, Number, Params, PRNGKey, Prompts, Rollout, Turns


class TracedEnvironment(Protocol):
    """An environment that is traced, of one conversation."""

    def __call__(self, tokens: Array, length: Array, state: Any, /) -> tuple[Array, Array, Any, Array, Array]:
        """Answers.

        Args:
          tokens: `[W]` int32, the policy's turn, padded.
          length: `[]` int32, how many of them it wrote.
          state: any pytree.

        Returns:
          tokens `[S]` that follow, how many of them count, the next state, whether the conversation is over, and the
          turn's reward.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedConversationSampler:
    """Draws conversations in one program; made by `traced_conversations`."""

    sampler: PolicySampler
    environment: TracedEnvironment
    begin: Callable[[Any, PRNGKey], Any]
    max_turns: int
    turn_tokens: int

    @property
    def temperature(self) -> Number:
        """That of the sampler."""
        return self.sampler.temperature

    @property
    def truncation(self) -> Truncation | None:
        """That of the sampler."""
        return self.sampler.truncation

    def __call__(self, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey) -> Rollout:
        """Draws `group_size` conversations for each prompt.

        Raises:
          ValueError: if the environment returns other shapes than it should.
        """
        play = functools.partial(_play, policy, self.environment, self.begin, self.max_turns, self.turn_tokens)
        return play(self.sampler, params, prompts, key)


def traced_conversations(
    sampler: PolicySampler,
    environment: TracedEnvironment,
    begin: Callable[[Any, PRNGKey], Any],
    *,
    max_turns: int,
    turn_tokens: int,
) -> TracedConversationSampler:
    """A sampler of conversations with a game, a simulator or the like that is a JAX function.

        def environment(tokens, length, state):        # the number to be guessed
            guess = tokens[0]
            answer = jnp.where(guess < state, HIGHER, LOWER)
            return answer[None], 1, state, guess == state, jnp.where(guess == state, 1.0, 0.0)

        begin = lambda info, key: info["number"]
        talking = traced_conversations(sampler, environment, begin, max_turns=5, turn_tokens=1)
        step = make_train_step(policy, optimizer, talking, loss=losses.grpo(), reward=turn_rewards)
        state, metrics = jax.jit(step)(state, prompts)            # and under scan and vmap

    The functions are written for one conversation and mapped over all. Everything else is as in `conversations`:
    what the environment wrote has mask False and log-prob 0; a conversation is over when it says `done`, and
    truncated where its `max_tokens` or its turns are used up; one with a reward that is not finite is masked whole and
    counted as the metric `environment_failed`.

    Args:
      sampler: of the turns; its `max_tokens` are those of a conversation, the environment's included, and its `slots`
        are not used: all conversations are decoded together.
      environment: `(tokens [W], length [], state) -> (tokens [S], length [], state, done [], reward [])`: the policy's
        turn, 0 behind its length, to the answer, the next state, whether the conversation is over, and the reward of
        that turn. `S` is any number; an answer of length 0 lets the policy go on.
      begin: `(info, key) -> state`, the first state of a conversation, from its prompt's part of `prompts.info` and a
        key of its own.
      max_turns: `K`, of the policy in one conversation.
      turn_tokens: `W`, after which a turn ends in any case, if neither an end token nor a stop string came before;
        above `max_tokens` it never does, and `W` is those.

    Raises:
      ValueError: for a setting out of range.
    """
    if max_turns < 1 or turn_tokens < 1:
        raise ValueError(f"max_turns and turn_tokens are at least 1, got {max_turns} and {turn_tokens}")
    if sampler.slots is not None:
        raise ValueError(f"traced conversations are decoded together: a sampler without slots, not {sampler.slots}")
    if sampler.record_experts:
        raise ValueError("record_experts is for completions of one turn: leave it out where there are conversations")
    return TracedConversationSampler(
        sampler=sampler, environment=environment, begin=begin, max_turns=max_turns, turn_tokens=turn_tokens
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _play(
    policy: Policy, environment: TracedEnvironment, begin: Callable[[Any, PRNGKey], Any], K: int, turn_tokens: int,
    sampler: PolicySampler, params: Params, prompts: Prompts, key: PRNGKey,
) -> Rollout:  # fmt: skip
    B, G, T = prompts.tokens.shape[0], sampler.group_size, sampler.max_tokens
    W = min(turn_tokens, T)
    params = policy.cast(params)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
    params = policy.for_decoding(params)
    keys, lengths = completion_keys(key, B, G), jnp.broadcast_to(prompts.lengths[:, None], (B, G))
    # Tokens have the places 0 to T - 1, so that the noise of T is the environment's own.
    own_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, T)
    state = jax.vmap(jax.vmap(begin, (None, 0)))(prompts.info, own_keys)
    respond = jax.vmap(jax.vmap(environment))
    S = _answer_width(respond, (B, G, W), state)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)

    Carry = tuple[Rows, Any, Array, Rollout]

    def turn(carry: Carry, k: Array) -> tuple[Carry, tuple[Array, Array, Array]]:
        rows, state, live, rollout = carry
        begun = rows.t
        rows, written = decode_turns(
            policy, sampler, params, prompt_cache, lengths, keys, rows, live, jnp.sum(live), longest=W, width=T + W
        )
        ended = live & (written.ended | (written.counts == turn_tokens))
        texts, sizes, next_state, done, reward = respond(written.tokens, written.counts, state)
        sizes = jnp.clip(sizes, 0, S).astype(jnp.int32)
        fits = (k < K - 1) & (rows.t + sizes < T)
        goes_on = ended & ~done & fits
        sizes = jnp.where(goes_on, sizes, 0)
        rollout = rollout._replace(
            tokens=_put(_put(rollout.tokens, begun, written.counts, written.tokens), rows.t, sizes, texts),
            log_probs=_put(rollout.log_probs, begun, written.counts, written.log_probs),
            mask=_put(rollout.mask, begun, written.counts, jnp.ones_like(written.tokens, bool)),
            truncated=rollout.truncated | (live & ~ended) | (ended & ~done & ~fits),
        )
        ends = jnp.where(live, rows.t, 0)
        rows = read_texts(policy, sampler, params, prompt_cache, lengths, rows, texts.astype(jnp.int32), sizes)
        rows = rows._replace(stopping=stopping.start(sampler.stop, (B, G)))
        state = jax.tree.map(
            lambda old, new: jnp.where(ended.reshape(ended.shape + (1,) * (new.ndim - 2)), new, old), state, next_state
        )
        return (rows, state, goes_on, rollout), (ends, jnp.where(ended, reward, 0.0).astype(jnp.float32), ended)

    empty, nothing = jnp.zeros((B, G, T), jnp.int32), jnp.zeros((B, G), bool)
    rows = Rows(
        last=jnp.broadcast_to(last, (B, G)),
        t=jnp.zeros((B, G), jnp.int32),
        stopping=stopping.start(sampler.stop, (B, G)),
        cache=policy.init_cache(B, G, T + W + S),
    )
    rollout = Rollout(prompts, empty, empty[..., 0], empty > 0, empty.astype(jnp.float32), nothing)
    (rows, _, _, rollout), turns = jax.lax.scan(turn, (rows, state, ~nothing, rollout), jnp.arange(K))
    ends, rewards, mask = (jnp.moveaxis(x, 0, -1) for x in turns)
    failed = jnp.any(~(jnp.abs(rewards) < LARGEST), axis=-1)  # also where it is NaN
    kept = ~failed[..., None]
    of_turns = Turns(ends, jnp.where(kept, rewards, 0.0), mask & kept, failed)
    return rollout._replace(lengths=rows.t, mask=rollout.mask & kept, turns=of_turns)


def _answer_width(respond: Callable[..., Any], shape: tuple[int, int, int], state: Any) -> int:
    """`S`, with the shapes of what the environment returns checked."""
    turn = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    tokens, length, next_state, done, reward = jax.eval_shape(respond, *turn, state)
    singles = [x.shape[2:] for x in (length, done, reward)]
    if len(tokens.shape) != 3 or tokens.shape[-1] < 1 or singles != [()] * 3 or done.dtype != bool:
        raise ValueError(
            "an environment returns tokens [S], their length, its state, whether it is done (bool), and a reward, got "
            f"tokens {tokens.shape[2:]}, length {singles[0]}, done {singles[1]} {done.dtype} and reward {singles[2]}"
        )
    old, new = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, next_state))
    if old != new:
        raise ValueError(f"an environment's state keeps its shapes and types, but {old} became {new}")
    return int(tokens.shape[-1])


def _put(row: Array, start: Array, count: Array, values: Array) -> Array:
    """`row [B, G, T]` with the first `count [B, G]` of the values at the places from `start [B, G]` on."""
    n = jnp.arange(values.shape[-1])
    places = jnp.where(n < count[..., None], start[..., None] + n, row.shape[-1])
    return jnp.put_along_axis(row, places, values.astype(row.dtype), axis=-1, inplace=False, mode="drop")
