"""Matrix products of rows that are sorted by group, each group with a kernel of its own.

`jax.lax.ragged_dot`, but for large products on CPUs, where XLA has none: it makes a copy of the rows for each group and
multiplies all of them with all kernels. Here a loop goes through blocks of rows, each with its group's kernel alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.types import Array

_ROWS = 128  # of a block at most: enough for a matrix product at full speed
_SMALL = 2**20  # multiplications of all rows with all kernels that take no longer than a loop, which compiles longer


def product(x: Array, kernels: Array, sizes: Array) -> Array:
    """`y[i] = x[i] @ kernels[e]`, with `e` the group of row `i`.

    Args:
      x: `[N, in]`, sorted by group.
      kernels: `[E, in, out]`.
      sizes: `[E]` int32, the rows of each group, `N` in all.

    Returns:
      `[N, out]`, in the dtype of `x`.
    """
    small = x.shape[0] * kernels.size <= _SMALL
    return jax.lax.ragged_dot(x, kernels, sizes) if small else _large(x, kernels, sizes)


@jax.custom_vjp
def _large(x: Array, kernels: Array, sizes: Array) -> Array:
    return jax.lax.platform_dependent(x, kernels, sizes, cpu=_by_blocks, default=jax.lax.ragged_dot)


def _forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _large(x, kernels, sizes), (x, kernels, sizes)


def _backward(kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    """`dx[i] = dy[i] @ kernels[e].T` and `dkernels[e] = sum over its rows i: x[i].T dy[i]`."""
    x, kernels, sizes = kept

    def of_rows(x: Array, kernels: Array, sizes: Array, cotangent: Array) -> Array:
        return jax.vjp(lambda x: jax.lax.ragged_dot(x, kernels, sizes), x)[1](cotangent)[0]

    def of_kernels(x: Array, kernels: Array, sizes: Array, cotangent: Array) -> Array:
        return jax.vjp(lambda kernels: jax.lax.ragged_dot(x, kernels, sizes), kernels)[1](cotangent)[0]

    def of_rows_by_blocks(x: Array, kernels: Array, sizes: Array, cotangent: Array) -> Array:
        return _by_blocks(cotangent, kernels, sizes, contract=2).astype(x.dtype)

    # Apart, so that the compiler leaves out those of kernels that are frozen.
    given = x, kernels, sizes, cotangent
    dx = jax.lax.platform_dependent(*given, cpu=of_rows_by_blocks, default=of_rows)
    dkernels = jax.lax.platform_dependent(*given, cpu=_of_kernels_by_blocks, default=of_kernels)
    return dx, dkernels, None


_large.defvjp(_forward, _backward)


def _by_blocks(x: Array, kernels: Array, sizes: Array, contract: int = 1) -> Array:
    """`x[i] @ kernels[e]`, or with `contract=2` `x[i] @ kernels[e].T`."""
    N, rows = x.shape[0], _rows_of_a_block(x.shape[0], sizes)
    x = jnp.pad(x, ((0, rows), (0, 0)))  # else a slice that ends beyond would begin before its row

    def step(y: Array, group: Array, row: Array, left: Array) -> Array:
        block = jax.lax.dynamic_slice_in_dim(x, row, rows)
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        found = jax.lax.dot_general(block, kernel, (((1,), (contract - 1,)), ((), ())))
        # The last rows of a block may be the next group's, whose own block comes after and is written over them.
        return jax.lax.dynamic_update_slice_in_dim(y, found, row, axis=0)

    return _each_block(step, jnp.zeros((N + rows, kernels.shape[3 - contract]), x.dtype), rows, sizes)[:N]


def _of_kernels_by_blocks(x: Array, kernels: Array, sizes: Array, cotangent: Array) -> Array:
    rows = _rows_of_a_block(x.shape[0], sizes)
    x, cotangent = (jnp.pad(rows_of, ((0, rows), (0, 0))) for rows_of in (x, cotangent))

    def step(total: Array, group: Array, row: Array, left: Array) -> Array:
        block, dy = (jax.lax.dynamic_slice_in_dim(rows_of, row, rows) for rows_of in (x, cotangent))
        block = jnp.where(jnp.arange(rows)[:, None] < left, block, 0)
        added = jax.lax.dot_general(block, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        held = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, held + added, group, axis=0)

    return _each_block(step, jnp.zeros(kernels.shape, jnp.float32), rows, sizes).astype(kernels.dtype)


def _rows_of_a_block(N: int, sizes: Array) -> int:
    """A mean group, so that at most twice the rows are multiplied; no more than `_ROWS`."""
    return max(1, min(_ROWS, N // sizes.shape[0]))


def _each_block(step: Callable[[Array, Array, Array, Array], Array], state: Array, rows: int, sizes: Array) -> Array:
    """`step(state, group, first row, rows that the group has from there)` for each block of each group in turn."""
    blocks = -(-sizes // rows)
    ends, first = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes

    def one(n: Array, state: Array) -> Array:
        group = jnp.sum(ends <= n)
        done = (n - (ends - blocks)[group]) * rows
        return step(state, group, first[group] + done, sizes[group] - done)

    return jax.lax.fori_loop(0, ends[-1], one, state)
