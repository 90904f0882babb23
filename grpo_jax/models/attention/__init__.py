"""Attention of a group of completions to their one prompt and to their own past, in forms that agree to rounding.

An attention is a function

    (query [B, G, S, N, h], own, prompt or None, mask_inputs) -> [B, G, S, N, h]

    out = softmax([q k_prompt, q k_own] / sqrt(h)) [v_prompt; v_own]

over the keys that `mask_inputs` lets the query see, in the dtype of the query. Head `n` reads key-value head
`n // (N / K)`; each query sees at least one of its own keys. Where a model caps its logits, an attention is called
with `soft_cap=`, a number: `x` becomes `cap * tanh(x / cap)` before the softmax. Where heads have sinks, it is called
with `sinks=`, `[N]` logits that join the softmax without a value. Only `reference` and `auto` do these two.

    reference        two matrix products for each part, on any device; the reference for the others
    blockwise    block by block, without keeping logits; for CPUs
    auto  blockwise on CPUs, reference elsewhere; what a network takes unless told otherwise
    cudnn        cuDNN's flash attention, for NVIDIA GPUs
    splash       JAX's splash attention, for TPUs
    from_causal_kernel      any other kernel for causal attention

Over the devices of a mesh `over_mesh` divides each of them. A function of one's own finds what a query sees in
`completion_mask` and `prompt_mask`.
"""

from grpo_jax.models.attention.blockwise import auto, blockwise
from grpo_jax.models.attention.contract import Attention, KeyValues, MaskInputs, completion_mask, prompt_mask
from grpo_jax.models.attention.joint_softmax import reference
from grpo_jax.models.attention.over_mesh import head_copies, over_mesh
from grpo_jax.models.attention.rows import cudnn, from_causal_kernel, splash, splash_kernel

__all__ = [
    "Attention",
    "KeyValues",
    "MaskInputs",
    "auto",
    "blockwise",
    "completion_mask",
    "cudnn",
    "from_causal_kernel",
    "head_copies",
    "over_mesh",
    "prompt_mask",
    "reference",
    "splash",
    "splash_kernel",
]
