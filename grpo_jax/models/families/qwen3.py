"""Qwen 3: queries and keys are normed, head by head; heads are as wide as `head_dim` says."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with a norm of each query and key head and, if `use_sliding_window`, windows in some layers."""
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **family.attention_bias(fields),
        **family.windows(fields),
        "qk_norm": "head",
    }


FAMILY = Family("Qwen3ForCausalLM", family.SIZES | family.WINDOWS | {"attention_bias"}, decoder)
