"""Rewards for the length of a completion. The formulas serve NumPy's arrays and JAX's (`rewards.tokens`)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.calling import RewardFunction, call, reading
from grpo_jax.rewards.completions import named
from grpo_jax.rewards.formats import TAGS, marks_of, per_continuation, sections_of

Formula = Callable[..., Any]  # of arrays of NumPy or JAX, to an array of the same library


def reasoning_length(*, per: int = 1000, tags: Sequence[str] = TAGS) -> RewardFunction:
    """`min(length / per, 1)` where the format is strictly right, else 0.0.

    The length is that of the completion's text in the first pair of tags, in characters
    (Unicode code points), white space included.

    Args:
      per: characters for the full reward.
      tags: names of the tags, in order; the reasoning's first.

    Raises:
      ValueError: unless `per > 0`; for tags that are not different names.
    """
    if not per > 0:
        raise ValueError(f"reasoning is measured per a number of characters above 0, got {per}")
    marks = marks_of(tags)

    def score(text: str, start: int) -> float:
        sections = sections_of(text, marks)
        if sections is None:
            return 0.0
        return min(max(sections[0].stop - max(sections[0].start, start), 0) / per, 1.0)

    return per_continuation("reasoning_length", score, marks)


def soft_overlong(max_tokens: int, cache: int) -> RewardFunction:
    """A penalty that grows over the last `cache` tokens (`overlong_penalty`).

    The length is that of `completion_ids`, the end token included, as for TRL's `get_soft_overlong_punishment`.
    """
    penalty = overlong_penalty(max_tokens, cache)

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return list(penalty(_lengths(completion_ids)).tolist())

    return named("soft_overlong", reward)


def overlong_penalty(max_tokens: int, cache: int) -> Formula:
    """A penalty `lengths -> penalties` (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13).

        0 up to max_tokens - cache tokens, ((max_tokens - cache) - length) / cache up to max_tokens, -1 beyond

    Args:
      max_tokens: 20480 in the paper, the limit that completions are sampled under.
      cache: 4096 in the paper.

    Raises:
      ValueError: unless `0 < cache <= max_tokens`.
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache is above 0 and at most max_tokens = {max_tokens}, got {cache}")
    return lambda lengths: ((max_tokens - cache - lengths) / cache).clip(-1.0, 0.0)


def cosine_length(correct: RewardFunction, scale: Formula, *, threshold: float = 0.5) -> RewardFunction:
    """A reward that depends on the length, and on whether the completion is right.

        cosine_length(accuracy(), cosine_scale(max_length=4096))

    TRL's `get_cosine_scaled_reward` with any verifier in place of math-verify. The length
    is that of `completion_ids`, in tokens, the end token included.

    Args:
      correct: a reward function, plain or async. A completion is right where it gives more
        than the threshold; what it could not score (None) stays None.
      scale: `(right, lengths) -> rewards`, of `cosine_scale`.
      threshold: in the units of `correct`.

    Raises:
      ValueError: from the reward, for values of `correct` that `host` would refuse.
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        arguments = columns | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        (values,) = call([correct], arguments, len(completions))
        scaled = scale(np.array(values) > threshold, _lengths(completion_ids)).tolist()
        return [None if math.isnan(value) else number for value, number in zip(values, scaled, strict=True)]

    return reading(named("cosine_length", reward), calls=[correct])


def cosine_scale(
    max_length: int,
    *,
    min_wrong: float = -1.0,
    max_wrong: float = -0.5,
    min_correct: float = 0.5,
    max_correct: float = 1.0,
) -> Formula:
    """A scale `(right, lengths) -> rewards`: shorter right answers get more, longer wrong ones lose less.

        progress = min(length / max_length, 1)
        reward = long + (short - long) * (1 + cos(pi * progress)) / 2

    where a right completion has `short = max_correct` and `long = min_correct`, and a
    wrong one `short = min_wrong` and `long = max_wrong` (Yeo et al. 2025,
    arXiv:2502.03373, appendix C.1, with TRL's defaults).

    Args:
      max_length: tokens from which on a reward stays at its `long` end.
      min_wrong: of a wrong completion without length.
      max_wrong: of a wrong completion of `max_length`.
      min_correct: of a right completion of `max_length`.
      max_correct: of a right completion without length.

    Raises:
      ValueError: unless `max_length > 0`.
    """
    if not max_length > 0:
        raise ValueError(f"max_length is a number of tokens above 0, got {max_length}")

    def scale(right: Any, lengths: Any) -> Any:
        xp = right.__array_namespace__()
        short, long = xp.where(right, max_correct, min_wrong), xp.where(right, min_correct, max_wrong)
        progress = (lengths / max_length).clip(None, 1.0)
        return long + 0.5 * (short - long) * (1.0 + xp.cos(math.pi * progress))

    return scale


def _lengths(completion_ids: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(ids) for ids in completion_ids], np.int64)
