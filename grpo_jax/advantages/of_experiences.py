"""An advantage of a train step, `experience -> (advantages, metrics)`, made of an estimator."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from grpo_jax.advantages.estimators import group_advantages
from grpo_jax.advantages.totals import Weights, moments, reward_metrics, total_reward
from grpo_jax.losses.contract import per_token
from grpo_jax.protocols import Advantage, Cost, Estimator, ExperienceEstimator
from grpo_jax.types import Array, Experience, Metrics


def from_rewards(
    estimator: Estimator = group_advantages,
    *,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
    cost: Cost | None = None,
) -> Advantage:
    """Makes the advantage function of a train step: weighs the rewards, then calls `estimator`.

        r[b, g] = sum over k of weights[k] * rewards[b, g, k] - cost[b, g]

    A reward that could not be given is left out of the sum, as in TRL; a completion
    that no reward function could score is left out of its group.

    Args:
      estimator: `(rewards [B, G], mask [B, G]) -> [B, G]`.
      weights: one per reward function; all 1 if None.
      names: one per reward function, for the metrics; their index if None.
      cost: `experience -> [B, G]`, such as `kl_cost(beta)`.

    Returns:
      `f(experience) -> (advantages [B, G], metrics)`, with `reward_metrics` and the mean and deviation of the cost.
    """

    def ignoring_experience(rewards: Array, mask: Array, experience: Experience) -> Array:
        del experience
        return estimator(rewards, mask)

    return from_experience(ignoring_experience, weights=weights, names=names, cost=cost)


def from_experience(
    estimator: ExperienceEstimator,
    *,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
    cost: Cost | None = None,
) -> Advantage:
    """As `from_rewards`, for a function that also sees lengths, entropy or log-probs.

        def length_aware(rewards, mask, experience):
            lengths = experience.rollout.lengths  # [B, G]
            return centered_advantages(rewards, mask) / jnp.sqrt(lengths)

        advantage = from_experience(length_aware, weights=(1.0, 0.2))

    `experience.old_entropy` and `old_log_probs` are those of the policy that sampled; `score_old=True` adds them. A
    function with a parameter named `experience` is of this kind and one without it is an estimator for
    `from_rewards`: so `from_function` tells them apart. A function that also makes its own metrics is an advantage
    already, `experience -> (advantages, metrics)`; `total_reward` and `reward_metrics` are its parts.

    Args:
      estimator: `(rewards [B, G], mask [B, G], experience) -> [B, G] or [B, G, T]`.
      weights: as in `from_rewards`.
      names: as in `from_rewards`.
      cost: as in `from_rewards`.

    Returns:
      As `from_rewards`. A completion that no reward function could score gets 0.

    Raises:
      ValueError: when called, for advantages of another shape.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        metrics = {}
        if cost is not None:
            subtracted = cost(experience)
            total, metrics = total - subtracted, moments("cost", subtracted, scored)
        advantages = estimator(total, scored, experience)
        if advantages.shape[:2] != total.shape or advantages.ndim not in (2, 3):
            name, shape = getattr(estimator, "__name__", repr(estimator)), "[B, G] or [B, G, T]"
            raise ValueError(f"{name} returned shape {advantages.shape} for {total.shape} rewards, expected {shape}")
        advantages = jnp.where(per_token(scored) if advantages.ndim == 3 else scored, advantages, 0.0)
        return advantages, reward_metrics(experience, total, scored, names) | metrics

    return advantage


def from_function(
    function: Callable[..., Any], *, weights: Weights | None = None, names: Sequence[str] | None = None
) -> Advantage:
    """An advantage of a function of one of four kinds, told apart by the names of its parameters.

        (rewards, mask)               an estimator, such as `group_advantages`      from_rewards
        (rewards, mask, experience)   one that sees more                            from_experience
        (weights=, names=)            a maker, such as `from_normalised_rewards`    called
        (experience)                  an advantage                                  itself

    For programs that load a function by its name. In a script, call the maker that you mean.

    Raises:
      ValueError: for weights beside an advantage, which adds up its rewards itself.
    """
    parameters = inspect.signature(function).parameters
    advantage: Advantage = function
    if {"weights", "names"} <= parameters.keys():
        advantage = function(weights=weights, names=names)
        return advantage
    if list(parameters) == ["experience"]:
        if weights is not None:
            name = getattr(function, "__name__", repr(function))
            raise ValueError(f"weights = {weights} have no effect: {name} adds up the rewards of its experience itself")
        return advantage
    if "experience" in parameters:
        return from_experience(function, weights=weights, names=names)
    return from_rewards(function, weights=weights, names=names)
