"""Whether two pieces of mathematics are equal, by math-verify. Workers load this file, and with it SymPy."""

import logging
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

# As TRL's accuracy_reward: LaTeX alone, boxed before what "the answer is" announces, no loose formula.
ANSWER = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
)

# Their warning that timeouts are off: the pool's clock is the limit here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def accuracy(completion: str, gold: Any, tolerance: float, decimals: int, characters: int) -> float | None:
    """1.0 or 0.0, or None where the gold answer cannot be parsed; the rule is `mathematics.accuracy`'s."""
    # math-verify's own timeouts raise off the main thread and cancel the caller's alarm.
    expected = parse(delimited(str(gold)), parsing_timeout=None)
    if not expected:
        return None
    answer = parse(
        completion[-characters:], extraction_config=[ANSWER], extraction_mode="first_match", parsing_timeout=None
    )
    if verify(expected, answer, float_rounding=decimals, timeout_seconds=None):
        return 1.0
    return float(tolerance > 0 and any(_close(a, e, tolerance) for e in expected for a in answer))


def delimited(gold: str) -> str:
    r"""A gold answer, boxed where it is bare mathematics, of which the parser would see a number alone.

    Of `2\sqrt{2}` it would make 2. Bare is what has no LaTeX delimiters and no word of three letters or more.
    """
    gold = gold.rpartition("####")[2].strip()  # GSM8K's mark of the answer
    words = re.search(r"[A-Za-z]{3}", re.sub(r"\\(text|mathrm|mbox)\{[^{}]*\}|\\[A-Za-z]+", "", gold))
    if words or not gold or any(mark in gold for mark in ("$", r"\(", r"\[", r"\boxed")):
        return gold
    return rf"\boxed{{{gold}}}"


def _close(answer: Any, gold: Any, tolerance: float) -> bool:
    """Whether both are real numbers, and not further apart than a share of the gold one."""
    try:
        a, b = float(answer), float(gold)
    except (TypeError, ValueError, AttributeError, OverflowError):  # a formula, an interval, a complex number, text
        return False
    return abs(a - b) <= tolerance * abs(b)
