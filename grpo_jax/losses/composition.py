"""How parts make a loss, how losses add up, and the number that a loss is.

A loss is `f(scores, experience) -> (terms, metrics)`. A term is a `Mean`, the sum and its divisor; the loss is the
sum over terms of `sum / count`.
"""

import functools
from collections.abc import Callable
from typing import TypedDict

import chex
import jax
import jax.numpy as jnp

from grpo_jax.losses.aggregates import token_mean
from grpo_jax.losses.anchors import old_policy
from grpo_jax.losses.contract import difference, per_token, widened
from grpo_jax.losses.ratios import token_ratio
from grpo_jax.protocols import Aggregate, Anchor, Loss, Penalty, PerToken, Ratio, Surrogate, Terms, Weight
from grpo_jax.statistics import Max, Mean
from grpo_jax.types import Array, Experience, Metrics, Scores


class Parts(TypedDict, total=False):
    """What every objective lets the caller replace: the arguments of `policy_loss`."""

    aggregate: Aggregate
    ratio: Ratio
    weight: Weight | None
    penalty: Penalty | None
    anchor: Anchor


def policy_loss(
    surrogate: Surrogate,
    aggregate: Aggregate,
    *,
    ratio: Ratio = token_ratio,
    weight: Weight | None = None,
    penalty: Penalty | None = None,
    anchor: Anchor = old_policy,
) -> Loss:
    """Composes an objective.

        loss = aggregate(-weight * surrogate(ratio(log_probs - anchor), A)) + aggregate(penalty)

    Args:
      surrogate: the objective to maximise, a function of the log-ratio and the advantages.
      aggregate: how tokens count, in both terms. For another denominator in the second,
        join `penalty_loss` by `plus`.
      ratio: the level of the ratio.
      weight: multiplies the surrogate objective of each token; `experience.weights`, where
        there are some, multiply it as well. Neither is differentiated, and the penalty
        is exempt from both.
      penalty: None for no second term.
      anchor: what the ratio is taken against; the old policy, or the sampler itself.

    Returns:
      A loss with the metrics `policy_loss`, `ratio_max`, `entropy` if it was scored,
      and those of the parts; see `losses` for what each of them counts.
    """

    def level(log_ratio: Array, mask: Array, advantages: Array) -> PerToken:
        return ratio(log_ratio, mask), {}

    return compose(level, surrogate, aggregate, weight, penalty, anchor)


def compose(
    level: Callable[[Array, Array, Array], PerToken],
    surrogate: Surrogate,
    aggregate: Aggregate,
    weight: Weight | None,
    penalty: Penalty | None,
    anchor: Anchor = old_policy,
) -> Loss:
    """`policy_loss` for a ratio that also sees the advantages.

    Args:
      level: `(log_ratio, mask, advantages) -> (log_ratio, metrics)`, as GMPO needs, which clips before its mean.
      surrogate: as in `policy_loss`, and so are the others.
      aggregate: see there.
      weight: see there.
      penalty: see there.
      anchor: see there.
    """

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        mask = experience.rollout.mask
        if experience.advantages is None:
            raise ValueError("a policy loss needs advantages; make_learn(..., advantage=) adds them")
        anchored = jax.lax.stop_gradient(anchor(scores, experience))
        weights, weight_metrics = weight(scores, experience) if weight is not None else (jnp.ones(()), {})
        if experience.weights is not None:
            chex.assert_equal_shape([experience.weights, mask])
            weights = weights * experience.weights
        weights = jax.lax.stop_gradient(weights)
        counted = mask & (weights != 0)  # tokens that the policy's term is made of

        advantages = per_token(experience.advantages)
        if advantages.shape not in (mask.shape, (*mask.shape[:2], 1)):
            raise ValueError(f"advantages of a mask {mask.shape} are [B, G] or [B, G, T], got {advantages.shape}")
        log_ratio, level_metrics = level(difference(scores.log_probs, anchored, mask), mask, advantages)
        # Tokens left out are 0 before an exponential or a product sees them: inf * 0 is NaN.
        log_ratio = jnp.where(counted, log_ratio, 0.0)
        log_probs = jnp.where(counted, widened(scores.log_probs), 0.0)
        advantages = jnp.where(counted, widened(advantages), 0.0)
        objective, surrogate_metrics = surrogate(log_ratio, advantages, log_probs)
        terms: Terms = (aggregate(-weights * objective, mask),)
        metrics = _means(level_metrics | surrogate_metrics, counted) | _means(weight_metrics, mask)
        if penalty is not None:
            cost, penalty_metrics = penalty(scores, experience)
            terms += (aggregate(cost, mask),)
            metrics = metrics | _means(penalty_metrics, mask)
        if scores.entropy is not None:
            metrics = metrics | _means({"entropy": scores.entropy}, mask)
        ratio_max = Max(jnp.exp(jnp.max(log_ratio, where=counted, initial=-jnp.inf)))
        return terms, {"policy_loss": terms[0], "ratio_max": ratio_max} | metrics

    return loss


def _means(per_token_metrics: dict[str, Array], mask: Array) -> Metrics:
    return {name: token_mean(jnp.broadcast_to(x, mask.shape), mask) for name, x in per_token_metrics.items()}


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
