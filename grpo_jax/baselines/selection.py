"""Which completions of a group are taken."""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.advantages import Weights, total_reward
from grpo_jax.types import Array, Experience


def candidates(experience: Experience, weights: Weights | None = None) -> tuple[Array, Array]:
    """The total rewards `[B, G]`, and which completions may be taken `[B, G]`.

    Those are the ones with a reward that is a number and with a token that counts: after
    `transforms.mask_truncated` none that was cut off.

    Args:
      experience: with rewards.
      weights: as in `advantages.from_rewards`.
    """
    total, scored = total_reward(experience, weights)
    return total, scored & ~jnp.isnan(total) & jnp.any(experience.rollout.mask, axis=-1)


def select(experience: Experience, places: Array, counted: Array) -> Experience:
    """The completions at `places` of their groups, in that order.

    Args:
      experience: of groups of `G`.
      places: `[B, K]` int32, below `G`.
      counted: `[B, K]` bool; the mask of the others is emptied, so that they count nowhere.

    Returns:
      The experience with groups of `K`, without what belongs to whole groups: packing
      and share of tokens.
    """

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

    def taken(fields: dict[str, Any], *left_out: str) -> dict[str, Any]:
        return {name: jax.tree.map(take, x) for name, x in fields.items() if x is not None and name not in left_out}

    rollout = experience.rollout
    rollout = rollout._replace(**taken(rollout._asdict(), "prompts"))
    rollout = rollout._replace(mask=rollout.mask & counted[..., None])
    fields = taken(experience._asdict(), "rollout", "packing", "token_share", "teacher_prompts")
    return Experience(rollout, **fields, teacher_prompts=experience.teacher_prompts)
