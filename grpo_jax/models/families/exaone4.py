"""EXAONE 4: norms after attention and MLP, normed queries and keys; next to windows, other layers do not rotate."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with norms where OLMo 2 has them, of queries and keys head by head.

    A model without `sliding_window` rotates in all layers, one with it only where a layer's kind is a window.
    """
    kinds = None if fields.get("sliding_window") is None else fields["layer_types"]
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **family.windows(fields),
        "rotated": None if kinds is None else tuple(kind == "sliding_attention" for kind in kinds),
        "qk_norm": "head",
        "pre_norm": False,
        "post_norm": True,
    }


# transformers has made layer_types of the pattern.
HONOURS = family.SIZES | {"sliding_window", "sliding_window_pattern", "layer_types"}
FAMILY = Family("Exaone4ForCausalLM", HONOURS, decoder)
