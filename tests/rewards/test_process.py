"""Rewards of steps: at which tokens they lie, and a judge of steps behind a local service."""

import sys
import time

import numpy as np
import pytest
from service import Service, says

from grpo_jax.data import make_prompts
from grpo_jax.rewards.process import lines, paragraphs, step_judge, steps
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Rollout, Turns

TOKENIZER = tiny_tokenizer()
TEXTS = ["First 1 + 2.\n\nThen: é🙂.\n\n\nSo 3", "one step", "", "a\n\nb\n\n"]
ROWS = [{"prompt": "p", "answer": 3}, {"prompt": "q", "answer": 4}]


def rollout_of(texts, G=2):
    ids = [[*TOKENIZER.encode(text), TOKENIZER.eos_token_id] for text in texts]
    ids[1] = ids[1][:-1]  # cut at the limit
    T = max(map(len, ids)) + 2
    tokens = np.zeros((len(ids), T), np.int32)
    for i, one in enumerate(ids):
        tokens[i, : len(one)] = one
    lengths = np.array([len(one) for one in ids], np.int32)
    held = (np.arange(T) < lengths[:, None]).reshape(-1, G, T)
    prompts = make_prompts([[1, 2]] * (len(ids) // G), range(len(ids) // G))
    shape = (-1, G, T)
    return Rollout(prompts, tokens.reshape(shape), lengths.reshape(-1, G), held, np.zeros(held.shape), held[..., 0])


def numbered(prompts, steps, answer, **columns):
    assert answer == [3, 3, 4, 4]
    return [[None if i == 1 else 10.0 * (i + 1) for i in range(len(cut))] for cut in steps]


def test_a_step_is_rewarded_at_the_token_in_which_its_text_ends():
    rollout = rollout_of(TEXTS)
    rewards, mask = steps(numbered, ROWS, TOKENIZER)(rollout)
    assert rewards.shape == mask.shape == rollout.tokens.shape
    for i, text in enumerate(TEXTS):
        row, given = rewards.reshape(4, -1)[i], mask.reshape(4, -1)[i]
        length = int(rollout.lengths.reshape(-1)[i])
        cut = paragraphs(text)
        expected = {}
        for j in range(len(cut)):
            if j == len(cut) - 1:
                place = length - 1
            else:  # the first token with which the text is there, looked for one after the other
                wanted = len("".join(cut[: j + 1]))
                ids = rollout.tokens.reshape(4, -1)[i]
                place = next(t for t in range(length) if len(TOKENIZER.decode(ids[: t + 1])) >= wanted)
            if j != 1:
                expected[place] = 10.0 * (j + 1)
        assert {t: row[t] for t in np.flatnonzero(given)} == expected
        assert not row[~given].any()
    assert mask.sum() == 2 + 1 + 0 + 1


def test_texts_are_cut_into_pieces_that_join():
    assert paragraphs(TEXTS[0]) == ["First 1 + 2.\n\n", "Then: é🙂.\n\n\n", "So 3"]
    assert lines("a\n  \n b\nc") == ["a\n  \n b\n", "c"]
    assert paragraphs("") == lines("") == []


@pytest.mark.parametrize(
    ("function", "split", "message"),
    [
        (numbered, str.split, "joined are not the text"),
        (lambda prompts, steps, **columns: [[]] * 4, paragraphs, "3 steps of completion 0 have a finite number"),
        (lambda prompts, steps, **columns: [], paragraphs, "returned 0 lists for 4"),
    ],
)
def test_what_does_not_fit_is_refused(function, split, message):
    with pytest.raises(ValueError, match=message):
        steps(function, ROWS, TOKENIZER, split=split)(rollout_of(TEXTS))


def test_a_function_of_steps_that_writes_into_its_arguments_changes_nothing_for_others():
    rows = [{"prompt": ["a", "b"], "tests": [1, 2]}, {"prompt": ["c"], "tests": [3]}]

    def vandal(prompts, steps, tests):
        items = zip(prompts, tests, steps, strict=True)
        given = [[float(len(prompt) + len(test))] * len(cut) for prompt, test, cut in items]
        for value in (*prompts, *steps, *tests):
            value.clear()
        return given

    rollout = rollout_of(TEXTS)
    first = steps(vandal, rows, TOKENIZER)(rollout)
    assert rows == [{"prompt": ["a", "b"], "tests": [1, 2]}, {"prompt": ["c"], "tests": [3]}]
    assert set(first[0][first[1]].tolist()) == {4.0, 2.0}


def test_a_function_of_steps_that_leaves_or_hangs_is_told_by_its_name():
    def leaves(prompts, steps):
        sys.exit(0)

    def slow(prompts, steps):
        time.sleep(0.3)
        return [[1.0] * len(cut) for cut in steps]

    with pytest.raises(RuntimeError, match=r"called sys.exit\(0\)") as raised:
        steps(leaves, ROWS, TOKENIZER)(rollout_of(TEXTS))
    assert raised.value.__notes__ == ["raised by the reward function leaves over 4 completions"]
    with pytest.warns(RuntimeWarning, match="the reward slow has been at work on 4 completions for 0.1 s"):
        steps(slow, ROWS, TOKENIZER, report_after=0.1)(rollout_of(TEXTS))


def test_a_judge_grades_all_steps_of_a_completion_in_one_answer():
    logged = {}

    def answer(request, number):
        question = request["messages"][0]["content"]
        count = question.count("<<<STEP")
        return says("Fine.\n" + ("10, 5" if "odd" in question else ", ".join(["10", "2.5", "0"][:count])))

    with Service(answer) as service:
        judge = step_judge(service.url, "tiny", log_metric=logged.__setitem__, backoff=0.01, retries=0)
        with pytest.warns(RuntimeWarning, match="1 of 3 .* the first is completion 3 with 3 steps"):
            found = judge(["p"] * 4, [["a", "b", "c"], [], ["x"], ["odd", "b", "c"]])
        assert len(service.requests) == 3
    assert found == [[1.0, 0.25, 0.0], [], [1.0], [None] * 3]
    assert logged == {"step_judge/failed": 1 / 3}


def test_conversations_are_refused():
    rollout = rollout_of(TEXTS)
    turns = Turns(*(np.zeros((2, 2, 1)) for _ in range(3)), failed=np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="these are conversations, in which an environment wrote, too"):
        steps(numbered, ROWS, TOKENIZER)(rollout._replace(turns=turns))
