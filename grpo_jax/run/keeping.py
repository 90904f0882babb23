"""What a run keeps in its state beside the weights: running baselines, and the scale of a float16 loss.

kept = keeping.begin(running, scaled=dtype == np.float16)
updates = keeping.scaled(updates) if "loss_scale" in kept else updates
step = followed_by(step, keeping.follow(running, updates, movement)) if kept else step
state = init_state(params, optimizer, key, extra=kept or ())
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from grpo_jax.schedules import Scheduled, loss_scale
from grpo_jax.schedules.running_advantages import RunningAdvantage
from grpo_jax.types import Array, Experience, TrainState
from grpo_jax.updates import Updates


def begin(running: RunningAdvantage | None, *, scaled: bool) -> dict[str, Any]:
    """What `TrainState.extra` holds before the first step."""
    kept: dict[str, Any] = {} if running is None else {"baselines": running.begin}
    return kept | ({"loss_scale": loss_scale.init()} if scaled else {})


def scaled(updates: Updates) -> Updates:
    """Updates whose loss is multiplied by the scale that is kept."""
    return dataclasses.replace(updates, loss_scale=Scheduled(lambda step, kept: kept["loss_scale"].scale))


def follow(
    running: RunningAdvantage | None, updates: Updates, movement: Callable[[TrainState, Experience], Array]
) -> Callable[[TrainState, Experience], TrainState]:
    """What becomes of it after a step; see `train_step.followed_by`.

    Args:
      running: baselines, if there are some.
      updates: of a step.
      movement: `movement.make_movement` of the policy, for baselines with a half-life.
    """

    def after(state: TrainState, experience: Experience) -> TrainState:
        kept = dict(state.extra)
        if running is not None:
            moved = None if running.begin.path is None else movement(state, experience)
            kept["baselines"] = running.after(kept["baselines"], experience, moved)
        if "loss_scale" in kept:
            kept["loss_scale"] = loss_scale.follow(kept["loss_scale"], state.skipped, updates=updates.count)
        return state._replace(extra=kept)

    return after
