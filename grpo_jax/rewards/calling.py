"""One call of reward functions with TRL's signature: the arguments that each is given, and the checks of its values.

```python
values = call([length, judge], {"prompts": [...], "completions": [...], "answer": [...]}, count=2)
```
"""

import contextlib
import copy
import dataclasses
import inspect
import math
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.event_loop import all_of, is_cancelled, run_async
from grpo_jax.user_code import put_back

RewardFunction = Callable[..., Any]  # f(prompts, completions, **columns) -> list[float | None], plain or async
LogMetric = Callable[[str, float], None]
IMMUTABLE = {int, float, bool, str, bytes, type(None)}


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """The place in the run, as reward functions read it from TRL's object of this name."""

    global_step: int  # updates made so far: 0 for the first batch
    max_steps: int


def name_of(function: Callable[..., Any]) -> str:
    """The name by which metrics and messages call a reward function."""
    return getattr(function, "__name__", None) or type(function).__name__


def group_size_of(function: Callable[..., Any]) -> int | None:
    """The `G` that a reward function needs since it compares the completions of a group, else None.

    A function says so by an attribute, `function.group_size = 8`. Such a function cannot score one completion per
    prompt: whoever evaluates by it samples groups of that size.
    """
    return getattr(function, "group_size", None)


def of_groups(function: RewardFunction, group_size: int) -> RewardFunction:
    """Says of a function that it compares the completions of groups of this size; see `group_size_of`."""
    vars(function)["group_size"] = group_size
    return function


class Reads(NamedTuple):
    """What a reward function looks for among its `**columns`, of which its parameters tell nothing."""

    columns: tuple[str, ...] = ()  # all of these
    golds: tuple[str, ...] = ()  # of these the first that is there: gold answers, which are text or numbers
    calls: tuple[RewardFunction, ...] = ()  # functions that are given the same columns
    told: Callable[[str], bool] | None = None  # whether it can tell a gold answer by its text; None where it always can


def reading(
    function: RewardFunction,
    *,
    columns: Sequence[str] = (),
    golds: Sequence[str] = (),
    calls: Sequence[RewardFunction] = (),
    told: Callable[[str], bool] | None = None,
) -> RewardFunction:
    """Says of a function what it reads (`Reads`), so that it is looked at before a run; see `run.inputs`."""
    vars(function)["reads"] = Reads(tuple(columns), tuple(golds), tuple(calls), told)
    return function


def reads_of(function: Callable[..., Any]) -> Reads:
    """What a reward function says that it reads beside its parameters."""
    found = getattr(function, "reads", None)
    return found if isinstance(found, Reads) else Reads()


def ignore(name: str, value: Any) -> None:
    """A `log_metric` that drops the metric."""


def call(
    functions: Sequence[RewardFunction],
    arguments: Mapping[str, Any],
    count: int,
    *,
    report_after: float | None = None,
) -> list[list[float]]:
    """The values that each reward function gives to `count` completions; NaN where it gave none.

    Each function is given those of the arguments that it takes, in copies of its own, one per completion: a function
    that writes into them changes nothing for other functions, other completions, or the data set. What one has changed
    of the process is put back (`user_code.put_back`). Functions that are `async` wait together. None is asked about no
    completions, unless it has something to tell other processes: then its attribute `takes_part` is True.

    Args:
      functions: plain or async.
      arguments: by name; a list has one entry per completion.
      count: of the completions.
      report_after: seconds after which a function that has not returned is reported.

    Returns:
      A list of `count` numbers per function. NaN where it returned None, or NaN.

    Raises:
      ValueError: for a wrong number of values or one that is no number, or infinite.
      RuntimeError: for a function that called `sys.exit`, or raised what is no `Exception`, such as CancelledError.
        Other exceptions pass through, with a note that names the function, and Ctrl-C as it is.

    Warns:
      RuntimeWarning: for NaN, which is also counted as `<name>/nan` where the arguments have a `log_metric`; for a
        function at work for longer than `report_after`; and for one that has changed the working directory.
    """
    results: list[Any] = []
    try:
        for function in functions:
            if not count and not getattr(function, "takes_part", False):
                results.append([])
                continue
            with noted(function, count), reported([function], count, report_after), _put_back([function]):
                results.append(function(**accepted(function, arguments)))
        if any(map(inspect.isawaitable, results)):
            waiting = [f for f, result in zip(functions, results, strict=True) if inspect.isawaitable(result)]
            with reported(waiting, count, report_after), _put_back(waiting):
                results = run_async(_gathered(functions, results, count))
    finally:
        for result in results:
            if inspect.iscoroutine(result):  # one that was never waited for, since another function raised
                result.close()
    log_metric = arguments.get("log_metric", ignore)
    return [numbers(function, values, count, log_metric) for function, values in zip(functions, results, strict=True)]


def accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes, in copies of its own."""
    parameters = inspect.signature(function).parameters.values()
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    # Entry by entry: in a deep copy of the list a group would still share its prompt.
    return {
        name: copies(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if everything or name in names
    }


def copies(entries: Sequence[Any]) -> list[Any]:
    """A list of a function's own, which it may write into."""
    return [_copied(entry) for entry in entries]


def _copied(entry: Any) -> Any:
    if type(entry) is list and set(map(type, entry)) <= IMMUTABLE:  # of completion_ids, 10 times as fast
        return entry.copy()
    return copy.deepcopy(entry)


@contextlib.contextmanager
def noted(function: RewardFunction, count: int, *, awaited: bool = False) -> Iterator[None]:
    """Adds the function's name to an exception, and makes a failure of those that would end the run.

    They are `sys.exit`, a task of the function's own that was cancelled, GeneratorExit, and others that are no
    `Exception`, as some libraries' timeouts are; not Ctrl-C, nor where the function is `awaited` and it is the function
    itself that is cancelled or closed.
    """
    note = f"raised by the reward function {name_of(function)} over {count} completions"
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if awaited and (isinstance(error, GeneratorExit) or is_cancelled()):
            raise
        did = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
        raised = RuntimeError(f"a reward function {did}")
        raised.add_note(note)
        raise raised from error


@contextlib.contextmanager
def reported(functions: Sequence[RewardFunction], count: int, seconds: float | None) -> Iterator[None]:
    """Reports functions that have not returned after so many seconds, with the line that they are at."""
    thread = threading.get_ident()

    def report() -> None:
        names = ", ".join(map(name_of, functions))
        stack = "".join(traceback.format_stack(sys._current_frames().get(thread), limit=8))
        warnings.warn(
            f"the reward {names} has been at work on {count} completions for {seconds:g} s. It runs in this process, "
            "where it cannot be stopped; rewards.in_worker_processes gives each completion a time limit. It is at\n"
            f"{stack}",
            RuntimeWarning,
            stacklevel=2,
        )

    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _put_back(functions: Sequence[RewardFunction]) -> contextlib.AbstractContextManager[None]:
    return put_back(f"the reward {', '.join(map(name_of, functions))}")


async def _gathered(functions: Sequence[RewardFunction], results: Sequence[Any], count: int) -> list[Any]:
    """The results; those that are awaitable are waited for together."""

    async def wait(function: RewardFunction, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result
        with noted(function, count, awaited=True):
            return await result

    return await all_of(map(wait, functions, results))


def numbers(function: RewardFunction, values: Any, count: int, log_metric: LogMetric = ignore) -> list[float]:
    """The values of one function as floats, checked as `call` says."""
    # Text, sets and mappings have a length too, and their elements may pass for numbers.
    listed = getattr(values, "ndim", 0) == 1 or (isinstance(values, Sequence) and not isinstance(values, str | bytes))
    if not listed or len(values) != count:
        got = f"{len(values)} values" if listed else type(values).__name__
        raise ValueError(f"the reward function {name_of(function)} returned {got} for {count} completions")
    checked = [math.nan if value is None else _number(function, i, value) for i, value in enumerate(values)]
    if nans := [i for i, (value, number) in enumerate(zip(values, checked, strict=True)) if _is_nan(value, number)]:
        log_metric(f"{name_of(function)}/nan", float(len(nans)))
        warnings.warn(
            f"the reward function {name_of(function)} returned NaN for {len(nans)} of {count} completions, which are "
            f"masked; the first is completion {nans[0]}",
            RuntimeWarning,
            stacklevel=3,
        )
    return checked


def _is_nan(value: Any, number: float) -> bool:
    return value is not None and math.isnan(number)


def _number(function: RewardFunction, i: int, value: Any) -> float:
    try:
        # Python makes a number of text, and NumPy before 2.4 of an array of one element.
        number = math.inf if isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if abs(number) > float(np.finfo(np.float32).max):  # not so for NaN
        raise ValueError(
            f"the reward function {name_of(function)} returned {value!r} for completion {i}; a reward is a "
            "finite number, or None where there is none to give"
        )
    return number
