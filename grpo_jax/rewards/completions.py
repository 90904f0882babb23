"""The text of a completion, and reward functions that score it."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.rewards.calling import RewardFunction


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text that the model wrote: the completion itself, or its assistant messages joined by newlines.

    A message without a role is the assistant's. Messages of others (a tool, a user) are
    left out. Content in parts is the text of its parts.

    Raises:
      TypeError: for anything else than text or a list of messages.
    """
    if isinstance(completion, str):
        return completion
    written = []
    for message in completion if isinstance(completion, Sequence) else [completion]:
        if not isinstance(message, Mapping):
            raise TypeError(f"a completion is text or a list of chat messages, got {reprlib.repr(completion)}")
        if message.get("role", "assistant") == "assistant":
            written.append(_content(message.get("content")))
    return "\n".join(written)


def _content(content: Any) -> str:
    if content is None:  # a message that only calls tools
        return ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def after_thoughts(text: str) -> str | None:
    """What a text says after its thoughts: after the last `</think>`, all of it where there is none.

    None where a `<think>` follows that is not closed: all that it holds is thoughts.
    """
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def per_completion(columns: Mapping[str, Any], count: int) -> dict[str, Sequence[Any]]:
    """The columns that hold something for each of `count` completions: lists, tuples and arrays, as lists.

    Other arguments, such as TRL's state and its loggers, are left out.

    Raises:
      ValueError: for a column of another length.
    """
    lists: dict[str, Sequence[Any]] = {}
    for name, column in columns.items():
        array = hasattr(column, "tolist") and getattr(column, "ndim", 0) > 0
        if array or (isinstance(column, Sequence) and not isinstance(column, str | bytes)):
            lists[name] = column.tolist() if array else column
            if len(lists[name]) != count:
                raise ValueError(f"the column {name} has {len(lists[name])} entries for {count} completions")
    return lists


def named(name: str, reward: RewardFunction) -> RewardFunction:
    """Gives a reward function the name by which metrics and messages call it."""
    reward.__name__ = reward.__qualname__ = name
    return reward


def per_text(name: str, score: Callable[[str], float]) -> RewardFunction:
    """Makes a reward function that scores the text of each completion by itself."""

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [score(text_of(completion)) for completion in completions]

    return named(name, reward)
