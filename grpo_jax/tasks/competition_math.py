r"""MATH: problems of mathematics competitions (Hendrycks et al. 2021, arXiv:2103.03874).

From the Hugging Face Hub, or from rows of your own with the same fields: `problem`;
`solution`, in which the answer stands in the last `\boxed{}`; and `level` where there is
one, 5 being the hardest:

    task = competition_math.task(levels=(3, 4, 5))
    task = competition_math.task(train=train, test=data.read_rows("math500.jsonl", competition_math.FIELDS))

MATH-500 (Lightman et al. 2023, arXiv:2305.20050) has these fields too.
"""

import re
from collections.abc import Sequence
from typing import Any

from grpo_jax import data
from grpo_jax.data import Row
from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.mathematics import accuracy
from grpo_jax.tasks import Splits, Task, held_out_splits

FIELDS = ("problem", "solution")
HARD_LEVEL = 5
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def from_hub() -> dict[str, Any]:
    """The rows of `EleutherAI/hendrycks_math`, all subjects: 7,500 to train on and 5,000 to test."""

    def read(split: str) -> list[Row]:
        parts = (data.read_rows("EleutherAI/hendrycks_math", FIELDS, split=split, subset=name) for name in SUBJECTS)
        return [row for part in parts for row in part]

    return {"train": read("train"), "test": read("test")}


def task(
    seed: int = 0,
    *,
    train: Sequence[Row] | None = None,
    test: Sequence[Row] | None = None,
    ood: Sequence[Row] | None = None,
    levels: Sequence[int] | None = None,
    validation: int = 500,
    verifier: RewardFunction | None = None,
) -> Task:
    """MATH made of rows with the fields `problem` and `solution`, or `from_hub`; see `splits` for the arguments.

    The verifier is by default `rewards.mathematics.accuracy` on the column `gold`, which
    needs the extra `math`; one of your own can share a pool.

    Raises:
      ValueError: for `train` without `test`, or the other way round.
    """
    if train is None and test is None and ood is None:
        parts = splits(seed, **from_hub(), levels=levels, validation=validation)
    elif train is None or test is None:
        raise ValueError("rows of your own are both train and test; leave out both for those of the Hub")
    else:
        parts = splits(seed, train=train, test=test, ood=ood, levels=levels, validation=validation)
    return Task("competition_math", parts, accuracy(column="gold") if verifier is None else verifier)


def splits(
    seed: int,
    *,
    train: Sequence[Row],
    test: Sequence[Row],
    ood: Sequence[Row] | None = None,
    levels: Sequence[int] | None = None,
    validation: int = 500,
) -> Splits:
    r"""Rows of `prompt`, `answer` (LaTeX), `gold` (the same in `\boxed{}`), `solution` and `level` (or None).

    Args:
      seed: which rows of `train` are held out for validation.
      train: rows of `FIELDS`.
      test: rows of `FIELDS`; all of them are the test split.
      ood: rows of `FIELDS`. If not given, the rows of `test` of level `HARD_LEVEL`,
        which are then in both.
      levels: of `train`, those to train and to validate on; all if not given. Without 5,
        `ood` shows what carries over from easier problems; Dr. GRPO takes 3 to 5.
      validation: how many rows of `train` are held out.

    Raises:
      ValueError: at the first row without a `\boxed{}`; if `validation` leaves no row
        to train on.
    """
    tested = rows(test, "test")
    hard = [row for row in tested if row["level"] == HARD_LEVEL]
    moved = hard if ood is None else rows(ood, "ood")
    trained = [row for row in rows(train, "train") if levels is None or row["level"] in levels]
    return held_out_splits(trained, tested, moved, seed=seed, validation=validation)


def rows(raw: Sequence[Row], source: str) -> list[Row]:
    """The rows of the task; `source` is what messages call them."""
    made = []
    for number, row in enumerate(raw, start=1):
        if (answer := boxed(row["solution"])) is None:
            raise ValueError(
                f"{source}: row {number}: no \\boxed{{}} in the solution, which ends {row['solution'][-80:]!r}"
            )
        level = re.search("[0-9]", str(row.get("level")))  # "Level 5" in MATH, 5 in MATH-500, and a few "Level ?"
        made.append(
            {
                "prompt": prompt(row["problem"]),
                "answer": answer,
                "gold": rf"\boxed{{{answer}}}",
                "solution": row["solution"],
                "level": int(level[0]) if level else None,
            }
        )
    return made


def boxed(text: str) -> str | None:
    r"""What is in the last `\boxed{...}` or `\fbox{...}`, or stands after a `\boxed 5`; None if there is none."""
    found = [*re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text)]
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$]+", rest)
        return bare[0] if bare else None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace, \{, is none
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return rest[1 : token.start()].strip()
    return None


def prompt(problem: str) -> str:
    """The words of a problem."""
    return (
        f"{problem.strip()}\n\nThink it through between <think> and </think>, then give the answer alone, as "
        r"\boxed{...}, between <answer> and </answer>."
    )
