"""Ratios: at which level the policy is compared with the one that sampled.

A ratio takes and returns the log of it, `(log_ratio [B, G, T], mask) -> log_ratio`.
Its input is `log_probs - old_log_probs`, 0 where nothing counts.
"""

import jax
import jax.numpy as jnp

from grpo_jax.losses.contract import masked_sum
from grpo_jax.types import Array


def token_ratio(log_ratio: Array, mask: Array) -> Array:
    """Each token has its own ratio: PPO's, and GRPO's (Shao et al. 2024, arXiv:2402.03300, equation 3)."""
    del mask
    return log_ratio


def sequence_ratio(log_ratio: Array, mask: Array) -> Array:
    """Every token has the geometric mean of its completion's ratios (GSPO, Zheng et al. 2025, arXiv:2507.18071).

        log s[b, g] = sum_t mask * log_ratio / sum_t mask          (equation 7)

    The gradient flows through the mean.
    """
    mean = masked_sum(log_ratio, mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.where(mask, mean[..., None], 0.0)


def sequence_token_ratio(log_ratio: Array, mask: Array) -> Array:
    """The value of `sequence_ratio` with the gradient of each token's own (GSPO-token, arXiv:2507.18071, section 4.3).

        log s[b, g, t] = sg(log s[b, g]) + log_prob[t] - sg(log_prob[t])          (equation 14)

    With one advantage per completion, value and gradient are those of `sequence_ratio`
    under `completion_mean`; it is for advantages that differ from token to token.
    """
    finite = jnp.where(jnp.isfinite(log_ratio), log_ratio, 0.0)  # -inf - -inf is NaN
    own = finite - jax.lax.stop_gradient(finite)
    return jnp.where(mask, jax.lax.stop_gradient(sequence_ratio(log_ratio, mask)) + own, 0.0)


def product_ratio(log_ratio: Array, mask: Array) -> Array:
    """Every token has the product of its completion's ratios, the importance weight of the whole completion.

        log s[b, g] = sum_t mask * log_ratio

    Unbiased, and of a variance that grows with the length.
    """
    return jnp.where(mask, masked_sum(log_ratio, mask, axis=-1)[..., None], 0.0)
