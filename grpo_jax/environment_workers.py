"""Environments in worker processes: one that hangs is killed, one that crashes takes nothing else with it.

```python
respond = in_worker_processes(my_game.respond, workers=8)
talking = sampling.conversations(sampler, respond, tokenizer, rows, max_turns=5, timeout=20.0)
```
"""

import functools
from collections.abc import Sequence
from typing import Any

from grpo_jax.data import Row
from grpo_jax.environments import Failure, Message, Respond, Turn
from grpo_jax.rewards.outcomes import Outcome
from grpo_jax.rewards.pool import WorkerPool, target_of


def in_worker_processes(
    respond: Respond, *, workers: int = 4, memory: int = 2 * 2**30, prefix: Sequence[str] = ()
) -> Respond:
    """Makes an environment whose answers are given in worker processes, `workers` at a time, each within the timeout.

    The processes are those of `rewards.WorkerPool`, with what they isolate from. What goes to them and comes back is
    JSON: the row, with the state that the environment keeps in it, and the messages.

    Args:
      respond: plain or async, of a module's top level, from which workers load it.
      workers: how many processes.
      memory: bytes of address space for each.
      prefix: a command that runs the command after it, such as a sandbox's.

    Raises:
      ValueError: for a setting out of range, and a function that workers cannot find, such as one that another made.
      TypeError: when called, for a row that does not fit into JSON.
    """
    WorkerPool(workers=workers, memory=memory)  # refuses what it would refuse at the first answer
    target_of(respond)

    @functools.lru_cache(maxsize=1)
    def pool(timeout: float) -> WorkerPool:
        return WorkerPool(workers=workers, timeout=timeout, memory=memory, prefix=prefix)

    def together(conversations: Sequence[tuple[Row, list[Message]]], timeout: float) -> list[Any]:
        items = [{"row": row, "messages": [*map(dict, messages)]} for row, messages in conversations]
        outcomes = pool(timeout).map(respond, items, returned=["row"])
        return [_answer(row, outcome, timeout) for (row, _), outcome in zip(conversations, outcomes, strict=True)]

    def alone(row: Row, messages: list[Message]) -> Any:
        return together([(row, messages)], 60.0)[0]

    made: Any = alone
    made.together = together
    made.tools = getattr(respond, "tools", ())
    return made


def _answer(row: Row, outcome: Outcome, timeout: float) -> Turn | Failure | None:
    """The answer of one conversation, whose row becomes what the environment made of it."""
    if outcome.fault == "timeout":
        return Failure(f"it has not answered within {timeout:g} s")
    if outcome.fault is not None:
        return Failure(f"it ended with the fault {outcome.fault!r}\n{outcome.message}")
    try:  # not trusted: its writer has seen model output
        value, arguments = outcome.returned
        if value is not None and not (isinstance(value, list) and len(value) in (1, 2, 3)):
            raise TypeError  # text and mappings have elements, too
        changed = {**arguments["row"]}
        answer = None if value is None else Turn(*value)
    except (TypeError, ValueError, KeyError):
        return Failure(f"it returned {str(outcome.returned)[:200]}, and not a Turn or None")
    row.clear()
    row.update(changed)
    return answer
