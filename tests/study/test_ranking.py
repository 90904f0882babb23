"""Rankings at each condition's best rate: against SciPy, the definitions in plain Python, and published tables."""

import math

import numpy as np
import pytest
import scipy.stats

from grpo_jax.study import ranking
from grpo_jax.study.grid import Condition
from grpo_jax.study.results import average


def rows_of(values):
    """Rows of curves of two steps: condition -> [seeds] of means."""
    return [
        {"condition": name, "seed": seed, "step": step, "greedy": value + (0.1 if step else -0.1)}
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
        for step in (0, 10)
    ]


def test_each_condition_is_run_at_each_rate_and_then_at_its_own():
    run = object()
    conditions = [Condition("a", run, {"beta": 1.0}), Condition("b", run, {"beta": 2.0})]
    grid = ranking.at_each_rate(conditions, (1e-4, 1e-3))
    assert [c.name for c in grid] == ["a @ 0.0001", "a @ 0.001", "b @ 0.0001", "b @ 0.001"]
    assert grid[1].hyper == {"beta": 1.0, "learning_rate": 1e-3}
    assert all(c.run is run for c in grid)
    ranked = ranking.at_rates(conditions, {"a": 1e-3, "b": 1e-4})
    assert [(c.name, c.hyper["learning_rate"]) for c in ranked] == [("a", 1e-3), ("b", 1e-4)]
    rates = (0.1234567891234, 1 / 3)  # whose digits are all kept
    rows = rows_of({condition.name: [0.0] for condition in ranking.at_each_rate(conditions, rates)})
    assert tuple(ranking.by_rate(rows, "greedy")["a"]) == rates
    with pytest.raises(ValueError, match="at least 2 learning rates that rise"):
        ranking.at_each_rate(conditions, (1e-3, 1e-4))


def test_the_best_rate_is_that_of_the_highest_mean_and_the_area_is_over_log_rates():
    values = {
        "a @ 0.0001": [0.2, 0.4], "a @ 0.001": [0.6, 0.8], "a @ 0.1": [0.1, 0.3],
        "b @ 0.0001": [0.5, 0.5], "b @ 0.001": [0.5, 0.5], "b @ 0.1": [math.nan, 0.9],
    }  # fmt: skip
    rows = rows_of(values)
    best = ranking.best_rates(rows, "greedy", average)
    assert best == {"a": 1e-3, "b": 1e-4}
    assert ranking.at_the_edge(rows, best, "greedy") == ["b"]
    area = ranking.sensitivity(rows_of({k: v for k, v in values.items() if k[0] == "a"}), "greedy", average)["a"]
    by_seed = [((a + b) / 2 * 1 + (b + c) / 2 * 2) / 3 for a, b, c in ((0.2, 0.6, 0.1), (0.4, 0.8, 0.3))]  # decades
    assert area.mean == pytest.approx(np.mean(by_seed))
    with pytest.raises(ValueError, match="'c' has no finite greedy at any of the rates"):
        ranking.best_rates(rows_of({"c @ 1": [math.nan], "c @ 2": [math.inf]}), "greedy")


@pytest.mark.parametrize("n", [3, 8, 12])
def test_the_p_value_is_that_of_scipys_permutation_test_of_all_signs(n):
    differences = np.random.default_rng(n).normal(0.4, 1.0, n)
    reference = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert ranking.sign_flip_p_value(differences) == pytest.approx(reference.pvalue)


def test_means_that_differ_by_their_rounding_alone_are_as_far():
    assert abs(sum([0.1, 0.2, -0.3, 0.1, -0.1])) > 0  # by 6e-17, and others by 0
    assert ranking.sign_flip_p_value(np.array([0.1, 0.2, -0.3, 0.1, -0.1])) == 1.0


def test_at_random_signs_it_is_near_that_of_all_and_never_0():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 14)
    reference = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert ranking.sign_flip_p_value(differences) == pytest.approx(reference.pvalue, abs=0.01)
    assert ranking.sign_flip_p_value(np.full(32, 0.5)) == pytest.approx(1 / 20_001)
    assert ranking.sign_flip_p_value(np.zeros(32)) == 1.0


def test_holms_correction_is_its_definition():
    # Holm's procedure by hand: p sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then the running maximum.
    assert ranking.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert ranking.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert ranking.holm([]) == []


@pytest.mark.parametrize(("effect", "power", "level", "seeds"), [
    (0.2, 0.8, 0.05, 199), (0.5, 0.8, 0.05, 34), (0.8, 0.8, 0.05, 15), (0.5, 0.9, 0.05, 44), (0.5, 0.8, 0.01, 51),
])  # fmt: skip
def test_the_seeds_that_are_needed_are_those_of_the_tables_of_the_paired_t_test(effect, power, level, seeds):
    """G*Power 3.1's numbers for a difference between two dependent means, two-sided."""
    assert ranking.seeds_needed(1.0, difference=effect, power=power, level=level) == seeds
    assert ranking.seeds_needed(10.0, difference=10 * effect, power=power, level=level) == seeds


def test_no_spread_needs_no_more_than_two_seeds_and_bad_settings_are_refused():
    assert ranking.seeds_needed(0.0) == 2
    with pytest.raises(ValueError, match="difference is above 0"):
        ranking.seeds_needed(1.0, difference=0.0)


def test_a_ranking_compares_seed_by_seed():
    rng = np.random.default_rng(0)
    start = rng.normal(0.5, 0.3, 10)  # what seeds share, and what would hide the differences
    values = {"base": start, "better": start + 0.05 + rng.normal(0, 0.01, 10), "same": start + rng.normal(0, 0.02, 10)}
    lines = ranking.rank(rows_of(values), "greedy", against="base", reduce=average)
    assert [line.condition for line in lines] == sorted(values, key=lambda name: -np.mean(values[name]))
    by_name = {line.condition: line for line in lines}
    assert by_name["base"].difference is None
    better, differences = by_name["better"], values["better"] - values["base"]
    reference = scipy.stats.bootstrap((differences,), np.mean, method="BCa", rng=np.random.default_rng(1))
    np.testing.assert_allclose(better.difference[1:], reference.confidence_interval, atol=2e-3)
    assert better.p_value == pytest.approx(2 / 2**10)
    assert better.adjusted == pytest.approx(2 * better.p_value)
    assert by_name["same"].adjusted > 0.05
    assert better.seeds_needed == ranking.seeds_needed(np.std(differences, ddof=1))
    header, table = ranking.cells(lines, dict.fromkeys(values, 3e-4), "greedy")
    assert len(header) == len(table[0]) == len(table[-1])
    assert header[-1] == "seeds for 0.02"
    lines = ranking.rank(rows_of(values), "greedy", against="base", reduce=average, difference=0.5)
    assert ranking.cells(lines, dict.fromkeys(values, 3e-4), "greedy")[0][-1] == "seeds for 0.5"
    with pytest.raises(ValueError, match="greedy of odd is not finite"):
        ranking.rank(rows_of(values | {"odd": start + math.nan}), "greedy", against="base")


def test_the_order_of_the_rows_changes_nothing():
    rows = rows_of({"base": [0.1, 0.5, 0.3, 0.2], "other": [0.2, 0.7, 0.3, 0.5]})
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert shuffled != rows
    assert ranking.rank(shuffled, "greedy", against="base") == ranking.rank(rows, "greedy", against="base")


def test_rates_of_other_seeds_have_no_area_seed_by_seed_and_no_best():
    rows = rows_of({"a @ 0.001": [0.1, 0.2, 0.3], "a @ 0.01": [0.2, 0.3, 0.4], "b @ 0.001": [0.1]})
    missing = [row for row in rows if (row["condition"], row["seed"]) != ("a @ 0.01", 1)]
    other = [row for row in missing if (row["condition"], row["seed"]) != ("a @ 0.001", 2)]  # as many, but not the same
    for f in (ranking.sensitivity, ranking.best_rates):
        for rows_left in (missing, other):
            with pytest.raises(ValueError, match=r"'a @ 0.01' has greedy of the seeds \[0, 2\], 'a @ 0.001' of"):
                f(rows_left, "greedy")


@pytest.mark.parametrize("differences", [[], [np.nan, 1.0], [np.inf, 0.5]], ids=str)
def test_no_p_value_is_made_of_what_was_not_measured(differences):
    with pytest.raises(ValueError, match="at least one difference, all of them finite"):
        ranking.sign_flip_p_value(np.array(differences))


@pytest.mark.parametrize("p_value", [-0.1, 1.1, np.nan], ids=str)
def test_holm_corrects_probabilities_alone(p_value):
    with pytest.raises(ValueError, match="p-values are from 0 to 1"):
        ranking.holm([0.02, p_value])


def test_a_spread_below_0_is_refused():
    with pytest.raises(ValueError, match="spread is a deviation"):
        ranking.seeds_needed(-0.1)
