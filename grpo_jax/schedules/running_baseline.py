"""Baselines that are kept from step to step, one per prompt or per role, in place of a group's mean.

The state is part of `TrainState.extra`, and so saved and restored with it:

    state = init_state(..., extra=init(rows))                                      # one baseline per data-set row
    advantage = Scheduled(lambda step, extra: spo(extra, index))
    ...
    experience = step.collect(state, prompts)                                      # and the rewards
    state, metrics = step.learn(state, experience)
    state = state._replace(extra=observe(state.extra, experience, index, decay=0.9))

`index` is `experience -> [B] int32`, which baseline is whose: `lambda experience: experience.rollout.prompts.info`
where `info` is the data-set row, or the role. A group may have one completion. The baseline that an advantage sees
does not hold the completion's own reward: it is observed after the step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from grpo_jax.advantages import batch_normalised_advantages, from_rewards, total_reward
from grpo_jax.protocols import Advantage
from grpo_jax.types import Array, Experience, Metrics, Number

Index = Callable[[Experience], Array]  # experience -> [B] int32


class RunningBaseline(NamedTuple):
    """A discounted sum of rewards and of their number; the baseline is the first over the second."""

    total: Array  # [N] float32, in reward units
    number: Array  # [N] float32, of rewards, those of long ago discounted


def init(size: int, *, value: Number = 0.0, count: Number = 0.0) -> RunningBaseline:
    """`size` baselines of `value`, which weigh as much as `count` rewards.

    SPO starts from the rewards of some completions of each prompt; `observe` with a decay of 1 does that. With a count
    of 0 the first observation is the baseline, and before it the baseline is 0.

    Raises:
      ValueError: for a size below 1 or a count below 0.
    """
    if size < 1:
        raise ValueError(f"there is at least 1 baseline, got {size}")
    if isinstance(count, int | float) and not count >= 0:
        raise ValueError(f"count is at least 0, got {count}")
    counts = jnp.full((size,), count, jnp.float32)
    return RunningBaseline(value * counts, counts)


def baseline(running: RunningBaseline) -> Array:
    """`[N]`, in reward units; 0 where nothing has been seen."""
    return jnp.where(running.number > 0, running.total / jnp.where(running.number > 0, running.number, 1.0), 0.0)


def observe(
    running: RunningBaseline,
    experience: Experience,
    index: Index,
    *,
    decay: Number,
    weights: Sequence[float | Array] | None = None,
) -> RunningBaseline:
    """The baselines after an experience.

        total' = decay * total + sum of the rewards        number' = decay * number + how many they are

    of those that were seen; the others stay. SPO's tracker (Xu and Ding 2025, arXiv:2509.13232)
    is this with `total = alpha` and `number = alpha + beta` for rewards of 0 and 1: an average that forgets. The paper
    lets the decay follow the divergence from the policy that saw the prompt last, `2^(-D / D_half)`: a `decay [N]`, as
    `running_advantages.spo(half_life=)` has it.

    Args:
      running: before.
      experience: with rewards.
      index: which baseline is whose.
      decay: from 0 to 1, a number or one per baseline; 1 is the mean over all rewards ever.
      weights: of the reward functions, as in `advantages.from_rewards`.

    Raises:
      ValueError: for a decay out of range.
    """
    if isinstance(decay, int | float) and not 0 <= decay <= 1:
        raise ValueError(f"decay is from 0 to 1, got {decay}")
    total, count = _sums(running, experience, index, weights)
    seen = count > 0
    return RunningBaseline(
        jnp.where(seen, decay * running.total + total, running.total),
        jnp.where(seen, decay * running.number + count, running.number),
    )


def follow(
    running: RunningBaseline,
    experience: Experience,
    index: Index,
    *,
    decay: Number = 0.95,
    weights: Sequence[float | Array] | None = None,
) -> RunningBaseline:
    """The baselines after an experience, as an exponential average (RAE, SPIRAL 2025, arXiv:2506.24119).

        baseline' = decay * baseline + (1 - decay) * mean of the rewards of the role in the batch

    SPIRAL moves the baseline first and subtracts the moved one: for one completion a role its advantages are `decay`
    times those here.

    Args:
      running: before.
      experience: with rewards.
      index: the role of each prompt.
      decay: from 0 to 1; 0.95 in SPIRAL.
      weights: as in `observe`.

    Raises:
      ValueError: for a decay out of range.
    """
    if isinstance(decay, int | float) and not 0 <= decay <= 1:
        raise ValueError(f"decay is from 0 to 1, got {decay}")
    total, count = _sums(running, experience, index, weights)
    seen = count > 0
    moved = decay * baseline(running) + (1 - decay) * total / jnp.where(seen, count, 1.0)
    return RunningBaseline(
        jnp.where(seen, moved, running.total),
        jnp.where(seen, 1.0, running.number),
    )


def rae(
    running: RunningBaseline,
    index: Index,
    *,
    weights: Sequence[float | Array] | None = None,
    names: Sequence[str] | None = None,
) -> Advantage:
    """The distance to the running baseline (RAE, SPIRAL 2025, arXiv:2506.24119).

        A[b, g] = r[b, g] - baseline[index[b]]

    Args:
      running: the state's, before the step.
      index: which baseline is whose.
      weights: as in `advantages.from_rewards`.
      names: as in `advantages.from_rewards`.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        def estimate(rewards: Array, mask: Array | None) -> Array:
            own = baseline(running)[index(experience)][:, None]
            return jnp.where(True if mask is None else mask, rewards - own, 0.0)

        return from_rewards(estimate, weights=weights, names=names)(experience)

    return advantage


def spo(
    running: RunningBaseline,
    index: Index,
    *,
    ddof: int = 0,
    eps: Number = 1e-4,
    weights: Sequence[float | Array] | None = None,
    names: Sequence[str] | None = None,
) -> Advantage:
    """The distance to the running baseline, normalised over the batch (SPO, arXiv:2509.13232).

        d[b, g] = r[b, g] - baseline[index[b]]        A = (d - mean(d)) / (std(d) + eps)

    Arguments as in `rae`; `ddof` and `eps` as in `advantages.batch_normalised_advantages`. An `eps` near the rounding
    of a baseline, 1e-7 of it, would make advantages of that rounding where all rewards are what was expected.
    """

    def advantage(experience: Experience) -> tuple[Array, Metrics]:
        def estimate(rewards: Array, mask: Array | None) -> Array:
            own = baseline(running)[index(experience)][:, None]
            return batch_normalised_advantages(rewards - own, mask, ddof=ddof, eps=eps)

        return from_rewards(estimate, weights=weights, names=names)(experience)

    return advantage


def _sums(
    running: RunningBaseline, experience: Experience, index: Index, weights: Sequence[float | Array] | None
) -> tuple[Array, Array]:
    """Of the rewards that each baseline has seen in this experience, and their numbers, `[N]`."""
    rewards, scored = total_reward(experience, weights)
    scored = scored & jnp.isfinite(rewards)  # the update is refused; a baseline would hold the NaN for good
    rows, nothing = index(experience), jnp.zeros_like(running.total)
    total = nothing.at[rows].add(jnp.sum(jnp.where(scored, rewards, 0.0), axis=1))
    return total, nothing.at[rows].add(jnp.sum(scored, axis=1).astype(nothing.dtype))
