"""Mistral 7B, Nemo and Ministral: all layers see a window, if any."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with `sliding_window`, which may be null, in every layer."""
    return {**family.sizes(fields), **family.rotation(fields), **family.windows(fields)}


FAMILY = Family("MistralForCausalLM", family.SIZES | {"sliding_window"}, decoder)
