"""A script's function as a command."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from grpo_jax.run import compilation

Config = TypeVar("Config")


def command(
    function: Callable[[Config], Any],
    config: type[Config],
    description: str | None = None,
    *,
    default: Config | None = None,
) -> None:
    """Reads the settings from the command line and calls `function(config)`, with compiled programs kept on disk.

    An error of the input (`ValueError`, `OSError`, `ImportError`) ends in one line, unless
    `--traceback` is given.

    Args:
      function: the script's.
      config: a dataclass, whose fields become options.
      description: for `--help`, usually the script's docstring.
      default: the settings that options change; `config()` unless given.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    start = tyro.MISSING_NONPROP if default is None else default
    settings = tyro.cli(config, description=description, args=arguments, default=start)
    compilation.enable_compilation_cache()
    compilation.trim_malloc()
    try:
        function(settings)
    except (ValueError, OSError, ImportError) as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        sys.exit(f"error: {error}{notes}\n  (--traceback shows where)")
