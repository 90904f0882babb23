"""Llama 1 to 3, SmolLM 1 and 2, TinyLlama, DeepSeek-coder and many others: the decoder without options."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """Norms before attention and MLP; biases if asked for."""
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **family.attention_bias(fields),
        "mlp_bias": bool(fields.get("mlp_bias")),
    }


FAMILY = Family("LlamaForCausalLM", family.SIZES | {"attention_bias", "mlp_bias"}, decoder)
