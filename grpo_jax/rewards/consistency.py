"""Majority voting within a group as the reward, for data without ground truth."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.answers import answer_of
from grpo_jax.rewards.calling import RewardFunction, of_groups
from grpo_jax.rewards.completions import named, text_of
from grpo_jax.rewards.formats import TAGS, marks_of, opened_by


def self_consistency(
    *,
    group_size: int,
    extract: Callable[[str], str | None] = answer_of,
    majority: float = 1.0,
    other: float = -0.1,
) -> RewardFunction:
    """`majority` for the answer that most completions of the group give, `other` for the rest.

    For data without ground truth (majority voting as the reward: TTRL, Zuo et al. 2025,
    arXiv:2504.16084). A group is `group_size` completions in a row, as the host gives
    them, and has to be scored in one call. Answers are compared as `extract` returns
    them, of the completion after a tag that its prompt opens (`formats.opened_by`).
    A completion without an answer, or with an empty one, gets `other` and has no vote. Where several
    answers have the most votes there is no majority and all get `other`, so that the
    order within a group decides nothing.

    Args:
      group_size: `G`.
      extract: the text's answer, None where it has none.
      majority: reward of the most frequent answer.
      other: reward of the rest.

    Raises:
      ValueError: if `group_size < 2`; from the reward, if the completions are not whole
        groups of the same prompt.
    """
    if group_size < 2:
        raise ValueError(f"a majority takes a group of at least 2 completions, got group_size = {group_size}")
    marks = marks_of(TAGS)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_tail: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        if len(completions) % group_size:
            raise ValueError(f"{len(completions)} completions are no whole groups of group_size = {group_size}")
        for start in range(0, len(completions), group_size):
            group = slice(start, start + group_size)
            if any(prompt != prompts[group.start] for prompt in prompts[group]):
                raise ValueError(f"completions {group.start} to {group.stop - 1} are one group with different prompts")
        tails = prompt_tail or [None] * len(completions)
        answers = [
            extract(opened_by(tail or "", marks) + text_of(completion))
            for tail, completion in zip(tails, completions, strict=True)
        ]
        numbers = {answer: number for number, answer in enumerate(dict.fromkeys(answers))}
        number = np.array([numbers[answer] for answer in answers], np.int64).reshape(-1, group_size)
        answered = np.array([bool(answer and answer.strip()) for answer in answers], bool).reshape(-1, group_size)
        leads = has_majority(number[:, :, None] == number[:, None], answered)
        return [majority if led else other for led in leads.reshape(-1).tolist()]

    return of_groups(named("self_consistency", reward), group_size)


def has_majority(same: Any, answered: Any) -> Any:
    """Whether a completion gives the answer that most completions of its group give; arrays of NumPy or JAX.

    Args:
      same: `[..., G, G]` bool, whether two completions give the same answer.
      answered: `[..., G]` bool, whether a completion gives one.

    Returns:
      `[..., G]` bool; all False where several answers have the most votes.
    """
    votes = (same & answered[..., None, :]).sum(axis=-1) * answered
    most = votes.max(axis=-1, keepdims=True)
    leading = answered & (votes == most)
    return leading & (leading.sum(axis=-1, keepdims=True) == most)  # else the leaders are those of several answers
