"""Objectives, composed of an anchor, a ratio, a surrogate, a weight, a penalty and an aggregate.

    anchor     (scores, experience) -> log_probs [B,G,T]                             anchors.py
    ratio      (log_ratio [B,G,T], mask [B,G,T]) -> log_ratio                        ratios.py
    surrogate  (log_ratio, advantages, log_probs) -> (objective [B,G,T], metrics)    surrogates.py, trust_regions.py
    weight     (scores, experience) -> (weight [B,G,T], metrics)                     weights.py
    penalty    (scores, experience) -> (cost [B,G,T], metrics)                       penalties.py
    aggregate  (per_token [B,G,T], mask) -> Mean(sum, count)                         aggregates.py
    loss       (scores, experience) -> (terms, metrics)                              objectives.py

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
from grpo_jax.losses.anchors import corrected, old_policy, sampler
from grpo_jax.losses.balance import load_balance
from grpo_jax.losses.composition import normalize_by_rollout_tokens, plus, policy_loss, value
from grpo_jax.losses.distillation import (
    distill,
    distill_top,
    forward_kl,
    generalised_jsd,
    of_top_k,
    reverse_kl,
    sampled_reverse_kl,
)
from grpo_jax.losses.objectives import (
    bnpo,
    cispo,
    dapo,
    dppo,
    dr_grpo,
    dro,
    drpo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    kl_cov,
    luspo,
    m2po,
    pspo,
    reinforce,
    sapo,
    sft,
    vespo,
)
from grpo_jax.losses.penalties import (
    covariant_kl,
    echo,
    entropy_bonus,
    k1,
    k2,
    k3,
    kl_k1,
    kl_k2,
    kl_k3,
    penalty_loss,
    squared_log_ratio,
)
from grpo_jax.losses.ratios import product_ratio, sequence_ratio, sequence_token_ratio, token_ratio
from grpo_jax.losses.surrogates import (
    clipped_importance,
    gamma_weight,
    importance,
    policy_gradient,
    ppo_clip,
    smoothed_importance,
    soft_gate,
    squared_policy_gradient,
)
from grpo_jax.losses.trust_regions import binary_kl, divergence_mask, quadratic_shift, total_variation
from grpo_jax.losses.weights import masked_importance, off_policy_mask, product, truncated_importance

__all__ = [
    "binary_kl",
    "bnpo",
    "cispo",
    "clipped_importance",
    "completion_mean",
    "completion_mean_of_all",
    "completion_sum",
    "constant_length",
    "corrected",
    "covariant_kl",
    "dapo",
    "distill",
    "distill_top",
    "divergence_mask",
    "dppo",
    "dr_grpo",
    "dro",
    "drpo",
    "echo",
    "entropy_bonus",
    "forward_kl",
    "gamma_weight",
    "generalised_jsd",
    "gmpo",
    "grpo",
    "gspo",
    "gspo_token",
    "importance",
    "k1",
    "k2",
    "k3",
    "kl_cov",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "load_balance",
    "luspo",
    "m2po",
    "masked_importance",
    "normalize_by_rollout_tokens",
    "of_top_k",
    "off_policy_mask",
    "old_policy",
    "penalty_loss",
    "per_prompt_count",
    "plus",
    "policy_gradient",
    "policy_loss",
    "ppo_clip",
    "product",
    "product_ratio",
    "prompt_mean",
    "pspo",
    "quadratic_shift",
    "reinforce",
    "reverse_kl",
    "sampled_reverse_kl",
    "sampler",
    "sapo",
    "sequence_ratio",
    "sequence_token_ratio",
    "sft",
    "smoothed_importance",
    "soft_gate",
    "squared_log_ratio",
    "squared_policy_gradient",
    "token_mean",
    "token_ratio",
    "total_variation",
    "truncated_importance",
    "value",
    "vespo",
]
