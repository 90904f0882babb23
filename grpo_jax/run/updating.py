"""The settings of scripts that say how a rollout becomes updates.

```python
@dataclasses.dataclass(frozen=True)
class Config(UpdateSettings):
    model: str

updates = config.updates(prompts=16)
rate = config.make_rate(peak, steps=500, updates=updates)
optimizer = optax.adamw(rate, weight_decay=config.weight_decay)
```
"""

import dataclasses
from typing import Literal

import optax

from grpo_jax.run.names import resolve
from grpo_jax.schedules import learning_rates
from grpo_jax.updates import Updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """The updates of a rollout, and their learning rate."""

    iterations: int = 1  # over each rollout
    minibatches: int = 1  # updates in an iteration
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    memory_gib: float | None = None  # of the device: in place of --micro-batches, the fewest with which a step fits
    max_grad_norm: float = 1.0
    learning_rate: float | None = None  # 1e-6 of whole weights and 1e-5 of adapters, if not given
    warmup_steps: int = 10
    decay: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate after the warm-up
    weight_decay: float = 0.0

    def updates(self, *, prompts: int) -> Updates:
        """The updates of a step of so many prompts.

        Raises:
          ValueError: for both a number of micro-batches and a memory to choose it by, and as `Updates.check`.
        """
        if self.memory_gib is not None and self.micro_batches != 1:
            raise ValueError(f"--memory-gib chooses the micro-batches, so give no --micro-batches {self.micro_batches}")
        names = ("iterations", "minibatches", "micro_batches", "max_grad_norm")
        updates = Updates(**{name: getattr(self, name) for name in names})
        updates.check(prompts)
        return updates

    def make_rate(self, peak: float, *, steps: int, updates: Updates) -> optax.Schedule:
        """The learning rate by the number of an update; a warm-up that outlasts the run is told."""
        if 0 < steps <= self.warmup_steps:
            print(
                f"warning: the warm-up of {self.warmup_steps} steps outlasts the run of {steps}: its learning rate is "
                f"at most {peak * steps / (self.warmup_steps + 1):.3g}, not {peak:g} (--warmup-steps)"
            )
        return learning_rates.learning_rate(
            peak, steps, warmup_steps=self.warmup_steps, updates_per_step=updates.count,
            decay=resolve(self.decay, "grpo_jax.schedules.learning_rates"),
        )  # fmt: skip
