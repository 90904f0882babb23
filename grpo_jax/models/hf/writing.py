"""Writes params as a folder that transformers and vLLM load."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.typing import DTypeLike

from grpo_jax import processes
from grpo_jax.freezing import named_leaves
from grpo_jax.models import lora
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.hf.finite import check_finite
from grpo_jax.models.hf.folders import BESIDE_IMAGES, INDEX, WEIGHTS, write_json
from grpo_jax.models.hf.layout import Leaf, leaves_of, shapes_of
from grpo_jax.models.hf.replacing import replacing
from grpo_jax.models.hf.shards import Tensor, write_shard, written_by_first
from grpo_jax.models.hf.tokenizers import ids_of
from grpo_jax.policies import Policy
from grpo_jax.types import Array, Params


def save_pretrained(
    policy: Policy,
    params: Params,
    path: str | os.PathLike[str],
    *,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    eos_ids: Sequence[int] = (),
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that transformers and vLLM load.

    The folder appears whole or not at all, and where `path` holds an earlier export, in its place: `path` is there
    all the time. The same params give the same bytes. What generation_config.json held where the model was loaded
    (sampling settings, special tokens) is kept.

    Of several processes all call this and the first writes. Each tensor is gathered in its turn: a host or a device
    never has more than one of them beside its own parts.

    Args:
      policy: a decoder whose config came from `models.from_hf_config`.
      params: its parameters, or `lora.merge_later(state.params, state.frozen)`.
      path: a new or empty folder, or one that this function wrote.
      tokenizer: saved beside the weights.
      eos_ids: tokens that end a completion, beside those of the config and the tokenizer.
      dtype: of the tensors; None for that of the params.
      max_shard_bytes: the largest file, unless one tensor is larger. The host holds one tensor at a time.

    Raises:
      FileExistsError: if `path` holds what no export wrote.
      AssertionError: if the params are not those of the policy.
      ValueError: if the tokenizer has more tokens than the model, or the params hold adapters or codes, or numbers that
        are not finite.
    """
    fields = json.loads(getattr(policy.config, "hf_config", None) or "null")
    if fields is None:
        raise ValueError("the policy has no Hugging Face config; make it by models.from_hf_config")
    if tokenizer is not None and len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {fields['vocab_size']}")
    if special := [name for name, _ in named_leaves(params) if name.endswith((lora.A, lora.SCALE, "qvalue"))]:
        raise ValueError(
            f"the params hold what an export has no place for, such as {special[0]}: pass "
            "lora.merge_later(state.params, state.frozen), or write the adapters alone by save_adapters"
        )
    shapes = shapes_of(policy)
    chex.assert_trees_all_equal_shapes(params, shapes)
    leaves, arrays = leaves_of(policy), jax.tree.leaves(params)
    dtypes = [jnp.dtype(array.dtype if dtype is None else dtype) for array in arrays]
    check_finite(params, dtypes)

    shards = _shards(leaves, arrays, dtypes, max_shard_bytes)
    with processes.alike("export"), written_by_first(shards) as shards:
        if processes.is_first():
            _write(policy, fields, shards, dtypes[0].name, Path(path).expanduser().resolve(), tokenizer, eos_ids)


def _write(
    policy: Policy,
    fields: dict[str, Any],
    shards: Sequence[Mapping[str, Tensor]],
    dtype: str,
    path: Path,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    eos_ids: Sequence[int],
) -> None:
    with replacing(path) as folder:
        write_json(folder / "config.json", _exported_config(fields, dtype))
        _write_shards(folder, shards)
        generation = json.loads(getattr(policy.config, "generation_config", "") or "{}")
        ends = [generation.get("eos_token_id"), fields.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)]
        ordered = dict.fromkeys(i for end in [*ends, eos_ids] for i in sorted(ids_of(end)))
        if ordered or generation:
            others = {name: fields.get(name) for name in ("bos_token_id", "pad_token_id")}
            generation = others | generation | {"eos_token_id": [*ordered] or None}
            write_json(folder / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


class _Part(NamedTuple):
    """What of a tensor is a parameter's."""

    array: Array | lora.Merged  # all layers
    place: tuple[int, ...]  # of the layer and the expert
    leaf: Leaf
    dtype: np.dtype


@functools.partial(jax.jit, static_argnums=(2, 3))
def _get(leaf: Array, index: tuple[int | Array, ...], transposed: bool, dtype: np.dtype) -> Array:
    tensor = leaf[index]
    return (tensor.T if transposed else tensor).astype(dtype)


def _make_part(part: _Part) -> np.ndarray:
    array, place = part.array, part.place
    if isinstance(array, lora.Merged):
        array, place = array[place], ()
    return processes.whole(_get(array, place, part.leaf.transposed, part.dtype))


def _shards(
    leaves: list[Leaf], arrays: list[Array | lora.Merged], dtypes: list[np.dtype], max_shard_bytes: int
) -> list[dict[str, Tensor]]:
    """The tensors of each file."""
    parts: dict[str, list[_Part]] = {}
    for leaf, array, dtype in zip(leaves, arrays, dtypes, strict=True):
        for index, name in zip(np.ndindex(leaf.shape[: leaf.stacked]), leaf.names, strict=True):
            parts.setdefault(name, []).append(_Part(array, index, leaf, dtype))
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, of_tensor in parts.items():
        leaf, dtype = of_tensor[0].leaf, of_tensor[0].dtype
        tensor = Tensor(leaf.tensor_shape, dtype, functools.partial(_make, of_tensor))
        if tensor.size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.size
    return shards


def _write_shards(folder: Path, shards: Sequence[Mapping[str, Tensor]]) -> None:
    """Writes the weights into one file, or into several with an index."""
    total = sum(tensor.size for shard in shards for tensor in shard.values())
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        write_shard(folder / file, shard)


def _make(parts: list[_Part]) -> np.ndarray:
    """A tensor, of one parameter or of several, one below the other or column by column."""
    ordered = sorted(parts, key=lambda part: (part.leaf.first_row, part.leaf.columns or ()))
    made = [_make_part(part) for part in ordered]
    if ordered[0].leaf.columns is not None:
        return np.stack(made, axis=-1).reshape(ordered[0].leaf.tensor_shape)
    return made[0] if len(made) == 1 else np.concatenate(made)


def _exported_config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, with the rotation also in the spelling of transformers 4, which would else take its default."""
    parameters = fields["rope_parameters"]
    rope, local = parameters.get("full_attention", parameters), parameters.get("sliding_attention", {})
    scaled = rope.get("rope_type", "default") != "default"
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if rope.get("rope_type") == "longrope":  # of which transformers 4 takes these three, and no others
        scaling = {"type": "longrope"} | {name: rope[name] for name in ("short_factor", "long_factor")}
    replaced = {
        "architectures": [FAMILIES[fields["model_type"]].architecture],
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if scaled else None,
    }
    if "partial_rotary_factor" in rope:
        replaced["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if local and local["rope_theta"] != rope["rope_theta"]:
        replaced["rope_local_base_freq"] = local["rope_theta"]
    return {name: value for name, value in fields.items() if name not in ("auto_map", BESIDE_IMAGES)} | replaced
