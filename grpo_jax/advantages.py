"""Rewards to advantages: how much better a completion is than the others of its group."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from grpo_jax.losses import kl_k1
from grpo_jax.losses.contract import per_token
from grpo_jax.protocols import Advantage, Cost, Estimator, ExperienceEstimator, KLEstimate
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics

Weights = Sequence[float | Array]  # one per reward function


def group_advantages(rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4) -> Array:
    """Scores each completion against the other completions of its prompt.

        A[b, g] = (r[b, g] - mean(r[b])) / (std(r[b]) + eps)

    Follows the outcome-supervision advantage of GRPO (Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2). The paper leaves two choices open, so both
    are arguments: TRL and verl divide by the sample deviation (`ddof=1`).

    Args:
      rewards: `[B, G]` float, one per completion, in the task's own units.
      mask: `[B, G]` bool, False where no reward could be given; those get 0 and
        count in no mean or deviation.
      ddof: 0 for the population deviation, 1 for the sample deviation.
      eps: added to the deviation, in reward units.

    Returns:
      `[B, G]` advantages, unitless. A group of equal rewards gets exactly 0.

    Raises:
      AssertionError: if `rewards` is not a rank-2 float array.
      ValueError: if `G < 2`; one completion has nothing to be compared with.
    """
    rewards, mask = _checked(rewards, mask)
    centered = _centered(rewards, mask, axis=1)
    deviation = _root_mean_square(centered, mask, axis=1, ddof=ddof)
    return _where_variance(rewards, mask, centered / (deviation + eps))


def centered_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """The distance to the group's mean, without a deviation (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.2).

        A[b, g] = r[b, g] - mean(r[b])

    Arguments, result and errors as in `group_advantages`; in reward units.
    """
    rewards, mask = _checked(rewards, mask)
    return _where_variance(rewards, mask, _centered(rewards, mask, axis=1))


def batch_scaled_advantages(
    rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4
) -> Array:
    """Centered on the group, scaled by the batch (Lite PPO, Liu et al. 2025, arXiv:2508.08221, section 4.1).

        A[b, g] = (r[b, g] - mean(r[b])) / (std(r) + eps)

    `std(r)` is that of all rewards of the batch about the batch's mean, as in TRL's
    `scale_rewards="batch"` (which has `ddof=1`). Arguments, result and errors as in
    `group_advantages`.
    """
    rewards, mask = _checked(rewards, mask)
    deviation = _root_mean_square(_centered(rewards, mask, axis=None), mask, axis=None, ddof=ddof)
    return _where_variance(rewards, mask, _centered(rewards, mask, axis=1) / (deviation + eps))


def leave_one_out_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """The distance to the mean of the others (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, section 3.3).

        A[b, g] = r[b, g] - mean(r[b, h] for h != g) = (r[b, g] - mean(r[b])) G / (G - 1)

    Arguments, result and errors as in `group_advantages`; in reward units.
    """
    rewards, mask = _checked(rewards, mask)
    count = jnp.sum(mask, axis=1, keepdims=True)
    return _where_variance(rewards, mask, _centered(rewards, mask, axis=1) * (count / jnp.maximum(count - 1, 1)))


def batch_normalised_advantages(
    rewards: Array, mask: Array | None = None, *, ddof: int = 0, eps: float | Array = 1e-4
) -> Array:
    """Centered on the batch and scaled by it (REINFORCE++, Hu et al. 2025, arXiv:2501.03262, equation 5).

        A[b, g] = (r[b, g] - mean(r)) / (std(r) + eps)

    It knows no groups. REINFORCE++-baseline centers on the group first:
    `lambda r, mask: batch_normalised_advantages(centered_advantages(r, mask), mask)`.
    Arguments, result and errors as in `group_advantages`, but that `G` may be 1; a batch of
    equal rewards gets exactly 0.
    """
    rewards, mask = _checked(rewards, mask, at_least=1)
    centered = _centered(rewards, mask, axis=None)
    deviation = _root_mean_square(centered, mask, axis=None, ddof=ddof)
    varies = has_variance(rewards.reshape(1, -1), mask.reshape(1, -1))
    return jnp.where(mask & varies, centered / (deviation + eps), 0.0)


def max_rl_advantages(rewards: Array, mask: Array | None = None) -> Array:
    """Maximum likelihood by reinforcement: the advantage in units of the success rate (MaxRL, 2026, arXiv:2602.02710).

        A[b, g] = (r[b, g] - mean(r[b])) / mean(r[b]), and 0 where the mean is 0

    A prompt that one completion in `G` solves weighs `G` times as much as by `centered_advantages`. For rewards of 0
    and 1, or others that are not negative. Arguments, result and errors as in `group_advantages`.
    """
    rewards, mask = _checked(rewards, mask)
    centered, average = _centered(rewards, mask, axis=1), _mean(rewards, mask, axis=1)
    return _where_variance(rewards, mask, centered / jnp.where(average == 0, 1.0, average))


def best_minus_second_advantages(
    rewards: Array, mask: Array | None = None, *, scaled: bool = False, ddof: int = 1, eps: float | Array = 1e-6
) -> Array:
    """Only the best of a group earns, by how far it beats the second (Tang et al. 2025, arXiv:2503.19595).

        A[b, g] = r[b, g] - max(r[b, h] for h != g) where that is above 0, else 0

    The leave-one-out estimate of the gradient of `E[max of G]`, so of pass@G for rewards of 0 and 1. Where two are
    equally good nobody earns. verl's `grpo_passk` divides by the group's sample deviation plus 1e-6 unless told
    otherwise: `scaled=True`.

    Args:
      rewards: as in `group_advantages`.
      mask: as in `group_advantages`.
      scaled: True divides by the group's deviation plus `eps`.
      ddof: of the deviation.
      eps: added to the deviation.

    Returns:
      As `group_advantages`, in reward units unless scaled.
    """
    rewards, mask = _checked(rewards, mask)
    highest_two, _ = jax.lax.top_k(jnp.where(mask, rewards, -jnp.inf), 2)
    lead = jnp.where(rewards == highest_two[:, :1], highest_two[:, :1] - highest_two[:, 1:], 0.0)
    if scaled:
        lead = lead / (_root_mean_square(_centered(rewards, mask, axis=1), mask, axis=1, ddof=ddof) + eps)
    return _where_variance(rewards, mask, lead)


def pass_at_k(k: int) -> Estimator:
    """Makes the unbiased estimator of the gradient of pass@k (PKPO, Walder and Karkhanis 2025, arXiv:2505.15201).

        A[b, g] = k * r[b, g] * C(G - c, k - 1) / C(G - 1, k - 1),    c the completions of the group that are right

    Right completions share what the group lacked: of the `k - 1` others drawn with one, the share of draws in which
    none is right. It is the paper's form whose baseline leaves the completion out and draws `k - 1` others, times
    `G`, since the losses average over the group. Wrong completions get 0. With `k = G` only a sole right one earns, as
    by `best_minus_second_advantages`, times `G`; with `k = 1` it is the reward without a baseline.

    Args:
      k: from 1 to `G`.

    Returns:
      `(rewards [B, G] of 0 and 1, mask) -> [B, G]`; in units of pass@k. A completion counts as right above 0.5.
      Where the mask leaves fewer than `k`, the group gets 0. It gives no group of equal rewards 0 by itself: with
      `k = 1`, all right, each earns 1.

    Raises:
      ValueError: for a `k` below 1; when called, for a group of fewer than `k`.
    """
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}")

    def estimator(rewards: Array, mask: Array | None = None) -> Array:
        rewards, mask = _checked(rewards, mask)
        if rewards.shape[1] < k:
            raise ValueError(f"pass@{k} needs groups of at least {k} completions, got rewards of {rewards.shape}")
        right = mask & (rewards > 0.5)
        size = jnp.sum(mask, axis=1, keepdims=True)
        wrong = size - jnp.sum(right, axis=1, keepdims=True)
        drawn = jnp.arange(k - 1)  # C(wrong, k - 1) / C(size - 1, k - 1), factor by factor
        none = jnp.prod(jnp.maximum(wrong[..., None] - drawn, 0) / jnp.maximum(size[..., None] - 1 - drawn, 1), axis=-1)
        return jnp.where(right & (size >= k), k * none, 0.0)

    return estimator


# ----------------------------------------------------------------- of lengths and log-probs


def length_weighted_advantages(rewards: Array, mask: Array, experience: Experience) -> Array:
    """The distance to the mean of the group weighed by lengths (OPO, Hao et al. 2025, arXiv:2505.23585).

        A[b, g] = r[b, g] - sum_h n[b, h] r[b, h] / sum_h n[b, h]

    with `n` the tokens that count. The baseline of least variance where the square of a completion's score grows as
    its length. For `from_experience`.

    Args:
      rewards: `[B, G]` float.
      mask: `[B, G]` bool, False where no reward could be given.
      experience: of which the rollout's mask is read.

    Returns:
      `[B, G]`, in reward units. A group of equal rewards gets exactly 0.
    """
    rewards, mask = _checked(rewards, mask)
    lengths = jnp.where(mask, jnp.sum(experience.rollout.mask, axis=-1), 0)
    least = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1, keepdims=True)
    above = jnp.where(mask, rewards - least, 0.0)
    baseline = jnp.sum(lengths * above, axis=1, keepdims=True) / jnp.maximum(jnp.sum(lengths, 1, keepdims=True), 1)
    return _where_variance(rewards, mask, above - baseline)


def optimal_token_advantages(
    rewards: Array, mask: Array, experience: Experience, *, zero_tail: bool = True, eps: float | Array = 1e-8
) -> Array:
    """A baseline of least variance for each position of the group (OTB, 2026, arXiv:2602.07078).

        w[t]    = 1 - 2 p_old[t] + sum_v p_old[t, v]^2        the square of the score of the token's logits
        W[g, t] = sum of w[g, s] over the tokens s <= t of completion g that count
        b[t]    = sum_g W[g, t] r[g] / (sum_g W[g, t] + eps)  over completions that have a token that counts at t
        A[g, t] = r[g] - b[t]

    For `from_experience`; needs `make_train_step(..., score_old=True)`. verl's `optimal_token_baseline` for a reward at
    the end of the completion; verl gives the tail of a group of equal rewards the reward itself, here it gets 0.

    Args:
      rewards: `[B, G]` float.
      mask: `[B, G]` bool, False where no reward could be given.
      experience: of which `old_log_probs` and `old_collision` are read.
      zero_tail: True has a baseline of 0 behind the end of the second longest completion, as in verl, where the
        longest one's own reward would be its baseline; False leaves that, so that those tokens get about 0.
      eps: added to the sum of weights.

    Returns:
      `[B, G, T]`, in reward units.

    Raises:
      ValueError: without `old_collision`.
    """
    rewards, mask = _checked(rewards, mask)
    if experience.old_log_probs is None or experience.old_collision is None:
        raise ValueError("optimal_token_advantages needs what make_train_step(..., score_old=True) scores")
    counted = experience.rollout.mask & mask[..., None]
    square = 1 - 2 * jnp.exp(jnp.where(counted, experience.old_log_probs, 0.0)) + experience.old_collision
    weight = jnp.where(counted, jnp.cumsum(jnp.where(counted, square, 0.0), axis=-1), 0.0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    baseline = jnp.sum(weight * rewards[..., None], axis=1, keepdims=True) / (total + eps)
    if zero_tail:
        baseline = jnp.where(jnp.sum(counted, axis=1, keepdims=True) > 1, baseline, 0.0)
    varies = has_variance(rewards, mask)[:, None, None]
    return jnp.where(counted & varies, rewards[..., None] - baseline, 0.0)


# ---------------------------------------------------------- rewards of steps and tokens


def rewards_to_go(rewards: Array, mask: Array, *, gamma: float | Array = 1.0) -> Array:
    """The discounted sum of a token's reward and those after it (Sutton and Barto 2018, equation 3.8).

        A[t] = sum over s >= t of gamma^(s - t) * r[s]

    Args:
      rewards: `[B, G, T]` float, each at the token that is rewarded.
      mask: `[B, G, T]` bool, False where there is no reward.
      gamma: discount per token; 1 for none.

    Returns:
      `[B, G, T]`, in reward units.
    """
    chex.assert_rank([rewards, mask], 3)

    def earlier(later: Array, reward: Array) -> tuple[Array, Array]:
        total = reward + gamma * later
        return total, total

    by_token = jnp.moveaxis(jnp.where(mask, rewards, 0.0), -1, 0)
    _, to_go = jax.lax.scan(earlier, jnp.zeros_like(by_token[0]), by_token, reverse=True)
    return jnp.moveaxis(to_go, 0, -1)


def process_advantages(rewards: Array, mask: Array, *, ddof: int = 0, eps: float | Array = 1e-4) -> Array:
    """Process supervision: the normalised rewards of the steps that are still to end (DeepSeekMath, section 4.1.3).

        z[j] = (r[j] - mean(r of the group's steps)) / (std(r of the group's steps) + eps)
        A[t] = sum over steps j that end at t or later of z[j]

    (Shao et al. 2024, arXiv:2402.03300.)

    Args:
      rewards: `[B, G, T]` float, each at the token that ends its step.
      mask: `[B, G, T]` bool, True at the tokens that end a step.
      ddof: as in `group_advantages`.
      eps: as in `group_advantages`.

    Returns:
      `[B, G, T]`, unitless.
    """
    chex.assert_equal_shape([rewards, mask])
    group = (rewards.shape[0], -1)
    normalised = group_advantages(rewards.reshape(group), mask.reshape(group), ddof=ddof, eps=eps)
    return rewards_to_go(normalised.reshape(rewards.shape), mask)


# ------------------------------------------------------------------- of an experience


def from_steps(
    estimator: Callable[[Array, Array], Array] = process_advantages,
    *,
    weight: float | Array = 1.0,
    outcome: Advantage | None = None,
) -> Advantage:
    """An advantage of the rewards of steps, alone or beside that of the outcome.

        A[b, g, t] = weight * estimator(step rewards)[b, g, t] + outcome[b, g]

    Args:
      estimator: `(rewards [B, G, T], mask [B, G, T]) -> [B, G, T]`: `process_advantages`, or `rewards_to_go` for the
        sum that is still to come, without a baseline.
      weight: of the steps.
      outcome: of the whole completion, such as `from_rewards()`; None for the steps alone.

    Returns:
      The advantage, `[B, G, T]`, 0 on padding. It needs `experience.step_rewards` and `step_mask`, as `rewards.steps`
      makes them, and adds the metrics `step_reward`, the mean over steps, and `steps`, their number in a completion.

    Raises:
      ValueError: when called, for an experience without step rewards.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        rewards, mask, rollout = experience.step_rewards, experience.step_mask, experience.rollout
        if rewards is None or mask is None:
            raise ValueError("the experience has no step rewards: put step_rewards and step_mask [B, G, T] into it")
        held = jnp.arange(rewards.shape[-1]) < rollout.lengths[..., None]
        advantages = weight * jnp.where(held, estimator(rewards, mask), 0.0)
        metrics: Metrics = {
            "step_reward": Mean(jnp.sum(jnp.where(mask, rewards, 0.0)), jnp.sum(mask)),
            "steps": Mean(jnp.sum(mask), jnp.sum(rollout.lengths > 0)),
        }
        if outcome is not None:
            of_outcome, more = outcome(experience)
            of_outcome = of_outcome if of_outcome.ndim == 3 else of_outcome[..., None]
            advantages, metrics = jnp.where(held, advantages + of_outcome, 0.0), metrics | more
        return advantages, metrics

    return advantage


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
            total, metrics = total - subtracted, _moments("cost", subtracted, scored)
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


def reinforce_plus_plus(
    beta: float | Array = 0.0,
    *,
    gamma: float | Array = 1.0,
    estimate: KLEstimate = kl_k1,
    ddof: int = 0,
    eps: float | Array = 1e-8,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
) -> Advantage:
    """The reward less the divergence still to come, normalised over all tokens (REINFORCE++, arXiv:2501.03262).

        R[t] = r at the last token that counts, else 0, - beta * estimate(log p[t], log ref[t])
        G[t] = sum over s >= t of gamma^(s - t) R[s], over tokens that count
        A[t] = (G[t] - mean(G)) / (std(G) + eps)            over the tokens that count of the batch

    (Hu et al. 2025.) It knows no groups. `p` is the policy that sampled, as in `kl_cost`. Tokens that the policy did
    not write take no step of the discount, as in verl, which normalises with the sample's variance (`ddof=1`).

    Args:
      beta: weight of the divergence, at least 0; above 0 it needs a reference.
      gamma: discount per token.
      estimate: of the divergence; `kl_k1` in the paper.
      ddof: of the deviation.
      eps: added to the deviation.
      weights: as in `from_rewards`.
      names: as in `from_rewards`.

    Returns:
      As `from_rewards`, with advantages `[B, G, T]`. A batch of equal returns gets exactly 0.

    Raises:
      ValueError: for a `beta` below 0; when called, above 0 without `ref_log_probs`.
    """
    if isinstance(beta, int | float) and not beta >= 0:
        raise ValueError(f"beta is at least 0, got {beta}")

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        metrics = reward_metrics(experience, total, scored, names)
        counted = experience.rollout.mask & scored[..., None]
        T = counted.shape[-1]
        last = jnp.max(jnp.where(counted, jnp.arange(T), -1), axis=-1, keepdims=True)
        per_step = jnp.where(jnp.arange(T) == last, total[..., None], 0.0)
        if not (isinstance(beta, int | float) and beta == 0):
            kl = _token_kl(experience, estimate)
            per_step = per_step - beta * kl
            metrics = metrics | _moments("cost", beta * jnp.sum(jnp.where(counted, kl, 0.0), axis=-1), scored)
        returns = _over_counted(per_step, counted, gamma)
        row = (1, -1)  # the tokens of the batch are one group
        centered = _centered(returns.reshape(row), counted.reshape(row), axis=None)
        deviation = _root_mean_square(centered, counted.reshape(row), axis=None, ddof=ddof)
        varies = has_variance(returns.reshape(row), counted.reshape(row))
        normalised = jnp.where(varies, centered / (deviation + eps), 0.0).reshape(counted.shape)
        return jnp.where(counted, normalised, 0.0), metrics

    return advantage


def _over_counted(rewards: Array, counted: Array, gamma: float | Array) -> Array:
    """`rewards_to_go` that passes tokens that do not count without a step of the discount."""

    def earlier(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, counts = step
        total = jnp.where(counts, reward + gamma * later, later)
        return total, total

    steps = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, counted))
    _, to_go = jax.lax.scan(earlier, jnp.zeros_like(rewards[..., 0]), steps, reverse=True)
    return jnp.moveaxis(to_go, 0, -1)


def from_normalised_rewards(
    *,
    weights: Weights | None = None,
    names: Sequence[str] | None = None,
    ddof: int = 0,
    eps: float | Array = 1e-4,
) -> Advantage:
    """Each reward is normalised in its group before they are added (GDPO, 2026, arXiv:2601.05242).

        z[b, g] = sum over k of weights[k] * group_advantages(rewards[..., k])[b, g]
        A[b, g] = (z[b, g] - mean(z)) / (std(z) + eps)

    with mean and deviation over the batch. Rewards of different scales, whose sum would
    be decided by the widest, keep a say. TRL's `normalize_then_sum`, which has `ddof=1`.

    Args:
      weights: as in `from_rewards`.
      names: as in `from_rewards`.
      ddof: as in `group_advantages`, for groups and batch.
      eps: as in `group_advantages`, for groups and batch.

    Returns:
      As `from_rewards`. A group in which every reward is equal gets exactly 0.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        total, scored = total_reward(experience, weights)
        rewards, reward_mask = _rewards_of(experience)
        R = rewards.shape[-1]
        normalised = [group_advantages(rewards[..., k], reward_mask[..., k], ddof=ddof, eps=eps) for k in range(R)]
        summed = jnp.sum(jnp.stack(normalised, axis=-1) * _as_array(weights, R), axis=-1)
        advantages = batch_normalised_advantages(summed, scored, ddof=ddof, eps=eps)
        return _where_variance(summed, scored, advantages), reward_metrics(experience, total, scored, names)

    return advantage


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
      beta: weight.
      gamma: 0 weighs all tokens alike.

    Returns:
      `experience -> (advantages [B, G, T], metrics)`; it needs a teacher in `state.ref_params`. The metric
      `reverse_kl` is the mean of `log p_old - log q`.

    Raises:
      ValueError: when called, without `ref_log_probs`.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        mask = experience.rollout.mask
        kl = jnp.where(mask, _token_kl(experience, kl_k1), 0.0)
        size = jnp.abs(kl)
        before = (jnp.cumsum(size, axis=-1) - size) / jnp.maximum(jnp.sum(size, axis=-1, keepdims=True), 1e-8)
        return -beta * kl * (1 + gamma * (1 - before)), {"reverse_kl": Mean(jnp.sum(kl), jnp.sum(mask))}

    return advantage


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
    if isinstance(beta, int | float) and not beta >= 0:
        raise ValueError(f"beta is at least 0, got {beta}")

    def cost(experience: Experience) -> Array:
        return beta * jnp.sum(_token_kl(experience, estimate), axis=-1)

    return cost


def _token_kl(experience: Experience, estimate: KLEstimate) -> Array:
    """From the policy that sampled to the reference, `[B, G, T]`; 0 where a token does not count."""
    rollout, ref = experience.rollout, experience.ref_log_probs
    if ref is None:
        raise ValueError("a KL cost needs a reference policy: init_state(..., reference=True)")
    log_probs = rollout.log_probs if experience.old_log_probs is None else experience.old_log_probs
    return estimate(jnp.where(rollout.mask, log_probs, 0.0), jnp.where(rollout.mask, ref, 0.0))


def total_reward(experience: Experience, weights: Weights | None = None) -> tuple[Array, Array]:
    """The weighted sum of an experience's rewards `[B, G]`, and where there is any `[B, G]`."""
    rewards, reward_mask = _rewards_of(experience)
    # A matrix product may round equal rows apart, and in bfloat16 on a TPU.
    total = jnp.sum(jnp.where(reward_mask, rewards, 0.0) * _as_array(weights, rewards.shape[-1]), axis=-1)
    return total, jnp.any(reward_mask, axis=-1)


def reward_metrics(experience: Experience, total: Array, scored: Array, names: Sequence[str] | None = None) -> Metrics:
    """The metrics that every advantage logs.

        reward, reward_std                   the total of a completion, after the cost, over completions with a reward
        zero_variance_groups                 share of groups with a reward whose totals are all equal: advantages of 0
        reward/<name>, reward/<name>_std     one reward function, unweighted, over completions that it scored

    Deviations are over the whole batch with `ddof=0`; TRL's `reward_std` has `ddof=1`.

    Args:
      experience: with rewards.
      total: `[B, G]`, as of `total_reward`.
      scored: `[B, G]` bool, as of `total_reward`.
      names: one per reward function; their index if None.

    Raises:
      ValueError: for a wrong number of names, or one that occurs twice.
    """
    rewards, reward_mask = _rewards_of(experience)
    R = rewards.shape[-1]
    if names is not None and len(names) != R:
        raise ValueError(f"{len(names)} names for {R} reward functions: {names}")
    if names is not None and len(set(names)) != len(names):
        raise ValueError(f"each reward function needs a name of its own, got {names}; set their __name__")
    has_reward = jnp.any(scored, axis=1)
    metrics = _moments("reward", total, scored) | {
        "zero_variance_groups": Mean(jnp.sum(~has_variance(total, scored) & has_reward), jnp.sum(has_reward))
    }
    for k, name in enumerate(names or range(R)):
        metrics |= _moments(f"reward/{name}", rewards[..., k], reward_mask[..., k])
    return metrics


def has_variance(rewards: Array, mask: Array) -> Array:
    """`[B]`, whether the rewards `[B, G]` of a group differ.

    By comparison: the mean of eight 1.1s is not 1.1, and that rounding would be divided by
    `eps`. A NaN does not pass for equal rewards: its update is refused.
    """
    highest = jnp.max(jnp.where(mask, rewards, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1)
    return ~(highest <= lowest)


def _rewards_of(experience: Experience) -> tuple[Array, Array]:
    rewards, reward_mask = experience.rewards, experience.reward_mask
    if rewards is None or reward_mask is None:
        raise ValueError("the experience has no rewards: put rewards and reward_mask [B, G, R] into it")
    chex.assert_rank([rewards, reward_mask], 3)
    return rewards, reward_mask


def _as_array(weights: Weights | None, R: int) -> Array:
    if weights is not None and len(weights) != R:
        raise ValueError(f"{len(weights)} weights for {R} reward functions: {weights}")
    return jnp.asarray([1.0] * R if weights is None else weights, jnp.float32)


def _checked(rewards: Array, mask: Array | None, *, at_least: int = 2) -> tuple[Array, Array]:
    chex.assert_rank(rewards, 2)
    chex.assert_type(rewards, float)
    if rewards.shape[1] < at_least:
        raise ValueError(f"a group needs at least {at_least} completions, got rewards of shape {rewards.shape}")
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    return jnp.where(mask, rewards, 0.0), mask


def _mean(x: Array, mask: Array, *, axis: int | None, ddof: int = 0) -> Array:
    count = jnp.sum(mask, axis=axis, keepdims=True) - ddof
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _centered(x: Array, mask: Array, *, axis: int | None) -> Array:
    """`x - mean(x)`. The least is subtracted first: the sum of 1.6e7 + {0, 1, 2, 3} is not exact in float32."""
    scale = _power_of_two(x, mask, axis=axis)
    from_least = x / scale - jnp.min(jnp.where(mask, x, jnp.inf), axis=axis, keepdims=True) / scale
    from_least = jnp.where(mask, from_least, 0.0)
    return scale * jnp.where(mask, from_least - _mean(from_least, mask, axis=axis), 0.0)


def _root_mean_square(x: Array, mask: Array, *, axis: int | None, ddof: int = 0) -> Array:
    """`sqrt(mean(x^2))`, the deviation of what is centered, without the overflow of a square."""
    scale = _power_of_two(x, mask, axis=axis)
    return scale * jnp.sqrt(_mean((x / scale) ** 2, mask, axis=axis, ddof=ddof))


def _power_of_two(x: Array, mask: Array, *, axis: int | None) -> Array:
    """A power of two near the largest absolute value, by which division is exact."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=axis, keepdims=True, where=mask, initial=0.0))
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent - 1, -100, 100))


def _where_variance(rewards: Array, mask: Array, advantages: Array) -> Array:
    return jnp.where(mask & has_variance(rewards, mask)[:, None], advantages, 0.0)


def _moments(name: str, x: Array, mask: Array) -> Metrics:
    count = jnp.sum(mask)
    deviation = _root_mean_square(_centered(x, mask, axis=None), mask, axis=None)[0, 0]
    return {name: Mean(jnp.sum(jnp.where(mask, x, 0.0)), count), f"{name}_std": deviation}
