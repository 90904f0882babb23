"""Credit to the turns of a conversation: a reward for each turn becomes an advantage for each token.

    advantage = from_turns(gamma=0.9)                               # what comes after a turn counts for it
    advantage = from_turns(compare=pooled(centered_advantages))     # all turns of a group compared with one another

Where the outcome alone is to count, and all tokens alike, `reward=sampling.turn_rewards` and an advantage of
`advantages` do it.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_advantages, reward_metrics, rewards_to_go
from grpo_jax.losses.contract import check_shares
from grpo_jax.protocols import Advantage, Estimator
from grpo_jax.types import Array, Experience, Metrics, Rollout

# (returns [B, G, K], mask [B, G, K]) -> [B, G, K]
Compare = Callable[[Array, Array], Array]


def by_turn(estimator: Estimator) -> Compare:
    """Compares a turn with the same turn of the group's other conversations, as many as have come so far.

        A[b, :, k] = estimator(Q[b, :, k])

    For the first turn, and wherever states are shared, that is the group-relative advantage of an action; for later
    ones the baseline is that of other states, which adds variance and no bias under `leave_one_out_advantages`. A turn
    that nobody else of the group came to gets 0.

    Args:
      estimator: of `[B, G]` and a mask, such as `advantages.group_advantages`.
    """
    return jax.vmap(estimator, in_axes=2, out_axes=2)


def pooled(estimator: Estimator) -> Compare:
    """Compares a turn with all turns of its group, as process supervision does with steps.

        A[b] = estimator(all Q[b, g, k] of the group)

    Args:
      estimator: as in `by_turn`.
    """

    def compare(returns: Array, mask: Array) -> Array:
        B = returns.shape[0]
        return estimator(returns.reshape(B, -1), mask.reshape(B, -1)).reshape(returns.shape)

    return compare


def by_role(estimator: Estimator, *, roles: int = 2) -> Compare:
    """Compares a turn with the turns of the same role in the group, where roles take turns: a baseline for each role.

        A[b, :, p::roles] = estimator(all Q[b, g, k] of the group with k mod roles = p)

    For games that the policy plays against itself, in which one role may be better off than the other.

    Args:
      estimator: as in `by_turn`.
      roles: players of a game, at least 1.

    Raises:
      ValueError: for fewer.
    """
    if roles < 1:
        raise ValueError(f"roles are at least 1, got {roles}")

    def compare(returns: Array, mask: Array) -> Array:
        B, G, K = returns.shape

        def apart(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, -K % roles))).reshape(B, G, -1, roles)

        of_roles = jax.vmap(pooled(estimator), in_axes=3, out_axes=3)
        return of_roles(apart(returns), apart(mask)).reshape(B, G, -1)[..., :K]

    return compare


def from_turns(*, gamma: float | Array = 1.0, compare: Compare | None = None) -> Advantage:
    """An advantage of the rewards that an environment gave to turns.

        Q[b, g, k] = sum over turns j >= k of gamma^(j - k) * r[b, g, j]
        A[b, g, t] = compare(Q)[b, g, k],  k the turn of token t

    Args:
      gamma: discount per turn, from 0 to 1; 1 for none, 0 for the turn's own reward alone.
      compare: `by_turn(group_advantages)` unless given; another `by_turn(...)`, `pooled(...)`, or your own
        `(returns, mask) -> [B, G, K]`. `lambda returns, mask: returns` takes them as they are.

    Returns:
      The advantage, `[B, G, T]`, with metrics of the conversations' whole rewards. Turns without a reward have 0 for
      it; conversations without any, and those in which the environment failed, get 0.

    Raises:
      ValueError: for a `gamma` out of range; when called, for a rollout that has no turns.
    """
    check_shares(gamma=gamma)
    compare = by_turn(group_advantages) if compare is None else compare

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        turns = experience.rollout.turns
        if turns is None:
            raise ValueError("the rollout has no turns: it comes from `sampling.conversations` or the like")
        scored = jnp.any(turns.mask, axis=-1) & ~turns.failed
        took_place = (turns.ends > 0) & scored[..., None]
        advantages = compare(rewards_to_go(turns.rewards, turns.mask, gamma=gamma), took_place)
        total = jnp.sum(jnp.where(turns.mask, turns.rewards, 0.0), axis=-1)
        experience = experience._replace(rewards=total[..., None], reward_mask=scored[..., None])
        metrics = reward_metrics(experience, total, scored, ("turns",))
        return to_tokens(jnp.where(took_place, advantages, 0.0), experience.rollout), metrics

    return advantage


def to_tokens(values: Array, rollout: Rollout) -> Array:
    """`[B, G, T]`: for each token the value of the turn that it lies in.

    What the environment wrote is counted to the turn that follows it; what comes after the last turn has 0.

    Args:
      values: `[B, G, K]`, one per turn.
      rollout: with turns.

    Raises:
      ValueError: for a rollout that has no turns.
    """
    if rollout.turns is None:
        raise ValueError("the rollout has no turns: it comes from `sampling.conversations` or the like")
    chex.assert_equal_shape([values, rollout.turns.ends])
    ends, places = rollout.turns.ends[..., None, :], jnp.arange(rollout.tokens.shape[-1])[:, None]
    turn = jnp.sum((ends > 0) & (places >= ends), axis=-1)
    held = turn < jnp.sum(rollout.turns.ends > 0, axis=-1, keepdims=True)
    of_turn = jnp.take_along_axis(values, jnp.minimum(turn, values.shape[-1] - 1), axis=-1)
    return jnp.where(held, of_turn, 0.0)
