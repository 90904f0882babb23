"""Digests by which a run is known to be the same run."""

import importlib
import re

import numpy as np
import pytest

from grpo_jax import rewards, testing
from grpo_jax.run import digests


def test_rows_differ_by_any_value_and_by_their_order_and_not_by_the_order_of_columns():
    rows = [{"prompt": "a", "answer": 1, "tests": ["x", {"y": None, "z": 1}]}, {"prompt": "b", "answer": 2}]
    digest = digests.of_rows(rows)
    assert digests.of_rows([dict(reversed(row.items())) for row in rows]) == digest
    for other in (
        [rows[0] | {"answer": 2}, rows[1]], [rows[0] | {"answer": "1"}, rows[1]], rows[::-1], rows[:1],
        [rows[0] | {"tests": ["x", {"y": None, "z": 2}]}, rows[1]],
    ):  # fmt: skip
        assert digests.of_rows(other) != digest


def test_values_that_are_no_json_have_digests_that_are_the_same_in_every_process():
    class Opaque: ...

    def of(*values):
        return digests.of_rows([{"x": value} for value in values])

    assert of(Opaque()) == of(Opaque())
    assert of({"b", "a", "c"}) == of({"c", "a", "b"}) != of({"a"})
    assert of(np.arange(3)) == of([0, 1, 2]) != of([0, 1, 3])
    assert of(b"a") != of(b"b")
    assert of({1: "a"}) == of({"1": "a"})


def test_a_run_with_other_answers_or_ends_is_refused_and_a_date_in_the_template_is_told():
    def of(prompts=((1, 2),), answer=1, eos_ids=(0, 2), held_out=((5, 6),)):
        rows = [{"prompt": "a", "answer": answer}]
        return digests.of_run(
            testing.tiny_tokenizer(), {"w": np.ones(2)}, prompts=prompts, held_out=held_out, rows=rows,
            held_out_rows=rows, eos_ids=eos_ids,
        )  # fmt: skip

    digests.check(of(), of())
    columns = "the answers and other columns of the data to"
    for changed, message in (
        ({"answer": 2}, f"{columns} train on, {columns} evaluate on. Settings"),
        ({"eos_ids": (0,)}, "the tokens that end a completion. Settings"),
        ({"held_out": ((6, 5),)}, "the data to evaluate on"),
        (
            {"prompts": ((1, 3),)},
            "is another one (or the chat template writes today's date: name the day with --date-st",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            digests.check(of(), of(**changed))


def test_the_files_of_functions_are_digested_but_for_those_of_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_digested.py").write_text("def reward(completions): ...")
    reward = importlib.import_module("mine_digested").reward
    before = digests.of_code([reward, reward, rewards.exact_answer(), len])
    assert list(before) == ["the code of mine_digested.py"]
    (tmp_path / "mine_digested.py").write_text("def reward(completions): return []")
    assert digests.changed_code(before, digests.of_code([reward])) == list(before)
    assert digests.changed_code({}, before) == []
    digests.check(before, digests.of_code([reward]))


def test_a_change_of_what_code_imports_from_its_folder_is_seen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_helping").mkdir()
    (tmp_path / "mine_helping" / "maths.py").write_text("limit = 1")
    (tmp_path / "mine_helped.py").write_text("import numpy\nfrom mine_helping.maths import limit\ndef reward(): ...")
    reward = importlib.import_module("mine_helped").reward
    before = digests.of_code([reward])
    assert list(before) == ["the code of mine_helped.py", "the code of mine_helping/maths.py"]
    (tmp_path / "mine_helping" / "maths.py").write_text("limit = 2")
    assert digests.changed_code(before, digests.of_code([reward])) == ["the code of mine_helping/maths.py"]
    installed = digests.of_code([np.load])  # has its own file alone
    assert len(installed) <= 1


@pytest.mark.parametrize("changed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_change_of_either_of_two_files_of_one_name_is_seen(changed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = [f"mine_{changed}_of_maths", f"mine_{changed}_of_code"]  # modules stay imported
    for package in packages:
        (tmp_path / package).mkdir()
        (tmp_path / package / "correct.py").write_text("def reward(completions): ...")
    functions = [importlib.import_module(f"{package}.correct").reward for package in packages]
    before = digests.of_code(functions)
    (tmp_path / packages[changed] / "correct.py").write_text("def reward(completions): return []")
    assert digests.changed_code(before, digests.of_code(functions)) == ["the code of correct.py"]
