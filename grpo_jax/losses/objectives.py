"""The published objectives, each a composition of parts.

A loss is `f(scores, experience) -> (terms, metrics)`. A term is a `Mean`, the sum and
what it is to be divided by; the loss is the sum over terms of `sum / count`.
"""

from typing import Unpack

import jax.numpy as jnp

from grpo_jax.losses.aggregates import (
    completion_mean,
    completion_sum,
    constant_length,
    token_mean,
)
from grpo_jax.losses.composition import Parts, compose, policy_loss
from grpo_jax.losses.contract import check_positive
from grpo_jax.losses.ratios import product_ratio, sequence_ratio, sequence_token_ratio
from grpo_jax.losses.surrogates import (
    clipped_importance,
    gamma_weight,
    pessimistic_clip,
    policy_gradient,
    ppo_clip,
    soft_gate,
)
from grpo_jax.protocols import Loss, PerToken, Terms
from grpo_jax.types import Array, Experience, Metrics, Number, Scores

# ------------------------------------------------------------- clipped token ratios


def grpo(
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number | None = None,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """GRPO (Shao et al. 2024, arXiv:2402.03300, equation 3): clipped token ratios, mean over completions.

    The paper's own penalty is `k3(0.04)`; pass it, and a state with a reference.

    Args:
      epsilon: as in `ppo_clip`.
      epsilon_high: as in `ppo_clip`.
      delta: as in `ppo_clip`.
      **parts: replace `ratio`, `aggregate`, `weight` or `penalty`; see `policy_loss`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=completion_mean) | parts)


def bnpo(
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number | None = None,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """The loss that TRL calls `bnpo`: clipped token ratios, mean over the tokens of the update.

    TRL averages over the tokens of a micro-batch, and so depends on the split; here it
    is those of the whole update. (The name is that of Xiao et al. 2025,
    arXiv:2506.02864, whose subject is another: a Beta distribution of rewards.)
    Arguments as in `grpo`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=token_mean) | parts)


def dr_grpo(
    max_tokens: int,
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number | None = None,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): constant length; goes with `centered_advantages`.

    Args:
      max_tokens: the limit that completions were sampled under.
      epsilon: as in `ppo_clip`.
      epsilon_high: as in `ppo_clip`.
      delta: as in `ppo_clip`.
      **parts: as in `grpo`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=constant_length(max_tokens)) | parts)


def dapo(
    *,
    epsilon: Number = 0.2,
    epsilon_high: Number = 0.28,
    delta: Number | None = None,
    **parts: Unpack[Parts],
) -> Loss:
    """The loss of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 8): clip-higher and the mean over tokens.

    The mean is over the tokens of the update, as in the paper. TRL divides by the
    average over the updates of a rollout: `normalize_by_rollout_tokens`. Arguments as in `grpo`.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high, delta), **Parts(aggregate=token_mean) | parts)


# ------------------------------------------------------------------ whole completions


def gspo(*, epsilon: Number = 3e-4, epsilon_high: Number = 4e-4, **parts: Unpack[Parts]) -> Loss:
    """GSPO (Zheng et al. 2025, arXiv:2507.18071, equation 5): the clipped ratio of the whole completion.

    Arguments as in `grpo`.
    """
    return policy_loss(
        ppo_clip(epsilon, epsilon_high), **Parts(aggregate=completion_mean, ratio=sequence_ratio) | parts
    )


def gspo_token(*, epsilon: Number = 3e-4, epsilon_high: Number = 4e-4, **parts: Unpack[Parts]) -> Loss:
    """GSPO-token (arXiv:2507.18071, equation 13): `gspo` for advantages that differ from token to token.

    Arguments as in `grpo`.
    """
    return gspo(epsilon=epsilon, epsilon_high=epsilon_high, **Parts(ratio=sequence_token_ratio) | parts)


def luspo(*, epsilon: Number = 2e-3, epsilon_high: Number = 2.5e-3, **parts: Unpack[Parts]) -> Loss:
    """LUSPO (2026, arXiv:2602.05261): `gspo` with each completion's loss times its length, so that tokens weigh alike.

    Arguments as in `grpo`.
    """
    return gspo(epsilon=epsilon, epsilon_high=epsilon_high, **Parts(aggregate=completion_sum) | parts)


def gmpo(*, epsilon: Number = 0.4, epsilon_high: Number | None = None, **parts: Unpack[Parts]) -> Loss:
    """GMPO (Zhao et al. 2025, arXiv:2507.20673, equation 4): the geometric mean of ratios that are clipped before it.

        gain = exp(mean_t clipped(log_ratio[t])) * A

    where a log-ratio is clipped above `epsilon_high` for a good token and below
    `-epsilon` for a bad one: the bounds are on the log-ratio, not on the ratio. The mean
    is over the tokens that count, whatever their weights.

    Args:
      epsilon: lower distance from 0 of a log-ratio; 0.4 in the paper.
      epsilon_high: upper distance; `epsilon` if None.
      **parts: replace `aggregate`, `weight` or `penalty`, or the level `ratio` that
        the clipped log-ratios are brought to.
    """
    check_positive(epsilon=epsilon, epsilon_high=epsilon_high)
    high = epsilon if epsilon_high is None else epsilon_high
    parts = Parts(aggregate=completion_mean, ratio=sequence_ratio) | parts
    ratio = parts["ratio"]

    def level(log_ratio: Array, mask: Array, advantages: Array) -> PerToken:
        clipped = {
            "clip_low": (advantages < 0) & (log_ratio < -epsilon),
            "clip_high": (advantages > 0) & (log_ratio > high),
        }
        return ratio(pessimistic_clip(log_ratio, advantages, -epsilon, high), mask), clipped

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        return jnp.exp(log_ratio) * advantages, {}

    return compose(level, surrogate, parts["aggregate"], parts.get("weight"), parts.get("penalty"))


# ---------------------------------------------------------------------- no hard clip


def reinforce(**parts: Unpack[Parts]) -> Loss:
    """REINFORCE (Williams 1992): the advantage times the log-prob of the completion, and no ratio.

    With `leave_one_out_advantages` it is RLOO (Ahmadian et al. 2024, arXiv:2402.14740,
    equation 7), with `batch_normalised_advantages` REINFORCE++ without its clip (Hu et
    al. 2025, arXiv:2501.03262; with the clip: `dapo(epsilon_high=0.2)`). Right for one
    update a rollout; TRL's RLOO has the clipped ratio of whole completions instead,
    which is `grpo(ratio=product_ratio)`.

    Args:
      **parts: replace `aggregate`, `weight` or `penalty`.

    Raises:
      ValueError: for a `ratio`, which there is none of.
    """
    if "ratio" in parts:
        raise ValueError("reinforce has no ratio to replace; grpo(ratio=...) has one")
    return policy_loss(policy_gradient(), **Parts(aggregate=completion_sum) | parts)


def cispo(*, max_ratio: Number = 5.0, min_ratio: Number = 0.0, **parts: Unpack[Parts]) -> Loss:
    """CISPO (MiniMax-M1, 2025, arXiv:2506.13585, equation 4): a clipped importance weight, mean over tokens.

    The default cap of 5 is ScaleRL's (Khatri et al. 2025, arXiv:2510.13786); TRL's
    `epsilon_high` is the cap itself, while the paper's is `1 + epsilon_high`.

    Args:
      max_ratio: as in `clipped_importance`.
      min_ratio: as in `clipped_importance`.
      **parts: as in `grpo`.
    """
    return policy_loss(clipped_importance(max_ratio, min_ratio), **Parts(aggregate=token_mean) | parts)


def sapo(*, tau_pos: Number = 1.0, tau_neg: Number = 1.05, **parts: Unpack[Parts]) -> Loss:
    """SAPO (Gao et al. 2025, arXiv:2511.20347, equation 5): a soft gate, mean over completions.

    Args:
      tau_pos: as in `soft_gate`.
      tau_neg: as in `soft_gate`.
      **parts: as in `grpo`.
    """
    return policy_loss(soft_gate(tau_pos, tau_neg), **Parts(aggregate=completion_mean) | parts)


def vespo(
    *,
    k_pos: Number = 2.0,
    lambda_pos: Number = 3.0,
    k_neg: Number = 3.0,
    lambda_neg: Number = 2.0,
    **parts: Unpack[Parts],
) -> Loss:
    """VESPO (2026, arXiv:2602.10693): a gamma-shaped weight of the whole completion's ratio, mean over tokens.

    TRL adds the logarithm of the truncated weight between trainer and sampler to the
    ratio; `transforms.old_from_sampler` takes the ratio against the sampler itself.

    Args:
      k_pos: as in `gamma_weight`.
      lambda_pos: as in `gamma_weight`.
      k_neg: as in `gamma_weight`.
      lambda_neg: as in `gamma_weight`.
      **parts: as in `grpo`.
    """
    surrogate = gamma_weight(k_pos, lambda_pos, k_neg, lambda_neg)
    return policy_loss(surrogate, **Parts(aggregate=token_mean, ratio=product_ratio) | parts)


# ------------------------------------------------------------------- beside the policy


def sft() -> Loss:
    """Supervised learning of the completions: the mean over tokens of the negative log-likelihood, in nats.

    Every token of the mask counts alike; `experience.weights` are not looked at.
    """

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        return (token_mean(-scores.log_probs, experience.rollout.mask),), {}

    return loss
