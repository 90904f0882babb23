"""Mixtral: Mistral with a mixture of experts in every layer."""

from typing import Any

from grpo_jax.models.families import family, mistral
from grpo_jax.models.families.family import Family, Fields, Place


def decoder(fields: Fields) -> dict[str, Any]:
    """As Mistral; the weights of a token's experts sum to 1."""
    return {**mistral.decoder(fields), **family.experts(fields, normalised=True)}


def place(path: tuple[str, ...], fields: Fields) -> Place:
    """Each expert's kernels are tensors of their own; w1 is the gate, w3 up and w2 down."""
    names = {"router": "gate", **{f"experts_{part}": f"experts.{{expert}}.{w}" for part, w in PARTS.items()}}
    own = path[-2] if path[-1] == "kernel" else path[-1]
    if own in names:
        return Place(f"model.layers.{{layer}}.block_sparse_moe.{names[own]}.weight")
    return family.place(path, fields)


PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
HONOURS = family.SIZES | family.EXPERTS | {"sliding_window"}
FAMILY = Family("MixtralForCausalLM", HONOURS, decoder, {"router_jitter_noise": (0, None)}, place)
