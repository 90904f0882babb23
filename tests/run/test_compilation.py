"""Programs are kept between processes and counted within one."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.compiler_options import saving_memory
from grpo_jax.run.compilation import count_compilations

COMPILE = """
import jax, os, pathlib, sys
from grpo_jax.run.compilation import enable_compilation_cache

def compile():
    folder = enable_compilation_cache(*sys.argv[2:])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
    jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((3, 3)))
    print(folder, sum(hits), flush=True)

for step in sys.argv[1].split():  # each in a process that starts JAX, of one that has only imported it
    if step == "cut":
        for file in pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("*-cache"):
            file.write_bytes(file.read_bytes()[:-20])
    elif (process := os.fork()) == 0:
        compile()
        os._exit(0)
    else:
        assert os.waitpid(process, 0)[1] == 0
"""


def compile_in_processes(steps, *arguments, **environment):
    """The folder in use, and how many programs came from it, of each process."""
    kept_out = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in kept_out} | environment
    command = [sys.executable, "-c", COMPILE, steps, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    return [(folder, int(hits)) for folder, hits in found]


def test_a_second_process_finds_the_programs_of_the_first_and_one_whose_file_was_cut_is_kept_anew(tmp_path):
    found = compile_in_processes("first second cut third fourth", XDG_CACHE_HOME=str(tmp_path))
    folders, hits = zip(*found, strict=True)
    assert folders == (str(tmp_path / "grpo_jax" / "programs"),) * 4
    assert [n > 0 for n in hits] == [False, True, False, True]


def test_the_users_own_folder_stays(tmp_path):
    users = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "users")}
    ((folder, _),) = compile_in_processes("first", tmp_path / "own", **users)
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
import ctypes, os, pathlib, jax
from grpo_jax.run.compilation import trim_malloc

def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

seconds = 0.0 if (process := os.fork()) == 0 else 1e6
trim_malloc(seconds)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [c.malloc(60_000) for _ in range(4_000)]  # too small to be mapped by themselves
for block in blocks:
    ctypes.memset(block, 1, 60_000)
for block in blocks[:-1]:  # the last holds the others where they are
    c.free(ctypes.c_void_p(block))
before = resident()
jax.jit(lambda x: jax.numpy.sin(x) @ x).lower(jax.ShapeDtypeStruct((3, 3), "float32")).compile()
os.write(1, f"{seconds} {before - resident()}\\n".encode())  # in one piece, beside the other process
if process == 0:
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
def test_freed_memory_goes_back_after_a_program_that_took_long():
    done = subprocess.run([sys.executable, "-c", LEAVE_BEHIND], capture_output=True, text=True, check=True)
    returned = dict(map(str.split, done.stdout.splitlines()))  # MiB of 230, by the seconds that are long
    assert int(returned["0.0"]) > 100
    assert int(returned["1000000.0"]) <= 100  # compiling takes some itself
