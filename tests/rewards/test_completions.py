"""The text of a completion."""

import pytest

from grpo_jax import rewards


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("a", "a"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"content": "a"}], "a"),
        ([], ""),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        (
            [
                {"role": "assistant", "content": "a"},
                {"role": "tool", "content": "<answer>7</answer>"},
                {"role": "assistant", "content": "b"},
            ],
            "a\nb",
        ),
    ],
    ids=["text", "message", "no role", "no message", "no content", "only calls", "parts", "a tool between"],
)
def test_the_text_of_a_completion_is_what_the_model_wrote(completion, expected):
    assert rewards.text_of(completion) == expected


@pytest.mark.parametrize("completion", [None, 7, ["a"], {"content": 3}.keys(), b"abc"], ids=str)
def test_what_is_no_completion_is_refused(completion):
    with pytest.raises(TypeError, match="a completion is text or a list of chat messages, got"):
        rewards.text_of(completion)
