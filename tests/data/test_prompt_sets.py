"""From a file of rows to the prompts of a step."""

import functools
import json
import pickle
import re

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.data import (
    encode_demonstrations,
    encode_rows,
    field,
    has_chats,
    hold_out,
    make_prompts,
    place_of,
    read_problems,
)
from grpo_jax.data.rows import gold_column_of
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Rollout


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_column_may_be_a_field_of_an_object():
    row = {"reward_model": {"ground_truth": "7", "a.b": 1}, "x.y": 2, "x": {"y": 3}}
    assert field(row, "reward_model.ground_truth") == "7"
    assert field(row, "reward_model.a.b") == 1
    assert field(row, "x.y") == 2  # a column of this very name comes first
    assert field(row, "reward_model.absent") is None
    assert field(row, "x.y.z") is None


def test_prompts_and_answers_of_nested_fields_are_read(tmp_path):
    path = write(tmp_path, [{"extra": {"question": "1+1?"}, "reward_model": {"ground_truth": "so\n#### 2 "}}])
    (row,) = read_problems(
        path, prompt_column="extra.question", answer_column="reward_model.ground_truth", answer_after="####"
    )
    assert (row["extra.question"], row["answer"]) == ("1+1?", "2")


def test_the_answers_column_is_the_one_that_verifiers_are_told_of(tmp_path):
    """Else `accuracy` would read the column `solution` beside it."""
    path = write(tmp_path, [{"prompt": "1+1?", "target": "2", "solution": "One more is 3."}])
    (row,) = read_problems(path, answer_column="target")
    assert gold_column_of(row) == gold_column_of(pickle.loads(pickle.dumps(row))) == "answer"
    assert (dict(row)["answer"], row["solution"]) == ("2", "One more is 3.")
    assert place_of(row, 7) == f"{path}:1"
    seen = []

    def reward(completions, gold_column=None, **columns):
        seen.append(gold_column)
        return [0.0] * len(completions)

    tokens = np.full((1, 2, 3), 5, np.int32)
    lengths, held = np.full((1, 2), 3, np.int32), np.ones((1, 2, 3), bool)
    rollout = Rollout(make_prompts([[5, 6]], [0]), tokens, lengths, held, held * -1.0, held[..., 0])
    for rows in ([row], read_problems(path)):
        rewards.host([reward], rows, tiny_tokenizer())(rollout)
    assert seen == ["answer", None]


def test_renamed_columns_are_there_under_both_names(tmp_path):
    path = write(tmp_path, [{"prompt": "1+1?", "target": "2", "meta": {"level": 3}}])
    assert read_problems(path, answer_column="answer", rename={"target": "answer", "meta.level": "level"}) == [
        {"prompt": "1+1?", "target": "2", "answer": "2", "meta": {"level": 3}, "level": 3}
    ]
    assert read_problems(path, prompt_column="question", rename={"prompt": "question"})[0]["question"] == "1+1?"
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: no column gold")):
        read_problems(path, rename={"gold": "answer"})


def test_columns_are_renamed_all_at_once_and_no_two_to_one_name(tmp_path):
    path = write(tmp_path, [{"prompt": "2", "answer": "1+1?", "a": 3, "b": 4}])
    swapped = read_problems(path, rename={"prompt": "answer", "answer": "prompt", "a": "b", "b": "c"})
    assert swapped == [{"prompt": "1+1?", "answer": "2", "a": 3, "b": 3, "c": 4}]
    with pytest.raises(
        ValueError, match=re.escape("each new name is of one column, got {'a': 'answer', 'b': 'answer'}")
    ):
        read_problems(path, rename={"a": "answer", "b": "answer"})


def test_a_row_is_told_by_its_place_in_the_file_after_it_was_shuffled(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "1?", "completion": "2"} for _ in range(6)] + [{"prompt": "1" * 30, "completion": "2"}]
    path = write(tmp_path, rows)
    path.write_text("\n" + path.read_text())  # a line that is no row
    for part in hold_out(read_problems(path), 3, seed=0):
        if any(len(row["prompt"]) == 30 for row in part):
            for encode in (encode_rows, functools.partial(encode_demonstrations, end=2)):
                with pytest.raises(ValueError, match=re.escape(f"{path}:8: the prompt has 30 tokens")):
                    encode(tokenizer, part, max_prompt_tokens=9)
    (first, *_) = read_problems(path)
    assert place_of(pickle.loads(pickle.dumps(first)), 5) == f"{path}:2"
    assert place_of({"prompt": ""}, 5) == "row 5"


@pytest.mark.parametrize("prompt", ["", 7, {"role": "user"}, ["a"], None, [{"content": "a"}]], ids=repr)
def test_rows_that_nobody_checked_are_refused_before_they_are_encoded(prompt):
    rows = [{"prompt": "1?", "completion": "2"}, {"prompt": prompt, "completion": "2"}]
    for encode in (encode_rows, functools.partial(encode_demonstrations, end=2)):
        with pytest.raises(ValueError, match=r"row 2: (the prompt has no tokens|.*text)"):
            encode(tiny_tokenizer(), rows)


def test_a_second_system_message_is_refused_with_its_row():
    rows = [{"prompt": "a"}, {"prompt": [{"role": "system", "content": "A"}, {"role": "user", "content": "b"}]}]
    with pytest.raises(ValueError, match="row 2: the prompt has a system message, so that 'B' would be a second one"):
        encode_rows(tiny_tokenizer(), rows, system="B")


def test_chats_are_told_by_the_settings_or_by_the_rows():
    texts, chats = [{"q": {"p": "a"}}], [{"q": {"p": [{"role": "user", "content": "b"}]}}]
    assert not has_chats(texts, prompt_column="q.p")
    assert has_chats(texts, prompt_column="q.p", chat=True)
    assert has_chats(texts, prompt_column="q.p", system="S")
    assert has_chats([*texts, *chats], prompt_column="q.p")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 7}, "prompt is text or a list of chat messages, got 7"),
        ({"prompt": {"role": "user", "content": "a"}}, "prompt is text or a list of chat messages, got {'role'"),
        ({"prompt": []}, "prompt is text or a list of chat messages, got []"),
        ({"prompt": ["a"]}, "a message of prompt has a role and a content, both text; got 'a'"),
        ({"prompt": [{"role": "user"}]}, "a message of prompt has a role and a content, both text; got {'role'"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "prompt is messages, and text in the first row"),
        ({"answer": ["2"]}, "answer is text or a number, got ['2']"),
        ({"answer": " "}, "answer is empty: ' '"),
        ({"answer": "NaN"}, "answer is missing: 'NaN'"),
        ({"prompt": ""}, "prompt is empty: ''"),
        ({"prompt": " \n"}, "prompt is empty: ' \\n'"),
        ({"prompt": '[{"role": "user", "content": "a"}]'}, "prompt is text that writes out a list of chat messages"),
        ({"prompt": "[{'content': 'a', 'role': 'user'}]"}, "prompt is text that writes out a list of chat messages"),
        (
            {"prompt": [{"role": "", "content": "a"}]},
            "a message of prompt has a role and a content, both text; got {'role'",
        ),
        ({"answer": True}, "answer is text or a number, got True"),
        ({"answer": {"value": "2"}}, "answer is text or a number, got {'value'"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_number(tmp_path, row, message):
    good = {"prompt": "1+1?", "answer": "2"}
    path = write(tmp_path, [good, good | row, good])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {message}")):
        read_problems(path, answer_column="answer")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("2", "answer has no mark '####': '2'"),
        ("so 2 #### nan", "answer has nothing after the mark '####': 'so 2 #### nan'"),
        ("so 2 ####  ", "answer has nothing after the mark '####': 'so 2 ####  '"),
        (2, "answer is 2, no text that could hold the mark '####'"),
        ("x" * 10_000, "answer has no mark '####': 'xxx"),
    ],
)
def test_an_answer_without_its_mark_is_refused_with_file_and_row(tmp_path, answer, message):
    path = write(tmp_path, [{"prompt": "a", "answer": "#### 1"}, {"prompt": "b", "answer": answer}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {message}")) as error:
        read_problems(path, answer_after="####")
    assert len(str(error.value)) < 500


def test_an_empty_mark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--answer-after is the mark before the answer, such as '####', and not empty"):
        read_problems(write(tmp_path, [{"prompt": "a", "answer": "1"}]), answer_after="")


def test_numbers_are_answers_as_they_are(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "answer": 2}, {"prompt": "b", "answer": 2.5}])
    assert [row["answer"] for row in read_problems(path, answer_column="answer")] == [2, 2.5]


def test_held_out_rows_are_not_trained_on_and_follow_from_the_seed():
    rows = [{"prompt": str(i)} for i in range(10)]
    train, held_out = hold_out(rows, 3, seed=1)
    assert (len(train), len(held_out)) == (7, 3)
    assert sorted(int(row["prompt"]) for row in [*train, *held_out]) == list(range(10))
    assert hold_out(rows, 3, seed=1) == (train, held_out)
    assert hold_out(rows, 3, seed=2)[1] != held_out
    assert len(hold_out(rows, 0, seed=1)[0]) == 10
    with pytest.raises(ValueError, match="to hold out 10 rows leaves none of the 10 rows to train on"):
        hold_out(rows, 10, seed=1)


def test_a_prompt_set_has_the_rows_beside_their_tokens_without_those_that_are_too_long():
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "1+1?", "x": 1}, {"prompt": "what is 123456789+987654321?", "x": 2}, {"prompt": "3?", "x": 3}]
    problems = encode_rows(tokenizer, rows, max_prompt_tokens=8, too_long="drop")
    assert [row["x"] for row in problems.rows] == [1, 3]
    assert problems.prompts == [tokenizer("1+1?")["input_ids"], tokenizer("3?")["input_ids"]]
    with pytest.raises(ValueError, match="row 2: the prompt has 25 tokens and the limit is 8"):
        encode_rows(tokenizer, rows, max_prompt_tokens=8)


def test_a_prompt_that_cannot_be_encoded_is_refused_with_its_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 2: the prompt is chat messages, but the tokenizer has no chat template"):
        encode_rows(tokenizer, [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}])


def test_what_templates_take_without_a_word_is_told(make_tokenizer):
    answered = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    with pytest.warns(UserWarning, match="1 of 2 prompts end with a message of the assistant, which completions go on"):
        encode_rows(make_tokenizer("qwen"), [{"prompt": answered}, {"prompt": answered[:1]}])
    with pytest.warns(UserWarning, match="messages have the role human; those that models know are user, assistant"):
        encode_rows(make_tokenizer("qwen"), [{"prompt": [{"role": "human", "content": "2+2?"}]}])
    rows = [{"prompt": "2+2?"}]
    with pytest.warns(UserWarning, match="enable_thinking changes nothing: the chat template does not read it"):
        encode_rows(make_tokenizer("llama"), rows, chat=True, template={"enable_thinking": False})
    with pytest.warns(UserWarning, match="date_string changes nothing: no chats"):
        encode_rows(make_tokenizer("llama"), rows, template={"date_string": "today"})
    encode_rows(make_tokenizer("qwen"), rows, chat=True, template={"enable_thinking": False, "date_string": None})
    encode_rows(make_tokenizer("llama"), rows, chat=True, template={"date_string": "today"})
    encode_rows(make_tokenizer("llama"), [], template={"date_string": "today"})


def test_the_batch_of_a_step_has_the_rows_that_rewards_look_up():
    problems = encode_rows(tiny_tokenizer(), [{"prompt": f"{i}?"} for i in range(5)])
    batch = problems.batch(3, 1, 7, multiple=16)
    assert batch.info["row"].tolist() == [0, 2, 3, 4, 0, 1, 2]  # those of `batch_indices`
    assert batch.tokens.shape == (7, 16)
    for ids, length, row in zip(np.asarray(batch.tokens), batch.lengths, batch.info["row"], strict=True):
        assert ids[:length].tolist() == problems.prompts[row]


def test_demonstrations_are_prompts_and_completions_with_their_end(make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    rows = [{"q": "2+2?", "a": "4"}, {"q": "hello", "a": [{"role": "assistant", "content": "world"}]}]
    columns = {"prompt_column": "q", "completion_column": "a"}
    prompts, completions = encode_demonstrations(tokenizer, rows, end=2, chat=True, **columns)
    assert prompts == encode_rows(tokenizer, rows, prompt_column="q", chat=True).prompts
    assert [tokenizer.decode(ids) for ids in completions] == ["4<|im_end|>", "world<|im_end|>"]


def test_completions_that_do_not_close_the_thought_of_their_prompt_are_told(make_tokenizer, capsys):
    tokenizer = make_tokenizer("r1")
    rows = [{"prompt": "2+2?", "completion": "add</think>4"}, {"prompt": "2+2?", "completion": "4"}]
    encode_demonstrations(tokenizer, rows[:1], end=1, chat=True)
    assert capsys.readouterr().out == ""
    encode_demonstrations(tokenizer, rows, end=1, chat=True)
    told = capsys.readouterr().out
    assert "warning: 1 of 2 completions do not close the <think> that the chat template opens" in told
    assert "such as row 2" in told
    encode_demonstrations(make_tokenizer("qwen"), rows, end=2, chat=True)
    assert capsys.readouterr().out == ""


def test_the_template_is_told_of_the_tools_and_the_arguments_of_a_row():
    """As TRL 1.16's SFT trainer does."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ mode }}" + tokenizer.chat_template
    )
    schemas = [{"type": "function", "function": {"name": "weather"}}]
    rows = [
        {"prompt": "w?", "completion": "4"} | more
        for more in (
            {},
            {"tools": schemas},
            {"tools": json.dumps(schemas)},
            {"tools": None, "chat_template_kwargs": {"mode": "m"}},
        )
    ]
    prompts, _ = encode_demonstrations(tokenizer, rows, end=2, chat=True)
    for ids, start in zip(prompts, ["", "weather ", "weather ", "m"], strict=True):
        assert tokenizer.decode(ids).startswith(f"{start}<|im_start|>user")
    assert encode_rows(tokenizer, rows, chat=True).prompts == prompts  # so that a run goes on from what was taught
    given = encode_rows(tokenizer, rows, chat=True, template={"mode": "d", "tools": [{"function": {"name": "other"}}]})
    assert {tokenizer.decode(ids)[:18] for ids in given.prompts} == {"other d<|im_start|"}
    assert len({*map(tuple, encode_rows(tokenizer, rows).prompts)}) == 1  # plain text
    for wrong in ({"tools": "weather"}, {"tools": ["weather"]}, {"chat_template_kwargs": "m"}):
        with pytest.raises(ValueError, match=f"row 2: {next(iter(wrong))} is "):
            encode_demonstrations(tokenizer, [rows[0], rows[0] | wrong], end=2, chat=True)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"completion": 4}, {}, "row 2: completion is text or a list of one message, got 4"),
        ({"completion": " \n"}, {}, r"row 2: the completion is empty: ' \\n'"),
        ({"completion": [{"role": "assistant", "content": ""}]}, {}, "row 2: the completion is empty: ''"),
        (
            {"completion": '[{"role": "assistant", "content": "a"}]'},
            {},
            "row 2: completion is text that writes out a list",
        ),
        ({"completion": ["a"]}, {}, r"row 2: a completion is text or one message of the assistant, got .* \['a'\]"),
        ({"completion": [{"role": "assistant"}]}, {}, "row 2: the content of a completion is text"),
        ({"completion": []}, {}, "row 2: a completion is text or one message of the assistant"),
        ({}, {"max_tokens": 3}, "row 1: the completion has 4 tokens and the limit is 3"),
        ({}, {"max_prompt_tokens": 3}, "row 1: the prompt has 34 tokens and the limit is 3"),
    ],
)
def test_a_demonstration_that_is_none_or_too_long_is_refused_with_its_row(make_tokenizer, row, settings, message):
    rows = [{"prompt": "2+2?", "completion": "the answer"}, {"prompt": "2+2?", "completion": "4"} | row]
    with pytest.raises(ValueError, match=message):
        encode_demonstrations(make_tokenizer("qwen"), rows, end=2, chat=True, **settings)


def test_columns_that_are_wanted_must_be_there(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: no column completion; the row has prompt")):
        read_problems(path, columns=["completion"])
