"""What is done to an experience once, before it is split into updates: filters of tokens, and what needs them all.

A hook is `experience -> (experience, metrics)`; `make_learn(..., transforms=(mask_truncated,))`
runs them in their order, after the reference policy's scores and the advantages are in.
A quantile or a mean over the rollout belongs here, since a loss sees parts of it.

A mask leaves a token out of numerators and denominators alike, the penalty's included. A
weight scales the gain of the policy and nothing else.
"""

import jax.numpy as jnp

from grpo_jax.losses.contract import per_token
from grpo_jax.protocols import ExperienceTransform
from grpo_jax.types import Array, Experience, Metrics


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
            "mask_zero_variance_groups needs advantages: make_learn(..., advantage=) adds them before the hooks"
        )
    mask = experience.rollout.mask
    spread = jnp.any(per_token(experience.advantages) * mask != 0, axis=(1, 2), keepdims=True)
    return _with_mask(experience, mask & spread), {}


def top_entropy(share: float | Array) -> ExperienceTransform:
    """Lets only the `share` of tokens of highest entropy teach (Wang et al. 2025, arXiv:2506.01939, equation 5).

        weight = 1 where H >= quantile(H, 1 - share), else 0

    Entropy is that of the policy that sampled, over all tokens of the rollout that count;
    the quantile interpolates linearly. Denominators count every token, as in the paper
    and TRL, and penalties are exempt, as in TRL (`top_entropy_quantile`, which takes the
    quantile of each micro-batch). `drop_weightless` after it changes both.

    Args:
      share: above 0 and at most 1; 0.2 in the paper.

    Returns:
      A hook, which needs `make_train_step(..., score_old=True)`.

    Raises:
      ValueError: for a share out of range.
    """
    if isinstance(share, int | float) and not 0 < share <= 1:
        raise ValueError(f"share is above 0 and at most 1, got {share}")

    def hook(experience: Experience) -> tuple[Experience, Metrics]:
        mask, entropy = experience.rollout.mask, experience.old_entropy
        if entropy is None:
            raise ValueError("top_entropy needs the old_entropy of the policy that sampled: score_old=True adds it")
        threshold = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1 - share)
        weights = (entropy >= threshold).astype(entropy.dtype)
        if experience.weights is not None:
            weights = weights * experience.weights
        return experience._replace(weights=weights), {"entropy_threshold": jnp.nan_to_num(threshold)}

    return hook


def drop_weightless(experience: Experience) -> tuple[Experience, Metrics]:
    """Takes tokens of weight 0 out of the mask, and so out of denominators and penalties."""
    if experience.weights is None:
        raise ValueError("drop_weightless comes after a hook that makes weights, such as top_entropy")
    return _with_mask(experience, experience.rollout.mask & (experience.weights != 0)), {}


def old_from_sampler(experience: Experience) -> tuple[Experience, Metrics]:
    """Takes ratios against the sampler's own log-probs instead of the trainer's for the same params.

    One ratio then holds both the policy's progress and the gap between the programs,
    and no separate correction is due.
    """
    return experience._replace(old_log_probs=experience.rollout.log_probs), {}


def share_tokens(experience: Experience) -> tuple[Experience, Metrics]:
    """Records how many tokens count, for `losses.normalize_by_rollout_tokens`; comes after transforms that mask."""
    mask = experience.rollout.mask
    return experience._replace(token_share=jnp.full(mask.shape[0], jnp.sum(mask) / mask.shape[0])), {}


def _with_mask(experience: Experience, mask: Array) -> Experience:
    return experience._replace(rollout=experience.rollout._replace(mask=mask))
