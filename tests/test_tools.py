"""Tools are called in the words of templates, and whatever a policy writes gets an answer."""

import asyncio
import enum
import json
import sys
import threading
import time
from typing import Literal

import jax
import numpy as np
import pytest

from grpo_jax import data, environments, sampling, tools
from grpo_jax.environments import Turn
from grpo_jax.testing import tiny_policy, tiny_tokenizer


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def weather(city: str) -> dict:
    """The weather of a city.

    Args:
        city: its name.
    """
    return {"city": city, "sky": "grey"}


def hermes(*calls):
    return "Let me see.\n" + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def answers(text, functions=(add, weather), calls=tools.hermes_calls, before=(), **settings):
    messages = [{"role": "user", "content": "x"}, *before, {"role": "assistant", "content": text}]
    turn = tools.environment(functions, calls, **settings)({}, messages)
    return [message["content"] for message in turn.content] if turn.content else turn


def test_calls_are_answered_in_their_order():
    assert answers(hermes(call("add", a=2, b=3), call("weather", city="Oslo"), call("add", a=2))) == [
        "5", '{"city": "Oslo", "sky": "grey"}', "3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ['{"name": "add", "parameters": {"a": 2}}', '<|python_tag|>{"name": "add", "parameters": {"a": 2}}\n']
)
def test_llamas_calls_are_the_whole_turn(text):
    assert answers(text, calls=tools.llama_calls) == ["3"]
    assert answers(f"I would call {text}", calls=tools.llama_calls) == Turn(None)


WRONG = {
    hermes("{name: add}"): "error: the call is not JSON",
    hermes("[1]"): 'error: a call is {"name": ..., "arguments": {...}}',
    hermes('{"name": "add", "parameters": {"a": 1}}'): 'error: a call is {"name"',
    hermes('{"name": "add", "arguments": [1]}'): 'error: "arguments" of add are an object',
    hermes(call("subtract", a=1)): "error: there is no tool 'subtract', only add, weather",
    hermes(call("add")): "error: add: missing a required argument: 'a'",
    hermes(call("add", a=1, c=2)): "error: add: got an unexpected keyword argument 'c'",
    hermes(call("add", a="1")): "error: TypeError: can only concatenate str",
    hermes("[" * 100_000): "error: the call is not JSON: max",
    hermes(
        '{"name": "add", "arguments": {"a": 1, "b": 2, "a": 3}}'
    ): "error: the call is not JSON: an object has 'a' twice",
    hermes('{"name": "add", "arguments": {"a": NaN}}'): "error: the call is not JSON: NaN is none of its numbers",
    hermes('{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}"): "error: the call is not JSON: Exceeds the limit",
    '<tool_call>{"name": "add"': "error: <tool_call> is not closed",
    "I call <tool_call>": "error: <tool_call> is not closed",
}


@pytest.mark.parametrize("text", WRONG, ids=list(WRONG.values()))
def test_wrong_calls_are_answered_with_what_is_wrong(text):
    (said,) = answers(text)
    assert said.startswith(WRONG[text])


@pytest.mark.parametrize("mark", ["<tool_call>", "</tool_call>", '</tool_call>"}}</tool_call>', "}}\n</tool_call>"])
def test_marks_of_calls_in_the_arguments_of_a_call_are_part_of_them(mark):
    """As in a program that prints them."""
    said = [f'{{"city": {json.dumps(mark)}, "sky": "grey"}}', "3"]
    assert answers(hermes(call("weather", city=mark), call("add", a=2))) == said


def test_results_are_written_as_they_are_read():
    assert answers(hermes(call("weather", city="Zürich 🚲"))) == ['{"city": "Zürich 🚲", "sky": "grey"}']


class Sky(enum.Enum):
    CLEAR = "clear"
    GREY = "grey"


def book(room: Literal["single", "double"] = "single", sky: Sky | None = None, nights: Literal[1, 2] | int = 1) -> str:
    """Books a room.

    Args:
        room: its kind.
        sky: above it.
        nights: how long.
    """
    return f"{room} {sky} {nights}"


def test_a_value_that_a_hint_does_not_name_is_told():
    right = [call("book"), call("book", room="double", sky="grey", nights=3), call("book", sky=None)]
    assert answers(hermes(*right), [book]) == ["single None 1", "double grey 3", "single None 1"]
    wrong = [call("book", room="triple"), call("book", sky="red"), call("book", room=["single"])]
    assert answers(hermes(*wrong), [book]) == [
        "error: book: room is one of 'single', 'double', got 'triple'",
        "error: book: sky is one of 'clear', 'grey', None, got 'red'",
        "error: book: room is one of 'single', 'double', got ['single']",
    ]


def test_what_the_policy_writes_into_a_call_is_no_harm_to_the_tokenizer():
    messages = [{"role": "assistant", "content": hermes('{"name": "\\ud800", "arguments": []}')}]
    (turn,) = environments.answers(tools.environment([add], tools.hermes_calls), [({}, messages)], timeout=5.0)
    assert turn.content[0]["content"].startswith('error: "arguments" of ? are')


def test_calls_in_thoughts_are_none():
    thoughts = f"<think>Maybe <tool_call> or {hermes(call('add', a=1))}?</think>"
    assert answers(f"{thoughts}The answer is 2.") == Turn(None)
    assert answers(thoughts + hermes(call("add", a=2))) == ["3"]
    assert answers(thoughts.removeprefix("<think>") + "It is 2.") == Turn(None)  # opened by the template
    assert answers(f"It is 2. <think>Or {hermes(call('add', a=1))}") == Turn(None)


@pytest.mark.parametrize("mark", ["</think>", "<think>", "<think></think>"])
def test_marks_of_thoughts_in_the_arguments_of_a_call_are_none(mark):
    """The call would be lost, and with it the conversation be over."""
    said = [json.dumps({"city": mark, "sky": "grey"})]
    assert answers(hermes(call("weather", city=mark))) == said
    assert answers(f"<think>So <tool_call> it is.</think>{hermes(call('weather', city=mark))}") == said


def leave(code: int) -> str:
    """As programs do on wrong arguments.

    Args:
        code: of the exit.
    """
    sys.exit(code)


async def leave_later(code: int) -> str:
    """The same, later.

    Args:
        code: of the exit.
    """
    await asyncio.sleep(0)
    sys.exit(code)


@pytest.mark.parametrize("function", [leave, leave_later])
def test_a_tool_that_exits_is_an_error_to_the_policy(function):
    text = hermes(call(function.__name__, code=2), call("slow_add", a=2, b=3))
    assert answers(text, [function, slow_add]) == ["error: SystemExit: 2", "5"]


def test_a_tool_that_always_raises_is_reported():
    def broken(word: str) -> str:
        """Looks a word up.

        Args:
            word: to look up.
        """
        if word != "tea":
            raise ConnectionError("no key")
        return "a drink"

    calls = [call("broken", word=word) for word in [*["x"] * 19, "tea", *["x"] * 19]]
    respond = tools.environment([broken], tools.hermes_calls)
    respond({}, [{"role": "assistant", "content": hermes(*calls)}])
    with pytest.warns(RuntimeWarning, match=r"(?s)the tool broken has raised 20 times.*ConnectionError: no key"):
        respond({}, [{"role": "assistant", "content": hermes(*calls[:1])}])


def test_calls_that_would_begin_too_late_are_not_made():
    def wait(n: int) -> int:
        """Waits.

        Args:
            n: what it returns.
        """
        time.sleep(0.06)
        return n

    said = answers(hermes(*(call("wait", n=n) for n in range(3))), [wait], seconds=0.05)
    assert said == ["0", *["error: this call was not made, since those before it took 0.05 s"] * 2]


def test_a_call_that_was_not_made_is_none_of_the_earlier_ones():
    given = []

    def remember(n: int) -> int:
        """Remembers.

        Args:
            n: what it is called with.
        """

    def continued(earlier, arguments):
        given.append([call["n"] for call in earlier])
        time.sleep(0.5 if arguments["n"] in (1, 3) else 0)
        return 0

    remember.continued = continued
    before = []
    for n in (0, 3):
        text = hermes(*(call("remember", n=n + i) for i in range(3)))
        said = answers(text, [remember], before=before, seconds=0.4)
        before += [{"role": "assistant", "content": text}, *({"role": "tool", "content": one} for one in said)]
    assert given == [[], [0], [0, 1]]


def test_a_turn_without_a_call_ends_the_conversation_with_its_score():
    assert answers("The answer is 5.") == Turn(None)
    scored = answers("The answer is 5.", score=lambda row, messages: float("5" in messages[-1]["content"]))
    assert scored == Turn(None, 1.0)


def test_long_results_are_cut():
    (said,) = answers(hermes(call("weather", city="x" * 50)), longest=20)
    assert said == '{"city": "xxxxxxxxxx ... (57 characters left out)'


def no_hints(a):
    """Nothing.

    Args:
        a: something.
    """


def no_docstring(a: int):
    return a


@pytest.mark.parametrize("function", [no_hints, no_docstring])
def test_a_tool_that_does_not_tell_its_arguments_is_refused(function):
    with pytest.raises(ValueError, match=f"the tool {function.__name__} needs a type hint"):
        tools.environment([function], tools.hermes_calls)


def many(*numbers: int):
    """Takes many.

    Args:
        numbers: of them.
    """


def placed(number: int, /):
    """Takes one at its place.

    Args:
        number: of it.
    """


def named(**numbers: int):
    """Takes any.

    Args:
        numbers: by name, of which no schema can tell.
    """


@pytest.mark.parametrize("function", [many, placed, named])
def test_a_tool_whose_arguments_a_call_cannot_name_is_refused(function):
    """The schemas of transformers would have it, and no call of the policy would be right."""
    with pytest.raises(ValueError, match=rf"the tool {function.__name__} has the argument .*number.* without a name"):
        tools.schemas([add, function])


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of their own, got add, add"):
        tools.schemas([add, add])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12345 * 6789", "83810205"),
        ("(12 + 30) * 7 / 4", "73.5"),
        ("2 ** 100", str(2**100)),
        ("-7 // 2 + 7 % 4", "-1"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333 (rounded; exactly 1/3)"),
        ("2 ** -2", "0.25"),
        ("(2 ** 1100 + 1) / 2", f"6.79149264525E+330 (rounded; exactly {2**1100 + 1}/2)"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert tools.calculator(expression) == value
    assert answers(hermes(call("calculator", expression=expression)), [tools.calculator]) == [value]


@pytest.mark.parametrize(
    "expression",
    ["9 ** 9 ** 9", "__import__('os')", "a + 1", "1 / 0", "2 ** 0.5", "1 +", "True + 1", "'a' * 9", "1 if 1 else 2"],
)
def test_what_the_calculator_cannot_do_is_an_error_to_the_policy(expression):
    (said,) = answers(hermes(call("calculator", expression=expression)), [tools.calculator])
    assert said.startswith("error: ")


def test_the_search_finds_passages_by_their_words(tmp_path):
    passages = [
        "The otter lives by rivers.",
        "A heron fishes by rivers too; a heron waits.",
        "Granite is a rock." + "x" * 50,
    ]
    rows = tmp_path / "corpus.jsonl"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in passages))
    for find in (tools.search(passages, results=2, longest=45), tools.search(str(rows), column="body", results=2)):
        heron, otter = find("Heron, rivers?").split("\n\n")  # the one with both words first
        assert heron.startswith("[2] A heron")
        assert otter == "[1] The otter lives by rivers."
        assert find("volcano") == "nothing found"
    assert len(tools.search(passages, longest=45)("granite")) == len("[3] ") + 45
    assert answers(hermes(call("search", query="granite")), [tools.search(passages, longest=17)]) == [
        "[3] Granite is a rock"
    ]
    with pytest.raises(ValueError, match="a search needs passages"):
        tools.search([])


async def slow_add(a: int, b: int) -> int:
    """Adds two numbers, later.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def test_a_tool_may_be_async():
    assert answers(hermes(call("slow_add", a=2, b=3)), [slow_add]) == ["5"]


def test_an_async_tool_that_hangs_is_ended_in_time_and_told_to_the_policy():
    """The conversation would be masked, and a policy that finds such a call could have any masked."""
    ended = threading.Event()

    async def fetch(page: str) -> str:
        """Never comes back.

        Args:
            page: to fetch.
        """
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    began = time.monotonic()
    assert answers(hermes(call("fetch", page="a"), call("fetch", page="b")), [fetch], seconds=0.2) == [
        "error: TimeoutError: it took too long",
        "error: this call was not made, since those before it took 0.2 s",
    ]
    assert time.monotonic() - began < 10
    assert ended.wait(5)  # it does not go on unseen


def test_calls_are_read_in_either_format_where_no_tokenizer_is_known():
    written = [hermes(call("add", a=2)), '{"name": "add", "parameters": {"a": 2}}', "no call"]
    assert [tools.any_calls(text) for text in written] == [[tools.Call("add", {"a": 2})]] * 2 + [[]]


@pytest.fixture(scope="module")
def python(sandbox):
    return tools.python(timeout=5.0)


def test_python_runs_in_the_sandbox_and_knows_the_names_of_earlier_calls(python):
    before = [
        {"role": "assistant", "content": hermes(call("python", code="x = 40\nprint('once')"))},
        {"role": "tool", "content": "once"},
        {"role": "assistant", "content": hermes(call("python", code="x += 1\n1 / 0"))},
        {"role": "tool", "content": "ZeroDivisionError: division by zero"},
        {"role": "assistant", "content": hermes(call("python", code="raise KeyboardInterrupt"))},
        {"role": "tool", "content": "KeyboardInterrupt"},
    ]
    text = hermes(call("python", code="print(x + 1)"), call("python", code="open('/etc/passwd')"))
    said = answers(text, [python], before=before)
    assert said[0] == "42"
    assert "Error" in said[1]
    assert answers(hermes(call("python", code="print(x)")), [python]) == ["NameError: name 'x' is not defined"]


def test_python_that_prints_too_much_or_nothing_is_told(sandbox):
    short = tools.python(output=100)
    flood, nothing = answers(hermes(call("python", code="print('x' * 10000)"), call("python", code="y = 1")), [short])
    assert flood == "x" * 100 + "\nerror: it printed more than 100 bytes"
    assert nothing == "(no output)"


def test_python_knows_nothing_of_calls_that_were_ended(sandbox):
    short = tools.python(timeout=1.0)
    texts = [hermes(call("python", code=code)) for code in ("x = 1", "x = 2; import time; time.sleep(60)", "print(x)")]
    before = []
    for text in texts:
        said = answers(text, [short], before=before)
        before += [{"role": "assistant", "content": text}, {"role": "tool", "content": said[0]}]
    assert [message["content"] for message in before[1::2]] == ["(no output)", "error: it took longer than 1 s", "1"]


# Qwen's, but for its words.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
    "Call them as <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_format_of_calls_is_the_templates():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="neither <tool_call>"):
        tools.call_format(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert tools.call_format(tokenizer) is tools.hermes_calls
    tokenizer.chat_template = 'Respond as {"name": function name, "parameters": dictionary}'
    assert tools.call_format(tokenizer) is tools.llama_calls


CALLS = {
    "<tool_call>\n{{ {'name': f.name, 'arguments': f.arguments} | tojson }}\n</tool_call>": tools.hermes_calls,
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}': tools.llama_calls,
    # Qwen3-Coder's
    "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>": None,
}


@pytest.mark.parametrize("written", CALLS, ids=["hermes", "llama", "tags"])
def test_a_template_that_writes_calls_otherwise_than_they_are_read_is_refused(written):
    tokenizer = tiny_tokenizer()
    each = "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + written + "{% endfor %}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}{% endif %}", "{{ m.content }}" + each + "{% endif %}")
    if CALLS[written] is tools.llama_calls:
        tokenizer.chat_template = tokenizer.chat_template.replace("<tool_call></tool_call>", "JSON")
    if CALLS[written] is not None:
        assert tools.call_format(tokenizer) is CALLS[written]
        return
    with pytest.raises(ValueError, match=r"writes a call as '<tool_call>\\n<function=look_up>"):
        tools.call_format(tokenizer)


def test_a_conversation_with_tools_in_the_tokens_of_its_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    told = {"tools": tools.schemas([add])}
    prompts = data.encode_rows(tokenizer, [{"prompt": "1 + 2?"}], chat=True, template=told, max_prompt_tokens=2000)
    assert '"name": "add"' in tokenizer.decode(prompts.prompts[0])
    # A random network calls nothing, so that what it writes is read as a call.
    respond = tools.environment([add], lambda text: [tools.Call("add", {"a": len(text)})])
    between = data.between_turns(tokenizer, role="tool", **told)
    sampler = sampling.sampler(group_size=2, max_tokens=120, eos_ids=(tokenizer.eos_token_id, *range(3, 80)))
    policy = tiny_policy(vocab_size=len(tokenizer), max_position_embeddings=2048)
    made = sampling.conversations(sampler, respond, tokenizer, prompts.rows, max_turns=2, between=between)
    batch = prompts.batch(0, 0, size=1, multiple=64)
    rollout = jax.device_get(made(policy, jax.jit(policy.init)(jax.random.key(0)), batch, jax.random.key(1)))
    for tokens, mask in zip(rollout.tokens[0], rollout.mask[0], strict=True):
        first = int(np.argmin(mask))
        following = tokens[first : first + int(np.argmax(mask[first:]))]
        said = tokenizer.decode([token for token in tokens[:first] if token not in sampler.eos_ids])
        expected = (
            f"\n<|im_start|>user\n<tool_response>\n{len(said) + 1}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(following).removeprefix("<|im_end|>") == expected
