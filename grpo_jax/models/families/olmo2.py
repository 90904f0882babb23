"""OLMo 2: norms of what attention and MLP add, not of what they read; queries and keys normed in their whole width."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with other norms, which are rounded after their weights."""
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **family.attention_bias(fields),
        "qk_norm": "width",
        "pre_norm": False,
        "post_norm": True,
        "norm_float32": True,
    }


FAMILY = Family("Olmo2ForCausalLM", family.SIZES | {"attention_bias"}, decoder)
