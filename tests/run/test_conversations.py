"""The settings of scripts for environments and tools: what the policy is told, and who answers it."""

import dataclasses
import sys

import pytest

from grpo_jax import sampling
from grpo_jax.environments import Turn
from grpo_jax.run.conversations import ConversationSettings
from grpo_jax.testing import tiny_tokenizer

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<tool_call>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = '''
def shout(text: str) -> str:
    """Says it louder.

    Args:
        text: what to say.
    """
    return text.upper()

def respond(row, messages):
    from grpo_jax.environments import Turn
    return Turn("go on")

def with_tools(row, messages):
    return None

with_tools.tools = [shout]

def make():
    return lambda row, messages: None
'''
ROWS = [{"prompt": "say hello"}]
SAMPLER = sampling.sampler(group_size=2, max_tokens=64, eos_ids=(1,))


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    (tmp_path / "talked.py").write_text(TOOLS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "talked", raising=False)


def tokenizer_with_tools():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_turns": 3}, "--max-turns 3 is"),
        ({"keep_history": True}, "--keep-history is"),
        ({"answer_timeout": 5.0}, "--a"),
    ],
    ids=["turns", "history", "timeout"],
)
def test_limits_of_conversations_without_one_are_refused(settings, flag):
    with pytest.raises(ValueError, match=f"{flag}.* of conversations"):
        ConversationSettings(**settings).talk(tiny_tokenizer(), ROWS)


@pytest.mark.parametrize("named", [{"tools": ("talked:shout",)}, {"environment": "talked:with_tools"}])
def test_the_template_tells_the_policy_of_its_tools_and_their_answers_come_back(named):
    tokenizer = tokenizer_with_tools()
    config = ConversationSettings(chat=True, max_turns=3, answer_timeout=7.0, **named)
    talk = config.talk(tokenizer, ROWS)
    prompts = config.encode(tokenizer, ROWS)
    assert "Says it louder." in tokenizer.decode(prompts.prompts[0])
    talking = talk.converse(SAMPLER, ROWS)
    assert (talking.max_turns, talking.timeout, talking.sampler) == (3, 7.0, SAMPLER)
    for role in ("tool", "user"):
        message = {"role": role, "content": "HELLO"}
        assert talk.read(tokenizer.decode(talking.between([message], 5))) == message
    if config.tools:
        call = '<tool_call>{"name": "shout", "arguments": {"text": "hi"}}</tool_call>'
        answer = talking.respond({}, [{"role": "assistant", "content": call}])
        assert answer == Turn([{"role": "tool", "content": "HI"}])


def test_without_an_environment_the_sampler_is_itself():
    talk = ConversationSettings().talk(tiny_tokenizer(), ROWS)
    assert talk.converse(SAMPLER, ROWS) is SAMPLER
    assert talk.read is None


def test_plain_text_is_answered_in_plain_text():
    config = ConversationSettings(environment="talked:respond", max_turns=2)
    talking = config.talk(tiny_tokenizer(), ROWS).converse(SAMPLER, ROWS)
    assert talking.between is None
    assert talking.respond({}, []) == Turn("go on")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": ("talked:shout",)}, "tools are told by the chat template: --chat"),
        ({"tools": ("talked:shout",), "environment": "talked:respond"}, "either --environment talked:respond"),
        ({"tools": ("talked:nothing",)}, "talked has no function 'nothing'"),
        (
            {"tools": ("talked:shout",), "chat": True, "environment_workers": 2},
            "2 are for an --environment",
        ),
        ({"environment": "talked:make()", "environment_workers": 2}, "def at the top"),
        ({"environment": "talked:respond", "max_turns": 0}, "max_turns and max_answer_tokens are at least 1"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    config = ConversationSettings(**settings)
    with pytest.raises(ValueError, match=message):
        config.talk(tokenizer_with_tools(), ROWS).converse(SAMPLER, ROWS)


def test_a_template_that_knows_no_tools_is_refused():
    config = ConversationSettings(tools=("talked:shout",), chat=True)
    with pytest.raises(ValueError, match="has neither <tool_call>"):
        config.talk(tiny_tokenizer(), ROWS)
    assert dataclasses.replace(config, tools=()).talk(tiny_tokenizer(), ROWS).read is None
