"""pass@k and majority@k, from counts of correct completions and from answers."""

import itertools
import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(
    correct: np.ndarray | Sequence[int], n: int | np.ndarray | Sequence[int], k: int | Sequence[int]
) -> np.ndarray:
    """The probability that at least one of `k` completions is right, without bias.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod over j < k of (n - c - j) / (n - j)

    Chen et al. 2021, arXiv:2107.03374, equation 1. The factors are at most 1, so that
    nothing overflows, as the binomials do; one of them is 0 where fewer than `k` are
    wrong. The plug-in estimate `1 - (1 - c / n)^k` is too low.

    Args:
      correct: `[N]` int, `c`, how many of a prompt's completions are right.
      n: `[N]` int, or one for all, how many completions a prompt has.
      k: from 1 to the least of `n`; one, or `K` of them.

    Returns:
      `[N]` float64, or `[K, N]`; the mean over prompts is the task's pass@k.

    Raises:
      ValueError: for counts or a `k` out of range.
    """
    c, n = np.broadcast_arrays(np.asarray(correct, np.int64), np.asarray(n, np.int64))
    ks = np.asarray(k, np.int64)
    least = int(n.min()) if n.size else ks.max(initial=1)
    if np.any((ks < 1) | (ks > least)):
        raise ValueError(f"k is from 1 to the number of completions, {least}, got {k}")
    if np.any((c < 0) | (c > n)):
        raise ValueError(f"of n completions 0 to n are right, got {c} of {n}")
    j = np.arange(ks.max(initial=0))
    none_right = np.cumprod((n[..., None] - c[..., None] - j) / (n[..., None] - j), axis=-1)
    return 1 - np.moveaxis(none_right, -1, 0)[ks - 1]


def majority_at_k(
    answers: Sequence[Sequence[str | None]],
    right: Sequence[Sequence[bool]],
    k: int,
    *,
    draws: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """The probability that the answer which `k` completions give most often is right.

    Self-consistency (Wang et al. 2022, arXiv:2203.11171). The mean over subsets of `k` of
    a prompt's completions: over all of them where there are at most `draws`, else over
    `draws` of them, drawn from `seed`. A completion without an answer does not vote, and
    a subset without a vote is wrong. Of answers given equally often, the one that came
    first among all of the prompt's completions wins. An answer is right if the first
    completion that gave it is.

    Args:
      answers: of `N` prompts, what each of their completions answers; None for nothing.
        Compared as text: make one form of `1/2` and `0.5` before.
      right: of `N` prompts, whether each completion is right.
      k: from 1 to the number of completions of any prompt.
      draws: subsets of a prompt's completions.
      seed: of the subsets.

    Returns:
      `[N]` float64.

    Raises:
      ValueError: for a `k` out of range, or answers and `right` that do not go together.
    """

    def of_prompt(i: int) -> float:
        n = len(answers[i])
        if n != len(right[i]):
            raise ValueError(f"prompt {i} has {n} answers, of which {len(right[i])} are said to be right or wrong")
        if not 1 <= k <= n:
            raise ValueError(f"k is from 1 to the number of completions, {n} of prompt {i}, got {k}")
        given = list(dict.fromkeys(answer for answer in answers[i] if answer is not None))  # in order of appearance
        if not given:
            return 0.0
        first_right = np.array([right[i][list(answers[i]).index(answer)] for answer in given], bool)
        votes = np.array([[answer == other for other in given] for answer in answers[i]])  # [n, answers]
        counts = votes[_subsets(n, k, draws, [seed, i])].sum(axis=1)  # [subsets, answers]
        winner = counts.argmax(axis=1)  # the first, where there are several
        return float(np.mean(first_right[winner] & (counts.max(axis=1) > 0)))

    if len(answers) != len(right):
        raise ValueError(f"answers of {len(answers)} prompts, but right or wrong of {len(right)}")
    return np.array([of_prompt(i) for i in range(len(answers))], np.float64)


def _subsets(n: int, k: int, draws: int, seed: Sequence[int]) -> np.ndarray:
    """`[subsets, k]`: every subset of `k` of `n`, if they are at most `draws`, else as many random ones."""
    if math.comb(n, k) <= draws:
        return np.array(list(itertools.combinations(range(n), k)))
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)[:, :k]
