"""Objectives, composed of a ratio, a surrogate, a penalty and an aggregate.

A loss is `f(scores, experience) -> (terms, metrics)`. A term is a `Mean`: the sum
and what it is to be divided by, kept apart so that parts of a batch add up to
exactly the whole batch's loss and gradient. The loss is the sum over terms of
`sum / count`. The parts see arrays only:

    ratio      (log_ratio [B,G,T], mask [B,G,T]) -> log_ratio
    surrogate  (log_ratio, advantages, log_probs) -> (gain [B,G,T], metrics)    what to maximise
    penalty    (scores, experience) -> (cost [B,G,T], metrics)                  what to minimise
    aggregate  (per_token [B,G,T], mask) -> Mean                                how tokens count

The metrics of a surrogate or penalty are per-token arrays, reported as means over
the tokens that count.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Experience, Max, Mean, Metrics, Scores

Terms = tuple[Mean, ...]
Loss = Callable[[Scores, Experience], tuple[Terms, Metrics]]
PerToken = tuple[Array, dict[str, Array]]
Ratio = Callable[[Array, Array], Array]
Surrogate = Callable[[Array, Array, Array], PerToken]
Penalty = Callable[[Scores, Experience], PerToken]
Aggregate = Callable[[Array, Array], Mean]
Number = float | Array


# ---------------------------------------------------------------------------- ratios


def token_ratio(log_ratio: Array, mask: Array) -> Array:
    """Each token has its own ratio: PPO's, and GRPO's (Shao et al. 2024, arXiv:2402.03300, equation 3)."""
    del mask
    return log_ratio


def sequence_ratio(log_ratio: Array, mask: Array) -> Array:
    """Every token has the geometric mean of its completion's ratios (GSPO, Zheng et al. 2025, arXiv:2507.18071).

        log s[b, g] = sum_t mask * log_ratio / sum_t mask          (equation 7)

    The gradient flows through the mean.
    """
    mean = _masked_sum(log_ratio, mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.where(mask, mean[..., None], 0.0)


# ------------------------------------------------------------------------ surrogates


def ppo_clip(epsilon: Number, epsilon_high: Number | None = None) -> Surrogate:
    """The clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, equation 7).

        gain = min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)

    It is the lower bound of the two for either sign of `A`: above `1 + epsilon_high`
    a good token and below `1 - epsilon` a bad one get no gradient. Computed in log
    space, as `A * exp(min(log_ratio, log(1 + epsilon_high)))` for a good token and
    with the maximum for a bad one: a clipped ratio is then never exponentiated, so
    that it cannot turn a gradient of 0 into `0 * inf`.

    Args:
      epsilon: lower distance from 1; from 1 upwards there is no lower bound.
      epsilon_high: upper distance; `epsilon` if None, larger in DAPO's clip-higher.

    Returns:
      A surrogate with the metrics `clip_low` and `clip_high`: the shares of tokens
      clipped there, over all tokens that count.

    Raises:
      ValueError: for an epsilon that is not above 0.
    """
    _check_positive(epsilon=epsilon, epsilon_high=epsilon_high)

    def surrogate(log_ratio: Array, advantages: Array, log_probs: Array) -> PerToken:
        del log_probs
        low = jnp.log(jnp.maximum(1.0 - jnp.asarray(epsilon), 0.0))
        high = jnp.log1p(epsilon if epsilon_high is None else epsilon_high)
        # An advantage of 0 takes the minimum, too: inf * 0 is NaN.
        bounded = jnp.where(advantages < 0, jnp.maximum(log_ratio, low), jnp.minimum(log_ratio, high))
        clipped = {
            "clip_low": (advantages < 0) & (log_ratio < low),
            "clip_high": (advantages > 0) & (log_ratio > high),
        }
        return jnp.exp(bounded) * advantages, clipped

    return surrogate


# ------------------------------------------------------------------------- penalties


def kl_k1(log_probs: Array, ref_log_probs: Array) -> Array:
    """`log p - log ref`: unbiased as a value, but its gradient under samples of `p` is 0 on average."""
    return log_probs - ref_log_probs


def kl_k2(log_probs: Array, ref_log_probs: Array) -> Array:
    """`(log p - log ref)^2 / 2`: biased as a value; on-policy its gradient is that of KL(p, ref)."""
    return (log_probs - ref_log_probs) ** 2 / 2


def kl_k3(log_probs: Array, ref_log_probs: Array) -> Array:
    """`ref / p - 1 - log(ref / p)`: unbiased as a value, never negative; on-policy its gradient is that of KL(ref, p).

    By `expm1`: written out, rounding makes it negative near 0.
    """
    log_ratio = ref_log_probs - log_probs
    return jnp.expm1(log_ratio) - log_ratio


def k1(beta: Number) -> Penalty:
    """`beta` times `kl_k1` (Schulman 2020, joschu.net/blog/kl-approx.html)."""
    return _kl(kl_k1, beta)


def k2(beta: Number) -> Penalty:
    """`beta` times `kl_k2` (Schulman 2020)."""
    return _kl(kl_k2, beta)


def k3(beta: Number) -> Penalty:
    """`beta` times `kl_k3`, the penalty of GRPO (Shao et al. 2024, arXiv:2402.03300, equation 4).

    Plain, as in the paper and in TRL with `use_bias_correction_kl=False`; TRL's own
    default multiplies it by the ratio.
    """
    return _kl(kl_k3, beta)


def _kl(estimate: Callable[[Array, Array], Array], beta: Number) -> Penalty:
    if isinstance(beta, int | float) and not beta >= 0:
        raise ValueError(f"beta is at least 0, got {beta}")

    def penalty(scores: Scores, experience: Experience) -> PerToken:
        if experience.ref_log_probs is None:
            raise ValueError(
                "a KL penalty needs the log-probs of a reference policy: make the state with "
                "init_state(..., reference=True), or put ref_log_probs into the experience"
            )
        # Padding may hold anything: out before the exponential, or inf * 0 becomes NaN.
        mask = experience.rollout.mask
        kl = estimate(jnp.where(mask, scores.log_probs, 0.0), jnp.where(mask, experience.ref_log_probs, 0.0))
        return beta * kl, {"kl": kl}

    return penalty


# ------------------------------------------------------------------------ aggregates


def completion_mean(per_token: Array, mask: Array) -> Mean:
    """The mean over completions of each one's mean over tokens (Shao et al. 2024, arXiv:2402.03300, equation 3).

    A token of a long completion weighs less than one of a short completion. A
    completion without a token that counts is left out; TRL counts it in the
    denominator.
    """
    tokens = jnp.sum(mask, axis=-1)
    means = _masked_sum(per_token, mask, axis=-1) / jnp.maximum(tokens, 1)
    return Mean(jnp.sum(means), jnp.sum(tokens > 0))


def token_mean(per_token: Array, mask: Array) -> Mean:
    """The mean over all tokens, each alike (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.3)."""
    return Mean(_masked_sum(per_token, mask), jnp.sum(mask))


def prompt_mean(per_token: Array, mask: Array) -> Mean:
    """The mean over prompts of the mean over the tokens of the prompt's group.

    Every prompt weighs alike however long its completions are. A prompt without a
    token that counts is left out.
    """
    tokens = jnp.sum(mask, axis=(1, 2))
    means = _masked_sum(per_token, mask, axis=(1, 2)) / jnp.maximum(tokens, 1)
    return Mean(jnp.sum(means), jnp.sum(tokens > 0))


def constant_length(max_tokens: int) -> Aggregate:
    """The sum over tokens over `max_tokens` times completions (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    The divisor knows no length, so that no completion gains by being long or short
    (section 3.2).

    Args:
      max_tokens: the limit that completions were sampled under, not the batch's width.

    Returns:
      An aggregate. A completion without a token that counts is left out of the count
      of completions; TRL counts it.
    """
    _check_positive(max_tokens=max_tokens)

    def aggregate(per_token: Array, mask: Array) -> Mean:
        return Mean(_masked_sum(per_token, mask), max_tokens * jnp.sum(jnp.any(mask, axis=-1)))

    return aggregate


# ------------------------------------------------------------------------ objectives


def policy_loss(
    surrogate: Surrogate, aggregate: Aggregate, *, ratio: Ratio = token_ratio, penalty: Penalty | None = None
) -> Loss:
    """Composes an objective.

        loss = aggregate(-surrogate(ratio(log_probs - old_log_probs), A)) + aggregate(penalty)

    Args:
      surrogate: what to maximise, of the log-ratio and the advantages.
      aggregate: how tokens count, in both terms.
      ratio: the level of the ratio.
      penalty: None for no second term.

    Returns:
      A loss with the metrics `policy_loss`, `ratio_max`, `entropy` if it was scored,
      and those of the surrogate and the penalty.
    """

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        mask = experience.rollout.mask
        if experience.advantages is None or experience.old_log_probs is None:
            raise ValueError("a policy loss needs advantages and old_log_probs; make_learn(..., advantage=) adds them")
        # Padding may hold anything: out before the exponential, or inf * 0 becomes NaN.
        log_ratio = ratio(jnp.where(mask, scores.log_probs - experience.old_log_probs, 0.0), mask)
        gain, per_token = surrogate(log_ratio, _per_token(experience.advantages), scores.log_probs)
        terms: Terms = (aggregate(-gain, mask),)
        metrics: Metrics = {
            "policy_loss": terms[0],
            "ratio_max": Max(jnp.exp(jnp.max(log_ratio, where=mask, initial=-jnp.inf))),
        }
        if penalty is not None:
            cost, of_penalty = penalty(scores, experience)
            terms += (aggregate(cost, mask),)
            per_token = per_token | of_penalty
        if scores.entropy is not None:
            per_token = per_token | {"entropy": scores.entropy}
        return terms, metrics | {name: token_mean(value, mask) for name, value in per_token.items()}

    return loss


def grpo(*, epsilon: Number = 0.2, epsilon_high: Number | None = None, penalty: Penalty | None = None) -> Loss:
    """GRPO (Shao et al. 2024, arXiv:2402.03300, equation 3): clipped token ratios, mean over completions.

    The paper's own penalty is `k3(0.04)`; pass it, and a state with a reference.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high), completion_mean, penalty=penalty)


def dr_grpo(
    max_tokens: int, *, epsilon: Number = 0.2, epsilon_high: Number | None = None, penalty: Penalty | None = None
) -> Loss:
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): constant length; goes with `centered_advantages`."""
    return policy_loss(ppo_clip(epsilon, epsilon_high), constant_length(max_tokens), penalty=penalty)


def dapo(*, epsilon: Number = 0.2, epsilon_high: Number = 0.28, penalty: Penalty | None = None) -> Loss:
    """The loss of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 8): clip-higher and the mean over tokens.

    The mean is over the tokens of the update, as in the paper; TRL divides by the
    average over the updates of a rollout.
    """
    return policy_loss(ppo_clip(epsilon, epsilon_high), token_mean, penalty=penalty)


def gspo(*, epsilon: Number = 3e-4, epsilon_high: Number = 4e-4, penalty: Penalty | None = None) -> Loss:
    """GSPO (Zheng et al. 2025, arXiv:2507.18071, equation 5): the clipped ratio of the whole completion."""
    return policy_loss(ppo_clip(epsilon, epsilon_high), completion_mean, ratio=sequence_ratio, penalty=penalty)


def sft() -> Loss:
    """Supervised learning of the completions: the mean over tokens of the negative log-likelihood, in nats."""

    def loss(scores: Scores, experience: Experience) -> tuple[Terms, Metrics]:
        return (token_mean(-scores.log_probs, experience.rollout.mask),), {}

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


def _per_token(advantages: Array) -> Array:
    return advantages[..., None] if advantages.ndim == 2 else advantages


def _masked_sum(x: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    # where, not x * mask: NaN * 0 is NaN.
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis)


def _check_positive(**settings: Number | None) -> None:
    """Refuses Python numbers that are not above 0; traced ones cannot be looked at and pass."""
    for name, setting in settings.items():
        if isinstance(setting, int | float) and not setting > 0:
            raise ValueError(f"{name} is above 0, got {setting}")
