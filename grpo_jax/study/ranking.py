"""Which of several conditions is better, each at its own best learning rate, and how sure that is.

    rates = (1e-4, 3e-4, 1e-3)
    path = run_grid("runs/kl/rates", at_each_rate(conditions, rates), seeds=range(8), per_seed=first)
    best = best_rates(read(path), "greedy", reduce=average)
    path = run_grid("runs/kl/ranked", at_rates(conditions, best), seeds=range(8, 40), per_seed=others)
    for line in rank(read(path), "greedy", against="beta 0", reduce=average): print(line)

The seeds that choose a rate are not those that compare: the highest of several noisy means is too high by chance, and
higher the more rates there are. Seeds are pairs: under every condition a seed has the same start and the same prompts,
so that what is compared are differences, seed by seed. A run reads its rate as `hyper["learning_rate"]`; since rates
and seeds are numbers, all runs of a condition are one program.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from grpo_jax.study.grid import Condition
from grpo_jax.study.intervals import Interval, bootstrap
from grpo_jax.study.results import Record, last, per_seed, seeds_of, summarise

RATE = "learning_rate"
Reduce = Callable[[Sequence[float]], float]  # from a curve to a number


class Ranked(NamedTuple):
    """What is known of one condition."""

    condition: str
    value: Interval  # the mean over seeds
    difference: Interval | None  # to the condition that all are compared with; None for that one
    p_value: float  # of no difference, by `sign_flip_p_value`; NaN for that one
    adjusted: float  # by Holm's correction over all comparisons
    seeds_needed: int  # by `seeds_needed`; 0 for that one
    asked: float  # the difference that these seeds would find


# ------------------------------------------------------------------------ learning rates


def at_each_rate(conditions: Sequence[Condition], rates: Sequence[float]) -> list[Condition]:
    """Each condition at each learning rate, in their order.

    Raises:
      ValueError: for fewer than 2 rates, or rates that do not rise.
    """
    if len(rates) < 2 or any(not 0 < a < b for a, b in itertools.pairwise(rates)):
        raise ValueError(f"a grid has at least 2 learning rates that rise from above 0, got {list(rates)}")
    return [_at(condition, rate) for condition in conditions for rate in rates]


def at_rates(conditions: Sequence[Condition], best: Mapping[str, float]) -> list[Condition]:
    """Each condition at its own learning rate, under its own name."""
    return [_at(condition, best[condition.name])._replace(name=condition.name) for condition in conditions]


def _at(condition: Condition, rate: float) -> Condition:
    return condition._replace(name=f"{condition.name} @ {float(rate)!r}", hyper={**condition.hyper, RATE: rate})


def by_rate(rows: Sequence[Record], metric: str, reduce: Reduce = last) -> dict[str, dict[float, np.ndarray]]:
    """One number per seed: condition -> rate -> `[seeds]`, of the rows of a grid of `at_each_rate`.

    Raises:
      ValueError: if a condition has other seeds at one rate than at another, as before a grid is finished.
    """
    found: dict[str, dict[float, np.ndarray]] = {}
    seeds, of_condition = seeds_of(rows, metric), dict[str, str]()
    for name, values in per_seed(rows, metric, reduce).items():
        condition, _, rate = name.rpartition(" @ ")
        first = of_condition.setdefault(condition, name)
        if seeds[name] != seeds[first]:
            raise ValueError(f"{name!r} has {metric} of the seeds {seeds[name]}, {first!r} of {seeds[first]}")
        found.setdefault(condition, {})[float(rate)] = values
    return found


def best_rates(rows: Sequence[Record], metric: str, reduce: Reduce = last) -> dict[str, float]:
    """The rate of the highest mean over seeds, of each condition; the lowest one of several. NaN is no mean.

    Raises:
      ValueError: for a condition that has no finite mean at any rate.
    """
    best = {}
    for condition, of_rate in by_rate(rows, metric, reduce).items():
        means = {rate: float(np.mean(values)) for rate, values in sorted(of_rate.items())}
        finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
        if not finite:
            raise ValueError(f"{condition!r} has no finite {metric} at any of the rates {list(means)}")
        best[condition] = max(finite, key=finite.__getitem__)
    return best


def at_the_edge(rows: Sequence[Record], best: Mapping[str, float], metric: str) -> list[str]:
    """The conditions whose best rate is the lowest or the highest of the grid: a better one may lie beyond."""
    return [c for c, of_rate in by_rate(rows, metric).items() if best[c] in (min(of_rate), max(of_rate))]


def sensitivity(rows: Sequence[Record], metric: str, reduce: Reduce = last) -> dict[str, Interval]:
    """The mean of a metric over the axis of log learning rates: high for what needs no search for its rate.

    area = integral of metric d(log rate) / (log highest - log lowest), by trapezoids, seed by seed
    """
    areas = {}
    for condition, of_rate in by_rate(rows, metric, reduce).items():
        rates = sorted(of_rate)
        axis = np.log(rates)
        area = np.trapezoid([of_rate[rate] for rate in rates], axis, axis=0) / (axis[-1] - axis[0])
        areas[condition] = bootstrap(area)
    return areas


# --------------------------------------------------------------------------- comparisons


def rank(
    rows: Sequence[Record],
    metric: str,
    *,
    against: str,
    reduce: Reduce = last,
    difference: float = 0.02,
    power: float = 0.8,
    level: float = 0.05,
) -> list[Ranked]:
    """All conditions, the highest mean first, each compared with one of them by paired seeds.

    Args:
      rows: of the same seeds for every condition.
      metric: its name.
      against: the condition that the others are compared with.
      reduce: from a curve to a number, as in `results.per_seed`.
      difference: that `seeds_needed` asks about, in the metric's units.
      power: as in `seeds_needed`.
      level: as in `seeds_needed`.

    Raises:
      ValueError: if there is no such condition or metric, the seeds differ, or a value is not finite.
    """
    summary = summarise(rows, [metric], reduce=reduce, against=against)
    values = per_seed(rows, metric, reduce)
    if broken := [name for name, x in values.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{metric} of {', '.join(broken)} is not finite for some seeds, which no test compares")
    others = [name for name in values if name != against]
    p_values = [sign_flip_p_value(values[name] - values[against]) for name in others]
    adjusted = dict(zip(others, holm(p_values), strict=True))
    raw = dict(zip(others, p_values, strict=True))
    lines = []
    for name, columns in summary.items():
        if name == against:
            lines.append(Ranked(name, columns[metric], None, math.nan, math.nan, 0, difference))
            continue
        spread = float(np.std(values[name] - values[against], ddof=1)) if len(values[name]) > 1 else math.nan
        needed = seeds_needed(spread, difference=difference, power=power, level=level)
        compared = columns[f"{metric} - {against}"]
        lines.append(Ranked(name, columns[metric], compared, raw[name], adjusted[name], needed, difference))
    return sorted(lines, key=lambda line: -line.value.mean)


def sign_flip_p_value(differences: np.ndarray, *, draws: int = 20_000) -> float:
    """How often a mean as far from 0 comes about when each paired difference has a random sign (Fisher 1935).

    Two-sided. All signs are tried up to 12 seeds, otherwise `draws` of them from a fixed seed, with the observed one
    counted among them (Phipson and Smyth 2010), so that it is never 0.

    Args:
      differences: `[seeds]`, at least one.
      draws: at random.

    Raises:
      ValueError: for no differences, or one that is not finite.
    """
    if not len(differences) or not np.isfinite(differences).all():
        raise ValueError(f"a test is of at least one difference, all of them finite, got {list(differences)}")
    n = len(differences)
    if n <= 12:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(draws, n))
    means, observed = np.abs(signs @ differences), abs(np.sum(differences))
    as_far = np.sum(means >= observed - 1e-12 * np.sum(np.abs(differences)))  # sums that differ by their rounding tie
    return float(as_far / len(signs)) if n <= 12 else float((as_far + 1) / (draws + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): below a level for any at all with at most that probability by chance.

    adjusted of the k-th smallest of m = max over j <= k of min(1, (m - j + 1) p_j)

    Raises:
      ValueError: for what is no probability.
    """
    if broken := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-values are from 0 to 1, got {broken[0]}")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def seeds_needed(
    spread: float, *, difference: float = 0.02, power: float = 0.8, level: float = 0.05, most: int = 1_000_000
) -> int:
    """The fewest paired seeds at which a true difference is found with this power, by the paired t-test, two-sided.

    Args:
      spread: the sample's deviation of the paired differences, at least 0; where it is not known, `most` are needed.
      difference: in the metric's units, above 0.
      power: the probability to find it, between 0 and 1.
      level: of the test; give a corrected one for several comparisons.
      most: where the search ends.

    Raises:
      ValueError: for a setting out of range.
    """
    if not difference > 0 or not 0 < level < power < 1:
        raise ValueError(f"difference is above 0 and 0 < level < power < 1, got {difference}, {level} and {power}")
    if spread < 0:
        raise ValueError(f"spread is a deviation, at least 0, got {spread}")
    if not math.isfinite(spread):
        return most

    def enough(n: int) -> bool:
        critical = scipy.stats.t.ppf(1 - level / 2, n - 1)
        shift = min(difference * math.sqrt(n) / max(spread, 1e-12), 1e3)
        return shift >= 30 or bool(scipy.stats.nct.sf(critical, n - 1, shift) >= power)

    low, high = 2, 2
    while high < most and not enough(high):
        low, high = high, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def cells(lines: Sequence[Ranked], best: Mapping[str, float], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table for `tables.markdown`."""
    header = ["condition", "learning rate", metric, "difference", "p", "p (Holm)", f"seeds for {lines[0].asked:g}"]
    table = []
    for line in lines:
        row = [line.condition, f"{best[line.condition]:g}", _text(line.value)]
        if line.difference is None:
            table.append([*row, "", "", "", ""])
        else:
            p_values = [f"{p:.2g}" for p in (line.p_value, line.adjusted)]
            table.append([*row, _text(line.difference), *p_values, str(line.seeds_needed)])
    return header, table


def _text(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
