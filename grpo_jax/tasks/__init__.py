"""Tasks: problems as prompts, the verifier of their completions, and splits. All but `arithmetic` have one shape.

A module has `task(...) -> Task`, made of its parts: `prompt` (the words), a verifier
(`correct`, or what makes one) and `splits`. A row is a dict of the `prompt` and the
columns that the verifier wants. So a loop, or an evaluation, takes any of them:

    task = countdown.task(seed=0)
    task = with_prompts(task, data.chat)                      # for a chat model
    reward = rewards.host([task.verifier], task.splits.train, tokenizer)

The prompts ask for reasoning in `<think>` tags and for the answer in `<answer>` tags,
after DeepSeek-R1-Zero (DeepSeek-AI 2025, arXiv:2501.12948, table 1). The verifiers look
at the answer alone; for the format there is a reward of its own.

`arithmetic` is the quickstart's, for a model that is trained from nothing: it is made of
token arrays, for runs that are one program.
"""

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

from grpo_jax.data import Row, Text
from grpo_jax.rewards.calling import RewardFunction

Problems = Callable[[random.Random], Iterator[Row]]  # an endless stream


class Splits(NamedTuple):
    """Rows of a task; no problem of `train` or `validation` is in another split."""

    train: list[Row]
    validation: list[Row]  # for choices made on the way
    test: list[Row]  # for the result
    ood: list[Row]  # harder, or from elsewhere: shows what generalises


class Task(NamedTuple):
    """What a run needs to know of a task."""

    name: str
    splits: Splits
    verifier: RewardFunction  # 1 where the problem is solved, 0 where not, None where that cannot be told


def with_prompts(task: Task, make: Callable[[str], Text]) -> Task:
    """The task with `make(prompt)` for every prompt, such as `data.chat`, `dialogue`, or a template of your own."""
    rows = ([row | {"prompt": make(row["prompt"])} for row in split] for split in task.splits)
    return task._replace(splits=Splits(*rows))


def dialogue(text: str) -> str:
    """A prompt for a base model, which knows no chat template."""
    return (
        "A conversation between a user and an assistant. The user asks, and the assistant first thinks about it "
        f"and then answers.\nUser: {text}\nAssistant:"
    )


def draw_splits(
    problems: Problems,
    harder: Problems,
    key: Callable[[Row], Hashable],
    *,
    seed: int,
    train: int,
    validation: int,
    test: int,
    ood: int,
) -> Splits:
    """Splits of generated problems, drawn in the order `test`, `validation`, `ood`, `train`.

    So more rows to train on leave the others as they are.

    Args:
      problems: an endless stream of rows, with repetitions.
      harder: the same, for `ood`.
      key: what makes two rows the same problem. No two rows of all splits share it.
      seed: each split is a function of it and of the splits before.
      train: number of rows.
      validation: number of rows.
      test: number of rows.
      ood: number of rows.

    Raises:
      ValueError: if 10,000 rows in a row bring no new problem.
    """
    taken: set[Hashable] = set()

    def draw(name: str, stream: Problems, count: int) -> list[Row]:
        rows: list[Row] = []
        repeated = 0
        for row in stream(random.Random(f"{name} {seed}")):
            if len(rows) == count:
                break
            repeated += 1
            if key(row) not in taken:
                taken.add(key(row))
                rows.append(row)
                repeated = 0
            if repeated == 10_000:
                raise ValueError(f"{count} rows of {name} are wanted, and only {len(rows)} more problems were found")
        return rows

    tested = draw("test", problems, test)
    validated = draw("validation", problems, validation)
    moved = draw("ood", harder, ood)
    return Splits(draw("train", problems, train), validated, tested, moved)


def held_out_splits(
    train: Sequence[Row], test: Sequence[Row], ood: Sequence[Row], *, seed: int, validation: int
) -> Splits:
    """Splits of a published data set, whose test set stays whole: results compare with published ones.

    Args:
      train: rows to train on. One whose prompt is also in `test` or `ood`, or was there before, is left out.
      test: as published; `ood` may be a part of it.
      ood: see `Splits`.
      seed: which rows of `train` are held out for validation.
      validation: how many.

    Raises:
      ValueError: if that leaves no row to train on.
    """
    known = {row["prompt"] for row in [*test, *ood]}
    first = {row["prompt"]: row for row in reversed(train)}  # of each prompt
    rows = [row for row in train if row is first[row["prompt"]] and row["prompt"] not in known]
    if validation >= len(rows):
        raise ValueError(f"validation={validation} leaves none of the {len(rows)} rows to train on")
    chosen = set(random.Random(seed).sample(range(len(rows)), validation))
    return Splits(
        train=[row for i, row in enumerate(rows) if i not in chosen],
        validation=[row for i, row in enumerate(rows) if i in chosen],
        test=list(test),
        ood=list(ood),
    )
