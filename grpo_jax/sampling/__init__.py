"""Prompts to rollouts."""

from grpo_jax.sampling.batch import check_settings, completion_keys, draw, is_any, live_columns, sample, truncate

__all__ = ["check_settings", "completion_keys", "draw", "is_any", "live_columns", "sample", "truncate"]
