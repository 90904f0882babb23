"""The settings of scripts that say what a run is evaluated on, and how often.

```python
@dataclasses.dataclass(frozen=True)
class Config(EvaluationSettings):
    model: str

rows, held_out = config.hold_out(config.read(config.data), config.read, seed=config.seed)
```
"""

import dataclasses
import pathlib
from collections.abc import Callable

from grpo_jax import data
from grpo_jax.data import Row
from grpo_jax.run import ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """An evaluation on rows that nothing is learned from, if there are some."""

    eval_data: pathlib.Path | None = None
    eval_rows: int = 0  # without --eval-data: held out of the data
    eval_batch: int = 64
    eval_group_size: int | None = None  # sample so many completions of each prompt; otherwise one likeliest completion
    evaluate_every: int = 50

    @property
    def evaluated_group(self) -> int | None:
        """Completions of a prompt in an evaluation; None without one."""
        return (self.eval_group_size or 1) if self.eval_data or self.eval_rows else None

    def hold_out(
        self, rows: list[Row], read: Callable[[pathlib.Path], list[Row]], *, seed: int
    ) -> tuple[list[Row], list[Row]]:
        """The rows to train on and those to evaluate on; settings of an evaluation without one are told.

        Raises:
          ValueError: for both a file of them and a number, a group's size without either, and as `data.hold_out`.
        """
        if self.evaluated_group is None:
            if self.eval_group_size is not None:
                raise ValueError(
                    f"--eval-group-size {self.eval_group_size} is of an evaluation: --eval-rows or --eval-data"
                )
            ranges.tell_unused(self, ["eval_batch", "evaluate_every"], without="--eval-rows or --eval-data")
        if self.eval_data is None:
            return data.hold_out(rows, self.eval_rows, seed=seed) if self.eval_rows else (rows, [])
        if self.eval_rows:
            raise ValueError(f"--eval-rows {self.eval_rows} are held out of --data: leave them out beside --eval-data")
        return rows, read(self.eval_data)
