"""OLMo 3: as OLMo 2, with windows in three layers of four, which rotate in their own way."""

from typing import Any

from grpo_jax.models.families import family, olmo2
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As OLMo 2, with windows, and with YaRN only in layers without one."""
    flat = {**fields, "rope_parameters": fields["rope_parameters"]["full_attention"]}
    return {**olmo2.decoder(flat), **family.windows(fields), **family.two_rotations(fields)}


FAMILY = Family("Olmo3ForCausalLM", family.SIZES | {"attention_bias", "sliding_window", "layer_types"}, decoder)
