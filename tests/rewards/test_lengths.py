"""Rewards for length."""

import asyncio
import math

import numpy as np
import pytest
from calls import score, scores

from grpo_jax import rewards


def test_reasoning_is_measured_in_characters_up_to_a_thousand():
    def reasoned(n):
        return f"<think>{'é' * n}</think><answer>7</answer>"

    completions = [reasoned(n) for n in (0, 1, 250, 999, 1000, 1001, 5000)]
    assert scores(rewards.reasoning_length(), completions) == [0, 0.001, 0.25, 0.999, 1, 1, 1]
    assert score(rewards.reasoning_length(), reasoned(500) + "!") == 0.0


@pytest.mark.parametrize("per", [0, -1, math.nan])
def test_reasoning_per_no_characters_is_refused(per):
    with pytest.raises(ValueError, match=f"a number of characters above 0, got {per}"):
        rewards.reasoning_length(per=per)


def test_soft_overlong_gives_the_values_of_trl():
    """The example in TRL 1.16's docstring is 90 of 100 tokens, 20 of them cache: -0.5."""
    lengths = [0, 80, 81, 90, 99, 100, 101, 500]
    values = scores(rewards.soft_overlong(100, 20), [""] * 8, completion_ids=[[1] * n for n in lengths])
    np.testing.assert_allclose(values, [0, 0, -0.05, -0.5, -0.95, -1, -1, -1])


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_a_cache_out_of_range_is_refused(cache):
    with pytest.raises(ValueError, match=f"cache is above 0 and at most max_tokens = 100, got {cache}"):
        rewards.soft_overlong(100, cache)


def test_cosine_length_gives_the_values_of_trl():
    """The example in TRL 1.16's docstring is a right and a wrong answer of 50 of 100 tokens: 0.75, -0.75."""
    reward = rewards.cosine_length(rewards.exact_answer(), rewards.cosine_scale(100))
    lengths = [0, 25, 50, 100, 1000]
    ids = [[1] * n for n in lengths]
    quarter = 0.25 * (1 + math.sqrt(0.5))
    right = scores(reward, ["#### 7"] * 5, answer=["7"] * 5, completion_ids=ids)
    np.testing.assert_allclose(right, [1, 0.5 + quarter, 0.75, 0.5, 0.5])
    wrong = scores(reward, ["#### 8"] * 5, answer=["7"] * 5, completion_ids=ids)
    np.testing.assert_allclose(wrong, [-1, -0.5 - quarter, -0.75, -0.5, -0.5])


def test_cosine_length_takes_any_verifier_and_its_ends_are_arguments():
    def verifier(completions, level):
        return [level_ if completion else 2.0 for completion, level_ in zip(completions, level, strict=True)]

    ends = {"min_wrong": -4.0, "max_wrong": -3.0, "min_correct": 3.0, "max_correct": 4.0}
    reward = rewards.cosine_length(verifier, rewards.cosine_scale(2, **ends), threshold=1.0)
    ids = [[], [1, 1], [], [1, 1], []]
    values = scores(
        reward, ["a", "a", "", "", "a"], level=[1.0, 1.0, 0.0, 0.0, None], completion_ids=ids, other=[0] * 5
    )
    assert values == [-4.0, -3.0, 4.0, 3.0, None]


def test_partial_credit_up_to_one_half_and_punishment_are_no_right_answer():
    reward = rewards.cosine_length(lambda **columns: [0.5, 0.51, -0.1, 1], rewards.cosine_scale(1))
    assert scores(reward, [""] * 4, completion_ids=[[]] * 4) == [-1.0, 1.0, -1.0, 1.0]


def test_a_verifier_that_returns_infinity_is_refused_and_nan_masks_its_completion():
    def reward(value):
        return rewards.cosine_length(lambda **columns: [0.0, value], rewards.cosine_scale(1))

    with pytest.raises(ValueError, match="returned inf for completion 1"):
        scores(reward(math.inf), [""] * 2, completion_ids=[[]] * 2)
    with pytest.warns(RuntimeWarning, match="returned NaN for 1 of 2 completions"):
        assert scores(reward(math.nan), [""] * 2, completion_ids=[[]] * 2) == [-1.0, None]


def test_a_verifier_that_returns_too_few_values_is_named():
    def short(**columns):
        return [1.0]

    with pytest.raises(ValueError, match="the reward function short returned 1 values for 2 completions"):
        scores(rewards.cosine_length(short, rewards.cosine_scale(1)), ["", ""], completion_ids=[[], []])


def test_an_async_verifier_is_waited_for():
    async def remote(completions):
        await asyncio.sleep(0)
        return [1.0, 0.0, None]

    class Remote:
        async def __call__(self, completions):
            return await remote(completions)

    for function in (remote, Remote()):
        reward = rewards.cosine_length(function, rewards.cosine_scale(1))
        assert scores(reward, [""] * 3, completion_ids=[[]] * 3) == [1.0, -1.0, None]


@pytest.mark.parametrize("max_length", [0, -5])
def test_no_length_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length is a number of tokens above 0, got {max_length}"):
        rewards.cosine_scale(max_length)
