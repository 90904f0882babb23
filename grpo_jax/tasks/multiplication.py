"""Multiplication of whole numbers; the digits of the factors dial how hard it is.

What 2 by 2 digits is to one model, 4 by 4 is to another: with too few the model always
is right, with too many never, and neither has an advantage. `ood` has one digit more
in each factor.
"""

import random
from collections.abc import Iterator

from grpo_jax.data import Row
from grpo_jax.rewards.answers import exact_answer
from grpo_jax.tasks import Splits, Task, draw_splits

correct = exact_answer(tolerance=0)  # as a number: with or without commas between thousands


def task(seed: int = 0, *, digits: tuple[int, int] = (2, 2), **sizes: int) -> Task:
    """Multiplication of factors of that many digits; `sizes` are those of `splits`."""
    return Task("multiplication", splits(seed, digits=digits, **sizes), correct)


def splits(
    seed: int,
    *,
    digits: tuple[int, int] = (2, 2),
    train: int = 2000,
    validation: int = 200,
    test: int = 500,
    ood: int = 500,
) -> Splits:
    """Rows of `prompt`, `factors` and `answer`; 23 * 47 and 47 * 23 are one problem.

    Raises:
      ValueError: for digits below 1; where the digits have fewer problems than are wanted.
    """
    if min(digits) < 1:
        raise ValueError(f"a factor has at least 1 digit, got digits={digits}")
    more = digits[0] + 1, digits[1] + 1
    sizes = {"train": train, "validation": validation, "test": test, "ood": ood}
    return draw_splits(
        lambda rng: problems(rng, digits),
        lambda rng: problems(rng, more),
        lambda row: tuple(sorted(row["factors"])),
        seed=seed,
        **sizes,
    )


def problems(rng: random.Random, digits: tuple[int, int]) -> Iterator[Row]:
    """Problems without end; no factor has a leading zero."""
    while True:
        first, second = (rng.randrange(10 ** (count - 1), 10**count) for count in digits)
        yield {"prompt": prompt(first, second), "factors": [first, second], "answer": str(first * second)}


def prompt(first: int, second: int) -> str:
    """The words of a problem."""
    return (
        f"What is {first} * {second}? Work it out between <think> and </think>, then give the number between "
        "<answer> and </answer>."
    )
