"""A script's function as a command."""

import dataclasses
import io
import sys
import traceback
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
    smoke: Callable[[Config], Config] | None = None,
) -> None:
    """Reads the settings from the command line and calls `function(config)`, with compiled programs kept on disk.

    An error of the input (`ValueError`, `OSError`, `ImportError`, `SyntaxError` of a module) ends in one line, unless
    `--traceback` is given; and so does `sys.exit(0)` of code that is called or imported, with another status than that
    of a script that is done. What the terminal cannot write is written in escapes. Of an option that is given twice the
    last one counts, as in other commands; but one that takes several values is refused, since the first ones would be
    lost.

    Args:
      function: the script's.
      config: a dataclass, whose fields become options.
      description: for `--help`, usually the script's docstring.
      default: the settings that options change; `config()` unless given.
      smoke: makes of the settings those of the least run there is, where the field `smoke` of `config` is True.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    start = tyro.MISSING_NONPROP if default is None else default
    settings: Any = tyro.cli(config, description=description, args=arguments, default=start)
    if lost := _given_twice(arguments, settings):
        sys.exit(f"error: {lost} is given twice: write all of its values behind one, as in {lost} first second")
    compilation.enable_compilation_cache()
    compilation.trim_malloc()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # completions and paths are any text
    try:
        function(smoke(settings) if smoke is not None and settings.smoke else settings)
    except SystemExit as error:
        if error.code:
            raise
        *_, place = traceback.extract_tb(error.__traceback__)
        sys.exit(f"error: {place.filename}, line {place.lineno}, ended the script with sys.exit() before it was done")
    except (ValueError, OSError, ImportError, SyntaxError) as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK" not in note)
        sys.exit(f"error: {error}{notes}\n  (--traceback shows where)")


def _given_twice(arguments: list[str], settings: Any) -> str | None:
    """An option of several values that is there more than once."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    several = {
        field.name for field in dataclasses.fields(settings) if isinstance(getattr(settings, field.name), tuple | dict)
    }
    return next((f for f in flags if flags.count(f) > 1 and f[2:].replace("-", "_") in several), None)
