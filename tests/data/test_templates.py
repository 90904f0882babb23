"""Real kinds of tokenizers and templates: what a prompt, a demonstration and a turn's end are made of."""

import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from grpo_jax import testing
from grpo_jax.data import chat, encode_demonstration, encode_prompt, encode_rows, prompt_tail, turn_end
from grpo_jax.models import hf

TOKENIZERS = runpy.run_path(str(Path(__file__).parent / "conftest.py"), run_name="conftest")["TOKENIZERS"]


def messages(*turns):
    """Of the user, the assistant, the user, and so on."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]


def rendered(tokenizer, prompt, **template):
    return tokenizer.apply_chat_template(prompt, tokenize=False, **({"add_generation_prompt": True} | template))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def special(tokenizer, ids):
    return [i for i in ids if tokenizer.added_tokens_decoder.get(i) and tokenizer.added_tokens_decoder[i].special]


# ---------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma"])
def test_a_text_that_begins_with_the_beginning_of_sequence_token_gets_no_second_one(name, make_tokenizer):
    tokenizer = make_tokenizer(name)
    plain = encode_prompt(tokenizer, "hello")
    assert plain == tokenizer("hello")["input_ids"]
    assert plain[0] == tokenizer.bos_token_id
    marked = encode_prompt(tokenizer, tokenizer.bos_token + "hello")
    assert marked.count(tokenizer.bos_token_id) == 1
    assert decode(tokenizer, marked).replace(" ", "") == decode(tokenizer, plain).replace(" ", "")
    # A rendered chat, given as text, is the chat.
    text = rendered(tokenizer, messages("hello"), date_string="today")
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, messages("hello"), date_string="today")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
def test_a_prompt_does_not_end_in_an_end_of_sequence_token_that_its_text_does_not_have(name, make_tokenizer):
    tokenizer, ending = make_tokenizer(name), make_tokenizer(name, ends=True)
    assert ending("hello")["input_ids"][-1] == tokenizer.eos_token_id
    for text in ("hello", "", "hello world ", tokenizer.eos_token):
        assert encode_prompt(ending, text) == encode_prompt(tokenizer, text)
    assert encode_prompt(ending, f"hello{tokenizer.eos_token}")[-1] == tokenizer.eos_token_id


def test_what_else_a_tokenizer_adds_stays(make_tokenizer):
    tokenizer = make_tokenizer("gemma")
    backend = tokenizer.backend_tokenizer
    kept = backend.post_processor
    try:
        backend.post_processor = TemplateProcessing(
            single="<bos> $A <end_of_turn>", special_tokens=[("<bos>", 0), ("<end_of_turn>", 3)]
        )
        assert encode_prompt(tokenizer, "hello") == tokenizer("hello")["input_ids"]
        assert encode_prompt(tokenizer, "<bos>hello") == tokenizer("hello")["input_ids"]
        assert encode_prompt(tokenizer, "hello")[-1] == 3
    finally:
        backend.post_processor = kept


# ------------------------------------------------------------------------ the last turn


def test_an_assistants_last_message_is_continued(tokenizer):
    opened = messages("hello", "the answer")
    ids = encode_prompt(tokenizer, opened, date_string="today")
    text = decode(tokenizer, ids)
    assert text.endswith("the answer")
    assert tokenizer.eos_token_id not in ids[-3:]
    assert rendered(tokenizer, opened, date_string="today", add_generation_prompt=False).startswith(text)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_after_any_other_message_the_assistants_turn_is_opened(role, make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    prompt = [*messages("hello", "world"), {"role": role, "content": "7"}]
    assert decode(tokenizer, encode_prompt(tokenizer, prompt)).endswith(f"{role}\n7<|im_end|>\n<|im_start|>assistant\n")


def test_template_arguments_reach_the_template_of_every_row(make_tokenizer):
    rows = [{"prompt": "2+2?"}]
    llama, qwen = make_tokenizer("llama"), make_tokenizer("qwen")
    dated = encode_rows(llama, rows, chat=True, template={"date_string": "26 Jul 2024"}).prompts[0]
    assert "Today Date: 26 Jul 2024" in decode(llama, dated)
    quick = encode_rows(qwen, rows, system="Be brief.", template={"enable_thinking": False}).prompts[0]
    assert decode(qwen, quick) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_the_date_that_is_given_stands_in_a_template_that_asks_for_todays():
    tokenizer = testing.tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + tokenizer.chat_template
    ids = encode_prompt(tokenizer, messages("2+2?"), date_string="26 Jul 2024")
    assert decode(tokenizer, ids).startswith("26 Jul 2024 <|im_start|>user")
    assert decode(tokenizer, encode_prompt(tokenizer, messages("2+2?"))).startswith("20")


def test_a_history_of_tool_calls_is_rendered_and_one_that_the_template_leaves_out_is_refused():
    tokenizer = testing.tiny_tokenizer()
    call = {"function": {"name": "weather", "arguments": {"place": "<|im_end|>"}}}
    prompt = [*messages("w?"), {"role": "assistant", "content": None, "tool_calls": [call]},
              {"role": "tool", "content": "3"}]  # fmt: skip
    rows = [{"prompt": prompt}, {"prompt": [{k: v for k, v in m.items() if v is not None} for m in prompt]}]
    with pytest.raises(ValueError, match="row 1: the chat template does not write the call of weather"):
        encode_rows(tokenizer, rows)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}",
        "{{ message.tool_calls[0].function | tojson if message.tool_calls else message.content }}",
    )
    first, second = encode_rows(tokenizer, rows).prompts
    assert first == second
    assert '{"name": "weather", "arguments": {"place": "<|im_end|>"}}<|im_end|>' in decode(tokenizer, first)
    assert special(tokenizer, first) == special(tokenizer, encode_prompt(tokenizer, messages("w?", "", "3")))
    rows[1]["prompt"][1]["tool_calls"] = []
    with pytest.raises(ValueError, match="row 2: a message of prompt has a role and a content, both text; got"):
        encode_rows(tokenizer, rows)


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ('{"name": "f", "arguments": {"x": [1, "é"]}}', "{{ call.function | tojson }}"),  # Qwen 2.5, Llama 3.1
        ('f {"x": [1, "é"]}', "{{ call.function.name + ' ' + call.function.arguments }}"),  # DeepSeek V3 takes text
        ("f x", "{{ call.function.name }}{% for name, _ in call.function.arguments | items %} {{ name }}{% endfor %}"),
    ],
)
def test_arguments_of_a_call_that_are_the_text_of_an_object_are_no_text_in_quotes(written, template):
    r"""OpenAI's form, with which the first template would write `"arguments": "{\"x\": ..."`."""
    tokenizer = testing.tiny_tokenizer()
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
    asked = [*messages("w?"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    inner = "{% for call in message.tool_calls %}" + template + "{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}", "{% if message.tool_calls %}" + inner + "{% else %}{{ message.content }}{% endif %}"
    )
    assert f"assistant\n{written}<|im_end|>" in decode(tokenizer, encode_prompt(tokenizer, asked))
    assert call["function"]["arguments"] == '{"x": [1, "é"]}'  # rewards see the row as it was


def test_messages_that_the_template_refuses_are_refused_with_its_words_and_the_row(make_tokenizer):
    rows = [{"prompt": "2+2?"}, {"prompt": [{"role": "system", "content": "hello"}, *chat("2+2?")]}]
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses .*Only user and assistant roles"):
        encode_rows(make_tokenizer("mistral"), rows, chat=True)


# ----------------------------------------------------- special tokens in what users write


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_special_tokens_in_messages_are_text_and_the_decoded_prompt_is_the_rendered_one(tokenizer, data):
    pieces = [*special_texts(tokenizer), "hello", " ", "\n", "<|", "[INST]", "é", "\ue000", "=", "2"]
    contents = data.draw(
        st.lists(st.lists(st.sampled_from(pieces), max_size=5).map("".join), min_size=1, max_size=3).filter(
            lambda contents: len(contents) != 2  # the last one is a user's
        )
    )
    prompt = messages(*contents)
    harmless = messages(*("x" for _ in contents))
    ids = encode_prompt(tokenizer, prompt, date_string="today")
    assert decode(tokenizer, ids) == rendered(tokenizer, prompt, date_string="today")
    assert special(tokenizer, ids) == special(tokenizer, encode_prompt(tokenizer, harmless, date_string="today"))


def special_texts(tokenizer):
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def test_a_message_with_a_special_token_is_trimmed_as_its_neighbours_are(make_tokenizer):
    tokenizer = make_tokenizer("gemma")
    ids = encode_prompt(tokenizer, messages("  hello<end_of_turn>\n\n"))
    text = "<bos><start_of_turn>user\nhello<end_of_turn><end_of_turn>\n<start_of_turn>model\n"
    assert decode(tokenizer, ids) == text
    assert special(tokenizer, ids) == [0, 2, 3, 2]


def test_reasoning_of_an_earlier_answer_with_a_special_token_is_stripped_as_any_other(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    prompt = messages("hello", "<think>\nthe <|im_end|> token</think>\n\nthe <|im_end|>", "2+2?")
    ids = encode_prompt(tokenizer, prompt)
    assert "<|im_start|>assistant\nthe <|im_end|><|im_end|>\n" in decode(tokenizer, ids)
    assert special(tokenizer, ids) == [1, 2] * 3 + [1]


def test_reasoning_between_tags_that_are_special_tokens_is_stripped_too(make_tokenizer):
    """There the template looks for a special token, which must not be masked from it."""
    tokenizer = make_tokenizer("thinking", special_tags=True)
    prompt = messages("what is </think>?", "<think>\n<|im_end|></think>\n\nthe <|im_end|>", "2+2?")
    ids = encode_prompt(tokenizer, prompt)
    assert decode(tokenizer, ids) == rendered(tokenizer, prompt)
    names = tokenizer.convert_ids_to_tokens(special(tokenizer, ids))
    assert names == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>", "<think>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_special_token_changes_no_token_of_the_text_around_it(scheme, make_tokenizer):
    """SentencePiece puts a space before a text, or before each part between special tokens."""
    tokenizer = make_tokenizer("mistral", prepend_scheme=scheme)
    prompt = messages("hello", "hello </s>", "hello world")
    ids = encode_prompt(tokenizer, prompt)
    plain = encode_prompt(tokenizer, messages("hello", "hello <=s>", "hello world"))
    assert len(special(tokenizer, ids)) == len(special(tokenizer, plain)) == 2
    inside, other = (tokenizer.convert_tokens_to_ids([*text]) for text in ("</s>", "<=s>"))
    start = next(i for i in range(len(ids)) if ids[i : i + 4] == inside)
    assert ids[:start] + other + ids[start + 4 :] == plain


# -------------------------------------------------------------------- demonstrations


def test_a_demonstration_is_the_chat_with_the_answer_up_to_the_end_of_its_turn(tokenizer):
    end = turn_end(tokenizer, date_string="today")
    prompt, completion = encode_demonstration(tokenizer, messages("hello"), "the answer", end=end, date_string="today")
    assert prompt == encode_prompt(tokenizer, messages("hello"), date_string="today")
    assert completion[-1] == end
    assert completion.count(end) == 1
    text = decode(tokenizer, prompt + completion)
    if "<think>" not in text:  # which the prompt opens, and the template does not write into an answer
        whole = rendered(tokenizer, messages("hello", "the answer"), date_string="today", add_generation_prompt=False)
        assert whole.rstrip() in (text, text + tokenizer.eos_token)  # which Phi's writes after a whole chat
    assert text.endswith("the answer" + tokenizer.decode([end]))
    as_message = [{"role": "assistant", "content": "the answer"}]
    again = encode_demonstration(tokenizer, messages("hello"), as_message, end=end, date_string="today")
    assert again == (prompt, completion)


def test_the_completion_of_a_text_has_no_space_that_the_text_does_not_have(make_tokenizer):
    """SentencePiece puts one before the first word of a text."""
    tokenizer = make_tokenizer("mistral")
    assert tokenizer("answer", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(["▁answer"])
    for completion in ("answer", " answer", "\nanswer"):
        prompt, ids = encode_demonstration(tokenizer, "2+2=", completion, end=1)
        assert decode(tokenizer, prompt + ids) == f"<s> 2+2={completion}</s>"
        whole = tokenizer(f"2+2={completion}")["input_ids"]
        assert prompt + ids == [*whole, 1]


@pytest.mark.parametrize("name", ["qwen", "mistral", "gemma"])
def test_a_token_across_the_border_of_prompt_and_completion_is_cut_there(name, make_tokenizer):
    """The prompt is what a run samples from, so its tokens stay."""
    tokenizer = make_tokenizer(name)
    prompt, ids = encode_demonstration(tokenizer, "hello hel", "lo world", end=1)
    assert prompt == encode_prompt(tokenizer, "hello hel")
    assert decode(tokenizer, prompt + ids[:-1]) == decode(tokenizer, encode_prompt(tokenizer, "hello hello world"))


def test_reasoning_is_taught_where_the_template_would_strip_it(make_tokenizer):
    tokenizer = make_tokenizer("r1")
    expected = "<|begin|><|User|>2+2?<|Assistant|><think>\nadd</think>\n\n4<|end|>"
    for completion in ("add</think>\n\n4", "<think>\nadd</think>\n\n4", "<think>add</think>\n\n4"):
        prompt, ids = encode_demonstration(tokenizer, chat("2+2?"), completion, end=1)
        assert decode(tokenizer, prompt + ids) == expected  # and <think> once
    unopened = make_tokenizer.__wrapped__("r1")
    unopened.chat_template = unopened.chat_template.replace("<think>\\n", "")
    prompt, ids = encode_demonstration(unopened, chat("2+2?"), "<think>\nadd</think>\n\n4", end=1)
    assert decode(unopened, prompt + ids) == expected


def test_a_thought_that_the_prompt_opens_is_closed_as_the_template_closes_it(make_tokenizer):
    """Qwen 3.5's, where the token of two line ends lies across the border: it was dropped, and `</think>` with it."""
    tokenizer = make_tokenizer.__wrapped__("thinking")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        '{{- "<|im_start|>" + message.role + "\\n" + content',
        '{{- "<|im_start|>" + message.role + "\\n" + ("<think>\\n\\n</think>\\n\\n" if message.role == '
        '"assistant" and "</think>" not in content else "") + content',
    )
    ids = encode_prompt(tokenizer, chat("2+2?"))
    whole = tokenizer("assistant\n<think>\n\n</think>", add_special_tokens=False)["input_ids"]
    assert ids[-1] not in whole[-2:]  # the line end, of which the whole chat has two in one token
    for content in ("4", "a <|im_end|> b"):
        prompt, completion = encode_demonstration(tokenizer, chat("2+2?"), content, end=2)
        assert prompt == ids
        assert decode(tokenizer, completion) == f"\n</think>\n\n{content}<|im_end|>"
        assert special(tokenizer, completion) == [2]
    _, completion = encode_demonstration(tokenizer, chat("2+2?"), "add</think>\n\n4", end=2)
    assert decode(tokenizer, completion) == "add</think>\n\n4<|im_end|>"


def test_a_demonstration_may_continue_the_assistants_message(make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    prompt, ids = encode_demonstration(tokenizer, messages("2+2?", "the answer"), " is 4", end=2)
    assert decode(tokenizer, prompt).endswith("assistant\nthe answer")
    assert decode(tokenizer, ids) == " is 4<|im_end|>"


def test_special_tokens_of_a_demonstration_are_text_in_a_chat_and_tokens_in_plain_text(make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    _, ids = encode_demonstration(tokenizer, chat("hello"), "a <|im_end|> b", end=2)
    assert special(tokenizer, ids) == [2]
    assert decode(tokenizer, ids) == "a <|im_end|> b<|im_end|>"
    _, ids = encode_demonstration(tokenizer, "hello", "a<|im_end|>b", end=0)
    assert special(tokenizer, ids) == [2, 0]
    assert encode_demonstration(tokenizer, "hello", "a<|im_end|>", end=2) == encode_demonstration(
        tokenizer, "hello", "a", end=2
    )  # as in TRL: data often have the end already


@pytest.mark.parametrize("completion", [[], messages("hello"), messages("hello", "world")], ids=len)
def test_a_completion_of_messages_is_one_of_the_assistant(completion, make_tokenizer):
    with pytest.raises(ValueError, match="a completion is text or one message of the assistant, got messages of"):
        encode_demonstration(make_tokenizer("qwen"), chat("hello"), completion, end=2)
    with pytest.raises(ValueError, match="the completion is chat messages, but the prompt is text"):
        encode_demonstration(make_tokenizer("qwen"), "hello", completion, end=2)


# ------------------------------------------------------------- what a template's turns tell


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("llama", "<|eot_id|>"),
        ("qwen", "<|im_end|>"),  # whose configs, as those of Qwen2.5's base models, name <|endoftext|>
        ("r1", "<|end|>"),
        ("mistral", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("phi4", "<|end|>"),
        ("phi3", "<|end|>"),
        ("granite", "<|end_of_text|>"),
        ("olmo", "<|endoftext|>"),
        ("smollm3", "<|im_end|>"),
        ("exaone", "[|endofturn|]"),
        ("harmony", "<|return|>"),  # <|end|> ends what it says before its answer
    ],
)
def test_the_end_of_a_turn_is_the_templates(name, token, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(name)
    end = tokenizer.convert_tokens_to_ids(token)
    assert turn_end(tokenizer) == end
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert hf.eos_ids(tmp_path, tokenizer, chat=True) == tuple(sorted({9, end, tokenizer.eos_token_id}))


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_chat_has_the_tokens_that_transformers_makes_of_it(name, turns, make_tokenizer):
    tokenizer = make_tokenizer(name)
    prompt = messages("hello\n", "the answer is 4.", "  and 2+2?")[:turns]
    settings = {"date_string": "today", "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, **settings)
    assert encode_prompt(tokenizer, prompt, date_string="today") == expected


def test_without_turns_the_end_is_the_tokenizers(make_tokenizer):
    tokenizer = make_tokenizer.__wrapped__("qwen")
    for template in (None, "{% for message in messages %}{{ message.content }}\n{% endfor %}"):
        tokenizer.chat_template = template
        assert turn_end(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("special_tags", [False, True], ids=["tags are text", "tags are special tokens"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tail_of_a_prompt_is_what_the_assistants_turn_holds_already(name, special_tags, make_tokenizer):
    tokenizer = make_tokenizer(name, special_tags=special_tags)
    opens = {"thinking": "<think>\n", "r1": "<think>\n", "exaone": "<think>\n\n</think>\n\n"}
    assert prompt_tail(tokenizer, encode_prompt(tokenizer, messages("hello"))) == opens.get(name, "")
    continued = encode_prompt(tokenizer, messages("hello", "<think>\nthe answer"))
    if name not in ("mistral", "olmo"):  # they mark turns by text that is no special token
        assert prompt_tail(tokenizer, continued) == "<think>\nthe answer"


def test_the_tail_of_a_plain_text_is_its_last_tags(make_tokenizer):
    tokenizer = make_tokenizer("llama")
    tails = {
        "Think in <think> tags.\nUser: 2+2?\nAssistant: <think>": "<think>",
        "Think in <think> </think> tags. Assistant:": "",
        "Assistant: <think>\n</think>\n<answer>": "<think>\n</think>\n<answer>",
        "2 < 3 and 4 > 3>": "",
        "": "",
    }
    for text, tail in tails.items():
        assert prompt_tail(tokenizer, encode_prompt(tokenizer, text)) == tail
    quick = encode_prompt(make_tokenizer("qwen"), messages("hello"), enable_thinking=False)
    assert prompt_tail(make_tokenizer("qwen"), quick) == "<think>\n\n</think>\n\n"
    assert prompt_tail(tokenizer, []) == ""
