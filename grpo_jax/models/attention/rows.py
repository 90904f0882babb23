"""Attention by kernels that know rows of tokens and nothing of groups: cuDNN's on GPUs, splash on TPUs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.attention.contract import Attention, KeyValues, MaskInputs, refuse_options
from grpo_jax.models.attention.joint_softmax import reference
from grpo_jax.types import Array

Kernel = Callable[[Array, Array, Array], Array]


def from_causal_kernel(kernel: Kernel) -> Attention:
    """Attention by a kernel for causal rows, such as a flash attention.

    A completion and its prompt become one row without a gap, whatever the prompt's length:

        row = prompt[:length], own, unused

    so that causality alone hides what is not to be seen, and the kernel needs no mask and no lengths. Its
    own gradient is then the right one. (Two calls, for prompt and own part, joined by their log-sum-exps would
    spare the prompt's rows. But `jax.nn.dot_product_attention` has no gradient through the log-sum-exp, and
    rounds it to the query's dtype: in bfloat16 that moves the parts' weights by several percent.)

    The price: a completion's row computes the `P^2 / 2` products of its prompt as well. Beside all else that the
    completion costs that is a share of `P^2 / (S (12 D + 2 P + S))`, with `D` the width: 0.5% at `P = 256, S = 1024,
    D = 896`, 4.5% at `P = 1024, S = 512, D = 3584`. Whatever is not attention is still computed once for a prompt.

    Single queries, and all others that read a cache, go to `reference`.

    Args:
      kernel: `(query [R, L, N, h], keys [R, L, K, h], values [R, L, K, h]) -> [R, L, N, h]`, causal, scaling by
        `h**-0.5`, differentiable.

    Returns:
      An attention that raises ValueError for packed rows, sliding windows, soft caps and sinks, which
      the kernel cannot be told of. It expects consecutive positions, from the prompt's length.
    """

    def attention(
        query: Array,
        own: KeyValues,
        prompt: KeyValues | None,
        mask_inputs: MaskInputs,
        **options: Any,
    ) -> Array:
        B, G, S, N, h = query.shape
        refuse_options("a kernel for causal rows", **options)
        if S <= 1 or own.keys.shape[2] != S:
            return reference(query, own, prompt, mask_inputs)
        if mask_inputs.segments is not None:
            raise ValueError(
                "a kernel for causal rows (cudnn, splash) can neither keep packed completions apart nor read a tree; "
                "leave out the packing"
            )
        if mask_inputs.window is not None:
            raise ValueError(
                "a kernel for causal rows knows no sliding windows, which this model has; take `reference`"
            )
        if prompt is None or mask_inputs.prompt is None:
            rows = (x.reshape(B * G, S, *x.shape[3:]) for x in (query, *own))
            return kernel(*rows).reshape(query.shape)

        P = prompt.keys.shape[1]
        starts = jnp.repeat(mask_inputs.prompt[:, 0], G)  # [R]

        def row(before: Array, own: Array) -> Array:
            """`[R, P + S, ...]` of `before [B, P, ...]` and `own [B, G, S, ...]`."""
            before = jnp.pad(before, [(0, 0), (0, S), (0, 0), (0, 0)])
            before = jnp.repeat(before, G, axis=0)
            return jax.vmap(lambda x, y, start: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0))(
                before, own.reshape(B * G, S, *own.shape[3:]), starts
            )

        queries = row(jnp.zeros((B, P, N, h), query.dtype), query)
        out = kernel(queries, *jax.tree.map(row, tuple(prompt), tuple(own)))
        out = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, S, 0))(out, starts)
        return out.reshape(query.shape)

    return attention


def _padded(x: Array, multiple: int) -> Array:
    """`[R, L, ...]` with zeros after it, up to a `multiple`; causality hides them."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)])


def _cudnn_kernel(query: Array, keys: Array, values: Array) -> Array:
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"cuDNN's flash attention computes in bfloat16 or float16, not in {query.dtype}; give the network one of "
            "these as its compute dtype"
        )
    L = query.shape[1]
    rows = (_padded(x, 2) for x in (query, keys, values))  # JAX gives no gradient of rows of odd length
    return jax.nn.dot_product_attention(*rows, is_causal=True, implementation="cudnn")[:, :L]


def splash_kernel(query: Array, keys: Array, values: Array, *, interpret: bool = False) -> Array:
    """The splash attention that comes with JAX, causal; a kernel for `from_causal_kernel`.

    Args:
      query: `[R, L, N, h]`; any `L`, which is padded to a multiple of 128.
      keys: `[R, L, K, h]`.
      values: `[R, L, K, h]`.
      interpret: run without a TPU, slowly.
    """
    # Not at the top of the file: importing Pallas for TPUs takes time that nobody else should spend.
    from jax.experimental.pallas.ops.tpu import splash_attention

    L, N, h = query.shape[1:]
    query, keys, values = (_padded(x, 128).swapaxes(1, 2) for x in (query * h**-0.5, keys, values))  # [R, N, L, h]
    padded = query.shape[2]
    block = math.gcd(padded, 512)
    blocks = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    causal = splash_attention.MultiHeadMask([splash_attention.CausalMask((padded, padded))] * N)
    kernel = splash_attention.make_splash_mha_single_device(causal, block_sizes=blocks, interpret=interpret)
    return jax.vmap(kernel)(query, keys, values).swapaxes(1, 2)[:, :L].astype(query.dtype)


cudnn = from_causal_kernel(_cudnn_kernel)
splash = from_causal_kernel(splash_kernel)
