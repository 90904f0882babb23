"""The dtype to compute in: float16 only for whoever scales the loss."""

import jax.numpy as jnp
import pytest

from grpo_jax.run.precision import compute_dtype


def test_float16_is_refused_where_the_loss_has_no_scale():
    assert compute_dtype() == jnp.float32  # on a CPU
    assert compute_dtype("bfloat16") == jnp.bfloat16
    assert compute_dtype("float16", float16=True) == jnp.float16
    with pytest.raises(ValueError, match="float16 need a scale of the loss, and here is none: take bfloat16"):
        compute_dtype("float16")
