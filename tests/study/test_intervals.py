"""The bootstrap interval: what it covers, its width, its degenerate cases."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.study.intervals import Interval, bootstrap


def test_equal_values_or_one_value_make_a_point():
    assert bootstrap([0.25] * 5) == Interval(0.25, 0.25, 0.25)
    assert bootstrap([0.1] * 3) == Interval(0.1, 0.1, 0.1)  # NumPy's mean of them is another number
    assert bootstrap([3.0]) == Interval(3.0, 3.0, 3.0)


def test_a_value_that_is_not_finite_leaves_no_interval():
    assert np.isnan(bootstrap([1.0, math.nan])).all()
    mean, low, high = bootstrap([1.0, math.inf])
    assert (mean, math.isnan(low), math.isnan(high)) == (math.inf, True, True)


def bca(values, level):
    """Efron 1987, equations 2.3, 3.9 and 6.6, over all `N^N` resamples."""
    values, normal = np.array(values), scipy.stats.norm
    means = np.mean(values[np.indices([len(values)] * len(values)).reshape(len(values), -1)], axis=0)
    share = np.mean(means < values.mean()) / 2 + np.mean(means <= values.mean()) / 2
    bias = normal.ppf(share)
    left_out = np.array([np.delete(values, i).mean() for i in range(len(values))])
    apart = left_out.mean() - left_out
    acceleration = np.sum(apart**3) / (6 * np.sum(apart**2) ** 1.5)
    shifted = bias + normal.ppf([(1 - level) / 2, (1 + level) / 2])
    return np.quantile(means, normal.cdf(bias + shifted / (1 - acceleration * shifted)))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_the_interval_is_bca_written_out_over_all_resamples(level):
    values = [0.1, 0.7, 0.75, 1.3, 2.9, 1.13, 0.61]
    mean, low, high = bootstrap(values, level=level, resamples=200_000)
    np.testing.assert_allclose([low, high], bca(values, level), atol=0.02)
    assert mean == np.mean(values)
    assert (mean, low, high) == bootstrap(np.array(values), level=level, resamples=200_000)


def test_intervals_of_eight_seeds_hold_the_mean_nearly_as_often_as_asked():
    """BCa is narrow for few seeds: near 0.9 where 0.95 is asked, a fifth below Student's."""
    rng = np.random.default_rng(1)
    samples = rng.normal(2.0, 3.0, (500, 8))
    intervals = np.array([bootstrap(values, resamples=999) for values in samples])
    covered = np.mean((intervals[:, 1] <= 2.0) & (intervals[:, 2] >= 2.0))
    assert 0.85 < covered < 0.95
    student = 2 * 2.3646 * samples.std(axis=1, ddof=1) / 8**0.5  # the 0.975 quantile of 7 degrees of freedom
    assert 0.72 < np.mean((intervals[:, 2] - intervals[:, 1]) / student) < 0.85


def test_intervals_of_sixty_prompts_hold_the_rate_as_often_as_asked():
    rng = np.random.default_rng(0)
    intervals = np.array([bootstrap(rng.random(60) < 0.3, level=0.9, resamples=999) for _ in range(200)])
    above, below = np.mean(intervals[:, 1] > 0.3), np.mean(intervals[:, 2] < 0.3)
    assert 0.82 <= 1 - above - below <= 0.97  # 0.9 is expected; a deviation is 0.02
    assert above > 0
    assert below > 0


def test_the_interval_narrows_with_the_number_of_values_and_widens_with_the_level():
    values = np.arange(40) % 2

    def width(values, **settings):
        mean, low, high = bootstrap(values, **settings)
        assert low <= mean <= high
        return high - low

    # The mean's deviation is 0.5 / sqrt(40), and 95% of a normal lies within 1.96 of it.
    assert width(values) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.1)
    assert width(np.tile(values, 16)) == pytest.approx(width(values) / 4, rel=0.15)
    assert width(values, level=0.5) < width(values, level=0.8) < width(values, level=0.99)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.sampled_from([1e-300, 1e-9, 1.0, 1e200]))
def test_the_ends_lie_among_the_values_at_any_scale(values, scale):
    values = np.array(values) * scale
    mean, low, high = bootstrap(values, resamples=200)
    slack = 1e-9 * np.ptp(values)
    assert values.min() - slack <= low <= high <= values.max() + slack
    assert math.isfinite(mean)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([[1.0, 2.0]], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_an_interval_of_nothing_or_at_no_level_is_refused(values, level):
    with pytest.raises(ValueError, match=r"needs an array \[N\]|level is between"):
        bootstrap(values, level=level)
