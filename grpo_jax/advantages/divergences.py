"""Divergences from a reference or a teacher: as a cost of the reward, and as an advantage of each token."""

import jax.numpy as jnp

from grpo_jax.losses import kl_k1
from grpo_jax.losses.contract import check_not_negative, weighted
from grpo_jax.protocols import Advantage, Cost, KLEstimate
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics


def kl_cost(beta: float | Array, *, estimate: KLEstimate = kl_k1) -> Cost:
    """The divergence from the reference policy as a cost of the reward, not a term of the loss.

        cost[b, g] = beta * sum_t estimate(log p[t], log ref[t])

    As in RLOO (Ahmadian et al. 2024, arXiv:2402.14740, equation 1). Not differentiated:
    the policy gradient does that, so that `kl_k1`, whose own gradient is 0 on average, is
    the right one here. `p` is the policy that sampled, `old_log_probs`, or the sampler's
    log-probs where those were not scored.

    Args:
      beta: at least 0.
      estimate: `kl_k1`, `kl_k2` or `kl_k3` of `losses`.

    Raises:
      ValueError: for a `beta` below 0; when called, without `ref_log_probs`.
    """
    check_not_negative(beta=beta)

    def cost(experience: Experience) -> Array:
        return weighted(beta, jnp.sum(token_kl(experience, estimate), axis=-1))

    return cost


def distillation_advantages(beta: float | Array = 1.0, *, gamma: float | Array = 0.0) -> Advantage:
    """The teacher's log-prob less that of the policy that sampled, for each token.

        d[t] = log q[t] - log p_old[t]
        A[t] = beta * d[t] * (1 + gamma * (1 - sum over s < t of |d[s]| / sum over s of |d[s]|))

    On-policy distillation by the token drawn (Thinking Machines, "On-Policy Distillation", 2025), with no reward and no
    look at later tokens: with `losses.reinforce(aggregate=token_mean)` its expected gradient is that of the reverse
    divergence at each token. `losses.sampled_reverse_kl` adds the same to an objective with rewards.

    With `gamma` early tokens weigh more, up to `1 + gamma`: where the completion has left what the teacher would write,
    the teacher's word on its continuation counts for less (IW-OPD, 2026, arXiv:2606.22600, as in TRL 1.16, whose gamma
    is 0.5). The sums are over the tokens of the completion that count.

    Args:
      beta: weight, at least 0.
      gamma: at least 0, which weighs all tokens alike.

    Returns:
      `experience -> (advantages [B, G, T], metrics)`; it needs a teacher in `state.ref_params`. The metric
      `reverse_kl` is the mean of `log p_old - log q`.

    Raises:
      ValueError: for a setting below 0; when called, without `ref_log_probs`.
    """
    check_not_negative(beta=beta, gamma=gamma)

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        mask = experience.rollout.mask
        kl = jnp.where(mask, token_kl(experience, kl_k1), 0.0)
        size = jnp.abs(kl)
        before = (jnp.cumsum(size, axis=-1) - size) / jnp.maximum(jnp.sum(size, axis=-1, keepdims=True), 1e-8)
        return weighted(beta, -kl * (1 + gamma * (1 - before))), {"reverse_kl": Mean(jnp.sum(kl), jnp.sum(mask))}

    return advantage


def token_kl(experience: Experience, estimate: KLEstimate) -> Array:
    """From the policy that sampled to the reference, `[B, G, T]`; 0 where a token does not count."""
    rollout, ref = experience.rollout, experience.ref_log_probs
    if ref is None:
        raise ValueError("a KL cost needs a reference policy: init_state(..., reference=True)")
    log_probs = rollout.log_probs if experience.old_log_probs is None else experience.old_log_probs
    return estimate(jnp.where(rollout.mask, log_probs, 0.0), jnp.where(rollout.mask, ref, 0.0))
