"""The dtype to compute in."""

from typing import Literal

import jax
import jax.numpy as jnp

ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]


def compute_dtype(name: ComputeDtype = "auto") -> jnp.dtype:
    """The dtype of this name; `auto` is bfloat16, but float32 on a CPU.

    On a CPU bfloat16 is slower than float32, and the log-probs of the sampler and the scorer differ by more. float16
    has three more bits and a smaller range: to train in it takes a scale of the loss, `schedules.loss_scale`.
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
