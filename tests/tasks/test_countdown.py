"""Countdown: problems that can be solved, and a verifier that computes exactly and executes nothing."""

import itertools
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks import countdown


def judged(answer, numbers, target, *, chat=False):
    text = f"<think>hm</think><answer>{answer}</answer>"
    completion = [{"role": "assistant", "content": text}] if chat else text
    (reward,) = countdown.correct(["?"], [completion], numbers=[numbers], target=[target])
    return reward


def reachable(numbers):
    """All values of expressions of all the numbers, by trying every pair and every operation."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in [a + b, a - b, a * b, *([a / b] if b else [])]:
            found |= reachable((*rest, value))
    return found


# ---------------------------------------------------------------------------- problems


def test_every_problem_can_be_solved():
    for row in itertools.islice(countdown.problems(random.Random(0), (3, 4)), 25):
        assert row["target"] in reachable(tuple(map(Fraction, row["numbers"])))


@pytest.mark.parametrize("counts", [(3, 4), (5, 6)], ids=["usual", "harder"])
def test_numbers_and_targets_are_in_range_and_in_the_prompt(counts):
    seen = set()
    for row in itertools.islice(countdown.problems(random.Random(1), counts), 300):
        seen.add(len(row["numbers"]))
        assert all(1 <= number <= 99 for number in row["numbers"])
        assert 10 <= row["target"] <= 99
        assert ", ".join(map(str, row["numbers"])) in row["prompt"]
        assert f"equals {row['target']}." in row["prompt"]
    assert seen == set(counts)


def test_the_shifted_split_has_more_numbers():
    splits = countdown.splits(0, train=50, validation=10, test=10, ood=50)
    assert {len(row["numbers"]) for row in [*splits.train, *splits.validation, *splits.test]} == {3, 4}
    assert {len(row["numbers"]) for row in splits.ood} == {5, 6}


# ---------------------------------------------------------------------------- verifier

RIGHT = {
    "plain": "25 + 7 - 3",
    "no blanks": "25+7-3",
    "blanks around": "  25 + 7 - 3\n",
    "parentheses": "((25) + (7 - 3))",
    "a sign": "-3 + 25 + 7",
    "signs": "25 - -(7 - 3)",
}


@pytest.mark.parametrize("answer", RIGHT.values(), ids=RIGHT)
def test_an_expression_that_reaches_the_target_is_right(answer):
    assert judged(answer, [3, 7, 25], 29) == 1.0
    assert judged(answer, [25, 3, 7], 29, chat=True) == 1.0


def test_fractions_on_the_way_are_exact():
    """Floats come out beside the target."""
    assert judged("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24) == 1.0
    assert judged("1 / 49 * 49", [1, 49, 49], 1) == 1.0
    assert 8 / (3 - 8 / 3) != 24
    assert 1 / 49 * 49 != 1


WRONG = {
    "another value": "25 + 7 + 3",
    "a number left out": "25 + 4",
    "a number twice": "25 + 7 - 3 + 7 - 7",
    "a number of its own": "29",
    "numbers run together": "257 - 3",
    "a leading zero": "025 + 7 - 3",
    "the equation": "25 + 7 - 3 = 29",
    "the target too": "25 + 7 - 3 + 29 - 29",
    "words": "the answer is 25 + 7 - 3",
    "nothing": "",
    "an unclosed parenthesis": "(25 + 7 - 3",
    "two expressions": "25 + 7, 3",
    "a line break inside": "25 + 7\n- 3",
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_anything_else_is_wrong(answer):
    assert judged(answer, [3, 7, 25], 29) == 0.0


@pytest.mark.parametrize(
    ("answer", "numbers", "target"),
    [("2 ** 3", [2, 3], 8), ("8 // 2", [8, 2], 4), ("7 % 4", [7, 4], 3), ("6 | 1", [6, 1], 7), ("~3 + 8", [3, 8], 4)],
    ids=["power", "floor division", "remainder", "or", "not"],
)
def test_operations_that_the_game_does_not_have_are_wrong_even_if_they_reach_it(answer, numbers, target):
    assert eval(answer) == target
    assert judged(answer, numbers, target) == 0.0


def test_a_number_given_twice_is_used_twice():
    assert judged("5 + 5", [5, 5], 10) == 1.0
    assert judged("5 * 2", [5, 5], 10) == 0.0
    assert judged("10 / 2 + 5", [5, 5], 10) == 0.0


@pytest.mark.parametrize("answer", ["3 / (7 - 7)", "3 / 0"])
def test_a_division_by_zero_is_wrong(answer):
    assert judged(answer, [3, 7, 7], 0) == 0.0


def test_an_answer_that_is_not_tagged_is_wrong():
    for text in ("2 * 3", "<answer>2 * 3", "2 * 3</answer>"):
        assert countdown.correct(["?"], [text], numbers=[[2, 3]], target=[6]) == [0.0]


@settings(deadline=None)
@given(st.text(max_size=300) | st.text("0123456789+-*/() .eEjx_,\n", max_size=300))
def test_no_text_makes_the_verifier_fail(answer):
    assert judged(answer, [1, 2, 3], 7) in (0.0, 1.0)


EXPRESSIONS = st.recursive(
    st.integers(1, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda x: f"({x[0]} {x[1]} {x[2]})"),
    max_leaves=6,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_the_value_is_that_of_python_with_fractions(expression):
    """Against `eval` of the same text with every number written as a Fraction."""
    words = expression.replace("(", "( ").replace(")", " )").split()
    python = " ".join(f"Fraction({word})" if word.isdigit() else word for word in words)
    try:
        expected = eval(python)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            countdown.evaluate(expression)
        return
    value, used = countdown.evaluate(expression)
    assert value == expected
    assert used == [int(word) for word in words if word.isdigit()]


# ----------------------------------------------------------------------------- hostile

HOSTILE = {
    "a command": "__import__('os').system('touch {path}')",
    "a file": "open('{path}', 'w')",
    "a command in a number's place": "25 + 7 - [3, open('{path}', 'w')][0]",
    "a lambda": "(lambda: open('{path}', 'w'))()",
    "a walrus": "(x := open('{path}', 'w'))",
    "an f-string": 'f"{{open({path!r}, chr(119))}}"',
    "an attribute": "(25).__class__.__base__.__subclasses__()",
    "a power tower": "9**9**9**9",
    "a shift": "1<<10**10",
    "a huge number": "9" * 1_000_000,
    "a long sum": "+".join(["1"] * 500_000),
    "deep parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "less deep parentheses": "(" * 99 + "1" + ")" * 99,
    "deep signs": "-" * 190 + "1",
    "signs without end": "-" * 1_000_000 + "1",
    "deep calls": "1" + "()" * 95,
    "other digits": "２５ + ７ - ３",
    "Arabic digits": "٢٥ + ٧ - ٣",
    "superscripts": "25² + 7",
    "a fraction sign": "½ + 25",
    "another minus": "25 + 7 − 3",
    "floats": "25.0 + 7 - 3",
    "an exponent": "25e0 + 7 - 3",
    "an underscore": "2_5 + 7 - 3",
    "hexadecimal": "0x19 + 7 - 3",
    "a complex number": "25j",
    "a null": "25 + 7 - 3\0",
    "a comment": "25 + 7 - 3 # 29",
    "a comparison": "25 + 7 - 3 == 29",
    "true": "True + 28",
    "a string": "'29'",
    "a call of a number": "25(7)(3)",
    "a generator": "sum(x for x in [25, 7, -3])",
    "a lone surrogate": "25 + 7 - 3\ud800",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_hostile_expressions_are_wrong_at_once_and_nothing_of_them_runs(answer, tmp_path):
    path = tmp_path / "written"
    answer = answer.format(path=path) if "{path" in answer else answer
    began = time.perf_counter()
    assert judged(answer, [3, 7, 25], 29) == 0.0
    assert time.perf_counter() - began < 0.5
    assert not path.exists()


def test_the_limits_of_length_and_depth_are_kept_to_the_character():
    deepest = "+".join(["1"] * (countdown.MAX_DEPTH + 1))
    assert countdown.evaluate(deepest)[0] == countdown.MAX_DEPTH + 1
    with pytest.raises(ValueError, match="more than 30 operations inside each other"):
        countdown.evaluate(deepest + "+1")
    assert countdown.evaluate(" " * (countdown.MAX_LENGTH - 1) + "1")[0] == 1
    with pytest.raises(ValueError, match="not an expression"):
        countdown.evaluate(" " * countdown.MAX_LENGTH + "1")
