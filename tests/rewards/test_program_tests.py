"""Tests of programs in the forms of public data sets."""

import json

import numpy as np
import pytest

from grpo_jax.rewards.program_tests import pairs_of, parsed

PAIRS = [("1 2\n", "3"), ("0 0\n", "0")]
FORMS = {
    "pairs": PAIRS,
    "lists": [list(pair) for pair in PAIRS],
    "DeepCoder": [{"type": "stdin_stdout", "input": a, "output": b} for a, b in PAIRS],
    "LiveCodeBench": [
        {"input": a, "output": b, "testtype": "stdin", "metadata": {"func_name": None}} for a, b in PAIRS
    ],
    "APPS": {"inputs": [a for a, _ in PAIRS], "outputs": [b for _, b in PAIRS]},
    "a null as a table fills it in": {"inputs": [a for a, _ in PAIRS], "outputs": ["3", "0"], "fn_name": None},
    "CodeContests": {"input": [a for a, _ in PAIRS], "output": [b for _, b in PAIRS]},
    "lines, and numbers": [(["1 2", ""], 3), (["0 0", ""], 0)],
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_holds_the_same_pairs(form):
    assert pairs_of(FORMS[form]) == PAIRS
    assert pairs_of(parsed(json.dumps(FORMS[form]))) == PAIRS


def test_arrays_are_lists_and_python_stays_itself():
    assert pairs_of(parsed(np.array([["1", "2"]]))) == [("1", "2")]
    assert parsed("assert f(1) == 2") == "assert f(1) == 2"
    assert parsed("[f(1) == 2 or fail()]") == "[f(1) == 2 or fail()]"


@pytest.mark.parametrize(
    "tests",
    [
        None,
        3,
        [],
        {},
        [{}],
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": "12", "outputs": "34"},
        {"inputs": [[1, 2]], "outputs": [[3]]},
        [{"input": "1", "output": "2", "checker": "x"}],
        [{"a": 1, "b": 2}],
        {"a": 1, "b": 2},
        pytest.param([{"1", "2"}], id="a pair without an order"),  # its repr changes with each process
        ["12", ("1", "2")],
        [("1", "2", "3")],
        [("1", None)],
        [("1", {"2": 3})],
    ],
    ids=repr,
)
def test_other_forms_are_refused(tests):
    with pytest.raises(ValueError, match=r"tests are Python as a string|is text, or a list of its lines"):
        pairs_of(tests)


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": [[1]], "outputs": [[2]], "fn_name": "f"},
        [{"type": "function_call", "input": [1], "output": 2}],
        [{"testtype": "functional", "input": "1", "output": "2"}],
        [{"input": "1", "output": "2", "metadata": {"func_name": "f"}}],
    ],
    ids=repr,
)
def test_tests_that_call_a_function_are_refused_with_what_to_write(tests):
    with pytest.raises(ValueError, match=r"assert f\(1\) == 2"):
        pairs_of(tests)
