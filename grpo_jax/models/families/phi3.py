"""Phi 3, 3.5 and 4-mini: projections that lie in one tensor, part of a head rotated, LongRoPE."""

from itertools import accumulate
from typing import Any

from grpo_jax.models import rope
from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields, Place


def decoder(fields: Fields) -> dict[str, Any]:
    """As Mistral, with the rotation of Phi.

    LongRoPE has two sets of frequencies, and transformers takes the second for a whole batch once a row of it is longer
    than `original_max_position_embeddings`. The decoder takes the first, and refuses longer rows.
    """
    parameters, longest = dict(fields["rope_parameters"]), fields["max_position_embeddings"]
    rotated = int(family.head_dim(fields) * parameters.pop("partial_rotary_factor", 1.0))
    limit = None
    if parameters.get("rope_type") == "longrope":
        limit = fields["original_max_position_embeddings"]
        rotation = rope.longrope(parameters, rotated, longest, limit)
    else:
        rotation = rope.from_parameters(parameters, rotated, longest)
    return {**family.sizes(fields), **family.windows(fields), "rope": rotation, "max_positions": limit}


def place(path: tuple[str, ...], fields: Fields) -> Place:
    """Queries, keys and values are rows of `qkv_proj`, gate and up of `gate_up_proj`."""
    whole = family.place(path, fields)
    sizes, width = family.sizes(fields), family.head_dim(fields)
    queries, keys = sizes["num_heads"] * width, sizes["num_kv_heads"] * width
    fused = {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), fields["intermediate_size"]),
    }
    for name, parts in fused.items():
        if path[-1] == "kernel" and path[-2] in parts:
            ends = dict(zip(parts, accumulate(parts.values()), strict=True))
            start = ends[path[-2]] - parts[path[-2]]
            return Place(whole.name.replace(path[-2], name), (start, sum(parts.values())))
    return whole


HONOURS = family.SIZES | {"sliding_window", "original_max_position_embeddings", "partial_rotary_factor"}
ONE = (1, None)  # what the published configs have, of code that they came with
FAMILY = Family("Phi3ForCausalLM", HONOURS, decoder, {"interpolate_factor": ONE, "full_attn_mod": ONE}, place)
