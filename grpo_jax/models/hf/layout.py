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


class Leaf(NamedTuple):
    """A parameter and the Hugging Face tensors that it is made of."""

    names: list[str]  # one for each layer if stacked, else one
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    transposed: bool
    rows: tuple[int, int] | None = None  # the first row, and the rows in all, of tensors that hold several parameters

    @property
    def is_kernel(self) -> bool:
        """Whether it is that of a linear layer, one for each of the decoder's."""
        return self.stacked and self.transposed

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of the rows of a tensor that are this parameter's, of one layer."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.part_shape if self.rows is None else (self.rows[1], *self.part_shape[1:])

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
    stacked, transposed = path[0] == "layers", path[-1] in ("kernel", "lm_head")
    place = families.place(path, hf_config)
    names = [place.name.format(layer=layer) for layer in range(leaf.shape[0])] if stacked else [place.name]
    return Leaf(names, leaf.shape, leaf.dtype, stacked, transposed, place.rows)
