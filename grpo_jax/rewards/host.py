"""Verifiers on text, on the host, with TRL's signature, so that users' functions run unchanged."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from grpo_jax import processes
from grpo_jax.rewards.calling import LogMetric, RewardFunction, TrainerState, call, group_size_of, ignore, name_of
from grpo_jax.rewards.conversations import Read, conversation_messages, given_rewards, written_in_turn
from grpo_jax.types import Array, Prompts, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HostReward(Protocol):
    """The reward of a rollout, computed on the host."""

    def __call__(self, rollout: Rollout, trainer_state: TrainerState | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores.

        Args:
          rollout: with `prompts.info["row"]`.
          trainer_state: the place in the run, for functions that ask for it; None outside of one.

        Returns:
          Rewards `[B, G, R]` float32, and `reward_mask [B, G, R]` bool, False where there is none.
        """


def host(
    functions: Sequence[RewardFunction],
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt_column: str = "prompt",
    eos_ids: Sequence[int] | None = None,
    log_metric: LogMetric | None = None,
    report_after: float | None = 300.0,
    read: Read | None = None,
) -> HostReward:
    """Makes `(rollout, trainer_state=None) -> (rewards, reward_mask)` of functions with TRL's signature.

        f(prompts, completions, **columns) -> list[float | None]

    The functions see lists with one entry per completion, group after group. A function with `**kwargs` is given all
    of them, another one those that it names:

    - `prompts`, as the data set has them;
    - `completions`, as text without the end token (`completion_texts`), or as
      `[{"role": "assistant", "content": text}]` where prompts are messages; of conversations, all messages after the
      prompt (`conversation_messages`), and `turn_rewards`, what the environment gave for each turn;
    - every other column of the data set by its name, None where a row lacks it;
    - `completion_ids`, the tokens, with the end token; of conversations those that the policy wrote;
    - `prompt_tail`, the end of the prompt's text as the template made it (`prompt_tails`), by which format rewards
      see that a template opens `<think>` itself;
    - `gold_column`, the column that `--answer-column` has made the answers of, where it has (`data.read_problems`);
    - from TRL `trainer_state`, with `global_step` and `max_steps`, and the loggers `log_metric(name, value)` and
      `log_extra(column, values)`.

    Of several processes (`grpo_jax.processes`) each calls the functions on its own groups, and all get the rewards of
    all. A function that raises in one process raises in all.

    Each function has copies of its own, which it may change. None, and NaN with a warning, say that there is no
    reward for a completion; it is masked, not scored. Functions that are `async` wait together, on one event loop for
    the whole run, so that they may keep a client.

    Args:
      functions: `R` of them.
      dataset: rows that `prompts.info["row"]` points into.
      tokenizer: turns tokens into text.
      prompt_column: the name of the prompt's column.
      eos_ids: the tokens that end completions, as the sampler has them; None for the tokenizer's one.
      log_metric: where metrics of the functions go; None drops them. What functions pass to `log_extra` is dropped in
        any case: there is no table of completions here.
      report_after: seconds after which a function that has not returned is reported as a `RuntimeWarning`, with the
        line that it is at; None never. It runs in this process and cannot be stopped (`in_worker_processes`).
      read: of conversations, reads what the environment said; see `conversation_messages`.

    Returns:
      The reward. Conversations in which the environment failed have none. An exception of a function passes through
      as it is, with a note that names the function; `sys.exit` and CancelledError in one are a `RuntimeError`.

    Raises:
      ValueError: if the data set has no `prompt_column`; of several processes, if some functions tell the others that
        they failed and some do not (`skip_failed_batches`). From the reward, if the prompts do not name their rows; if
        a function needs groups of another size (`group_size_of`); for a wrong number of values, or one that is
        infinite or no number, with the function's name and the value; for values of a group beyond 2^24 that float32
        cannot tell apart.
    """
    # All rows' columns, whatever rows a batch has. A `datasets.Dataset` knows them without reading the rows.
    names = getattr(dataset, "column_names", None) or list(dict.fromkeys(name for row in dataset for name in row))
    if len(dataset) and prompt_column not in names:
        raise ValueError(f"the data set has no column {prompt_column!r} for the prompts, only {names}")

    gold_column = getattr(dataset[0], "gold_column", None) if len(dataset) else None  # of `data.rows`
    telling = [name_of(f) for f in functions if getattr(f, "takes_part", False)]
    if jax.process_count() > 1 and 0 < len(telling) < len(functions):
        others = [name_of(f) for f in functions if not getattr(f, "takes_part", False)]
        raise ValueError(
            f"{', '.join(telling)} would wait for other processes in which {', '.join(others)} has raised: wrap all of "
            "the functions in skip_failed_batches, or none"
        )

    def reward(rollout: Rollout, trainer_state: TrainerState | None = None) -> tuple[np.ndarray, np.ndarray]:
        shape = (*rollout.lengths.shape, len(functions))
        own, rollout = own_texts(rollout)
        logged: list[tuple[str, float]] = []

        def log(name: str, value: float) -> None:
            logged.append((name, float(value)))

        with processes.alike("reward"):
            values = of_groups(rollout, trainer_state, log)
        rewards = np.empty(shape, np.float32)
        for rows, found, metrics in processes.exchange("rewards", (own.tolist(), values.tolist(), logged)):
            rewards[np.asarray(rows, int)] = np.reshape(found, (len(rows), *shape[1:]))
            for name, value in metrics:
                (log_metric or ignore)(name, value)
        return np.nan_to_num(rewards), ~np.isnan(rewards)

    def of_groups(rollout: Rollout, trainer_state: TrainerState | None, log: LogMetric) -> np.ndarray:
        """Rewards `[B, G, R]` of groups that are here, NaN where there is none."""
        B, G, _ = rollout.tokens.shape
        if "row" not in rollout.prompts.info:
            raise ValueError("the prompts do not name their rows of the data set: make_prompts(prompts, rows)")
        for function in functions:
            if group_size_of(function) not in (None, G):
                size = group_size_of(function)
                raise ValueError(f"{name_of(function)} compares groups of {size} completions, and these have {G}")
        rows = [dataset[row] for row in np.repeat(np.asarray(rollout.prompts.info["row"]), G).tolist()]
        prompts = [row[prompt_column] for row in rows]
        chat = bool(prompts) and not isinstance(prompts[0], str)
        completions: list[Any] = _flat(completion_texts(rollout, tokenizer, eos_ids))
        if chat:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        if rollout.turns is not None:
            completions = _flat(conversation_messages(rollout, tokenizer, _ends(tokenizer, eos_ids), read))
        columns = {name: [row.get(name) for row in rows] for name in names if name != prompt_column}
        arguments = columns | {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": sampled_tokens(rollout) if rollout.turns is None else _policy_tokens(rollout),
            "prompt_tail": [tail for tail in prompt_tails(rollout.prompts, tokenizer) for _ in range(G)],
            "trainer_state": trainer_state,
            "log_metric": log,
            "log_extra": ignore,
        }
        if gold_column is not None:
            arguments["gold_column"] = gold_column
        if rollout.turns is not None:
            arguments["turn_rewards"] = given_rewards(rollout)
        values = np.reshape(call(functions, arguments, B * G, report_after=report_after), (len(functions), B, G))
        for function, given in zip(functions, values, strict=True):
            _refuse_merged(function, given)
        rewards = values.astype(np.float32).transpose(1, 2, 0)
        return rewards if rollout.turns is None else np.where(rollout.turns.failed[..., None], np.nan, rewards)

    return reward


def _refuse_merged(function: RewardFunction, values: np.ndarray) -> None:
    """Refuses values `[B, G]` of which float32, in which advantages are computed, would lose the differences.

    Up to 2^24 it tells whole numbers apart, and what it does not is rounding.
    """
    for group in values:
        group = group[~np.isnan(group)]
        lost = np.abs(group - group.astype(np.float32)).max(initial=0.0)
        if group.size and np.abs(group).max() > 2**24 and lost > 1e-2 * np.ptp(group) > 0:
            raise ValueError(
                f"the reward function {name_of(function)} returned {group.min():.12g} to {group.max():.12g} for one "
                "prompt, which float32 cannot tell apart: subtract what all of them have in common"
            )


def _flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [entry for group in groups for entry in group]


def _ends(tokenizer: "PreTrainedTokenizerBase", eos_ids: Sequence[int] | None) -> set[int]:
    return {tokenizer.eos_token_id} if eos_ids is None else set(map(int, eos_ids))


def completion_texts(
    rollout: Rollout, tokenizer: "PreTrainedTokenizerBase", eos_ids: Sequence[int] | None = None
) -> list[list[str]]:
    """The text of each completion, `[B][G]`: all of its tokens but the end tokens.

    Special tokens are text too: tags may be among them, as `<think>` is in some tokenizers.

    Args:
      rollout: on any device.
      tokenizer: of the policy.
      eos_ids: the end tokens; None for the tokenizer's one.
    """
    ends = _ends(tokenizer, eos_ids)
    written = [[token for token in ids if token not in ends] for ids in sampled_tokens(rollout)]
    texts = tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    G = rollout.tokens.shape[1]
    return [texts[start : start + G] for start in range(0, len(texts), G)]


def prompt_tails(prompts: Prompts, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    r"""The end of each prompt's text, `[B]`, after its last special token: `assistant\n<think>\n` with a chat template.

    A special token with a partner, as `<think>` has `</think>`, is a tag and part of the text.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    specials = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    words = dict(zip(specials, tokenizer.convert_ids_to_tokens(list(specials)), strict=True))
    tags = {id for id, word in words.items() if id not in ends and _partner(word) in words.values()}
    marks = specials - tags
    tails = []
    for tokens, length in zip(np.asarray(prompts.tokens).tolist(), np.asarray(prompts.lengths).tolist(), strict=True):
        last = max((i for i in range(length) if tokens[i] in marks), default=-1)
        tails.append(tokens[last + 1 : length])
    return tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _partner(word: str) -> str:
    """`</think>` of `<think>` and the other way round."""
    return f"<{word[2:]}" if word.startswith("</") else f"</{word[1:]}"


def own_texts(rollout: Rollout) -> tuple[np.ndarray, Rollout]:
    """The numbers of the groups that this process looks after, and the rollout with what tells their texts.

    `prompts`, `tokens` and `lengths`, and of conversations who wrote what and the turns, are those groups' alone; the
    other fields stay as they are.
    """
    fields = ["prompts", "tokens", "lengths"]
    if rollout.turns is not None:
        fields += ["mask", "log_probs", "turns"]
    own, here = processes.own_rows({name: getattr(rollout, name) for name in fields}, of=rollout.tokens)
    return own, rollout._replace(**here)


def _policy_tokens(rollout: Rollout) -> list[list[int]]:
    """The tokens of each conversation that the policy wrote, group after group."""
    return [
        [token for tokens, wrote in written_in_turn(rollout, b, g) if wrote for token in tokens]
        for b, g in np.ndindex(rollout.lengths.shape)
    ]


def sampled_tokens(rollout: Rollout) -> list[list[int]]:
    """The tokens of each completion, group after group."""
    tokens = np.asarray(rollout.tokens).reshape(-1, rollout.tokens.shape[-1])
    lengths = np.asarray(rollout.lengths).reshape(-1)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def callback(
    reward: Callable[[Rollout], tuple[np.ndarray, np.ndarray]], num_rewards: int
) -> tuple[Callable[[Rollout], tuple[Array, Array]], Callable[[], None]]:
    """Makes a traced reward of a host one, for a step that is one program on one process.

    An exception cannot pass through a compiled program. It is kept, the step goes on
    with every reward masked, so that nothing is learned from it, and `reraise` raises
    it after the step. The normal place of a host reward is between `collect` and
    `learn`, where none of this is needed.

    Args:
      reward: of `host`; its functions see no `trainer_state`.
      num_rewards: `R`.

    Returns:
      The traced reward, and `reraise`, to be called after each step.
    """
    failures: list[Exception] = []

    def on_host(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        shape = (*rollout.lengths.shape, num_rewards)
        try:
            rewards, reward_mask = reward(rollout)
            if rewards.shape != shape or reward_mask.shape != shape:
                raise ValueError(f"the reward returned shapes {rewards.shape} and {reward_mask.shape}, not {shape}")
            return np.asarray(rewards, np.float32), np.asarray(reward_mask, bool)
        except Exception as error:
            failures.append(error)
            return np.zeros(shape, np.float32), np.zeros(shape, bool)

    def traced(rollout: Rollout) -> tuple[Array, Array]:
        shape = (*rollout.lengths.shape, num_rewards)
        shapes = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.bool_)
        # Not pure_callback: XLA may hoist that out of a scan and call it once.
        return io_callback(on_host, shapes, rollout, ordered=False)

    def reraise() -> None:
        jax.effects_barrier()  # a device may still be at the step
        if failures:
            error = failures[0]
            failures.clear()
            raise error

    return traced, reraise
