"""Gemma 2: four norms a layer with weights 1 + w, scaled embeddings, soft caps, every other layer with a window."""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields
from grpo_jax.types import Array


def gelu(x: Array) -> Array:
    """The approximation by tanh, in float32 (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2)."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def decoder(fields: Fields) -> dict[str, Any]:
    """As Llama, with all of the above; the query's scale is a number of its own."""
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **of_gemma(fields),
        "attention_soft_cap": fields.get("attn_logit_softcapping"),
    }


def of_gemma(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    return {
        **family.attention_bias(fields),
        **family.windows(fields),
        "post_norm": True,
        "norm_offset": 1.0,
        "norm_float32": True,
        "activation": gelu,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "query_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "logits_soft_cap": fields.get("final_logit_softcapping"),
    }


HONOURS = family.SIZES | {
    *("attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping"),
    "cache_implementation",  # how transformers lays out its cache
}
GELU = {"hidden_act": ("gelu_pytorch_tanh", None), "hidden_activation": ("gelu_pytorch_tanh",)}
FAMILY = Family("Gemma2ForCausalLM", HONOURS | {"attn_logit_softcapping"}, decoder, GELU)
