"""What changes during a run: the learning rate, settings that follow the step, the reference, the entropy bonus."""

from grpo_jax.schedules.learning_rates import learning_rate, rate_of_step
from grpo_jax.schedules.scheduled import Scheduled, at, cosine_with_hold

__all__ = ["Scheduled", "at", "cosine_with_hold", "learning_rate", "rate_of_step"]
