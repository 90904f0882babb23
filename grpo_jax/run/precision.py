"""The dtype to compute in."""

from typing import Literal

import jax
import jax.numpy as jnp

ComputeDtype = Literal["auto", "bfloat16", "float32"]
WithFloat16 = Literal["auto", "bfloat16", "float16", "float32"]  # of what scales its loss, or learns nothing


def compute_dtype(name: WithFloat16 = "auto", *, float16: bool = False) -> jnp.dtype:
    """The dtype of this name; `auto` is bfloat16, but float32 on a CPU.

    On a CPU bfloat16 is slower than float32, and the log-probs of the sampler and the scorer differ by more. float16
    has three more bits and a smaller range: to train in it takes a scale of the loss, `schedules.loss_scale`.

    Args:
      name: of the dtype.
      float16: True for whoever scales the loss, or learns nothing.

    Raises:
      ValueError: for float16 without it.
    """
    if name == "float16" and not float16:
        raise ValueError("gradients in float16 need a scale of the loss, and here is none: take bfloat16 or float32")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
