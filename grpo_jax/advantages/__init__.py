"""Rewards to advantages: how much better a completion is than the others of its group.

    (rewards [B, G], mask [B, G]) -> [B, G]               estimators.py
    (rewards, mask, experience) -> [B, G] or [B, G, T]     optimal.py
    (rewards [B, G, T], mask [B, G, T]) -> [B, G, T]       steps.py
    experience -> (advantages, metrics)                    of_experiences.py, batchwise.py, divergences.py

The first kinds become the last by `from_rewards`, `from_experience` and `from_steps`.
"""

from grpo_jax.advantages.batchwise import from_normalised_rewards, reinforce_plus_plus
from grpo_jax.advantages.divergences import distillation_advantages, kl_cost
from grpo_jax.advantages.estimators import (
    batch_normalised_advantages,
    batch_scaled_advantages,
    best_minus_second_advantages,
    centered_advantages,
    group_advantages,
    leave_one_out_advantages,
    max_rl_advantages,
    pass_at_k,
)
from grpo_jax.advantages.of_experiences import from_experience, from_function, from_rewards
from grpo_jax.advantages.optimal import length_weighted_advantages, optimal_token_advantages
from grpo_jax.advantages.spread import has_variance
from grpo_jax.advantages.steps import from_steps, process_advantages, rewards_to_go
from grpo_jax.advantages.totals import Weights, reward_metrics, total_reward

__all__ = [
    "Weights",
    "batch_normalised_advantages",
    "batch_scaled_advantages",
    "best_minus_second_advantages",
    "centered_advantages",
    "distillation_advantages",
    "from_experience",
    "from_function",
    "from_normalised_rewards",
    "from_rewards",
    "from_steps",
    "group_advantages",
    "has_variance",
    "kl_cost",
    "leave_one_out_advantages",
    "length_weighted_advantages",
    "max_rl_advantages",
    "optimal_token_advantages",
    "pass_at_k",
    "process_advantages",
    "reinforce_plus_plus",
    "reward_metrics",
    "rewards_to_go",
    "total_reward",
]
