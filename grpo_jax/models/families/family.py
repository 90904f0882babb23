"""What a family is: how a Hugging Face config becomes fields of the decoder's, and where its tensors lie."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from grpo_jax.models import rope
from grpo_jax.models.experts import Experts

Fields = Mapping[str, Any]  # of a Hugging Face config


class Place(NamedTuple):
    """Where a parameter is in a checkpoint; `{layer}` and `{expert}` in the name number what is stacked."""

    name: str
    rows: tuple[int, int] | None = None  # the first row and the rows in all, of a tensor that holds several parameters
    columns: tuple[int, int] | None = None  # the first column, and after how many comes the next, where they alternate
    transposed: bool = True  # kernels are [out, in] in the checkpoint


def place(path: tuple[str, ...], fields: Fields) -> Place:
    """Most families': a module is named as in transformers, and the decoder's are, too.

    params["layers"]["self_attn"]["q_proj"]["kernel"][i] = model.layers.{i}.self_attn.q_proj.weight.T
    """
    if path == ("lm_head",):
        return Place("lm_head.weight")
    kind = "bias" if path[-1] == "bias" else "weight"
    module = ("layers", "{layer}") if path[0] == "layers" else path[:1]
    return Place(".".join(["model", *module, *path[1:-1], kind]))


class Family(NamedTuple):
    """A `model_type`. What its config may hold beside `honours` is in `models.config`; whatever else is refused."""

    architecture: str  # the class of transformers
    honours: frozenset[str]  # fields of its config that change the arithmetic
    decoder: Callable[[Fields], dict[str, Any]]  # those fields as fields of `DecoderConfig`
    only: Mapping[str, tuple[Any, ...]] = {}  # fields that may be there, with the only values that are done
    place: Callable[[tuple[str, ...], Fields], Place] = place  # of a parameter, by its path


SIZES = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
    }
)
EXPERTS = frozenset(
    {
        *("num_experts", "num_local_experts", "num_experts_per_tok"),
        *("router_aux_loss_coef", "output_router_logits"),  # of a loss that transformers adds in training
    }
)
WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def head_dim(fields: Fields) -> int:
    """The width of a head, which many configs leave to the other sizes."""
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def sizes(fields: Fields) -> dict[str, Any]:
    """The fields of `SIZES` but the rotation."""
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields.get("num_key_value_heads") or fields["num_attention_heads"],
        "head_dim": head_dim(fields),
        "rms_norm_eps": fields["rms_norm_eps"],
        "tie_embeddings": fields["tie_word_embeddings"],
    }


def experts(fields: Fields, width: str = "intermediate_size", **settings: Any) -> dict[str, Any]:
    """A mixture of experts in every layer; their number has two names, the width of one the given name."""
    number = fields.get("num_experts") or fields["num_local_experts"]
    return {"experts": Experts(number=number, per_token=fields["num_experts_per_tok"], width=fields[width], **settings)}


def rotation(fields: Fields) -> dict[str, Any]:
    """One rotation for all layers."""
    return {
        "rope": rope.from_parameters(fields["rope_parameters"], head_dim(fields), fields["max_position_embeddings"])
    }


def two_rotations(fields: Fields) -> dict[str, Any]:
    """One rotation for layers that see everything, one for those with a window.

    Raises:
      ValueError: for parameters that are of neither, which transformers passes over.
    """
    kinds = ("full_attention", "sliding_attention")
    if others := {name: value for name, value in fields["rope_parameters"].items() if name not in kinds}:
        raise ValueError(f"rope_parameters has {others} beside {' and '.join(kinds)}: put it into the one it is of")
    full, local = (
        rope.from_parameters(fields["rope_parameters"][kind], head_dim(fields), fields["max_position_embeddings"])
        for kind in kinds
    )
    return {"rope": full, "local_rope": local}


def attention_bias(fields: Fields) -> dict[str, Any]:
    """`attention_bias`, of all four projections."""
    bias = bool(fields.get("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias}


def windows(fields: Fields) -> dict[str, Any]:
    """The window of each layer; None if every layer sees everything.

    Raises:
      ValueError: for a kind of layer that is not known, or a window below 1.
    """
    window = fields.get("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:  # a family with one kind of layer
        kinds = ["full_attention" if window is None else "sliding_attention"] * fields["num_hidden_layers"]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types = {sorted(unknown)} are not supported")
    if "sliding_attention" not in kinds:
        return {"windows": None}
    if window is None or window < 1:
        raise ValueError(f"layer_types has sliding_attention with sliding_window = {window!r}; it is at least 1")
    return {"windows": tuple(window if kind == "sliding_attention" else None for kind in kinds)}
