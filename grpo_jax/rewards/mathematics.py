"""Whether a completion's mathematical answer is the right one."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.answers import gold_text
from grpo_jax.rewards.calling import reading
from grpo_jax.rewards.completions import after_thoughts, text_of
from grpo_jax.rewards.formats import marks_of, opened_by
from grpo_jax.rewards.latex import Reading, final_answer, gold_answer
from grpo_jax.rewards.pool import WorkerPool, in_worker_processes
from grpo_jax.rewards.units import same_unit

THOUGHTS = marks_of(["think"])


def accuracy(
    *,
    column: str | None = None,
    tolerance: float = 0.0,
    decimals: int = 6,
    characters: int = 10_000,
    pool: WorkerPool | None = None,
    workers: int = 2,
    timeout: float = 5.0,
    memory: int = 2 * 2**30,
) -> Callable[..., list[float | None]]:
    r"""1 where the completion's answer equals the gold one as mathematics, else 0 (math-verify 0.9).

    Of a completion that thinks, only what follows the last `</think>` is read, and nothing where a `<think>`, its own
    or the prompt's, is not closed (TRL's function reads thoughts, too). Its answer is its last `\boxed{}`, or else the
    last LaTeX environment that the word "answer" announces. Boxes that only `,`, `;`, `and` or `or` join are one
    answer: `\boxed{1} and \boxed{2}` is the set {1, 2}, `x=\boxed{1}, y=\boxed{2}` is `x=1, y=2`, and
    `\boxed{4}. \boxed{5}` is 5. An answer that the text denies ("not $5$") is none. The gold answer is what follows
    `####`, its last box, or all of it where it is bare mathematics, a number with a unit or a word; of a sentence the
    only LaTeX, the only date or the only number.

    Both are read as a person reads them (`rewards.latex`): `\frac12`, `2\sqrt2`, `1\,234`, `1\frac12`, `\$36`,
    `5\text{ million}` (5000000), `50\%` (50 or 0.5; `0.5\%` also 0.5), `2516_8` (equal to the digits `2516`, not to
    `2516_7` or 1358; as an answer also to the gold 1358), and without units, which must agree where both sides have
    one: `5\text{ cm}` is 5, not `5\text{ m}` or `5\text{ cm}^2`, and `\$5` is not `5\text{ cents}`. Units are those
    that are known and one plural noun; a number beside other text (`5\text{ or more}`, `5\text{ tenths}`) is not that
    number. `x` is not `X`, letters alone (`AB`) are a word and no product, and numbers on both sides of `=` have to
    be equal. `(B) 10` and `B. 10` are the choice `B`, and 10.
    Then math-verify compares them as numbers, sets, intervals, matrices, relations or formulas; `\frac{1}{2}`, `0.5`
    and `\frac{2}{4}` are one answer, `1<x<2` is `2>x>1` and the interval `(1,2)` or `]1,2[`, `|x|<1` is `-1<x<1`, and
    `i` is the imaginary unit where there is no other letter. A list without brackets has no order, but beside a tuple,
    a vector or `a=1, b=2`, and as many items as the gold one; `\{1,2\}` is neither `(1,2)` nor `[1,2]`. Constants
    without decimals are compared by 60 digits, `5 6` is no sum, dots (`1,2,\ldots,9`) are compared as text, and of
    `P(A|B) = \frac{1}{2}` the name has to agree only where both sides have one. Words are compared as text, without
    case. Otherwise the rule is that of TRL's `accuracy_reward`.

    An answer that is missing, unreadable or cannot be parsed scores 0, and so does one whose parsing takes longer than
    `timeout` or more than `memory`. Where the gold answer cannot be told, the item is masked; where it
    can but cannot be parsed, or is a phrase with numbers (July 4, 1776), the same text scores 1 and any other 0.
    The text of the whole gold answer is right in any case. A fault of the verifier masks (see `in_worker_processes`).

    Args:
      column: the data set's column of gold answers; by default that of `--answer-column` where the rows were read
        with one (`data.read_problems`), or else `solution`, or else `answer`.
      tolerance: two real numbers are also equal up to this share of the gold one; 0 for no such rule.
      decimals: places to which numbers are rounded before they are compared, where one of them is a decimal fraction;
        counted from the first digit that is not 0 for numbers below 0.1, so that `4e-7` is not `1e-7`.
      characters: how much of the completion's end the parser is shown. It has the answer, and what
        a parser does to the rest costs time.
      pool: worker processes to share with other rewards.
      workers: how many worker processes, in a pool of its own.
      timeout: seconds for a completion, in a pool of its own.
      memory: bytes for a worker process, in a pool of its own.

    Raises:
      ImportError: without math-verify.
      ValueError: for a setting out of range; from the reward, if the data set has no such column, or a gold answer is
        neither text nor a number.
    """
    try:
        from grpo_jax.rewards import symbolic
    except ImportError as error:
        raise ImportError("the accuracy reward needs math-verify: pip install 'grpo-jax[math]'") from error
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a share of the gold number, at least 0 and below 1, got {tolerance}")
    if decimals < 0 or characters < 1:
        raise ValueError(f"decimals is at least 0 and characters at least 1, got {decimals} and {characters}")
    judge = in_worker_processes(
        symbolic.accuracy,
        pool=pool,
        workers=workers,
        timeout=timeout,
        memory=memory,
        settings={"tolerance": tolerance, "decimals": decimals},
        name="accuracy",
    )

    golds = ("solution", "answer") if column is None else (column,)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        gold_column: str | None = None,
        prompt_tail: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        names = golds if gold_column is None or column is not None else (gold_column,)
        present = next((name for name in names if name in columns), None)
        if present is None:
            raise ValueError(f"the accuracy reward needs a column {' or '.join(names)} with the gold answers")
        tails = prompt_tail or [None] * len(completions)
        texts = [opened_by(tail or "", THOUGHTS) + text_of(c) for tail, c in zip(tails, completions, strict=True)]
        answers = [final_answer((after_thoughts(text) or "")[-characters:]) for text in texts]
        golds_given = map(gold_text, columns[present])
        wanted = [None if gold is None else gold_answer(gold) for gold in golds_given]
        return judge(
            prompts,
            ["" if answer is None else answer.latex for answer in answers],
            gold=[None if gold is None else gold.latex for gold in wanted],
            verdict=[verdict(answer, gold) for answer, gold in zip(answers, wanted, strict=True)],
            log_metric=columns.get("log_metric"),
        )

    reward.__name__ = reward.__qualname__ = "accuracy"
    return reading(reward, golds=golds, told=lambda gold: gold_answer(gold) is not None)


def verdict(answer: Reading | None, gold: Reading | None) -> float | None:
    """The reward where no parser is needed: equal text, text and bases and units that differ; else None."""
    if answer is None or gold is None:
        return None if gold is None else 0.0
    ours, theirs = answer.option or answer.text, gold.option or gold.text
    if (answer.option or gold.option) and len(ours) == len(theirs) == 1 and (ours + theirs).isupper():
        return float(ours == theirs)  # letters of choices
    if answer.whole == gold.whole or (gold.words and answer.whole.casefold() == gold.whole.casefold()):
        return 1.0
    if answer.text in (gold.text, gold.text.removesuffix(f"_{gold.base}")):
        return 1.0
    if gold.base:
        return 0.0  # a bare number is its digits
    both = "%" in answer.latex and "%" in gold.latex  # what it is of, students, need not be said twice
    units = [side.unit or ("%" if "%" in side.latex and not both else "") for side in (answer, gold)]
    if (gold.words and answer.words) or (all(units) and not same_unit(*units)):
        return float(gold.words and answer.words and answer.text.casefold() == gold.text.casefold())
    if any(side.words and any(map(str.isdecimal, side.text)) for side in (answer, gold)):
        return 0.0  # a number beside words that may change it
    words = answer.words or gold.words or (answer.latex.isalpha() and gold.latex.isalpha())
    if words and answer.text.isalpha() and gold.text.isalpha() and len(answer.text) > 1:
        return float(answer.text.casefold() == gold.text.casefold())  # words, and no products
    if answer.latex == gold.latex and not any(side.words for side in (answer, gold)):
        return 1.0  # which the parser may not know, such as \frac{1\pm\sqrt{5}}{2}
    letters, wanted = _letters(answer.latex), _letters(gold.latex)
    if {letter for letter in letters - wanted if letter.swapcase() in wanted - letters}:
        return 0.0  # x and X
    found, asked = _connectives(answer.latex), _connectives(gold.latex)
    return 0.0 if found and asked and found != asked else None


def _letters(latex: str) -> set[str]:
    """The letters of variables, of which Greek ones are commands."""
    greek = {_GREEK[name] for name in re.findall(r"\\([a-zA-Z]+)", latex) if name in _GREEK}
    return greek | set(filter(str.isalpha, re.sub(r"\\[a-zA-Z]+\s*", "", latex)))


_NAMES = ("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega")
_GREEK = dict(zip(_NAMES, "ΓΔΘΛΞΠΣΥΦΨΩ", strict=True)) | dict(zip(map(str.lower, _NAMES), "γδθλξπσυφψω", strict=True))


def _connectives(latex: str) -> set[str]:
    found = re.findall(r"\b(and|or)\b|\\(land|wedge|lor|vee)\b", latex)
    return {"and" if (word or command) in ("and", "land", "wedge") else "or" for word, command in found}
