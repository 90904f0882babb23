"""Metrics as statistics that merge exactly: what parts of a batch measured adds up to what the whole measures."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, Metrics


class Mean(NamedTuple):
    """A mean as the two sums it is made of, so that parts of a batch add up exactly."""

    sum: Array  # []
    count: Array  # type: ignore[assignment]  # []; hides tuple.count, which nobody misses


class Max(NamedTuple):
    """A maximum; parts of a batch merge by `maximum`."""

    value: Array  # []


Statistics = TypeVar("Statistics")


def _is_statistic(node: Any) -> bool:
    return isinstance(node, Mean | Max)


def merge(stacked: Statistics, axis: int = 0) -> Statistics:
    """Merges statistics that were stacked along an axis, such as those of the micro-batches of a scan."""

    def merge_one(path: Any, node: Any) -> Mean | Max:
        if isinstance(node, Mean):
            return Mean(jnp.sum(node.sum, axis), jnp.sum(node.count, axis))
        if isinstance(node, Max):
            return Max(jnp.max(node.value, axis))
        name = jax.tree_util.keystr(path)
        raise TypeError(f"metric {name} is neither a Mean nor a Max, so parts of a batch cannot be merged: {node}")

    return jax.tree_util.tree_map_with_path(merge_one, stacked, is_leaf=_is_statistic)


def summary(metrics: Metrics) -> dict[str, Array]:
    """The numbers behind the statistics: `sum / count` (0 where nothing was counted) and the maximum."""

    def number(node: Any) -> Array:
        if isinstance(node, Mean):
            return jnp.where(node.count == 0, 0.0, node.sum / jnp.where(node.count == 0, 1, node.count))
        return node.value if isinstance(node, Max) else node

    return {name: number(node) for name, node in metrics.items()}
