"""Metrics that a step does not measure itself, as transforms for `make_train_step(transforms=...)`.

The checks of `monitoring` read them.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from grpo_jax.losses import token_mean
from grpo_jax.losses.contract import difference
from grpo_jax.protocols import ExperienceTransform
from grpo_jax.statistics import Max, Mean
from grpo_jax.types import Array, Experience, Metrics


def repetition(n: int = 4) -> ExperienceTransform:
    """Measures how much the completions repeat themselves, as the metric `repetition`.

        repetition = 1 - distinct n-grams / n-grams, of the tokens of a completion

    The mean over completions of at least `n` tokens. Of conversations, n-grams are those within the policy's turns.

    Args:
      n: tokens of an n-gram, from 1 on.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least 1 token, got n = {n}")

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        tokens, wrote = experience.rollout.tokens, experience.rollout.mask
        if tokens.shape[-1] < n:
            return experience, {"repetition": Mean(jnp.zeros(()), jnp.zeros((), jnp.int32))}
        places = tokens.shape[-1] - n + 1
        there = functools.reduce(jnp.logical_and, [wrote[..., i : i + places] for i in range(n)])
        count = jnp.sum(there, axis=-1)  # n-grams of a completion
        shares = 1 - _distinct(tokens, there, n) / jnp.maximum(count, 1)
        return experience, {"repetition": Mean(jnp.sum(jnp.where(count > 0, shares, 0.0)), jnp.sum(count > 0))}

    return transform


def _distinct(tokens: Array, there: Array, n: int) -> Array:
    """`[B, G]`, how many n-grams of `tokens [B, G, T]` differ, of those that begin where `there [B, G, T - n + 1]`."""
    grams = [jnp.where(there, tokens[..., i : i + there.shape[-1]], -1) for i in range(n)]
    # Sorted, equal ones are neighbours, and those that are not there come first.
    ordered = jax.lax.sort(grams, num_keys=n)
    new = jnp.any(jnp.stack([gram[..., 1:] != gram[..., :-1] for gram in ordered]), axis=0)
    return jnp.sum(new & (ordered[0][..., 1:] >= 0), axis=-1) + (ordered[0][..., 0] >= 0)


def unscored(names: Sequence[str]) -> ExperienceTransform:
    """Measures for which share of the completions a reward could not be given, as `unscored/<name>`.

    Args:
      names: one a reward function.
    """

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        given = experience.reward_mask
        if given is None or given.shape[-1] != len(names):
            shape = None if given is None else given.shape
            raise ValueError(f"{len(names)} names for a reward_mask [B, G, R] of shape {shape}")
        there = experience.rollout.lengths > 0
        return experience, {
            f"unscored/{name}": Mean(jnp.sum(there & ~given[..., k]), jnp.sum(there)) for k, name in enumerate(names)
        }

    return transform


def sampler_gap(parts: int = 4) -> ExperienceTransform:
    """Measures how far the scorer is from the sampler for the same params, also by the place in the completion.

        gap[t] = log p_sampler[t] - log p_old[t]         of the tokens that count

        sampler_kl              mean of gap: the divergence of the sampler from the scorer, in nats per token
        sampler_gap             mean of |gap|
        sampler_gap_max         the largest |gap|
        sampler_kl/<i>, sampler_gap/<i>     of the tokens of the i-th of `parts` equal spans of the width

    0 to rounding where both are one program in float32. Other precisions, kernels and engines have a gap that a long
    completion adds up; so have top-k and top-p where the step does not replay them. The width is the rollout's, which
    `packing.trim` makes that of the longest completion. Spans without a token read 0.

    Args:
      parts: spans, at least 1.

    Returns:
      A transform, which needs `make_train_step(..., score_old=True)`.

    Raises:
      ValueError: for `parts` below 1; when called, without `old_log_probs`.
    """
    if parts < 1:
        raise ValueError(f"a completion has at least 1 part, got {parts}")

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        rollout = experience.rollout
        if experience.old_log_probs is None:
            raise ValueError("sampler_gap needs old_log_probs: make_train_step(..., score_old=True) adds them")
        gap = difference(rollout.log_probs, experience.old_log_probs, rollout.mask)
        metrics: Metrics = {"sampler_gap_max": Max(jnp.max(jnp.abs(gap)))}
        T = gap.shape[-1]
        span = jnp.arange(T) * parts // T
        for name, places in [("", rollout.mask), *((f"/{i}", rollout.mask & (span == i)) for i in range(parts))]:
            metrics[f"sampler_kl{name}"] = token_mean(gap, places)
            metrics[f"sampler_gap{name}"] = token_mean(jnp.abs(gap), places)
        return experience, metrics

    return transform
