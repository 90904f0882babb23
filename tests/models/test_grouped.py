"""Grouped products, also by blocks of rows as on CPUs, against a loop over the rows in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import grouped

E, IN, OUT = 5, 24, 20
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@jit
def computed(x, kernels, sizes, cotangent):
    y, pull = jax.vjp(lambda x, kernels: grouped.product(x, kernels, sizes), x, kernels)
    return y, *pull(cotangent)


def in_numpy(x, kernels, sizes, cotangent):
    x, kernels, dy = (np.asarray(array, np.float64) for array in (x, kernels, cotangent))
    of_row = np.repeat(np.arange(E), sizes)
    dkernels = np.zeros(kernels.shape)
    np.add.at(dkernels, of_row, x[:, :, None] * dy[:, None, :])
    y = np.stack([row @ kernels[e] for row, e in zip(x, of_row, strict=True)])
    return y, np.stack([row @ kernels[e].T for row, e in zip(dy, of_row, strict=True)]), dkernels


@pytest.mark.parametrize(
    "sizes",
    [
        [120, 120, 120, 120, 120],  # a block each, to the row
        [600, 0, 0, 0, 0],
        [0, 0, 0, 0, 600],
        [1, 241, 0, 119, 239],  # blocks that end among the rows of others, and beyond the last
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_each_row_is_multiplied_with_its_groups_kernel(dtype, sizes):
    assert 600 * E * IN * OUT > grouped._SMALL  # by blocks
    rng = np.random.default_rng(0)
    x, kernels, cotangent = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((600, IN), (E, IN, OUT), (600, OUT))
    )
    found = computed(x, kernels, jnp.array(sizes, jnp.int32), cotangent)
    for actual, expected in zip(found, in_numpy(x, kernels, sizes, cotangent), strict=True):
        assert actual.dtype == dtype
        rounding = 1e-6 if dtype == jnp.float32 else 2**-8  # sums are float32, also over the blocks of a kernel
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rounding, atol=3e-5)


def test_blocks_multiply_no_row_with_all_kernels_and_hold_no_copy_for_each():
    """What XLA makes of `ragged_dot` on a CPU does both."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, 64), (8, 64, 64))]
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = jit(grouped.product).lower(*shapes, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 64 * 4
