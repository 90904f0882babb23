"""What a run has measured: JSON lines as the truth, everything else drawn from them.

`metrics.jsonl` holds one line a step and is the same to the byte for the same run, so a resumed run can be compared
with an uninterrupted one. What no run repeats, such as seconds, goes to `timing.jsonl` beside it. A loop reads

    metrics.truncate(run_dir, int(state.step))      # also where there is no checkpoint, after a kill before the first
    with metrics.progress(steps, start=int(state.step)) as show:
        for step in range(int(state.step), steps):
            ...
            measured = types.summary(measured)
            metrics.append(run_dir, step, measured, {"tokens_per_second": rate})
            show(step, measured, rate)

and saves checkpoints after `append`, never before it.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"

Number = bool | int | float | str | None
Write = Callable[[int, Mapping[str, Any]], None]
RunDir = str | os.PathLike[str]


def append(run_dir: RunDir, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
    """Adds the line of one step, in one write.

    Args:
      run_dir: created where absent.
      step: of the run, from 0; lines are added in order.
      metrics: numbers or text, also as 0-d arrays (`types.summary` makes them), written in the order of their names.
        NaN and the infinities become null.
      timing: what would differ in another run of the same program.

    Raises:
      ValueError: if a value is no single number, or a metric is named `step`.
    """
    folder = pathlib.Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((METRICS_FILE, metrics), (TIMING_FILE, timing)):
        if values is None:
            continue
        if "step" in values:
            raise ValueError("a metric must not be named 'step', the step is written already")
        line = json.dumps({"step": int(step), **plain(values)}, allow_nan=False) + "\n"
        with (folder / name).open("ab", buffering=0) as file:
            file.write(line.encode())


def truncate(run_dir: RunDir, step: int) -> None:
    """Drops the lines from `step` on, and one that a kill has torn, so that a resumed run writes them again."""
    for name in (METRICS_FILE, TIMING_FILE):
        path = pathlib.Path(run_dir) / name
        if path.exists():
            kept = itertools.takewhile(lambda line: line[1]["step"] < step, _lines(path))
            os.truncate(path, sum(len(line) for line, _ in kept))


def read(run_dir: RunDir, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The lines of a run, which may be alive: a last line without its end is left out."""
    return [values for _, values in _lines(pathlib.Path(run_dir) / name)]


def plain(metrics: Mapping[str, Any]) -> dict[str, Number]:
    """Arrays as Python numbers, in one transfer; NaN and the infinities, which JSON has no words for, as None."""
    return {name: _plain_value(name, value) for name, value in jax.device_get(dict(metrics)).items()}


def tensorboard(log_dir: RunDir, **options: Any) -> Write:
    """Returns `write(step, metrics)`; `options` go to `SummaryWriter`, such as `purge_step` in a resumed run.

    The file follows some seconds later, and is complete when the process has ended, other than by a kill.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard needs an extra: pip install 'grpo-jax[tensorboard]'") from error
    writer = SummaryWriter(os.fspath(log_dir), **{"flush_secs": 5} | options)

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in plain(metrics).items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, step)

    return write


def wandb(**init: Any) -> Write:
    """Returns `write(step, metrics)`; `init` goes to `wandb.init`, such as `id` and `resume="must"`."""
    try:
        import wandb as client
    except ImportError as error:
        raise ImportError("Weights & Biases needs an extra: pip install 'grpo-jax[wandb]'") from error
    run = client.init(**init)
    return lambda step, metrics: run.log(plain(metrics), step=step)


@contextlib.contextmanager
def progress(
    total: int,
    *,
    start: int = 0,
    keys: Sequence[str] = ("reward", "accuracy", "kl", "entropy", "length"),
    every: int = 10,
    console: rich.console.Console | None = None,
) -> Iterator[Callable[..., None]]:
    """Shows a run as it goes: live on a terminal, one printed line every few steps elsewhere.

    Yields `show(step, metrics, tokens_per_second=None)`, to be called after each step. The remaining time is that of
    the steps since the first one shown, which compiled.

    Args:
      total: steps of the whole run.
      start: the first step of this process, in a resumed run.
      keys: which metrics to show, where present.
      every: steps between printed lines; the first and the last step are always printed.
      console: where to, standard output unless told otherwise.
    """
    console = console or rich.console.Console()
    done: list[float] = []  # when each step was done

    def cells(step: int, metrics: Mapping[str, Any], tokens_per_second: float | None) -> dict[str, str]:
        shown = {"step": f"{step + 1}/{total}"}
        values = plain({name: metrics[name] for name in keys if name in metrics})
        shown |= {name: _short(values[name]) for name in keys if name in values}
        if tokens_per_second is not None:
            shown["tokens/s"] = f"{tokens_per_second:,.0f}"
        if len(done) > 1:
            seconds = (done[-1] - done[0]) / (len(done) - 1) * (total - step - 1)
            shown["left"] = str(datetime.timedelta(seconds=round(seconds)))
        return shown

    def print_line(step: int, metrics: Mapping[str, Any], tokens_per_second: float | None = None) -> None:
        done.append(time.monotonic())
        if step in (start, total - 1) or (step + 1) % every == 0:
            line = "  ".join(f"{name} {value}" for name, value in cells(step, metrics, tokens_per_second).items())
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def redraw(step: int, metrics: Mapping[str, Any], tokens_per_second: float | None = None) -> None:
        done.append(time.monotonic())
        live.update(_view(cells(step, metrics, tokens_per_second), step + 1, total), refresh=True)

    if not console.is_terminal:
        yield print_line
        return
    with rich.live.Live(_view({}, start, total), console=console, auto_refresh=False) as live:
        yield redraw


def _view(cells: Mapping[str, str], done: int, total: int) -> rich.console.Group:
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
    for name in cells:
        table.add_column(rich.text.Text(name), justify="right")
    table.add_row(*map(rich.text.Text, cells.values()))
    return rich.console.Group(table, rich.progress_bar.ProgressBar(total=total, completed=done))


def plot(run_dir: RunDir, path: RunDir | None = None, *, keys: Sequence[str] | None = None) -> pathlib.Path:
    """Draws each metric over the steps as a panel of one PNG, and returns where that is.

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
    figure = Figure(figsize=(3.2 * columns, 2.3 * height), layout="constrained")
    FigureCanvasAgg(figure)
    for index, key in enumerate(keys):
        axes = figure.add_subplot(height, columns, index + 1)
        drawn = [row for row in rows if key in row]
        values = [math.nan if row[key] is None else row[key] for row in drawn]  # a gap where it was not finite
        axes.plot([row["step"] for row in drawn], values, linewidth=1.2, marker="." if len(drawn) < 50 else "")
        axes.set_title(key, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if index + columns >= len(keys):
            axes.set_xlabel("step", fontsize=8)
    path = pathlib.Path(run_dir) / "metrics.png" if path is None else pathlib.Path(path)
    figure.savefig(path, dpi=150)
    return path


def _plain_value(name: str, value: Any) -> Number:
    if value is None or isinstance(value, str):
        return value
    number = np.asarray(value).item() if np.ndim(value) == 0 else value
    if not isinstance(number, bool | int | float):
        raise ValueError(f"metric {name!r} must be one number (see types.summary), got {value!r}")
    return number if math.isfinite(number) else None


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with what it says."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append((line, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not a line of JSON: {line[:80]!r}") from error
    return found


def _short(value: Number) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
