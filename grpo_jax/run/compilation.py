"""Compiled programs: kept between runs, and counted within one; and what compiling them has freed, given back."""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax._src import compilation_cache  # nothing public tells where a program is kept

from grpo_jax.programs import give_back_freed

_COMPILED = "/jax/core/compile/backend_compile_duration"  # of a program compiled, or fetched where it is kept


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keeps what XLA compiles in a folder, so that the next run of the same programs starts at once.

    Tracing is still done. Where JAX has such a folder already, from `JAX_COMPILATION_CACHE_DIR`
    or its configuration, that one stays. A file that cannot be read, as one that a full disk has cut, is taken away, so
    that the program is kept anew; JAX alone warns of it at every start.

    Args:
      folder: where to; `grpo_jax/programs` in the user's cache folder if not given.

    Returns:
      The folder in use.
    """
    if known := jax.config.values["jax_compilation_cache_dir"]:
        _take_away_what_is_cut(pathlib.Path(known))
        return pathlib.Path(known)
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = caches / "grpo_jax" / "programs" if folder is None else pathlib.Path(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _take_away_what_is_cut(folder)
    return folder


@functools.cache
def _take_away_what_is_cut(folder: pathlib.Path) -> None:
    jax_internals: Any = compilation_cache
    read = jax_internals.get_executable_and_time

    def reading(cache_key: str, *arguments: Any) -> Any:
        try:
            return read(cache_key, *arguments)
        except Exception:  # of its compression, of XLA, of an older format: the file is of no use
            (folder / f"{cache_key}-cache").unlink(missing_ok=True)
            raise  # JAX warns, compiles and keeps the program

    jax_internals.get_executable_and_time = reading


def count_compilations() -> Callable[[], int]:
    """A function that tells how many programs were compiled, or fetched from the cache, since now.

    In a loop that is well made it stays where it is after the first few steps: a number that
    goes on growing says that shapes or settings change where they should not.
    """
    count = 0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal count
        count += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: count


def trim_malloc(seconds: float = 0.1) -> Callable[[], None]:
    """From now on, what compiling has used and freed goes back to the system after each program of the process.

    XLA compiles in many threads, and the GNU C library keeps what they free, for them to use again: hundreds of MiB
    of a process that may need them no more. With another C library nothing is done. `step.jit()` does so by itself for
    the programs of a step, and `run.loop` for all that are compiled within it.

    Args:
      seconds: programs that compile faster leave little and are passed over; giving back takes milliseconds.

    Returns:
      A function that ends it.
    """

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and duration_secs >= seconds:
            give_back_freed()

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: jax.monitoring.unregister_event_duration_listener(listen)
