"""What all tests share."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of a finished file are let go: over all files they would take gigabytes."""
    yield
    jax.clear_caches()
