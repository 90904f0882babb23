"""The calculations that a text writes, found and computed exactly; nothing of it is executed."""

import collections
import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.completions import per_text


def worked_steps() -> RewardFunction:
    r"""The share of right ones among the calculations that the completion writes; 0.0 where it writes none.

    A calculation is what stands on both sides of an `=` in one line, where at least one
    side has an operator: `3+4*2=11`, `12 = 3 × 4`, and in `3+4*2=3+8=11` two of them.
    Sides are made of decimals with thousands separators or a `$`, of `+`, `-`, `*`, `x`,
    `×`, `·`, `/`, `÷`, `\times`, `\cdot`, `\div`, and of parentheses, computed exactly
    with the usual precedence. Where the left side divides, a single number with decimals
    on the right may be rounded: `10/3=3.33` is right, `10/3=3` is wrong. A division by
    zero is wrong.

    What is not of this form is passed over: variables, powers, percentages, roots,
    fractions in LaTeX, numbers of more than 40 or sides of more than 200 characters. A
    comma before exactly three digits separates thousands, any other ends a number.

    Right steps need not be of use: one `1+1=2` earns 1.0. Use it beside a reward for the
    answer.
    """
    return per_text("worked_steps", _share_of_right)


def _share_of_right(text: str) -> float:
    """The share of right ones among the calculations of a text, by the rule of `worked_steps`; 0 without any."""
    steps = [
        step
        for line in text.splitlines()
        for i, (left, right) in enumerate(itertools.pairwise(line.split("=")))
        if (step := _step(left, right, starts_line=i == 0)) is not None
    ]
    return sum(steps) / len(steps) if steps else 0.0


def _step(left_text: str, right_text: str, *, starts_line: bool) -> bool | None:
    """Whether what stands around an equals sign is right, None where it is no calculation."""
    try:
        left, right = _end_of(left_text, starts_line=starts_line), _start_of(right_text)
        if not (_calculates(left) or _calculates(right)):
            return None
        difference: Any = _value(left) - _value(right)
        return bool(abs(difference) <= _rounding(left, right))
    except _Unreadable:
        return None


class _Unreadable(Exception):
    """Not an expression of the kind that is checked."""


class _Token(NamedTuple):
    kind: str  # the name of a group of _TOKEN
    text: str
    spaced: bool  # whether white space stands before it


_SIDE, _DIGITS = 200, 40  # characters of a side and of a number; they bound the work of one calculation
_TOKEN = re.compile(
    r"(?P<number>(?:\\?\$)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))"
    r"|(?P<operator>[-+*/−–×·÷]|\\(?:times|cdot|div)(?![a-zA-Z])|(?<![^\W\d_])[xX](?=\s*(?:\\?\$)?[.(0-9]))"
    r"|(?P<open>\()|(?P<close>\))|(?P<word>[^\W\d_]+)|(?P<space>\s+)|(?P<other>\\?.)"
)
_PLUS, _MINUS = {"+"}, {"-", "−", "–"}
_TIMES, _DIVIDED = {"*", "x", "X", "×", "·", r"\times", r"\cdot"}, {"/", "÷", r"\div"}
_BULLETS = {"-", "–", "*", "+"}
_EXPRESSION = {"number", "operator", "open", "close"}
_OPENING = frozenset("([{<>|,;:\"'`“‘«$~，；：。、（【《「")  # what may touch a calculation on its left


def _tokens(text: str) -> list[_Token]:
    tokens, spaced = [], False
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "space":
            tokens.append(_Token(match.lastgroup or "", match.group(), spaced))
        spaced = match.lastgroup == "space"
    return tokens


def _end_of(text: str, *, starts_line: bool) -> list[_Token]:
    """The expression that a text ends with."""
    tokens = _tokens(text[-_SIDE:])
    start, depth = len(tokens), 0
    while start and tokens[start - 1].kind in _EXPRESSION:
        if depth == 0 and (tokens[start - 1].kind == "open" or _apart(tokens[start - 1 : start + 1])):
            break
        depth += {"close": 1, "open": -1}.get(tokens[start - 1].kind, 0)
        start -= 1
    expression = tokens[start:]
    signed = len(expression) > 1 and expression[0].kind == "operator"
    if start == 0 and len(text) > _SIDE:
        raise _Unreadable
    if start == 0 and signed and starts_line and expression[1].spaced and expression[0].text in _BULLETS:
        return expression[1:]  # an item of a list: - 3+4=7
    if start > 0 and expression and not _may_precede(tokens[start - 1], expression[0], signed=signed):
        raise _Unreadable
    if start > 0 and signed and expression[1].spaced:
        raise _Unreadable  # total - 3+4: minus what is left of it
    return expression


def _may_precede(previous: _Token, first: _Token, *, signed: bool) -> bool:
    """Whether an expression can begin after a token, rather than go on from it as in x2+3, 2^3+1, f(2)+3 or y -3+1."""
    letter = previous.text[-1]
    if letter in "^_":
        return False
    if first.spaced and not signed:
        return True
    uncased = previous.kind == "word" and not letter.isnumeric() and letter.lower() == letter.upper()  # Chinese
    return letter in _OPENING or uncased or (first.spaced and previous.kind == "word" and len(previous.text) > 1)


def _start_of(text: str) -> list[_Token]:
    """The expression that a text starts with."""
    tokens = _tokens(text[:_SIDE])
    end, opened = 0, list[int]()
    while end < len(tokens) and tokens[end].kind in _EXPRESSION:
        if not opened and (tokens[end].kind == "close" or (end > 0 and _apart(tokens[end - 1 : end + 1]))):
            break
        if tokens[end].kind == "open":
            opened.append(end)
        elif tokens[end].kind == "close":
            opened.pop()
        end += 1
    if end == len(tokens) and len(text) > _SIDE:
        raise _Unreadable
    following = None if end == len(tokens) else tokens[end]
    if opened and tokens[opened[0]].spaced:
        end = opened[0]  # 7 (which is right)
    elif following and (following.text[-1] in "^_%" or (following.kind == "word" and following.text[0].isnumeric())):
        raise _Unreadable  # 5^2, 5%, 5²
    if end > 1 and tokens[end - 1].text in _MINUS and tokens[end - 1].spaced:
        end -= 1  # 7 - which is right
    return tokens[:end]


def _apart(pair: Sequence[_Token]) -> bool:
    """Whether the second of two tokens is a number that begins something else: `7 3+5`."""
    return len(pair) == 2 and pair[0].kind in ("number", "close") and pair[1].kind == "number" and pair[1].spaced


def _calculates(expression: Sequence[_Token]) -> bool:
    return any(a.kind in ("number", "close") and b.kind == "operator" for a, b in itertools.pairwise(expression))


def _rounding(left: Sequence[_Token], right: Sequence[_Token]) -> Fraction:
    """Half a unit of the last decimal where the right side may be rounded, else 0."""
    decimals = len(right[-1].text.partition(".")[2])
    divided = any(token.text in _DIVIDED for token in left)
    return Fraction(1, 2 * 10**decimals) if decimals and divided and not _calculates(right) else Fraction(0)


def _value(expression: Sequence[_Token]) -> Fraction | float:
    """The value of an expression, NaN where it divides by zero."""
    tokens = collections.deque(expression)
    value = _sum(tokens)
    if tokens:
        raise _Unreadable
    return value


def _sum(tokens: collections.deque[_Token]) -> Fraction | float:
    value = _product(tokens)
    while tokens and tokens[0].text in _PLUS | _MINUS:
        sign = 1 if tokens.popleft().text in _PLUS else -1
        value += sign * _product(tokens)
    return value


def _product(tokens: collections.deque[_Token]) -> Fraction | float:
    value = _operand(tokens)
    while tokens and tokens[0].text in _TIMES | _DIVIDED:
        multiplies = tokens.popleft().text in _TIMES
        operand = _operand(tokens)
        # NaN is equal to nothing, so the rest is still read and the calculation is wrong.
        value = value * operand if multiplies else math.nan if operand == 0 else value / operand
    return value


def _operand(tokens: collections.deque[_Token]) -> Fraction | float:
    token = tokens.popleft() if tokens else None
    if token is None or len(token.text) > _DIGITS:
        raise _Unreadable
    if token.kind == "number":
        return Fraction(token.text.lstrip("\\$").replace(",", ""))
    if token.text in _PLUS | _MINUS:
        return _operand(tokens) if token.text in _PLUS else -_operand(tokens)
    if token.kind != "open":
        raise _Unreadable
    value = _sum(tokens)
    if not tokens or tokens.popleft().kind != "close":
        raise _Unreadable
    return value
