"""Weights: corrections for tokens that another program, or an older policy, has drawn.

A weight is `(scores, experience) -> (weight [B, G, T], metrics)`. It multiplies the objective
and is not differentiated; penalties are exempt, and denominators count a token whatever
its weight, as in TRL. (`transforms.drop_weightless` takes tokens of weight 0 out of the
denominators, too.)

The sampler and the trainer disagree when they run in different precisions or engines, or
when top-k or top-p cut the sampler's distribution: `rollout.log_probs` are the sampler's,
`old_log_probs` the trainer's for the same params. The correction is

    w = pi_old(token) / pi_sampler(token)

truncated or masked, per token or (`ratio=product_ratio`, or `sequence_ratio`) per
completion.
"""

import jax
import jax.numpy as jnp

from grpo_jax.losses.contract import check_not_negative, check_positive, difference, per_token
from grpo_jax.losses.ratios import token_ratio
from grpo_jax.protocols import PerToken, Ratio, Weight
from grpo_jax.types import Array, Experience, Number, Scores


def truncated_importance(limit: Number = 2.0, *, low: Number = 0.0, ratio: Ratio = token_ratio) -> Weight:
    """`clip(w, low, limit)`: truncated importance sampling (TIS, Yao et al. 2025; Ionides 2008; Espeholt et al. 2018).

    Args:
      limit: 2 in the first report for language models (fengyao.notion.site/off-policy-rl);
        TRL's default is 3, per completion.
      low: 0 for no lower bound.
      ratio: the level.

    Returns:
      A weight with the metrics `correction` (its mean) and `correction_bounded` (the
      share of tokens that a bound binds).

    Raises:
      ValueError: for bounds that are empty or below 0.
    """
    _check_band(low, limit, "limit")

    def weight(scores: Scores, experience: Experience) -> PerToken:
        del scores
        log_ratio = _log_importance(experience, ratio)
        bounded = jnp.maximum(jnp.exp(jnp.minimum(log_ratio, jnp.log(limit))), low)
        outside = (log_ratio > jnp.log(limit)) | (log_ratio < jnp.log(low))
        return bounded, {"correction": bounded, "correction_bounded": outside}

    return weight


def masked_importance(low: Number = 0.5, high: Number = 5.0, *, ratio: Ratio = token_ratio) -> Weight:
    """`w` where `low <= w <= high`, else 0: masked importance sampling (MIS; per token IcePop, arXiv:2510.18855).

    A token, or a completion, that the two programs disagree on most is left out of the
    policy's gradient. Where the objective's own ratio is of the completion (GSPO, GMPO,
    VESPO), leave out completions, by a `ratio` of the same level: a token left out alone
    still counts in the ratio of the others.

    Args:
      low: 0 for no lower bound.
      high: IcePop's band is 0.5 to 5; MIS has an upper bound of 2 or 3.
      ratio: the level.

    Returns:
      A weight with the metrics `correction` (its mean) and
      `correction_bounded` (the share of tokens left out).

    Raises:
      ValueError: for a band that is empty or below 0.
    """
    _check_band(low, high, "high")

    def weight(scores: Scores, experience: Experience) -> PerToken:
        del scores
        log_ratio = _log_importance(experience, ratio)
        kept = (log_ratio >= jnp.log(low)) & (log_ratio <= jnp.log(high))
        bounded = jnp.where(kept, jnp.exp(jnp.where(kept, log_ratio, 0.0)), 0.0)
        return bounded, {"correction": bounded, "correction_bounded": ~kept}

    return weight


def off_policy_mask(threshold: Number = 0.5) -> Weight:
    """Leaves out completions of negative advantage far off-policy (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).

        w[b, g] = 0 where A < 0 and mean_t(log pi_sampler - log pi) > threshold, else 1

    The mean is signed (k1) and over the tokens that count. With one advantage per token,
    the sign is that of each token's.

    Args:
      threshold: nats per token.

    Returns:
      A weight with the metric `off_policy`, the share of tokens left out.
    """

    def weight(scores: Scores, experience: Experience) -> PerToken:
        mask = experience.rollout.mask
        if experience.advantages is None:
            raise ValueError("off_policy_mask needs advantages; make_learn(..., advantage=) adds them")
        gap = difference(experience.rollout.log_probs, jax.lax.stop_gradient(scores.log_probs), mask)
        distance = jnp.sum(gap, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
        left_out = (per_token(experience.advantages) < 0) & (distance > threshold) & mask
        return (~left_out).astype(gap.dtype), {"off_policy": left_out}

    return weight


def product(*weights: Weight) -> Weight:
    """All of these weights, multiplied; of metrics of the same name the last one's is reported."""
    if not weights:
        raise ValueError("a product has at least one weight")

    def weight(scores: Scores, experience: Experience) -> PerToken:
        values, metrics = zip(*(w(scores, experience) for w in weights), strict=True)
        return jnp.prod(jnp.stack(values), axis=0), {name: x for of_one in metrics for name, x in of_one.items()}

    return weight


def _check_band(low: Number, high: Number, name: str) -> None:
    check_positive(**{name: high})
    check_not_negative(low=low)
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(f"low is below {name} = {high}, got {low}")


def _log_importance(experience: Experience, ratio: Ratio) -> Array:
    mask = experience.rollout.mask
    if experience.old_log_probs is None:
        raise ValueError(
            "an importance weight needs old_log_probs: make_train_step(score_old=True), grpo.py --score-old"
        )
    return ratio(difference(experience.old_log_probs, experience.rollout.log_probs, mask), mask)
