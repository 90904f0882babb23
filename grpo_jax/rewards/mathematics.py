"""Whether a completion's mathematical answer is the right one."""

from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.pool import WorkerPool, in_worker_processes


def accuracy(
    *,
    column: str | None = None,
    tolerance: float = 0.0,
    decimals: int = 6,
    characters: int = 10_000,
    pool: WorkerPool | None = None,
    workers: int = 2,
    timeout: float = 5.0,
    memory: int = 2 * 2**30,
) -> Callable[..., list[float | None]]:
    r"""1 where the completion's answer equals the gold one as mathematics, else 0 (math-verify 0.9).

    The rule is that of TRL's `accuracy_reward`, except that a gold answer that is bare
    mathematics is taken whole (of `2\sqrt{2}` TRL takes the first 2), and of one with `####`
    what follows. The gold answer is parsed as LaTeX or as a plain expression; where that
    fails the item is masked. The completion's answer is
    LaTeX: the last `\boxed{}`, or else what stands in a LaTeX environment after "the
    final answer is" or "answer". Units, thousands separators, percent signs and the like are
    normalised away. The two are compared as numbers, sets, intervals, matrices,
    relations or formulas; `\frac{1}{2}`, `0.5` and `\frac{2}{4}` are one answer. An answer that is
    missing or cannot be parsed scores 0, and so does one whose parsing takes longer than
    `timeout` or more than `memory`. A fault of the verifier masks (see `in_worker_processes`).

    Args:
      column: the data set's column of gold answers; by default `solution`, or else `answer`.
      tolerance: two real numbers are also equal up to this share of the gold one; 0 for no such rule.
      decimals: places to which numbers are rounded before they are compared, where one of them is a decimal fraction.
      characters: how much of the completion's end the parser is shown. It has the answer, and what
        a parser does to the rest costs time.
      pool: worker processes to share with other rewards.
      workers: how many worker processes, in a pool of its own.
      timeout: seconds for a completion, in a pool of its own.
      memory: bytes for a worker process, in a pool of its own.

    Raises:
      ImportError: without math-verify.
      ValueError: for a setting out of range; from the reward, if the data set has no such column.
    """
    try:
        from grpo_jax.rewards import symbolic
    except ImportError as error:
        raise ImportError("the accuracy reward needs math-verify: pip install 'grpo-jax[math]'") from error
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a share of the gold number, at least 0 and below 1, got {tolerance}")
    if decimals < 0 or characters < 1:
        raise ValueError(f"decimals is at least 0 and characters at least 1, got {decimals} and {characters}")
    judge = in_worker_processes(
        symbolic.accuracy,
        pool=pool,
        workers=workers,
        timeout=timeout,
        memory=memory,
        settings={"tolerance": tolerance, "decimals": decimals, "characters": characters},
        name="accuracy",
    )

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        names = ("solution", "answer") if column is None else (column,)
        found = next((name for name in names if name in columns), None)
        if found is None:
            raise ValueError(f"the accuracy reward needs a column {' or '.join(names)} with the gold answers")
        return judge(prompts, completions, gold=columns[found], log_metric=columns.get("log_metric"))

    reward.__name__ = reward.__qualname__ = "accuracy"
    return reward
