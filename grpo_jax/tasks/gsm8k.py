"""GSM8K: word problems of primary school, with numbers as answers (Cobbe et al. 2021, arXiv:2110.14168).

From the Hugging Face Hub, or from rows of your own with the same fields:

    task = gsm8k.task()
    train, test = (data.read_rows(path, gsm8k.FIELDS) for path in ("train.jsonl", "test.jsonl"))
    task = gsm8k.task(train=train, test=test)

`ood` is on the Hub the P2 of GSM-Symbolic (Mirzadeh et al. 2024, arXiv:2410.05229):
templates of the same kind of problem, with two clauses more.
"""

import re
from collections.abc import Sequence
from typing import Any

from grpo_jax import data
from grpo_jax.data import Row
from grpo_jax.rewards.answers import exact_answer
from grpo_jax.tasks import Splits, Task, held_out_splits

FIELDS = ("question", "answer")
HARD_STEPS = 5  # lines of a worked solution; there are 2 to 8

correct = exact_answer(tolerance=0)  # as a number: 18, 18.00 and $18 are the same


def from_hub() -> dict[str, Any]:
    """The rows of `openai/gsm8k` (7,473 to train on, 1,319 to test) and of `apple/GSM-Symbolic`'s P2 (2,500)."""
    return {
        "train": data.read_rows("openai/gsm8k", FIELDS, split="train", subset="main"),
        "test": data.read_rows("openai/gsm8k", FIELDS, split="test", subset="main"),
        "ood": data.read_rows("apple/GSM-Symbolic", FIELDS, split="test", subset="p2"),
    }


def task(
    seed: int = 0,
    *,
    train: Sequence[Row] | None = None,
    test: Sequence[Row] | None = None,
    ood: Sequence[Row] | None = None,
    validation: int = 500,
) -> Task:
    """GSM8K made of rows with the fields `question` and `answer`, or `from_hub`; the arguments are those of `splits`.

    Raises:
      ValueError: for `train` without `test`, or the other way round.
    """
    if train is None and test is None and ood is None:
        parts = splits(seed, **from_hub(), validation=validation)
    elif train is None or test is None:
        raise ValueError("rows of your own are both train and test; leave out both for those of the Hub")
    else:
        parts = splits(seed, train=train, test=test, ood=ood, validation=validation)
    return Task("gsm8k", parts, correct)


def splits(
    seed: int,
    *,
    train: Sequence[Row],
    test: Sequence[Row],
    ood: Sequence[Row] | None = None,
    validation: int = 500,
) -> Splits:
    """Rows of `prompt`, `answer` (the number, as text) and `solution`.

    Args:
      seed: which rows of `train` are held out for validation.
      train: rows of `FIELDS`.
      test: rows of `FIELDS`; all of them are the test split.
      ood: rows of `FIELDS`. If not given, the rows of `test` whose solution has
        `HARD_STEPS` lines or more, which are then in both.
      validation: how many rows of `train` are held out.

    Raises:
      ValueError: at the first row without a number behind `####`; if `validation`
        leaves no row to train on.
    """
    tested = rows(test, "test")
    hard = [row for row in tested if len(row["solution"].splitlines()) >= HARD_STEPS]
    moved = hard if ood is None else rows(ood, "ood")
    return held_out_splits(rows(train, "train"), tested, moved, seed=seed, validation=validation)


def rows(raw: Sequence[Row], source: str) -> list[Row]:
    """The rows of the task; `source` is what messages call them."""
    made = []
    for number, row in enumerate(raw, start=1):
        solution, marked, end = row["answer"].rpartition("####")
        gold = end.strip().replace(",", "").removeprefix("$")
        if not marked or not re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?", gold):
            raise ValueError(
                f"{source}: row {number}: an answer ends in #### and a number, got {row['answer'][-80:]!r}"
            )
        made.append({"prompt": prompt(row["question"]), "answer": gold, "solution": solution.strip()})
    return made


def prompt(question: str) -> str:
    """The words of a problem."""
    return (
        f"{question.strip()}\n\nThink it through between <think> and </think>, then give the answer, a number alone, "
        "between <answer> and </answer>."
    )
