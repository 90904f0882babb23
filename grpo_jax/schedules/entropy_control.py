"""An entropy bonus that follows a target (Skywork-OR1, He et al. 2025, arXiv:2505.22312, section 3.2.5).

    coefficient' = coefficient + delta where entropy < target, else coefficient - delta
    bonus        = coefficient where entropy <= target, else 0

The control is part of the state, `TrainState.extra`, and so saved and restored with it:

    state = init_state(..., extra=init())
    loss = Scheduled(lambda step, control: plus(dapo(), entropy_bonus(bonus(control))))
    ...
    state, metrics = step(state, prompts)
    state = state._replace(extra=follow(state.extra, summary(metrics)["entropy"]))
"""

from typing import NamedTuple

import jax.numpy as jnp

from grpo_jax.types import Array


class EntropyControl(NamedTuple):
    """What the bonus of the next step depends on."""

    coefficient: Array  # [] float32
    entropy: Array  # [] float32, nats per token, of the step before


def init(coefficient: float = 0.0) -> EntropyControl:
    """The control before the first step, whose bonus is 0: no entropy has been seen."""
    return EntropyControl(jnp.asarray(coefficient, jnp.float32), jnp.asarray(jnp.inf, jnp.float32))


def bonus(control: EntropyControl, *, target: float | Array = 0.2) -> Array:
    """The coefficient `[]` of `losses.entropy_bonus` at this step: 0 while the entropy is above the target."""
    return jnp.where(control.entropy <= target, control.coefficient, 0.0)


def follow(
    control: EntropyControl,
    entropy: Array,
    *,
    target: float | Array = 0.2,
    delta: float | Array = 0.005,
    low: float | Array = 0.0,
    high: float | Array = 1.0,
) -> EntropyControl:
    """The control after a step.

    Args:
      control: before the step.
      entropy: `[]` nats, the mean over the step's tokens. (`summary` gives 0 where no
        token counted: keep the control as it was after such a step.)
      target: nats; 0.2 in the paper.
      delta: how far the coefficient moves in a step; 0.005 in the paper.
      low: the least coefficient.
      high: the greatest coefficient.

    Raises:
      ValueError: for a `delta` that is not above 0, or an empty range.
    """
    if isinstance(delta, int | float) and not delta > 0:
        raise ValueError(f"delta is above 0, got {delta}")
    if isinstance(low, int | float) and isinstance(high, int | float) and not low <= high:
        raise ValueError(f"low is at most high = {high}, got {low}")
    moved = control.coefficient + jnp.where(entropy < target, delta, -delta)
    # A copy: a state that is donated may not hold what the metrics hold.
    return EntropyControl(jnp.clip(moved, low, high), jnp.array(entropy, jnp.float32))
