"""What all tests share. Most of their time goes into tracing and compiling, which is done once, without optimisation.

`XLA_FLAGS= pytest` optimises as a run does. CI does so for the slow tests; its smoke runs and quickstart know nothing
of this file.
"""

import functools
import gc
import os
import pathlib
import shutil
import tempfile
import types

import jax
import pytest
from compiling import QUICKLY
from jax._src.interpreters import mlir
from same_programs import Alike

from grpo_jax.programs import give_back_freed
from grpo_jax.rewards.sandbox import bubblewrap
from grpo_jax.run import metrics, plots, training_loop

os.environ.setdefault("XLA_FLAGS", QUICKLY)

# A program is written in a context that knows all of JAX's operations. To make one for each program took most of the
# time of lowering a small one, of which the tests have some ten thousand.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

_SHARED = jax.jit = Alike(jax.jit)
_SHARED.install()

_KEPT = 3 * 1024**3  # bytes of a process from which on its compiled programs are let go


def _resident():
    """Bytes of memory that this process holds; infinite where the system does not tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return float("inf")
    return pages * os.sysconf("SC_PAGE_SIZE")


def pytest_configure(config):
    """One folder of compiled programs for all workers and for the runs that tests start.

    The programs of single operations are in it, too: to read one takes half of compiling it, to write it nothing that
    can be measured. Programs do without the lines of Python that made them: writing these down took an eighth of
    compiling.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
    gc.disable()  # until all is collected: what is imported and collected stays


def pytest_collection_finish():
    """Modules and collected tests stay; looking through them again and again took a sixth of the time."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure(config):
    """The worker processes have ended by now."""
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _few_curves():
    """A run ends by drawing each of its metrics, some thirty panels in over a second; here it draws the first two.

    Those of test_plots.py are drawn whole, and curves that a run asks for are.
    """

    def plot(run_dir, *, keys=None):
        numbers = {name for line in metrics.read(run_dir) for name, x in line.items() if isinstance(x, int | float)}
        return plots.plot(run_dir, keys=sorted(numbers - {"step"})[:2] if keys is None else keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "plots", types.SimpleNamespace(plot=plot))
        yield


@pytest.fixture(scope="session")
def sandbox():
    """For tests of code that is run: they are skipped, with the reason, where the system has no sandbox."""
    try:
        bubblewrap()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs are let go between files where they take much: over all files it would be gigabytes.

    Until then they stay: the small programs of single operations are the same in most files, and to look for garbage
    takes a fifth of a second, or whole seconds where they are many.
    """
    yield
    if _resident() > _KEPT:
        _SHARED.known.clear()
        mlir.make_ir_context.cache_clear()
        jax.clear_caches()
        gc.collect()
        give_back_freed()
