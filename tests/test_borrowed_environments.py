"""Environments of others run unchanged: TRL's classes, and verifiers that are asked again."""

import json

import pytest

from grpo_jax import tools
from grpo_jax.borrowed_environments import attempts, trl_environment, with_first_observations
from grpo_jax.environments import Turn
from grpo_jax.tasks import reasoning_gym


class Counter:
    """As in TRL's documentation of `environment_factory`: a state, tools, a reward."""

    def __init__(self):
        self.client = print  # can be called and is no tool

    def reset(self, *, start, **row):
        self.count = start
        return f" You begin at {start}."

    def increment(self, by: int) -> int:
        """Adds to the counter.

        Args:
            by: how much.
        """
        self.count += by
        return self.count

    async def double(self) -> int:
        """Doubles the counter."""
        self.count *= 2
        return self.count

    async def get_reward(self) -> float:
        return self.count / 10

    def _hidden(self):
        raise AssertionError


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(respond, row, *said):
    messages, turns = [{"role": "user", "content": "x"}], []
    for text in said:
        messages.append({"role": "assistant", "content": text})
        turns.append(respond(row, messages))
        messages += turns[-1].content or []
    return turns


def told(text):
    return [{"role": "tool", "content": text}]


def test_a_class_of_trl_answers_calls_and_its_rewards_add_up_to_the_last():
    respond = trl_environment(Counter)
    assert [tool["function"]["name"] for tool in tools.schemas(respond.tools)] == ["double", "increment"]
    rows = [{"prompt": "x", "start": 3}, {"prompt": "x", "start": 5}]
    first = play(respond, rows[0], call("increment", by=4), call("double") + call("_hidden"), "done")
    second = play(respond, rows[1], call("increment", by=1))
    assert [turn.content for turn in first] == [
        told("7"),
        told("14") + told("error: there is no tool '_hidden', only double, increment"),
        None,
    ]
    assert [turn.reward for turn in first] == pytest.approx([0.7, 0.7, 0.0])
    assert second == [Turn(told("6"), pytest.approx(0.6))]  # its own object


def test_a_reward_function_of_trl_is_asked_with_the_object_of_its_conversation():
    asked = []

    def reached(prompts, completions, environments, start, **columns):
        asked.append((prompts, [message["content"] for message in completions[0]], columns))
        return [
            None if env.count > 9 else float(env.count - begin) for env, begin in zip(environments, start, strict=True)
        ]

    respond = trl_environment(Counter, reward=reached)
    turns = play(respond, {"prompt": "x", "start": 3}, call("increment", by=4), call("increment", by=3), "done")
    assert [turn.reward for turn in turns] == [4.0, None, None]  # None masks, as in TRL
    assert asked[1] == (["x"], [call("increment", by=4), "7", call("increment", by=3)], {})
    again = play(respond, {"prompt": "x", "start": 3}, call("increment", by=1), call("increment", by=2))
    assert [turn.reward for turn in again] == [1.0, 2.0]  # which add up to the last


def test_what_reset_says_belongs_to_the_prompt():
    class Changes(Counter):
        def reset(self, *, moves=(), **row):
            if moves:
                moves.clear()
            return super().reset(**row)

    rows = [
        {"prompt": "Count.", "start": 3, "moves": [1]},
        {"prompt": [{"role": "user", "content": "Count."}], "start": 4},
    ]
    text, chat = with_first_observations(Changes, rows)
    assert text == {"prompt": "Count. You begin at 3.", "start": 3, "moves": [1]}
    assert chat["prompt"] == [{"role": "user", "content": "Count. You begin at 4."}]
    assert rows[0]["prompt"] == "Count."


def test_a_class_without_reset_is_refused():
    with pytest.raises(ValueError, match=r"has a method `reset\(\*\*row\)`, and dict has none"):
        trl_environment(dict)


def test_attempts_are_scored_by_what_they_gain():
    def close(prompts, completions, answer, **columns):
        return [1.0 - abs(float(text) - right) / 10 for text, right in zip(completions, answer, strict=True)]

    respond = attempts(close, again="no", discount=0.5)
    turns = play(respond, {"prompt": "x", "answer": 8}, "3", "1", "6", "8")
    assert [turn.content for turn in turns] == ["no", "no", "no", None]
    gained = [0.5, 0.0, 0.25 * 0.3, 0.125 * 0.2]
    assert [turn.reward for turn in turns] == pytest.approx(gained)
    with pytest.raises(ValueError, match="discount is from 0 to 1, got 2"):
        attempts(close, discount=2)


def test_an_attempt_without_a_verdict_is_a_failure_and_not_wrong():
    respond = attempts(lambda prompts, completions, **columns: [None])
    with pytest.raises(ValueError, match="gave no reward for attempt 'x'"):
        play(respond, {"prompt": "?"}, "x")


def test_rewards_below_0_add_up_to_the_best_and_the_prompt_may_have_another_name():
    def below(prompts, completions, **columns):
        assert (prompts, columns) == (["?"], {})
        return [float(completions[0])]

    turns = play(attempts(below, prompt_column="question"), {"question": "?"}, "-3", "-4", "-1")
    assert [turn.reward for turn in turns] == [-3.0, 0.0, 2.0]


def test_a_task_of_reasoning_gym_is_tried_again(sandbox):
    pytest.importorskip("reasoning_gym")
    task = reasoning_gym.task(name="chain_sum", train=2, validation=2, test=2, ood=2)
    row = dict(task.splits.test[0])
    turns = play(attempts(task.verifier), row, "<answer>no idea</answer>", f"<answer>{row['answer']}</answer>")
    assert [turn.content for turn in turns] == ["That is not right. Try again.", None]
    assert sum(turn.reward for turn in turns) == pytest.approx(1.0)
