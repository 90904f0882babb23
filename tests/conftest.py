"""What all tests share. Most of their time goes into compiling, so that is done once and without optimisation.

`XLA_FLAGS= pytest` optimises as a run does. CI does so for the slow tests; its smoke runs and quickstart know nothing
of this file.
"""

import gc
import os
import shutil
import tempfile

import jax
import pytest
from compiling import QUICKLY

from grpo_jax.rewards.sandbox import bubblewrap

os.environ.setdefault("XLA_FLAGS", QUICKLY)


def pytest_configure(config):
    """One folder of compiled programs for all workers and for the runs that tests start."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_collection_finish():
    """Modules and collected tests stay; looking through them again and again took a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure(config):
    """The worker processes have ended by now."""
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


@pytest.fixture(scope="session")
def sandbox():
    """For tests of code that is run: they are skipped, with the reason, where the system has no sandbox."""
    try:
        bubblewrap()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a finished file are let go: over all files they would take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
