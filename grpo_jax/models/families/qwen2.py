"""Qwen 2 and 2.5: queries, keys and values have biases, which no field says."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with the biases and, if `use_sliding_window`, windows in some layers."""
    return {**family.sizes(fields), **family.rotation(fields), **family.windows(fields), "qkv_bias": True}


FAMILY = Family("Qwen2ForCausalLM", family.SIZES | family.WINDOWS, decoder)
