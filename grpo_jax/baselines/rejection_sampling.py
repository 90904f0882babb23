"""Imitating what succeeded: best of n, and fine-tuning on it.

RAFT as one step, which samples, keeps the best of each group and imitates them:

    step = make_train_step(policy, optimizer, sampler, reward=reward, loss=losses.sft(), transforms=(raft(0.5),))

The same transform serves `make_learn(policy, optimizer, loss=losses.sft(), transforms=(raft(0.5),))`.
"""

import jax.numpy as jnp

from grpo_jax.advantages import Weights
from grpo_jax.baselines.selection import candidates, select
from grpo_jax.protocols import ExperienceTransform
from grpo_jax.statistics import Mean
from grpo_jax.types import Experience, Metrics, Number


def best_of_n(experience: Experience, *, keep: int = 1, weights: Weights | None = None) -> Experience:
    """The completions of each group with the highest total rewards, best first.

    Best-of-n sampling, where the rewards are those of a model (Stiennon et al. 2020,
    arXiv:2009.01325; Nakano et al. 2021, arXiv:2112.09332, as rejection sampling). A tie
    goes to the earlier completion.

    Args:
      experience: groups of `G` with rewards.
      keep: completions of each group that are taken, from 1 to `G`.
      weights: as in `advantages.from_rewards`.

    Returns:
      The experience with `G = keep`. What has no reward comes last and has an empty mask.

    Raises:
      ValueError: for a `keep` out of range, or without rewards.
    """
    total, counted = candidates(experience, weights)
    if not 1 <= keep <= total.shape[1]:
        raise ValueError(f"keep is from 1 to the group's {total.shape[1]} completions, got {keep}")
    # By rank, not by value: what has no reward comes after a reward of -inf, too.
    places = jnp.lexsort((-total, ~counted), axis=1)[:, :keep]
    return select(experience, places, jnp.take_along_axis(counted, places, axis=1))


def raft(threshold: Number | None = None, *, keep: int = 1, weights: Weights | None = None) -> ExperienceTransform:
    """A transform that leaves the best of each group, for `losses.sft()` to imitate.

    RAFT (Dong et al. 2023, arXiv:2304.06767, algorithm 1) with `keep=1` and no threshold.
    With one, groups that never succeeded contribute nothing; with `keep` the group's size as
    well, every success is imitated: rejection-sampling fine-tuning (Yuan et al. 2023,
    arXiv:2308.01825).

    Args:
      threshold: of the total reward, which is to be above it; None for no threshold.
      keep: as in `best_of_n`.
      weights: as in `advantages.from_rewards`.

    Returns:
      A transform. It makes groups of `keep`, in which the others have an empty mask, and
      reports `kept`, the share of those places that are trained on.
    """

    def transform(experience: Experience) -> tuple[Experience, Metrics]:
        experience = best_of_n(experience, keep=keep, weights=weights)
        mask = experience.rollout.mask
        if threshold is not None:
            total, _ = candidates(experience, weights)
            mask = mask & (total > threshold)[..., None]
        taught = jnp.any(mask, axis=-1)
        kept = Mean(jnp.sum(taught), jnp.asarray(taught.size))
        return experience._replace(rollout=experience.rollout._replace(mask=mask)), {"kept": kept}

    return transform
