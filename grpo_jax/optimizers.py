"""Optimisers that optax has, with what they must be told of a decoder's params."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from grpo_jax.types import Params


def muon(
    params: Params,
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    consistent_rms: float | None = 0.2,
    **settings: Any,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the layers' matrices, Adam for the rest.

        update = -learning_rate * 0.2 * sqrt(max(in, out)) * orthogonalised(momentum)

    optax's own choice is by the number of axes, which is the wrong way round here: kernels are stacks `[L, in, out]`,
    or `[L, E, in, out]` of experts, and the matrices `[vocabulary, D]` are embedding and head, which Muon's authors
    leave to Adam. Each matrix is orthogonalised by itself. Adam's momentum is Nesterov's, too.

    Args:
      params: what is trained, or its shapes; adapters are stacks of matrices, too.
      learning_rate: of the matrices.
      adam_learning_rate: of embedding, head, norms and biases; `learning_rate` if None.
      consistent_rms: 0.2 gives an update the size of Adam's (Liu et al. 2025, arXiv:2502.16982, equation 4), so that
        rates carry over; None takes Jordan's `sqrt(max(1, out / in))`.
      settings: others of `optax.contrib.muon`.

    Raises:
      ValueError: if there is no stack of matrices, as in a policy that is no decoder: call optax's own there.
    """

    def numbers(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        names = [getattr(key, "key", None) for key in path]
        is_matrix = "layers" in names and leaf.ndim >= 3 and names[-1] != "bias"  # those of experts are [L, E, out]
        return MuonDimensionNumbers(reduction_axis=-2, output_axis=-1) if is_matrix else None

    dimensions = jax.tree_util.tree_map_with_path(numbers, params)
    if not jax.tree.leaves(dimensions, is_leaf=lambda x: isinstance(x, MuonDimensionNumbers)):
        raise ValueError("there are no stacks of a decoder's layers; optax.contrib.muon takes the matrices of others")
    return optax.contrib.muon(
        learning_rate,
        adam_learning_rate=adam_learning_rate,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=dimensions,
        **settings,
    )
