"""The published objectives, each a composition of parts.

A loss is `f(scores, experience) -> (terms, metrics)`. A term is a `Mean`, the sum and
what it is to be divided by; the loss is the sum over terms of `sum / count`.
"""

import functools
from collections.abc import Callable
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp

from grpo_jax.losses.aggregates import (
    completion_mean,
    completion_sum,
    constant_length,
    token_mean,
)
from grpo_jax.losses.contract import check_positive, difference, per_token
from grpo_jax.losses.ratios import product_ratio, sequence_ratio, sequence_token_ratio, token_ratio
from grpo_jax.losses.surrogates import (
    clipped_importance,
    gamma_weight,
    pessimistic_clip,
    policy_gradient,
    ppo_clip,
    soft_gate,
)
from grpo_jax.protocols import Aggregate, Loss, Penalty, PerToken, Ratio, Surrogate, Terms, Weight
from grpo_jax.statistics import Max, Mean
from grpo_jax.types import Array, Experience, Metrics, Number, Scores

Level = Callable[[Array, Array, Array], PerToken]  # (log_ratio, mask, advantages) -> log_ratio, [B, G, T] each


class Parts(TypedDict, total=False):
    """What every objective lets the caller replace: the arguments of `policy_loss`."""

    aggregate: Aggregate
    ratio: Ratio
    weight: Weight | None
    penalty: Penalty | None


def policy_loss(
    surrogate: Surrogate,
    aggregate: Aggregate,
    *,
    ratio: Ratio = token_ratio,
    weight: Weight | None = None,
    penalty: Penalty | None = None,
) -> Loss:
    """Composes an objective.

        loss = aggregate(-weight * surrogate(ratio(log_probs - old_log_probs), A)) + aggregate(penalty)

    Args:
      surrogate: what to maximise, of the log-ratio and the advantages.
      aggregate: how tokens count, in both terms. For another denominator in the second,
        join `penalty_loss` by `plus`.
      ratio: the level of the ratio.
      weight: what the gain of each token is multiplied by; `experience.weights`, where
        there are some, multiply it as well. Neither is differentiated, and the penalty
        is exempt from both.
      penalty: None for no second term.

    Returns:
      A loss with the metrics `policy_loss`, `ratio_max`, `entropy` if it was scored,
      and those of the parts.
    """

    def level(log_ratio: Array, mask: Array, advantages: Array) -> PerToken:
        return ratio(log_ratio, mask), {}

    return _objective(level, surrogate, aggregate, weight, penalty)


def _objective(
    level: Level, surrogate: Surrogate, aggregate: Aggregate, weight: Weight | None, penalty: Penalty | None
) -> Loss:
    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        mask = experience.rollout.mask
        if experience.advantages is None:
            raise ValueError("a policy loss needs advantages; make_learn(..., advantage=) adds them")
        if experience.old_log_probs is None:
            raise ValueError(
                "several updates of a rollout need the old_log_probs of the policy that sampled: "
                "make_collect(..., score_old=True) adds them"
            )
        advantages = per_token(experience.advantages)
        log_ratio, metrics = level(difference(scores.log_probs, experience.old_log_probs, mask), mask, advantages)
        ratio_max = Max(jnp.exp(jnp.max(log_ratio, where=mask, initial=-jnp.inf)))
        weights, of_weight = weight(scores, experience) if weight is not None else (jnp.ones(()), {})
        if experience.weights is not None:
            weights = weights * experience.weights
        weights = jax.lax.stop_gradient(weights)
        # What is left out goes before an exponential sees it: inf * 0 is NaN.
        log_ratio = jnp.where(weights == 0, 0.0, log_ratio)
        log_probs = jnp.where(mask, scores.log_probs, 0.0)
        gain, of_gain = surrogate(log_ratio, advantages, log_probs)
        terms: Terms = (aggregate(-weights * gain, mask),)
        metrics = metrics | of_weight | of_gain
        if penalty is not None:
            cost, of_penalty = penalty(scores, experience)
            terms += (aggregate(cost, mask),)
            metrics = metrics | of_penalty
        if scores.entropy is not None:
            metrics = metrics | {"entropy": scores.entropy}
        means = {name: token_mean(jnp.broadcast_to(x, mask.shape), mask) for name, x in metrics.items()}
        return terms, {"policy_loss": terms[0], "ratio_max": ratio_max} | means

    return loss


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

    return _objective(level, surrogate, parts["aggregate"], parts.get("weight"), parts.get("penalty"))


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


def plus(*losses: Loss) -> Loss:
    """The sum of losses, each with its own aggregate: `plus(grpo(), entropy_bonus(0.01))`.

    Of metrics of the same name the last one's is reported.
    """
    if not losses:
        raise ValueError("a sum has at least one loss")

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        parts = [f(scores, experience) for f in losses]
        return sum((terms for terms, _ in parts), ()), {name: x for _, metrics in parts for name, x in metrics.items()}

    return loss


def normalize_by_rollout_tokens(make: Callable[[Aggregate], Loss]) -> Loss:
    """The sum over the update's tokens, divided by the average number of tokens of the rollout's updates, as in TRL.

        loss = sum over the update / (tokens of the rollout / updates of a pass)

    `token_mean` divides every update by its own tokens instead. For instance
    `normalize_by_rollout_tokens(lambda mean: dapo(aggregate=mean))`.

    Args:
      make: `aggregate -> loss`.

    Returns:
      A loss that asks for `make_learn(..., transforms=(transforms.share_tokens,))`.
    """

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        if experience.token_share is None:
            raise ValueError("normalize_by_rollout_tokens needs make_learn(..., transforms=(transforms.share_tokens,))")
        tokens = jnp.sum(experience.token_share)

        def mean(x: Array, mask: Array) -> Mean:
            return Mean(token_mean(x, mask).sum, tokens)

        return make(mean)(scores, experience)

    return loss


def value(terms: Terms, counts: tuple[Array, ...] | None = None) -> Array:
    """The loss `[]` of its terms: the sum of `sum / count`, where a term that counts nothing is 0.

    Args:
      terms: of a batch, or of a part of one.
      counts: those of the whole batch, if the terms are of a part.
    """
    counts = tuple(jax.lax.stop_gradient(term.count) for term in terms) if counts is None else counts
    quotients = [term.sum / jnp.where(count == 0, 1, count) for term, count in zip(terms, counts, strict=True)]
    return functools.reduce(jnp.add, quotients)
