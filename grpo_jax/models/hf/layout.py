"""Where each parameter is in a Hugging Face checkpoint.

Most names are mechanical. The decoder's modules are called what transformers calls
them; its layers are stacked on axis 0, and its kernels are transposed. What is named otherwise, its family says
(`models.families`).

    params["layers"]["self_attn"]["q_proj"]["kernel"][i] = model.layers.{i}.self_attn.q_proj.weight.T
"""

from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.models import families
from grpo_jax.policies import Policy
from grpo_jax.types import Params

_KERNELS = {"kernel", "lm_head", "router"}


class Leaf(NamedTuple):
    """A parameter and the Hugging Face tensors that it is made of."""

    names: list[str]  # one for each layer, or for each layer's experts, if stacked; else one
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: int  # axes that number tensors: 0, 1 (layers) or 2 (layers and experts)
    transposed: bool
    rows: tuple[int, int] | None = None  # the first row, and the rows in all, of tensors that hold several parameters
    columns: tuple[int, int] | None = None  # the first column and the step, of tensors in which parameters alternate
    is_kernel: bool = False  # that of a linear layer, or of all experts'
    path: str = ""  # such as layers/self_attn/q_proj/kernel

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of the rows of a tensor that are this parameter's, of one layer."""
        shape = self.shape[self.stacked :]
        return shape[::-1] if self.transposed else shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.part_shape
        shape = shape if self.rows is None else (self.rows[1], *shape[1:])
        return shape if self.columns is None else (*shape[:-1], shape[-1] * self.columns[1])

    @property
    def first_row(self) -> int:
        return 0 if self.rows is None else self.rows[0]


def shapes_of(policy: Policy) -> Params:
    return jax.eval_shape(policy.init, jax.random.key(0))


def leaves_of(policy: Policy) -> list[Leaf]:
    return [
        leaf_of(tuple(key.key for key in path), leaf, policy.config.hf_config)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(policy))
    ]


def leaf_of(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, hf_config: str) -> Leaf:
    place = families.place(path, hf_config)
    stacked = sum(f"{{{axis}}}" in place.name for axis in ("layer", "expert"))
    numbers = (dict(zip(("layer", "expert"), index, strict=False)) for index in np.ndindex(leaf.shape[:stacked]))
    return Leaf(
        names=[place.name.format(**number) for number in numbers],
        shape=leaf.shape,
        dtype=leaf.dtype,
        stacked=stacked,
        transposed=place.transposed and path[-1] in _KERNELS,
        rows=place.rows,
        columns=place.columns,
        is_kernel=path[-1] == "kernel",
        path="/".join(path),
    )
