"""Confidence intervals of means, over seeds or over prompts: one bootstrap for all of a study."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray | Sequence[float], *, level: float = 0.95, resamples: int = 9999) -> Interval:
    """The mean of independent values with its bias-corrected and accelerated bootstrap interval.

    BCa (Efron 1987, "Better Bootstrap Confidence Intervals"), by `scipy.stats.bootstrap`. The
    values are resampled with replacement, from a fixed seed: the same values give the same
    interval. At 8 seeds it is about a fifth narrower than Student's, and covers the mean in
    about 0.9 of the cases where 0.95 is asked.

    Where all values are equal, or there is only one, no resample differs and BCa is not
    defined; the interval is then the point itself. So a point means that no variation was
    observed, not that there is none: ten right answers of ten do not prove an accuracy of 1.
    Where a value is not finite, such as that of a seed that diverged, the ends are NaN.

    Args:
      values: `[N]`, one per seed or one per prompt. Several completions of one prompt are not
        independent of each other: take their mean first.
      level: of confidence, between 0 and 1.
      resamples: the number of resamples.

    Raises:
      ValueError: for no values, another shape, or a level out of range.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"an interval needs an array [N] of at least one value, got shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, got {level}")
    mean, low, high = float(values.mean()), float(values.min()), float(values.max())
    if low == high:
        return Interval(low, low, low)
    if not np.isfinite(values).all():
        return Interval(mean, math.nan, math.nan)
    # On the unit interval, so that neither very large nor very small values leave the range of floats.
    interval = scipy.stats.bootstrap(
        ((values - low) / (high - low),),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, 1_000_000 // values.size),  # bounds the memory
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, *(float(low + end * (high - low)) for end in interval))
