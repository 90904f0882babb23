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

from grpo_jax.advantages import total_reward
from grpo_jax.protocols import Advantage
from grpo_jax.schedules import running_baseline
from grpo_jax.schedules.running_baseline import RunningBaseline
from grpo_jax.types import Array, Experience, Number

_FAR = 64  # half-lives after which nothing is left of a reward


class Path(NamedTuple):
    """How far the policy has come since the run began, and had come when each baseline was observed last."""

    length: Array  # [] float32 nats per token, of all steps together
    seen: Array  # [N] float32


class Baselines(NamedTuple):
    """What the state holds."""

    running: RunningBaseline
    of_row: Array  # [rows] int32, which baseline is whose
    path: Path | None = None  # of baselines with a half-life


class RunningAdvantage(NamedTuple):
    """An advantage with a state."""

    begin: Baselines
    advantage: Callable[[Baselines], Advantage]
    after: Callable[..., Baselines]  # (baselines, experience, moved) of a step; `moved` is for baselines with a path


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
    half_life: Number | None = None,
    lowest: Number = 0.0,
    highest: Number = 1.0,
    weights: Sequence[float | Array] | None = None,
    names: Sequence[str] | None = None,
) -> RunningAdvantage:
    """`running_baseline.spo`, whose baselines are averages that forget, by a constant or as the policy moves.

        decay[i] = clip(2^(-D[i] / half_life), lowest, highest)

    with `D[i]` how far the policy has moved since it saw a prompt of the baseline last (SPO, arXiv:2509.13232). The
    divergence between those two policies would take the older one's log-probs of the new completions, and so its
    weights. `D` is the length of the path between them: the divergence that each step made on its own batch
    (`movement.make_movement`), summed over the steps. Where a batch is sampled ahead of an update, as by `run.overlap`,
    its divergence spans two updates, and the path counts each of them twice.

    The authors' code (verl-recipe, `spo`) has a half-life of 0.06 and a highest decay of 0.96, both fixed, and the
    lowest as a setting. It keeps the completions of each prompt: its `D` is the mean of |log p then - log p now| over
    their tokens.

    Args:
      of_row: as `of_rows` makes it.
      decay: from 0 to 1, at every observation, if there is no half-life.
      half_life: nats per token after which a reward counts for half.
      lowest: of the decay.
      highest: of the decay; below 1 the baselines forget of a policy that stands still, too.
      weights: of the reward functions, as in `advantages.from_rewards`.
      names: as in `advantages.from_rewards`.

    Raises:
      ValueError: for a decay out of range, and a half-life that is not above 0.
    """
    whole = _running(running_baseline.spo, running_baseline.observe, of_row, decay, weights, names)
    if half_life is None:
        return whole
    if isinstance(half_life, int | float) and not half_life > 0:
        raise ValueError(f"half_life is above 0 nats per token, got {half_life}")
    if isinstance(lowest, int | float) and isinstance(highest, int | float) and not 0 <= lowest <= highest <= 1:
        raise ValueError(f"the decay lies in 0 <= lowest <= highest <= 1, got {lowest} and {highest}")

    def after(held: Baselines, experience: Experience, moved: Array) -> Baselines:
        assert held.path is not None
        length, seen = held.path
        decay = jnp.clip(2 ** (-(length - seen) / half_life), lowest, highest)
        rows, scored = _index(held)(experience), total_reward(experience, weights)[1]
        now = jnp.zeros(seen.shape, bool).at[rows].max(jnp.any(scored, axis=1))
        running = running_baseline.observe(held.running, experience, _index(held), decay=decay, weights=weights)
        moved = jnp.nan_to_num(jnp.minimum(moved, _FAR * half_life))  # infinite, it could not be told from later ones
        return held._replace(running=running, path=Path(length + moved, jnp.where(now, length, seen)))

    path = Path(jnp.zeros(()), jnp.zeros(whole.begin.running.total.shape))
    return whole._replace(begin=whole.begin._replace(path=path), after=after)


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

    def advantage(held: Baselines) -> Advantage:
        return make(held.running, _index(held), weights=weights, names=names)

    def after(held: Baselines, experience: Experience, moved: Array | None = None) -> Baselines:
        return held._replace(running=move(held.running, experience, _index(held), decay=decay, weights=weights))

    begin = Baselines(running_baseline.init(int(of_row.max()) + 1), jnp.asarray(of_row))
    return RunningAdvantage(begin, advantage, after)


def _index(held: Baselines) -> running_baseline.Index:
    return lambda experience: held.of_row[experience.rollout.prompts.info["row"]]
