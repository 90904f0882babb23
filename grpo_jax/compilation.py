"""Compiled programs: kept between runs, and counted within one."""

import os
import pathlib
from collections.abc import Callable

import jax


def keep_programs(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keeps what XLA compiles in a folder, so that the next run of the same programs starts at once.

    Tracing is still done. Where JAX has such a folder already, from `JAX_COMPILATION_CACHE_DIR`
    or its configuration, that one stays.

    Args:
      folder: where to; `grpo_jax/programs` in the user's cache folder if not given.

    Returns:
      The folder in use.
    """
    if known := jax.config.values["jax_compilation_cache_dir"]:
        return pathlib.Path(known)
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = caches / "grpo_jax" / "programs" if folder is None else pathlib.Path(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def count_programs() -> Callable[[], int]:
    """A function that tells how many programs were compiled, or fetched from the folder of `keep_programs`, since now.

    In a loop that is well made it stays where it is after the first few steps: a number that
    goes on growing says that shapes or settings change where they should not.
    """
    count = 0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: count
