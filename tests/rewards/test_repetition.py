"""The penalty for repetition."""

import math

import pytest
from calls import score, scores
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import rewards


def test_repetition_penalty_gives_the_values_of_trl():
    """The first two are the example in TRL 1.16's docstring."""
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], [], [1, 2], [1, 2, 1, 2, 1]]
    values = scores(rewards.repetition_penalty(ngram=2), [""] * 6, completion_ids=ids)
    assert values == [0, -0.75, 0, 0, 0, -0.5]
    assert scores(rewards.repetition_penalty(ngram=2, max_penalty=-0.5), [""], completion_ids=[[5] * 5]) == [-0.375]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_repetition_penalty_is_the_formula_of_trl(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    expected = (1 - len(set(grams)) / len(grams)) * -2.0 if grams else 0.0
    value = score(rewards.repetition_penalty(ngram=n, max_penalty=-2.0), "", completion_ids=ids)
    assert value == pytest.approx(expected)
    assert math.copysign(1, value) == (-1 if value else 1)  # no -0.0


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"max_penalty": 0.1}, {"max_penalty": -math.inf}], ids=str)
def test_a_penalty_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="ngram is above 0 and max_penalty at most 0, got"):
        rewards.repetition_penalty(**settings)
