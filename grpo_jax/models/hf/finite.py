"""Weights that are NaN or infinite are refused before they are written."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.freezing import named_leaves
from grpo_jax.models import lora
from grpo_jax.types import Array, Params


def check_finite(params: Params, dtypes: Sequence[np.dtype] | None = None) -> None:
    """Refuses params that an export could not be read with.

    Of several processes all call it.

    Args:
      params: of a model, or adapters.
      dtypes: that they are written in, one each; None for their own.

    Raises:
      ValueError: with the names of those that are NaN or infinite, as they are or in the dtype asked for.
    """
    named = named_leaves(params)
    if dtypes is None:
        dtypes = [jnp.dtype(leaf.dtype) for _, leaf in named]
    wrong = [name for (name, leaf), dtype in zip(named, dtypes, strict=True) if not _are_finite(leaf, dtype)]
    if wrong:
        raise ValueError(
            f"weights that are NaN or infinite, in {len(wrong)} parameters: {', '.join(wrong[:3])}: nothing is "
            "written; export an earlier checkpoint"
        )


def _are_finite(leaf: Array | lora.Merged, dtype: np.dtype) -> bool:
    parts = [leaf[layer,] for layer in range(leaf.shape[0])] if isinstance(leaf, lora.Merged) else [leaf]
    return all(bool(_is_finite(part, dtype)) for part in parts)


@functools.partial(jax.jit, static_argnums=1)
def _is_finite(leaf: Array, dtype: np.dtype) -> Array:
    return jnp.all(jnp.isfinite(leaf.astype(dtype)))
