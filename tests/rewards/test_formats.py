"""Rewards for tags."""

import re

import pytest
from calls import score
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_jax import rewards

FORMATS = {  # text, format, strict_format, tag_count
    "right": ("<think>a</think><answer>b</answer>", 1, 1, 1),
    "white space between": ("<think>a</think> \n\t<answer>b</answer>", 1, 1, 1),
    "a newline at the end": ("<think>a</think><answer>b</answer>\n", 1, 1, 1),
    "newlines inside": ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1, 1, 1),
    "empty pairs": ("<think></think><answer></answer>", 1, 1, 1),
    "two newlines at the end": ("<think>a</think><answer>b</answer>\n\n", 1, 0, 1),
    "a space at the end": ("<think>a</think><answer>b</answer> ", 1, 0, 1),
    "a newline first": ("\n<think>a</think><answer>b</answer>", 1, 0, 1),
    "text first": ("so<think>a</think><answer>b</answer>", 1, 0, 1),
    "text between": ("<think>a</think>so<answer>b</answer>", 1, 0, 1),
    "text last": ("<think>a</think><answer>b</answer>so", 1, 0, 1),
    "only the thoughts": ("<think>a</think>b", 0.5, 0, 0.5),
    "only the answer": ("a<answer>b</answer>", 0.5, 0, 0.5),
    "answer not closed": ("<think>a</think><answer>b", 0.5, 0, 0.75),
    "thoughts not opened": ("a</think><answer>b</answer>", 0.5, 0, 0.75),
    "two answers": ("<think>a</think><answer>b</answer><answer>c</answer>", 0.5, 0, 0.5),
    "a tag twice": ("<think>a<think></think><answer>b</answer>", 0.5, 0, 0.75),
    "a close too many": ("<think>a</think><answer>b</answer></answer>", 0.5, 0, 0.75),
    "turned round": ("</think>a<think><answer>b</answer>", 0.5, 0, 1),
    "out of order": ("<answer>b</answer><think>a</think>", 0.5, 0, 1),
    "nested": ("<think>a<answer>b</answer></think>", 0.5, 0, 1),
    "nested the other way": ("<answer><think>a</think>b</answer>", 0.5, 0, 1),
    "crossed": ("<think>a<answer></think>b</answer>", 0.5, 0, 1),
    "all turned round": ("</answer></think><answer><think>", 0, 0, 1),
    "another case": ("<THINK>a</THINK><Answer>b</Answer>", 0, 0, 0),
    "no tags": ("a", 0, 0, 0),
    "nothing": ("", 0, 0, 0),
}


@pytest.mark.parametrize("case", FORMATS)
def test_the_format_of_a_text(case):
    written, *expected = FORMATS[case]
    found = [score(reward(), written) for reward in (rewards.soft_format, rewards.strict_format, rewards.tag_count)]
    assert found == expected


STRICT = re.compile(r"^<think>(.*?)</think>\s*<answer>(.*?)</answer>$", re.DOTALL)
MARKS = ["<think>", "</think>", "<answer>", "</answer>"]


def strictly(written):
    """The rule as it is published: the regular expression, and each tag once."""
    match = STRICT.search(written)
    return match if match and all(len(written.split(mark)) == 2 for mark in MARKS) else None


FRAGMENTS = st.sampled_from([*MARKS, *MARKS, "", "a", " ", "\n", "\u2003", "<", "think>", "<think>a</think>"])


@settings(deadline=None, max_examples=500)
@given(st.lists(FRAGMENTS, max_size=9).map("".join) | st.permutations(MARKS).map("".join))
@example("<think></think>\u2003<answer></answer>\n")
@example("<think></think><answer></answer>\n\n")
@example("<think></think><answer></answer>\r")
def test_the_strict_format_is_that_of_the_regular_expression(written):
    match = strictly(written)
    assert score(rewards.strict_format(), written) == float(match is not None)
    length = len(match[1]) if match else 0
    assert score(rewards.reasoning_length(per=3), written) == min(length / 3, 1)
    if match:
        assert score(rewards.soft_format(), written) == 1.0


def test_other_tags_and_other_numbers_of_them():
    one, three = ("thought",), ("plan", "code", "test")
    assert score(rewards.strict_format(tags=one), "<thought>a</thought>") == 1.0
    assert score(rewards.strict_format(tags=one), "<think>a</think>") == 0.0
    written = "<plan>a</plan><code>b</code>"
    assert score(rewards.soft_format(tags=three), written) == 2 / 3
    assert score(rewards.tag_count(tags=three), written + "<test>") == 5 / 6
    assert score(rewards.strict_format(tags=three), written + "<test></test>") == 1.0
    assert score(rewards.reasoning_length(tags=three, per=4), "<plan>ab</plan><code></code><test></test>") == 0.5


@pytest.mark.parametrize("tags", ["think", (), ("a", "a"), ("",), ("<think>",), (1,)], ids=str)
def test_tags_that_are_none_are_refused(tags):
    for make in (
        rewards.soft_format,
        rewards.strict_format,
        rewards.tag_count,
        rewards.reasoning_length,
        rewards.language_consistency,
    ):
        with pytest.raises(ValueError, match=r"tags are different names without brackets, .* got"):
            make(tags=tags)


# --------------------------------------------------------- tags that the prompt opens

CONTINUED = "a</think><answer>b</answer>"
NOT_THINKING = "assistant\n<think>\n\n</think>\n\n"  # Qwen3's template with enable_thinking=False
OPENED = {  # the prompt's tail, the completion, then soft_format, strict_format, tag_count
    "R1-Distill, right": ("<think>\n", CONTINUED, 1, 1, 1),
    "R1-Distill, a second opening": ("<think>\n", f"<think>{CONTINUED}", 0.5, 0, 0.75),
    "Qwen3-Thinking, right": ("assistant\n<think>\n", CONTINUED, 1, 1, 1),
    "Qwen3-Thinking, a second opening": ("assistant\n<think>\n", f"<think>{CONTINUED}", 0.5, 0, 0.75),
    "Qwen3 without thinking": (NOT_THINKING, "<answer>b</answer>", 1, 1, 1),
    "Qwen3 without thinking, thoughts": (NOT_THINKING, f"<think>{CONTINUED}", 0.5, 0, 0.5),
    "a base model's prompt": ("Think in <think> and <answer> tags.\nLet me see.\n<think>", CONTINUED, 1, 1, 1),
    "a turn begun": ("assistant\n<think>\nOkay, so", " a</think><answer>b</answer>", 1, 1, 1),
    "an instruction": ("Use <think> </think> and <answer> </answer>. 3+4?\n", f"<think>{CONTINUED}", 1, 1, 1),
    "an instruction opens nothing": ("Use <think> </think> and <answer> </answer>. 3+4?\n", CONTINUED, 0.5, 0, 0.75),
    "no tag": ("assistant\n", f"<think>{CONTINUED}", 1, 1, 1),
    "no tail": ("", f"<think>{CONTINUED}", 1, 1, 1),
    "no text": (None, f"<think>{CONTINUED}", 1, 1, 1),
}


@pytest.mark.parametrize("case", OPENED)
def test_a_completion_goes_on_from_the_tag_that_its_prompt_opens(case):
    tail, completion, *expected = OPENED[case]
    makers = (rewards.soft_format, rewards.strict_format, rewards.tag_count)
    assert [score(make(), completion, prompt_tail=tail) for make in makers] == expected
    messages = [{"role": "assistant", "content": completion}]
    assert [score(make(), messages, prompt_tail=tail) for make in makers] == expected


def test_the_reasoning_that_counts_is_the_completions():
    for tail in ("<think>\n", "assistant\n<think>\nOkay, so"):
        assert score(rewards.reasoning_length(per=4), "ab</think><answer>7</answer>", prompt_tail=tail) == 0.5
    assert score(rewards.reasoning_length(per=4), "<answer>7</answer>", prompt_tail=NOT_THINKING) == 0.0
