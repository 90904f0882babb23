"""Programs are kept between processes and counted within one."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.compiler_options import saving_memory
from grpo_jax.run.compilation import count_compilations

COMPILE = """
import jax, sys
from grpo_jax.run.compilation import enable_compilation_cache
print(enable_compilation_cache(*sys.argv[1:]))
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


def test_a_program_whose_file_was_cut_is_kept_anew(tmp_path):
    folder, _ = compile_in_a_process(XDG_CACHE_HOME=str(tmp_path))
    for file in pathlib.Path(folder).glob("*-cache"):
        file.write_bytes(file.read_bytes()[:-20])
    assert compile_in_a_process(XDG_CACHE_HOME=str(tmp_path))[1] == 0
    assert compile_in_a_process(XDG_CACHE_HOME=str(tmp_path))[1] > 0


def test_the_users_own_folder_stays(tmp_path):
    folder, _ = compile_in_a_process(tmp_path / "own", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "users"))
    assert folder == str(tmp_path / "users")
    assert list((tmp_path / "users").iterdir())
    assert not (tmp_path / "own").exists()


def test_programs_are_counted_as_they_are_compiled():
    count = count_compilations()
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


def test_the_options_make_a_program_take_less_memory():
    def sums(x):
        return sum(jnp.sum(jnp.sin(x @ x * n) @ x) for n in range(8))  # eight that need not be there at once

    def temporary(options):
        x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
        return jax.jit(sums, compiler_options=options).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(saving_memory()) <= 3 * 128 * 128 * 4  # jax 0.12 orders this one so by itself


LEAVE_BEHIND = """
import ctypes, pathlib, sys, jax
from grpo_jax.run.compilation import trim_malloc

def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

trim_malloc(float(sys.argv[1]))
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [c.malloc(60_000) for _ in range(4_000)]  # too small to be mapped by themselves
for block in blocks:
    ctypes.memset(block, 1, 60_000)
for block in blocks[:-1]:  # the last holds the others where they are
    c.free(ctypes.c_void_p(block))
before = resident()
jax.jit(lambda x: jax.numpy.sin(x) @ x).lower(jax.ShapeDtypeStruct((3, 3), "float32")).compile()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
@pytest.mark.parametrize(("seconds", "returned"), [(0.0, True), (1e6, False)])
def test_freed_memory_goes_back_after_a_program_that_took_long(seconds, returned):
    command = [sys.executable, "-c", LEAVE_BEHIND, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 100) == returned  # of 230 MiB; compiling takes some itself
