"""A penalty for repetition."""

import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.calling import RewardFunction
from grpo_jax.rewards.completions import named


def repetition_penalty(*, ngram: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """`(1 - unique / total) * max_penalty` over the n-grams of the completion's tokens.

    0.0 for a completion of fewer than `ngram` tokens. TRL's
    `get_repetition_penalty_reward`, after Yeo et al. 2025 (arXiv:2502.03373, appendix
    C.2). The tokens are `completion_ids`, the end token included.

    Args:
      ngram: tokens in a row that count as one.
      max_penalty: the limit for a completion of nothing but repetition; 0 or below.

    Raises:
      ValueError: unless `ngram > 0` and `max_penalty <= 0`.
    """
    check_settings(ngram, max_penalty)

    def penalty(ids: Sequence[int]) -> float:
        grams = list(zip(*(ids[start:] for start in range(ngram)), strict=False))
        repeated = len(grams) - len(set(grams))
        return repeated / len(grams) * max_penalty if repeated else 0.0

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [penalty(ids) for ids in completion_ids]

    return named("repetition_penalty", reward)


def check_settings(ngram: int, max_penalty: float) -> None:
    """Refuses settings out of range with a ValueError."""
    if not (ngram > 0 and -math.inf < max_penalty <= 0):
        raise ValueError(
            f"ngram is above 0 and max_penalty at most 0, got ngram = {ngram}, max_penalty = {max_penalty}"
        )
