"""Comparisons within a group, against a local service that prefers the longer answer, or a place."""

import re

import pytest
from service import Service, says

from grpo_jax.rewards.comparing import listwise, pairwise

QUICK = {"backoff": 0.01, "timeout": 5.0, "retries": 0}


def shown(request, name):
    question = request["messages"][0]["content"]
    return re.findall(rf"<<<{name} \w+\n(.*?)\n{name} \w+>>>", question, re.DOTALL)


def longer(request, number):
    (first,), (second,) = shown(request, "FIRST"), shown(request, "SECOND")
    if "?" in (first, second):
        return says("Who knows.")
    return says("Reasons.\n" + ("tie" if len(first) == len(second) else ["second", "first"][len(first) > len(second)]))


def by_length(request, number):
    answers = shown(request, r"ANSWER \d+")
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
    return says("Reasons.\n" + " > ".join(str(i + 1) for i in order))


COMPLETIONS = ["a", "aaa", "aa", "aa", "b", "bb", "bbb", "bbbb"]
PROMPTS = ["p"] * 4 + ["q"] * 4


def test_a_completion_gets_the_share_of_its_comparisons_that_it_wins():
    with Service(longer) as service:
        reward = pairwise(service.url, "tiny", group_size=4, **QUICK)
        found = reward(PROMPTS, COMPLETIONS)
    assert found == pytest.approx([0.0, 1.0, 0.5, 0.5, 0.0, 1 / 3, 2 / 3, 1.0])
    assert len(service.requests) == 2 * 4 * 3
    assert reward.group_size == 4


def test_with_fewer_opponents_each_has_as_many_comparisons():
    with Service(longer) as service:
        found = pairwise(service.url, "tiny", group_size=4, opponents=1, **QUICK)(PROMPTS, COMPLETIONS)
    # A ring: each meets the one after it and the one before it.
    assert found == pytest.approx([0.0, 1.0, 0.25, 0.75, 0.0, 0.5, 0.5, 1.0])
    assert len(service.requests) == 2 * 4 * 2


def test_a_judge_that_prefers_a_place_moves_nobody():
    with Service(lambda request, number: says("first")) as service:
        assert pairwise(service.url, "tiny", group_size=4, **QUICK)(PROMPTS, COMPLETIONS) == [0.5] * 8


def test_a_pair_of_which_one_order_has_no_answer_moves_nobody():
    def first_or_nothing(request, number):
        (first,), (second,) = shown(request, "FIRST"), shown(request, "SECOND")
        return says("" if (first, second) == ("b", "a") else "first")

    with Service(first_or_nothing) as service:
        reward = pairwise(service.url, "tiny", group_size=3, **QUICK)
        assert reward(["p"] * 3, ["a", "b", "c"]) == [0.5] * 3


def test_equal_texts_are_ranked_alike():
    with Service(by_length) as service:
        found = listwise(service.url, "tiny", group_size=4, **QUICK)(PROMPTS, [*COMPLETIONS[:4], "b", "b", "b", "bb"])
    assert found == pytest.approx([0.0, 1.0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3, 1.0])


@pytest.mark.parametrize("make", [pairwise, listwise])
def test_of_conversations_only_what_the_policy_wrote_is_compared(make):
    def talk(text):
        return [{"role": "assistant", "content": text}, {"role": "tool", "content": "secret"}]

    with Service(lambda request, number: says("tie")) as service:
        make(service.url, "tiny", group_size=2, **QUICK)([[{"role": "user", "content": "p"}]] * 2, [*map(talk, "ab")])
        assert service.requests
        assert not any("secret" in request["messages"][0]["content"] for _, request in service.requests)


def test_comparisons_without_an_answer_do_not_count():
    logged = {}
    with Service(longer) as service:
        reward = pairwise(service.url, "tiny", group_size=3, **QUICK)
        found = reward(["p"] * 3, ["a", "?", "aa"], log_metric=logged.__setitem__)
    assert found == [0.0, None, 1.0]
    assert logged == {"pairwise/failed": 4 / 6}


def test_a_ranking_gives_its_places_whatever_the_order_that_it_was_shown_in():
    with Service(by_length) as service:
        reward = listwise(service.url, "tiny", group_size=4, orders=2, concurrency=1, **QUICK)
        completions = ["a", "aaa", "aa", "aaaa", *COMPLETIONS[4:]]
        found = reward(PROMPTS, completions)
        orders = [shown(request, r"ANSWER \d+") for _, request in service.requests]
        assert reward(PROMPTS, completions) == found
    assert found == pytest.approx([0.0, 2 / 3, 1 / 3, 1.0, 0.0, 1 / 3, 2 / 3, 1.0])
    assert orders == [shown(request, r"ANSWER \d+") for _, request in service.requests[4:]]
    assert len(set(map(tuple, orders))) > 2


@pytest.mark.parametrize("answer", ["1 > 2", "1 > 2 > 2", "0 > 1 > 2", "none"])
def test_a_ranking_that_cannot_be_read_masks_its_group(answer):
    with Service(lambda request, number: says(answer)) as service:
        assert listwise(service.url, "tiny", group_size=3, **QUICK)(["p"] * 3, list("abc")) == [None] * 3


@pytest.mark.parametrize(
    ("answer", "expected"), [("<think>\n1 > 2", [None, None]), ("<think>no</think>\n1 > 2", [0, 1])]
)
def test_a_ranking_among_thoughts_is_none(answer, expected):
    with Service(lambda request, number: says(answer)) as service:
        found = listwise(service.url, "tiny", group_size=2, **QUICK)(["p"] * 2, list("ab"))
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("make", [pairwise, listwise])
def test_refuses_what_is_no_group(make):
    url = "http://127.0.0.1:1"
    with pytest.raises(ValueError, match="at least 2 completions, got group_size = 1"):
        make(url, "tiny", group_size=1)
    with pytest.raises(ValueError, match="3 completions are no whole groups of group_size = 2"):
        make(url, "tiny", group_size=2)(["p"] * 3, list("abc"))
    with pytest.raises(ValueError, match="0 to 1 are one group with different prompts"):
        make(url, "tiny", group_size=2)(["p", "q"], list("ab"))
    with pytest.raises(ValueError, match=r"to 1 in a group of 4, got 2: more would meet twice|at least 1, got 0"):
        make(url, "tiny", group_size=4, **({"opponents": 2} if make is pairwise else {"orders": 0}))
