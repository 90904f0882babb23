r"""Whether what stands beside an answer leaves it the answer: `\boxed{5}^2`, "half of $5$" and "$5$ is wrong" do not.

Only a short piece of text on either side is looked at, so that the time taken does not grow with it.
"""

import re

REACH = 80  # characters on either side that are looked at

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf)?|math(?:rm|bf|it|sf)|mbox|hbox|operatorname)\s*\{([^{}]*)\}")
_SHORT_UNIT = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*[a-zA-Z]{1,3}(?:\s*/\s*[a-zA-Z]{1,3})?\.?\s*\}"
)  # m/s, and no variable
_SPACE = r"(?:[ \t~]|\\[,;:! ]|\\q?quad(?![a-z]))*"
_DELIMITER = r"(?:\$\$?|\\[()\[\]])"
# Commands that may touch an answer: relations, arrows, layout. Any other one operates on it.
_BESIDE = (
    r"\\(?:approx|sim|simeq|equiv|cong|leq?|geq?|lt|gt|leqslant|geqslant|in|implies|iff|to|[Rr]ightarrow|[Ll]eftrightarrow"
    r"|[Ll]ongrightarrow|therefore|because|colon|displaystyle|textstyle|begin|end|tag|label|hline|newline|par|checkmark"
    r"|blacksquare|square|Box|boxed|fbox|text\w*|mathrm|mathbf|mbox|large|Large|LARGE|huge|Huge|bf|it|rm|left|right|color"
    r"|quad|qquad|pmod|bmod|mod|pounds|euro|degree|dots|ldots|qed|smallskip|medskip|bigskip|item|noindent)(?![a-zA-Z])"
)
_WHOLE = re.compile(
    r"(?:\\(?:text\w*|math\w+|mbox|hbox|underline|color|textcolor|begin|ensuremath|Large|large)(?:\{\w+\})?|^|[\s$=(:&])\Z"
)

_NUMBERS = r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|hundred|thousand|million)"
_ORDINAL = r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|million|billion)ths?"
_WORDS_BEFORE = re.compile(
    r"\b(?:minus|negative|plus|half|twice|thrice|double|triple|(?:times|over|divided by|multiplied by)"
    r"|(?:root|square|cube|half|third|quarter|thirds|quarters|percent|inverse|reciprocal|opposite|negative|logarithm"
    r"|factorial|multiple|power|double|triple|twice)\s+of)(?:\s+(?:the|of|a))*\s*$",
    re.IGNORECASE,
)
_WORDS_AFTER = re.compile(
    r"(?:squared|cubed|factorial|doubled|tripled|halved|negated|plus|minus|divided|multiplied"
    rf"|(?:times|over|choose|to|through)\s+(?:{_NUMBERS}\b|[\d$\\])|(?:to the power|raised)\b"
    r"|(?:or|and)\s+(?:more|less|fewer|greater|higher|lower|above|below|over|under|a half)|at (?:least|most)"
    r"|(?:mod|modulo|tens|hundreds|thousands|millions|billions|dozens|gross|quadrillions?|quintillions?)\b"
    rf"|(?:half|halves|thirds?|quarters?|{_ORDINAL})\b(?!\s+(?:of\s+)?(?:the|a)\b))(?![a-z])",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:,?\s*(?:which|but (?:that|this|it))\s+)?(?:is|was|are|were|be|can|could|would(?:\s+be)?|seems?|looks?"
    r"|does|did|must)\s*(?:(?:clearly|obviously|also|certainly|definitely|simply|just|still|probably)\s+)?"
    r"(?:(?:not|n['’]t|never|cannot)(?:\s+be)?(?:\s+(?:the|an?|my|our|right|correct|true|possible|valid|it|what|allowed)\b"
    r"|\s*(?:[.,;:!?)]|$))"
    r"|(?:wrong|incorrect|false|invalid|impossible|too\s+(?:small|large|big|high|low|little|few|many|much|long|short))\b)",
    re.IGNORECASE,
)


def stands_alone(before: str, after: str) -> bool:
    """Whether an answer is all of what is written, and is not denied, given the text on both sides of it.

    No answer is what arithmetic goes on from (`^ ! _ / * + -`, a command that operates, a letter or digit beside it,
    the braces of a command), what a word beside it changes ("minus", "half of", "squared", "or more"), and what the
    text calls wrong. Relations, units, layout and other prose leave it as it is.
    """
    before, after = _TEXT.sub(r" \1 ", before[-REACH:]), _TEXT.sub(r" \1 ", _SHORT_UNIT.sub(" unit ", after[:REACH]))
    return not (_enclosed(before) or _operates_before(before) or _operates_after(after) or _denied(after))


def _enclosed(before: str) -> bool:
    r"""Whether the braces of a command are open: `\sqrt{`, `\frac{1}{`, `2^{`."""
    start = max(before.rfind("$"), before.rfind(r"\("), before.rfind(r"\["), before.rfind("\n"))
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", before[start + 1 :], re.DOTALL):
        if match.group() == "{":
            opened.append(start + 1 + match.start())
        elif match.group() == "}" and opened:
            opened.pop()
    return any(not _WHOLE.search(before[:at]) for at in opened)


def _operates_before(before: str) -> bool:
    if re.search(rf"\S{_DELIMITER}\s+\Z", before):
        return False  # where $y=2$ \boxed{5}
    math = re.sub(rf"{_SPACE}{_DELIMITER}?{_SPACE}\Z", "", before)
    if re.search(r"(?:\A|\n|[a-zA-Z:.,]\s)\s*[_*]{1,3}\$*\Z", before):
        return False  # emphasis
    if re.search(r"(?:[\w)}\]]\s*\*|[+/^_×·⋅÷±∓√]|\\\{|(?:[\w}]|[-+*/^])\s*\(|[\d)\]]\s*[-−]|\d)\Z", math):
        return True
    if re.search(r"(?<![a-zA-Z\\'’])(?![aAI]\b)[a-zA-Z]\s*[-−]?\Z", math) or re.search(r"(?<!\\)[)\]]\Z", before):
        return True
    if (command := re.search(r"\\[a-zA-Z]+\Z", math)) and not re.fullmatch(_BESIDE, command.group()):
        return True
    if before.endswith("}") and not re.search(r"\\(?:begin|end|color|textcolor|tag|label)\s*\{[^{}]*\}\Z", before):
        return True
    return bool(_WORDS_BEFORE.search(math))


def _operates_after(after: str) -> bool:
    inside = re.sub(rf"^{_SPACE}", "", after)
    closed = re.match(rf"\s*{_DELIMITER}[ \t*]*{_DELIMITER}?{_SPACE}", inside)
    rest = inside[closed.end() :] if closed else re.sub(r"^[)|\]]+(?=\s*[\^_!/*])", "", inside)
    if re.match(r"\^\s*\{?\s*\\(?:circ|degree)(?![a-z])", rest):
        return False
    if re.match(r"\s*(?:\^|_(?![_\s]|\Z)|[+×·⋅÷±∓](?!\s*\n)|/(?!\s*[a-zA-Z]{2}))", rest) and not re.match(
        r"\n\s*\+\s", rest
    ):
        return True
    if re.match(r"\s*\\[a-zA-Z]", rest) and not re.match(rf"\s*{_BESIDE}", rest):
        return not closed or re.match(r"\s*\\(?:times|cdot|div|pm|mp|sqrt|pi)(?![a-z])", rest) is not None
    if re.match(r"\*(?!\**(?:\W|$))" if inside == after or closed else r"\*", rest):
        return True
    if re.match(r"[-−]\s*[\d\\($]|[-−][a-zA-Z](?![a-zA-Z])", rest):
        return True
    if not closed:
        if inside.startswith("!") and not re.match(r"!+(?:\*|\"|\s+[A-Z]|\s*$)", inside):
            return True
        if re.match(r"[\d(\[]|\\left", after) or re.match(r"\d|(?![aAI]\b)[a-zA-Z](?![a-zA-Z])", inside):
            return not re.match(r"\s+[mgshlLcCF](?![a-zA-Z])", after)
        if re.match(r"[a-zA-Z]", after):
            return not re.match(r"(?:is|cm|mm|km|kg|mg|ml|cents|dollars|degrees|mph)\b", after)
    return bool(_WORDS_AFTER.match(rest.lstrip(" ~*")))


def _denied(after: str) -> bool:
    return bool(_DENIED.match(re.sub(rf"^[\s*]*{_DELIMITER}?[\s*]*", "", after)))
