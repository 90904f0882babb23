"""The majority of a group."""

import itertools

import pytest
from calls import scores

from grpo_jax import rewards


def answered(letters):
    return [f"<answer>{letter}</answer>" if letter != "-" else "none" for letter in letters]


@pytest.mark.parametrize(
    ("group", "chosen"),
    [
        ("aaab", "a"),
        ("abbb", "b"),
        ("aabc", "a"),
        ("aabb", ""),
        ("abcd", ""),
        ("a---", "a"),
        ("----", ""),
        ("ab--", ""),
        ("aaaa", "a"),
    ],
)
def test_the_majority_of_a_group_is_rewarded(group, chosen):
    """A tie has no majority, and a completion without an answer no vote."""
    for order in set(itertools.permutations(group)):
        expected = [1.0 if letter in chosen else -0.1 for letter in order]
        assert scores(rewards.self_consistency(group_size=4), answered(order)) == expected


def test_each_group_votes_for_itself():
    reward = rewards.self_consistency(group_size=3, majority=2.0, other=-1.0)
    completions = answered("aab") + answered("bba")
    assert reward(prompts=["p"] * 3 + ["q"] * 3, completions=completions) == [2, 2, -1, 2, 2, -1]


def test_answers_are_what_extract_says():
    reward = rewards.self_consistency(group_size=3, extract=lambda written: written.lower() or None)
    assert scores(reward, ["A", "a", "b"]) == [1.0, 1.0, -0.1]
    assert scores(reward, ["", "", "b"]) == [-0.1, -0.1, 1.0]


def test_an_empty_answer_has_no_vote():
    reward = rewards.self_consistency(group_size=3)
    assert scores(reward, ["<answer></answer>", "<answer> </answer>", "<answer>5</answer>"]) == [-0.1, -0.1, 1.0]
    written = rewards.self_consistency(group_size=3, extract=str)
    assert scores(written, [" ", " ", "5"]) == [-0.1, -0.1, 1.0]


@pytest.mark.parametrize("group_size", [1, 0, -3])
def test_a_group_of_less_than_two_is_refused(group_size):
    with pytest.raises(ValueError, match=f"got group_size = {group_size}"):
        rewards.self_consistency(group_size=group_size)


def test_what_are_no_groups_of_one_prompt_is_an_error():
    reward = rewards.self_consistency(group_size=2)
    with pytest.raises(ValueError, match="3 completions are no whole groups of group_size = 2"):
        scores(reward, ["a"] * 3)
    with pytest.raises(ValueError, match="completions 2 to 3 are one group with different prompts"):
        reward(prompts=["p", "p", "p", "q"], completions=["a"] * 4)
