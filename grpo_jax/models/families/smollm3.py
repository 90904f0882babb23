"""SmolLM 3: every fourth layer does not rotate queries and keys."""

from typing import Any

from grpo_jax.models.families import family, llama
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with `no_rope_layers`, which is 1 of a layer that rotates, and windows where it says so."""
    return {
        **llama.decoder(fields),
        **family.windows(fields),
        "rotated": tuple(bool(rotates) for rotates in fields["no_rope_layers"][: fields["num_hidden_layers"]]),
    }


HONOURS = family.SIZES | family.WINDOWS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}
FAMILY = Family("SmolLM3ForCausalLM", HONOURS, decoder)
