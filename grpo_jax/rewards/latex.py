r"""The final answer of a text in LaTeX, as a person reads it, before a parser sees it.

`final_answer` finds it in a completion and `gold_answer` in a data set's column; both give a `Reading`,
whose LaTeX has no thousands separators, units, currencies or scale words left:

    1\,234 -> 1234    5\text{ million} -> 5000000    \frac12 -> \frac{1}{2}    \$36 -> 36    5\text{ cm} -> 5

Text that is known to change the answer, and is none of these (`5\text{ or more}`), makes it unreadable, and a number
beside words that are neither a known unit nor one plural noun (`5\text{ maybe}`) is compared as text. The time taken
grows linearly with the text.
"""

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from grpo_jax.rewards.surroundings import REACH, stands_alone
from grpo_jax.rewards.units import SCALES, canonical_unit, changes_meaning, is_unit, unit_of


class Reading(NamedTuple):
    """One answer."""

    latex: str  # for the parser
    text: str  # the answer as it was written, without markup and spacing: equal texts are equal answers
    unit: str = ""  # the name of its unit, where that is a known one
    base: int | None = None  # of a number such as 2516_8
    words: bool = False  # it is text, and not mathematics
    option: str = ""  # the letter of the choice that it is, as in (B) 10
    whole: str = ""  # all that was written, as `text`: of a gold answer also what is not its mathematics


# -------------------------------------------------------------------- finding the answer

_NOT = r"(?:\bnot|n['’]t|\bnever|\bneither|\bnor|\bcannot|\brather than|\binstead of|\bother than|\\neq?|≠)"
_NEGATED = re.compile(rf"{_NOT}(?:\s+(?:be|equal|to|the|a|simply|just))*[\s:$(\\\[{{]*$", re.IGNORECASE)
_MINUS = re.compile(  # before a box; at a line's start, or after a word and spaced, it is a bullet or a dash
    r"(?:[=({\[:]\s*|\$|\b(?:is|be|are|equals)\s*)(?P<sign>[-−])\s*\$?\Z|(?:\A|\s)(?P<touching>[-−])\$?\Z"
)
_NEGATION = re.compile(
    rf"{_NOT}|\b(?:wrong|incorrect|false|unlike|if|whether|suppose|assume|assuming|doubt|unless|hardly|guess)\b",
    re.IGNORECASE,
)
_SAID = r"(?:it|this|that|(?:the|our|my)\s+(?:final\s+|correct\s+)?(?:answer|result|value|number))"
_SUPPOSED = re.compile(  # before a box: "if the answer were", "suppose it is"
    rf"\b(?:if|whether|suppose|supposing|assume|assuming)\s+(?:that\s+)?{_SAID}\s+(?:is|was|were|be|equals)[\s:$(\\\[]*$",
    re.IGNORECASE,
)
_ASKED = re.compile(rf"\b(?:is|was|could|can|might)\s+{_SAID}(?:\s+be)?[\s:$(\\\[]*$", re.IGNORECASE)
_QUESTION = re.compile(r"[\s$*]*(?:\\[)\]])?[\s$*]*\?")
_BOX = r"\\+(?:boxed|fbox)"
_BRACE = re.compile(rf"{_BOX}\s*\{{|{_BOX}(?:\s*(\d+(?:\.\d+)?)|\s+([a-zA-Z])\b)|\\.|[{{}}]", re.DOTALL)
_JOINED = re.compile(
    r"[\s$]*(?:\\[)\]])?[\s$]*(?:[,;]|(?:[,;]\s*)?\(?(?:\\text\{\s*)?(?:and|or|&)(?:\s+(?:maybe|perhaps|possibly))?(?:\s*\})?)"
    r"[\s$]*(?:\\[(\[])?[\s$]*"
)
_NAMED = re.compile(r"(?<![\\\w])([a-zA-Z](?:_\{?\w{1,3}\}?)?)\s*=\s*\$?\s*\Z")  # before a box
_ENVIRONMENT = re.compile(  # of bounded length, so that many that are not closed take linear time
    r"\$\$([^$]{1,500})\$\$|\\\[((?:[^\\]|\\[^\]]){1,500})\\\]"
    r"|(?<![\\\d])\$((?:\\\$|[^\n$]){1,500})(?<!\\)\$|\\\(((?:[^\\]|\\[^)]){1,500})\\\)"
)
_ANSWER = re.compile("answer", re.IGNORECASE)
_AFTER = re.compile(rf"[\s$]*(?:\\[)\]])?\s*(?:\\?%|\b(?:percent|{'|'.join(SCALES)})\b)", re.IGNORECASE)
_UNIT_AFTER = re.compile(
    r"\s*(?:\\[,;: ])?\s*(?:\\(?:text|mathrm|mbox)\{([^{}]*)\}(?:\^\{?-?\d\}?)?"
    r"|\^\s*\{?\s*\\circ\s*\}?(?:\\text\{[CF]\})?)"
)
_SCALE_WORDS = [[word] for word in SCALES]
_ANNOUNCED = re.compile(  # between "answer" and its LaTeX
    r"(?:[\s*_:=]|\b(?:is|was|equals|be|(?:will|must|is equal to)(?:\s+be)?|then|therefore|thus|hence|so|simply"
    r"|just|exactly|approximately|[a-zA-Z]\s*=|(?:to|of|for)\s+(?:(?:the|this|your)\s+)?"
    r"(?:problem|question|exercise|part)(?:\s+\(?[a-z0-9]{1,2}\)?)?)(?![a-zA-Z])){0,60}"
)
_VERB = re.compile(r"\b(?:can|could|cannot|to|will|would|should|must|we|you|they|who)\s*$", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;:!?\n]|,(?!\s*that\b)")


def final_answer(text: str) -> Reading | None:
    r"""The answer of a completion: its last `\boxed{}`, or else the last LaTeX environment that "answer" announces.

    Boxes that only `,`, `;`, `and` or `or` join are one answer: `\boxed{1} and \boxed{2}` is
    `1, 2`, and `x=\boxed{1}, y=\boxed{2}` is `x=1, y=2`. A box within a box is part of it. None where there is no
    answer, the last box is not closed, more than the box is written (`2\boxed{5}`, `\boxed{5}^2`, "half of \boxed{5}",
    see `surroundings`), the answer is denied ("not $5$", "\boxed{5} is wrong"), supposed or asked ("is it
    \boxed{5}?"). What is unreadable is text. Between "answer" and its LaTeX stand only words such as "is" and
    "therefore", `:`, `=` or `x =`, and nothing is denied, supposed or doubted in that clause.
    """
    boxes = list(_boxes(text))
    latex = _last(text, boxes) if boxes else _announced(text)
    whole = "" if latex is None else _whole(latex)
    if latex is None or not whole:
        return None
    return (read(latex) or Reading(r"\text{}", whole, words=True))._replace(whole=whole)


def gold_answer(gold: str) -> Reading | None:
    r"""The gold answer: what follows its last `####`, its last `\boxed{}`, or all of it where it is bare mathematics.

    Of a sentence it is the LaTeX that "answer" announces, the only LaTeX, the number that "answer is" announces, or
    the only date or number. A phrase with several numbers (Apollo 11 in 1969) is text. None where it cannot be told.
    """
    gold = gold.rpartition("####")[2].strip()
    if not re.search(r"(?<!\\)\$(?!\.?\d)", gold):
        gold = re.sub(r"(?<!\\)\$", r"\\$", gold)  # $5 and $6 are amounts
    whole = _whole(gold)
    reading = _gold(gold)
    if reading is None and (announced := _GOLD_ANNOUNCED.match(unwrapped(gold))):
        reading = _gold(unwrapped(gold)[announced.end() :])
    if reading is None and _PHRASE.fullmatch(gold):
        reading = Reading(gold, whole.casefold(), words=True)
    return None if reading is None or not whole else reading._replace(whole=whole)


def _gold(gold: str) -> Reading | None:
    boxes = list(_boxes(gold))
    if boxes:
        latex = _last(gold, boxes)
        return None if latex is None else read(latex, gold=True)
    bare = unwrapped(gold)
    environments = list(_ENVIRONMENT.finditer(bare))
    if not environments and not _is_sentence(_rewritten(bare)):
        return read(gold, gold=True)
    if not environments:
        numbers = [match[1] for match in _ANSWER_IS.finditer(bare)][-1:] or _NUMERAL.findall(bare)
        if measures := _measures(bare):
            return Reading(bare, measures, words=True)
        dates = list(_DATE.finditer(bare))
        if len(dates) == 1 and not re.search(r"\d", _DATE.sub("", bare)) and not _NEGATION.search(bare):
            return Reading(bare, _date(dates[0]), words=True)
        if not _ANSWER_IS.search(bare) and _COMPOUND.fullmatch(bare):
            return Reading(bare, re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", bare).casefold(), words=True)
        if _ANSWER_IS.search(bare):
            clause = _CLAUSE.split(bare[: bare.casefold().rindex("answer")])[-1]
            return None if _NEGATION.search(clause) else read(numbers[0], gold=True)
        return read(numbers[0]) if len(numbers) == 1 and not changes_meaning(_NUMERAL.sub("", bare)) else None
    gaps = [bare[a.end() : b.start()] for a, b in itertools.pairwise(environments)]
    if all(map(_JOINED.fullmatch, gaps)) and not _NEGATION.search(bare):
        return read(", ".join(map(_content, environments)) + _following(bare, environments[-1].end()), gold=True)
    latex = _announced(bare)
    return None if latex is None else read(latex, gold=True)


def _boxes(text: str) -> Iterator[tuple[int, int, str | None]]:
    """Start, end and content of the boxes that are in no other box; content None for one that is not closed."""
    stack: list[tuple[int, int] | None] = []  # a box's start and the start of its content; None for another brace
    open_boxes = 0
    for match in _BRACE.finditer(text):
        token = match.group()
        if token.startswith("\\") and token.endswith("{") and len(token) > 2:
            stack.append((match.start(), match.end()))
            open_boxes += 1
        elif match.lastindex:  # \boxed 5
            if not open_boxes:
                yield match.start(), match.end(), match[match.lastindex]
        elif token == "{":
            stack.append(None)
        elif token == "}" and stack and (box := stack.pop()):
            open_boxes -= 1
            if not open_boxes:
                yield box[0], match.end(), re.sub(rf"{_BOX}\s*(?=\{{)", "", text[box[1] : match.start()])
    if open_boxes:
        start = next(box for box in stack if box)[0]
        yield start, len(text), None


def _last(text: str, boxes: list[tuple[int, int, str | None]]) -> str | None:
    start, end, content = boxes[-1]
    before = text[max(start - REACH, 0) : start]
    if _NEGATED.search(before) or _SUPPOSED.search(before) or (_ASKED.search(before) and _QUESTION.match(text, end)):
        return None
    while len(boxes) > 1 and boxes[-2][1:] == (start, content):  # said again and again
        boxes = boxes[:-1]
        start = boxes[-1][0]
    contents, starts = [_alone(text, start, content, text[end : end + REACH])], [start]
    for earlier_start, earlier_end, earlier in reversed(boxes[:-1]):
        if not _JOINED.fullmatch(_NAMED.sub("", text[earlier_end:start][:40])):
            break
        start = earlier_start
        contents.append(_alone(text, start, earlier, ""))
        starts.append(start)
    known = [unwrapped(content) for content in reversed(contents) if content is not None]
    names = [_NAMED.search(text[max(at - REACH, 0) : at]) for at in reversed(starts)]
    if len(known) == len(names) > 1 and all(names) and not any("=" in content for content in known):
        known = [f"{name[1]}={content}" for name, content in zip(names, known, strict=True) if name]
    return ", ".join(dict.fromkeys(known)) + _following(text, end) if len(known) == len(contents) else None


def _alone(text: str, start: int, content: str | None, after: str) -> str | None:
    """The content of a box with the minus before it; None where the box is not closed or does not stand alone."""
    before = text[max(start - REACH, 0) : start]
    negative = _MINUS.search(before)
    before = before[: negative.start(negative.lastgroup or 0)] if negative else before
    if content is None or not stands_alone(before, after):
        return None
    return f"-{content}" if negative else content


def _announced(text: str) -> str | None:
    environments = list(_ENVIRONMENT.finditer(text))
    for number in range(len(environments) - 1, -1, -1):
        before = text[environments[number - 1].end() if number else 0 : environments[number].start()]
        mention = list(_ANSWER.finditer(before[-REACH:]))
        if not mention:
            continue
        parts = [environments[number]]
        for other in environments[number + 1 :]:
            if not _JOINED.fullmatch(text[parts[-1].end() : other.start()]):
                break
            parts.append(other)
        end = parts[-1].end()
        clause = _CLAUSE.split(before[-2 * REACH :][: mention[-1].start() - len(before[-REACH:])])[-1]
        announced = _ANNOUNCED.fullmatch(before[-REACH:][mention[-1].end() :])
        after = text[end : end + REACH]
        if (
            not announced
            or _NEGATION.search(clause)
            or (_VERB.search(clause) and not re.search(r"[a-z:=]", announced.group()))
            or after.lstrip().startswith("?")
            or not stands_alone("", f"$ {after}")
        ):
            return None
        return ", ".join(_content(part) for part in parts) + _following(text, end)
    return None


def _content(environment: re.Match[str]) -> str:
    return unwrapped(next(group for group in environment.groups() if group is not None))


def _following(text: str, end: int) -> str:
    """A percent sign, a scale word, or a unit in LaTeX right after an answer, which belongs to it."""
    if unit := _UNIT_AFTER.match(text, end, end + REACH):
        return unit.group() if unit[1] is None or unit_of(unit[1]) or unit[1].split()[:1] in _SCALE_WORDS else ""
    after = _AFTER.match(text, end)
    return after.group().lstrip("$\\)] ").rjust(after.end() - after.start()) if after else ""


def _is_sentence(text: str) -> bool:
    """Whether there are words outside of LaTeX commands, other than those at the end: a unit, or all of the answer."""
    prose = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|\\(?:text\w*|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+", " 0 ", text)
    word = re.search(r"(?<![\w^_\\{])(?!(?:and|or)\b)[A-Za-z]{2,}[,:]?\s", prose)
    return bool(word and re.search(r"[\d=^]", prose[word.end() :]))


# -------------------------------------------------------------------- reading the answer

_LONG = 500  # characters of an answer from which on no unit is looked for
_VULGAR = dict(
    enumerate(((1, 3), (2, 3), (1, 5), (2, 5), (3, 5), (4, 5), (1, 6), (5, 6), (1, 8), (3, 8), (5, 8), (7, 8)), 0x2153)
)
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        **dict.fromkeys("−﹣", "-"),
        **{chr(code): rf"\frac{{{above}}}{{{below}}}" for code, (above, below) in _VULGAR.items()},
        **{chr(code + 0xFEE0): chr(code) for code in range(ord("!"), ord("~") + 1)},  # of full width, as in Chinese
        "、": ",",
        "。": ".",
        **{
            "×": r"\times ",
            "⋅": r"\cdot ",
            "·": r"\cdot ",
            "÷": r"\div ",
            "°": r"^\circ ",
            "π": r"\pi ",
            "∞": r"\infty ",
        },
        **{
            **dict.fromkeys("≤⩽", r"\le "),
            **dict.fromkeys("≥⩾", r"\ge "),
            "≠": r"\ne ",
            "≈": r"\approx ",
            "∪": r"\cup ",
            "∩": r"\cap ",
            "±": r"\pm ",
        },
        **{
            "½": r"\frac{1}{2}",
            "¼": r"\frac{1}{4}",
            "¾": r"\frac{3}{4}",
            "⁄": "/",
            "√": r"\sqrt ",
            "∈": r"\in ",
        },
    }
)
_RAISED, _LOWERED = "⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "₋₊₀₁₂₃₄₅₆₇₈₉"
_PLAIN = str.maketrans(_RAISED + _LOWERED, "-+0123456789" * 2)
_SCRIPT = re.compile(rf"([{_RAISED}]+)|([{_LOWERED}]+)")
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
_SIZES = "tiny|small|normalsize|large|Large|LARGE|huge|Huge|textstyle|scriptstyle"
_WRITTEN = [
    (re.compile(pattern), form)
    for pattern, form in (  # other ways to write the same
        (r"\\sqrt\s*\(([^(){}]*)\)(?!\s*\^)", r"\\sqrt{\1}"),
        (r"∛\s*(?:(\d+)|\(([^()]*)\))", r"\\sqrt[3]{\1\2}"),
        (rf"\\(?:{_SIZES}|[bB]igg?[lmr]?)(?![a-zA-Z])\s*", ""),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        # marks that the parser would leave out without a word
        (r"(?:\\[lc]?dots[bcim]?(?![a-zA-Z])|\.{3}|…)", r"\\cdots "),
        (r"(?<![a-zA-Z])([a-zA-Z]|[)}\]])['’′](?!['’′]|s\b)", r"\1^{\\prime}"),
        (r"(?<![a-zA-Z])([a-zA-Z]|[)}\]])(?:['’′]{2}|″)(?!['’′])", r"\1^{\\prime\\prime}"),
        (r"\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"\\text\s*\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"(?<=\d)['’](?=\d{3}(?!\d))", ""),
        # as programs write it
        (r"(?<=[\w)\]])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"\^\s*([-+]?\d{2,}|[-+]\d|[-+]?[a-zA-Z0-9]*\([^(){}]*\))", r"^{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}"),
        (rf"(?<![\\a-zA-Z])({_NAMES})(?=\s*\(|\s*\^|\s+(?:\d|[a-z]\b))", r"\\\1"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![<>=!])>=", r"\\ge "),
        (r"(?<![<>=!])<=(?!>)", r"\\le "),
        (r"!=|=/=|<>", r"\\ne "),
        (
            r"^\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid(?![a-z])|\\vert(?![a-z])|[:|])"
            r"([^,{}]*(?:[<>]|\\(?:le|ge|lt|gt|ne)q?(?![a-z]))[^,{}]*)\\\}$",
            r"\1",
        ),
        (r"^(?:\\text\s*\{)?\s*[Aa]ll real(?: numbers)?\s*\}?$", r"\\mathbb{R}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
        (r"(^[-+]?|[(\[,]\s*[-+]?)(?:inf|oo)(?=\s*(?:[)\],]|$))", r"\1\\infty "),
        (r"\\text\s*\{\s*(\\?\$)\s*\}", r"\1"),
        (r"(^|[=(,\[]\s*)–(?=\s*[\d\\a-z.])", r"\1-"),
        (r"(?<=\d)\{,\}(?=(?:\d{1,2}|\d{4,})(?!\d))", "."),
        (r"\\(?:nicefrac|sfrac|cfrac|dfrac|tfrac)(?![a-z])", r"\\frac"),
        (r"\\[dt]binom(?![a-z])", r"\\binom"),
        (r"\\(?:boldsymbol|bold|pmb|bm)\s*(?=\{)", r"\\mathbf"),
        (r"\\(?:bf|rm|it|sf|tt|bfseries)(?![a-zA-Z])\s*", ""),
        (r"\\varnothing(?![a-z])", r"\\emptyset"),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\\(?:lor|vee)(?![a-z])", r"\\text{ or }"),
        (r"^\\(?:underline|textcolor\s*\{\w+\}|color\s*\{\w+\})\s*\{([^{}]*)\}$", r"\1"),
        (r"^\\color\s*\{\w+\}\s*", ""),
        (r"^\(?([A-Z])[).]$", r"\1"),
        (r"^\\(?:text|mathrm|textbf|mbox)\s*\{\s*([-+]?\d[^{}]*)\}$", r"\1"),
        (r"\\text\s*\{\s*infinity\s*\}", r"\\infty "),
        (
            r"\\(sin|cos|tan|cot|sec|csc)((?:\s*\^\s*(?:\d|\{\d\}))?)\s*(?:\\left)?[({]?\s*([\d.]+)\s*"
            r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\right)?[)}]?",
            r"\\\1\2(\\frac{\3\\pi}{180})",
        ),
        (r"\\lg(?![a-zA-Z])", r"\\log"),
        (r"(?<![\w.^/])(\d+)(?:\s|~|\\[,;: ])+(\d{1,2})\s*/\s*(\d+)(?![\w/.])", r"\1\\frac{\2}{\3}"),
        (  # a multiplication sign ends the argument of a function
            rf"\\({_NAMES})((?:\s*[_^]\s*(?:\w|\{{\w+\}}))*)\s*(\d+(?:\.\d+)?[a-zA-Z]?|[a-zA-Z]|\\(?:pi|theta|alpha|phi))"
            r"\s*(?=\\cdot(?![a-zA-Z])|\\times(?![a-zA-Z])|\*)",
            r"\\\1\2(\3)",
        ),
    )
]
_NUMERAL = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?(?![\w/])")
_ANSWER_IS = re.compile(
    rf"\banswer\s*(?:is|was|:|=)\s*:?\s*\$?({_NUMERAL.pattern})(?!\s*(?:or|and|to)\b)", re.IGNORECASE
)
_GOLD_ANNOUNCED = re.compile(r"(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\s*:?|:|=)\s+(?!not\b)", re.IGNORECASE)
_PHRASE = re.compile(  # at most 12 words, and none of a sentence
    r"(?!.*\b(?:is|are|was|were|we|i|he|she|they|it|there|has|have|had|gets?|find|found|so|therefore|thus|hence|answer|not|never|neither|nor)\b)"
    r"[^\n.;!?]{1,100}(?:\.\d[^\n.;!?]{0,60}){0,4}\.?",
    re.IGNORECASE,
)
_MEASURE = r"\d+(?:\.\d+)?\s*[a-zA-Z]+\.?"
_MEASURES = re.compile(rf"{_MEASURE}(?:\s*,?\s*(?:and\s+)?{_MEASURE}){{1,3}}")
_COMPOUND = re.compile(r"(?:\d+(?:\.\d+)? [a-z]+\.?,? ?){2,}|-?\w+\s*\(\s*mod\s+\w+\s*\)", re.IGNORECASE)
_MONTHS = (
    "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    "|Nov(?:ember)?|Dec(?:ember)?"
)
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?(?![\w]|[./]\d)"
_DATE = re.compile(
    rf"(?:\b[A-Z][a-z]{{2,5}}day,?\s+)?(?:\b({_MONTHS})\.?\s+{_DAY}|(?<![\w.,/$]){_DAY}\s+(?:of\s+)?({_MONTHS})\b\.?)"
    r"(?:,?\s+(\d{4})(?!\d))?"
)
_INTERVAL = re.compile(r"([\[\](])([^\[\](),;]+)[,;]([^\[\](),;]+)([\[\])])")
_BARS = re.compile(r"(?:\\(?:left|right)\s*)?(?:\||\\(?:[lr]?vert|mid)(?![a-zA-Z]))\s*")
_BOUNDED = re.compile(
    r"\|\s*([a-vxyA-Y])\s*([-+]\s*\d{1,9}(?:\.\d{1,9})?)?\s*\|\s*(<|\\(?:leqslant|leq|le|lt)(?![a-zA-Z]))\s*"
    r"((?:[\d./^+{} ]|\\(?:frac|sqrt|pi)(?![a-zA-Z])|[a-zA-Z](?![a-zA-Z])){1,100})"
)
_DELIMITED = [(r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("**", "**")]
_POWER = r"(\^\s*\{?-?\d\}?)?"
_ENDING = re.compile(r"(?:\\[,;:! ]|\\q?quad|(?<!\.)\.(?!\.)|[,;:]|\s|(?<!\\)~)+$")
_TEXT = r"\\(?:text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|it|sf)|mbox|hbox|operatorname)\s*\{"
_UNIT_FRACTION = re.compile(
    rf"\\frac\s*\{{\s*([-+]?[\d.]*)\s*{_TEXT}([^{{}}\d]*)\}}\s*{_POWER}\s*\}}\s*"
    rf"\{{\s*{_TEXT}([^{{}}\d]*)\}}\s*{_POWER}\s*\}}\s*$"
)
_ONLY_TEXT = re.compile(rf"{_TEXT}((?=.*(?:[$\\{{^*]|sqrt|\bpi\b)).*)\}}", re.DOTALL)
_CURRENCY = re.compile(
    r"(?:\b(?:US|AU|CA))?(?:\\?\$|\\euro\b|\\pounds\b|[€£¥₹])\s*(?=[-+]?[\d.])"
    r"|^(?:\\text\s*\{)?\s*(?:USD|EUR|GBP|INR|JPY|Rs\.?)\s*\}?\s*(?=[-+]?[\d.])"
    r"|(?<=\d)(?:\s|~|\\[,;:! ])*(?:\\?\$|[€£¥₹])$"
)
_CURRENCIES = {"USD": "dollar", "EUR": "euro", "GBP": "pound", "INR": "rupee", "JPY": "yen", "Rs": "rupee"}
_CURRENCIES |= {"$": "dollar", "€": "euro", "euro": "euro", "£": "pound", "pounds": "pound", "¥": "yen", "₹": "rupee"}
_DEGREE = r"\^\s*\{?\s*\\circ\s*\}?"
_SPACED = re.compile(r"(?<![\d.,\\])\d{1,3}(?:(?:\\[,;:! ]|\{,\}|,\s*\\!|\{\\,\}|~| )\s*\d{3})+(?!\d)")
_DECIMAL = re.compile(r"([-+]?)\s*(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_ADJACENT = re.compile(r"(?<![_^\d])\d+(?:\s|~|\\[,;: ]|\\q?quad(?![a-z]))+\d+(?!\s*/|[\d.])")  # no mixed number
_EXPONENT = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,4})(?!\w)")
_SIGN_ROOT = re.compile(r" +(\d+)")  # what a person reads below the root in √23
_REPEATING = re.compile(r"(\d{1,20})?\.(\d{0,20})\\(?:overline|bar|dot)\s*\{(\d{1,20})\}")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}\s*(\\?%)?")
_FRACTION = re.compile(r"([-+]?)\s*(\d{1,20})?\s*\\frac\{(\d{1,20})\}\{(\d{1,20})\}")
_EXACT = re.compile(r"\\(?:frac|sqrt|pi|ln|log|sin|cos|tan|cdot|times)(?![a-z])|[/^]")
_ABOUT = re.compile(r"\s*[-+]?[\d.,]+%?")
_ENVIRONMENTS = re.compile(
    r"\\begin\{(aligned|align\*?|gathered|split|cases|array|equation\*?)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL
)
_NO_NUMBER = re.compile(r"\d\s*['’]|(?<![\w^{])\d+_|\\?%\s*\\?%|\\[hv]?phantom(?![a-z])")
_LEADING = re.compile(r"(?:[a-zA-Z]\s*)?(?:\\approx|\\sim)(?![a-zA-Z])\s*|[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_TEXT_AT_END = re.compile(
    rf"((?:\s|~|\\[,;:! ]|\\q?quad|[-/]|\\cdot)*){_TEXT}([^{{}}]*)\}}\s*(\^\s*(?:-?\d|\{{-?\d\}}))?$"
)
_WORDS_AT_END = re.compile(r"(?<=[\d})%])(\s*)([A-Za-z][A-Za-z .'/-]*?)\s*(\^\s*(?:-?\d|\{-?\d\}))?$")
_DEGREES = re.compile(r"(\\circ\s*\}?)\s*([CF])$")
_NAMED_BASES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASES = {name: number for number, name in enumerate(_NAMED_BASES.split())}
_BASE = re.compile(
    rf"([-+]?)\s*\(?\s*([0-9A-Za-z]+)(?:\.([0-9A-Za-z]+))?\s*\)?\s*"
    rf"(?:_\s*\{{?\s*(?:{_TEXT})?\s*\(?(?:base[\s~-]*\}}?\s*)?(\w+?)\)?\s*\}}{{0,2}}"
    rf"|(?:{_TEXT})?\s*\(?\s*(?:in\s+)?base[\s~-]*\}}?\s*(\w+)\)?\s*\}}?)"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z .'’-]*")
_OPTION = re.compile(  # (B) 10, B. 10, B) 10; not (A)+1 or (A) (B)
    r"(?:(?i:option|choice)\s)?\s*\(?\s*([A-J])\s*[).:](?:\\[,;:! ]|\\q?quad(?![a-z])|~|\s)+(?![\^_*/=+])(\S.*)",
    re.DOTALL,
)
_LETTER = re.compile(r"(?i:option|choice)\s*\(?([A-J])[).]?")
_OTHER_OPTION = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")


def read(latex: str, *, gold: bool = False) -> Reading | None:
    """The reading of an answer in LaTeX, or of what stands behind the letter of a choice; see `_read`."""
    plain = re.sub(rf"{_TEXT}([^{{}}]*)\}}", r"\1", unwrapped(_ascii(latex)))
    if letter := _LETTER.fullmatch(plain):
        return Reading(letter[1], letter[1], option=letter[1])
    choice = _OPTION.fullmatch(plain)
    if choice is None or _OTHER_OPTION.search(choice[2]):
        return _read(latex, gold=gold)
    return (_read(choice[2], gold=gold) or Reading("", ""))._replace(option=choice[1])


def _read(latex: str, *, gold: bool) -> Reading | None:
    """The reading of an answer in LaTeX; None where it is empty, or text changes it in a way that is not known.

    A number beside words that may change it, for all that is known, is text. Of a gold answer, which is not written to
    please, words are taken for its unit unless they are known to change it.
    """
    answer = _rewritten(latex)
    text = _text(answer)
    plain = re.sub(rf"{_TEXT}([^{{}}]*)\}}", r" \1 ", answer)
    if measures := _measures(plain):
        return Reading(answer, measures, words=True)
    if date := _DATE.fullmatch(" ".join(plain.split())):
        return Reading(answer, _date(date), words=True)
    if based := _based(answer):
        return based
    answer = re.sub(rf"{_TEXT}\s*([\d.,]+)\s*\}}", r"\1", answer)  # text that is a number: a person reads the digits
    answer = _DEGREES.sub(r"\1\\text{\2}", answer)
    answer = _with_braces(re.sub(r"\\[dtc]frac", r"\\frac", answer.replace(r"\displaystyle", "")))
    words = re.sub(rf"{_TEXT}|[{{}}()]", "", answer).strip().rstrip(".,;")
    if _WORD.fullmatch(words) and (len(words) > 3 or (answer != words and len(words) > 1)):
        return Reading(answer, " ".join(words.casefold().split()), words=True)
    if leading := _LEADING.match(answer):
        answer = answer[leading.end() :]
    for sign, dots in ((r"\approx", ""), ("=", r"\cdots")):  # 1/3 = 0.333...
        exact, _, about = answer.rpartition(sign)
        if (
            about.rstrip().endswith(dots)
            and _ABOUT.fullmatch(about.rstrip().removesuffix(dots))
            and _EXACT.search(exact)
        ):
            answer = exact.rstrip()
    answer = re.sub(r"\\approx(?![a-z])", "=", answer)
    if _NO_NUMBER.search(answer):
        return Reading(answer, text.casefold(), words=True)
    currency = _CURRENCY.search(answer)
    answer = _CURRENCY.sub("", answer)
    answer = _SPACED.sub(lambda match: re.sub(r"\D", "", match.group()), answer)
    if len(answer) > _LONG:
        return Reading(answer, text)
    separated = _without_words(answer, strict=not gold)
    if separated is None:
        return (
            None
            if changes_meaning(re.sub(r"[^A-Za-z' ]", " ", words))
            else Reading(answer, text.casefold(), words=True)
        )
    answer, unit = separated
    if currency and not unit:
        unit = next(name for sign, name in _CURRENCIES.items() if sign in currency.group())
    elif not unit and re.fullmatch(rf"[-+\d.,\s]*{_DEGREE}", answer):
        unit = "degree"
    answer = _EXPONENT.sub(r"\1 \\times 10^{\2}", unwrapped(answer))
    answer = _REPEATING.sub(_repeating, answer)
    if mixed := _MIXED.fullmatch(answer):
        sign, whole, above, below, percent = mixed.groups()
        answer = rf"{sign}({whole}+\frac{{{above}}}{{{below}}})"
        if percent:  # of which the parser does not take what stands in parentheses
            answer = rf"{sign}\frac{{{int(whole) * int(below) + int(above)}}}{{{below}}}\%"
    elif _ADJACENT.search(answer):  # which the parser adds
        return Reading(answer, text.casefold(), words=True)
    return Reading(answer, text, unit) if answer else None


def _rewritten(latex: str) -> str:
    """LaTeX in which other ways to write the same are one."""
    scripts = _SCRIPT.sub(
        lambda m: f"^{{{m[1].translate(_PLAIN)}}}" if m[1] else f"_{{{m[2].translate(_PLAIN)}}}", latex
    )
    answer = unwrapped(_ascii(scripts))
    text = _ONLY_TEXT.fullmatch(answer)
    if text and min(itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text[1]), default=0) >= 0:
        answer = unwrapped(text[1])  # mathematics in it
    if environment := _ENVIRONMENTS.fullmatch(answer):
        answer = _rows(environment[2]) or answer
    for pattern, form in _WRITTEN:
        answer = pattern.sub(form, answer)
    return _within(_turned(_UNIT_FRACTION.sub(_unit_line, answer)))


def _ascii(latex: str) -> str:
    """The same with the digits of other scripts, the signs of full width and the mathematical symbols as LaTeX."""
    return re.sub(r"(?![0-9])\d", lambda digit: str(int(digit[0])), latex.translate(_CHARACTERS))


def _unit_line(fraction: re.Match[str]) -> str:
    r"""A fraction of units in a line: `\frac{\text{m}}{\text{s}^2}` as `\text{ m/s^2}`."""
    number, *units = (re.sub(r"[{}\s]", "", group or "") for group in fraction.groups())
    before = fraction.string[: fraction.start()].rstrip()
    if not (before or number) or (number and before[-1:].isalnum()):
        return fraction.group()
    return rf"{number}\text{{ {units[0]}{units[1]}/{units[2]}{units[3]}}}"


def _turned(answer: str) -> str:
    """Open ends of intervals as parentheses: `]1,2[` is `(1,2)` (ISO 80000-2 has both)."""
    plain = re.sub(r"\\(?:left|right)\s*(?=[\[\]()])", "", answer)

    def interval(found: re.Match[str]) -> str:
        start, end = "(" if found[1] == "]" else found[1], ")" if found[4] == "[" else found[4]
        return f"{start}{found[2]},{found[3]}{end}"

    turned = _INTERVAL.sub(interval, plain)
    return answer if turned == plain else turned


def _within(answer: str) -> str:
    """`|x| < 5` as `-5 < x < 5`, and `|x - 1| < 5` as `-4 < x < 6`; letters of complex numbers stay."""
    bounded = _BOUNDED.fullmatch(_BARS.sub("|", answer))
    if bounded is None:
        return answer
    letter, shift, relation, bound = bounded[1], bounded[2] or "", bounded[3], bounded[4].strip()
    if not shift:
        bound = f"({bound})" if "+" in bound else bound
        return f"-{bound} {relation} {letter} {relation} {bound}"
    try:
        middle, reach = -Fraction(shift.replace(" ", "")), Fraction(bound)
    except (ValueError, ZeroDivisionError):
        return answer
    return f"{_fraction(middle - reach)} {relation} {letter} {relation} {_fraction(middle + reach)}"


def _fraction(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    below = value.denominator
    return f"{value}" if below == 1 else rf"{sign}\frac{{{abs(value.numerator)}}}{{{below}}}"


def _rows(inside: str) -> str:
    """What the rows of an environment say, joined by commas; empty where they are no list of equations or numbers."""
    rows = [row.strip(" ,;\n\t") for row in re.split(r"\\\\(?:\[[^\]]*\])?", inside)]
    rows = [re.sub(r"\s*&\s*(?=[=<>\\])|(?<==)\s*&\s*", " ", row) for row in rows if row]
    plain = all("&" not in row and r"\begin" not in row and row.count("=") <= 1 for row in rows)
    return ", ".join(rows) if plain and (len(rows) == 1 or all("=" in row for row in rows)) else ""


def _text(answer: str) -> str:
    """An answer without markup and spacing."""
    text = re.sub(rf"{_TEXT}([^{{}}]*)\}}", r"\1", answer)
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"(?:\\[,;:!]|\\q?quad|~|\s)+", " ", text)
    text = re.sub(r"\\pmod\s*(?:\{(\w+)\}|(\w))|\(\s*mod\s+(\w+)\s*\)", r"(mod\1\2\3)", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".,;")


def _whole(latex: str) -> str:
    return _text(_rewritten(latex))


def _measures(text: str) -> str:
    """Several numbers with known units, as in `1 hour 30 minutes`, by the units' names; empty for anything else."""
    if len(text) > REACH or not _MEASURES.fullmatch(text.strip()):
        return ""
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", text)
    units = [canonical_unit(word) for _, word in found]
    return " ".join(f"{number} {unit}" for (number, _), unit in zip(found, units, strict=True)) if all(units) else ""


def _date(found: re.Match[str]) -> str:
    """A day by the same text however it is written: `4 July 1776` and `July 4th, 1776`."""
    month, day, other_day, other_month, year = found.groups()
    return f"{(month or other_month)[:3].casefold()} {int(day or other_day)} {year or ''}".strip()


def unwrapped(answer: str) -> str:
    """The answer without delimiters around it and without punctuation and space at its ends."""
    before = None
    while answer != before:
        before, answer = answer, answer.lstrip()
        if ending := _ENDING.search(answer[-12:]):
            answer = answer[: len(answer) - len(ending.group())]
        for opening, closing in _DELIMITED:
            inner = answer[len(opening) : -len(closing)]
            if answer.startswith(opening) and answer.endswith(closing) and inner and opening not in inner:
                answer = inner
                break
    return answer


def _with_braces(latex: str) -> str:
    r"""Braces around the arguments of fractions and roots, as TeX reads them: `\frac12` is `\frac{1}{2}`."""
    pieces: list[str] = []
    wanted, outer = 0, list[int]()  # arguments that are still to come: here, and around the open groups
    i = 0
    while i < len(latex):
        match = _TOKEN.match(latex, i)
        token = match.group() if match else latex[i]
        i += len(token)
        if token == "{":
            outer.append(max(wanted - 1, 0))
            wanted = 0
        elif token == "}":
            wanted = outer.pop() if outer else 0
        elif wanted and token.isspace():
            continue
        elif wanted and token == "[" and pieces[-1] == r"\sqrt" and (end := latex.find("]", i)) >= 0:
            token, i = latex[i - 1 : end + 1], end + 1
        elif token in (r"\frac", r"\binom", r"\sqrt"):
            if token == r"\sqrt" and (digits := _SIGN_ROOT.match(latex, i)):  # from √23
                token, i = rf"\sqrt{{{digits[1]}}}", digits.end()
                wanted = max(wanted - 1, 0)
            else:
                wanted = 1 if token == r"\sqrt" else 2
        elif wanted:
            token, wanted = f"{{{token}}}", wanted - 1
        pieces.append(token)
    return "".join(pieces)


def _repeating(decimal: re.Match[str]) -> str:
    """The fraction that a repeating decimal is."""
    whole, fixed, period = decimal[1] or "0", decimal[2], decimal[3]
    value = Fraction(int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _without_words(answer: str, *, strict: bool) -> tuple[str, str] | None:
    """The answer without the unit at its end, a scale word multiplied out, and the unit's name; None if unreadable."""
    unit, scale = "", 1
    for _ in range(4):
        match = _TEXT_AT_END.search(answer)
        bare = None if match else _WORDS_AT_END.search(answer)
        if match and match.start():
            words, power, cut = match[2].strip(), match[3] or "", match.start()
        elif bare and not re.search(r"\\[a-zA-Z]*$", answer[: bare.start()]) and _are_units(answer, bare):
            words, power, cut = bare[2].strip(), bare[3] or "", bare.start()
        else:
            break
        if words.casefold() in ("percent", "percentage", "pct", r"\%", "%"):
            answer = answer[:cut] + r"\%"
            break
        while (first := words.casefold().partition(" ")[0]) in SCALES:
            scale, words = scale * SCALES[first], words[len(first) :].strip()
        single = bool(re.search(r"(?<![\d.])1$", answer[:cut]))
        name = unit_of(re.sub(r"\W+$", "", words) + power.replace(" ", ""), strict=strict, single=single)
        if name is None:
            return None
        unit = f"{name} {unit}".strip()
        answer = answer[:cut].rstrip()
    if scale > 1:
        number = _DECIMAL.fullmatch(answer.strip())
        fraction = _FRACTION.fullmatch(answer.strip())
        if fraction and int(fraction[4]):
            value = (int(fraction[2] or 0) + Fraction(int(fraction[3]), int(fraction[4]))) * scale
            number = fraction
        elif number and (number[2] or number[3]):
            value = Fraction((number[2] or "0").replace(",", "") + (number[3] or "")) * scale
        else:
            return None
        digits = (
            str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        )
        answer = ("-" if number[1] == "-" else "") + digits
    return answer, unit


def _are_units(answer: str, bare: re.Match[str]) -> bool:
    """Whether bare letters after a number are words, rather than variables: apples, cm and, after a space, m."""
    words, spaced = bare[2].replace("/", " ").split(), bool(bare[1])
    if all(map(is_unit, words)):
        return True
    if bare[2] in tuple("mgshlL"):
        return spaced and bool(re.fullmatch(r"[-+]?[\d.,]+", answer[: bare.start()]))
    long = any(len(word) > 3 for word in words)
    return (
        spaced
        and long
        and all(len(word) > 2 or is_unit(word) or word in ("of", "a", "an", "sq", "cu") for word in words)
    )


def _based(answer: str) -> Reading | None:
    """A number in another base, such as `2516_8`; its digits have to be of that base."""
    match = _BASE.fullmatch(answer)
    if not match:
        return None
    named = (match[4] or match[5]).casefold()
    base = int(named) if named.isdecimal() and len(named) < 3 else _BASES.get(named, 0)
    whole, part = match[2].lstrip("0").upper() or "0", match[3].rstrip("0").upper() if match[3] else ""
    try:
        value = Fraction(int(whole + part, base), base ** len(part)) if 2 <= base <= 36 else None
    except ValueError:
        value = None
    number = any(map(str.isdigit, whole)) or (base > 10 and len(whole) > 1 and match[2].isupper())  # else a variable
    if value is None or not number:
        return None
    sign, digits = match[1].strip("+"), whole + (f".{part}" if part else "")
    latex = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return Reading(f"{sign}{latex}", f"{sign}{digits}_{base}", base=base)
