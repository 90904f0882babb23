"""The answer in a completion, and whether it is the reference: by text or by number."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.calling import RewardFunction, reading
from grpo_jax.rewards.completions import named, text_of
from grpo_jax.rewards.formats import TAGS, marks_of, opened_by
from grpo_jax.rewards.latex import unwrapped
from grpo_jax.rewards.units import unit_of

THOUGHT_START, THOUGHT_END = "<think>", "</think>"


def answer_of(text: str, pattern: str | re.Pattern[str] | None = None) -> str | None:
    """The answer that a text gives, without the white space around it; None where it gives none.

    Nothing but white space is no answer. Without a pattern the answer comes after the thoughts: after the last
    `</think>`, or anywhere in a text without one; where a `<think>` is not closed, all of
    the rest is thought and there is no answer. It stands between the first `<answer>` there and the `</answer>`
    after it: a second answer is no second chance, and one that is never closed is none.
    Without any `<answer>` there, it follows the last `####`, up to the end of the
    line (GSM8K's form; the last, since `####` is also a heading in Markdown).

    With a pattern it is the first match's first group, or all of the match if the
    pattern has no group. Such a pattern is the caller's: one that backtracks can take
    forever on a hostile completion.
    """
    if pattern is not None:
        match = re.search(pattern, text)
        answer = match and match[1 if match.re.groups else 0]
        return _stripped(answer)
    text = text.rpartition(THOUGHT_END)[2]
    if THOUGHT_START in text:
        return None
    _, opened, rest = text.partition("<answer>")
    if opened:
        answer, closed, _ = rest.partition("</answer>")
        return _stripped(answer) if closed else None
    _, marked, rest = text.rpartition("####")
    return _stripped(rest.partition("\n")[0]) if marked else None


def answers_of(
    completions: Sequence[Any], tails: Sequence[str | None] | None, pattern: re.Pattern[str] | None = None
) -> list[str | None]:
    """The answer of each completion, which goes on from a tag that its prompt opens.

    Args:
      completions: text or messages.
      tails: `prompt_tail` as `rewards.host` gives it; None where no prompt opens a tag.
      pattern: as in `answer_of`; its answers are the completion's alone.
    """
    marks = marks_of(TAGS) if pattern is None else ()
    return [
        answer_of(opened_by(tail or "", marks) + text_of(completion), pattern)
        for completion, tail in zip(completions, tails or [None] * len(completions), strict=True)
    ]


def gold_text(value: Any) -> str | None:
    """A gold answer as text, without the white space around it; None where there is none: null, `nan`, infinity.

    A whole number has no `.0`, which it gets where a column of whole numbers has a null.

    Raises:
      ValueError: for what is neither text nor a number, such as a list of answers.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if getattr(value, "ndim", 0) or (isinstance(value, Mapping | Sequence | Set) and not isinstance(value, str)):
        raise ValueError(f"a gold answer is text or a number, got a {type(value).__name__}: {value!r:.200}")
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    text = str(int(value) if whole else value).strip()
    return None if text.casefold() == "nan" else text  # as tables write what is missing


def _stripped(answer: str | None) -> str | None:
    return (answer or "").strip() or None


def exact_answer(
    *,
    pattern: str | re.Pattern[str] | None = None,
    normalise: Callable[[str], str] | None = None,
    tolerance: float | None = None,
    column: str = "answer",
) -> RewardFunction:
    """1.0 where the completion's answer is the reference, else 0.0; None where there is no reference.

    An empty reference, NaN and infinity are none. Of a reference with a `####`, as GSM8K's worked solutions have it,
    what follows the last one counts.

    The answer is `answer_of(text, pattern)`: after the thoughts in the first `<answer>` tags, else after
    the last `####`, or where the pattern says. A completion without one gets 0.0. Both
    sides are compared as text without the white space around them: `$18$`, `**18**` and `18 dollars` are
    not `18`, unless `normalise` makes them so.

    With a tolerance, two sides that read as numbers are right where

        |answer - reference| <= tolerance

    computed exactly, in the reference's units; 0 makes `1,000.0` and `1000` equal. Read
    as numbers are digits with thousands separators, decimals or an exponent of up to 3
    digits, with a `$` before or a `%` after, neither of which changes the value, and a
    period at the end; at most 100 characters. Anything else is compared as text.

    Args:
      pattern: a regular expression for the answer; its first group, if it has one.
      normalise: applied to both sides, which come stripped, before they are compared: `plain_answer()`
        takes off markup and units.
      tolerance: None to compare text.
      column: the data set's column of references: text or numbers, None where missing.

    Raises:
      ValueError: for a negative or non-finite tolerance, a pattern that is none, and,
        from the reward, a data set without the column, or a reference that is neither text nor a number.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"the tolerance is a number of at least 0, or None to compare text, got {tolerance}")
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    exact = None if tolerance is None else Fraction(str(tolerance))

    def judge(answer: str | None, reference: Any) -> float | None:
        wanted = (gold_text(reference) or "").rpartition("####")[2].strip()
        if wanted.casefold() in _MISSING:
            return None
        if answer is None:
            return 0.0
        if normalise is not None:
            answer, wanted = normalise(answer), normalise(wanted)
            if not wanted.strip():
                return None
            if not answer.strip():
                return 0.0
        if exact is not None:
            number, wanted_number = _number(answer), _number(wanted)
            if number is not None and wanted_number is not None:
                return float(abs(number - wanted_number) <= exact)
        return float(answer == wanted)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_tail: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if column not in columns:
            raise ValueError(f"exact_answer compares with the column {column!r}; there are only {sorted(columns)}")
        answers = answers_of(completions, prompt_tail, compiled)
        return [judge(*item) for item in zip(answers, columns[column], strict=True)]

    return reading(named("exact_answer", reward), golds=[column])


def plain_answer(*, units: Sequence[str] | None = ()) -> Callable[[str], str]:
    r"""Makes a `normalise` for `exact_answer` that takes markup and units off an answer.

    `$18$`, `\(18\)`, `**18**`, `` `18` ``, `\boxed{18}`, `\text{18}` and `18.` become `18`.

    Args:
      units: words that may follow a number, such as "dollars"; None for any known unit and any one plural
        noun; words that may make it another number (`18 thousand`, `18 or more`, `18 pi`) stay.
    """
    known = None if units is None else {unit.casefold() for unit in units}

    def plain(answer: str) -> str:
        before = None
        while answer != before:
            before, answer = answer, unwrapped(answer)
            match = _MARKUP.fullmatch(answer)
            inner = next((group for group in match.groups() if group is not None), "") if match else ""
            answer = inner.strip() if inner and _balanced(inner) else answer
        match = _WITH_UNIT.fullmatch(answer)
        if match and (unit_of(match[2]) is not None if known is None else match[2].strip().casefold() in known):
            return plain(match[1])
        return answer

    return plain


_MISSING = ("", "nan", "inf", "-inf")  # references
_MARKUP = re.compile(
    r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{(.*)\}|`([^`]+)`|\*([^*]+)\*|__([^_]+)__", re.DOTALL
)
_WITH_UNIT = re.compile(r"(.*[\d$})])\s*(?:\\text\s*\{)?\s*([A-Za-z][A-Za-z ]*)\}?", re.DOTALL)


def _balanced(text: str) -> bool:
    depths = itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text)
    return min(depths, default=0) >= 0


_NUMBER = re.compile(
    r"(?:\$?\s*([-+−]?)|([-+−])\s*\$)\s*"  # a sign on either side of the currency
    r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(e[-+]?\d{1,3})?\s*%?\.?",
    re.ASCII | re.IGNORECASE,
)


def _number(text: str) -> Fraction | None:
    """The number that a text is, None if it is none."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= 100 else None
    if match is None:
        return None
    sign, other_sign, digits, exponent = match.groups(default="")
    value = Fraction(digits.replace(",", "") + exponent)
    return value if (sign or other_sign) in ("", "+") else -value
