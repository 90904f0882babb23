"""One reward function made of several."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.calling import LogMetric, RewardFunction, call, group_size_of, ignore, name_of, of_groups, reading


def combine(functions: Sequence[RewardFunction], *, weights: Sequence[float] | None = None) -> RewardFunction:
    """The weighted sum of several reward functions, as one.

        r[i] = sum over k of weights[k] * functions[k](...)[i]

    A value that a function could not give is left out of the sum; where none could, the sum is
    None. Given TRL's `log_metric`, it logs each function's mean and deviation as
    `reward/<name>` and `reward/<name>_std`. (Several functions under `host`, weighed by `from_rewards`,
    keep their rewards apart instead, and have the same metrics.)

    Args:
      functions: reward functions, plain or async.
      weights: one per function; all 1 if None.

    Raises:
      ValueError: for no function, another number of weights, one that is not finite, or functions that need groups of
        different sizes.
    """
    if not functions or (weights is not None and len(weights) != len(functions)):
        number = None if weights is None else len(weights)
        raise ValueError(
            f"combine takes at least one function and a weight for each, got {len(functions)} and {number}"
        )
    if weights is not None and not np.all(np.isfinite(np.asarray(weights, np.float64))):
        raise ValueError(f"weights are finite numbers, got {list(weights)}")
    sizes = {size for function in functions if (size := group_size_of(function)) is not None}
    if len(sizes) > 1:
        raise ValueError(f"the functions need groups of different sizes: {sizes}")
    scale = np.ones(len(functions)) if weights is None else np.asarray(weights, np.float64)

    def combined(
        prompts: Sequence[Any], completions: Sequence[Any], log_metric: LogMetric = ignore, **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "log_metric": log_metric}
        rewards = np.array(call(functions, arguments, len(completions)), np.float64).reshape(len(functions), -1)
        reward_mask: Any = ~np.isnan(rewards)
        for function, row, mask in zip(functions, rewards, reward_mask, strict=True):
            if mask.any():
                log_metric(f"reward/{name_of(function)}", float(row[mask].mean()))
                log_metric(f"reward/{name_of(function)}_std", float(row[mask].std()))
        total = np.where(reward_mask, scale[:, None] * np.nan_to_num(rewards), 0.0).sum(axis=0)
        return [float(x) if scored else None for x, scored in zip(total, reward_mask.any(axis=0), strict=True)]

    reading(combined, calls=functions)
    return of_groups(combined, sizes.pop()) if sizes else combined
