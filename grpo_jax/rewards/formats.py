"""Rewards for the format of a completion: its tags."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.completions import named, text_of

TAGS = ("think", "answer")
R1_WEIGHTS = (1.0, 0.1, 0.01)  # of accuracy, soft_format and reasoning_length: their R1-style sum

Marks = tuple[tuple[str, str], ...]  # an opening and a closing mark per tag


def soft_format(*, tags: Sequence[str] = TAGS) -> RewardFunction:
    """The share of tag pairs that are right: 1.0 for both of `<think>...</think><answer>...</answer>`, 0.5 for one.

    A pair is right where its two tags occur exactly once, the opening one first, and
    after the end of the right pair before it: of two pairs that are nested, crossed or
    out of order only the one named first counts. Text around them is allowed;
    `strict_format` allows none. A tag that the prompt opens counts as the completion's (`opened_by`).

    Args:
      tags: names of the tags, in order.

    Raises:
      ValueError: for tags that are not different names.
    """
    marks = marks_of(tags)

    def score(text: str, start: int) -> float:
        right = end = 0
        for opening, closing in marks:
            begin, stop = _only(text, opening), _only(text, closing)
            if end <= begin < stop:
                right, end = right + 1, stop + len(closing)
        return right / len(marks)

    return per_continuation("soft_format", score, marks)


def strict_format(*, tags: Sequence[str] = TAGS) -> RewardFunction:
    r"""1.0 where the whole completion is `^<think>...</think>\s*<answer>...</answer>$`, else 0.0.

    The rule of DeepSeek-R1's template (arXiv:2501.12948, table 1), each tag exactly once. Nothing stands before
    the first tag, only white space between the pairs, and after the last tag nothing but
    one newline, which `$` allows. What is between the tags may be empty. Compared tag by
    tag, not by a regular expression, whose backtracking a hostile completion could use.

    Where the prompt opens the first tag, as the templates of R1-Distill, QwQ and
    Qwen3-Thinking do, the completion goes on from there: it must not open it again (`opened_by`).

    A text does not tell whether the end token followed: `tokens.strict_format` asks for that too.

    Args:
      tags: names of the tags, in order.

    Raises:
      ValueError: for tags that are not different names.
    """
    marks = marks_of(tags)
    return per_continuation("strict_format", lambda text, start: float(sections_of(text, marks) is not None), marks)


def tag_count(*, tags: Sequence[str] = TAGS) -> RewardFunction:
    r"""The share of tags that occur exactly once: 0.25 for each of `<think>`, `</think>`, `<answer>`, `</answer>`.

    open-r1's `tag_count_reward`, which however asks for newlines around its tags. A tag
    that the prompt opens counts as the completion's (`opened_by`).

    Args:
      tags: names of the tags, each of which has an opening and a closing form.

    Raises:
      ValueError: for tags that are not different names.
    """
    marks = marks_of(tags)
    single = [mark for pair in marks for mark in pair]
    return per_continuation(
        "tag_count", lambda text, start: sum(text.count(mark) == 1 for mark in single) / len(single), marks
    )


# ------------------------------------------------------------------------ tags in text


def marks_of(tags: Sequence[str]) -> Marks:
    """The marks of tags: `think` has `<think>` and `</think>`.

    Raises:
      ValueError: for tags that are not different names.
    """
    # A text is a sequence too, of letters.
    good = not isinstance(tags, str) and len(tags) > 0 and len(set(tags)) == len(tags)
    if not good or not all(isinstance(tag, str) and tag and not set(tag) & set("<>/") for tag in tags):
        raise ValueError(f"tags are different names without brackets, such as {TAGS}, got {tags!r}")
    return tuple((f"<{tag}>", f"</{tag}>") for tag in tags)


def sections_of(text: str, marks: Marks) -> list[slice] | None:
    """The places between the tags of a text of strict format, None for another text."""
    sections, end = [], 0
    for opening, closing in marks:
        start, stop = _only(text, opening), _only(text, closing)
        if not end <= start < stop or text[end:start].strip() or (end == 0 and start > 0):
            return None
        sections.append(slice(start + len(opening), stop))
        end = stop + len(closing)
    return sections if text[end:] in ("", "\n") else None


def _only(text: str, mark: str) -> int:
    """Where the only occurrence of a mark begins, -1 if there is none or another."""
    start = text.find(mark)
    return start if start == text.rfind(mark) else -1


def opened_by(prompt_tail: str, marks: Marks) -> str:
    r"""The end of a prompt that belongs to the completion's format, from the tag that the prompt opens; often empty.

    The tail is the prompt's text after its last special token. It opens a tag where it
    ends with the opening mark and white space (`Let me think.\n<think>\n`), or where
    it begins with one, perhaps after the role's name: `assistant\n<think>\n`, and then
    whatever the prompt says in the model's place, such as the empty `<think>\n\n</think>\n\n` of Qwen3
    without thinking. Tags within a sentence, as instructions name them, open nothing.
    """
    header = re.match(r"\s*\w+[ \t]*\n", prompt_tail)  # the role's name has a line of its own
    turn = prompt_tail[header.end() if header else 0 :].lstrip()
    if turn.startswith(tuple(opening for opening, _ in marks)):
        return turn
    ended = prompt_tail.rstrip()
    return next((opening for opening, _ in marks if ended.endswith(opening)), "")


def per_continuation(name: str, score: Callable[[str, int], float], marks: Marks) -> RewardFunction:
    """Makes a reward function of `score(text, start)`: the completion after what its prompt opens, and where it starts.

    It reads `prompt_tail`, one text per completion (`rewards.host` gives it); without it no prompt opens a tag.
    """

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_tail: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        tails = prompt_tail or [None] * len(completions)
        opened = [opened_by(tail or "", marks) for tail in tails]
        return [
            score(head + text_of(completion), len(head)) for head, completion in zip(opened, completions, strict=True)
        ]

    return named(name, reward)
