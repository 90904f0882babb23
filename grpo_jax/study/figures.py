"""Learning curves as figures: a mean over seeds with its 95% interval, in colours that colour-blind readers tell apart.

Up to four conditions share a panel per metric, or eight if asked to. More have a panel each, against one of them in
grey, since many bands over one another show nothing.
"""

import math
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo_jax.run.plots import save
from grpo_jax.study.intervals import bootstrap
from grpo_jax.study.results import Record, per_seed

# Okabe and Ito 2008, "Color Universal Design"; the pale ones last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#8C8C8C"


def curves(
    rows: Sequence[Record],
    names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    conditions: Sequence[str] | None = None,
    against: str | None = None,
    x: str = "step",
    together: int = 4,
) -> pathlib.Path:
    """Draws the mean curve of each condition with its 95% bootstrap interval, and returns the path.

    The file appears whole or not at all.

    Args:
      rows: from `results.read`.
      names: of metrics.
      path: of the PNG.
      conditions: which, in this order; all unless given.
      against: the condition in grey, where there are too many for one panel; the first unless given.
      x: the column of the horizontal axis. Rows of one condition and step share its value.
      together: the most conditions that share a panel, up to the 8 colours: of more the bands hide one another, and
        each has a panel of its own beside the one in grey.

    Raises:
      ValueError: if a metric or a condition is in no row.
    """
    known = list(dict.fromkeys(row["condition"] for row in rows))
    conditions = known if conditions is None else conditions
    against = conditions[0] if against is None and conditions else against
    if not conditions or not {*conditions, against} <= set(known):
        raise ValueError(f"cannot draw the conditions {list(conditions)} against {against!r}; there are {known}")
    for name in names:
        per_seed(rows, name)  # raises if no row has this metric
    one_panel = len(conditions) <= min(together, len(PALETTE))
    draw = _one_panel_per_metric if one_panel else _one_panel_per_condition
    figure = draw(rows, names, conditions, against, x)
    save(figure, path)
    return pathlib.Path(path)


def _one_panel_per_metric(
    rows: Sequence[Record], names: Sequence[str], conditions: Sequence[str], against: str | None, x: str
) -> Figure:
    legend = 0.07 * max(map(len, conditions))  # its width in inches
    figure = Figure(figsize=(3.6 * len(names) + legend, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names):
        axes = _panel(figure, (1, len(names), place + 1), name, fontsize=10)
        axes.set_xlabel(x, fontsize=9)
        for condition, colour in zip(conditions, PALETTE, strict=False):
            _curve(axes, [row for row in rows if row["condition"] == condition], name, x, colour, condition)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    return figure


def _one_panel_per_condition(
    rows: Sequence[Record], names: Sequence[str], conditions: Sequence[str], against: str | None, x: str
) -> Figure:
    others = [condition for condition in conditions if condition != against]
    height = math.ceil(len(others) / 5)  # of the panels of a metric, in panels
    columns = math.ceil(len(others) / height)
    figure = Figure(figsize=(2.4 * columns, 1.7 * height * len(names) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for part, name in enumerate(names):
        shared: Axes | None = None
        for place, condition in enumerate(others):
            position = (height * len(names), columns, part * height * columns + place + 1)
            axes = _panel(figure, position, condition, shared)
            shared = shared or axes
            axes.set_ylabel(name if place % columns == 0 else "", fontsize=8)
            axes.set_xlabel(x if part == len(names) - 1 and place + columns >= len(others) else "", fontsize=8)
            for drawn, colour in ((against, GREY), (condition, PALETTE[0])):
                label = f"in grey: {against}" if drawn == against else "the condition above the panel"
                _curve(axes, [row for row in rows if row["condition"] == drawn], name, x, colour, label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def rates(
    of_rates: Mapping[str, Mapping[float, np.ndarray]], name: str, path: str | os.PathLike[str], *, against: str
) -> pathlib.Path:
    """Draws a metric over learning rates, a panel for each condition with one of them in grey, and returns the path.

    Args:
      of_rates: condition -> rate -> `[seeds]`, from `ranking.by_rate`.
      name: of the metric.
      path: of the PNG.
      against: the condition in grey.

    Raises:
      ValueError: if there is no such condition.
    """
    if against not in of_rates:
        raise ValueError(f"there is no condition {against!r}; there are {sorted(of_rates)}")
    others = [condition for condition in of_rates if condition != against] or [against]
    height = math.ceil(len(others) / 5)
    columns = math.ceil(len(others) / height)
    figure = Figure(figsize=(2.4 * columns, 1.9 * height + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    shared: Axes | None = None
    tried = sorted({rate for values in of_rates.values() for rate in values})
    for place, condition in enumerate(others):
        axes = _panel(figure, (height, columns, place + 1), condition, shared)
        shared = shared or axes
        axes.set_xscale("log")
        axes.set_xticks(
            tried, [f"{rate:g}" for rate in tried], fontsize=7
        )  # those of powers of ten may all lie outside
        axes.minorticks_off()
        axes.set_ylabel(name if place % columns == 0 else "", fontsize=8)
        axes.set_xlabel("learning rate" if place + columns >= len(others) else "", fontsize=8)
        for drawn, colour in ((against, GREY), (condition, PALETTE[0])):
            label = f"in grey: {against}" if drawn == against else "the condition above the panel"
            points = [{"rate": rate, name: x} for rate, values in of_rates[drawn].items() for x in values.tolist()]
            _curve(axes, points, name, "rate", colour, label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    save(figure, path)
    return pathlib.Path(path)


def _panel(
    figure: Figure, position: tuple[int, int, int], title: str, shared: Axes | None = None, *, fontsize: int = 8
) -> Axes:
    axes = figure.add_subplot(*position, sharey=shared)
    axes.set_title(textwrap.fill(title, 28), fontsize=fontsize, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return axes


def _curve(axes: Axes, rows: Sequence[Record], name: str, x: str, colour: str, label: str) -> None:
    """The curve of one condition; a gap where a seed's value is not finite."""
    points: dict[float, list[float]] = {}
    for row in rows:
        if name in row:
            points.setdefault(row[x], []).append(row[name])
    if not points:
        return
    bands = np.array([bootstrap(values) for values in points.values()])
    axes.plot(list(points), bands[:, 0], color=colour, linewidth=1.4, label=label)
    axes.fill_between(list(points), bands[:, 1], bands[:, 2], color=colour, alpha=0.15, linewidth=0)
