"""Countdown: reach a number with the four operations, using each of a few numbers exactly once.

    numbers 3, 7 and 25, target 29   ->   <think>...</think><answer>25 + 7 - 3</answer>

The game of TinyZero (Pan et al. 2025) and nano-aha-moment: three or four numbers from 1
to 99, a target from 10 to 99. `ood` has five or six numbers.
"""

import ast
import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.data import Row
from grpo_jax.rewards.answers import answers_of
from grpo_jax.tasks import Splits, Task, draw_splits

MAX_LENGTH = 200  # of an expression, in characters
MAX_DEPTH = 30  # of operations inside operations


def task(seed: int = 0, **sizes: int) -> Task:
    """Countdown; `sizes` are those of `splits`."""
    return Task("countdown", splits(seed, **sizes), correct)


def splits(seed: int, *, train: int = 10_000, validation: int = 256, test: int = 1000, ood: int = 1000) -> Splits:
    """Rows of `prompt`, `numbers` and `target`; two with the same numbers, in any order, differ in the target."""

    def key(row: Row) -> tuple[Any, ...]:
        return *sorted(row["numbers"]), row["target"]

    sizes = {"train": train, "validation": validation, "test": test, "ood": ood}
    return draw_splits(lambda rng: problems(rng, (3, 4)), lambda rng: problems(rng, (5, 6)), key, seed=seed, **sizes)


def problems(rng: random.Random, counts: Sequence[int]) -> Iterator[Row]:
    """Problems without end, each with as many numbers as one of `counts`, and with a solution."""
    while True:
        numbers = [rng.randint(1, 99) for _ in range(rng.choice(counts))]
        if 10 <= (target := _reach(rng, numbers)) <= 99:
            yield {"prompt": prompt(numbers, target), "numbers": numbers, "target": target}


def _reach(rng: random.Random, numbers: Sequence[int]) -> int:
    """The value of a random expression of all the numbers, which has no fractions on the way."""
    values = list(numbers)
    while len(values) > 1:
        first, second = (values.pop(rng.randrange(len(values))) for _ in range(2))
        results = [first + second, first - second, first * second]
        if second and first % second == 0:
            results.append(first // second)
        values.append(rng.choice(results))
    return values[0]


def prompt(numbers: Sequence[int], target: int) -> str:
    """The words of a problem."""
    listed = ", ".join(map(str, numbers))
    return (
        f"Write an expression that equals {target}. Use each of the numbers {listed} exactly once, and only the "
        "operations +, -, * and /, with parentheses where needed. Think it through between <think> and </think>, then "
        "give the expression between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>."
    )


def correct(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Any],
    target: Sequence[Any],
    prompt_tail: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 where the answer is an expression that uses each number exactly once and equals the target exactly, else 0.

    The answer is that of `rewards.answer_of`, after what the prompt opens (`formats.opened_by`). An expression may
    have whole numbers, `+`, `-` (signs too), `*`, `/`, parentheses and blanks, in `MAX_LENGTH` characters and
    `MAX_DEPTH` operations one inside the other. It is computed in fractions, so that
    nothing is rounded. Nothing of it is executed.
    """
    problems = zip(answers_of(completions, prompt_tail), numbers, target, strict=True)
    return [float(solves(answer, given, goal)) for answer, given, goal in problems]


def solves(expression: str | None, numbers: Sequence[int], target: int) -> bool:
    """Whether the expression is allowed, uses each of the numbers exactly once, and equals the target."""
    try:
        value, used = evaluate(expression or "")
    except (ValueError, ZeroDivisionError):
        return False
    return sorted(used) == sorted(numbers) and value == target


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression and the numbers in it, from left to right.

    Raises:
      ValueError: for what is not an allowed expression.
      ZeroDivisionError: where it divides by zero.
    """
    if len(expression) > MAX_LENGTH or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        raise ValueError(f"not an expression of numbers, + - * / and ( ): {expression[:MAX_LENGTH]!r}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:  # Python's parser has a stack of its own
        raise ValueError(f"not an expression: {expression!r}") from error
    used: list[int] = []
    return _value(tree, used, MAX_DEPTH), used


def _value(node: ast.expr, used: list[int], depth: int) -> Fraction:
    if depth < 0:
        raise ValueError(f"more than {MAX_DEPTH} operations inside each other")
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, used, depth - 1)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as operation, right=right):
            first, second = _value(left, used, depth - 1), _value(right, used, depth - 1)
            match operation:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
                case _:
                    return first / second
    raise ValueError(f"{type(node).__name__} is not allowed in an expression")
