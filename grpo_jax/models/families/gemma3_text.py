"""Gemma 3 without images: as Gemma 2, with normed queries and keys in place of caps, and two rotations."""

from typing import Any

from grpo_jax.models.families import family, gemma2
from grpo_jax.models.families.family import Family, Fields


def decoder(fields: Fields) -> dict[str, Any]:
    """As Gemma 2; layers with a window rotate by a base of their own.

    `attn_logit_softcapping` is refused: transformers reads it and caps nothing.
    """
    return {
        **family.sizes(fields),
        **family.two_rotations(fields),
        **gemma2.of_gemma(fields),
        "qk_norm": "head",
    }


HONOURS = gemma2.HONOURS | {"sliding_window_pattern"}  # which transformers has made layer_types of
FAMILY = Family("Gemma3ForCausalLM", HONOURS, decoder, gemma2.GELU)
