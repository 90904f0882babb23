"""What the decoder needs to know of a model, read from its Hugging Face config by an allow-list."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import transformers
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grpo_jax.models.attention import Attention, auto
from grpo_jax.models.experts import Experts
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.rope import Rope
from grpo_jax.types import Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer of the Llama kind; hashable, so that jit can take it as static."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None  # RMSNorm of queries and keys before the rotation: head by head
    # (Qwen 3), or of a projection's whole width at once (OLMo 2)
    windows: tuple[int | None, ...] | None = None  # a layer: see that many last tokens, the own included; None: all
    local_rope: Rope | None = None  # of layers with a window; None: as of the others
    rotated: tuple[bool, ...] | None = None  # whether a layer rotates queries and keys; None: all do
    max_positions: int | None = None  # positions after which the rotation would be another, which is refused
    query_scale: float | None = None  # factor of the attention's logits; None: head_dim ** -0.5
    attention_soft_cap: float | None = None  # its logits x become cap * tanh(x / cap)
    attention_sinks: bool = False  # a trained logit of each head to which no value belongs
    experts: Experts | None = None  # in place of the MLP
    pre_norm: bool = True  # norms of what attention and MLP read
    post_norm: bool = False  # norms of what they add
    norm_offset: float = 0.0  # added to the norms' weights: Gemma's are 1 + w
    norm_float32: bool = False  # norms are rounded after their weights, not before
    activation: Callable[[Array], Array] = jax.nn.silu  # of the MLP
    embedding_scale: float = 1.0  # in the layers' dtype
    residual_scale: float = 1.0  # of what attention and MLP add
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None  # as of the attention, of the head's logits
    initializer_range: float = 0.02
    param_dtype: DTypeLike = jnp.float32  # of `init`
    dtype: DTypeLike = jnp.float32  # of the layers' arithmetic
    cache_dtype: DTypeLike | None = None  # of completions' keys and values while they are sampled; None: dtype
    logits_dtype: DTypeLike = jnp.float32  # of the operands of the last product; logits themselves are float32
    last_norm_dtype: DTypeLike | None = None  # of what the last norm returns, which the head reads; None: dtype
    attention: Attention = auto  # of grpo_jax.models.attention, or any function like them
    remat: bool | Callable[..., bool] = True  # recompute a layer's activations in the backward pass; or all but some
    layers_apart: bool | None = None  # a decode step without a loop over layers; None: on CPUs, unless there is a mesh
    mesh: Mesh | None = None  # of models.sharding: the devices over which all of it is divided; None for one device
    hf_config: str = ""  # the Hugging Face config as JSON, for the export
    generation_config: str = ""  # and the generation_config.json that lay beside it


# Fields of a Hugging Face config that say nothing of the network's arithmetic.
_NEUTRAL = {
    "_attn_implementation_autoset",
    "architectures",
    "auto_map",  # remote code, which is never run: a known model_type is what this decoder does
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",  # SmolLM2's note to itself
    "label2id",
    "max_position_embeddings",
    "max_sequence_length",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",  # how the training cut its products
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
# Other fields whose name says that they are notes: `_commit_hash`, `internal_version`, `base_model_name`.
_NOTES = re.compile(r"_.*|(.*_)?(version|commit|commit_hash|date|license|author|authors|description|model_name|url)")
# Fields that may be there, with the only values that the decoder does.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True, None),  # transformers attends both ways when it is False
}

_OFF: tuple[Any, ...] = (None, False, "", [], {})  # an unknown field that is off asks for nothing; 0 == False


def from_hf_config(hf_config: transformers.PretrainedConfig, **settings: Any) -> DecoderConfig:
    """Reads a Hugging Face config; `settings` are fields of `DecoderConfig` such as `dtype` and `remat`.

    Raises:
      ValueError: for a family or field that the decoder does not honour, with its
        name and value. Nothing is guessed.
    """
    fields = hf_config.to_dict()
    fields.pop("_name_or_path", None)  # equal models are equal wherever they lie
    model_type = fields["model_type"]
    if model_type not in FAMILIES:
        raise ValueError(f"model_type = {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    known, fixed = family.honours | _NEUTRAL, _FIXED | dict(family.only)
    refused = {
        name: value
        for name, value in fields.items()
        if (value not in fixed[name] if name in fixed else name not in known and value not in _OFF)
        and not (_NOTES.fullmatch(name) and isinstance(value, str | int | float))
    }
    if refused:
        named = ", ".join(
            f"{_short(name)} = {_short(repr(value))}" for name, value in itertools.islice(sorted(refused.items()), 20)
        )
        raise ValueError(f"this {model_type} config asks for what the decoder does not do: {named}{_remedies(refused)}")
    _check_sizes(fields)

    return DecoderConfig(
        **family.decoder(fields),
        initializer_range=fields["initializer_range"],
        hf_config=json.dumps(fields, sort_keys=True),
        **settings,
    )


def _remedies(refused: dict[str, Any]) -> str:
    remedies = []
    if "quantization_config" in refused:
        remedies.append("load the repository that has these weights unquantised")
    if others := sorted(refused.keys() - {"quantization_config"}):
        remedies.append(
            f"if {_short(', '.join(others))} of config.json changes nothing in the network's arithmetic, delete it "
            "there, in a copy of the folder; otherwise load another model"
        )
    return ". " + "; ".join(remedies)[:1].upper() + "; ".join(remedies)[1:]


def _check_sizes(fields: dict[str, Any]) -> None:
    """Refuses sizes that no model has, before anything is made of them."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["max_position_embeddings", *(n for n in ("num_key_value_heads", "head_dim") if fields.get(n) is not None)]
    for name in names:
        size = fields[name]
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
            raise ValueError(f"{name} = {_short(size)} of the config is no size: it is a whole number, at least 1")
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    if head_dim < 1:
        raise ValueError(
            f"hidden_size = {fields['hidden_size']} of the config is less than num_attention_heads = "
            f"{fields['num_attention_heads']}"
        )
    num_heads, num_kv_heads = fields["num_attention_heads"], fields.get("num_key_value_heads")
    if num_kv_heads and num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} is odd; the rotation turns pairs")
    width = 3 * fields["intermediate_size"] + 2 * fields["num_attention_heads"] * head_dim
    parameters = fields["hidden_size"] * (fields["vocab_size"] + fields["num_hidden_layers"] * width)
    if fields["num_hidden_layers"] > 10_000 or parameters > 2**43:
        sizes = ", ".join(f"{name} = {fields[name]}" for name in names)
        raise ValueError(f"the config is of {parameters:.1e} parameters, more than any model has: {sizes}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"
