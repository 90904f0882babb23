"""The `jax.jit` of these tests: what shares a program, and what must not."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_programs import Alike


@pytest.fixture
def jit():
    """One that counts what it was asked for."""
    return Alike(lambda function, **options: (function, options))


def scaled(factor, by=math.sin):
    def function(x):
        return factor * by(x)

    return function


def test_functions_of_the_same_code_and_settings_share_a_program(jit):
    assert jit(scaled(2.0)) is jit(scaled(2.0))
    assert jit(scaled(scaled(2.0))) is jit(scaled(scaled(2.0)))
    assert jit(functools.partial(scaled, by=("a", ["b"]))) is jit(functools.partial(scaled, by=("a", ["b"])))
    noise = np.ones(3)
    assert jit(scaled(noise)) is jit(scaled(noise))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), ("a", "b"), (scaled(1), scaled(2)), ((1, 2), (2, 1)), ({"a": 1}, {"b": 1}),
        ([], []), ({1}, {1}), (np.ones(3), np.ones(3)), (jnp.ones(3), jnp.ones(3)), (jnp.float32, jnp.bfloat16),
    ],
)  # fmt: skip
def test_what_differs_or_may_change_has_a_program_of_its_own(jit, one, other):
    assert jit(scaled(one)) is not jit(scaled(other))


def test_other_options_are_another_program(jit):
    assert jit(scaled(1.0), static_argnums=0) is not jit(scaled(1.0))


def test_what_a_test_replaces_is_not_shared_and_what_it_puts_back_is(jit):
    before = jit(scaled(2.0))
    with pytest.MonkeyPatch.context() as patch:
        jit.patches.add(patch)
        patch.setattr(math, "pi", 3)
        replaced = jit(scaled(2.0))
        assert replaced is not before
    assert jit(scaled(2.0)) is before


def test_a_program_is_traced_anew_where_a_test_replaces_what_its_code_looks_up(monkeypatch):
    class Names:
        bias = 1.0

    def make():
        return jax.jit(lambda x: x + Names.bias)

    assert make()(1.0) == 2.0
    monkeypatch.setattr(Names, "bias", 2.0)
    assert make()(1.0) == 3.0
    monkeypatch.undo()
    assert make()(1.0) == 2.0
