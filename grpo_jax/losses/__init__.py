"""Objectives, composed of a ratio, a surrogate, a weight, a penalty and an aggregate.

    ratio      (log_ratio [B,G,T], mask [B,G,T]) -> log_ratio                   ratios.py
    surrogate  (log_ratio, advantages, log_probs) -> (gain [B,G,T], metrics)    surrogates.py
    weight     (scores, experience) -> (weight [B,G,T], metrics)                weights.py
    penalty    (scores, experience) -> (cost [B,G,T], metrics)                  penalties.py
    aggregate  (per_token [B,G,T], mask) -> Mean(sum, count)                    aggregates.py
    loss       (scores, experience) -> (terms, metrics)                         objectives.py

Metrics of the parts are per-token arrays, reported as means over the tokens that count.
"""

from grpo_jax.losses.aggregates import (
    completion_mean,
    completion_mean_of_all,
    completion_sum,
    constant_length,
    per_prompt_count,
    prompt_mean,
    token_mean,
)
from grpo_jax.losses.composition import normalize_by_rollout_tokens, plus, policy_loss, value
from grpo_jax.losses.objectives import (
    bnpo,
    cispo,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    luspo,
    reinforce,
    sapo,
    sft,
    vespo,
)
from grpo_jax.losses.penalties import entropy_bonus, k1, k2, k3, kl_k1, kl_k2, kl_k3, penalty_loss
from grpo_jax.losses.ratios import product_ratio, sequence_ratio, sequence_token_ratio, token_ratio
from grpo_jax.losses.surrogates import clipped_importance, gamma_weight, policy_gradient, ppo_clip, soft_gate
from grpo_jax.losses.weights import masked_importance, off_policy_mask, product, truncated_importance

__all__ = [
    "bnpo",
    "cispo",
    "clipped_importance",
    "completion_mean",
    "completion_mean_of_all",
    "completion_sum",
    "constant_length",
    "dapo",
    "dr_grpo",
    "entropy_bonus",
    "gamma_weight",
    "gmpo",
    "grpo",
    "gspo",
    "gspo_token",
    "k1",
    "k2",
    "k3",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "luspo",
    "masked_importance",
    "normalize_by_rollout_tokens",
    "off_policy_mask",
    "penalty_loss",
    "per_prompt_count",
    "plus",
    "policy_gradient",
    "policy_loss",
    "ppo_clip",
    "product",
    "product_ratio",
    "prompt_mean",
    "reinforce",
    "sapo",
    "sequence_ratio",
    "sequence_token_ratio",
    "sft",
    "soft_gate",
    "token_mean",
    "token_ratio",
    "truncated_importance",
    "value",
    "vespo",
]
