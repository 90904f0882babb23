"""Metrics and completions for TensorBoard and Weights & Biases, as functions of a step."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from grpo_jax.run import metrics
from grpo_jax.run.metrics import RunDir


class Write(Protocol):
    """Takes what a run measures."""

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, as numbers or 0-d arrays."""


class WriteCompletions(Protocol):
    """Takes what a policy samples."""

    def __call__(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Takes some completions of a step, one dict of plain values for each."""


class Writer(NamedTuple):
    """Where a run is followed beside its folder."""

    metrics: Write
    completions: WriteCompletions


def check_installed(*, tensorboard: bool = False, wandb: str | None = None) -> None:
    """Refuses to follow a run by what is not installed; a script that asks first need not read a model for that.

    Raises:
      ImportError: without the extra.
    """
    for wanted, module, message in ((tensorboard, "tensorboardX", _NO_TENSORBOARD), (wandb, "wandb", _NO_WANDB)):
        if wanted and sys.modules.get(module) is None and importlib.util.find_spec(module) is None:
            raise ImportError(message)


_NO_TENSORBOARD = "TensorBoard needs an extra: pip install 'grpo-jax[tensorboard]'"
_NO_WANDB = "Weights & Biases needs an extra: pip install 'grpo-jax[wandb]'"


def tensorboard(log_dir: RunDir, **options: Any) -> Writer:
    """Writes TensorBoard's event files.

    A file follows some seconds later, and is complete when the process has ended, other than by a kill.

    Args:
      log_dir: where to.
      options: of `SummaryWriter`, such as `purge_step` in a resumed run.

    Raises:
      ImportError: without the extra `tensorboard`.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(_NO_TENSORBOARD) from error
    writer = SummaryWriter(os.fspath(log_dir), **{"flush_secs": 5} | options)

    def write(step: int, values: Mapping[str, Any]) -> None:
        for name, value in metrics.plain(values).items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, step)

    def write_completions(step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        texts = ("  \n".join(f"**{name}** {value}" for name, value in line.items()) for line in lines)
        writer.add_text("completions", "\n\n---\n\n".join(texts), step)

    return Writer(write, write_completions)


def wandb(**init: Any) -> Writer:
    """Writes to Weights & Biases.

    Args:
      init: of `wandb.init`, such as `project`, `id` and `resume="must"`.

    Raises:
      ImportError: without the extra `wandb`.
    """
    try:
        import wandb as client
    except ImportError as error:
        raise ImportError(_NO_WANDB) from error
    run = client.init(**init)

    def write_completions(step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(name for line in lines for name in line))
        table = client.Table(columns=columns, data=[[line.get(name) for name in columns] for line in lines])
        run.log({"completions": table}, step=step)

    return Writer(lambda step, values: run.log(metrics.plain(values), step=step), write_completions)
