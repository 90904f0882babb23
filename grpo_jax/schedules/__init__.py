"""What changes during a run: settings that follow the step, the reference policy, the entropy bonus."""

from grpo_jax.schedules.scheduled import Scheduled, at, cosine_with_hold

__all__ = ["Scheduled", "at", "cosine_with_hold"]
