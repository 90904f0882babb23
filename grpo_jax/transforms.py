"""What is done to an experience once, before it is split into updates: filters of tokens, and what needs them all.

A transform is `experience -> (experience, metrics)`; `make_learn(..., transforms=(mask_truncated,))`
runs them in their order, after the reference policy's scores and the advantages are in.
A quantile or a mean over the rollout belongs here, since a loss sees parts of it.

A mask leaves a token out of numerators and denominators alike, the penalty's included. A
weight scales the surrogate objective and nothing else.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grpo_jax.advantages import has_variance, total_reward
from grpo_jax.advantages.spread import from_mean, root_mean_square
from grpo_jax.losses import token_mean
from grpo_jax.losses.contract import check_positive, difference, masked_sum, per_token
from grpo_jax.protocols import ExperienceTransform
from grpo_jax.statistics import Mean
from grpo_jax.types import Array, Experience, Metrics, Number


def mask_truncated(experience: Experience) -> tuple[Experience, Metrics]:
    """Leaves completions without an end out of the loss (overlong filtering, DAPO, arXiv:2503.14476, section 3.4).

    Their rewards still count in their group's baseline, as in TRL's
    `mask_truncated_completions`.
    """
    rollout = experience.rollout
    return _with_mask(experience, rollout.mask & ~rollout.truncated[..., None]), {}


def mask_zero_variance_groups(experience: Experience) -> tuple[Experience, Metrics]:
    """Leaves groups whose advantages are all 0, since their rewards are equal, out of the loss and its denominators.

    As in Skywork-OR1 (arXiv:2505.22312) and ScaleRL (arXiv:2510.13786, section 3.2). The
    batch shrinks; `dynamic_sampling` fills it up instead.
    """
    if experience.advantages is None:
        raise ValueError(
            "mask_zero_variance_groups needs advantages: make_learn(..., advantage=) adds them before the transforms"
        )
    mask = experience.rollout.mask
    spread = jnp.any((per_token(experience.advantages) != 0) & mask, axis=(1, 2), keepdims=True)
    return _with_mask(experience, mask & spread), {}


def top_entropy(share: float | Array) -> ExperienceTransform:
    """Trains only on the `share` of tokens of highest entropy (Wang et al. 2025, arXiv:2506.01939, equation 5).

        weight = 1 where H >= quantile(H, 1 - share), else 0

    Entropy is that of the policy that sampled, over all tokens of the rollout that count;
    the quantile interpolates linearly. Denominators count every token, as in the paper
    and TRL, and penalties are exempt, as in TRL (`top_entropy_quantile`, which takes the
    quantile of each micro-batch). `drop_weightless` after it changes both.

    Args:
      share: above 0 and at most 1; 0.2 in the paper.

    Returns:
      A transform, which needs `make_train_step(..., score_old=True)`.

    Raises:
      ValueError: for a share out of range.
    """
    _check_share(share)

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        mask, entropy = experience.rollout.mask, experience.old_entropy
        if entropy is None:
            raise ValueError("top_entropy needs old_entropy: make_train_step(score_old=True), grpo.py --score-old")
        threshold = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1 - share)
        weights = (entropy >= threshold).astype(entropy.dtype)
        if experience.weights is not None:
            weights = weights * experience.weights
        return experience._replace(weights=weights), {"entropy_threshold": jnp.nan_to_num(threshold)}

    return transform


def drop_weightless(experience: Experience) -> tuple[Experience, Metrics]:
    """Takes tokens of weight 0 out of the mask, and so out of denominators and penalties."""
    if experience.weights is None:
        raise ValueError("drop_weightless comes after a transform that makes weights, such as top_entropy")
    return _with_mask(experience, experience.rollout.mask & (experience.weights != 0)), {}


def clip_cov(share: Number = 2e-4, *, low: Number = 1.0, high: Number = 5.0) -> ExperienceTransform:
    """Takes a few tokens of high covariance out of the objective (Clip-Cov, Cui et al. 2025, arXiv:2505.22617).

        covariance[t] = (log p_old[t] - mean(log p_old)) * (A[t] - mean(A))
        weight[t]     = 0 for `share` of all tokens, drawn from those with low < covariance < high; else 1

    The entropy falls by the covariance (the paper's theorem 1), and few tokens have most of it. Means are over the
    rollout's tokens that count. The covariance is that of the policy that sampled, computed once; verl takes that of
    the policy that learns, over a micro-batch, which is the same in the first update of an unsplit rollout, and leaves
    out tokens that the clip has taken already. At least one token is drawn where there is one in the band. The draw
    is a function of the rollout, so that a resumed run repeats it.

    Args:
      share: of all tokens, above 0 and at most 1; 2e-4 in the paper.
      low: the least covariance; 1 in verl.
      high: the greatest; 5 in verl.

    Returns:
      A transform with the metric `clip_cov`, the share of tokens taken; needs `make_train_step(..., score_old=True)`.

    Raises:
      ValueError: for a share out of range, or a band that is empty.
    """
    _check_share(share)
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ValueError(f"low is below high = {high}, got {low}")

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        mask = experience.rollout.mask
        covariance, old = _covariance("clip_cov", experience)
        within = mask & (covariance > low) & (covariance < high)
        key = jax.random.key(
            jnp.sum(jax.lax.bitcast_convert_type(jnp.where(mask, old, 0.0).astype(jnp.float32), jnp.uint32))
        )
        order = jnp.where(within, jax.random.uniform(key, mask.shape), -1.0)
        taken = within & _largest(order, _count(share, mask))
        weights = jnp.where(taken, 0.0, 1.0 if experience.weights is None else experience.weights)
        return experience._replace(weights=weights), {"clip_cov": Mean(jnp.sum(taken), jnp.sum(mask))}

    return transform


def high_covariance(share: Number = 2e-3) -> ExperienceTransform:
    """Marks the tokens of largest covariance for `losses.kl_cov` (Cui et al. 2025, arXiv:2505.22617).

    The covariance is that of `clip_cov`, whatever its size. At least one token is marked.

    Args:
      share: of all tokens, above 0 and at most 1. The paper has 2e-3 for 7B and 2e-4 for 32B, verl 2e-4.

    Returns:
      A transform, which needs `make_train_step(..., score_old=True)`.

    Raises:
      ValueError: for a share out of range.
    """
    _check_share(share)

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        mask = experience.rollout.mask
        covariance, _ = _covariance("high_covariance", experience)
        marked = mask & _largest(jnp.where(mask, covariance, -jnp.inf), _count(share, mask))
        return experience._replace(high_covariance=marked), {}

    return transform


def second_moment(threshold: Number = 0.04) -> ExperienceTransform:
    """Takes the tokens that have drifted most out of the objective (M2PO, Zheng et al. 2025, arXiv:2510.01161).

        weight[t] = 0 for the fewest tokens of largest d[t]^2 for which mean(d^2 of the others) < threshold, else 1

    with `d = log p_old - log p_sampler`, over the rollout's tokens that count. It is for stale rollouts: their sampler
    is a policy some updates ago. The rule is AReaL's, computed once before the first update; the authors' own code
    looks at the policy that learns, at the tokens that move in the direction of their advantage only, and turns the
    threshold into a clip. One token is left in any case.

    Args:
      threshold: in nats squared, above 0; 0.04 in the paper.

    Returns:
      A transform with the metric `second_moment`, the mean of `d^2` before; it needs
      `make_train_step(..., score_old=True)`.

    Raises:
      ValueError: for a threshold that is not above 0.
    """
    check_positive(threshold=threshold)

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        mask = experience.rollout.mask
        if experience.old_log_probs is None:
            raise ValueError("second_moment needs old_log_probs: make_train_step(score_old=True), grpo.py --score-old")
        square = difference(experience.old_log_probs, experience.rollout.log_probs, mask) ** 2
        ascending = jnp.sort(jnp.where(mask, square, jnp.inf), axis=None)
        count = jnp.arange(1, mask.size + 1)
        means = jnp.cumsum(jnp.where(count <= jnp.sum(mask), ascending, 0.0)) / count
        kept = jnp.sum((means < threshold) & (count <= jnp.sum(mask)))  # the means rise
        stays = _largest(jnp.where(mask, -square, -jnp.inf), jnp.maximum(kept, 1))  # of equal ones the earlier
        weights = jnp.where(mask & ~stays, 0.0, 1.0 if experience.weights is None else experience.weights)
        return experience._replace(weights=weights), {"second_moment": token_mean(square, mask)}

    return transform


def reward_variance(share: Number = 0.9, *, weights: Sequence[float | Array] | None = None) -> ExperienceTransform:
    """Keeps the groups that carry `share` of the variance of the rewards (SNR-aware filter, RAGEN-2, arXiv:2604.06268).

        keep the fewest groups of largest var(r[b]) whose variances add up to at least share * sum_b var(r[b])

    Groups without variance are left out at any share. The others leave the loss and its denominators; their rewards
    have been in the advantages. Ties go to the earlier group. In RAGEN-2 and in TRL's and verl's requests the variance
    is that of the sample, which keeps the same groups where all have the same size.

    Args:
      share: of the variance, above 0 and at most 1; 0.9 in RAGEN-2.
      weights: of the reward functions, as in `advantages.from_rewards`.

    Returns:
      A transform with the metric `kept_groups`, the share of groups kept.

    Raises:
      ValueError: for a share out of range.
    """
    _check_share(share)

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        rewards, scored = total_reward(experience, weights)
        varies = has_variance(rewards, scored)
        deviation = root_mean_square(from_mean(rewards, scored, axis=1), scored, axis=1)[:, 0]
        broken = jnp.isnan(deviation)  # kept, so that the update is refused and not passed over
        deviation = jnp.where(varies & ~broken, deviation, 0.0)
        order = jnp.argsort(-deviation, stable=True)
        # In units of the largest: the square of a reward may overflow, or vanish.
        largest = (deviation[order] / jnp.maximum(jnp.max(deviation), jnp.finfo(deviation.dtype).tiny)) ** 2
        before = jnp.cumsum(largest) - largest
        within = (before < share * jnp.sum(largest)) | (share >= 1)  # a sum in float32 does not feel the smallest
        kept = jnp.zeros(varies.shape, bool).at[order].set(within) & varies
        kept = kept | broken
        masked = _with_mask(experience, experience.rollout.mask & kept[:, None, None])
        return masked, {"kept_groups": Mean(jnp.sum(kept), jnp.asarray(kept.size))}

    return transform


def old_from_sampler(experience: Experience) -> tuple[Experience, Metrics]:
    """Takes ratios against the sampler's own log-probs instead of the trainer's for the same params.

    One ratio then holds both the policy's progress and the gap between the programs,
    and no separate correction is due.
    """
    return experience._replace(old_log_probs=experience.rollout.log_probs), {}


def environment_tokens(experience: Experience) -> tuple[Experience, Metrics]:
    """Tells `losses.echo` what the policy did not write: the tokens of a conversation that its mask leaves out.

    It goes before transforms that mask. A conversation without a token that counts, such as one in which the
    environment failed, has none.
    """
    rollout = experience.rollout
    held = jnp.arange(rollout.mask.shape[-1]) < rollout.lengths[..., None]
    written = jnp.any(rollout.mask, axis=-1, keepdims=True)
    return experience._replace(environment_mask=held & ~rollout.mask & written), {}


def share_tokens(experience: Experience) -> tuple[Experience, Metrics]:
    """Records how many tokens count, for `losses.normalize_by_rollout_tokens`; comes after transforms that mask."""
    mask = experience.rollout.mask
    return experience._replace(token_share=jnp.full(mask.shape[0], jnp.sum(mask) / mask.shape[0])), {}


def _check_share(share: Number) -> None:
    if isinstance(share, int | float) and not 0 < share <= 1:
        raise ValueError(f"share is above 0 and at most 1, got {share}")


def _covariance(name: str, experience: Experience) -> tuple[Array, Array]:
    """Of each token's log-prob and advantage, about their means over the tokens that count; and the log-probs."""
    mask, old, advantages = experience.rollout.mask, experience.old_log_probs, experience.advantages
    if old is None:
        raise ValueError(f"{name} needs old_log_probs: make_train_step(score_old=True), grpo.py --score-old")
    if advantages is None:
        raise ValueError(f"{name} needs advantages: make_learn(..., advantage=) adds them before the transforms")
    spread = jnp.broadcast_to(per_token(advantages), mask.shape)
    of_log_probs, of_advantages = (
        jnp.where(mask, x, 0.0) - masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1) for x in (old, spread)
    )
    return of_log_probs * of_advantages, old


def _count(share: Number, mask: Array) -> Array:
    return jnp.maximum(jnp.floor(share * jnp.sum(mask)).astype(jnp.int32), 1)


def _largest(x: Array, count: Array) -> Array:
    """Where the `count` largest of all elements are; ties go to the earlier."""
    order = jnp.argsort(-x, axis=None, stable=True)
    return jnp.zeros(x.size, bool).at[order].set(jnp.arange(x.size) < count).reshape(x.shape)


def _with_mask(experience: Experience, mask: Array) -> Experience:
    return experience._replace(rollout=experience.rollout._replace(mask=mask))
