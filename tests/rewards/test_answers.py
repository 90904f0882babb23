"""The answer in a text, and whether it is the reference."""

import math
import re

import pytest
from calls import score, scores

from grpo_jax import rewards
from grpo_jax.tasks import countdown

ANSWERS = {  # text, answer
    "tags": ("so <answer>7</answer>.", "7"),
    "white space": ("<answer>\n 7\t</answer>", "7"),
    "first of two": ("<answer>7</answer><answer>8</answer>", "7"),
    "first of two, wrong": ("<answer>8</answer><answer>7</answer>", "8"),
    "nested": ("<answer><answer>7</answer></answer>", "<answer>7"),
    "a stray close first": ("</answer><answer>7</answer>", "7"),
    "empty": ("<answer></answer>", None),
    "blank": ("<answer> \n</answer>", None),
    "not closed": ("<answer>7", None),
    "not closed, with a mark": ("#### 7\n<answer>8", None),
    "not opened": ("7</answer>", None),
    "mark": ("72/2=36\n#### 36", "36"),
    "mark and more lines": ("#### 36\nand more", "36"),
    "mark twice": ("#### Step 1\n5\n#### 36", "36"),
    "mark without a line": ("####", None),
    "thoughts that do not end": ("<think>I should put <answer>7</answer> or 8", None),
    "a mark in thoughts that do not end": ("<think>#### 7", None),
    "thoughts that begin again": ("<think>a</think>b<think>#### 7", None),
    "tags before the mark": ("<answer>7</answer>\n#### 8", "7"),
    "tags after the mark": ("#### 8\n<answer>7</answer>", "7"),
    "the instruction in the thoughts": ("<think>between <answer> and </answer>.</think><answer>7</answer>", "7"),
    "an answer in the thoughts": ("<think><answer>8</answer> or</think><answer>7</answer>", "7"),
    "a mark in the thoughts": ("<think>#### 8\n</think><answer>7</answer>", "7"),
    "only in the thoughts": ("<think><answer>7</answer></think>", None),
    "only a mark in the thoughts": ("<think>#### 7\n</think>so", None),
    "thoughts, then a mark": ("<think><answer>8</answer></think>\n#### 7", "7"),
    "two after the thoughts": ("<think>a</think><answer>8</answer><answer>7</answer>", "8"),
    "thoughts that end twice": ("a</think><answer>8</answer></think><answer>7</answer>", "7"),
    "thoughts that the prompt opened": ("between <answer> and </answer>.</think><answer>7</answer>", "7"),
    "neither": ("it is 7", None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_answer_of_a_text(case):
    written, answer = ANSWERS[case]
    assert rewards.answer_of(written) == answer
    assert score(rewards.exact_answer(), written, answer="7") == float(answer == "7")
    if answer is not None:
        assert score(rewards.exact_answer(), written, answer=f" {answer}\n") == 1.0


@pytest.mark.parametrize("pattern", [r"[Aa]nswer: (\w+)|so (\w+)", re.compile("answer: (\\w+)", re.IGNORECASE)])
def test_a_pattern_of_the_users_says_where_the_answer_is(pattern):
    completions = ["Answer: 7. Answer: 8", "answer: 8, answer: 7", "<answer>7</answer>", "so 7"]
    assert scores(rewards.exact_answer(pattern=pattern), completions, answer=["7"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_a_pattern_without_a_group_is_the_answer_itself():
    assert rewards.answer_of("it is 12 or 13", r"\d+") == "12"
    assert rewards.answer_of("none", r"\d+") is None


def test_a_missing_reference_is_masked_and_a_missing_answer_is_wrong():
    assert scores(rewards.exact_answer(), ["<answer>7</answer>", "7"], answer=[None, "7"]) == [None, 0.0]


@pytest.mark.parametrize("reference", ["", " \n", "NaN", math.nan, math.inf, -math.inf, None])
def test_an_empty_reference_or_none_that_is_finite_is_missing(reference):
    for tolerance in (None, 0):
        reward = rewards.exact_answer(tolerance=tolerance)
        assert scores(reward, [f"#### {reference}", "<answer></answer>"], answer=[reference] * 2) == [None, None]


def test_what_is_empty_without_its_markup_is_no_answer():
    reward = rewards.exact_answer(normalise=lambda written: written.strip("$"))
    assert scores(reward, ["#### $$", "#### 7", "#### $$"], answer=["7", "$", "$"]) == [0.0, None, None]


def test_references_may_be_numbers_and_of_another_column():
    assert scores(rewards.exact_answer(column="solution"), ["#### 7", "#### 7"], solution=[7, 8]) == [1.0, 0.0]


@pytest.mark.parametrize("reference", [["7"], {"x": "7"}, ("7",), {7}, b"7"], ids=["list", "dict", "tuple", "set", "b"])
def test_a_reference_that_is_neither_text_nor_a_number_is_refused(reference):
    with pytest.raises(ValueError, match=f"a gold answer is text or a number, got a {type(reference).__name__}"):
        scores(rewards.exact_answer(), ["#### 7"], answer=[reference])


def test_a_whole_number_is_itself_also_where_its_column_has_made_it_a_decimal():
    assert scores(rewards.exact_answer(), ["#### 72", "#### 72.0", "#### 2.5"], answer=[72.0, 72.0, 2.5]) == [1, 0, 1]


def test_of_a_worked_solution_what_follows_the_mark_is_the_reference():
    """Else GSM8K's rows, read without `--answer-after`, would have no right answer."""
    golds = ["48 + 24 = 72.\n#### 72", "48 + 24 = 72.\n#### 72", "so\n####"]
    assert scores(rewards.exact_answer(), ["#### 72", "#### 24", "#### 72"], answer=golds) == [1.0, 0.0, None]


def test_a_missing_column_is_an_error_with_its_name():
    with pytest.raises(ValueError, match=r"exact_answer compares with the column 'answer'; .* \['solution'\]"):
        score(rewards.exact_answer(), "#### 7", solution="7")


def test_both_sides_are_normalised_alike():
    completions = ["<answer> Paris </answer>", "<answer>PARIS</answer>", "<answer>London</answer>"]
    assert scores(rewards.exact_answer(normalise=str.casefold), completions, answer=["pariS"] * 3) == [1.0, 1.0, 0.0]
    assert scores(rewards.exact_answer(), completions, answer=["Paris"] * 3) == [1.0, 0.0, 0.0]


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
    "seven": None,
    "7 8": None,
    "1/2": None,
    "1e1000": None,
    "٧": None,
    "1_000": None,
    "0" * 99 + "7": 7,
    "0" * 100 + "7": None,
}


@pytest.mark.parametrize("written", NUMBERS, ids=lambda written: repr(written[:12]))
def test_what_reads_as_a_number_is_compared_as_one(written):
    value = NUMBERS[written]
    reward = rewards.exact_answer(tolerance=0)
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
    assert score(rewards.exact_answer(tolerance=0.01), f"#### {answer}", answer=reference) == expected


def test_a_completion_that_is_no_finite_number_is_within_no_tolerance():
    completions = ["#### nan", "#### inf", "#### -Infinity", "#### 1e1000"]
    assert scores(rewards.exact_answer(tolerance=10**9), completions, answer=["7"] * 4) == [0.0] * 4


def test_a_tolerance_is_the_decimal_that_was_written():
    """As a float, 0.3 is below it."""
    assert scores(rewards.exact_answer(tolerance=0.3), ["#### 1.3", "#### 1.31"], answer=["1", "1"]) == [1.0, 0.0]


def test_without_a_tolerance_numbers_are_text():
    assert scores(rewards.exact_answer(), ["#### 7.0", "#### 1,000"], answer=["7", "1000"]) == [0.0, 0.0]


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match=f"the tolerance is a number of at least 0, .* got {tolerance}"):
        rewards.exact_answer(tolerance=tolerance)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"the pattern '\(' is no regular expression"):
        rewards.exact_answer(pattern="(")


def test_an_answer_goes_on_from_the_tag_that_its_prompt_opens():
    reward = rewards.exact_answer()
    assert score(reward, "7</answer>", answer="7", prompt_tail="So:\n<answer>") == 1.0
    assert score(reward, "7</answer>", answer="7", prompt_tail="<think>\n") == 0.0
    assert score(reward, "#### 7", answer="7", prompt_tail="assistant\n<think>\n") == 0.0
    assert score(reward, "so</think>#### 7", answer="7", prompt_tail="assistant\n<think>\n") == 1.0
    completions = ["7</answer>", "8</answer>", "7</answer>"]
    tails = ["<answer>"] * 3
    assert scores(rewards.self_consistency(group_size=3), completions, prompt_tail=tails) == [1.0, -0.1, 1.0]


def test_an_answer_in_thoughts_that_the_prompt_opens_is_none_for_a_task():
    columns = {"numbers": [2, 3], "target": 6}
    for tail, expected in (("assistant\n<think>\n", 0.0), ("assistant\n", 1.0), (None, 1.0)):
        assert score(countdown.correct, "<answer>2 * 3</answer>", prompt_tail=tail, **columns) == expected
    written = "between <answer> and </answer>.</think><answer>2 * 3</answer>"
    assert score(countdown.correct, written, prompt_tail="assistant\n<think>\n", **columns) == 1.0


PLAIN = {  # written -> without markup, and any units
    "18": ("18", "18"),
    "$18$": ("18", "18"),
    r"\(18\)": ("18", "18"),
    "**18**": ("18", "18"),
    "`18`": ("18", "18"),
    "*18*": ("18", "18"),
    r"\boxed{18}": ("18", "18"),
    r"$\boxed{\frac{1}{2}}$.": (r"\frac{1}{2}", r"\frac{1}{2}"),
    r"**\boxed{18}**": ("18", "18"),
    r"\boxed{1} and \boxed{2}": (r"\boxed{1} and \boxed{2}", r"\boxed{1} and \boxed{2}"),
    "18 dollars": ("18 dollars", "18"),
    "$18$ dollars.": ("$18$ dollars", "18"),
    r"18 \text{ apples}": (r"18 \text{ apples}", "18"),
    "18 thousand": ("18 thousand", "18 thousand"),
    "18 or more": ("18 or more", "18 or more"),
    **{f"18 {word}": (f"18 {word}", f"18 {word}") for word in ("tenths", "x", "quadrillion", "pi", "maybe")},
    "not 18": ("not 18", "not 18"),
    "Paris": ("Paris", "Paris"),
    "": ("", ""),
}


@pytest.mark.parametrize("written", PLAIN)
def test_markup_and_units_are_taken_off_where_asked_for(written):
    without_markup, without_units = PLAIN[written]
    assert rewards.plain_answer()(written) == without_markup
    assert rewards.plain_answer(units=None)(written) == without_units


def test_an_answer_in_markup_is_right_where_asked_for():
    completions = ["<answer>$18$</answer>", "<answer>**18**</answer>", "<answer>18 dollars</answer>"]
    options = {"as it is": None, "plain": rewards.plain_answer(), "dollars": rewards.plain_answer(units=["dollars"])}
    values = {
        name: scores(rewards.exact_answer(normalise=normalise), completions, answer=["18"] * 3)
        for name, normalise in options.items()
    }
    assert values == {"as it is": [0, 0, 0], "plain": [1, 1, 0], "dollars": [1, 1, 1]}
