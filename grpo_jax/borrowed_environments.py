"""Environments that others wrote: TRL's classes, and any verifier that is asked several times.

```python
respond = trl_environment(Wordle)                          # a class with reset, get_reward and tools as methods
rows = with_first_observations(Wordle, rows)               # what its reset says belongs to the prompt
respond = attempts(task.verifier, again="That is not right. Try again.")      # such as of tasks.reasoning_gym
```
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.data import Row
from grpo_jax.environments import Message, Respond, Turn
from grpo_jax.event_loop import run_async
from grpo_jax.rewards.calling import RewardFunction, call, name_of
from grpo_jax.tools import Calls, any_calls, called

STATE = "_environment"  # the column of a conversation's row that holds its environment
REWARDED = "_environment_rewarded"  # and that of what it has been rewarded with so far


def trl_environment(
    factory: Callable[[], Any],
    *,
    reward: RewardFunction | None = None,
    calls: Calls = any_calls,
    longest: int = 4000,
    seconds: float = 45.0,
    prompt_column: str = "prompt",
) -> Respond:
    """Makes an environment of a class as TRL's `environment_factory` takes it.

        class Counter:
            def reset(self, **row) -> str | None: ...        # row: the columns of the data set
            def increment(self, by: int) -> int: ...         # any other public method is a tool
            def get_reward(self) -> float: ...               # may be left out

    Each conversation has an object of its own, reset with its row before the first answer. Methods may be `async`.
    Where TRL asks for the reward once, at the end, it is asked for after each turn here, so that `get_reward` must
    change nothing; what it has gained since the turn before is that turn's: the sum is the last one, also where
    the conversation is cut. What `reset` returns is not said here: see `with_first_observations`.

    Args:
      factory: the class, or a function that makes such an object.
      reward: asked in place of `get_reward`: a reward function that takes TRL's `environments`,
        `f(prompts, completions, environments, **columns)`. It is called for one conversation at a time, after each
        turn, with its object and the messages since the prompt; None for no reward.
      calls: the reader of calls in the policy's text.
      longest: characters of a tool's result.
      seconds: for the calls of a turn, as in `tools.environment`.
      prompt_column: of the rows, for `reward`.

    Raises:
      ValueError: if the object has no `reset`.
    """
    example = factory()
    names = _tools(example)
    raised: dict[str, int] = {}

    def respond(row: Row, messages: list[Message]) -> Turn:
        if STATE not in row:
            columns = dict(row)
            row[STATE] = made = factory()
            _awaited(made.reset(**columns))
            row[REWARDED] = 0.0
        made = row[STATE]
        present = calls(messages[-1]["content"])
        turn = Turn(None)
        if present:
            by_name = {name: getattr(made, name) for name in names}
            turn = called(by_name, present, longest=longest, seconds=seconds, raised=raised)
        if (total := total_of(made, row, messages)) is None:
            return turn
        gained, row[REWARDED] = total - row[REWARDED], total
        return turn._replace(reward=gained)

    def total_of(made: Any, row: Row, messages: list[Message]) -> float | None:
        if reward is None:
            return float(_awaited(made.get_reward())) if hasattr(made, "get_reward") else None
        prompt = row[prompt_column]
        columns = {name: [value] for name, value in row.items() if name not in (prompt_column, STATE, REWARDED)}
        completion = messages[1 if isinstance(prompt, str) else len(prompt) :]
        # Not a list, whose entries would be copied: an object may hold a connection.
        given = {"prompts": [prompt], "completions": [completion], "environments": (made,), **columns}
        ((total,),) = call([reward], given, 1)
        return None if math.isnan(total) else float(total)

    told: Any = respond
    told.tools = [getattr(example, name) for name in names]
    return respond


def with_first_observations(
    factory: Callable[[], Any], rows: Sequence[Mapping[str, Any]], *, prompt_column: str = "prompt"
) -> list[Row]:
    """The rows with what `reset` returns for each of them added to the end of its prompt, as TRL does.

    `reset` is called here and again when the conversation begins: it has to say the same of the same row.
    """
    made = factory()
    told = []
    for row in rows:
        said, prompt = _awaited(made.reset(**copy.deepcopy(dict(row)))), row[prompt_column]
        if said and isinstance(prompt, str):
            prompt = prompt + said
        elif said:
            prompt = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + said}]
        told.append({**row, prompt_column: prompt})
    return told


def _awaited(result: Any) -> Any:
    return run_async(result) if inspect.iscoroutine(result) else result


def _tools(example: Any) -> list[str]:
    if not callable(getattr(example, "reset", None)):
        raise ValueError(
            f"an environment of TRL's kind has a method `reset(**row)`, and {type(example).__name__} has none"
        )
    # As in TRL methods alone: an attribute that can be called, such as a client or a random generator, is no tool.
    names = [name for name, _ in inspect.getmembers(type(example), inspect.isfunction) if not name.startswith("_")]
    return [name for name in names if name not in ("reset", "get_reward")]


def attempts(
    verifier: RewardFunction,
    *,
    again: str = "That is not right. Try again.",
    right: float = 1.0,
    discount: float = 1.0,
    prompt_column: str = "prompt",
) -> Respond:
    """Makes an environment that lets the policy try again until a verifier is content.

    The reward of the n-th attempt, from 0, is `discount**n` times what the verifier gives for it beyond the best
    before, and of the first all that it gives; so the sum over a conversation is the best one's where nothing is
    discounted. `max_turns` limits the attempts.

    Args:
      verifier: with TRL's signature, such as a task's; it is asked for one completion at a time, which is text.
      again: what is said after an attempt that is not right.
      right: the verifier's reward from which on the conversation is over.
      discount: for each attempt before.
      prompt_column: of the rows.

    Raises:
      ValueError: for a discount that is not from 0 to 1. From the environment, where the verifier has no reward to
        give (None), so that the conversation is masked and not scored as wrong.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount is from 0 to 1, got {discount}")

    def respond(row: Row, messages: list[Message]) -> Turn:
        columns = {name: [value] for name, value in row.items() if name not in (prompt_column, STATE)}
        arguments = {"prompts": [row[prompt_column]], "completions": [messages[-1]["content"]], **columns}
        ((score,),) = call([verifier], arguments, 1)
        if math.isnan(score):
            raise ValueError(
                f"the verifier {name_of(verifier)} gave no reward for attempt {messages[-1]['content']!r:.200}"
            )
        tried, best = row.get(STATE, (0, score))
        gained = max(0.0, score - best) if tried else score
        row[STATE] = (tried + 1, max(best, score))
        return Turn(None if score >= right else again, discount**tried * gained)

    return respond
