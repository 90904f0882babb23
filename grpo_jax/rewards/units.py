"""Words beside a number: units, which do not change it, scale words, which do, and words that make another answer."""

import re

SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}

_KNOWN = """
millimeter mm millimetre; centimeter cm centimetre; decimeter dm decimetre; meter m metre; kilometer km kilometre
inch in inches; foot ft feet; yard yd; mile mi; milligram mg; gram g gm; kilogram kg; pound lb lbs; ounce oz
ton t tonne; milliliter ml millilitre; liter l litre; gallon gal; quart qt; pint pt; second s sec; minute min; hour h hr
day d; week wk; month mo; year yr; cent; dollar; euro; degree deg; radian rad; watt w; kilowatt kw; joule j
newton n; volt v; ampere a; ohm; hertz hz; celsius c; fahrenheit f
"""
_NAMES = {alias: names[0] for entry in re.split(r"[;\n]", _KNOWN) if (names := entry.split()) for alias in names}
_NAMES |= {"mph": "mile hour", "kmh": "kilometer hour", "kph": "kilometer hour"}
_CARDINALS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety dozen score gross hundred thousand million billion
trillion quadrillion quintillion sextillion googol lakh crore myriad pair couple mil mn bn
"""
_OPERATIONS = """
mod modulo rem remainder div divided multiplied times plus minus over by of per squared square cubed cube power root
sqrt log ln exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh gcd lcm max min choose half halves third
quarter fourth twice thrice double triple doubled tripled halved factorial negated negative inverse reciprocal increased
decreased raised xor nand nor shl shr percent percentage permille mille pct base infinity alpha beta gamma delta
epsilon theta lambda sigma tau phi chi psi omega
"""
_CHANGING_WORDS = frozenset(_CARDINALS.split()) | frozenset(_OPERATIONS.split())
_ORDINAL = re.compile(
    r"(?:fif|twelf|eigh|nin|.*teen|.*tie|four|six|seven|ten|eleven|.*hundred|.*thousand|.*illion)ths?"
)
_COUNTED = {
    "men",
    "boy",
    "kid",
    "way",
    "box",
    "bag",
    "cup",
    "can",
    "pie",
    "egg",
    "car",
    "bus",
    "dog",
    "cat",
    "pen",
    "pts",
}
_IGNORED = {"square", "sq", "cubic", "cu", "of", "a", "an", "the", "per"}
_CHANGING = re.compile(
    r"\b(?:or|and|not|no|none|but|more|less|fewer|least|most|above|below|over|under|than|plus|minus|times|divided|either"
    r"|unless|except|if|when|half|halves|third|thirds|quarters?|squared|cubed|factorial|mod|modulo|remainder|base|wrong"
    r"|incorrect|false|undefined|k|mil|mn|bn|lakh|crore|percent|hundreds?|thousands?|millions?|billions?|trillions?"
    r"|dozens?|sin|cos|tan|log|ln|exp|sqrt|max|r)\b|\d|n't|[?=<>+*^\\]",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"(?<=[A-Za-z])[23]\b")  # cm2


def is_unit(word: str) -> bool:
    """Whether a word is a known unit of two letters or more: one letter alone may be a variable."""
    return len(word) > 1 and (_name(word) != "" or word.casefold().removesuffix("s") in _COUNTED)


def significant(words: str) -> list[str]:
    """The words of a unit, without those that every unit can have: `miles per hour` is miles and hour."""
    parts = _EXPONENT.sub("", words).replace("/", " ").split()
    return [part for part in parts if part.casefold() not in _IGNORED]


def canonical_unit(words: str) -> str:
    """The name of the known units in a text: `cm` and `centimeters` are `centimeter`; empty if it has none."""
    return " ".join(filter(None, map(_name, significant(words))))


def changes_meaning(words: str) -> bool:
    """Whether a text beside a number makes it another answer: `or more`, `million`, digits."""
    return bool(_CHANGING.search(_EXPONENT.sub("", words)))


def is_number_word(word: str) -> bool:
    """Whether a word is a number, a part of one or an operation: `hundreds`, `tenths`, `factorial`."""
    word = word.casefold()
    return bool({word, word.removesuffix("s"), word.removesuffix("es")} & _CHANGING_WORDS or _ORDINAL.fullmatch(word))


def _name(word: str) -> str:
    word = word.strip(".,()").casefold()
    singular = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((_NAMES[form] for form in singular if form in _NAMES), "")
