"""What a run keeps in its state beside the weights: running baselines, and the scale of a float16 loss.

```python
kept = keeping.begin(running, scaled=dtype == np.float16)
updates = keeping.scaled(updates) if "loss_scale" in kept else updates
step = keeping.followed(step, running, updates, policy, sampler) if kept else step
state = init_state(params, optimizer, key, extra=kept or ())
```
"""

import dataclasses
from typing import Any

from grpo_jax.policies import Policy
from grpo_jax.protocols import Sampler
from grpo_jax.schedules import Scheduled, loss_scale
from grpo_jax.schedules.movement import make_movement
from grpo_jax.schedules.running_advantages import RunningAdvantage
from grpo_jax.train_step import Step, followed_by, temperature_of, truncation_of
from grpo_jax.types import Experience, TrainState
from grpo_jax.updates import Updates


def begin(running: RunningAdvantage | None, *, scaled: bool) -> dict[str, Any]:
    """What `TrainState.extra` holds before the first step."""
    kept: dict[str, Any] = {} if running is None else {"baselines": running.begin}
    return kept | ({"loss_scale": loss_scale.init()} if scaled else {})


def scaled(updates: Updates) -> Updates:
    """Updates whose loss is multiplied by the scale that is kept."""
    return dataclasses.replace(updates, loss_scale=Scheduled(lambda step, kept: kept["loss_scale"].scale))


def followed(
    step: Step,
    running: RunningAdvantage | None,
    updates: Updates,
    policy: Policy,
    sampler: Sampler,
    *,
    replay: bool = True,
) -> Step:
    """The step, after which what is kept follows from what was learned; see `train_step.followed_by`.

    Args:
      step: not jitted yet.
      running: baselines, if there are some; with a half-life they cost one more scoring of the batch.
      updates: of a step.
      policy: what is trained.
      sampler: of the step.
      replay: whether the policy is scored under the sampler's truncation.
    """
    moved = make_movement(
        policy, temperature=temperature_of(sampler), parts=updates.parts,
        truncation=truncation_of(sampler) if replay else None,
    )  # fmt: skip

    def after(state: TrainState, experience: Experience) -> TrainState:
        kept = dict(state.extra)
        if running is not None:
            distance = None if running.begin.path is None else moved(state, experience)
            kept["baselines"] = running.after(kept["baselines"], experience, distance)
        if "loss_scale" in kept:
            kept["loss_scale"] = loss_scale.follow(kept["loss_scale"], state.skipped, updates=updates.count)
        return state._replace(extra=kept)

    return followed_by(step, after)
