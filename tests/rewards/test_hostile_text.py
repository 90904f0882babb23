"""Hostile completions: time, stack and values of all rewards on text."""

import subprocess
import sys

import pytest
from calls import score, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import MAKERS

from grpo_jax import rewards

HOSTILE = """
import signal, sys
signal.setitimer(signal.ITIMER_VIRTUAL, 150)  # of its own processor time: kills it, if others are slow or not
from grpo_jax import rewards
N = 1_000_000
completions = [
    "<" * N, "<think>" * (N // 7), "<answer>" * (N // 8), "#" * N, "\\n" * N, "x" * N, "(" * N, "-" * N, "=" * N,
    "9" * N, "9" * N + "+1=2", "1+" * (N // 2) + "1=2", "1=" * (N // 2), "(1" * (N // 2) + "=2", "1 " * (N // 2) + "=2",
    "111," * (N // 4) + "1111=2", " " * N + "3+4=7", "((1+1)" * (N // 6) + "=2", ".1" * (N // 2) + "=3",
    ("9" * 39 + "/" + "8" * 39 + "*" + "7" * 39 + "/" + "3" * 39 + "=1\\n") * (N // 165),
    "<think></think>" + " " * N + "<answer></answer", "<think>" + "<answer></think>" * (N // 16) + "</answer>",
    "".join(map(chr, range(32, 0xD800))) * 18, "<answer>" + "1," * (N // 2) + "</answer>",
    "<answer>" + "1" * N + "</answer>",
]
makers = [
    rewards.exact_answer, lambda: rewards.exact_answer(tolerance=0), rewards.soft_format, rewards.strict_format,
    rewards.tag_count, rewards.reasoning_length, rewards.worked_steps, rewards.language_consistency,
    lambda: rewards.self_consistency(group_size=2),
]
for make in makers:
    for completion in completions:
        values = make()(["p", "p"], [completion, ""], answer=["2", "2"])
        assert all(-1 <= value <= 1 for value in values), (make, completion[:20], values)
ids = [[1] * N, list(range(N // 4))]
assert rewards.repetition_penalty()(["p"] * 2, [""] * 2, completion_ids=ids)[1] == 0
print("done")
"""


@pytest.mark.slow
def test_hostile_completions_of_a_megabyte_take_time_that_grows_with_their_length_only():
    """In seconds; the square of a megabyte would be hours."""
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "done\n", (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("depth", [10, 60, 99, 100, 101, 5000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("-(", ")"), ("-", "")], ids=["(", "-(", "-"])
def test_deep_nesting_is_read_or_passed_over_without_exhausting_the_stack(opening, closing, depth):
    written = f"{opening * depth}1+1{closing * depth}=2"
    assert score(rewards.worked_steps(), written) in (0.0, 1.0)


@pytest.mark.parametrize("digits", [38, 40, 41, 5000, 100_000])
def test_long_numbers_are_computed_exactly_up_to_forty_digits_and_then_passed_over(digits):
    """Python itself refuses to read more than 4300 digits."""
    number = "1" * (digits - 1) + "3"
    assert score(rewards.worked_steps(), f"{number}+1={number[:-1]}4") == float(digits <= 40)
    assert score(rewards.worked_steps(), f"1+1=2\n{number}+1={number}") == (0.5 if digits <= 40 else 1.0)


def test_nothing_that_a_completion_holds_is_run():
    written = "__import__('os').abort()+1=2\n(lambda: 1)()+1=2\n<answer>__import__('os').abort()</answer>"
    assert score(rewards.worked_steps(), written) == 0.0
    assert score(rewards.exact_answer(tolerance=0), written, answer="1") == 0.0


ANYTHING = st.text(st.sampled_from("0123456789+-*/x×()=.,$ \n%^<>\\ab²−") | st.characters(), max_size=60)


@settings(deadline=None, max_examples=500)
@given(ANYTHING, ANYTHING, st.lists(st.integers(0, 5), max_size=8))
def test_any_text_gets_a_finite_reward_or_none(written, other, ids):
    wrapped = f"<think>{written}</think><answer>{other}</answer>"
    columns = {"answer": [other, written], "completion_ids": [ids, ids[::-1]]}
    for make in [*MAKERS, lambda: rewards.exact_answer(tolerance=0)]:
        values = scores(make(), [written, wrapped], **columns)
        assert all(value is None or -1 <= value <= 1 for value in values)  # None where the reference is empty
