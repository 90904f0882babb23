"""Whether two pieces of mathematics are equal, by math-verify. Workers load this file, and with it SymPy."""

import itertools
import logging
import math
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Derivative, Expr, Float, I, Integral, Limit, Product, Sum, Symbol

# Both answers come as LaTeX alone, without units (`grpo_jax.rewards.latex`): what their own rules for units would cut
# off (t, s, m, d after a number) is a variable here.
LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=False, boxed="last"),
    boxed_match_priority=0,
    try_extract_without_anchor=False,
)

# Their warning that timeouts are off: the pool's clock is the limit here.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def accuracy(completion: str, gold: str | None, verdict: float | None, tolerance: float, decimals: int) -> float | None:
    """Compares a completion's answer with the gold one, both in LaTeX.

    Args:
      completion: its answer, empty if it has none.
      gold: the gold answer, None if it cannot be read.
      verdict: the reward where it is already known, else None.
      tolerance: as of `mathematics.accuracy`.
      decimals: as of `mathematics.accuracy`.

    Returns:
      1.0 or 0.0, or None without a gold answer. One that cannot be parsed is mathematics all the same: only its own
      text is right, which the verdict has found.
    """
    if verdict is not None:
        return verdict
    if gold is None:
        return None
    if ("%" in completion) != ("%" in gold):  # 0.5\% is 0.005, or 0.5 where the sign says what is asked for
        bare = [parsed(latex.replace("\\%", "").replace("%", "")) for latex in (gold, completion)]
        if all(bare) and verify(*bare, float_rounding=decimals, timeout_seconds=None):
            return 1.0
    gold, completion = (_PERCENT.sub(r"\\frac{\1}{\g<2>00}", latex) for latex in (gold, completion))
    gold, completion = _in_order(*_as_intervals(gold, completion))
    if _counts_apart(gold, completion) or _order_matters_to_one(gold, completion):
        return 0.0
    gold, completion = _without_names(gold, completion)
    expected = parsed(gold)
    answer = parsed(completion) if completion else []
    if not expected or not answer or _contradicts(completion):
        return 0.0
    if all(
        set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", latex))) <= {"i", "e"} for latex in (gold, completion)
    ):
        expected, answer = [[_complex(value) for value in values] for values in (expected, answer)]
    exact = {_equal_constants(a, e) for e in expected for a in answer}
    if True in exact:
        return 1.0
    places = decimals + max(_leading_zeros(gold), _leading_zeros(completion))
    if exact != {False} and verify(expected, answer, float_rounding=places, timeout_seconds=None):
        return float(not any(_apart(a, e) for e in expected for a in answer))
    return float(tolerance > 0 and any(_close(a, e, tolerance) for e in expected for a in answer))


def parsed(latex: str) -> list[Any]:
    """What math-verify makes of LaTeX; empty where it cannot be parsed."""
    # math-verify's own timeouts raise off the main thread and cancel the caller's alarm.
    answers = parse(
        rf"\boxed{{{latex}}}", extraction_config=[LATEX], extraction_mode="first_match", parsing_timeout=None
    )
    return [_with_derivatives(answer) for answer in answers if not isinstance(answer, str)]


def _with_derivatives(value: Any) -> Any:
    """The value with a letter for each derivative such as dy/dx, of one letter by another, which SymPy takes for 0."""
    found = value.atoms(Derivative) if isinstance(value, Basic) else ()
    return value.xreplace({d: Symbol(f"{d}") for d in found if d.expr.is_Symbol and d.expr not in d.variables})


_IN_BRACKETS = re.compile(r"[(\[][^()\[\]]*[)\]]|\{[^{}]*\}")
_NO_NAME = re.compile(
    r"[<>!?]|\\(?:not|n?[lg]e?q?|[lg]t|[lg]eqslant|neq?|approx|n?sim|n?equiv|n?cong|(?:not)?in|neg|lnot|to|implies|iff|mapsto"
    r"|[a-zA-Z]*arrow)(?![a-zA-Z])"
)


def _without_names(gold: str, completion: str) -> tuple[str, str]:
    """Both without the name before `=` where the parser knows one side's not: `P(A|B) = 1/2`. Two names must agree."""
    sides = (gold, completion)
    named = [parts for side in sides if len(parts := _split(side, "=")) == 2]
    bare = [_IN_BRACKETS.sub("", name) for name, _ in named]  # relations in brackets are of the name, P(X > 3)
    same = len({re.sub(r"\\(?:left|right)|\\,|\s", "", name.replace(r"\mid", "|")) for name, _ in named}) == 1
    if not same or any(map(_NO_NAME.search, bare)) or all(map(parsed, sides)):
        return sides
    return _split(gold, "=")[-1], _split(completion, "=")[-1]


def _complex(value: Any) -> Any:
    """The value with the imaginary unit for i."""
    if not isinstance(value, Expr):
        return value
    return value.subs({symbol: I for symbol in value.free_symbols if getattr(symbol, "name", "") == "i"})


_INTERVAL = r"[(\[][^,;]*,[^,;]*[)\]]"
_INTERVALS = re.compile(rf"\s*{_INTERVAL}(?:\s*\\cup\s*{_INTERVAL})*\s*")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b")
_LOWEST, _HIGHEST = r"-\infty", r"\infty"
_LESS, _MORE = r"(<|\\leq?(?![a-z])|\\lt(?![a-z]))", r"(>|\\geq?(?![a-z])|\\gt(?![a-z]))"


def _as_intervals(gold: str, completion: str) -> tuple[str, str]:
    """Both with inequalities as intervals, where the other side is intervals, or inequalities in the same letter."""
    ours, theirs = _union(completion), _union(gold)
    letters = _letters(completion)
    if ours and theirs and len(letters) == 1 and letters == _letters(gold):
        return theirs, ours
    return (
        theirs if theirs and _INTERVALS.fullmatch(completion) else gold,
        ours if ours and _INTERVALS.fullmatch(gold) else completion,
    )


_PERCENT = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}\s*\\?%")  # the parser takes no sign after a fraction


def _in_order(gold: str, completion: str) -> tuple[str, str]:
    """Both as tuples, where one side has an order (a tuple, a vector, values by names) and the other only lists values.

    The parser takes a list without brackets for a set, which is equal to a tuple of the same values in any order.
    """
    sides = (gold, completion)
    vectors, tuples = [_vector(side) for side in sides], [_bracketed(side) for side in sides]
    named = [_named(side) for side in sides]
    lists = [[] if name else _items(side) for name, side in zip(named, sides, strict=True)]
    ordered = [vector or row or name for vector, row, name in zip(vectors, tuples, named, strict=True)]
    found: list[list[str]] = [[], []]
    if any(lists) and any(ordered):
        found = [row or items for row, items in zip(ordered, lists, strict=True)]
    elif any(vectors) and any(tuples):
        found = [vector or row for vector, row in zip(vectors, tuples, strict=True)]
    if not all(found) or any(re.search(r"[=(]", item) for items in found for item in items):
        return sides
    return f"({','.join(found[0])})", f"({','.join(found[1])})"


_VECTOR = re.compile(
    r"\\begin\{([pb]matrix)\}((?:(?!\\(?:begin|end))[^&])*|(?:(?!\\(?:begin|end)|\\\\).)*)\\end\{\1\}", re.DOTALL
)


def _vector(latex: str) -> list[str]:
    vector = _VECTOR.fullmatch(latex.strip())
    return [item.strip() for item in re.split(r"&|\\\\", vector[2]) if item.strip()] if vector else []


def _bracketed(latex: str) -> list[str]:
    """The items of a tuple or a list in brackets."""
    bare = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", latex).strip()
    whole = bare[:1] + bare[-1:] in ("()", "[]") and len(_split(bare)) == 1
    return items if whole and len(items := _split(bare[1:-1])) > 1 else []


def _named(latex: str) -> list[str]:
    """The values of `a=1, b=2`, where the names differ."""
    pairs = [re.fullmatch(r"\s*([a-zA-Z](?:_\{?\w+\}?)?)\s*=([^=]+)", item) for item in _items(latex)]
    known = [pair for pair in pairs if pair]
    return [pair[2] for pair in known] if pairs and len({pair[1] for pair in known}) == len(pairs) else []


_NO_LIST = re.compile(r"\d,\d{3}(?!\d)|\\(?:pm|mp|cdots|text|lor|land|cup)(?![a-zA-Z])|\b(?:and|or)\b")


def _items(latex: str) -> list[str]:
    """The items of a list without brackets; none of anything else, such as a number with thousands separators."""
    items = [] if _NO_LIST.search(latex.replace(r"\!", "")) else _split(latex)
    return items if len(items) > 1 else []


def _split(latex: str, mark: str = ",") -> list[str]:
    """The parts between commas, or other marks, that are in no brackets."""
    parts, depth = [""], 0
    for token in re.findall(r"\\[a-zA-Z]+|\\.|.", latex, re.DOTALL):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if token == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _counts_apart(gold: str, completion: str) -> bool:
    """Whether lists without brackets have different numbers of items, which as sets could be equal."""
    single = [not _NO_LIST.search(latex) and not re.search(r"[,;{}()\[\]]", latex) for latex in (gold, completion)]
    counts = [len(_items(latex)) or int(one) for latex, one in zip((gold, completion), single, strict=True)]
    return all(counts) and counts[0] != counts[1]


def _order_matters_to_one(gold: str, completion: str) -> bool:
    r"""Whether one side is a set that is written out, \{1, 2\}, and the other a tuple, a list or an interval."""
    for one, other in ((gold, completion), (completion, gold)):
        bare = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", one).strip()
        braces = bare.startswith(r"\{") and bare.endswith(r"\}") and len(_split(bare)) == 1 < len(_split(bare[2:-2]))
        if braces and (_bracketed(other) or _union(other)):
            return True
    return False


def _union(latex: str) -> str:
    r"""The intervals that inequalities in one letter are, `x < 1 or x > 2` two of them; empty for anything else."""
    pieces = [piece.strip() for piece in _OR.split(latex)]
    made = [_interval(piece) for piece in pieces]
    whole = all(interval != piece for interval, piece in zip(made, pieces, strict=True))
    return r" \cup ".join(made) if whole and (len(pieces) == 1 or len(_letters(latex)) == 1) else ""


def _letters(latex: str) -> set[str]:
    return set(re.findall(r"(?<![\\a-zA-Z])[a-z](?![a-zA-Z])", latex))


def _interval(latex: str) -> str:
    r"""The interval that an inequality in one letter is, else the text: `(1, 2]` for `1 < x \le 2`."""
    for pattern, low, high in (  # and the groups of its two ends
        (rf"([^<>]+?){_LESS}\s*[a-z]\s*{_LESS}([^<>]+)", 1, 4),
        (rf"([^<>]+?){_MORE}\s*[a-z]\s*{_MORE}([^<>]+)", 4, 1),
        (rf"\s*[a-z]\s*{_LESS}([^<>]+)", None, 2),
        (rf"\s*[a-z]\s*{_MORE}([^<>]+)", 2, None),
        (rf"([^<>]+?){_LESS}\s*[a-z]\s*", 1, None),
        (rf"([^<>]+?){_MORE}\s*[a-z]\s*", None, 1),
    ):
        if match := re.fullmatch(pattern, latex):
            beside = {1: 2, 4: 3} if match.re.groups == 4 else {1: 2, 2: 1}  # the sign beside an end
            strict = {end: match[sign] in ("<", ">", r"\lt", r"\gt") for end, sign in beside.items()}
            opening = "(" if low is None or strict[low] else "["
            closing = ")" if high is None or strict[high] else "]"
            return f"{opening}{match[low] if low else _LOWEST},{match[high] if high else _HIGHEST}{closing}"
    return latex


def _contradicts(latex: str) -> bool:
    """Whether numbers on both sides of an equals sign differ, as in `4 = 5`, by more than the rounding of a decimal."""
    sides = re.split(r"(?<![<>!:\\])=", latex)
    if len(sides) < 2:
        return False
    values = [_number(found[0]) if (found := parsed(side)) else None for side in sides]
    for (a, left), (b, right) in itertools.pairwise(zip(values, sides, strict=True)):
        if (
            a is not None
            and b is not None
            and abs(a - b) > (2e-2 if "." in left + right else 1e-9) * max(abs(a), abs(b))
        ):
            return True
    return False


def _leading_zeros(latex: str) -> int:
    """Zeros between the point and the first other digit of the smallest number; 6 for `4e-7`."""
    zeros = [len(match[1]) for match in re.finditer(r"(?<!\d)0*\.(0+)[1-9]", latex)]
    powers = [int(match[1]) - 1 for match in re.finditer(r"\\times 10\^\{?-(\d{1,3})\}?", latex)]
    return max([0, *zeros, *powers])


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, AttributeError, OverflowError):  # a formula, an interval, a complex number
        return None


def _apart(answer: Any, gold: Any) -> bool:
    """Whether both are real numbers that differ by more than rounding: SymPy's comparison takes tiny ones for 0."""
    a, b = _number(answer), _number(gold)
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)) or "%" in f"{answer}{gold}":
        return False
    return abs(a - b) > 1e-3 * max(abs(a), abs(b))


def _equal_constants(answer: Any, gold: Any) -> bool | None:
    r"""Whether two exact constants are equal by 60 digits; None where they have letters or decimals, or for no verdict.

    It tells what simplification may not see (`4\cos^2 36^\circ` is `\frac{3+\sqrt{5}}{2}`), and what 15 digits do not
    show (`\pi + 10^{-18}` is not `\pi`). Of fractions agreement is no proof, and of sums and integrals, whose digits
    are estimates, no difference is.
    """
    sides = (answer, gold)
    if not all(isinstance(side, Expr) and not side.free_symbols and not side.has(Float) for side in sides):
        return None
    try:
        a, b = (side.evalf(60) for side in sides)
        if not (a.is_finite and b.is_finite):
            return None
        size = max(abs(a), abs(b))
        apart = bool(abs(a - b) > size * Float("1e-55", 60))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    if apart:
        return None if any(side.has(Sum, Integral, Product, Limit) for side in sides) else False
    proof = 1e-20 < size < 1e20 and not all(side.doit().is_rational for side in sides)
    return True if proof else None


def _close(answer: Any, gold: Any, tolerance: float) -> bool:
    """Whether both are real numbers, and not further apart than a share of the gold one."""
    a, b = _number(answer), _number(gold)
    return a is not None and b is not None and abs(a - b) <= tolerance * abs(b)
