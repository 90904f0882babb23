"""The metrics of a run: JSON lines, from which everything else is drawn.

`metrics.jsonl` holds one line per step and is the same to the byte for the same run, so a resumed run can be compared
with an uninterrupted one. Values that differ between two equal runs, such as seconds, go to `timing.jsonl`, and sampled
completions to `completions.jsonl`. `run.loop` writes them in this order:

    metrics.truncate(run_dir, step)                            # a resumed run writes the lines from `step` on again
    metrics.append(run_dir, step, measured, {"seconds": 1.5})
    metrics.sync(run_dir)                                      # before the checkpoint that counts on these lines
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
FILES = (METRICS_FILE, TIMING_FILE, COMPLETIONS_FILE)

Number = bool | int | float | str | None
RunDir = str | os.PathLike[str]


class Logged:
    """Collects the metrics of reward functions: pass it to `rewards.host` as `log_metric`.

    loop.log(metrics | logged.take())
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def __call__(self, name: str, value: float) -> None:
        """Adds one value.

        Raises:
          ValueError: for the name `step`, which each line has already.
        """
        if name == "step":
            raise ValueError("a metric of a reward function is named 'step', which each line has already: rename it")
        self._values.setdefault(name, []).append(float(value))

    def last(self, name: str) -> float:
        """The last value of a metric since `take` was called; 0 without one."""
        return self._values.get(name, [0.0])[-1]

    def take(self) -> dict[str, float]:
        """The mean of each metric since the last call."""
        means = {name: float(np.mean(values)) for name, values in self._values.items()}
        self._values.clear()
        return means


def beside(measured: Mapping[str, Any], logged: Mapping[str, Any]) -> dict[str, Any]:
    """What a step has measured, with what reward functions have logged; of a name that both have, theirs is `logged/`.

    A reward function that logs `length` or `skipped` would otherwise take the place of what the run goes by.
    """
    return {**measured, **{f"logged/{name}" if name in measured else name: value for name, value in logged.items()}}


def append(run_dir: RunDir, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
    """Adds the line of one step, in one write.

    Args:
      run_dir: created where absent.
      step: of the run, from 0; lines are added in order.
      metrics: numbers or text, also as 0-d arrays (`statistics.summary` makes them), written in the order of their
        names. NaN and the infinities become null.
      timing: values that would differ in another run of the same program.

    Raises:
      ValueError: if a value is no single number, or a metric is named `step`.
    """
    for name, values in ((METRICS_FILE, metrics), (TIMING_FILE, timing)):
        if values is not None:
            if "step" in values:
                raise ValueError("a metric must not be named 'step', the step is written already")
            _append(run_dir, name, [{"step": int(step), **plain(values)}])


def append_completions(run_dir: RunDir, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds some completions of a step to `completions.jsonl`, one line each; values are JSON."""
    _append(run_dir, COMPLETIONS_FILE, [{"step": int(step), **line} for line in lines])


def sync(run_dir: RunDir) -> None:
    """Returns when every line is on disk, so that no checkpoint outlives the lines of the steps before it."""
    for name in FILES:
        path = pathlib.Path(run_dir) / name
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def truncate(run_dir: RunDir, step: int) -> None:
    """Drops the lines from `step` on, for a run that resumes there.

    Broken lines are dropped where no line of a step below `step` comes after them.

    Raises:
      ValueError: for a broken line before such a line, with its number.
    """
    for name in FILES:
        path = pathlib.Path(run_dir) / name
        if path.exists():
            os.truncate(path, _size_below(path, step))


def _size_below(path: pathlib.Path, step: int) -> int:
    """The bytes up to the end of the last line of a step below `step`."""
    size = end = 0
    broken: ValueError | None = None
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        size += len(line)
        try:
            below = line.endswith(b"\n") and _parsed(path, number, line)["step"] < step
        except ValueError as error:
            broken = broken or error
            continue
        if below and broken is not None:
            raise broken
        end = size if below else end
    return end


def missing(run_dir: RunDir, step: int) -> list[int]:
    """The steps below `step` that have no line in `metrics.jsonl`."""
    present = {line["step"] for line in read(run_dir)}
    return [n for n in range(step) if n not in present]


def read(run_dir: RunDir, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The lines of a run, which may be alive; none where there is no file. A last line without its end is left out."""
    path = pathlib.Path(run_dir) / name
    return [values for _, values in _lines(path)] if path.exists() else []


def plain(metrics: Mapping[str, Any]) -> dict[str, Number]:
    """Arrays as Python numbers, in one transfer; NaN and the infinities, which JSON has no words for, as None."""
    return {name: _plain_value(name, value) for name, value in jax.device_get(dict(metrics)).items()}


def settings(config: Any) -> dict[str, Any]:
    """A configuration, a dataclass or a mapping, as JSON values."""
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    return json.loads(json.dumps(fields, default=str))


def _plain_value(name: str, value: Any) -> Number:
    if value is None or isinstance(value, str):
        return value
    number = np.asarray(value).item() if np.ndim(value) == 0 else value
    if not isinstance(number, bool | int | float):
        raise ValueError(f"metric {name!r} must be one number (see statistics.summary), got {value!r}")
    return number if math.isfinite(number) else None


def _append(run_dir: RunDir, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    folder = pathlib.Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with (folder / name).open("ab", buffering=0) as file:
        file.write(text.encode())


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its values."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return [(line, _parsed(path, number, line)) for number, line in enumerate(lines, 1)]


def _parsed(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
        if not isinstance(values["step"], int):
            raise ValueError("the step is not a number")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}:{number} is not a line of JSON with a step: {line[:80]!r}") from error
    return values
