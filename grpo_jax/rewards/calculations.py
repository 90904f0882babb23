"""The calculations that a text writes, found and computed exactly; nothing of it is executed."""

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.completions import per_text
from grpo_jax.rewards.units import canonical_unit, is_number_word, is_unit


def worked_steps() -> RewardFunction:
    r"""The share of right ones among the calculations that the completion writes; 0.0 where it writes none.

    A calculation is what stands on both sides of an `=` in one line, where at least one
    side has an operator: `3+4*2=11`, `12 = 3 × 4`, and in `3+4*2=3+8=11` two of them. A number
    that follows a result is compared with what was calculated: `3+4=7=8` is right and then wrong.
    Sides are made of decimals with thousands separators or a `$`, of `+`, `-`, `*`, `x`,
    `×`, `·`, `⋅`, `/`, `÷`, `\times`, `\cdot`, `\div`, and of parentheses, computed exactly
    with the usual precedence. Where the left side divides, a single number with decimals
    on the right may be rounded: `10/3=3.33` is right, `10/3=3` is wrong. A division by
    zero is wrong.

    Anything else is passed over: variables, powers, percentages, roots, factorials, operators of another kind
    beside the calculation (`∗`, `mod`, `√`, `7e3`, and what stands between two numbers without being a separator:
    `3 @ 4`, `6 : 2`, `12:00`), mixed numbers, fractions in LaTeX, numbers of more than 40 or sides of more than 200
    characters. A word may touch a number only if it is a unit (`7kg`), and follow it only if it is a unit or a word of
    three letters or more that is no number and no operation ("7 apples", not "7 million", "7 pi", "7 tenths"). A
    comma before exactly three digits separates thousands, any other ends a number.

    Right steps need not be of use: one `1+1=2` is rewarded by 1.0. Use it beside a reward for the
    answer.
    """
    return per_text("worked_steps", _share_of_right)


def _share_of_right(text: str) -> float:
    """The share of right ones among the calculations of a text, by the rule of `worked_steps`; 0 without any."""
    text = _ANNOTATION.sub(r" ; \1 ; ", text)
    steps = [step for line in text.splitlines() for step in _steps(line)]
    return sum(steps) / len(steps) if steps else 0.0


def _steps(line: str) -> Iterator[bool]:
    """Whether each calculation of a line is right."""
    calculation: list[_Token] = []  # of which the number on the left is a result
    for i, (left_text, right_text) in enumerate(itertools.pairwise(line.split("="))):
        try:
            left, right = _end_of(left_text, starts_line=i == 0), _start_of(right_text)
            if calculation and left != _start_of(left_text):
                calculation = []  # 3+4=7, 5=5
            if _calculates(left) or not calculation or _calculates(right):
                calculation = left
            if _calculates(calculation) or _calculates(right):
                difference: Any = _value(calculation) - _value(right)
                yield bool(abs(difference) <= _rounding(calculation, right))
            else:
                calculation = []
        except _Unreadable:
            calculation = []


class _Unreadable(Exception):
    """Not an expression of the kind that is checked."""


class _Token(NamedTuple):
    kind: str  # the name of a group of _TOKEN
    text: str
    spaced: bool  # whether white space stands before it


_SIDE, _DIGITS = 200, 40  # characters of a side and of a number; they bound the work of one calculation
_TOKEN = re.compile(
    r"(?P<number>(?:\\?\$)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))"
    r"|(?P<operator>[-+*/−–×·⋅÷]|\\(?:times|cdot|div)(?![a-zA-Z])|(?<![^\W\d_])[xX](?=\s*(?:\\?\$)?[.(0-9]))"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<open>\()|(?P<close>\))|(?P<word>[^\W\d_]+)|(?P<space>\s+)|(?P<other>[<>|&@#~^•:]{2,3}|\\?.)"
)
_ANNOTATION = re.compile(r"<<([^<>\n]{1,200})>>")  # of GSM8K: 5*3=<<5*3=15>>15
_PLUS, _MINUS = {"+"}, {"-", "−", "–"}
_TIMES, _DIVIDED = {"*", "x", "X", "×", "·", "⋅", r"\times", r"\cdot"}, {"/", "÷", r"\div"}
_BULLETS = {"-", "–", "*", "+"}
_EXPRESSION = {"number", "operator", "open", "close"}
_COMMANDS = r"\text \textbf \mbox \mathrm \quad \qquad \checkmark \Rightarrow \rightarrow \implies \to \therefore"
_ENDINGS = "加 减 乘 除 加上 减去 乘以 除以 根号 的 倍 方 模 余 万 亿 分之"
_SHORT_WORDS = "a A I so is as it we in at on if he an my or"  # words, and no units or variables
_LINKING_WORDS = "so and then thus hence therefore but or also next now because since where while"
_HARMLESS, _OPERATING_ENDS = set(_COMMANDS.split()), tuple(_ENDINGS.split())
_SHORT, _CONNECTIVES = set(_SHORT_WORDS.split()), set(_LINKING_WORDS.split())
_SEPARATORS = frozenset(",;.，；。、)]}\"'`”’»?")  # between a number and the next calculation
_OPENING = frozenset("([{<>|,;:\"'`“‘«$~，；：。、（【《「")  # what may touch a calculation on its left


def _tokens(text: str) -> list[_Token]:
    tokens, spaced = [], False
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "space":
            tokens.append(_Token(match.lastgroup or "", match.group(), spaced))
        spaced = match.lastgroup == "space"
    return tokens


def _operates(token: _Token) -> bool:
    """Whether a token may be an operator that is not known, or a word that changes the number beside it."""
    if token.kind == "word":
        return (is_number_word(token.text) and not is_unit(token.text)) or token.text.endswith(_OPERATING_ENDS)
    if token.kind == "command":
        return token.text not in _HARMLESS
    if token.kind != "other" or token.text in _OPENING or "\u2190" <= token.text[-1] <= "\u21ff":  # arrows
        return False
    return token.text[-1] in "^_%!&" or unicodedata.category(token.text[-1]) in ("Sm", "Sk", "Nd", "No", "Nl")


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
    if start > 0 and expression and tokens[start - 1].kind == "number":
        # 2 1/2+1 and 1 000+1 are other numbers; the 7 of 3+4=7 3+5=8 is not.
        if starts_line or start > 1 or _changes(tokens[start - 1 : start + 2]):
            raise _Unreadable
        return expression
    if (
        start > 1
        and expression
        and tokens[start - 2].kind in ("number", "close")
        and _joins(tokens[start - 1 : start + 1])
    ):
        raise _Unreadable  # 3 @ 4+1, 12:00+3, 3 xor 1+1
    if start > 0 and expression and not _may_precede(tokens[start - 1], expression[0], signed=signed):
        raise _Unreadable
    if start > 0 and signed and expression[1].spaced:
        raise _Unreadable  # total - 3+4: minus what is left of it
    return expression


def _is_variable(token: _Token) -> bool:
    return len(token.text) == 1 and token.text.lower() != token.text.upper()


def _may_precede(previous: _Token, first: _Token, *, signed: bool) -> bool:
    """Whether an expression can begin after a token, rather than go on from it as in x2+3, 2^3+1, f(2)+3 or y -3+1."""
    letter = previous.text[-1]
    if letter in "^_" or _operates(previous):
        return False
    if previous.kind == "word" and letter not in "aAI" and _is_variable(previous):
        return False  # y 3+4: a product
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
    if opened and len(tokens) > opened[0] + 1 and _operates(tokens[opened[0] + 1]):
        raise _Unreadable  # 7 (mod 5)
    if following and end and not opened and _changes(tokens[end - 1 :]):
        raise _Unreadable
    if opened and tokens[opened[0]].spaced:
        end = opened[0]  # 7 (which is right)
    elif following and (following.text[-1] in "^_%" or (following.kind == "word" and following.text[0].isnumeric())):
        raise _Unreadable  # 5^2, 5%, 5²
    if end > 1 and tokens[end - 1].text in _MINUS and tokens[end - 1].spaced:
        end -= 1  # 7 - which is right
    return tokens[:end]


def _changes(tokens: Sequence[_Token]) -> bool:
    """Whether the tokens after a number, the first one here, belong to it: 7e3, 7x, 7 1/2, 7 000, 7:2."""
    number, following, *rest = tokens
    after = rest[0] if rest else None
    if _operates(following):
        return True
    if following.kind == "word":
        return not _may_follow(following, after)
    if following.kind == "number":
        grouped = re.fullmatch("[0-9]{1,3} [0-9]{3}", f"{number.text} {following.text}")
        return bool(grouped) or (after is not None and after.text == "/")
    return after is not None and after.kind == "number" and _joins([following, after])


def _may_follow(word: _Token, after: _Token | None) -> bool:
    """Whether a word after a number leaves it: a unit, or apart from it a plain word or a name such as E3."""
    text = word.text
    if text.lower() == text.upper():  # Chinese and others without spaces
        return not text.startswith(("十", "百", "千", "万", "亿", "兆"))
    if text in ("l", "L") or (text.islower() and canonical_unit(text)):
        return True
    if not word.spaced:
        return is_unit(text)
    touched = after is not None and after.kind == "number" and not after.spaced
    named = touched and len(text) == 1 and text.isupper() and text != "R"  # 7/2 = 3 R1 has a remainder
    return len(text) > 2 or text in _SHORT or named


def _joins(pair: Sequence[_Token]) -> bool:
    """Whether what stands between a number and another may be an operator: `3 @ 4`, `12:00`, `6 : 2`, `3 xor 1`."""
    between, after = pair
    if between.kind == "word":
        return between.text.isascii() and between.text.casefold() not in _CONNECTIVES
    if between.text == ":":
        return between.spaced or not after.spaced
    arrow = "\u2190" <= between.text[-1] <= "\u21ff"
    return between.kind == "other" and not arrow and between.text not in _SEPARATORS


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
    """The value of an expression, NaN where it divides by zero. Without recursion: the caller's stack may be deep."""
    values: list[Fraction | float] = []
    operators: list[str] = []  # of _PRECEDENCE, and "(" for an open parenthesis
    operand = True  # whether one comes next
    for token in expression:
        if len(token.text) > _DIGITS:
            raise _Unreadable
        if operand and token.kind == "number":
            values.append(Fraction(token.text.lstrip("\\$").replace(",", "")))
            operand = False
        elif operand and token.kind == "open":
            operators.append("(")
        elif operand and token.text in _PLUS | _MINUS:
            operators.append("negate" if token.text in _MINUS else "keep")
        elif not operand and token.kind == "operator":
            operator = next(name for name, signs in _SIGNS.items() if token.text in signs)
            while operators and _PRECEDENCE.get(operators[-1], 0) >= _PRECEDENCE[operator]:
                _apply(operators.pop(), values)
            operators.append(operator)
            operand = True
        elif not operand and token.kind == "close":
            while operators and operators[-1] != "(":
                _apply(operators.pop(), values)
            if not operators:
                raise _Unreadable
            operators.pop()
        else:
            raise _Unreadable
    if operand or "(" in operators:
        raise _Unreadable
    while operators:
        _apply(operators.pop(), values)
    return values[0]


_SIGNS = {"add": _PLUS, "subtract": _MINUS, "multiply": _TIMES, "divide": _DIVIDED}
_PRECEDENCE = {"add": 1, "subtract": 1, "multiply": 2, "divide": 2, "negate": 3, "keep": 3}


def _apply(operator: str, values: list[Fraction | float]) -> None:
    """Replaces the operands on the stack with the result."""
    right = values.pop()
    if operator in ("negate", "keep"):
        values.append(-right if operator == "negate" else right)
        return
    left = values.pop()
    if operator == "add":
        values.append(left + right)
    elif operator == "subtract":
        values.append(left - right)
    elif operator == "multiply":
        values.append(left * right)
    else:
        # NaN is equal to nothing, so the rest is still read and the calculation is wrong.
        values.append(math.nan if right == 0 else left / right)
