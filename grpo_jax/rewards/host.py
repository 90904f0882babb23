"""Verifiers on text, on the host, with TRL's signature, so that users' functions run unchanged."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from transformers import PreTrainedTokenizerBase

from grpo_jax.types import Array, Rollout

RewardFunction = Callable[..., Sequence[float | None]]  # f(prompts, completions, **columns)
HostReward = Callable[[Rollout], tuple[np.ndarray, np.ndarray]]  # rewards [B, G, R] float32, mask [B, G, R] bool


def host(
    functions: Sequence[RewardFunction],
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str = "prompt",
) -> HostReward:
    """Makes `rollout -> (rewards, mask)` of functions `f(prompts, completions, **columns) -> list[float | None]`.

    The functions see lists with one entry a completion, group after group: the prompts
    as the data set has them, the completions as text without special tokens (as
    `[{"role": "assistant", "content": text}]` where prompts are messages), the token
    ids as `completion_ids`, and every other column of the data set by its name, None
    where a row lacks it. A function without `**kwargs` is given what it names. None says
    that a completion could not be judged; it is masked, not scored.

    Args:
      functions: `R` of them.
      dataset: rows that `prompts.info["row"]` points into.
      tokenizer: turns tokens into text.
      prompt_column: the name of the prompt's column.

    Returns:
      The reward. An exception of a function passes through as it is, with a note that
      names the function.

    Raises:
      ValueError: if the data set has no `prompt_column`. From the reward, if the prompts
        do not say their rows; for a wrong number of values or one that is not a finite
        number or None, with the function's name and what it returned.
    """
    # All rows' columns, whatever rows a batch has. A `datasets.Dataset` knows them without reading the rows.
    names = getattr(dataset, "column_names", None) or list(dict.fromkeys(name for row in dataset for name in row))
    if len(dataset) and prompt_column not in names:
        raise ValueError(f"the data set has no column {prompt_column!r} for the prompts, only {names}")

    def reward(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        B, G, _ = rollout.tokens.shape
        if "row" not in rollout.prompts.info:
            raise ValueError("the prompts do not say their rows of the data set: make_prompts(prompts, rows)")
        rows = [dataset[row] for row in np.repeat(np.asarray(rollout.prompts.info["row"]), G).tolist()]
        tokens = np.asarray(rollout.tokens).reshape(B * G, -1)
        ids = [row[:n].tolist() for row, n in zip(tokens, np.asarray(rollout.lengths).reshape(-1), strict=True)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [row[prompt_column] for row in rows]
        chat = not isinstance(prompts[0], str)
        columns = {name: [row.get(name) for row in rows] for name in names if name != prompt_column}
        arguments = columns | {
            "prompts": prompts,
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
            "completion_ids": ids,
        }
        judged = [_judge(function, arguments, B * G) for function in functions]
        rewards = np.array(judged, np.float32).reshape(len(functions), B, G).transpose(1, 2, 0)
        return np.nan_to_num(rewards), ~np.isnan(rewards)

    return reward


def name_of(function: Callable[..., Any]) -> str:
    """What a reward function is called in metrics and messages."""
    return getattr(function, "__name__", None) or type(function).__name__


def _judge(function: RewardFunction, arguments: Mapping[str, Any], count: int) -> list[float]:
    """The values of one function; NaN where it returned None."""
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    try:
        values = function(**arguments)
    except Exception as error:
        error.add_note(f"raised by the reward function {name_of(function)} over {count} completions")
        raise
    # Text, sets and mappings have a length too, and their elements may pass for numbers.
    listed = getattr(values, "ndim", 0) == 1 or (isinstance(values, Sequence) and not isinstance(values, str | bytes))
    if not listed or len(values) != count:
        got = f"{len(values)} values" if listed else type(values).__name__
        raise ValueError(f"the reward function {name_of(function)} returned {got} for {count} completions")
    return [_number(function, i, value) for i, value in enumerate(values)]


def _number(function: RewardFunction, i: int, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        # Python makes a number of text, and NumPy before 2.4 of an array of one element.
        number = math.nan if isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"the reward function {name_of(function)} returned {value!r} for completion {i}; a reward is a "
            "finite number, or None where there is none to give"
        )
    return number


def callback(
    reward: HostReward, num_rewards: int
) -> tuple[Callable[[Rollout], tuple[Array, Array]], Callable[[], None]]:
    """Makes a traced reward of a host one, for a step that is one program on one process.

    An exception cannot pass through a compiled program. It is kept, the step goes on
    with every reward masked, so that nothing is learned from it, and `reraise` raises
    it after the step. The normal place of a host reward is between `collect` and
    `learn`, where none of this is needed.

    Args:
      reward: of `host`.
      num_rewards: `R`.

    Returns:
      The traced reward, and `reraise`, to be called after each step.
    """
    failures: list[Exception] = []

    def on_host(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        shape = (*rollout.lengths.shape, num_rewards)
        try:
            rewards, given = reward(rollout)
            if rewards.shape != shape or given.shape != shape:
                raise ValueError(f"the reward returned shapes {rewards.shape} and {given.shape}, not {shape}")
            return np.asarray(rewards, np.float32), np.asarray(given, bool)
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
