"""pass@k and majority@k against enumeration and exact values."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.study.pass_at_k import majority_at_k, pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k([c], n, k) == pytest.approx([sum(map(any, subsets)) / len(subsets)], abs=1e-15)


def test_pass_at_k_takes_several_k_and_prompts_with_different_numbers_of_completions():
    found = pass_at_k([0, 1, 3], [4, 5, 6], [1, 2, 4])
    expected = [
        [1 - Fraction(math.comb(n - c, k), math.comb(n, k)) for c, n in ((0, 4), (1, 5), (3, 6))] for k in (1, 2, 4)
    ]
    np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-14)
    assert pass_at_k([1, 2], 4, [3]).shape == (1, 2)
    assert pass_at_k([1, 2], 4, 3).shape == (2,)
    assert pass_at_k([], [], 4).shape == (0,)


@pytest.mark.parametrize("c", [0, 1, 17, 9_000, 10_000])
def test_pass_at_k_of_many_completions_is_exact_where_binomials_overflow(c):
    exact = float(1 - Fraction(math.comb(10_000 - c, 500), math.comb(10_000, 500)))
    assert pass_at_k([c], 10_000, 500)[0] == pytest.approx(exact, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize(
    ("correct", "n", "k", "message"),
    [
        ([1], 4, 0, "k is from 1 to the number of completions, 4, got 0"),
        ([1], 4, 5, "4, got 5"),
        ([1, 1], [4, 2], [1, 3], r"2, got \[1, 3\]"),
        ([5], 4, 1, "0 to n are right, got"),
        ([-1], 4, 1, "0 to n are right, got"),
    ],
    ids=["k=0", "k>n", "k>least n", "c>n", "c<0"],
)
def test_pass_at_k_refuses_what_is_out_of_range(correct, n, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, n, k)


def majority_of(answers, right, subset):
    """Whether the majority of the subset is right, written out."""
    votes = {}
    for i in subset:
        if answers[i] is not None:
            votes[answers[i]] = votes.get(answers[i], 0) + 1
    if not votes:
        return False
    tied = [answer for answer in votes if votes[answer] == max(votes.values())]
    return right[min(answers.index(answer) for answer in tied)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=6), st.data())
def test_majority_at_k_is_the_mean_over_all_subsets(answers, drawn):
    k = drawn.draw(st.integers(1, len(answers)))
    right = [answer == "2" for answer in answers]
    subsets = list(itertools.combinations(range(len(answers)), k))
    expected = np.mean([majority_of(answers, right, subset) for subset in subsets])
    assert majority_at_k([answers], [right], k) == pytest.approx([expected], abs=1e-12)


def test_majority_at_1_is_the_pass_rate_and_an_answer_that_nobody_gave_is_wrong():
    answers = [["a", "b", "a", None], [None] * 4]
    right = [[True, False, True, False], [True] * 4]
    np.testing.assert_allclose(majority_at_k(answers, right, 1), [0.5, 0.0])
    np.testing.assert_allclose(majority_at_k(answers, right, 4), [1.0, 0.0])


def test_of_equally_frequent_answers_the_first_wins():
    assert majority_at_k([["x", "y", "y", "x"]], [[False, True, True, False]], 4) == [0.0]
    assert majority_at_k([["y", "x", "y", "x"]], [[True, False, True, False]], 4) == [1.0]


def test_drawn_subsets_repeat_by_their_seed_and_come_near_the_mean_over_all():
    rng = np.random.default_rng(0)
    answers = [[str(x) for x in row] for row in rng.integers(0, 3, (20, 14))]
    right = [[x == "0" for x in row] for row in answers]
    exact = majority_at_k(answers, right, 5, draws=math.comb(14, 5))
    first, again, other = (majority_at_k(answers, right, 5, draws=1000, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_allclose(first, exact, atol=0.08)  # a deviation is at most sqrt(0.25 / 1000) = 0.016
    assert abs(np.mean(first - exact)) < 0.015


@pytest.mark.parametrize(
    ("answers", "right", "k", "message"),
    [
        ([["a"]], [[True]], 2, "1 of prompt 0, got 2"),
        ([["a"]], [[True, False]], 1, "prompt 0 has 1 answers, of which 2"),
        ([["a"]], [], 1, "answers of 1 prompts, but right or wrong of 0"),
    ],
    ids=["k>n", "lengths", "prompts"],
)
def test_majority_refuses_what_does_not_go_together(answers, right, k, message):
    with pytest.raises(ValueError, match=message):
        majority_at_k(answers, right, k)
