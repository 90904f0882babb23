"""Surrogates: what is maximised, of a log-ratio and an advantage.

A surrogate is `(log_ratio [B, G, T], advantages, log_probs) -> (objective, metrics)`. They
differ in the weight `w` that a token's gradient `w * A * grad log_prob` gets as its
ratio leaves 1; `notebooks/02_objectives.ipynb` draws them.
"""

import jax
import jax.numpy as jnp

from grpo_jax.losses.contract import check_not_negative, check_positive, check_shares, weighted
from grpo_jax.protocols import PerToken, Surrogate
from grpo_jax.types import Array, Number

_LARGEST = 20.0  # of a log-ratio that is exponentiated without a bound of its own: e^20 is 5e8


def ppo_clip(epsilon: Number, epsilon_high: Number | None = None, delta: Number | None = None) -> Surrogate:
    """The clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, equation 7).

        objective = min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)

    It is the lower bound of the two for either sign of `A`: a token with `A > 0` above
    `1 + epsilon_high` and one with `A < 0` below `1 - epsilon` get no gradient; the weight of
    every other is its ratio. With `delta` the first ratio is `min(ratio, delta)`, so that a
    token with `A < 0` above `delta` gets no gradient either (the dual clip of Ye et al. 2020,
    arXiv:1912.09729, equation 5; two-sided clipping in INTELLECT-2, Prime Intellect
    2025, arXiv:2505.07291).

    Computed in log space, as `A * exp(min(log_ratio, log(1 + epsilon_high)))` where `A > 0`
    and with the maximum where `A < 0`: a clipped ratio is then never
    exponentiated, so that it cannot turn a gradient of 0 into `0 * inf`. A log-ratio above 20 counts as 20, as in verl:
    a token with `A < 0` may be that far up, and gets no gradient there.

    Args:
      epsilon: lower distance from 1; from 1 upwards there is no lower bound.
      epsilon_high: upper distance; `epsilon` if None, larger in DAPO's clip-higher.
      delta: upper bound on the ratio where `A < 0`, above `1 + epsilon_high`; None for
        no bound.

    Returns:
      A surrogate with the metrics `clip_low`, `clip_high` and, with `delta`,
      `clip_delta`: the shares of tokens clipped there, over all tokens that count.

    Raises:
      ValueError: for an epsilon that is not above 0, or a delta that is not above
        `1 + epsilon_high`.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    check_positive(epsilon=epsilon, epsilon_high=epsilon_high)
    if isinstance(delta, int | float) and isinstance(high, int | float) and not delta > 1 + high:
        raise ValueError(f"delta is a bound above 1 + epsilon_high = {1 + high:g}, got {delta}")

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        del log_probs
        lowest, highest = jnp.log1p(-jnp.minimum(jnp.asarray(epsilon), 1.0)), jnp.log1p(high)
        bounded = pessimistic_clip(log_ratio, advantages, lowest, highest)
        metrics = {
            "clip_low": (advantages < 0) & (log_ratio < lowest),
            "clip_high": (advantages > 0) & (log_ratio > highest),
        }
        if delta is not None:
            bounded = jnp.minimum(bounded, jnp.log(delta))
            metrics["clip_delta"] = (advantages < 0) & (log_ratio > jnp.log(delta))
        return jnp.exp(jnp.minimum(bounded, _LARGEST)) * advantages, metrics

    return surrogate


def pessimistic_clip(log_ratio: Array, advantages: Array, lowest: Number, highest: Number) -> Array:
    """PPO's one-sided clip of a log-ratio: from above where `A >= 0`, from below where `A < 0`.

    An advantage of 0 is bounded from above, too, since inf * 0 is NaN.
    """
    return jnp.where(advantages < 0, jnp.maximum(log_ratio, lowest), jnp.minimum(log_ratio, highest))


def policy_gradient() -> Surrogate:
    """The score function (Williams 1992, doi:10.1007/BF00992696): no ratio, the weight of every token is 1.

    objective = A * log_prob
    """

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        del log_ratio
        return weighted(advantages, log_probs), {}

    return surrogate


def clipped_importance(max_ratio: Number, min_ratio: Number = 0.0) -> Surrogate:
    """The score function under a clipped importance weight (CISPO, MiniMax 2025, arXiv:2506.13585, equations 4 and 5).

        objective = sg(clip(ratio, min_ratio, max_ratio)) * A * log_prob

    The weight is not differentiated, so that no token's gradient is dropped.

    Args:
      max_ratio: the cap itself. The paper writes it `1 + epsilon_high`; TRL's
        `epsilon_high` is the cap, so its 5.0 is 5.0 here.
      min_ratio: the floor; the paper trains without one.

    Returns:
      A surrogate with the metric `clip_high`, the share of tokens above the cap.

    Raises:
      ValueError: for a `max_ratio` that is not above 0 and `min_ratio`.
    """
    check_positive(max_ratio=max_ratio)
    check_not_negative(min_ratio=min_ratio)
    if isinstance(max_ratio, int | float) and isinstance(min_ratio, int | float) and not max_ratio > min_ratio:
        raise ValueError(f"max_ratio is above min_ratio = {min_ratio}, got {max_ratio}")

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        highest = jnp.log(max_ratio)
        weight = jnp.maximum(jnp.exp(jnp.minimum(log_ratio, highest)), min_ratio)
        return weighted(jax.lax.stop_gradient(weight) * advantages, log_probs), {"clip_high": log_ratio > highest}

    return surrogate


def soft_gate(tau_pos: Number = 1.0, tau_neg: Number = 1.05) -> Surrogate:
    """A smooth gate in place of the clip (SAPO, Gao et al. 2025, arXiv:2511.20347, equations 5 and 6).

        objective = 4 / tau * sigmoid(tau * (ratio - 1)) * A

    The weight is `4 p (1 - p) ratio` with `p = sigmoid(tau (ratio - 1))`: 1 at ratio 1,
    like the ratio below it, and smoothly to 0 far above, after a peak of 1.6 near ratio 2.
    A log-ratio above 20 counts as 20.

    Args:
      tau_pos: `tau` where `A > 0`.
      tau_neg: `tau` elsewhere; larger falls off faster.

    Raises:
      ValueError: for a temperature that is not above 0.
    """
    check_positive(tau_pos=tau_pos, tau_neg=tau_neg)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        del log_probs
        tau = jnp.where(advantages > 0, tau_pos, tau_neg)
        distance = jnp.expm1(jnp.minimum(log_ratio, _LARGEST))
        return 4 / tau * jax.nn.sigmoid(tau * distance) * advantages, {}

    return surrogate


def gamma_weight(
    k_pos: Number = 2.0, lambda_pos: Number = 3.0, k_neg: Number = 3.0, lambda_neg: Number = 2.0
) -> Surrogate:
    """The score function under a weight of the shape of a gamma density (VESPO, 2026, arXiv:2602.10693).

        objective = sg(ratio^k * exp(lambda * (1 - ratio))) * A * log_prob

    The weight is 1 at ratio 1. It is meant for the ratio of whole completions,
    `product_ratio`; the log-ratio is held between log(1e-8) and 20, as in TRL, but a ratio of exactly 0 has weight 0.

    Args:
      k_pos: `k` where `A >= 0`.
      lambda_pos: `lambda` where `A >= 0`.
      k_neg: `k` where `A < 0`.
      lambda_neg: `lambda` where `A < 0`.

    Returns:
      A surrogate with the metric `importance`, the mean weight.

    Raises:
      ValueError: for a power or a rate below 0.
    """
    check_not_negative(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        vanishes = log_ratio == -jnp.inf
        log_ratio = jnp.clip(log_ratio, jnp.log(1e-8), _LARGEST)
        k = jnp.where(advantages < 0, k_neg, k_pos)
        rate = jnp.where(advantages < 0, lambda_neg, lambda_pos)
        weight = jnp.where(vanishes & (k > 0), 0.0, jnp.exp(k * log_ratio - rate * jnp.expm1(log_ratio)))
        weight = jax.lax.stop_gradient(weight)
        return weighted(weight * advantages, log_probs), {"importance": weight}

    return surrogate


def importance() -> Surrogate:
    """The ratio without a bound, the surrogate that clipping bounds (Schulman et al. 2015, arXiv:1502.05477).

        objective = ratio * A

    A log-ratio above 20 counts as 20.
    """

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        del log_probs
        return jnp.exp(jnp.minimum(log_ratio, _LARGEST)) * advantages, {}

    return surrogate


def smoothed_importance(alpha: Number = 0.1) -> Surrogate:
    """The ratio of a policy that is mixed with the old one (PSPO, Dwyer et al. 2025, arXiv:2509.21282).

        p~   = (1 - alpha) p + alpha p_old
        objective = p~ / p_old * A = ((1 - alpha) ratio + alpha) * A

    The ratio comes nearer to 1 and the gradient is that of `importance` times `1 - alpha`: no token's gradient is
    dropped, and none is bounded. A log-ratio above 20 counts as 20.

    Args:
      alpha: share of the old policy, from 0 to 1; 0.1 is what the authors propose for TRL.

    Raises:
      ValueError: for a share out of range.
    """
    check_shares(alpha=alpha)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        del log_probs
        ratio = jnp.exp(jnp.minimum(log_ratio, _LARGEST))
        return ((1 - alpha) * ratio + alpha) * advantages, {}

    return surrogate


def squared_policy_gradient(beta: Number) -> Surrogate:
    """The score function less a square of the log-ratio (DRO, Richemond et al. 2024, arXiv:2405.19107).

        objective = A * log_prob - beta / 2 * (log ratio)^2

    The weight of a token's gradient is `1 - beta * log_ratio / A`: the objective is largest where the log-ratio is
    `A / beta`. The form is that of verl's `dro`. (The paper learns the baseline of `A` as a value.)
    A weight of the rollout multiplies both terms, as in verl.

    Args:
      beta: in units of the advantage per nat, above 0. verl has no default.

    Raises:
      ValueError: for a `beta` that is not above 0.
    """
    check_positive(beta=beta)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        infinite = jnp.isinf(log_ratio)  # the square wins
        square = jnp.where(infinite, jnp.inf, jnp.where(infinite, 0.0, log_ratio) ** 2)
        return weighted(advantages, jnp.where(infinite, 0.0, log_probs)) - beta / 2 * square, {}

    return surrogate
