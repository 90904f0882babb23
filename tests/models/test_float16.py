"""What overflows float16 goes on as its largest number, in dense MLPs and in experts, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import float16
from grpo_jax.models.experts import Experts
from grpo_jax.models.mixture import mixture


def test_only_float16_is_kept_within_its_range():
    for dtype, expected in ((jnp.float16, 65504.0), (jnp.float32, np.inf)):
        found = float16.within(jnp.array([np.inf, -np.inf, 1.0], dtype))
        np.testing.assert_array_equal(found, np.array([expected, -expected, 1.0]))


@pytest.mark.parametrize("clip", [None, (1.7, 7.0)])
def test_gates_of_experts_that_overflow_give_numbers_and_gradients(clip):
    settings = Experts(2, 1, 4, normalised=True, clip=clip)
    weights = {"router": jnp.eye(4, 2)}
    for name, value in (("experts_gate", -300.0), ("experts_up", 300.0), ("experts_down", 300.0)):
        weights[name] = {"kernel": jnp.full((2, 4, 4), value, jnp.float16)}
    x = jnp.full((1, 4), 100.0, jnp.float16)  # whose gates are -120000

    def summed(x):
        return jnp.sum(mixture(x, weights, settings, jax.nn.silu).rows)

    value, gradient = jax.jit(jax.value_and_grad(summed))(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
