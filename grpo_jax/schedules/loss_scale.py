"""A scale of the loss that keeps gradients within float16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    gradient = (d/dparams of scale * loss) / scale

float16 ends at 65504 above and at 6e-8 below, where the gradient of one token of many lies; bfloat16 and float32 need
no scale. A gradient that overflows refuses its update (`updates.update`), after which the scale is halved; it is
doubled after many updates without. Powers of 2 change no rounding. The scale is part of the state, `TrainState.extra`:

    state = init_state(..., extra=init())
    updates = Updates(loss_scale=Scheduled(lambda step, extra: extra.scale))
    ...
    state, metrics = step(state, prompts)
    state = state._replace(extra=follow(state.extra, state.skipped, updates=updates.count))
"""

from typing import NamedTuple

import jax.numpy as jnp

from grpo_jax.types import Array


class LossScale(NamedTuple):
    """The scale of the next updates, and what it follows."""

    scale: Array  # [] float32
    good: Array  # [] int32, updates since it was changed
    skipped: Array  # [] int32, updates that had been refused when it was last looked at


def init(scale: float = 2.0**15) -> LossScale:
    """The scale before the first step.

    Raises:
      ValueError: for a scale that is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"scale is above 0, got {scale}")
    return LossScale(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def follow(held: LossScale, skipped: Array, *, updates: int = 1, growth_updates: int = 2000) -> LossScale:
    """The scale after a step: halved if updates were refused, doubled after `growth_updates` without.

    Args:
      held: before the step.
      skipped: `[]` int32, `state.skipped` after it.
      updates: of a step.
      growth_updates: 2000, as in PyTorch's GradScaler.

    Raises:
      ValueError: for fewer than 1 of either.
    """
    if updates < 1 or growth_updates < 1:
        raise ValueError(f"updates and growth_updates are at least 1, got {updates} and {growth_updates}")
    refused, good = skipped > held.skipped, held.good + updates
    grown = ~refused & (good >= growth_updates)
    scale = jnp.where(refused, held.scale / 2, jnp.where(grown, held.scale * 2, held.scale))
    # A copy: a state that is donated may not hold an array twice.
    return LossScale(scale, jnp.where(refused | grown, 0, good), jnp.array(skipped, jnp.int32))
