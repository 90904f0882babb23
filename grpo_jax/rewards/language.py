"""A reward for one language throughout."""

import collections
import sys
import unicodedata
from collections.abc import Sequence

from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.completions import per_text
from grpo_jax.rewards.formats import TAGS, marks_of


def language_consistency(*, script: str | Sequence[str] = "Latin", tags: Sequence[str] = TAGS) -> RewardFunction:
    """The share of the completion's letters that are of the target script; 0.0 where it has no letter.

    A letter is what Unicode calls one (`str.isalpha`: digits, punctuation and marks are
    none), and its script is the word for it in its Unicode name: `LATIN SMALL LETTER A`,
    `CJK UNIFIED IDEOGRAPH-4E2D`. The marks of the tags are not counted. DeepSeek-R1
    (arXiv:2501.12948, section 2.3.2) counts words of the target language in the chain of
    thought; scripts need no word list, but cannot tell English from French.

    Args:
      script: a word of Unicode names, in any case, such as "Latin", "Cyrillic", "Greek",
        "Arabic", "Hangul"; several for Japanese: `("CJK", "Hiragana", "Katakana")`.
      tags: names of the tags that are left out.

    Raises:
      ValueError: for a script that no letter's name has.
    """
    scripts = frozenset(name.upper() for name in ([script] if isinstance(script, str) else script))
    for name in scripts or [""]:
        if not any(name in _name_words(chr(code)) for code in range(sys.maxunicode + 1)):
            raise ValueError(f"no letter has the script {name!r} in its Unicode name; try 'Latin', 'Cyrillic' or 'CJK'")
    marks = [mark for pair in marks_of(tags) for mark in pair]

    def score(text: str) -> float:
        for mark in marks:
            text = text.replace(mark, "")
        letters = {letter: n for letter, n in collections.Counter(text).items() if letter.isalpha()}
        wanted = sum(n for letter, n in letters.items() if not scripts.isdisjoint(_name_words(letter)))
        return wanted / sum(letters.values()) if letters else 0.0

    return per_text("language_consistency", score)


def _name_words(letter: str) -> list[str]:
    return unicodedata.name(letter, "").split() if letter.isalpha() else []
