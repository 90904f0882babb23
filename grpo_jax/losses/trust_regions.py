"""Surrogates with a trust region in the probability of the token, not in its ratio.

A rare token's ratio leaves any band while its probability has hardly moved, and that of a likely token stays within
while much of the distribution moves. These look at `p` and `p_old` of the token drawn, that is at two distributions
over two outcomes: this token, and any other. They are made for the ratio of single tokens, `token_ratio`.
"""

import jax
import jax.numpy as jnp

from grpo_jax.losses.contract import check_not_negative, check_positive, weighted
from grpo_jax.protocols import Divergence, PerToken, Surrogate
from grpo_jax.types import Array, Number

_LARGEST = 20.0  # of a log-ratio that is exponentiated without a bound of its own: e^20 is 5e8
_LEAST = 1e-8  # of the probability of any other token, as in verl


def total_variation(log_probs: Array, old_log_probs: Array) -> Array:
    """`|p - p_old|`, the total variation of the two outcomes (DPPO, arXiv:2602.04879)."""
    return jnp.abs(jnp.exp(log_probs) - jnp.exp(old_log_probs))


def binary_kl(log_probs: Array, old_log_probs: Array) -> Array:
    """The divergence of the two outcomes, old from new (DPPO, arXiv:2602.04879).

        p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))

    A probability of any other token below 1e-8 counts as 1e-8.
    """
    p_old = jnp.exp(old_log_probs)
    rest, rest_old = (jnp.maximum(-jnp.expm1(x), _LEAST) for x in (log_probs, old_log_probs))
    drawn = weighted(p_old, jnp.where(p_old > 0, old_log_probs - log_probs, 0.0))
    return drawn + (1 - p_old) * (jnp.log(rest_old) - jnp.log(rest))


def divergence_mask(
    low: Number = 0.2,
    high: Number | None = None,
    *,
    divergence: Divergence = total_variation,
    max_ratio: Number = 20.0,
) -> Surrogate:
    """The score function inside a trust region, and nothing outside (DPPO, Qi et al. 2026, arXiv:2602.04879).

        objective = M * sg(min(ratio, max_ratio)) * A * log_prob

    where `M` is 0 where `A > 0` and the token became likelier by a divergence above `high`, and where `A < 0` and it
    became less likely by one above `low`, and else 1. An advantage of 0 counts as a negative one, as in
    verl. The ratio is not differentiated, as in verl; SkyRL's and prime-rl's gradient `ratio * A * grad log_prob` is
    the same up to the cap.

    Args:
      low: the divergence that is allowed where `A < 0`.
      high: the divergence that is allowed where `A > 0`; `low` if None.
      divergence: `total_variation`, in units of probability, or `binary_kl`, in nats.
      max_ratio: cap of the ratio; 20 in verl's functions, which warn of small ones.

    Returns:
      A surrogate with the metrics `clip_low` and `clip_high`: the shares of tokens left out, over all that count.

    Raises:
      ValueError: for a bound below 0, or a cap that is not above 0.
    """
    highest = low if high is None else high
    check_not_negative(low=low, high=high)
    check_positive(max_ratio=max_ratio)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        distance = divergence(log_probs, _old(log_ratio, log_probs))
        good = advantages > 0
        above = good & (log_ratio > 0) & (distance > highest)
        below = ~good & (log_ratio < 0) & (distance > low)
        ratio = jnp.exp(jnp.minimum(log_ratio, jnp.log(max_ratio)))
        weight = jax.lax.stop_gradient(jnp.where(above | below, 0.0, ratio))
        return weighted(weight * advantages, log_probs), {"clip_low": below, "clip_high": above}

    return surrogate


def quadratic_shift(delta: Number = 0.2) -> Surrogate:
    """The ratio less a square of the shift of the probability (DRPO, Yao et al. 2026, arXiv:2606.09821).

        objective = ratio * A - |A| / (2 delta) * p_old * (ratio - 1)^2

    The gradient is that of `ratio * A` times `1 - sign(A) (p - p_old) / delta`: it falls to 0 where the probability
    has moved by `delta` in the direction of the advantage, DPPO's bound, and beyond it pulls back. A log-ratio above
    20 counts as 20. A token of probability 0 has gradient 0; its value is that of `p_old = 0`.

    Args:
      delta: in units of probability, above 0. The default is DPPO's bound in verl; that of the paper was not read.

    Raises:
      ValueError: for a `delta` that is not above 0.
    """
    check_positive(delta=delta)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        p_old = jax.lax.stop_gradient(jnp.exp(_old(log_ratio, log_probs)))
        distance = jnp.expm1(jnp.minimum(log_ratio, _LARGEST))
        square = p_old * distance**2
        return (1 + distance) * advantages - jnp.abs(advantages) / (2 * delta) * square, {}

    return surrogate


def _old(log_ratio: Array, log_probs: Array) -> Array:
    """The log-prob that the log-ratio was taken against; that of probability 0 where the ratio does not tell."""
    vanished = log_ratio == -jnp.inf  # p is 0 and so is the ratio, whatever p_old was
    return jnp.where(vanished, -jnp.inf, log_probs - jnp.where(vanished, 0.0, log_ratio))
