"""SPO and RAE whole: the baselines for the state, the advantage that reads them, and what moves them after a step.

    running = spo(of_rows(rows))                                            # a baseline for each row of the data
    state = init_state(..., extra=running.begin)
    step = make_train_step(..., advantage=Scheduled(lambda step, extra: running.advantage(extra)))
    step = followed_by(step, lambda state, experience: state._replace(extra=running.after(state.extra, experience)))

`Prompts.info["row"]` is the data-set row, as `data` makes it. A group may have one completion.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.protocols import Advantage
from grpo_jax.schedules import running_baseline
from grpo_jax.schedules.running_baseline import RunningBaseline
from grpo_jax.types import Array, Experience, Number


class Baselines(NamedTuple):
    """What the state holds."""

    running: RunningBaseline
    of_row: Array  # [rows] int32, which baseline is whose


class RunningAdvantage(NamedTuple):
    """An advantage with a state."""

    begin: Baselines
    advantage: Callable[[Baselines], Advantage]
    after: Callable[[Baselines, Experience], Baselines]


def of_rows(rows: Sequence[Mapping[str, Any]], column: str | None = None) -> np.ndarray:
    """`[rows]` int32: each row its own baseline, or one for all rows of the same value in a column, such as a role.

    Raises:
      ValueError: if a row lacks the column.
    """
    if column is None:
        return np.arange(len(rows), dtype=np.int32)
    if missing := [i for i, row in enumerate(rows) if column not in row]:
        raise ValueError(f"{len(missing)} rows have no column {column!r}, the first is row {missing[0]}")
    values = [repr(row[column]) for row in rows]
    order = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return np.array([order[value] for value in values], np.int32)


def spo(
    of_row: np.ndarray,
    *,
    decay: Number = 0.9,
    weights: Sequence[float | Array] | None = None,
    names: Sequence[str] | None = None,
) -> RunningAdvantage:
    """`running_baseline.spo`, whose baselines are averages that forget by a constant `decay`.

    Args:
      of_row: as `of_rows` makes it.
      decay: from 0 to 1; the paper's follows the divergence from the policy that saw the prompt last.
      weights: of the reward functions, as in `advantages.from_rewards`.
      names: as in `advantages.from_rewards`.

    Raises:
      ValueError: for a decay out of range.
    """
    return _running(running_baseline.spo, running_baseline.observe, of_row, decay, weights, names)


def rae(
    of_row: np.ndarray,
    *,
    decay: Number = 0.95,
    weights: Sequence[float | Array] | None = None,
    names: Sequence[str] | None = None,
) -> RunningAdvantage:
    """`running_baseline.rae`, whose baselines are exponential averages; arguments as in `spo`, 0.95 as in SPIRAL."""
    return _running(running_baseline.rae, running_baseline.follow, of_row, decay, weights, names)


def _running(
    make: Callable[..., Advantage],
    move: Callable[..., RunningBaseline],
    of_row: np.ndarray,
    decay: Number,
    weights: Sequence[float | Array] | None,
    names: Sequence[str] | None,
) -> RunningAdvantage:
    if isinstance(decay, int | float) and not 0 <= decay <= 1:
        raise ValueError(f"decay is from 0 to 1, got {decay}")

    def index(held: Baselines) -> running_baseline.Index:
        return lambda experience: held.of_row[experience.rollout.prompts.info["row"]]

    def advantage(held: Baselines) -> Advantage:
        return make(held.running, index(held), weights=weights, names=names)

    def after(held: Baselines, experience: Experience) -> Baselines:
        return held._replace(running=move(held.running, experience, index(held), decay=decay, weights=weights))

    begin = Baselines(running_baseline.init(int(of_row.max()) + 1), jnp.asarray(of_row))
    return RunningAdvantage(begin, advantage, after)
