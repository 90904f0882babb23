"""Shows a run as it goes: live on a terminal, one printed line every few steps elsewhere."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from grpo_jax.run.metrics import Number, plain


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


def _short(value: Number) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
