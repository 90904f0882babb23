"""The reading of answers in LaTeX, before a parser sees them."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards.latex import final_answer, gold_answer, read

READINGS = {  # LaTeX -> for the parser, unit
    r"\frac12": (r"\frac{1}{2}", ""),
    r"\frac{\sqrt3}2": (r"\frac{\sqrt{3}}{2}", ""),
    r"\sqrt[3]2": (r"\sqrt[3]{2}", ""),
    r"1\,234{,}567": ("1234567", ""),
    "12\u202f345": ("12345", ""),
    r"5\text{ million}": ("5000000", ""),
    r"2.5\text{ million dollars}": ("2500000", "dollar"),
    r"5\text{ hundred thousand}": ("500000", ""),
    r"\$36.": ("36", ""),
    r"5\text{ cm}^2": ("5", "centimeter"),
    "5 miles per hour": ("5", "mile hour"),
    r"$-\frac{1}{2}$": (r"-\frac{1}{2}", ""),
    "−5": ("-5", ""),
    r"-1\frac12": (r"-(1+\frac{1}{2})", ""),
    "4e-7": (r"4 \times 10^{-7}", ""),
    r"0.1\overline{6}": (r"\frac{1}{6}", ""),
    r"5\text{5}": ("55", ""),
    "2516_8": ("1358", ""),
    "3xyz": ("3xyz", ""),
}


@pytest.mark.parametrize("latex", READINGS)
def test_the_reading_of_an_answer(latex):
    reading = read(latex)
    assert (reading.latex, reading.unit) == READINGS[latex]


@pytest.mark.parametrize(
    "latex", ["", " ", r"5\text{ or more}", r"5\text{ or 6}", r"\frac12\text{ million}", r"5\text{k}"]
)
def test_what_cannot_be_read(latex):
    assert read(latex) is None


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"\boxed{4}. \boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"x = -\boxed{5}", "-5"),
        ("so\n- \\boxed{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 5", "5"),
        (r"\fbox{5}", "5"),
    ],
)
def test_the_last_box_is_the_final_answer(text, latex):
    assert final_answer(text).latex == latex


@pytest.mark.parametrize(
    "text", [r"\boxed{5} \boxed{6", "5", "", r"not \boxed{5}", "the answer is not $5$", r"\boxed{}"]
)
def test_a_text_without_a_final_answer(text):
    assert final_answer(text) is None


PIECES = [
    "\\boxed{",
    "{",
    "}",
    "$",
    "\\(",
    "\\)",
    "\\text{",
    "\\frac",
    "\\sqrt",
    "1",
    "1,",
    " ",
    "a",
    "answer",
    "-",
    "_",
    ".",
    "/",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES) | st.characters(), max_size=30).map("".join))
def test_any_text_is_read_or_not(text):
    for reading in (final_answer(text), gold_answer(text), read(text), final_answer(rf"\boxed{{{text}}}")):
        assert reading is None or (reading.latex and reading.text is not None)


@pytest.mark.parametrize(
    "piece", [*PIECES, "\\boxed{1}", "\\boxed{1},", "answer $1$ ", "1 ", "1 a", "a ", "$1$ and ", "\\boxed 1"]
)
def test_reading_takes_time_that_grows_with_the_length(piece):
    text = piece * (10_000 // len(piece))
    began = time.process_time()
    for wrapped in (text, rf"\boxed{{{text}}}", f"the answer is ${text}$"):
        final_answer(wrapped)
        gold_answer(wrapped)
    assert time.process_time() - began < 2
