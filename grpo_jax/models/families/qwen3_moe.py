"""Qwen 3 with a mixture of experts in every layer."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields, Place


def decoder(fields: Fields) -> dict[str, Any]:
    """As Qwen 3; windows, if any, are in every layer."""
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **family.attention_bias(fields),
        **family.windows(fields),
        "qk_norm": "head",
        **family.experts(fields, "moe_intermediate_size", normalised=bool(fields["norm_topk_prob"])),
    }


def place(path: tuple[str, ...], fields: Fields) -> Place:
    """Each expert's kernels are tensors of their own."""
    names = {"router": "gate", **{f"experts_{part}": f"experts.{{expert}}.{part}_proj" for part in PARTS}}
    own = path[-2] if path[-1] == "kernel" else path[-1]
    if own in names:
        return Place(f"model.layers.{{layer}}.mlp.{names[own]}.weight")
    return family.place(path, fields)


PARTS = ("gate", "up", "down")
HONOURS = family.SIZES | family.EXPERTS | {"attention_bias", "moe_intermediate_size", "norm_topk_prob"}
HONOURS |= {"use_sliding_window", "sliding_window", "max_window_layers"}
ONLY: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}  # else some layers have an MLP
FAMILY = Family("Qwen3MoeForCausalLM", HONOURS, decoder, ONLY, place)
