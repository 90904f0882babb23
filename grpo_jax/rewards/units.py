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
nanometer nm nanometre; micrometer um µm μm micrometre; millisecond ms; microsecond µs us; nanosecond ns
kilohertz khz; megahertz mhz; gigahertz ghz; megawatt mw; kilojoule kj; kilovolt kv; kelvin; calorie cal; pascal pa
acre; hectare ha; decade; century centuries; byte; kilobyte kb; megabyte mb; gigabyte gb; bit; mole mol; knot
dollar usd; euro eur; pound gbp; yen jpy; rupee inr; peso; yuan cny; penny pence pennies; am a.m; pm p.m
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
_NOUNS = (
    "men boy kid way box bag cup can pie egg car bus dog cat pen pts people children women mice teeth fish sheep units"
)
_NO_NOUNS = (
    "this does less plus minus equals exceeds perhaps always basis means sometimes thus cubes squares divides yes"
)
_COUNTED, _UNCOUNTED = set(_NOUNS.split()), set(_NO_NOUNS.split())
_IGNORED = {"of", "a", "an", "the", "per", "approximately", "approx", "about", "each", "remaining", "left", "total"}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3", "squared": "^2", "cubed": "^3"}
_CHANGING = re.compile(
    r"\b(?:or|and|not|no|none|but|more|less|fewer|least|most|above|below|over|under|than|plus|minus|times|divided|either"
    r"|unless|except|if|when|half|halves|third|thirds|quarters?|factorial|mod|modulo|remainder|base|wrong"
    r"|incorrect|false|undefined|k|mil|mn|bn|lakh|crore|percent|hundreds?|thousands?|millions?|billions?|trillions?"
    r"|dozens?|sin|cos|tan|log|ln|exp|sqrt|max|r)\b|\d|n't|[?=<>+*^\\]",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"(?<=[A-Za-zµμ])\^?\{?([-−]?[23])\}?$")  # cm2, cm^2


def is_unit(word: str) -> bool:
    """Whether a word is a known unit of two letters or more: one letter alone may be a variable."""
    return len(word) > 1 and (_name(word) != "" or word.casefold().removesuffix("s") in _COUNTED)


def canonical_unit(words: str) -> str:
    """The name of the known units in a text: `cm` and `centimeters` are `centimeter`; empty if it has none."""
    return " ".join(filter(None, map(_name, words.replace("/", " ").split())))


def unit_of(words: str, *, strict: bool = True, single: bool = False) -> str | None:
    """The unit that a text beside a number is, with its powers: `square meters` and `m^2` are `meter^2`.

    It is empty for words that say nothing ("approximately"), and one noun that is not known stands for itself, without
    the plural's s. None where the text may make another number of it: more than one word that is
    not known, and what is no noun, as far as letters tell: nouns that are counted end with s, unless the number is 1.

    Args:
      words: the text.
      strict: False to take any words but those that are known to change a number.
      single: whether the number is 1.
    """
    if not strict and changes_meaning(words):
        return None
    names: list[str] = []
    power, unknown = "", 0
    for part in words.replace("/", " ").casefold().split():
        word = part.strip(",.()")
        exponent = _EXPONENT.search(word)
        word = _EXPONENT.sub("", word)
        if word in _POWERS:
            if word.endswith("ed") and names:
                names[-1] += _POWERS[word]
            else:
                power = _POWERS[word]
            continue
        if word in _IGNORED or not word:
            continue
        name = _name(word)
        unknown += not name
        if not name and strict and (unknown > 1 or not _is_noun(word, single=single)):
            return None
        names.append((name or word.removesuffix("s")) + (f"^{exponent[1]}" if exponent else power))
        power = ""
    if names[-1:] in (["celsius"], ["fahrenheit"]):
        names = names[-1:]
    return None if power else " ".join(names)


def same_unit(unit: str, other: str) -> bool:
    """Whether two units are one: equal, or nouns that are not known and end with the same word."""
    last, other_last = unit.rpartition(" ")[2], other.rpartition(" ")[2]
    return unit == other or (last == other_last and not _name(last.partition("^")[0]))


def changes_meaning(words: str) -> bool:
    """Whether a text beside a number is known to make it another answer: `or more`, `million`, `tenths`, digits."""
    parts = [_EXPONENT.sub("", part) for part in words.split()]
    named = any(
        is_number_word(part) and part.casefold() not in _POWERS and part.casefold() not in _IGNORED for part in parts
    )
    return named or bool(_CHANGING.search(" ".join(parts)))


def _is_noun(word: str, *, single: bool) -> bool:
    if not word.isalpha() or is_number_word(word):
        return False
    return word.removesuffix("s") in _COUNTED or (
        len(word) > 3 and word not in _UNCOUNTED and (single or word.endswith("s"))
    )


def is_number_word(word: str) -> bool:
    """Whether a word is a number, a part of one or an operation: `hundreds`, `tenths`, `factorial`."""
    word = word.casefold()
    return bool({word, word.removesuffix("s")} & _CHANGING_WORDS or _ORDINAL.fullmatch(word))


def _name(word: str) -> str:
    word = word.strip(".,()").casefold()
    singular = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((_NAMES[form] for form in singular if form in _NAMES), "")
