"""Kernels in few bits, for a base that is frozen: qwix's arrays, codes beside scales.

    value = table[code] * scale of the code's tile

A quantised kernel is a node of the parameters where a plain one would be an array. The decoder makes floats of it, a
layer at a time, where it is used; what is trained lies beside it (`models.lora`). Embeddings, head, norms and biases
stay as they are, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

    kind    bits    scale                                   error of Gaussian weights (root mean square)
    nf4     4.5     64 weights of a column share one        9%
    int4    4.5     64 weights of a column share one        10%
    int8    8       a column's                              1%
    fp8     8       a column's (float8_e4m3fn)              3%
"""

import functools
import importlib.util
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from grpo_jax.policies import Policy
from grpo_jax.types import Array, Params

Kind = Literal["nf4", "int4", "int8", "fp8"]
TILE = 64  # weights that share a scale in 4 bits, or as many as divide the width; QLoRA's block


def quantize(params: Params, kind: Kind) -> Params:
    """Quantises the kernels of a decoder's layers.

    Args:
      params: of a decoder. `hf.load_pretrained(..., quantize=kind)` never holds them whole.
      kind: see the module.

    Raises:
      ValueError: for an unknown kind, or where there is no kernel.
    """
    check(kind)
    if not isinstance(params, dict) or "layers" not in params:
        raise ValueError("quantized bases are for models.decoder: the params have no layers")

    def of_node(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: of_kernel(x) if name == "kernel" else of_node(x) for name, x in node.items()}

    def of_kernel(kernel: Array) -> Any:
        return kernel if is_quantized(kernel) else jax.lax.map(lambda one: quantize_kernel(one, kind), kernel)

    return params | {"layers": of_node(params["layers"])}


@functools.cache
def sampled(policy: Policy, kind: Kind) -> Policy:
    """The same policy, whose samplers draw from a copy of the weights in few bits, made anew for each rollout.

    Training is in whole weights. What is sampled is then another policy than the one that learns: its log-probs are
    the rollout's, and `losses.truncated_importance`, `masked_importance` or `dppo` correct for the difference.

    Args:
      policy: a decoder.
      kind: see the module; int8 and fp8 are usual.
    """
    check(kind)
    return policy._replace(cast=lambda params: quantize(policy.cast(params), kind))


@functools.partial(jax.jit, static_argnums=1)
def quantize_kernel(kernel: Array, kind: Kind) -> Any:
    """A layer's kernel `[in, out]` as codes `[in, out]` and float32 scales `[tiles of in, out]`; or each expert's."""
    import qwix

    check(kind)
    if kernel.ndim > 2:
        return jax.lax.map(lambda one: quantize_kernel(one, kind), kernel)
    kernel = kernel.astype(jnp.float32)
    if kind in ("int8", "fp8"):
        return qwix.quantize(kernel, jnp.int8 if kind == "int8" else jnp.float8_e4m3fn, channelwise_axes=(1,))
    tile = max(size for size in range(1, TILE + 1) if kernel.shape[0] % size == 0)
    return qwix.quantize(kernel, kind, channelwise_axes=(1,), tiled_axes={0: tile})


def is_quantized(kernel: Any) -> bool:
    """Whether this is a kernel of codes and scales."""
    return hasattr(kernel, "qvalue")


def dequantize(kernel: Any) -> Array:
    """The floats of a kernel, in float32, or the kernel itself where it is an array of floats already."""
    if not is_quantized(kernel):
        return kernel
    import qwix

    return qwix.dequantize(kernel)


def empty(shape: tuple[int, ...], kind: Kind) -> Any:
    """A stack `[L, in, out]` of quantised kernels of zeros, to be filled by `put`."""
    one = jax.eval_shape(lambda: quantize_kernel(jnp.zeros(shape[1:]), kind))
    return jax.tree.map(lambda x: jnp.zeros((shape[0], *x.shape), x.dtype), one)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def put(stack: Any, layer: Array, kernel: Array, kind: Kind) -> Any:
    """Quantises a kernel into its place in the stack."""
    return jax.tree.map(lambda held, new: held.at[layer].set(new), stack, quantize_kernel(kernel, kind))


def check(kind: str) -> None:
    """Refuses an unknown kind, and says what is to be installed.

    Raises:
      ImportError: without qwix.
      ValueError: for another kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"{kind!r} is no way to quantise; there are {', '.join(get_args(Kind))}")
    if importlib.util.find_spec("qwix") is None:
        raise ImportError("quantised bases need qwix: pip install 'grpo-jax[quantize]'")
