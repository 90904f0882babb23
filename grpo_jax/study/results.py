"""The results of a grid: a tidy CSV file, one number per seed, means with intervals.

```python
rows = read("runs/kl/results.csv")                       # condition, seed, step and metrics
rows = of_runs({"dapo": ["runs/dapo/0", "runs/dapo/1"]})  # the same, of runs of a script
per_seed(rows, "accuracy")                               # condition -> [seeds]
summarise(rows, ["accuracy"], against="beta=0.0")        # condition -> column -> Interval
```
"""

import csv
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.run import metrics
from grpo_jax.run.metrics import RunDir
from grpo_jax.study.intervals import Interval, bootstrap

Record = dict[str, Any]  # condition, seed, step, and numbers by name
Summary = dict[str, dict[str, Interval]]  # condition -> column -> interval


def write(path: str | os.PathLike[str], rows: Sequence[Record]) -> None:
    """Writes rows for `read`, numbers with six digits; the file appears whole or not at all."""
    path = pathlib.Path(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    written = path.with_suffix(".tmp")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(x) for name, x in row.items()} for row in rows)
    written.replace(path)


def _text(value: Any) -> Any:
    """A cell; a value that was measured but is not finite is `nan`, and not empty."""
    if value is None:
        return "nan"
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: str | os.PathLike[str]) -> list[Record]:
    """The rows of a `results.csv` or `timing.csv`: condition as str; seed, step and chunk as int; the rest as float.

    A value that was not measured is left out of its row; one that was not finite is NaN.
    """
    types: dict[str, Callable[[str], Any]] = {"condition": str, "seed": int, "step": int, "chunk": int}
    with pathlib.Path(path).open(newline="") as file:
        return [
            {name: types.get(name, float)(text) for name, text in row.items() if text != ""}
            for row in csv.DictReader(file)
        ]


def of_runs(folders: Mapping[str, Sequence[RunDir]]) -> list[Record]:
    """The metrics of runs of a script, such as `grpo.py`, as rows of a grid.

    Args:
      folders: condition -> the folders of its runs, one per seed, in the same order of seeds under every condition. The
        rows count them from 0.

    Returns:
      A row per step with its numbers; one that was not finite is NaN, and text is left out.

    Raises:
      ValueError: for a folder without metrics.
    """
    rows: list[Record] = []
    for condition, of_condition in folders.items():
        for seed, folder in enumerate(of_condition):
            if not (lines := metrics.read(folder)):
                raise ValueError(
                    f"{folder} has no {metrics.METRICS_FILE}: the folder of a run of {condition!r} is wanted"
                )
            for line in lines:
                values = {name: math.nan if x is None else x for name, x in line.items() if not isinstance(x, str)}
                rows.append({"condition": condition, "seed": seed} | values)
    return rows


def last(curve: Sequence[float]) -> float:
    """The value at the last step."""
    return curve[-1]


def average(curve: Sequence[float]) -> float:
    """The mean over the steps: higher for what learns sooner."""
    return float(np.mean(curve))


def per_seed(
    rows: Sequence[Record], metric: str, reduce: Callable[[Sequence[float]], float] = last
) -> dict[str, np.ndarray]:
    """One number per seed, of the curve of a metric: condition -> `[seeds]`, in the order of the seeds.

    Args:
      rows: from `read`.
      metric: its name. Rows without it, such as those of step 0, have no part in the curve, which is in the order of
        steps whatever that of the rows.
      reduce: from a curve to a number, `last` or `average`.

    Raises:
      ValueError: if no row has the metric.
    """
    curves = _curves(rows, metric)
    return {name: np.array([reduce(curve) for curve in seeds.values()]) for name, seeds in curves.items()}


def seeds_of(rows: Sequence[Record], metric: str) -> dict[str, list[int]]:
    """The seeds that have a metric, in their order: condition -> seeds, as `per_seed` has their numbers."""
    return {name: list(seeds) for name, seeds in _curves(rows, metric).items()}


def _curves(rows: Sequence[Record], metric: str) -> dict[str, dict[int, list[float]]]:
    """The curve of each seed, by condition in the order of the rows."""
    curves: dict[str, dict[int, list[float]]] = {row["condition"]: {} for row in rows if metric in row}
    for row in sorted(rows, key=lambda row: (row["seed"], row.get("step", 0))):
        if metric in row:
            curves[row["condition"]].setdefault(row["seed"], []).append(row[metric])
    if not curves:
        measured = sorted({name for row in rows for name in row})
        raise ValueError(f"no row has the metric {metric!r}; there are {measured}")
    return curves


def summarise(
    rows: Sequence[Record],
    names: Sequence[str],
    *,
    reduce: Callable[[Sequence[float]], float] = last,
    against: str | None = None,
) -> Summary:
    """Mean and interval of metrics, by condition.

    Args:
      rows: from `read`.
      names: of metrics.
      reduce: as in `per_seed`.
      against: a condition that the others are compared with: the difference to it, seed by seed, in a column
        `name - against`, for the metrics that both have. Seeds share their start and their prompts, so the
        interval of the difference is narrower than those of the two means.

    Raises:
      ValueError: if there is no such metric or condition, or the seeds differ.
    """
    if against is not None and all(row["condition"] != against for row in rows):
        raise ValueError(f"there is no condition {against!r}; there are {sorted({row['condition'] for row in rows})}")
    summary: Summary = {}
    for name in names:
        values = per_seed(rows, name, reduce)
        seeds = seeds_of(rows, name)
        for condition, numbers in values.items():
            columns = summary.setdefault(condition, {})
            columns[name] = bootstrap(numbers)
            if against in values and condition != against:
                if seeds[condition] != seeds[against]:
                    raise ValueError(f"{condition!r} has the seeds {seeds[condition]}, {against!r} {seeds[against]}")
                columns[f"{name} - {against}"] = bootstrap(numbers - values[against])
    return summary
