"""Attention of a group of completions to their one prompt and to their own past, in forms that agree to rounding.

An attention is a function

    (query [B, G, S, N, h], own, prompt or None, sight) -> [B, G, S, N, h]

    out = softmax([q k_prompt, q k_own] / sqrt(h)) [v_prompt; v_own]

over the keys that `sight` lets the query see, in the dtype of the query. Head `n` reads key-value head
`n // (N / K)`; each query sees at least one of its own keys.

    joint        two matrix products for each part, on any device; the reference for the others
    blockwise    block by block, without keeping logits; for CPUs
    by_platform  blockwise on CPUs, joint elsewhere; what a network takes unless told otherwise
    cudnn        cuDNN's flash attention, for NVIDIA GPUs
    splash       JAX's splash attention, for TPUs
    of_rows      any other kernel for causal attention

A function of one's own finds what a query sees in `own_mask` and `prompt_mask`.
"""

from grpo_jax.models.attention.blockwise import blockwise, by_platform
from grpo_jax.models.attention.contract import Attention, KeyValues, Sight, own_mask, prompt_mask
from grpo_jax.models.attention.joint import joint
from grpo_jax.models.attention.rows import cudnn, of_rows, splash, splash_kernel

__all__ = [
    "Attention",
    "KeyValues",
    "Sight",
    "blockwise",
    "by_platform",
    "cudnn",
    "joint",
    "of_rows",
    "own_mask",
    "prompt_mask",
    "splash",
    "splash_kernel",
]
