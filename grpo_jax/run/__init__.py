"""Around a step: `run.loop` with checkpoints, metrics, display and warnings; `run.command` for scripts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.run.command_line import command
    from grpo_jax.run.training_loop import Loop, loop

_HOME = {"Loop": "training_loop", "loop": "training_loop", "command": "command_line"}

__all__ = ["Loop", "command", "loop"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
