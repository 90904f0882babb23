"""Reward functions that fail now and then: the batch is masked, and the run goes on."""

import asyncio
import inspect
import math
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax import processes
from grpo_jax.rewards.calling import (
    LogMetric,
    RewardFunction,
    accepted,
    call,
    group_size_of,
    ignore,
    name_of,
    noted,
    reading,
)
from grpo_jax.rewards.calling import numbers as checked


def skip_failed_batches(function: RewardFunction, *, batches: int = 3) -> RewardFunction:
    """Masks the batches that a reward function fails on, up to a number of them in a row.

    An exception (`sys.exit` and a cancelled task too) then costs a batch and not the run, and nothing is scored as 0.
    It is reported as a `RuntimeWarning` with its traceback and, given TRL's `log_metric`, counted as `<name>/failed`, 1
    or 0 per batch.

    Of several processes, one in which the function fails is enough: all mask their parts of the batch, and count it.

    The count is this wrapper's own: training and evaluation, each with a wrapper, do not count each other's failures.

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
        first = f", the first of them to the prompt {str(arguments['prompts'][0])[:80]!r}" if count else ""
        warnings.warn(
            f"{name} failed on a batch of {count} completions{first}; the batch is masked, failure {failures} in a row "
            f"of {batches} that end the run\n{''.join(traceback.format_exception(error))}",
            RuntimeWarning,
            stacklevel=3,
        )
        arguments["log_metric"](f"{name}/failed", 1.0)
        return [None] * count

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric = ignore, **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "log_metric": log_metric}
        values: Sequence[float] = []
        raised: Exception | None = None
        try:
            values = call([function], arguments, len(completions))[0]
        except Exception as error:
            raised = error
        raised = processes.shared_error(f"failed/{name}", raised)
        return succeeded(values, log_metric) if raised is None else failed(raised, arguments)

    async def awaited(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric = ignore, **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "log_metric": log_metric}
        values: Sequence[float] = []
        raised: Exception | None = None
        try:
            if completions:
                with noted(function, len(completions), awaited=True):
                    returned: Any = await function(**accepted(function, arguments))
                values = checked(function, returned, len(completions), log_metric)
        except Exception as error:
            raised = error
        # In a thread, since the other processes may wait for another function first.
        raised = await asyncio.to_thread(processes.shared_error, f"failed/{name}", raised)
        return succeeded(values, log_metric) if raised is None else failed(raised, arguments)

    # One that is async stays so, to be waited for together with the others.
    made: Any = awaited if inspect.iscoroutinefunction(function) else reward
    made.__name__ = made.__qualname__ = name
    made.takes_part = True
    reading(made, calls=[function])
    if group_size_of(function) is not None:
        made.group_size = group_size_of(function)
    return made
