"""Rubrics, against a local service that finds criteria met by a rule."""

import re

import pytest
from service import Service, says

from grpo_jax.rewards.rubrics import rubric, yes_or_no

QUICK = {"backoff": 0.01, "timeout": 5.0, "retries": 0}


def met_if_contained(request, number):
    """A criterion is met where the answer has it as a word; one that is called broken gets no answer."""
    question = request["messages"][0]["content"]
    answer = re.search(r"<<<ANSWER \w+\n(.*?)\nANSWER", question, re.DOTALL)[1]
    criterion = re.search(r"<<<CRITERION \w+\n(.*?)\nCRITERION", question, re.DOTALL)[1]
    if criterion == "broken":
        return says("I cannot tell.")
    return says(f"Some reasons.\n**{'Yes' if criterion in answer.split() else 'No'}.**")


def weighted(criterion, weight):
    return {"criterion": criterion, "weight": weight}


def test_the_reward_is_the_weighted_share_and_faults_take_away():
    logged = {}
    rubrics = [
        [weighted("units", 3.0), weighted("work", 1.0)],
        ["units", "work"],
        [weighted("units", 2.0), weighted("work", 2.0), weighted("insult", -1.0)],
        [weighted("units", 1.0), weighted("insult", -5.0)],
        ["units", "broken"],
    ]
    completions = ["units", "work units", "units insult", "insult", "units"]
    with Service(met_if_contained) as service:
        reward = rubric(service.url, "tiny", **QUICK)
        found = reward(["?"] * 5, completions, rubric=rubrics, log_metric=logged.__setitem__)
    assert found == [0.75, 1.0, (2 - 1) / 4, 0.0, None]
    assert logged == {"rubric/failed": 1 / 11}
    assert len(service.requests) == 11
    assert reward.__name__ == "rubric"


def test_what_a_user_or_a_tool_said_meets_no_criterion():
    said = [("assistant", "I know"), ("user", "units"), ("tool", "units"), ("assistant", "work")]
    completion = [{"role": role, "content": text} for role, text in said]
    with Service(met_if_contained) as service:
        reward = rubric(service.url, "tiny", **QUICK)
        assert reward([[{"role": "user", "content": "?"}]], [completion], rubric=[["units", "work"]]) == [0.5]


def test_question_and_parser_may_be_ones_own():
    with Service(lambda request, number: says(request["messages"][0]["content"])) as service:
        reward = rubric(
            service.url, "tiny", column="list", parse=float,
            ask=lambda prompt, completion, criterion, row: str(len(criterion) / row["length"]), **QUICK,
        )  # fmt: skip
        assert reward(["?"], ["x"], list=[["ab", "abcd"]], length=[4]) == [0.75]


@pytest.mark.parametrize(("text", "found"), [("Yes", 1.0), ("x\nno.", 0.0), ("yes\nperhaps", None), ("", None)])
def test_the_last_line_is_yes_or_no(text, found):
    assert yes_or_no(text) == found


@pytest.mark.parametrize("value", [None, "be kind", [], [{"criterion": "x", "weight": -1.0}], [weighted("x", 1e999)]])
def test_a_row_without_criteria_is_refused(value):
    with pytest.raises(ValueError, match=r"column 'rubric' of a row has no list of criteria .* weighs above 0"):
        rubric("http://127.0.0.1:1", "tiny", **QUICK)(["?"], ["x"], rubric=[value])


@pytest.mark.parametrize("one", [{"criterion": "an insult", "points": -5}, {"description": "x", "weight": 1}, 3])
def test_a_criterion_of_another_form_is_refused_and_not_taken_for_a_merit(one):
    """HealthBench's `points` below 0 would else weigh 1."""
    with pytest.raises(ValueError, match=r"a criterion of the column 'rubric' .* `weight` .*, got "):
        rubric("http://127.0.0.1:1", "tiny", **QUICK)(["?"], ["x"], rubric=[["units", one]])
