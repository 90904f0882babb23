"""The answer in a completion, and whether it is the reference: by text or by number."""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.completions import named, text_of


def answer_of(text: str, pattern: str | re.Pattern[str] | None = None) -> str | None:
    """The answer that a text gives, without the white space around it; None where it gives none.

    Without a pattern it is what stands between the first `<answer>` and the `</answer>`
    after it: a second answer is no second chance, and one that is never closed is none.
    A text without any `<answer>` answers after its last `####`, up to the end of the
    line (GSM8K's form; the last, since `####` is also a heading in Markdown).

    With a pattern it is the first match's first group, or all of the match if the
    pattern has no group. Such a pattern is the caller's: one that backtracks can take
    forever on a hostile completion.
    """
    if pattern is not None:
        match = re.search(pattern, text)
        answer = match and match[1 if match.re.groups else 0]
        return None if answer is None else answer.strip()
    _, opened, rest = text.partition("<answer>")
    if opened:
        answer, closed, _ = rest.partition("</answer>")
        return answer.strip() if closed else None
    _, marked, rest = text.rpartition("####")
    return rest.partition("\n")[0].strip() if marked else None


def exact_answer(
    *,
    pattern: str | re.Pattern[str] | None = None,
    normalise: Callable[[str], str] | None = None,
    tolerance: float | None = None,
    column: str = "answer",
) -> RewardFunction:
    """1.0 where the completion's answer is the reference, else 0.0; None where there is no reference.

    The answer is `answer_of(text, pattern)`: in the first `<answer>` tags, else after
    the last `####`, or where the pattern says. A completion without one gets 0.0. Both
    sides are compared as text without the white space around them.

    With a tolerance, two sides that read as numbers are right where

        |answer - reference| <= tolerance

    computed exactly, in the reference's units; 0 makes `1,000.0` and `1000` equal. Read
    as numbers are digits with thousands separators, decimals or an exponent of up to 3
    digits, with a `$` before or a `%` after, neither of which changes the value, and a
    period at the end; at most 100 characters. Anything else is compared as text.

    Args:
      pattern: a regular expression for the answer; its first group, if it has one.
      normalise: applied to both sides, which come stripped, before they are compared.
      tolerance: None to compare text.
      column: the data set's column of references: text or numbers, None where missing.

    Raises:
      ValueError: for a negative or non-finite tolerance, a pattern that is none, and,
        from the reward, a data set without the column.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"the tolerance is a number of at least 0, or None to compare text, got {tolerance}")
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    exact = None if tolerance is None else Fraction(str(tolerance))

    def judge(completion: Any, reference: Any) -> float | None:
        if reference is None:
            return None
        answer = answer_of(text_of(completion), compiled)
        if answer is None:
            return 0.0
        wanted = str(reference).strip()
        if normalise is not None:
            answer, wanted = normalise(answer), normalise(wanted)
        if exact is not None:
            number, wanted_number = _number(answer), _number(wanted)
            if number is not None and wanted_number is not None:
                return float(abs(number - wanted_number) <= exact)
        return float(answer == wanted)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if column not in columns:
            raise ValueError(f"exact_answer compares with the column {column!r}; there are only {sorted(columns)}")
        return [judge(*pair) for pair in zip(completions, columns[column], strict=True)]

    return named("exact_answer", reward)


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
