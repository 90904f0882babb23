"""The metrics of a run as pictures."""

import math
import os
import pathlib
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo_jax.run.metrics import RunDir, read


def plot(run_dir: RunDir, path: RunDir | None = None, *, keys: Sequence[str] | None = None) -> pathlib.Path:
    """Draws each metric over the steps as a panel of one PNG, and returns where that is.

    The file appears whole or not at all.

    Args:
      run_dir: of a run, which may be alive.
      path: `metrics.png` in the run folder unless given.
      keys: which metrics, in this order; every number of the run unless given.

    Raises:
      ValueError: if a key was never measured, or there is nothing to draw.
    """
    rows = read(run_dir)
    numbers = (name for row in rows for name, value in row.items() if isinstance(value, int | float))
    measured = [name for name in dict.fromkeys(numbers) if name != "step"]
    keys = measured if keys is None else keys
    if not keys or not set(keys) <= set(measured):
        raise ValueError(f"cannot draw {keys} of {run_dir}, which measured {measured}")
    columns = min(len(keys), 4)
    height = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * height))
    FigureCanvasAgg(figure)
    for index, key in enumerate(keys):
        row, column = divmod(index, columns)
        axes = figure.add_axes(_place(row, column, height, columns))
        drawn = [row for row in rows if key in row]
        values = [math.nan if row[key] is None else row[key] for row in drawn]  # a gap where it was not finite
        axes.plot([row["step"] for row in drawn], values, linewidth=1.2, marker="." if len(drawn) < 50 else "")
        axes.set_title(key, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.yaxis.get_offset_text().set_fontsize(8)
        axes.grid(alpha=0.3)
        if index + columns >= len(keys):
            axes.set_xlabel("step", fontsize=8)
    path = pathlib.Path(run_dir) / "metrics.png" if path is None else pathlib.Path(path)
    save(figure, path)
    return path


def _place(row: int, column: int, height: int, columns: int) -> tuple[float, float, float, float]:
    """Where a panel of 3.2 by 2.3 inches has its axes: fixed, as to fit margins to labels takes half of all drawing."""
    return (column + 0.21) / columns, (height - row - 0.81) / height, 0.76 / columns, 0.62 / height


def save(figure: Figure, path: RunDir) -> None:
    """Writes a figure as a PNG, which appears whole or not at all."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    os.replace(partial, path)
