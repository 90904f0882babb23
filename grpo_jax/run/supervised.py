"""Supervised learning as one stage of a run: a warm-up before GRPO, or what a policy is taught of what it sampled.

```python
params = fine_tune(
    config, policy, params, batch, steps=360, learning_rate=2e-3, key=key, run_dir=config.run_dir / "warmup"
)
```
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from grpo_jax import losses
from grpo_jax.policies import Policy
from grpo_jax.run import metrics
from grpo_jax.run.training_loop import loop
from grpo_jax.schedules import learning_rates
from grpo_jax.train_step import make_learn
from grpo_jax.types import Experience, Params, PRNGKey, Rollout
from grpo_jax.updates import Updates, init_state, jit_learn


def fine_tune(
    config: Any,
    policy: Policy,
    params: Params,
    batch: Callable[[int], Rollout],
    *,
    steps: int,
    learning_rate: float,
    key: PRNGKey,
    run_dir: metrics.RunDir,
    save_every: int = 50,
    micro_batches: int = 1,
    allow: Sequence[str] = (),
    digests: Mapping[str, str] | None = None,
) -> Params:
    """Learns demonstrations by AdamW, in a folder of its own; returns the params after the last step.

    The rate rises over up to 20 steps and falls as a cosine to a twentieth of its peak; the weight decay is 0.01, and
    gradients are clipped to the norm 1.

    Args:
      config: of the whole run; a stage is not resumed under another.
      policy: the network.
      params: to begin with. They are given away.
      batch: `step -> demonstrations` (`data.make_demonstrations`), a function of the step alone.
      steps: of this stage.
      learning_rate: its peak.
      key: of this stage.
      run_dir: of this stage.
      save_every: steps between checkpoints.
      micro_batches: parts in which an update is computed, to save memory.
      allow: settings that may change when the stage is resumed, as in `run.loop`.
      digests: of what it depends on beside its settings, as in `run.loop`.

    Raises:
      ValueError: as `run.loop`.
    """
    rate = learning_rates.learning_rate(
        learning_rate, steps, warmup_steps=min(20, steps // 2), decay=learning_rates.cosine, final_fraction=0.05
    )
    optimizer = optax.adamw(rate, weight_decay=0.01)
    updates = Updates(micro_batches=micro_batches, max_grad_norm=1.0)
    learn = jit_learn(make_learn(policy, optimizer, loss=losses.sft(), updates=updates))
    state = init_state(params, optimizer, key)
    del params
    with loop(
        config, state, steps=steps, save_every=save_every, run_dir=run_dir, allow=allow, digests=digests,
        keys=("loss", "grad_norm", "length"),
    ) as stage:  # fmt: skip
        del state
        for n in stage:
            stage.state, measured = learn(stage.state, Experience(batch(n)))
            stage.log(measured | learning_rates.rate_of_step(rate, stage.state, measured))
    return stage.state.params
