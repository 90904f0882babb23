"""Summaries of results: one number per seed, means with intervals, differences between conditions seed by seed."""

import numpy as np
import pytest

from grpo_jax.run import metrics
from grpo_jax.study import results
from grpo_jax.study.intervals import bootstrap


def rows_of(values, metric="score"):
    """Rows of `{condition: {seed: curve}}`, a step each ten."""
    return [
        {"condition": condition, "seed": seed, "step": 10 * n, metric: value}
        for condition, curves in values.items()
        for seed, curve in curves.items()
        for n, value in enumerate(curve)
    ]


CURVES = {"a": {0: [0.0, 1.0, 5.0], 4: [0.0, 3.0, 6.0]}, "b": {0: [0.0, 1.0, 2.0], 4: [0.0, 0.0, 3.0]}}


def test_a_curve_becomes_one_number_per_seed():
    rows = rows_of(CURVES)
    chosen = {"last": [5.0, 6.0], "average": [2.0, 3.0], "highest": [5.0, 6.0]}
    for name, reduce in {"last": results.last, "average": results.average, "highest": max}.items():
        np.testing.assert_array_equal(results.per_seed(rows, "score", reduce)["a"], chosen[name])
    assert list(results.per_seed(rows, "score")) == ["a", "b"]
    np.testing.assert_array_equal(results.per_seed(rows, "score")["b"], [2.0, 3.0])  # the last, unless told otherwise


def test_rows_without_a_metric_have_no_part_in_its_curve():
    rows = [row for row in rows_of(CURVES) if row["step"] > 0] + rows_of({"c": {0: [1.0]}}, "other")
    np.testing.assert_array_equal(results.per_seed(rows, "score", results.average)["a"], [3.0, 4.5])
    assert list(results.per_seed(rows, "other")) == ["c"]
    with pytest.raises(ValueError, match=r"no row has the metric 'loss'; there are .*'other', 'score'"):
        results.per_seed(rows, "loss")


def paired():
    """Eight seeds with starts far apart; under `b` each ends by about 0.1 higher."""
    rng = np.random.default_rng(0)
    offsets, noise = rng.normal(0, 1, 8), rng.normal(0, 0.02, 8)
    return rows_of(
        {"a": {s: [0.0, offsets[s]] for s in range(8)}, "b": {s: [0.0, offsets[s] + 0.1 + noise[s]] for s in range(8)}}
    )


def test_differences_seed_by_seed_are_narrower_than_the_means_of_seeds_that_share_a_start():
    rows = paired()
    summary = results.summarise(rows, ["score"], against="a")
    assert list(summary) == ["a", "b"]
    assert list(summary["a"]) == ["score"]
    difference = summary["b"]["score - a"]
    a, b = (results.per_seed(rows, "score")[name] for name in "ab")
    assert summary["b"]["score"] == bootstrap(b)
    assert difference == bootstrap(b - a)
    assert 0.05 < difference.low < difference.high < 0.12
    width = summary["b"]["score"].high - summary["b"]["score"].low
    assert difference.high - difference.low < 0.1 * width
    halves = results.summarise(rows, ["score"], reduce=results.average)
    assert list(halves["b"]) == ["score"]
    np.testing.assert_allclose(halves["b"]["score"], np.array(summary["b"]["score"]) / 2)


def test_seeds_that_are_not_the_same_are_not_compared():
    for curves in ({0: [1.0]}, {0: [1.0], 5: [1.0]}):
        with pytest.raises(ValueError, match=r"'b' has the seeds .*, 'a' \[0, 4\]"):
            results.summarise(rows_of(CURVES | {"b": curves}), ["score"], against="a")
    with pytest.raises(ValueError, match=r"no condition 'c'; there are \['a', 'b'\]"):
        results.summarise(rows_of(CURVES), ["score"], against="c")


def test_a_metric_that_only_one_condition_has_is_summarised_and_not_compared():
    rows = rows_of(CURVES) + rows_of({"b": CURVES["b"]}, "more")
    summary = results.summarise(rows, ["score", "more"], against="a")
    assert {name: list(columns) for name, columns in summary.items()} == {
        "a": ["score"],
        "b": ["score", "score - a", "more"],
    }


def test_a_seed_that_diverged_is_not_hidden_in_a_mean():
    rows = rows_of({"a": {0: [0.0, 1.0], 4: [0.0, float("nan")]}})
    assert np.isnan(results.summarise(rows, ["score"])["a"]["score"]).all()


def test_runs_of_a_script_become_rows_seed_by_seed(tmp_path):
    for condition, gain in (("grpo", 0.0), ("mine", 0.25)):
        for seed, start in enumerate((0.5, 0.125)):
            for n in range(2):
                line = {"reward": start + gain * n, "loss": float("nan"), "note": "text"}
                metrics.append(tmp_path / condition / str(seed), n, line)
            metrics.append(tmp_path / condition / str(seed), 2, {"eval/reward": start + 2 * gain})
    folders = {name: [tmp_path / name / "0", tmp_path / name / "1"] for name in ("grpo", "mine")}
    rows = results.of_runs(folders)
    assert [(row["condition"], row["seed"], row["step"]) for row in rows[2:5]] == [
        ("grpo", 0, 2), ("grpo", 1, 0), ("grpo", 1, 1)
    ]  # fmt: skip
    assert np.isnan(rows[0]["loss"])
    assert "note" not in rows[0]
    summary = results.summarise(rows, ["reward", "eval/reward"], against="grpo")
    assert summary["mine"]["reward - grpo"].mean == pytest.approx(0.25)
    assert summary["mine"]["eval/reward - grpo"].mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"has no metrics.jsonl: the folder of a run of 'mine'"):
        results.of_runs(folders | {"mine": [tmp_path / "elsewhere"]})
