"""Families of models, one file each: which fields of a Hugging Face config are honoured, and what they are here.

    family      what a family is, and the parts that several have

A family is data. What the decoder does not do yet becomes a field of `DecoderConfig` that is one idea, never a branch
on the family's name. CONTRIBUTING says what a new one needs.
"""

import json

from grpo_jax.models.families import (
    exaone4,
    gemma2,
    gemma3_text,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from grpo_jax.models.families.family import Family, Fields, Place

FAMILIES: dict[str, Family] = {
    "exaone4": exaone4.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
}

__all__ = ["FAMILIES", "Family", "Place", "place"]


def place(path: tuple[str, ...], hf_config: str) -> Place:
    """Where the parameter at a path of the decoder's is in a checkpoint with that config, which is JSON.

    Raises:
      ValueError: for a decoder without one, whose parameters have no names in a checkpoint.
    """
    if not hf_config:
        raise ValueError("the policy has no Hugging Face config; make it by models.from_hf_config")
    fields: Fields = json.loads(hf_config)
    return FAMILIES[fields["model_type"]].place(path, fields)
