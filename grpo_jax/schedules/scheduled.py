"""Settings that change during a run: functions of the step, and of the state's `extra`.

    loss = Scheduled(lambda step, extra: losses.grpo(penalty=losses.k3(beta(step))))

The loss, the advantage and the temperature of a train step may each be `Scheduled`. The
schedules of optax serve as they are: `optax.linear_schedule(0.1, 0.04, 1000)`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from grpo_jax.types import Array, TrainState


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A part that is made anew at each step: a loss, an advantage or a temperature."""

    make: Callable[[Array, Any], Any]  # (step [] int32, extra) -> part


def at(part: Any, state: TrainState) -> Any:
    """The part at this state's step; one that is not `Scheduled` is the same at every step."""
    return part.make(state.step, state.extra) if isinstance(part, Scheduled) else part


def cosine_with_hold(
    start: float | Array, end: float | Array, steps: int, *, hold: float = 0.1, tail: float = 0.2
) -> Callable[[Array], Array]:
    """A cosine from `start` to `end` between a hold and a tail.

        p = clip((step / steps - hold) / (1 - hold - tail), 0, 1)
        value = end + (start - end) * (1 + cos(pi * p)) / 2

    `cosine_with_hold(0.1, 0.04, steps)` is the schedule that a tutorial on GRPO gives for
    beta: 0.1 for the first tenth, then down to 0.04, and 0.04 for the last fifth. (Its
    code does the inverse: a jump to 0.04 and a rise.)

    Args:
      start: the value until `hold * steps`.
      end: the value from `(1 - tail) * steps` on.
      steps: of the run.
      hold: share of the steps.
      tail: share of the steps.

    Returns:
      `step -> value`.

    Raises:
      ValueError: for shares below 0, or that leave no step between them.
    """
    if min(hold, tail) < 0 or not hold + tail < 1:
        raise ValueError(f"hold and tail are shares that add up to less than 1, got {hold} and {tail}")

    def schedule(step: Array) -> Array:
        progress = jnp.clip((step / steps - hold) / (1 - hold - tail), 0.0, 1.0)
        return end + (start - end) * (1 + jnp.cos(jnp.pi * progress)) / 2

    return schedule
