"""Small Python functions, told in words and checked by unit tests in a sandbox.

A dozen kinds of steps on lists of whole numbers and on text, each with a number that
varies. A problem is one step, or two one after the other; `ood` has three.

    Write a Python function f(values) ... 1. leave out the multiples of 3 ... 2. give the sum of the squares of ...
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from grpo_jax.data import Row
from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.python import python_tests
from grpo_jax.tasks import Splits, Task, draw_splits

Kind = Literal["numbers", "text"]


class Template(NamedTuple):
    """A step: what it does to its input, in words and in Python, with a number `k`."""

    takes: Kind  # and gives, but for the last
    words: str  # with {k}
    apply: Callable[[Any, int], Any]
    numbers: range  # of which k is one
    last: bool = False  # it gives a number, so that no step can follow


def _remainders(values: list[int], k: int) -> list[int]:
    return sorted(values, key=lambda value: (value % k, value))


def _pairs(values: list[int], k: int) -> int:
    return sum(abs(a - b) == k for i, a in enumerate(values) for b in values[:i])


def _kth_largest(values: list[int], k: int) -> int:
    return [*sorted(set(values), reverse=True), *[0] * k][k - 1]


def _caesar(text: str, k: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return text.translate(str.maketrans(letters, letters[k:] + letters[:k]))


def _run_lengths(text: str, k: int) -> str:
    runs = [(letter, len(list(run))) for letter, run in groupby(text)]
    return "".join(f"{letter}{length}" if length >= k else letter * length for letter, length in runs)


TEMPLATES = (
    Template("numbers", "move the first {k} numbers, or all if there are fewer, to the end in the same order",
             lambda x, k: x[k:] + x[:k], range(2, 6)),
    Template("numbers", "cut the list from its start into pieces of {k} numbers, the last of which may be shorter, and "
             "replace each piece by its sum",
             lambda x, k: [sum(x[i : i + k]) for i in range(0, len(x), k)], range(2, 6)),
    Template("numbers", "leave out the multiples of {k}", lambda x, k: [v for v in x if v % k], range(2, 10)),
    Template("numbers", "sort by the remainder on division by {k} (as Python's % gives it), and numbers of the same "
             "remainder by their value", _remainders, range(2, 10)),
    Template("numbers", "replace the list by the differences between each number and the one {k} places before it; the "
             "first {k} numbers have none", lambda x, k: [b - a for a, b in zip(x, x[k:], strict=False)], range(2, 5)),
    Template("numbers", "keep only every number whose position, counted from 0, is a multiple of {k}",
             lambda x, k: x[::k], range(2, 6)),
    Template("numbers", "add {k} times its position, counted from 0, to each number",
             lambda x, k: [v + k * i for i, v in enumerate(x)], range(2, 10)),
    Template("numbers", "give the sum of the squares of the multiples of {k}",
             lambda x, k: sum(v * v for v in x if v % k == 0), range(2, 10), last=True),
    Template("numbers", "count the pairs of numbers, at any two positions, that are exactly {k} apart",
             _pairs, range(1, 9), last=True),
    Template("numbers", "give the number that is in place {k} when equal numbers are counted once and the largest is "
             "in place 1; 0 if there is none", _kth_largest, range(1, 6), last=True),
    Template("text", "replace each letter by the one {k} places after it in the alphabet, going on with a after z, and "
             "leave all that is not a letter from a to z as it is", _caesar, range(1, 26)),
    Template("text", "replace each unbroken run of at least {k} equal characters by that character once, followed by "
             "how many there were", _run_lengths, range(2, 5)),
    Template("text", "cut the text from its start into pieces of {k} characters, the last of which may be shorter, and "
             "reverse each piece", lambda x, k: "".join(x[i : i + k][::-1] for i in range(0, len(x), k)), range(2, 8)),
    Template("text", "leave out every character whose position, counted from 1, is a multiple of {k}",
             lambda x, k: "".join(c for i, c in enumerate(x, start=1) if i % k), range(2, 8)),
)  # fmt: skip

EXAMPLES, TESTS = 2, 10  # calls that the prompt shows, and that the function is tested with


class Instruction(NamedTuple):
    """A template with its number: one step of a problem."""

    template: Template
    k: int


def task(seed: int = 0, *, verifier: RewardFunction | None = None, **sizes: int) -> Task:
    """Small functions, by default scored by `rewards.python.python_tests`; `sizes` are those of `splits`."""
    return Task("code", splits(seed, **sizes), python_tests() if verifier is None else verifier)


def splits(seed: int, *, train: int = 2000, validation: int = 100, test: int = 300, ood: int = 300) -> Splits:
    """Rows of `prompt`, `steps` (in words) and `tests` (assertions); no two have the same steps."""
    return draw_splits(
        lambda rng: problems(rng, (1, *[2] * 9)),  # of one step there are few
        lambda rng: problems(rng, (3,)),
        lambda row: tuple(row["steps"]),
        seed=seed,
        train=train,
        validation=validation,
        test=test,
        ood=ood,
    )


def problems(rng: random.Random, lengths: Sequence[int]) -> Iterator[Row]:
    """Problems without end, each of as many steps as one of `lengths`."""
    while True:
        kind: Kind = rng.choice(("numbers", "numbers", "text"))
        templates = rng.sample([template for template in TEMPLATES if template.takes == kind], rng.choice(lengths))
        if any(template.last for template in templates[:-1]):
            continue
        steps = [Instruction(template, rng.choice(template.numbers)) for template in templates]
        inputs = [_input(rng, kind, number) for number in range(TESTS + EXAMPLES)]
        results = [repr(run(steps, given)) for given in inputs]
        if len(set(results[:TESTS])) < 4:  # else a function that returns the same for all would pass most tests
            continue
        words = [step.template.words.format(k=step.k) for step in steps]
        calls = [f"f({given!r}) == {result}" for given, result in zip(inputs, results, strict=True)]
        tests = [f"assert {call}" for call in calls[:TESTS]]
        yield {"prompt": prompt(kind, words, calls[TESTS:]), "steps": words, "tests": tests}


def _input(rng: random.Random, kind: Kind, number: int) -> Any:
    """The first is empty, the second has one element, the others several."""
    size = number if number < 2 else rng.randint(4, 16)
    if kind == "numbers":
        return [rng.randint(-20, 40) for _ in range(size)]
    return "".join(rng.choice("aabbbxyz -") * rng.choice((1, 1, 2, 3, 4, 5)) for _ in range(size))


def run(steps: Sequence[Instruction], given: Any) -> Any:
    """What the steps make of an input, one after the other."""
    for step in steps:
        given = step.template.apply(given, step.k)
    return given


def prompt(kind: Kind, steps: Sequence[str], examples: Sequence[str]) -> str:
    """The words of a problem."""
    name, takes = {"numbers": ("values", "a list of whole numbers"), "text": ("text", "a string")}[kind]
    listed = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))
    shown = "\n".join(f"    {example}" for example in examples)
    return (
        f"Write a Python function f({name}). It takes {takes} and returns what becomes of it by these steps, one after "
        f"the other:\n{listed}\nFor example:\n{shown}\nThink it through between <think> and </think>, then give the "
        "function between <answer> and </answer>, in a block from a line ```python to a line ```."
    )
