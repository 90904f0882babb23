"""Verifiers on text, on the host: each function takes settings and returns a reward function with TRL's signature.

    reward = exact_answer(tolerance=0)
    reward(prompts, completions, answer=["7", "12"])  # [1.0, 0.0], None where there is no answer to compare with

A completion is text, or a list of chat messages (`text_of`). The columns are lists
with an entry a completion; `completion_ids` holds each completion's tokens, its end
token included.

Nothing to show earns nothing: where a share has no denominator (no calculation, no
letter) the reward is 0. The time taken grows linearly with a completion's length
whatever it holds; only a pattern or a function that the caller passes takes the time
it takes. `grpo_jax.rewards.tokens` has the traced counterparts.

The R1-style preset is the sum of the rewards for accuracy, format and reasoning
length with the weights `R1_WEIGHTS`.
"""

import collections
import math
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.calculations import share_of_right_steps
from grpo_jax.rewards.host import RewardFunction, call

R1_WEIGHTS = (1.0, 0.1, 0.01)  # of accuracy, format and reasoning length, in this order
TAGS = ("think", "answer")

# -------------------------------------------------------------------------- answers


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """What the model wrote: the text itself, or that of the assistant's messages, joined by newlines.

    A message without a role is the assistant's. Messages of others (a tool's, a user's)
    are left out: the model did not write them. Content in parts is the text of its parts.

    Raises:
      TypeError: for anything else than text or a list of messages.
    """
    if isinstance(completion, str):
        return completion
    written = []
    for message in completion if isinstance(completion, Sequence) else [completion]:
        if not isinstance(message, Mapping):
            raise TypeError(f"a completion is text or a list of chat messages, got {reprlib.repr(completion)}")
        if message.get("role", "assistant") == "assistant":
            written.append(_content(message.get("content")))
    return "\n".join(written)


def _content(content: Any) -> str:
    if content is None:  # a message that only calls tools
        return ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


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

    return _named("exact_answer", reward)


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


def self_consistency(
    *,
    group_size: int,
    extract: Callable[[str], str | None] = answer_of,
    majority: float = 1.0,
    other: float = -0.1,
) -> RewardFunction:
    """`majority` for the answer that most completions of the group give, `other` for the rest.

    For data without ground truth (majority voting as the reward: TTRL, Zuo et al. 2025,
    arXiv:2504.16084). A group is `group_size` completions in a row, as the host gives
    them, and has to be judged in one call. Answers are compared as `extract` returns
    them. A completion without an answer gets `other` and has no vote. Where several
    answers have the most votes there is no majority and all get `other`, so that the
    order within a group decides nothing.

    Args:
      group_size: `G`.
      extract: the text's answer, None where it has none.
      majority: reward of the most frequent answer.
      other: reward of the rest.

    Raises:
      ValueError: if `group_size < 2`; from the reward, if the completions are not whole
        groups of the same prompt.
    """
    if group_size < 2:
        raise ValueError(f"a majority takes a group of at least 2 completions, got group_size = {group_size}")

    def judge(group: Sequence[Any]) -> list[float]:
        answers = [extract(text_of(completion)) for completion in group]
        ranked = collections.Counter(answer for answer in answers if answer is not None).most_common(2)
        tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
        chosen = ranked[0][0] if ranked and not tied else None
        return [majority if answer is not None and answer == chosen else other for answer in answers]

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        if len(completions) % group_size:
            raise ValueError(f"{len(completions)} completions are no whole groups of group_size = {group_size}")
        groups = [slice(start, start + group_size) for start in range(0, len(completions), group_size)]
        for group in groups:
            if any(prompt != prompts[group.start] for prompt in prompts[group]):
                raise ValueError(f"completions {group.start} to {group.stop - 1} are one group with different prompts")
        return [value for group in groups for value in judge(completions[group])]

    return _named("self_consistency", reward)


# --------------------------------------------------------------------------- format


def format(*, tags: Sequence[str] = TAGS) -> RewardFunction:
    """The share of tag pairs that are right: 1.0 for both of `<think>...</think><answer>...</answer>`, 0.5 for one.

    A pair is right where its two tags occur exactly once, the opening one first, and
    after the end of the right pair before it: of two pairs that are nested, crossed or
    out of order only the one named first counts. Text around them is allowed;
    `strict_format` allows none.

    Args:
      tags: names of the tags, in order.

    Raises:
      ValueError: for tags that are not different names.
    """
    marks = _marks(tags)
    return _per_text("format", lambda text: _share_of_pairs(text, marks))


def _share_of_pairs(text: str, marks: Sequence[tuple[str, str]]) -> float:
    right = end = 0
    for opening, closing in marks:
        start, stop = _only(text, opening), _only(text, closing)
        if end <= start < stop:
            right, end = right + 1, stop + len(closing)
    return right / len(marks)


def strict_format(*, tags: Sequence[str] = TAGS) -> RewardFunction:
    r"""1.0 where the whole completion is `^<think>...</think>\s*<answer>...</answer>$`, else 0.0.

    The rule of DeepSeek-R1's template (arXiv:2501.12948, table 1), each tag exactly once. Nothing stands before
    the first tag, only white space between the pairs, and after the last tag nothing but
    one newline, which `$` allows. What is between the tags may be empty. Compared tag by
    tag, not by a regular expression, whose backtracking a hostile completion could use.

    A text does not tell whether the end token followed: `tokens.tag_format` asks for that too.

    Args:
      tags: names of the tags, in order.

    Raises:
      ValueError: for tags that are not different names.
    """
    marks = _marks(tags)
    return _per_text("strict_format", lambda text: float(_sections(text, marks) is not None))


def _sections(text: str, marks: Sequence[tuple[str, str]]) -> list[str] | None:
    """What stands in the tags of a text of strict format, None for another text."""
    sections, end = [], 0
    for opening, closing in marks:
        start, stop = _only(text, opening), _only(text, closing)
        if not end <= start < stop or text[end:start].strip() or (end == 0 and start > 0):
            return None
        sections.append(text[start + len(opening) : stop])
        end = stop + len(closing)
    return sections if text[end:] in ("", "\n") else None


def tag_count(*, tags: Sequence[str] = TAGS) -> RewardFunction:
    r"""The share of tags that occur exactly once: 0.25 for each of `<think>`, `</think>`, `<answer>`, `</answer>`.

    open-r1's `tag_count_reward`, which however asks for newlines around its tags.

    Args:
      tags: names of the tags, each of which has an opening and a closing form.

    Raises:
      ValueError: for tags that are not different names.
    """
    marks = [mark for pair in _marks(tags) for mark in pair]
    return _per_text("tag_count", lambda text: sum(text.count(mark) == 1 for mark in marks) / len(marks))


def _marks(tags: Sequence[str]) -> tuple[tuple[str, str], ...]:
    # A text is a sequence too, of letters.
    good = not isinstance(tags, str) and len(tags) > 0 and len(set(tags)) == len(tags)
    if not good or not all(isinstance(tag, str) and tag and not set(tag) & set("<>/") for tag in tags):
        raise ValueError(f"tags are different names without brackets, such as {TAGS}, got {tags!r}")
    return tuple((f"<{tag}>", f"</{tag}>") for tag in tags)


def _only(text: str, mark: str) -> int:
    """Where the only occurrence of a mark begins, -1 if there is none or another."""
    start = text.find(mark)
    return start if start == text.rfind(mark) else -1


# --------------------------------------------------------------------------- length


def reasoning_length(*, per: int = 1000, tags: Sequence[str] = TAGS) -> RewardFunction:
    """`min(length / per, 1)` where the format is strictly right, else 0.0.

    The length is that of the text in the first pair of tags, in characters (Unicode code
    points), white space included.

    Args:
      per: characters that earn the full reward.
      tags: names of the tags, in order; the reasoning's first.

    Raises:
      ValueError: unless `per > 0`; for tags that are not different names.
    """
    if not per > 0:
        raise ValueError(f"reasoning is measured per a number of characters above 0, got {per}")
    marks = _marks(tags)

    def score(text: str) -> float:
        sections = _sections(text, marks)
        return 0.0 if sections is None else min(len(sections[0]) / per, 1.0)

    return _per_text("reasoning_length", score)


def soft_overlong(max_tokens: int, cache: int) -> RewardFunction:
    """A punishment that grows over the last `cache` tokens (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13).

        0 up to max_tokens - cache tokens, ((max_tokens - cache) - length) / cache up to max_tokens, -1 beyond

    The length is that of `completion_ids`, the end token included, as for
    `tokens.soft_overlong` and TRL's `get_soft_overlong_punishment`.

    Args:
      max_tokens: 20480 in the paper, the limit that completions are sampled under.
      cache: 4096 in the paper.

    Raises:
      ValueError: unless `0 < cache <= max_tokens`.
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache is above 0 and at most max_tokens = {max_tokens}, got {cache}")

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [min(max((max_tokens - cache - len(ids)) / cache, -1.0), 0.0) for ids in completion_ids]

    return _named("soft_overlong", reward)


def cosine_length(
    correct: RewardFunction,
    *,
    max_length: int,
    min_wrong: float = -1.0,
    max_wrong: float = -0.5,
    min_correct: float = 0.5,
    max_correct: float = 1.0,
    threshold: float = 0.5,
) -> RewardFunction:
    """Right answers earn more the shorter, wrong ones lose less the longer they are, along a cosine.

        progress = min(length / max_length, 1)
        reward = long + (short - long) * (1 + cos(pi * progress)) / 2

    where a right completion has `short = max_correct` and `long = min_correct`, and a
    wrong one `short = min_wrong` and `long = max_wrong`. TRL's `get_cosine_scaled_reward`
    with any verifier in place of math-verify, after Yeo et al. 2025 (arXiv:2502.03373,
    appendix C.1). The length is in tokens, that of `completion_ids`, the end token
    included.

    Args:
      correct: a reward function, plain or async. A completion is right where it gives more
        than the threshold; what it could not score (None) stays None.
      max_length: tokens from which on a reward stays at its `long` end.
      min_wrong: of a wrong completion without length.
      max_wrong: of a wrong completion of `max_length`.
      min_correct: of a right completion of `max_length`.
      max_correct: of a right completion without length.
      threshold: in the units of `correct`.

    Raises:
      ValueError: unless `max_length > 0`; from the reward, for values of `correct` that
        `host` would refuse.
    """
    if not max_length > 0:
        raise ValueError(f"max_length is a number of tokens above 0, got {max_length}")

    def scale(value: float, length: int) -> float | None:
        if math.isnan(value):
            return None
        short, long = (max_correct, min_correct) if value > threshold else (min_wrong, max_wrong)
        return long + 0.5 * (short - long) * (1.0 + math.cos(math.pi * min(length / max_length, 1.0)))

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        (values,) = call([correct], arguments, len(completions))
        return [scale(value, len(ids)) for value, ids in zip(values, completion_ids, strict=True)]

    return _named("cosine_length", reward)


# ----------------------------------------------------------------- repetition, language


def repetition_penalty(*, ngram: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """`(1 - unique / total) * max_penalty` over the n-grams of the completion's tokens.

    0.0 for a completion of fewer than `ngram` tokens. TRL's
    `get_repetition_penalty_reward`, after Yeo et al. 2025 (arXiv:2502.03373, appendix
    C.2). The tokens are `completion_ids`, the end token included.

    Args:
      ngram: tokens in a row that count as one.
      max_penalty: what a completion of nothing but repetition comes near to; 0 or below.

    Raises:
      ValueError: unless `ngram > 0` and `max_penalty <= 0`.
    """
    if not (ngram > 0 and -math.inf < max_penalty <= 0):
        raise ValueError(
            f"ngram is above 0 and max_penalty at most 0, got ngram = {ngram}, max_penalty = {max_penalty}"
        )

    def penalty(ids: Sequence[int]) -> float:
        grams = list(zip(*(ids[start:] for start in range(ngram)), strict=False))
        repeated = len(grams) - len(set(grams))
        return repeated / len(grams) * max_penalty if repeated else 0.0

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [penalty(ids) for ids in completion_ids]

    return _named("repetition_penalty", reward)


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
    marks = [mark for pair in _marks(tags) for mark in pair]

    def score(text: str) -> float:
        for mark in marks:
            text = text.replace(mark, "")
        letters = {letter: n for letter, n in collections.Counter(text).items() if letter.isalpha()}
        wanted = sum(n for letter, n in letters.items() if not scripts.isdisjoint(_name_words(letter)))
        return wanted / sum(letters.values()) if letters else 0.0

    return _per_text("language_consistency", score)


def _name_words(letter: str) -> list[str]:
    return unicodedata.name(letter, "").split() if letter.isalpha() else []


# --------------------------------------------------------------------- calculations


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
    return _per_text("worked_steps", share_of_right_steps)


# --------------------------------------------------------------------------- making


def _named(name: str, reward: RewardFunction) -> RewardFunction:
    """The reward function under the name that metrics know it by."""
    reward.__name__ = reward.__qualname__ = name
    return reward


def _per_text(name: str, score: Callable[[str], float]) -> RewardFunction:
    """A reward function that scores the text of each completion by itself."""

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [score(text_of(completion)) for completion in completions]

    return _named(name, reward)
