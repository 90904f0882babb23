"""Conversations: the policy and an environment write in turns, tokens in and tokens out.

The device decodes until the policies' turns have ended; the host asks the environment; the tokens of its answers are
read into the same cache, and decoding goes on. What was sampled is never decoded and encoded again, so that the
log-probs are those of the tokens that are trained on.
"""

import copy
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import processes
from grpo_jax.data.batches import bucket
from grpo_jax.data.between_turns import Between, between_texts
from grpo_jax.environments import Failure, Message, Respond, Turn, answers
from grpo_jax.policies import Policy, PromptCache
from grpo_jax.sampling import stopping
from grpo_jax.sampling.blank import BlankSampler
from grpo_jax.sampling.drawing import completion_keys
from grpo_jax.sampling.engines import check_log_probs
from grpo_jax.sampling.samplers import PolicySampler
from grpo_jax.sampling.servers import EngineSampler, seeds_of
from grpo_jax.sampling.turn_decoding import Rows, Written, decode_turns, read_texts
from grpo_jax.truncation import Truncation
from grpo_jax.types import Array, Number, Params, PRNGKey, Prompts, Rollout, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationSampler:
    """Draws conversations of the policy with an environment; made by `conversations`."""

    sampler: PolicySampler | EngineSampler
    respond: Respond
    tokenizer: "PreTrainedTokenizerBase"
    rows: Sequence[Mapping[str, Any]]
    prompt_column: str
    between: Between | None
    max_turns: int
    max_answer_tokens: int
    timeout: float
    on_host: ClassVar[bool] = True

    @property
    def temperature(self) -> Number:
        """That of the sampler."""
        return self.sampler.temperature

    @property
    def truncation(self) -> Truncation | None:
        """That of the sampler."""
        return self.sampler.truncation

    @property
    def blank(self) -> BlankSampler:
        """The shapes of its rollouts."""
        return BlankSampler(
            group_size=self.sampler.group_size,
            max_tokens=self.sampler.max_tokens,
            temperature=self.temperature,
            truncation=self.truncation,
            max_turns=self.max_turns,
        )

    def __call__(self, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey) -> Rollout:
        """Draws `group_size` conversations for each prompt, on the host between programs.

        Of several processes (`grpo_jax.processes`) each asks its environment about the conversations of its own
        prompts, and all of them get the rollout of all; its rows lie where those of the prompts do.

        Raises:
          ValueError: under jit; if the prompts do not name their rows; in a run of several processes, of a server.
          ProcessError: for what was raised in another process and is no failure of an environment.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, prompts, key))):
            raise ValueError(
                "conversations go through the host, which a program cannot: call `step.collect` without jit, or use "
                "an environment that is traced"
            )
        if "row" not in prompts.info:
            raise ValueError("the prompts do not name their rows of the data set: make_prompts(prompts, rows)")
        if isinstance(self.sampler, EngineSampler):
            with self.sampler.lock:
                return _converse_with_server(self, self.sampler, policy, params, prompts, key)
        return _converse(self, self.sampler, policy, params, prompts, key)


def conversations(
    sampler: PolicySampler | EngineSampler,
    respond: Respond,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Mapping[str, Any]],
    *,
    max_turns: int,
    between: Between | None = None,
    prompt_column: str = "prompt",
    max_answer_tokens: int = 1024,
    timeout: float = 60.0,
) -> ConversationSampler:
    """A sampler of conversations: the policy writes until its turn ends, an environment answers, and so on.

        step = make_train_step(policy, optimizer, conversations(sampler, respond, tokenizer, rows, max_turns=5,
                               between=data.between_turns(tokenizer)), loss=losses.grpo())
        experience = step.collect(state, prompts)                # not jitted: the host answers
        rewards, mask = turn_rewards(experience.rollout)

    The rollout's completions are whole conversations: what the environment wrote has mask False and log-prob 0, and
    `rollout.turns` has the turns' ends and rewards. A turn of the policy ends with one of the sampler's `eos_ids` or
    at a stop string. The sampler's noise belongs to a token's place in its conversation, and `slots` of it changes
    nothing but the order of the work: a conversation that ends makes room for the next.

    A conversation is over when the environment answers with None. It is cut, and `truncated`, when its
    `max_tokens` are used up: within a turn, or since an answer does not fit with one more token after it, and is then
    left out; and when the environment would go on after `max_turns`. Where the environment fails (raises, gives no
    text, more than `max_answer_tokens`, or nothing within `timeout`), the conversation is masked whole, counted as the
    metric `environment_failed`, and reported as a warning, of several processes by the one that has asked.

    Args:
      sampler: of the turns; its `max_tokens` are those of a conversation, the environment's included. That of a server
        (`servers.engine_sampler`) is asked for a turn of all conversations at a time, with their tokens so far.
      respond: `(row, messages) -> Turn | None`, plain or async; see `environments`. The row is a copy that belongs to
        the conversation, so that an environment may keep its state in it. Messages are the prompt's and one for each
        turn since, the policy's as text without the end token. Of several processes one alone is asked about a
        conversation, in all of its turns.
      tokenizer: of the policy.
      rows: of the data set, into which `prompts.info["row"]` points.
      max_turns: `K`, of the policy in one conversation.
      between: `data.between_turns(tokenizer)` for prompts that are chat messages; None for plain text, after which
        the environment's text follows as it is.
      prompt_column: of the rows.
      max_answer_tokens: of one answer, with what the template writes around it. Results of tools are cut to fit, and
        where even so they do not, the conversation is; a longer answer of others is a failure.
      timeout: seconds for one answer.

    Raises:
      ValueError: for a setting out of range.
    """
    if max_turns < 1 or max_answer_tokens < 1:
        raise ValueError(f"max_turns and max_answer_tokens are at least 1, got {max_turns} and {max_answer_tokens}")
    if not timeout > 0:
        raise ValueError(f"timeout is a number of seconds above 0, got {timeout}")
    if isinstance(sampler, PolicySampler) and sampler.record_experts:
        raise ValueError("record_experts is for completions of one turn: leave it out where there are conversations")
    return ConversationSampler(
        sampler=sampler,
        respond=respond,
        tokenizer=tokenizer,
        rows=rows,
        prompt_column=prompt_column,
        between=between,
        max_turns=max_turns,
        max_answer_tokens=max_answer_tokens,
        timeout=timeout,
    )


# ------------------------------------------------------------------------------ on the device


@functools.partial(jax.jit, static_argnums=0)
def _prefill(policy: Policy, params: Params, prompts: Prompts) -> tuple[Params, PromptCache]:
    params = policy.cast(params)
    return policy.for_decoding(params), policy.prefill(params, prompts.tokens, prompts.lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _no_conversations(policy: Policy, shape: tuple[int, int], columns: int, stop: stopping.StopStrings | None) -> Rows:
    last, t = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
    return Rows(last, t, stopping.start(stop, shape), policy.init_cache(*shape, columns))


_read = jax.jit(read_texts, static_argnums=0, donate_argnums=5)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def _decode(
    policy: Policy, sampler: PolicySampler, params: Params, prompt_cache: PromptCache, lengths: Array, keys: PRNGKey,
    rows: Rows, active: Array, enough: Array,
) -> tuple[Rows, Written]:  # fmt: skip
    T = sampler.max_tokens
    return decode_turns(policy, sampler, params, prompt_cache, lengths, keys, rows, active, enough, longest=T, width=T)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _renew(policy: Policy, rows: Rows, fresh: Array, last: Array) -> Rows:
    """Rows with other conversations where `fresh [B, G]`, before their first token; `last [B, G]` is their prompts'."""
    return Rows(
        last=jnp.where(fresh, last, rows.last),
        t=jnp.where(fresh, 0, rows.t),
        stopping=None if rows.stopping is None else jnp.where(fresh, 0, rows.stopping),
        cache=policy.reset_rows(rows.cache, fresh),
    )


# ------------------------------------------------------------------------------ on the host


@dataclasses.dataclass
class _Conversation:
    """One conversation as far as it has come."""

    own: bool  # whether this process asks the environment about it
    row: dict[str, Any]
    messages: list[Message]  # of another process's, the prompt's alone
    tokens: list[int] = dataclasses.field(default_factory=list)
    mask: list[bool] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    turn: int = 0  # where the policy's present turn begins
    ends: list[int] = dataclasses.field(default_factory=list)
    rewards: list[float | None] = dataclasses.field(default_factory=list)
    truncated: bool = False
    failed: bool = False

    def wrote(self, tokens: Sequence[int], log_probs: Sequence[float], mask: bool) -> None:
        self.tokens += tokens
        self.log_probs += log_probs
        self.mask += [mask] * len(tokens)


def _converse(
    made: ConversationSampler, sampler: PolicySampler, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey
) -> Rollout:
    T = sampler.max_tokens
    B, G = prompts.tokens.shape[0], sampler.group_size
    count = B * G
    widest = bucket(min(made.max_answer_tokens, T), 64)
    params, prompt_cache = _prefill(policy, params, prompts)
    keys = completion_keys(key, B, G).reshape(-1)
    tokens, lengths, numbers = processes.whole((prompts.tokens, prompts.lengths, prompts.info["row"]))
    last = tokens[np.arange(B), lengths - 1]
    own, _ = processes.own_rows((), of=prompts.tokens)
    begun = [_begin(made, number, own=b in own) for b, number in enumerate(numbers.tolist()) for _ in range(G)]

    # Together, a row of the cache is a completion of its group; in slots each has a copy of its prompt's cache.
    together = sampler.slots is None
    shape = (B, G) if together else (min(sampler.slots or 0, count), 1)
    queue = iter(range(count))
    held = np.full(shape, -1)  # the conversation of each row; -1 for none
    rows = _no_conversations(policy, shape, T + widest, sampler.stop)
    row_prompts, row_keys, row_lengths = prompt_cache, keys, prompts.lengths
    while True:
        fresh = np.zeros(shape, bool)
        for place in zip(*np.nonzero(held < 0), strict=True):
            if (following := next(queue, None)) is not None:
                held[place], fresh[place] = following, True
        active = held >= 0
        if not active.any():
            break
        of = np.maximum(held, 0)
        if fresh.any():
            rows = _renew(policy, rows, jnp.asarray(fresh), jnp.asarray(last[of // G]))
            row_keys, row_lengths = keys[of], jnp.asarray(lengths[of // G])
            if not together:
                row_prompts = policy.gather_prompts(prompt_cache, jnp.asarray(of[:, 0] // G))
        enough = active.sum() if together else max(1, active.sum() // 8)
        rows, written = _decode(
            policy, sampler, params, row_prompts, row_lengths, row_keys, rows, jnp.asarray(active), jnp.asarray(enough)
        )
        texts = _take_turns(made, begun, held, processes.whole(written))
        if any(texts.values()):
            S = bucket(max(map(len, texts.values())), 64)
            padded, counts = np.zeros((*shape, S), np.int32), np.zeros(shape, np.int32)
            for place in zip(*np.nonzero(held >= 0), strict=True):
                text = texts.get(int(held[place]), [])
                padded[place][: len(text)], counts[place] = text, len(text)
            rows = _read(
                policy, sampler, params, row_prompts, row_lengths, rows, jnp.asarray(padded), jnp.asarray(counts)
            )
    return _rollout(prompts, begun, (B, G, T), made.max_turns)


def _converse_with_server(
    made: ConversationSampler, sampler: EngineSampler, policy: Policy, params: Params, prompts: Prompts, key: PRNGKey
) -> Rollout:
    B, G, T = prompts.tokens.shape[0], sampler.group_size, sampler.max_tokens
    sampler.refresh(policy, params)
    rows = np.repeat(np.asarray(prompts.info["row"]), G).tolist()
    begun = [_begin(made, row, own=True) for row in rows]
    lengths, tokens = np.asarray(prompts.lengths).tolist(), np.asarray(prompts.tokens)
    heads = [tokens[i // G, : lengths[i // G]].tolist() for i in range(B * G)]
    held = np.arange(B * G)  # -1 for a conversation that is over
    for turn in range(made.max_turns):
        live = [i for i in range(B * G) if held[i] >= 0]
        if not live:
            break
        seeds = seeds_of(jax.random.fold_in(key, turn), B * G)
        limits = {i: T - len(begun[i].tokens) for i in live}
        prefixes = [heads[i] + begun[i].tokens for i in live]
        groups = sampler.draw(prefixes, seeds=[seeds[i] for i in live], limits=[limits[i] for i in live], group_size=1)
        wrote, log_probs = np.zeros((B * G, T), np.int32), np.zeros((B * G, T), np.float32)
        counts, ended = np.zeros(B * G, np.int32), np.zeros(B * G, bool)
        for i, (drawn,) in zip(live, groups, strict=True):
            count, where = len(drawn.tokens), f"turn {turn} of conversation {i % G} of prompt {i // G}"
            check_log_probs(np.asarray(drawn.log_probs, np.float32), where=where)
            wrote[i, :count], log_probs[i, :count] = drawn.tokens, drawn.log_probs
            counts[i], ended[i] = count, not drawn.truncated
        written = Written(*map(jnp.asarray, (wrote, log_probs, counts, ended)))
        _take_turns(made, begun, held, jax.device_get(written))
    return _rollout(prompts, begun, (B, G, T), made.max_turns)


def _begin(made: ConversationSampler, row: int, *, own: bool) -> _Conversation:
    given = copy.deepcopy(dict(made.rows[row]))
    prompt = given[made.prompt_column]
    if not isinstance(prompt, str) and made.between is None:
        raise ValueError(
            f"prompts that are chat messages need between=data.between_turns(tokenizer); that of row {row} is "
            f"{str(prompt)[:200]!r}"
        )
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    return _Conversation(own, given, messages)


def _take_turns(
    made: ConversationSampler, begun: Sequence[_Conversation], held: np.ndarray, written: Written
) -> dict[int, list[int]]:
    """Takes up what was written, asks the environment where a turn has ended, and returns the tokens that follow.

    Conversations that are over leave their rows. Every process takes up what was written in all of them, and is told
    what came of those that others have asked about: all hold the same, and decode on alike.
    """
    over, waiting = [], []
    for place in zip(*np.nonzero(held >= 0), strict=True):
        number, n = int(held[place]), int(written.counts[place])
        conversation = begun[number]
        conversation.wrote(written.tokens[place][:n].tolist(), written.log_probs[place][:n].tolist(), True)
        if written.ended[place]:
            waiting.append(number)
        elif len(conversation.tokens) == made.sampler.max_tokens:
            conversation.ends.append(len(conversation.tokens))
            conversation.rewards.append(None)
            conversation.truncated = True
            over.append(number)
    for number in waiting:
        begun[number].ends.append(len(begun[number].tokens))
    told: list[_Told] = []
    if waiting:
        with processes.alike("asking"):
            told = _ask(made, {number: begun[number] for number in waiting if begun[number].own})
        told = [*itertools.chain(*processes.exchange("answers", told))]
    following = {}
    for number, tokens, rewards, truncated, failed in told:
        conversation = begun[number]
        conversation.rewards, conversation.truncated, conversation.failed = rewards, truncated, failed
        if tokens is None:
            over.append(number)
        else:
            conversation.wrote(tokens, [0.0] * len(tokens), False)
            conversation.turn = len(conversation.tokens)
            following[number] = tokens
    held[np.isin(held, over)] = -1
    return following


# Of a conversation: its number, the tokens that follow (None where it is over), rewards of turns, truncated, failed.
_Told = tuple[int, list[int] | None, list[float | None], bool, bool]


def _ask(made: ConversationSampler, waiting: Mapping[int, _Conversation]) -> list[_Told]:
    """Asks the environment about conversations, by their numbers, in which a turn of the policy has ended."""
    for conversation in waiting.values():
        turn = [token for token in conversation.tokens[conversation.turn :] if token not in made.sampler.eos_ids]
        text = str(made.tokenizer.decode(turn, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        conversation.messages.append({"role": "assistant", "content": text})
    asked = [(conversation.row, copy.deepcopy(conversation.messages)) for conversation in waiting.values()]
    given = answers(made.respond, asked, timeout=made.timeout) if asked else []
    told: list[_Told] = []
    failures = []
    for (number, conversation), answer in zip(waiting.items(), given, strict=True):
        tokens = _follow(made, conversation, answer)
        if isinstance(tokens, Failure):
            failures.append(tokens.message)
        following = tokens if isinstance(tokens, list) else None
        failed = isinstance(tokens, Failure)
        told.append((number, following, conversation.rewards, conversation.truncated, failed))
    if failures:
        warnings.warn(
            f"the environment failed in {len(failures)} of {len(given)} conversations, which are masked; first: "
            f"{failures[0]}",
            RuntimeWarning,
            stacklevel=5,
        )
    return told


def _follow(
    made: ConversationSampler, conversation: _Conversation, answer: Turn | Failure
) -> list[int] | Failure | None:
    """Adds an answer's messages and rewards to its conversation; its tokens, or None where the conversation is over."""
    conversation.rewards.append(None if isinstance(answer, Failure) else answer.reward)
    if isinstance(answer, Failure):
        return answer
    for turn, more in answer.earlier:
        if turn >= len(conversation.rewards) - 1:
            return Failure(f"it rewards turn {turn} as an earlier one in its answer to {len(conversation.rewards) - 1}")
        conversation.rewards[turn] = (conversation.rewards[turn] or 0.0) + more
    if answer.content is None:
        return None
    if len(conversation.ends) == made.max_turns:
        conversation.truncated = True
        return None
    assert not isinstance(answer.content, str)
    between = between_texts(made.tokenizer) if made.between is None else made.between
    of_tools = all(message["role"] == "tool" for message in answer.content)
    try:
        content, tokens = answer.content, between(answer.content, conversation.tokens[-1])
        if len(tokens) > made.max_answer_tokens and of_tools:
            content, tokens = _shortened(between, content, conversation.tokens[-1], made.max_answer_tokens)
    except ValueError as error:
        return Failure(f"its answer cannot be encoded: {error}")
    if not tokens:
        return Failure(f"its answer {answer.content!r} has no tokens")
    if len(tokens) > made.max_answer_tokens and not of_tools:
        return Failure(f"its answer has {len(tokens)} tokens, more than max_answer_tokens = {made.max_answer_tokens}")
    # A policy that calls so many tools at once that their answers do not fit has cut its conversation itself.
    if len(tokens) > made.max_answer_tokens or len(conversation.tokens) + len(tokens) >= made.sampler.max_tokens:
        conversation.truncated = True
        return None
    conversation.messages += content
    return tokens


def _shortened(between: Between, messages: Sequence[Message], last: int, most: int) -> tuple[list[Message], list[int]]:
    """Results of tools, each cut to as many characters as make `most` tokens of all, or to none; and the tokens.

    How much a tool prints is up to the policy: if that masked the conversation, it could have any masked.
    """

    def cut(characters: int) -> list[Message]:
        return [
            message if (left := len(message["content"]) - characters) <= 0 else
            {**message, "content": f"{message['content'][:characters]} ... ({left} characters left out)"}
            for message in messages
        ]  # fmt: skip

    low, high = 0, max(len(message["content"]) for message in messages)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(between(cut(middle), last)) <= most else (low, middle - 1)
    return cut(low), between(cut(low), last)


def _rollout(prompts: Prompts, begun: Sequence[_Conversation], shape: tuple[int, int, int], K: int) -> Rollout:
    def each(values: Any) -> Array:
        table = np.asarray(values)
        return processes.beside(prompts.lengths, table.reshape(*shape[:2], *table.shape[1:]))

    def padded(values: Sequence[Sequence[Any]], width: int, dtype: Any) -> Array:
        table = np.zeros((len(values), width), dtype)
        for i, row in enumerate(values):
            table[i, : len(row)] = row
        return each(table)

    given = [[reward is not None and not c.failed for reward in c.rewards] for c in begun]
    rewards = [[0.0 if reward is None or c.failed else reward for reward in c.rewards] for c in begun]
    turns = Turns(
        ends=padded([c.ends for c in begun], K, np.int32),
        rewards=padded(rewards, K, np.float32),
        mask=padded(given, K, bool),
        failed=each([c.failed for c in begun]),
    )
    return Rollout(
        prompts,
        tokens=padded([c.tokens for c in begun], shape[2], np.int32),
        lengths=each(np.array([len(c.tokens) for c in begun], np.int32)),
        mask=padded([[written and not c.failed for written in c.mask] for c in begun], shape[2], bool),
        log_probs=padded([c.log_probs for c in begun], shape[2], np.float32),
        truncated=each([c.truncated for c in begun]),
        turns=turns,
    )


def turn_rewards(rollout: Rollout) -> tuple[Array, Array]:
    """The sum of a conversation's rewards as the reward of a step: `[B, G, 1]`, and its mask.

    Conversations without any reward are masked, as those are in which the environment failed.

    Raises:
      ValueError: for a rollout that has no turns.
    """
    if rollout.turns is None:
        raise ValueError("the rollout has no turns: it comes from `sampling.conversations` or the like")
    mask = jnp.any(rollout.turns.mask, axis=-1, keepdims=True)
    return jnp.sum(jnp.where(rollout.turns.mask, rollout.turns.rewards, 0.0), axis=-1, keepdims=True), mask
