"""A curriculum from running solve rates: rows are drawn more often where the policy sometimes succeeds.

A group that is all right or all wrong has advantages of 0. With binary rewards the
spread of a group is `p (1 - p)`, the variance of success, and this is how often a row is
drawn: "sampling for learnability" (Foster et al. 2025, arXiv:2502.12272, for language
models, after Rutherford et al. 2024, arXiv:2408.15099).

The state is arrays, so it lives in `TrainState.extra` and survives a restart; the rows
of a step are a pure function of it and of the step's key:

    state = init_state(...)._replace(extra=curriculum.init(len(prompts)))
    chosen = curriculum.rows(state.extra, jax.random.fold_in(state.key, state.step), 16)
    ...
    state = state._replace(extra=curriculum.observe(state.extra, chosen, solved))

It replaces `data.batch_indices`, and with it the promise that every row comes once an epoch.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from grpo_jax.types import Array, PRNGKey


class Curriculum(NamedTuple):
    """What was seen of `N` rows; later observations count more."""

    solved: Array  # [N] float32, sum of solve rates, each times decay ** (observations since)
    seen: Array  # [N] float32, the same sum of ones; 0 for a row that was never seen


def init(num_rows: int) -> Curriculum:
    """Nothing seen of any row."""
    return Curriculum(jnp.zeros(num_rows, jnp.float32), jnp.zeros(num_rows, jnp.float32))


def observe(
    curriculum: Curriculum, rows: Array, solved: Array, mask: Array | None = None, *, decay: float | Array = 0.8
) -> Curriculum:
    """Adds what a step showed.

        solved[n] <- decay * solved[n] + s        for each row n of the step, with the solve rate s
        seen[n]   <- decay * seen[n] + 1

    Args:
      curriculum: before.
      rows: `[B]` int, rows of the data set. A row that is there several times is decayed
        once, and all its solve rates are added.
      solved: `[B]` float, the share of the group's completions that were right, 0 to 1.
      mask: `[B]` bool, False where it could not be told; those are left out.
      decay: of what was seen before, 0 to 1: 0 keeps the last observation alone, 1 all alike.

    Raises:
      AssertionError: if the shapes differ.
      ValueError: for a decay out of range.
    """
    if isinstance(decay, float | int) and not 0 <= decay <= 1:
        raise ValueError(f"decay is from 0 to 1, got {decay}")
    chex.assert_rank(rows, 1)
    chex.assert_equal_shape([rows, solved] if mask is None else [rows, solved, mask])
    ones = jnp.ones(rows.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    count = jnp.zeros_like(curriculum.seen).at[rows].add(ones)
    # where, not a product: a rate that could not be told may be NaN
    total = jnp.zeros_like(curriculum.solved).at[rows].add(jnp.where(ones > 0, solved, 0.0))
    kept = jnp.where(count > 0, decay, 1.0)
    return Curriculum(kept * curriculum.solved + total, kept * curriculum.seen + count)


def solve_rates(curriculum: Curriculum, *, prior: float | Array = 1.0) -> Array:
    """`[N]` estimates of how often each row is solved: `(solved + prior / 2) / (seen + prior)`.

    The prior is worth so many observations of one half: a row that was never seen is
    taken for one, so that it is drawn soon, and one group that was all right does not
    retire a row for good.

    Args:
      curriculum: what was seen.
      prior: above 0, in observations.
    """
    return (curriculum.solved + prior / 2) / (curriculum.seen + prior)


def weights(curriculum: Curriculum, *, floor: float | Array = 0.02, prior: float | Array = 1.0) -> Array:
    """`[N]` sampling weights: `p (1 - p) + floor`, divided by their sum.

    Args:
      curriculum: what was seen.
      floor: above 0, so that every row is looked at again; 0.25 is the largest variance of a row.
      prior: see `solve_rates`.

    Raises:
      ValueError: for a floor of 0 or less.
    """
    if isinstance(floor, float | int) and floor <= 0:
        raise ValueError(f"floor is above 0, or rows that are always solved would never be seen again; got {floor}")
    rate = solve_rates(curriculum, prior=prior)
    learnability = rate * (1 - rate) + floor
    return learnability / jnp.sum(learnability)


def rows(
    curriculum: Curriculum, key: PRNGKey, batch: int, *, floor: float | Array = 0.02, prior: float | Array = 1.0
) -> Array:
    """`[batch]` int32 different rows, drawn with `weights`; a pure function of the state and the key.

    Drawn without replacement: one after the other, each from those that are left.

    Args:
      curriculum: what was seen.
      key: of the step.
      batch: how many.
      floor: see `weights`.
      prior: see `solve_rates`.

    Raises:
      ValueError: for more rows than there are.
    """
    num_rows = curriculum.seen.shape[0]
    if batch > num_rows:
        raise ValueError(f"a batch of {batch} different rows is more than the {num_rows} there are")
    chances = weights(curriculum, floor=floor, prior=prior)
    return jax.random.choice(key, num_rows, (batch,), replace=False, p=chances).astype(jnp.int32)
