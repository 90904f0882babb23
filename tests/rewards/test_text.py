"""Verifiers on text: the exact rule of each, and what hostile completions make of it."""

import asyncio
import inspect
import itertools
import math
import operator
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_jax import rewards
from grpo_jax.data import make_prompts
from grpo_jax.rewards import text
from grpo_jax.types import Rollout


def scores(reward, completions, **columns):
    """The rewards of completions of the same prompt."""
    return reward(prompts=["p"] * len(completions), completions=completions, **columns)


def score(reward, completion, **columns):
    return scores(reward, [completion], **{name: [value] for name, value in columns.items()})[0]


MAKERS = [
    text.exact_answer,
    text.format,
    text.strict_format,
    text.tag_count,
    text.reasoning_length,
    text.worked_steps,
    text.language_consistency,
    text.repetition_penalty,
    lambda: text.soft_overlong(16, 4),
    lambda: text.self_consistency(group_size=2),
    lambda: text.cosine_length(text.exact_answer(), max_length=10),
]
NAMES = [
    "exact_answer",
    "format",
    "strict_format",
    "tag_count",
    "reasoning_length",
    "worked_steps",
    "language_consistency",
    "repetition_penalty",
    "soft_overlong",
    "self_consistency",
    "cosine_length",
]
every_reward = pytest.mark.parametrize(("make", "name"), list(zip(MAKERS, NAMES, strict=True)), ids=NAMES)
COLUMNS = {"answer": ["3", None], "completion_ids": [[1, 2, 1], []]}


@every_reward
def test_a_reward_function_has_its_name_and_the_signature_of_trl(make, name):
    reward = make()
    assert rewards.name_of(reward) == name
    parameters = inspect.signature(reward).parameters
    assert list(parameters)[:2] == ["prompts", "completions"]
    extra = {"trainer_state": None, "log_extra": print, "tags": ["a"] * 2, "pattern": ["b"] * 2, "per": [1, 2]}
    completions = ["<think>1+2=3</think><answer>3</answer>", ""]
    plain = reward(prompts=["p", "p"], completions=completions, **COLUMNS)
    assert plain == reward(prompts=["p", "p"], completions=completions, **COLUMNS, **extra)
    assert len(plain) == 2
    assert all(value is None or type(value) is float for value in plain)


@every_reward
def test_chat_messages_are_scored_as_their_text(make, name):
    completions = ["<think>1+2=3</think><answer>3</answer>", "<answer>4</answer>"]
    messages = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert scores(make(), messages, **COLUMNS) == scores(make(), completions, **COLUMNS)


def test_rewards_run_under_host_on_a_rollout():
    letters = {letter: i for i, letter in enumerate("<>/abcdefghiklnrstwkx=+1234 ")}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="x"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast)
    texts = ["<think>1+2=3</think><answer>3</answer>", "<think>1+2=4</think><answer>4</answer>"]
    ids = np.array(tokenizer(texts)["input_ids"], np.int32)[None]
    rollout = Rollout(make_prompts([[1]], rows=[0]), ids, np.full((1, 2), ids.shape[-1]), None, None, None)
    functions = [make() for make in MAKERS]
    values, mask = rewards.host(functions, [{"prompt": "p", "answer": 3}], tokenizer)(rollout)
    assert mask.all()
    found = dict(zip(NAMES, values[0].T.tolist(), strict=True))
    assert found["exact_answer"] == [1, 0]
    assert found["strict_format"] == [1, 1]
    assert found["worked_steps"] == [1, 0]
    assert found["soft_overlong"] == [-1, -1]
    np.testing.assert_allclose(found["self_consistency"], [-0.1, -0.1])
    assert found["cosine_length"] == [0.5, -0.5]


def test_the_r1_preset_weighs_accuracy_format_and_reasoning_length():
    functions = [text.exact_answer(), text.format(), text.reasoning_length()]
    combined = rewards.combine(functions, weights=text.R1_WEIGHTS)
    completion = f"<think>{'a' * 500}</think><answer>7</answer>"
    values = scores(combined, [completion, "<answer>7</answer>", ""], answer=["7", "7", "7"])
    np.testing.assert_allclose(values, [1.0 + 0.1 + 0.01 * 0.5, 1.0 + 0.1 * 0.5, 0.0])


# ---------------------------------------------------------------------- text_of


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
    assert text.text_of(completion) == expected


@pytest.mark.parametrize("completion", [None, 7, ["a"], {"content": 3}.keys(), b"abc"], ids=str)
def test_what_is_no_completion_is_refused(completion):
    with pytest.raises(TypeError, match="a completion is text or a list of chat messages, got"):
        text.text_of(completion)


# ----------------------------------------------------------------------- exact_answer

ANSWERS = {  # text, answer
    "tags": ("so <answer>7</answer>.", "7"),
    "white space": ("<answer>\n 7\t</answer>", "7"),
    "first of two": ("<answer>7</answer><answer>8</answer>", "7"),
    "first of two, wrong": ("<answer>8</answer><answer>7</answer>", "8"),
    "nested": ("<answer><answer>7</answer></answer>", "<answer>7"),
    "a stray close first": ("</answer><answer>7</answer>", "7"),
    "empty": ("<answer></answer>", ""),
    "not closed": ("<answer>7", None),
    "not closed, with a mark": ("#### 7\n<answer>8", None),
    "not opened": ("7</answer>", None),
    "mark": ("72/2=36\n#### 36", "36"),
    "mark and more lines": ("#### 36\nand more", "36"),
    "mark twice": ("#### Step 1\n5\n#### 36", "36"),
    "mark without a line": ("####", ""),
    "tags before the mark": ("<answer>7</answer>\n#### 8", "7"),
    "tags after the mark": ("#### 8\n<answer>7</answer>", "7"),
    "neither": ("it is 7", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_answer_of_a_text(case):
    written, answer = ANSWERS[case]
    assert text.answer_of(written) == answer
    assert score(text.exact_answer(), written, answer="7") == float(answer == "7")
    if answer is not None:
        assert score(text.exact_answer(), written, answer=f" {answer}\n") == 1.0


@pytest.mark.parametrize("pattern", [r"[Aa]nswer: (\w+)|so (\w+)", re.compile("answer: (\\w+)", re.IGNORECASE)])
def test_a_pattern_of_the_users_says_where_the_answer_is(pattern):
    completions = ["Answer: 7. Answer: 8", "answer: 8, answer: 7", "<answer>7</answer>", "so 7"]
    assert scores(text.exact_answer(pattern=pattern), completions, answer=["7"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_without_a_group_is_the_answer_itself():
    assert text.answer_of("it is 12 or 13", r"\d+") == "12"
    assert text.answer_of("none", r"\d+") is None


def test_a_missing_reference_is_masked_and_a_missing_answer_is_wrong():
    assert scores(text.exact_answer(), ["<answer>7</answer>", "7"], answer=[None, "7"]) == [None, 0.0]


def test_references_may_be_numbers_and_of_another_column():
    assert scores(text.exact_answer(column="solution"), ["#### 7", "#### 7"], solution=[7, 8]) == [1.0, 0.0]


def test_a_missing_column_is_an_error_with_its_name():
    with pytest.raises(ValueError, match=r"exact_answer compares with the column 'answer'; .* \['solution'\]"):
        score(text.exact_answer(), "#### 7", solution="7")


def test_both_sides_are_normalised_alike():
    completions = ["<answer> Paris </answer>", "<answer>PARIS</answer>", "<answer>London</answer>"]
    assert scores(text.exact_answer(normalise=str.casefold), completions, answer=["pariS"] * 3) == [1.0, 1.0, 0.0]
    assert scores(text.exact_answer(), completions, answer=["Paris"] * 3) == [1.0, 0.0, 0.0]


NUMBERS = {  # text -> the number it is, None for none
    "7": 7,
    "007": 7,
    "-7": -7,
    "+7": 7,
    "−7": -7,
    "- 7": -7,
    "7.0": 7,
    "7.": 7,
    ".5": 0.5,
    "1,000": 1000,
    "1,234,567.5": 1234567.5,
    "$7": 7,
    "-$7": -7,
    "$-7": -7,
    "$1,000.": 1000,
    "50%": 50,
    "50 %.": 50,
    "1e3": 1000,
    "2.5E-1": 0.25,
    "12,34": None,
    "1,0000": None,
    ",000": None,
    "1,000,": None,
    "7..": None,
    "--7": None,
    "$": None,
    ".": None,
    "": None,
    "seven": None,
    "7 8": None,
    "1/2": None,
    "nan": None,
    "inf": None,
    "1e1000": None,
    "٧": None,
    "1_000": None,
    "0" * 99 + "7": 7,
    "0" * 100 + "7": None,
}


@pytest.mark.parametrize("written", NUMBERS, ids=lambda written: repr(written[:12]))
def test_what_reads_as_a_number_is_compared_as_one(written):
    value = NUMBERS[written]
    reward = text.exact_answer(tolerance=0)
    completion = f"<answer>{written}</answer>"
    assert score(reward, completion, answer=written) == 1.0  # as text, if not as a number
    if value is not None:
        assert score(reward, completion, answer=value) == 1.0
        assert score(reward, completion, answer=value + 1) == 0.0
        assert score(reward, f"<answer>{value}</answer>", answer=written) == 1.0
    for other, number in NUMBERS.items():
        expected = other == written if None in (value, number) else number == value
        assert score(reward, completion, answer=other) == float(expected), other


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [("1.01", "1", 1), ("0.99", "1", 1), ("1.011", "1", 0), ("0.98", "1", 0), ("1000.02", "1000", 0), ("x", "1", 0)],
)
def test_the_tolerance_is_absolute_and_exact(answer, reference, expected):
    """In floats, 1.01 - 1 is above 0.01."""
    assert score(text.exact_answer(tolerance=0.01), f"#### {answer}", answer=reference) == expected


def test_a_tolerance_is_the_decimal_that_was_written():
    """As a float, 0.3 is below it."""
    assert scores(text.exact_answer(tolerance=0.3), ["#### 1.3", "#### 1.31"], answer=["1", "1"]) == [1.0, 0.0]


def test_without_a_tolerance_numbers_are_text():
    assert scores(text.exact_answer(), ["#### 7.0", "#### 1,000"], answer=["7", "1000"]) == [0.0, 0.0]


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match=f"the tolerance is a number of at least 0, .* got {tolerance}"):
        text.exact_answer(tolerance=tolerance)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"the pattern '\(' is no regular expression"):
        text.exact_answer(pattern="(")


# ----------------------------------------------------------------------------- format

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
    found = [score(reward(), written) for reward in (text.format, text.strict_format, text.tag_count)]
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
    assert score(text.strict_format(), written) == float(match is not None)
    length = len(match[1]) if match else 0
    assert score(text.reasoning_length(per=3), written) == min(length / 3, 1)
    if match:
        assert score(text.format(), written) == 1.0


def test_other_tags_and_other_numbers_of_them():
    one, three = ("thought",), ("plan", "code", "test")
    assert score(text.strict_format(tags=one), "<thought>a</thought>") == 1.0
    assert score(text.strict_format(tags=one), "<think>a</think>") == 0.0
    written = "<plan>a</plan><code>b</code>"
    assert score(text.format(tags=three), written) == 2 / 3
    assert score(text.tag_count(tags=three), written + "<test>") == 5 / 6
    assert score(text.strict_format(tags=three), written + "<test></test>") == 1.0
    assert score(text.reasoning_length(tags=three, per=4), "<plan>ab</plan><code></code><test></test>") == 0.5


@pytest.mark.parametrize("tags", ["think", (), ("a", "a"), ("",), ("<think>",), (1,)], ids=str)
def test_tags_that_are_none_are_refused(tags):
    for make in (text.format, text.strict_format, text.tag_count, text.reasoning_length, text.language_consistency):
        with pytest.raises(ValueError, match=r"tags are different names without brackets, .* got"):
            make(tags=tags)


# ----------------------------------------------------------------------------- length


def test_reasoning_is_measured_in_characters_up_to_a_thousand():
    def reasoned(n):
        return f"<think>{'é' * n}</think><answer>7</answer>"

    completions = [reasoned(n) for n in (0, 1, 250, 999, 1000, 1001, 5000)]
    assert scores(text.reasoning_length(), completions) == [0, 0.001, 0.25, 0.999, 1, 1, 1]
    assert score(text.reasoning_length(), reasoned(500) + "!") == 0.0


@pytest.mark.parametrize("per", [0, -1, math.nan])
def test_reasoning_per_no_characters_is_refused(per):
    with pytest.raises(ValueError, match=f"a number of characters above 0, got {per}"):
        text.reasoning_length(per=per)


def test_soft_overlong_gives_the_values_of_trl():
    """The example in TRL 1.16's docstring is 90 of 100 tokens, 20 of them cache: -0.5."""
    lengths = [0, 80, 81, 90, 99, 100, 101, 500]
    values = scores(text.soft_overlong(100, 20), [""] * 8, completion_ids=[[1] * n for n in lengths])
    np.testing.assert_allclose(values, [0, 0, -0.05, -0.5, -0.95, -1, -1, -1])


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_a_cache_out_of_range_is_refused(cache):
    with pytest.raises(ValueError, match=f"cache is above 0 and at most max_tokens = 100, got {cache}"):
        text.soft_overlong(100, cache)


def test_cosine_length_gives_the_values_of_trl():
    """The example in TRL 1.16's docstring is a right and a wrong answer of 50 of 100 tokens: 0.75, -0.75."""
    reward = text.cosine_length(text.exact_answer(), max_length=100)
    lengths = [0, 25, 50, 100, 1000]
    ids = [[1] * n for n in lengths]
    quarter = 0.25 * (1 + math.sqrt(0.5))
    right = scores(reward, ["#### 7"] * 5, answer=["7"] * 5, completion_ids=ids)
    np.testing.assert_allclose(right, [1, 0.5 + quarter, 0.75, 0.5, 0.5])
    wrong = scores(reward, ["#### 8"] * 5, answer=["7"] * 5, completion_ids=ids)
    np.testing.assert_allclose(wrong, [-1, -0.5 - quarter, -0.75, -0.5, -0.5])


def test_cosine_length_takes_any_verifier_and_its_ends_are_arguments():
    def verifier(completions, level):
        return [level_ if completion else 2.0 for completion, level_ in zip(completions, level, strict=True)]

    ends = {"min_wrong": -4.0, "max_wrong": -3.0, "min_correct": 3.0, "max_correct": 4.0}
    reward = text.cosine_length(verifier, max_length=2, threshold=1.0, **ends)
    ids = [[], [1, 1], [], [1, 1], []]
    values = scores(
        reward, ["a", "a", "", "", "a"], level=[1.0, 1.0, 0.0, 0.0, None], completion_ids=ids, other=[0] * 5
    )
    assert values == [-4.0, -3.0, 4.0, 3.0, None]


def test_partial_credit_up_to_one_half_and_punishment_are_no_right_answer():
    reward = text.cosine_length(lambda **columns: [0.5, 0.51, -0.1, 1], max_length=1)
    assert scores(reward, [""] * 4, completion_ids=[[]] * 4) == [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_verifier_gives_that_is_no_number_is_refused(value):
    reward = text.cosine_length(lambda **columns: [0.0, value], max_length=1)
    with pytest.raises(ValueError, match=f"returned {value} for completion 1"):
        scores(reward, [""] * 2, completion_ids=[[]] * 2)


def test_a_verifier_that_returns_too_few_values_is_named():
    def short(**columns):
        return [1.0]

    with pytest.raises(ValueError, match="the reward function short returned 1 values for 2 completions"):
        scores(text.cosine_length(short, max_length=1), ["", ""], completion_ids=[[], []])


def test_an_async_verifier_is_waited_for():
    async def remote(completions):
        await asyncio.sleep(0)
        return [1.0, 0.0, None]

    class Remote:
        async def __call__(self, completions):
            return await remote(completions)

    for function in (remote, Remote()):
        reward = text.cosine_length(function, max_length=1)
        assert scores(reward, [""] * 3, completion_ids=[[]] * 3) == [1.0, -1.0, None]


@pytest.mark.parametrize("max_length", [0, -5])
def test_no_length_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length is a number of tokens above 0, got {max_length}"):
        text.cosine_length(text.exact_answer(), max_length=max_length)


# ------------------------------------------------------------------------- repetition


def test_repetition_penalty_gives_the_values_of_trl():
    """The first two are the example in TRL 1.16's docstring."""
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], [], [1, 2], [1, 2, 1, 2, 1]]
    values = scores(text.repetition_penalty(ngram=2), [""] * 6, completion_ids=ids)
    assert values == [0, -0.75, 0, 0, 0, -0.5]
    assert scores(text.repetition_penalty(ngram=2, max_penalty=-0.5), [""], completion_ids=[[5] * 5]) == [-0.375]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_repetition_penalty_is_the_formula_of_trl(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    expected = (1 - len(set(grams)) / len(grams)) * -2.0 if grams else 0.0
    value = score(text.repetition_penalty(ngram=n, max_penalty=-2.0), "", completion_ids=ids)
    assert value == pytest.approx(expected)
    assert math.copysign(1, value) == (-1 if value else 1)  # no -0.0


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"max_penalty": 0.1}, {"max_penalty": -math.inf}], ids=str)
def test_a_penalty_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="ngram is above 0 and max_penalty at most 0, got"):
        text.repetition_penalty(**settings)


# --------------------------------------------------------------------------- language


@pytest.mark.parametrize(
    ("written", "script", "expected"),
    [
        ("abc", "Latin", 1),
        ("abc", "LATIN", 1),
        ("abc中", "Latin", 0.75),
        ("abc中", "CJK", 0.25),
        ("Straße, déjà vu: 42!", "latin", 1),
        ("Привет ab", "Cyrillic", 0.75),
        ("３ ａｂ", "Latin", 1),
        ("日本ごカナ", ("CJK", "Hiragana", "Katakana"), 1),
        ("日本ごカナ", ("Hiragana",), 0.2),
        ("<think>中</think><answer>文</answer>", "CJK", 1),
        ("<b>中</b>", "CJK", 1 / 3),
        ("1+2=3 ✓", "Latin", 0),
        ("", "Latin", 0),
    ],
    ids=str,
)
def test_language_is_the_share_of_letters_of_the_script(written, script, expected):
    assert score(text.language_consistency(script=script), written) == pytest.approx(expected)


@pytest.mark.parametrize("script", ["Latn", "", (), ("Latin", "Elvish")], ids=str)
def test_a_script_that_no_letter_has_is_refused(script):
    with pytest.raises(ValueError, match=r"no letter has the script '\w*' in its Unicode name"):
        text.language_consistency(script=script)


# -------------------------------------------------------------------------- self_consistency


def answered(letters):
    return [f"<answer>{letter}</answer>" if letter != "-" else "none" for letter in letters]


@pytest.mark.parametrize(
    ("group", "chosen"),
    [
        ("aaab", "a"),
        ("abbb", "b"),
        ("aabc", "a"),
        ("aabb", ""),
        ("abcd", ""),
        ("a---", "a"),
        ("----", ""),
        ("ab--", ""),
        ("aaaa", "a"),
    ],
)
def test_the_majority_of_a_group_is_rewarded(group, chosen):
    """A tie has no majority, and a completion without an answer no vote."""
    for order in set(itertools.permutations(group)):
        expected = [1.0 if letter in chosen else -0.1 for letter in order]
        assert scores(text.self_consistency(group_size=4), answered(order)) == expected


def test_each_group_votes_for_itself():
    reward = text.self_consistency(group_size=3, majority=2.0, other=-1.0)
    completions = answered("aab") + answered("bba")
    assert reward(prompts=["p"] * 3 + ["q"] * 3, completions=completions) == [2, 2, -1, 2, 2, -1]


def test_answers_are_what_extract_says():
    reward = text.self_consistency(group_size=3, extract=lambda written: written.lower() or None)
    assert scores(reward, ["A", "a", "b"]) == [1.0, 1.0, -0.1]
    assert scores(reward, ["", "", "b"]) == [-0.1, -0.1, 1.0]


def test_an_answer_of_nothing_can_be_the_majority():
    """It is an answer all the same, unlike none."""
    assert scores(text.self_consistency(group_size=2), ["<answer></answer>"] * 2) == [1.0, 1.0]


@pytest.mark.parametrize("group_size", [1, 0, -3])
def test_a_group_of_less_than_two_is_refused(group_size):
    with pytest.raises(ValueError, match=f"got group_size = {group_size}"):
        text.self_consistency(group_size=group_size)


def test_what_are_no_groups_of_one_prompt_is_an_error():
    reward = text.self_consistency(group_size=2)
    with pytest.raises(ValueError, match="3 completions are no whole groups of group_size = 2"):
        scores(reward, ["a"] * 3)
    with pytest.raises(ValueError, match="completions 2 to 3 are one group with different prompts"):
        reward(prompts=["p", "p", "p", "q"], completions=["a"] * 4)


# ------------------------------------------------------------------------ worked_steps

STEPS = {  # text -> whether each calculation in it is right
    "3+4=7": [True],
    "3+4=8": [False],
    "7+8+0=15,3+5+1=09": [True, True],  # as the arithmetic task writes them
    "7+8+0=15,3+5+0=09": [True, False],
    "3+4*2=11": [True],
    "3+4*2=14": [False],
    "(3+4)*2=14": [True],
    "((1+2)*(3+4))/7=3": [True],
    "10-2-3=5": [True],
    "24/4/2=3": [True],
    "24/4*2=12": [True],
    "3 + 4 = 7.": [True],
    "0.1+0.2=0.3": [True],
    "0.1+0.2=0.30000000000000004": [False],
    ".5+.5=1": [True],
    "1,200+1=1,201": [True],
    "1,200+1=1201": [True],
    "1,20+1=21": [True],  # no thousands: a list
    "1,2345+1=2346": [True],
    "12 = 3 × 4": [True],
    "12 = 3 ÷ 4": [False],
    "6÷4=1.5": [True],
    "2x3=6": [True],
    "2 x 3 = 6": [True],
    "2·3=6": [True],
    r"2 \times 3 = 6, 2\times3=7, 6 \div 3 = 2, 2\cdot 4=8": [True, False, True, True],
    "5−3=2, 5–3=3": [True, False],
    "$5*3=$15": [True],
    r"\$5 * 3 = \$15": [True],
    "3+4*2=3+8=11": [True, True],
    "3+4*2=3+8=12": [True, False],
    "3+4=7*2=14": [False, True],
    "5*3=<<5*3=15>>15": [True],  # GSM8K's annotations
    "-5+3=-2": [True],
    "5*-3=-15": [True],
    "a = - 5 + 3 = -2": [True],
    "-(2+3)=-5": [True],
    "3+4=7 3+5=9": [True, False],
    "3+4=7 (which is right)": [True],
    "3+4=7 - which is right": [True],
    "(3+4=7)": [True],
    "3+4=7kg": [True],
    "1. 3+4=7": [True],
    "Step 2: 3+4=7": [True],
    "- 3+4=7\n* 3+4=8\n  + 3+4=7": [True, False, True],
    "所以3+4=7，3+5=8": [True, True],
    "3+4=\n7": [],
    # a division may be rounded to the decimals that are written
    "10/3=3.33": [True],
    "10/3=3.3": [True],
    "20/3=6.67": [True],
    "20/3=6.66": [False],
    "10/3=3": [False],
    "7/2=4": [False],
    "0.1+0.25=0.4": [False],
    "1/8=0.13": [True],
    "3.33=10/3": [False],
    "10/3=6.66/2": [False],
    "10/3=1+2.33": [False],
    # dividing by zero
    "1/0=5": [False],
    "5=1/0": [False],
    "1/0=1/0": [False],
    "1/(2-2)*0=0": [False],
    "0/0+1=1": [False],
    "1/0+=5": [],
    # passed over
    "5=5": [],
    "-2=-2": [],
    "x = 7": [],
    "2x=8": [],
    "3x + 2 = 11": [],
    "3x-2=10": [],
    "3x -2=10": [],
    "x + 2 + 4 = 11": [],
    "x - 5 + 3 = 2": [],
    "y -5+3=2": [],
    "y + 3 = 4 + 5 = 9": [True],
    "x2+3=5": [],
    "2^3+1=9": [],
    "2 ^ 3 + 1 = 9": [],
    "2**3=8": [],
    "2**3+1=9": [],
    "4²+3=19": [],
    "20+5=5²": [],
    "1+1=2^1": [],
    "5/20=25%": [],
    "50% + 3 = 3": [],
    "√16+3=7": [],
    "f(2)+3=5": [],
    "g(y)+3=5": [],
    "2(3+4)=14": [],
    "2 (3+4)=14": [],
    r"\frac{1}{2}+1=1.5": [],
    r"3 + 4 = \boxed{8}": [],
    "total - 3+4=7": [],
    "/ 3+4=7": [],
    "3+4=7*y": [],
    "1+" * 150 + "1=151": [],
    "151=" + "1+" * 150 + "1": [],
    "151= " + "1+" * 150 + "1": [],
    "a " * 200 + "3+4=7" + " a" * 200: [True],
    "3+4=y": [],
    "3+4==8": [],
    "3+4>=8": [],
    "3 apples + 4 apples = 8 apples": [],
    "(3+4=8": [False],
    "((3+4)=8": [False],
    "3+4)=8": [],
    "3+=4": [],
    "=": [],
    "a": [],
    "": [],
}


@pytest.mark.parametrize("written", STEPS, ids=lambda written: ascii(written[:40]))
def test_the_calculations_that_a_text_writes_are_checked(written):
    steps = STEPS[written]
    expected = sum(steps) / len(steps) if steps else 0.0
    assert score(text.worked_steps(), written) == expected
    # A right and a wrong one more tell a wrong step from none, and that these do not touch their neighbours.
    beside = [*steps, True, False]
    assert score(text.worked_steps(), f"1+1=2\n{written}\n1+1=3") == pytest.approx(sum(beside) / len(beside))


NUMBER = st.integers(0, 20).map(str) | st.decimals(0, 9, places=1).map(str)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@st.composite
def expressions(draw, depth=3):
    """Text, fully in parentheses, beside its value by the standard library's arithmetic; None by zero."""
    if depth == 0 or draw(st.booleans()):
        number = draw(NUMBER)
        return number, Fraction(number)
    (left, a), sign, (right, b) = (
        draw(expressions(depth - 1)),
        draw(st.sampled_from("+-*/")),
        draw(expressions(depth - 1)),
    )
    undefined = a is None or b is None or (sign == "/" and b == 0)
    return f"({left} {sign} {right})", None if undefined else OPERATORS[sign](a, b)


@settings(deadline=None)
@given(expressions(), expressions(), st.integers(0, 3))
def test_calculations_in_parentheses_have_the_value_of_exact_arithmetic(left, right, off):
    (a, value), (b, other) = left, right
    written = f"{a} = {b} - {b} + {a} + {off}"
    if "(" in a:
        assert score(text.worked_steps(), written) == float(None not in (value, other) and off == 0)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=7), st.data())
def test_precedence_is_that_of_python(numbers, data):
    signs = data.draw(st.lists(st.sampled_from("+-*/"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    written = "".join(f"{n}{sign}" for n, sign in zip(numbers, [*signs, ""], strict=True))
    exact = eval("".join(f"Fraction({n}){sign}" for n, sign in zip(numbers, [*signs, ""], strict=True)))
    steps = f"{written}={exact.numerator}/{exact.denominator}"
    assert score(text.worked_steps(), steps) == 1.0
    assert score(text.worked_steps(), f"{steps}+1") == 0.0


# ---------------------------------------------------------------------------- hostile

HOSTILE = """
import signal, sys
signal.setitimer(signal.ITIMER_VIRTUAL, 150)  # of its own processor time: kills it, if others are slow or not
from grpo_jax.rewards import text
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
    text.exact_answer, lambda: text.exact_answer(tolerance=0), text.format, text.strict_format, text.tag_count,
    text.reasoning_length, text.worked_steps, text.language_consistency, lambda: text.self_consistency(group_size=2),
]
for make in makers:
    for completion in completions:
        values = make()(["p", "p"], [completion, ""], answer=["2", "2"])
        assert all(-1 <= value <= 1 for value in values), (make, completion[:20], values)
ids = [[1] * N, list(range(N // 4))]
assert text.repetition_penalty()(["p"] * 2, [""] * 2, completion_ids=ids)[1] == 0
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
    assert score(text.worked_steps(), written) in (0.0, 1.0)


@pytest.mark.parametrize("digits", [38, 40, 41, 5000, 100_000])
def test_long_numbers_are_computed_exactly_up_to_forty_digits_and_then_passed_over(digits):
    """Python itself refuses to read more than 4300 digits."""
    number = "1" * (digits - 1) + "3"
    assert score(text.worked_steps(), f"{number}+1={number[:-1]}4") == float(digits <= 40)
    assert score(text.worked_steps(), f"1+1=2\n{number}+1={number}") == (0.5 if digits <= 40 else 1.0)


def test_nothing_that_a_completion_holds_is_run():
    written = "__import__('os').abort()+1=2\n(lambda: 1)()+1=2\n<answer>__import__('os').abort()</answer>"
    assert score(text.worked_steps(), written) == 0.0
    assert score(text.exact_answer(tolerance=0), written, answer="1") == 0.0


ANYTHING = st.text(st.sampled_from("0123456789+-*/x×()=.,$ \n%^<>\\ab²−") | st.characters(), max_size=60)


@settings(deadline=None, max_examples=500)
@given(ANYTHING, ANYTHING, st.lists(st.integers(0, 5), max_size=8))
def test_any_text_gets_a_finite_reward(written, other, ids):
    wrapped = f"<think>{written}</think><answer>{other}</answer>"
    columns = {"answer": [other, written], "completion_ids": [ids, ids[::-1]]}
    for make in [*MAKERS, lambda: text.exact_answer(tolerance=0)]:
        assert all(-1 <= value <= 1 for value in scores(make(), [written, wrapped], **columns))
