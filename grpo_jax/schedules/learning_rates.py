"""Learning rates in steps: one function makes every schedule.

    optimizer = optax.adamw(learning_rate(1e-6, warmup_steps=10))
    optimizer = optax.adamw(learning_rate(1e-6, steps, warmup_steps=10, decay=cosine, updates_per_step=updates.count))

A step is a rollout with all its updates. An optimiser counts updates, so the schedule divides by the updates per step.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from grpo_jax.types import Array, Metrics, Number, TrainState


class Decay(Protocol):
    """The shape of a decay: `constant`, `linear`, `cosine`."""

    def __call__(self, progress: Array, /) -> Array:
        """Maps progress `[]`, 0 at the end of the warm-up and 1 at the end of the run, to 1 falling to 0."""


def constant(progress: Array) -> Array:
    """1: no decay."""
    return jnp.ones_like(progress)


def linear(progress: Array) -> Array:
    """`1 - progress`."""
    return 1 - progress


def cosine(progress: Array) -> Array:
    """`(1 + cos(pi * progress)) / 2` (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, without restarts)."""
    return (1 + jnp.cos(jnp.pi * progress)) / 2


def learning_rate(
    peak: Number,
    steps: int | None = None,
    *,
    warmup_steps: int = 0,
    decay: Decay = constant,
    final_fraction: Number = 0.0,
    updates_per_step: int = 1,
) -> Callable[[Array | int], Array]:
    """A linear warm-up, then a constant or a decaying rate.

        n    = floor(update / updates_per_step)                               the step, from 0
        rate = peak * (n + 1) / (warmup_steps + 1)                            where n < warmup_steps
        rate = peak * (f + (1 - f) * decay((n - warmup_steps) / (steps - warmup_steps)))      later

    with `f = final_fraction`. All updates of a step have the same rate. The first `warmup_steps` steps have less than
    the full rate, and the first of them more than 0; without a warm-up the first update has the full rate. The
    last step of a decay still trains: its progress is below 1. Beyond `steps` the rate is `f * peak`. The optimiser
    does not count updates that were left out (`updates.update`), so those delay the schedule.

    Args:
      peak: the full rate, above 0.
      steps: of the whole run, the warm-up included. Only a decay needs them.
      warmup_steps: steps before the full rate; 0 for none.
      decay: `constant`, `linear`, `cosine`, or any `progress -> factor`.
      final_fraction: share of `peak` where the decay ends, from 0 to 1.
      updates_per_step: updates that a step makes of its rollout: iterations times minibatches.

    Returns:
      `update -> rate`, a schedule for optax; `rate_of_step` is the rate that a step had.

    Raises:
      ValueError: for a setting out of range, a decay without `steps`, or a final fraction without a decay.
    """
    if isinstance(peak, int | float) and not peak > 0:
        raise ValueError(f"the learning rate is above 0, got {peak}")
    if isinstance(final_fraction, int | float) and not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction is from 0 to 1, got {final_fraction}")
    if warmup_steps < 0 or updates_per_step < 1:
        raise ValueError(
            f"warmup_steps is at least 0 and updates_per_step at least 1, got {warmup_steps} and {updates_per_step}"
        )
    if decay is constant and isinstance(final_fraction, int | float) and final_fraction:
        raise ValueError(f"final_fraction = {final_fraction} has no effect without a decay")
    if decay is not constant and (steps is None or steps <= warmup_steps):
        raise ValueError(f"a decay after {warmup_steps} steps of warm-up needs more steps than those, got {steps}")

    def schedule(update: Array | int) -> Array:
        n = jnp.asarray(update) // updates_per_step
        rate = peak * jnp.minimum(1.0, (n + 1) / (warmup_steps + 1))
        if decay is constant or steps is None:
            return rate
        progress = jnp.clip((n - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
        return rate * (final_fraction + (1 - final_fraction) * decay(progress))

    return schedule


def rate_of_step(schedule: Callable[[Array | int], Array], state: TrainState, metrics: Metrics) -> dict[str, Array]:
    """The metric `learning_rate` of a step: the rate of its first update, also where that was left out.

        schedule(updates that the optimiser had made before the step)

    The optimiser itself says how many it has made: neither an update that was not finite nor one of a batch without a
    token that counts is among them, so that the number of the step does not tell.

    Args:
      schedule: `update -> rate`, the one that the optimiser goes by.
      state: after the step.
      metrics: of the step, as `learn` returns them.

    Raises:
      ValueError: if the optimiser goes by no schedule.
    """
    states = jax.tree.leaves(state.opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState))
    counts = [part.count for part in states if isinstance(part, optax.ScaleByScheduleState)]
    if not counts:
        raise ValueError("the optimiser was made with a number, and not with a schedule")
    return {"learning_rate": schedule(counts[0] - jnp.asarray(metrics["grad_norm"].count, jnp.int32))}
