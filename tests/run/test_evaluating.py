"""The settings of scripts for what a run is evaluated on."""

import pathlib

import pytest

from grpo_jax.run.evaluating import EvaluationSettings

ROWS = [{"prompt": str(i)} for i in range(10)]


def test_rows_are_held_out_of_the_data_or_come_from_a_file():
    train, held_out = EvaluationSettings(eval_rows=3).hold_out(ROWS, pytest.fail, seed=0)
    assert len(held_out) == 3
    assert sorted(row["prompt"] for row in train + held_out) == sorted(row["prompt"] for row in ROWS)
    path = pathlib.Path("held_out.jsonl")
    assert EvaluationSettings(eval_data=path).hold_out(ROWS, lambda source: [source], seed=0) == (ROWS, [path])
    assert EvaluationSettings().hold_out(ROWS, pytest.fail, seed=0) == (ROWS, [])


def test_an_evaluation_that_is_asked_for_without_rows_is_told_to_be_none(capsys):
    EvaluationSettings(evaluate_every=5).hold_out(ROWS, pytest.fail, seed=0)
    assert "--evaluate-every 5 has no effect without --eval-rows or --eval-data" in capsys.readouterr().out
    EvaluationSettings(evaluate_every=5, eval_rows=2).hold_out(ROWS, pytest.fail, seed=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_rows": 3, "eval_data": pathlib.Path("x.jsonl")}, "leave them out beside --eval-data"),
        ({"eval_group_size": 4}, "--eval-group-size 4 is of an evaluation"),
    ],
    ids=["both", "neither"],
)
def test_what_has_no_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings).hold_out(ROWS, pytest.fail, seed=0)
