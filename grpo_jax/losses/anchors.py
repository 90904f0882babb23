"""Anchors: the log-probs that an objective's ratio is taken against.

An anchor is `(scores, experience) -> log_probs [B, G, T]`. It is not differentiated.
"""

import jax.numpy as jnp

from grpo_jax.protocols import Anchor, Weight
from grpo_jax.types import Array, Experience, Scores

_LEAST = 1e-8  # a weight of 0 counts as this, as in TRL, so that the log-ratio stays finite


def old_policy(scores: Scores, experience: Experience) -> Array:
    """The trainer's own log-probs of the params that sampled: `old_log_probs`.

    Raises:
      ValueError: where they are missing.
    """
    del scores
    if experience.old_log_probs is None:
        raise ValueError(
            "several updates of a rollout need the old_log_probs of the policy that sampled: "
            "make_train_step(score_old=True), grpo.py --score-old"
        )
    return experience.old_log_probs


def sampler(scores: Scores, experience: Experience) -> Array:
    """The sampler's log-probs, of the distribution really drawn from: one ratio holds progress and mismatch."""
    del scores
    return experience.rollout.log_probs


def corrected(weight: Weight) -> Anchor:
    """The old policy's log-probs less the logarithm of a weight, so that the weight is a factor of the ratio itself.

        log p_old - log max(weight, 1e-8)

    `vespo(anchor=corrected(truncated_importance(3.0)))` is VESPO with the rollout weight as TRL adds it: the weight
    goes into the ratio that the gamma density sees, not in front of the objective.

    Args:
      weight: such as `truncated_importance()`.
    """

    def anchor(scores: Scores, experience: Experience) -> Array:
        bounded, _ = weight(scores, experience)
        return old_policy(scores, experience) - jnp.log(jnp.maximum(bounded, _LEAST))

    return anchor
