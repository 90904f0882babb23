"""Multiplication: factors of the digits asked for, answers that are their product."""

import pytest

from grpo_jax.tasks import multiplication


def digits_of(rows):
    return {tuple(len(str(factor)) for factor in row["factors"]) for row in rows}


@pytest.mark.parametrize("digits", [(1, 3), (2, 2), (4, 3)], ids=str)
def test_the_digits_dial_the_difficulty_and_the_shifted_split_has_one_more(digits):
    splits = multiplication.splits(0, digits=digits, train=100, validation=20, test=20, ood=50)
    assert digits_of([*splits.train, *splits.validation, *splits.test]) == {digits}
    assert digits_of(splits.ood) == {(digits[0] + 1, digits[1] + 1)}


def test_the_answer_is_the_product_of_the_factors_in_the_prompt():
    for row in multiplication.splits(0, train=200, validation=0, test=0, ood=100).train:
        first, second = row["factors"]
        assert row["answer"] == str(first * second)
        assert f"What is {first} * {second}?" in row["prompt"]


def test_all_problems_of_a_digit_can_be_drawn_and_no_more():
    """45 pairs of 1 to 9, whatever their order."""
    splits = multiplication.splits(0, digits=(1, 1), train=30, validation=5, test=10, ood=0)
    factors = [frozenset(row["factors"]) for rows in splits for row in rows]
    assert len(set(factors)) == 45
    with pytest.raises(ValueError, match="31 rows of train are wanted, and only 30 more"):
        multiplication.splits(0, digits=(1, 1), train=31, validation=5, test=10, ood=0)


@pytest.mark.parametrize("digits", [(0, 2), (2, -1)], ids=str)
def test_factors_without_digits_are_refused(digits):
    with pytest.raises(ValueError, match="a factor has at least 1 digit"):
        multiplication.splits(0, digits=digits)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>70 * 16 + 6 * 16</think><answer>1216</answer>", 1.0),
        ("<answer> 1,216 </answer>", 1.0),
        ("<answer>1217</answer>", 0.0),
        ("<answer>76 * 16</answer>", 0.0),
        ("<answer>1217</answer><answer>1216</answer>", 0.0),
        ("1216", 0.0),
    ],
    ids=["right", "with a comma", "wrong", "not worked out", "a second chance", "no tags"],
)
def test_the_answer_must_be_the_number(completion, reward):
    assert multiplication.task(0).verifier(["?"], [completion], answer=["1216"]) == [reward]
