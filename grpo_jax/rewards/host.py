"""Verifiers on text, on the host, with TRL's signature, so that users' functions run unchanged."""

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from grpo_jax.types import Array, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., Any]  # f(prompts, completions, **columns) -> list[float | None], plain or async
LogMetric = Callable[[str, float], None]
HostReward = Callable[[Rollout], tuple[np.ndarray, np.ndarray]]  # rewards [B, G, R] float32, mask [B, G, R] bool


def host(
    functions: Sequence[RewardFunction],
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt_column: str = "prompt",
    log_metric: LogMetric | None = None,
) -> HostReward:
    """Makes `rollout -> (rewards, mask)` of functions `f(prompts, completions, **columns) -> list[float | None]`.

    The functions see lists with one entry a completion, group after group: the prompts
    as the data set has them, the completions as text without special tokens (as
    `[{"role": "assistant", "content": text}]` where prompts are messages), the token
    ids as `completion_ids`, and every other column of the data set by its name, None
    where a row lacks it; and from TRL `log_metric(name, value)` and `log_extra(column,
    values)`. A function without `**kwargs` is given what it names. None says that a
    completion could not be judged; it is masked, not scored. Functions that are `async`
    wait together, on an event loop of their own.

    Args:
      functions: `R` of them.
      dataset: rows that `prompts.info["row"]` points into.
      tokenizer: turns tokens into text.
      prompt_column: the name of the prompt's column.
      log_metric: where metrics of the functions go; None drops them, as what is given to
        `log_extra` is dropped: there is no table of completions here.

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
            "log_metric": log_metric or _ignore,
            "log_extra": _ignore,
        }
        judged = call(functions, arguments, B * G)
        rewards = np.array(judged, np.float32).reshape(len(functions), B, G).transpose(1, 2, 0)
        return np.nan_to_num(rewards), ~np.isnan(rewards)

    return reward


def name_of(function: Callable[..., Any]) -> str:
    """What a reward function is called in metrics and messages."""
    return getattr(function, "__name__", None) or type(function).__name__


def _ignore(name: str, value: Any) -> None:
    """Takes a metric that nobody asked for."""


def combine(functions: Sequence[RewardFunction], *, weights: Sequence[float] | None = None) -> RewardFunction:
    """One reward function made of several: their weighted sum.

        r[i] = sum over k of weights[k] * functions[k](...)[i]

    A value that could not be given is left out of the sum; where none could, the sum is
    None. Given TRL's `log_metric`, it logs each function's mean and deviation as
    `reward/<name>` and `reward/<name>_std`. (Several functions under `host`, weighed by `from_rewards`,
    keep their rewards apart instead, and have the same metrics.)

    Args:
      functions: reward functions, plain or async.
      weights: one a function; all 1 if None.

    Raises:
      ValueError: for no function, or another number of weights.
    """
    if not functions or (weights is not None and len(weights) != len(functions)):
        given = None if weights is None else len(weights)
        raise ValueError(f"combine takes at least one function and a weight for each, got {len(functions)} and {given}")
    scale = np.ones(len(functions)) if weights is None else np.asarray(weights, np.float64)

    def combined(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric = _ignore, **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "log_metric": log_metric}
        values = np.array(call(functions, arguments, len(completions)), np.float64).reshape(len(functions), -1)
        given: Any = ~np.isnan(values)
        for function, row, kept in zip(functions, values, given, strict=True):
            if kept.any():
                log_metric(f"reward/{name_of(function)}", float(row[kept].mean()))
                log_metric(f"reward/{name_of(function)}_std", float(row[kept].std()))
        total = np.where(given, scale[:, None] * np.nan_to_num(values), 0.0).sum(axis=0)
        return [float(x) if kept else None for x, kept in zip(total, given.any(axis=0), strict=True)]

    return combined


def skip_failed_batches(function: RewardFunction, *, batches: int = 3) -> RewardFunction:
    """Masks the batches that a reward function fails on, up to a number of them in a row.

    What an exception costs is then a batch from which nothing is learned, and not the
    run; nothing is scored as 0. It is told as a `RuntimeWarning` with its traceback and,
    given TRL's `log_metric`, counted as `<name>/failed`, 1 or 0 a batch.

    Args:
      function: plain or async. For faults of single completions, see `pool.in_worker_processes`.
      batches: at this many failures in a row the exception passes through; 1 is at once.

    Raises:
      ValueError: for fewer than 1 batch.
    """
    if batches < 1:
        raise ValueError(f"batches is at least 1, got {batches}")
    name, failures = name_of(function), 0

    def succeeded(values: Sequence[float], log_metric: LogMetric) -> list[float | None]:
        nonlocal failures
        failures = 0
        log_metric(f"{name}/failed", 0.0)
        return [None if math.isnan(value) else value for value in values]

    def failed(error: Exception, arguments: Mapping[str, Any]) -> list[float | None]:
        nonlocal failures
        failures += 1
        if failures >= batches:
            raise error
        count = len(arguments["completions"])
        warnings.warn(
            f"{name} failed on a batch of {count} completions, the first of them to the prompt "
            f"{str(arguments['prompts'][0])[:80]!r}; the batch is masked, failure {failures} in a row of {batches} "
            f"that end the run\n{''.join(traceback.format_exception(error))}",
            RuntimeWarning,
            stacklevel=3,
        )
        arguments["log_metric"](f"{name}/failed", 1.0)
        return [None] * count

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric = _ignore, **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "log_metric": log_metric}
        try:
            return succeeded(call([function], arguments, len(completions))[0], log_metric)
        except Exception as error:
            return failed(error, arguments)

    async def awaited(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric = _ignore, **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "log_metric": log_metric}
        try:
            with _noted(function, len(completions)):
                values: Any = await function(**_accepted(function, arguments))
            return succeeded(_numbers(function, values, len(completions)), log_metric)
        except Exception as error:
            return failed(error, arguments)

    # One that is async stays so, to be waited for together with the others.
    made: RewardFunction = awaited if inspect.iscoroutinefunction(function) else reward
    made.__name__ = made.__qualname__ = name
    return made


def call(functions: Sequence[RewardFunction], arguments: Mapping[str, Any], count: int) -> list[list[float]]:
    """The values that each reward function gives to `count` completions; NaN where it returned None.

    Each is given those of the arguments that it takes. Those that are `async` are waited for together.

    Raises:
      ValueError: for a wrong number of values or one that is not a finite number or None. An exception of a function
        passes through, with a note that names it.
    """
    results: list[Any] = []
    try:
        for function in functions:
            with _noted(function, count):
                results.append(function(**_accepted(function, arguments)))
        results = _gathered(functions, results, count)
    finally:
        for result in results:
            if inspect.iscoroutine(result):  # one that was never waited for, since another function raised
                result.close()
    return [_numbers(function, values, count) for function, values in zip(functions, results, strict=True)]


def _accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


@contextlib.contextmanager
def _noted(function: RewardFunction, count: int) -> Iterator[None]:
    """Adds to an exception which function raised it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by the reward function {name_of(function)} over {count} completions")
        raise


def _gathered(functions: Sequence[RewardFunction], results: list[Any], count: int) -> list[Any]:
    """The results, with what is awaitable waited for, all together."""

    async def wait(function: RewardFunction, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result
        with _noted(function, count):
            return await result

    async def wait_for_all() -> list[Any]:
        return await asyncio.gather(*map(wait, functions, results))

    if not any(map(inspect.isawaitable, results)):
        return results
    # In a thread: a notebook has a running loop already, inside of which no other can run.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(wait_for_all())).result()


def _numbers(function: RewardFunction, values: Any, count: int) -> list[float]:
    """The values of one function, checked."""
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
