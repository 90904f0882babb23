"""gpt-oss: experts with biases and a clipped gate, attention with sinks, every other layer with a window."""

from typing import Any

from grpo_jax.models.families import family
from grpo_jax.models.families.family import Family, Fields, Place


def decoder(fields: Fields) -> dict[str, Any]:
    """As Mixtral, with all of the above; norms are rounded after their weights."""
    clip = (fields.get("swiglu_alpha", 1.702), fields.get("swiglu_limit", 7.0))
    return {
        **family.sizes(fields),
        **family.rotation(fields),
        **family.attention_bias(fields),
        **family.windows(fields),
        "norm_float32": True,
        "attention_sinks": True,
        **family.experts(fields, normalised=True, bias=True, clip=clip),
    }


def place(path: tuple[str, ...], fields: Fields) -> Place:
    """All experts of a layer are one tensor, `[E, in, out]`, in which gate and up alternate column by column."""
    layer, leaf = "model.layers.{layer}", path[-1]
    if leaf == "sinks":
        return Place(f"{layer}.self_attn.sinks")
    if leaf.startswith("router"):
        return Place(f"{layer}.mlp.router.{'bias' if leaf == 'router_bias' else 'weight'}")
    if len(path) < 2 or not path[-2].startswith("experts"):
        return family.place(path, fields)
    part, suffix = path[-2].removeprefix("experts_"), "_bias" if leaf == "bias" else ""
    if part == "down":
        return Place(f"{layer}.mlp.experts.down_proj{suffix}", transposed=False)
    turn = (("gate", "up").index(part), 2)
    return Place(f"{layer}.mlp.experts.gate_up_proj{suffix}", transposed=False, columns=turn)


HONOURS = family.SIZES | family.EXPERTS | {"attention_bias", "sliding_window", "layer_types"}
HONOURS |= {"swiglu_alpha", "swiglu_limit", "experts_per_token", "initial_context_length"}  # the last two: said twice
FAMILY = Family("GptOssForCausalLM", HONOURS, decoder, place=place)
