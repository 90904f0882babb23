"""Granite 3: Llama with four multipliers."""

from typing import Any

from grpo_jax.models.families import family, llama
from grpo_jax.models.families.family import Family, Fields

_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "query_scale",
    "logits_scaling": "logits_divisor",
}


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama; the attention's multiplier takes the place of one over the root of the heads' width."""
    return {**llama.decoder(fields), **{own: float(fields[name]) for name, own in _MULTIPLIERS.items()}}


HONOURS = family.SIZES | {"attention_bias", "mlp_bias", *_MULTIPLIERS}
# The published configs have 0.1, of pretraining; nothing is dropped here, nor by transformers outside of training.
DROPOUT = {"attention_dropout": (0, 0.1, None)}
FAMILY = Family("GraniteForCausalLM", HONOURS, decoder, DROPOUT)
