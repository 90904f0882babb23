"""Penalties: costs in the loss that keep the policy near a reference, or its entropy up.

Three estimates of the divergence `KL(p, ref)` from tokens that `p` drew (Schulman 2020,
joschu.net/blog/kl-approx.html), with `d = log p - log ref`. What a loss follows is not
their value but the expectation of their gradient, where the tokens are given:

    estimate            expected value     expected gradient, on-policy
    k1 = d              KL(p, ref)         0: as a cost in a loss it does nothing on average
    k2 = d^2 / 2        biased             that of KL(p, ref)
    k3 = e^-d - 1 + d   KL(p, ref)         that of KL(ref, p)
    ratio * k1          KL(p, ref)         that of KL(p, ref)
    ratio * k2          biased             neither's
    ratio * k3          KL(p, ref)         that of KL(p, ref)

The last three are those with `correction=token_ratio`: multiplied by the ratio to the
policy that sampled, which is differentiated, they are also right off-policy. As a cost
of the reward (`advantages.kl_cost`) it is the value that counts, and the policy gradient
does the rest. A test enumerates a distribution and checks each line.
"""

import chex
import jax
import jax.numpy as jnp

from grpo_jax.losses.aggregates import token_mean
from grpo_jax.losses.anchors import old_policy, sampler
from grpo_jax.losses.contract import check_not_negative, difference, log_ratio, weighted
from grpo_jax.protocols import Aggregate, Anchor, KLEstimate, Loss, Penalty, PerToken, Ratio, Terms
from grpo_jax.types import Array, Experience, Metrics, Number, Scores

_LARGEST = 20.0  # of the log-ratio of a correction, as in the surrogates


def kl_k1(log_probs: Array, ref_log_probs: Array) -> Array:
    """`log p - log ref`: unbiased as a value, but its gradient under samples of `p` is 0 on average."""
    return log_ratio(log_probs, ref_log_probs)


def kl_k2(log_probs: Array, ref_log_probs: Array) -> Array:
    """`(log p - log ref)^2 / 2`: biased as a value; on-policy its gradient is that of KL(p, ref)."""
    difference = log_ratio(log_probs, ref_log_probs)
    infinite = jnp.isinf(difference)
    return jnp.where(infinite, jnp.inf, jnp.where(infinite, 0.0, difference) ** 2 / 2)


def kl_k3(log_probs: Array, ref_log_probs: Array) -> Array:
    """`ref / p - 1 - log(ref / p)`: unbiased as a value, never negative; on-policy its gradient is that of KL(ref, p).

    By `expm1`: written out, rounding makes it negative near 0. Infinite, without a gradient, where `ref / p` overflows.
    """
    difference = log_ratio(ref_log_probs, log_probs)
    overflows = difference > jnp.log(jnp.finfo(difference.dtype).max)
    difference = jnp.where(overflows, 0.0, difference)  # before the exponential, whose slope would be infinite
    return jnp.where(overflows, jnp.inf, jnp.expm1(difference) - difference)


def k1(beta: Number, *, correction: Ratio | None = None) -> Penalty:
    """`beta * kl_k1`; without a correction its gradient is 0 on average."""
    return _kl(kl_k1, beta, correction)


def k2(beta: Number, *, correction: Ratio | None = None) -> Penalty:
    """`beta * kl_k2`."""
    return _kl(kl_k2, beta, correction)


def k3(beta: Number, *, correction: Ratio | None = None) -> Penalty:
    """`beta * kl_k3`, the penalty of GRPO (Shao et al. 2024, arXiv:2402.03300, equation 4).

    Args:
      beta: at least 0.
      correction: the level of a ratio that the estimate is multiplied by, at most e^20. None is the
        paper's; `token_ratio` is the unbiased estimate of DeepSeek-V3.2
        (arXiv:2512.02556, section 3.1), TRL's default (`use_bias_correction_kl`).

    Raises:
      ValueError: for a `beta` below 0.
    """
    return _kl(kl_k3, beta, correction)


def _kl(estimate: KLEstimate, beta: Number, correction: Ratio | None) -> Penalty:
    check_not_negative(beta=beta)

    def penalty(scores: Scores, experience: Experience) -> PerToken:
        mask = experience.rollout.mask
        if experience.ref_log_probs is None:
            raise ValueError(
                "a KL penalty needs the log-probs of a reference policy: make the state with "
                "init_state(..., reference=True), or put ref_log_probs into the experience"
            )
        chex.assert_equal_shape([scores.log_probs, experience.ref_log_probs, mask])
        kl = estimate(jnp.where(mask, scores.log_probs, 0.0), jnp.where(mask, experience.ref_log_probs, 0.0))
        cost = weighted(beta, kl)
        if correction is not None:
            if experience.old_log_probs is None:
                raise ValueError(
                    "a correction needs old_log_probs: make_train_step(score_old=True), grpo.py --score-old"
                )
            level = correction(difference(scores.log_probs, experience.old_log_probs, mask), mask)
            cost = weighted(jnp.exp(jnp.minimum(level, _LARGEST)), cost)
        return cost, {"kl": kl}

    return penalty


def squared_log_ratio(tau: Number, *, anchor: Anchor = sampler) -> Penalty:
    """`tau * (log p - log anchor)^2`, a pull back to the policy that sampled (Kimi K2.5, 2026, arXiv:2602.02276).

    prime-rl adds it to DPPO with `tau` 1e-3. It is twice `k2` with another reference.

    Args:
      tau: at least 0.
      anchor: `sampler`, or `old_policy`.

    Raises:
      ValueError: for a `tau` below 0.
    """
    check_not_negative(tau=tau)

    def penalty(scores: Scores, experience: Experience) -> PerToken:
        mask = experience.rollout.mask
        anchored = jax.lax.stop_gradient(anchor(scores, experience))
        square = 2 * kl_k2(jnp.where(mask, scores.log_probs, 0.0), jnp.where(mask, anchored, 0.0))
        return weighted(tau, square), {"squared_log_ratio": square}

    return penalty


def covariant_kl(coefficient: Number = 1.0) -> Penalty:
    """`coefficient * |log p - log p_old|` on the tokens that `transforms.high_covariance` has marked, 0 elsewhere.

    The penalty of KL-Cov (Cui et al. 2025, arXiv:2505.22617), which holds the few tokens that the
    entropy falls by. verl's coefficient is 1; there a weight of the rollout multiplies the penalty, too.

    Args:
      coefficient: at least 0.

    Raises:
      ValueError: for a coefficient below 0; when called, without marks.
    """
    check_not_negative(coefficient=coefficient)

    def penalty(scores: Scores, experience: Experience) -> PerToken:
        marked = experience.high_covariance
        if marked is None:
            raise ValueError("covariant_kl needs make_learn(..., transforms=(transforms.high_covariance(),))")
        marked = marked & experience.rollout.mask
        gap = difference(scores.log_probs, old_policy(scores, experience), marked)
        distance = jax.lax.stop_gradient(jnp.sign(gap)) * gap  # of slope 0 at 0, where jnp.abs has 1
        return weighted(coefficient, distance), {"high_covariance": marked}

    return penalty


def penalty_loss(penalty: Penalty, aggregate: Aggregate) -> Loss:
    """A penalty as a loss of its own, with its own aggregate, to be joined by `plus`."""

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        mask = experience.rollout.mask
        cost, metrics = penalty(scores, experience)
        return (aggregate(cost, mask),), {name: token_mean(x, mask) for name, x in metrics.items()}

    return loss


def echo(coefficient: Number = 0.1, *, aggregate: Aggregate = token_mean) -> Loss:
    """Cross-entropy of what the policy did not write, as a loss of its own to be joined by `plus` (ECHO of prime-rl).

        loss = coefficient * aggregate(-log_prob) over the tokens of experience.environment_mask

    A policy that reads what tools answer learns to foresee it, also where no advantage teaches it. The tokens are
    those of `environment_mask`, which the policy's own loss leaves out, and have a denominator of their own;
    `transforms.environment_tokens` finds them in conversations. Their log-probs are scored as all others are: at the
    sampler's temperature and, where it truncates, among the tokens that it keeps.

    Args:
      coefficient: 0.1 in prime-rl.
      aggregate: how those tokens count.

    Raises:
      ValueError: for a coefficient below 0; when called, without an `environment_mask`.
    """
    check_not_negative(coefficient=coefficient)

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        mask = experience.environment_mask
        if mask is None:
            raise ValueError("echo needs an environment_mask: transforms.environment_tokens adds it to conversations")
        cost = aggregate(-scores.log_probs, mask)
        return (cost._replace(sum=weighted(coefficient, cost.sum)),), {"echo": token_mean(-scores.log_probs, mask)}

    return loss


def entropy_bonus(coefficient: Number, *, aggregate: Aggregate = token_mean) -> Loss:
    """A reward for entropy, as a loss of its own to be joined by `plus` (Williams and Peng 1991).

        loss = -coefficient * aggregate(entropy)

    The entropy is the exact one of each token's distribution, not an estimate from
    the token drawn. `entropy_control` adapts the coefficient to a target.

    Args:
      coefficient: below 0 it is a penalty.
      aggregate: `token_mean` in TRL, whatever its loss type.
    """

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if scores.entropy is None:
            raise ValueError("an entropy bonus needs entropies: score with entropy=True")
        entropy = aggregate(scores.entropy, experience.rollout.mask)
        return (entropy._replace(sum=-coefficient * entropy.sum),), {}

    return loss
