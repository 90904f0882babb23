"""Programs are kept between processes and counted within one."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from grpo_jax.compilation import count_programs

COMPILE = """
import jax, sys
from grpo_jax.compilation import keep_programs
print(keep_programs(*sys.argv[1:]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((3, 3)))
print(sum(hits))
"""


def compile_in_a_process(*arguments, **environment):
    """The folder in use, and how many programs came from it."""
    kept_out = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in kept_out} | environment
    command = [sys.executable, "-c", COMPILE, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder, hits = done.stdout.split()
    return folder, int(hits)


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    folder, hits = compile_in_a_process(XDG_CACHE_HOME=str(tmp_path))
    assert (folder, hits) == (str(tmp_path / "grpo_jax" / "programs"), 0)
    again, hits = compile_in_a_process(XDG_CACHE_HOME=str(tmp_path))
    assert again == folder
    assert hits > 0


def test_the_users_own_folder_stays(tmp_path):
    folder, _ = compile_in_a_process(tmp_path / "own", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "users"))
    assert folder == str(tmp_path / "users")
    assert list((tmp_path / "users").iterdir())
    assert not (tmp_path / "own").exists()


def test_programs_are_counted_as_they_are_compiled():
    count = count_programs()
    assert count() == 0
    double = jax.jit(lambda x: 2 * x + 1)
    x, y = jnp.ones(3), jnp.ones(4)
    before = count()
    double(x)
    double(x + 0)
    first = count()
    assert first > before
    double(x)
    assert count() == first
    double(y)
    assert count() == first + 1
