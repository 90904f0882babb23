"""Adapters out and in, as folders that PEFT reads and writes (and with it transformers and vLLM).

    adapter_model.safetensors   base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [r, in]
                                base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight [out, r]
    adapter_config.json         rank, alpha, targets

PEFT has one adapter where the model's class has one tensor: for `qkv_proj` and `gate_up_proj` of Phi, and for gate and
up of all experts, `target_parameters` of its config. Here each kernel has its own. They are written as one whose rank
is the sum of theirs, with blocks of zeros, which computes the same:

    lora_A = [a_q; a_k; a_v]      lora_B = diag(b_q, b_k, b_v)

and read as one of the same `lora_a` for each kernel, which training then moves apart. A model that also sees images has
the layers under `model.language_model`, as their names in the folder of its adapters have.

The metadata of what is written here hold the ranks of such blocks, and a digest of the base, so that adapters are not
put on another one unawares.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from grpo_jax import processes
from grpo_jax.freezing import bind, named_leaves
from grpo_jax.models import experts, lora
from grpo_jax.models.hf.finite import check_finite
from grpo_jax.models.hf.folders import BESIDE_IMAGES, local_folder, open_shard, read_json, short, write_json
from grpo_jax.models.hf.layout import leaves_of
from grpo_jax.models.hf.replacing import replacing
from grpo_jax.models.hf.shards import held, write_shard
from grpo_jax.models.hf.tokenizers import ids_of
from grpo_jax.policies import Policy
from grpo_jax.types import Params

CONFIG, WEIGHTS, GENERATION = "adapter_config.json", "adapter_model.safetensors", "generation_config.json"
_DIGEST = "base_sha256"
_PREFIX = "base_model.model."
_LAYERS = "model.layers"
_LAYERS_BESIDE_IMAGES = (
    "model.language_model.layers",
    "language_model.model.layers",
)  # from transformers 4.52 on; before
_RANKS = "ranks_of_parts"
_OF_EXPERTS = "mlp.experts."
_FLOATS = ("F32", "BF16", "F16", "F64")

# Fields of a PEFT config that a reader has no use for, and the values that the others may have.
_NEUTRAL = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"),
    *("lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"),
    "target_parameters",
    *("exclude_modules", "megatron_core", "runtime_config", "ensure_weight_tying", "layers_pattern"),
    *("layers_to_transform", "eva_config"),
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "qalora_group_size": (16,),  # of use_qalora, which is off
    "init_lora_weights": (
        True,
        False,
        None,
        "gaussian",
        "orthogonal",
        "eva",
    ),  # the others, such as PiSSA, change the base
}


def save_adapters(
    policy: Policy,
    adapters: Params,
    base: Params,
    path: str | os.PathLike[str],
    *,
    base_model: str,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    eos_ids: Sequence[int] = (),
) -> None:
    """Writes adapters as a PEFT folder; it appears whole or not at all, as that of `save_pretrained`.

    Args:
      policy: the decoder.
      adapters: `state.params`.
      base: `state.frozen`, which holds their scales, and of which the digest is taken.
      path: a new or empty folder, or one that an export wrote.
      base_model: the folder or repository of the base, for `base_model_name_or_path`.
      tokenizer: saved beside.
      eos_ids: tokens that end a completion, as the adapters were taught; the base may name others. They are kept in a
        generation_config.json, see `adapter_ends`.

    Raises:
      FileExistsError: if `path` holds what no export wrote.
      ValueError: if these are no adapters of this base, or others than adapters are among them; for adapters that are
        not finite.
    """
    check_finite(adapters)
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, list[tuple[int, float]]] = {}  # rank and alpha of each layer, by target
    ranks: dict[str, dict[str, int]] = {}
    targets = [target for target in _targets(policy, bind(adapters, base)) if target.adapted]
    nested = {_OF_EXPERTS + "gate_up_proj", _OF_EXPERTS + "down_proj"} <= {target.name for target in targets}
    beside_images = BESIDE_IMAGES in json.loads(policy.config.hf_config or "{}")
    layers = _LAYERS_BESIDE_IMAGES[0] if beside_images else _LAYERS
    for target in targets:
        a, b, scale = _together(target, [other for other in targets if other.of_experts == target.of_experts])
        for i in range(len(a)):
            name = _module(target.name, layers, i, nested)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _to_peft(a[i], b[i])
        settings[target.name] = [(a.shape[-1], float(f"{x * a.shape[-1]:.7g}")) for x in scale.tolist()]
        if len(target.parts) > 1 or target.of_experts:
            ranks[target.name] = {part.path[-1]: part.module[lora.A].shape[-1] for part in target.adapted}
    if not tensors:
        raise ValueError("there are no adapters: pass save_adapters(policy, state.params, state.frozen, ...)")
    if trained := [name for name, _ in named_leaves(adapters) if not name.endswith((lora.A, lora.B))]:
        raise ValueError(
            f"a folder of adapters has no place for what else is trained, such as {trained[0]}: write the merged "
            "model, hf.save_pretrained(policy, lora.merge_later(state.params, state.frozen), ...)"
        )
    # PEFT warns of patterns for parameters, so that those of experts have the ranks and alphas that need none.
    rank, alpha = max(settings.items(), key=lambda item: item[0].startswith(_OF_EXPERTS))[1][0]
    others = {
        f"{layers}.{i}.{target}": values
        for target, of_layers in settings.items()
        for i, values in enumerate(of_layers)
        if values != (rank, alpha)
    }
    modules: str | list[str] = sorted(name.rpartition(".")[2] for name in settings if not name.startswith(_OF_EXPERTS))
    if beside_images:  # what sees them has layers of the same names
        modules = rf"(.*\.)?language_model\..*\.({'|'.join(modules)})"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in others.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in others.items() if a != alpha},
        "target_modules": modules,
        "target_parameters": sorted(name for name in settings if name.startswith(_OF_EXPERTS)) or None,
        "use_rslora": False,  # the scale is alpha / r, whatever it was made of
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    metadata = {_DIGEST: _digest(base), _RANKS: json.dumps(ranks, sort_keys=True)}
    with processes.alike("export"), contextlib.ExitStack() as stack:
        if not processes.is_first():
            return
        folder = stack.enter_context(replacing(Path(path).expanduser().resolve()))
        write_json(folder / CONFIG, config)
        write_shard(folder / WEIGHTS, {name: held(tensor) for name, tensor in tensors.items()}, metadata)
        if eos_ids:
            write_json(folder / GENERATION, {"eos_token_id": [*map(int, eos_ids)]})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def adapter_ends(folder: str | os.PathLike[str]) -> set[int]:
    """The tokens that end a completion by a folder of adapters, beside those of their base; empty if it names none."""
    file = Path(folder) / GENERATION
    return ids_of(read_json(file).get("eos_token_id")) if file.is_file() else set()


def load_adapters(
    policy: Policy,
    params: Params,
    path_or_repo: str | os.PathLike[str],
    *,
    any_base: bool = False,
    revision: str | None = None,
) -> tuple[Params, Params]:
    """Reads a folder that PEFT or `save_adapters` wrote.

    Args:
      policy: the decoder.
      params: of the base, as `lora.adapt` takes them.
      path_or_repo: a folder, or the id of a repository on the Hugging Face Hub.
      any_base: True puts adapters that were written here on whatever fits, such as the same model quantised otherwise;
        else the base is to be the one that they were trained on, by its digest. PEFT's own have none.
      revision: a branch, tag or commit of the repository.

    Returns:
      `(adapters, base)`, as `lora.adapt` returns them. Where PEFT's ranks differ between layers, the smaller ones are
      filled with zeros, which stay zeros; so are layers that its config gives no adapter.

    Raises:
      FileNotFoundError: if there is no such folder, or no safetensors in it.
      ValueError: for another base, tensors that do not fit the decoder, or a config that asks for what it does not do;
        all that do are named.
    """
    folder = local_folder(path_or_repo, revision, [CONFIG, WEIGHTS])
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}, only {short(sorted(os.listdir(folder)))}")
    config = read_json(folder / CONFIG)
    refused = {
        name: value
        for name, value in config.items()
        if (
            value not in _FIXED[name] if name in _FIXED else name not in _NEUTRAL and value not in (None, False, {}, [])
        )
    }
    if refused:
        named = ", ".join(f"{name} = {short(value, 80)}" for name, value in sorted(refused.items()))
        raise ValueError(f"{folder / CONFIG} asks for what adapters here do not do: {named}")
    _check_alphas(config)
    with open_shard(folder / WEIGHTS) as shard:
        metadata = shard.metadata() or {}
        dtypes = {name: shard.get_slice(name).get_dtype() for name in sorted(shard.keys())}
        if others := [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]:
            raise ValueError(f"{folder} holds adapters of another dtype than {', '.join(_FLOATS)}: {short(others)}")
        tensors = {name: shard.get_tensor(name) for name in sorted(shard.keys())}
    trained_on, ranks = metadata.get(_DIGEST), json.loads(metadata.get(_RANKS, "{}"))
    nested = any(f".{_OF_EXPERTS}base_layer." in name for name in tensors)
    known = (layers for layers in _LAYERS_BESIDE_IMAGES if any(x.startswith(f"{_PREFIX}{layers}.") for x in tensors))
    layers = next(known, _LAYERS)
    targets = [
        target
        for target in _targets(policy, params)
        if any(f"{_module(target.name, layers, i, nested)}.lora_A.weight" in tensors for i in range(target.stack[0]))
        and (nested or _is_targeted(target.name, config))
    ]
    if offenders := list(_offenders(tensors, targets, layers, nested, config)):
        raise ValueError("\n  ".join([f"{folder} does not hold adapters of this base:", *map(short, offenders[:20])]))
    if not any_base and trained_on not in (None, _digest(params)):
        raise ValueError(
            f"{folder} was trained on another base, or on this one in another dtype or other codes: its "
            f"base_model_name_or_path is {config.get('base_model_name_or_path')!r}. any_base=True puts it on this one"
        )
    adapters: Params = {}
    scales: Params = {}
    for target in targets:
        pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for i in range(target.stack[0]):
            name = _module(target.name, layers, i, nested)
            if f"{name}.lora_A.weight" in tensors:
                rows, columns = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
                pairs[i] = _from_peft(rows, columns, target.stack[1:])
        rank = max(a.shape[-1] for a, _ in pairs.values())
        a = np.zeros((*target.stack, target.inputs, rank), np.float32)
        b = np.zeros((*target.stack, rank, target.outputs), np.float32)
        scale = np.ones(target.stack[0], np.float32)
        for i, (of_a, of_b) in pairs.items():
            a[i, ..., : of_a.shape[-1]], b[i, ..., : of_b.shape[-2], :] = of_a, of_b
            scale[i] = _scale(config, f"{layers}.{i}.{target.name}", of_a.shape[-1])
        first, own = 0, ranks.get(target.name)
        for part in target.parts:
            if own is not None and part.path[-1] not in own:
                continue
            r = rank if own is None else own[part.path[-1]]
            held_a, held_b = a[..., first : first + r], b[..., first : first + r, part.columns]
            first += 0 if own is None else r
            lora.put(adapters, part.path, {lora.A: jnp.asarray(held_a), lora.B: jnp.asarray(held_b)})
            lora.put(scales, part.path, {lora.SCALE: jnp.asarray(scale)})
    return adapters, bind(params, scales)


class _Part(NamedTuple):
    """A linear layer of the decoder, whose outputs are some of a target's."""

    path: tuple[str, ...]
    module: Params
    columns: slice  # of the target's outputs


class _Target(NamedTuple):
    """What PEFT has one adapter for in each layer."""

    name: str  # such as self_attn.qkv_proj, in a layer
    stack: tuple[int, ...]  # layers, and of experts their number
    inputs: int
    outputs: int
    parts: tuple[_Part, ...]  # in the order of their columns

    @property
    def adapted(self) -> list[_Part]:
        return [part for part in self.parts if lora.A in part.module]

    @property
    def of_experts(self) -> bool:
        return self.name.startswith(_OF_EXPERTS)


def _targets(policy: Policy, params: Params) -> list[_Target]:
    leaves = {leaf.path: leaf for leaf in leaves_of(policy)}
    parts: dict[str, list[_Part]] = {}
    outputs: dict[str, int] = {}
    for path, module in lora.linear_layers(policy, params):
        leaf, width = leaves["/".join([*path, "kernel"])], module["kernel"].shape[-1]
        name, total, columns = ".".join(path[1:]), width, slice(0, width)
        if path[-1] == "experts_down":
            name = _OF_EXPERTS + "down_proj"
        elif path[-1] in experts.LAYERS:  # one tensor in transformers, whatever they are in a checkpoint
            name, total, turn = _OF_EXPERTS + "gate_up_proj", 2 * width, path[-1] == "experts_up"
            columns = slice(turn * width, (turn + 1) * width)
            if leaf.columns is not None:
                columns = slice(leaf.columns[0], None, leaf.columns[1])
        elif leaf.rows is not None:
            name, total = ".".join([*path[1:-1], leaf.names[0].split(".")[-2]]), leaf.rows[1]
            columns = slice(leaf.first_row, leaf.first_row + width)
        parts.setdefault(name, []).append(_Part(path, module, columns))
        outputs[name] = total
    found = []
    for name, of_name in parts.items():
        *stack, inputs, _ = of_name[0].module["kernel"].shape
        ordered = tuple(sorted(of_name, key=lambda part: part.columns.start))
        found.append(_Target(name, tuple(stack), inputs, outputs[name], ordered))
    return found


def _together(target: _Target, others: Sequence[_Target]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`lora_a [L, .., in, R]`, `lora_b [L, .., R, out]` and the scale `[L]` of a target, with a block for each part.

    The targets of experts, which are `others`, have one scale and, filled up with zeros, one rank.
    """
    like = others[0] if target.of_experts else target
    scale = processes.whole(like.adapted[0].module[lora.SCALE]).astype(np.float32)
    a: list[np.ndarray] = []
    b: list[np.ndarray] = []
    for part in target.adapted:
        of_a, of_b, own = (processes.whole(part.module[x]).astype(np.float32) for x in (lora.A, lora.B, lora.SCALE))
        block = np.zeros((*of_b.shape[:-1], target.outputs), np.float32)
        block[..., part.columns] = of_b * (own / scale).reshape(-1, *[1] * (of_b.ndim - 1))
        a.append(of_a)
        b.append(block)
    joined_a, joined_b = np.concatenate(a, axis=-1), np.concatenate(b, axis=-2)
    if target.of_experts:
        longest = max(sum(part.module[lora.A].shape[-1] for part in other.adapted) for other in others)
        fill = [(0, 0)] * (joined_a.ndim - 1) + [(0, longest - joined_a.shape[-1])]
        joined_a, joined_b = np.pad(joined_a, fill), np.pad(joined_b, [*fill[:-2], fill[-1], fill[-2]])
    return joined_a, joined_b, scale


def _module(target: str, layers: str, layer: int, nested: bool) -> str:
    """PEFT's name of a target: of two tensors of experts, the wrapper of the first lies within that of the second."""
    if target.startswith(_OF_EXPERTS):
        target = "mlp.experts.base_layer" if nested and target.endswith("gate_up_proj") else "mlp.experts"
    return f"{_PREFIX}{layers}.{layer}.{target}"


def _is_targeted(target: str, config: dict[str, Any]) -> bool:
    """Whether adapters of experts, whose tensors do not say so, are this target's; those of others say so."""
    return not target.startswith(_OF_EXPERTS) or _matches(
        config.get("target_parameters") or [], f"model.layers.0.{target}"
    )


def _is_meant(module: str, layer: int, config: dict[str, Any]) -> bool:
    """Whether a linear layer has an adapter by PEFT's config, which may name some of a model's layers."""
    targets, numbers = config.get("target_modules"), config.get("layers_to_transform")
    if _matches(config.get("exclude_modules") or [], module):
        return False
    if targets is None or _OF_EXPERTS in module:
        return True
    if numbers in (None, []) or isinstance(targets, str) or module in targets:
        return _matches(targets, module)
    return layer in np.atleast_1d(numbers) and _matches(targets, module)


def _matches(targets: str | Sequence[str], module: str) -> bool:
    if not isinstance(targets, str):
        return any(module == x or module.endswith(f".{x}") for x in targets)
    try:
        return re.fullmatch(targets, module) is not None
    except re.error as error:
        raise ValueError(f"{CONFIG} has {targets!r}, no regular expression: {error}") from error


def _to_peft(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[in, r]` and `[r, out]` as `[r, in]` and `[out, r]`; of experts `[E r, in]` and `[out, r E]`."""
    rows, columns = a.swapaxes(-1, -2).reshape(-1, a.shape[-2]), b.T.reshape(b.shape[-1], -1)
    return np.ascontiguousarray(rows), np.ascontiguousarray(columns)


def _from_peft(rows: np.ndarray, columns: np.ndarray, stack: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The other way; `stack` is `(E,)` of experts, else `()`."""
    a = rows.reshape(*stack, -1, rows.shape[-1]).swapaxes(-1, -2)
    return a, columns.reshape(columns.shape[0], -1, *stack).T


def _check_alphas(config: dict[str, Any]) -> None:
    patterns = config.get("alpha_pattern") or {}
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"{name} of {CONFIG} is {alpha!r}; an alpha is a finite number")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"alpha_pattern of {CONFIG} has {pattern!r}, no regular expression: {error}") from error


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """`alpha / r`, or `alpha / sqrt(r)`; the first pattern that ends the module's name has its alpha, as in PEFT."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _offenders(
    tensors: dict[str, np.ndarray], targets: list[_Target], layers: str, nested: bool, config: dict[str, Any]
) -> Iterator[str]:
    """A line for each tensor that is not an adapter's, of another shape, or missing."""
    wanted: dict[
        str, tuple[int, int]
    ] = {}  # name -> the size that is not the rank, and of how many experts the rank is
    for target in targets:
        for i in range(target.stack[0]):
            name, times = _module(target.name, layers, i, nested), math.prod(target.stack[1:])
            pair = {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
            by_number = config.get("layers_to_transform") not in (None, [])  # PEFT leaves out what others have
            if (by_number or not pair & tensors.keys()) and not _is_meant(f"{layers}.{i}.{target.name}", i, config):
                continue
            wanted |= {
                f"{name}.lora_A.weight": (target.inputs, times),
                f"{name}.lora_B.weight": (target.outputs, times),
            }
    if not wanted:
        yield "no tensor is an adapter of one of its layers"
    for name in sorted(wanted.keys() - tensors.keys()):
        yield f"{name}: missing"
    for name, tensor in sorted(tensors.items()):
        if name not in wanted:
            yield f"{name}: unexpected, shape {list(tensor.shape)}"
            continue
        size, rank = (tensor.shape if "lora_B" in name else tensor.shape[::-1]) if tensor.ndim == 2 else (0, 0)
        other = name.replace("lora_B", "lora_A") if "lora_B" in name else name.replace("lora_A", "lora_B")
        width, times = wanted[name]
        if size != width:
            yield f"{name}: shape {list(tensor.shape)}, and the layer's width there is {width}"
        elif not rank:
            yield f"{name}: shape {list(tensor.shape)}, a rank of 0"
        elif rank % times:
            yield f"{name}: shape {list(tensor.shape)}, and a rank of {times} experts is a multiple of {times}"
        elif other in tensors and rank not in tensors[other].shape:
            yield f"{name}: rank {rank}, and that of {other} is another: {list(tensors[other].shape)}"
        elif not np.isfinite(tensor.astype(np.float32)).all():
            yield f"{name}: holds NaN or infinite numbers"


_KNOWN: list[tuple[list[weakref.ref[jax.Array]], str]] = []  # of the last base: a server is given its adapters in turn


def _digest(base: Params) -> str:
    """Of the names, dtypes, shapes and bytes of a base without the scales of its adapters; once for the same arrays."""
    named = [(name, leaf) for name, leaf in named_leaves(base) if not name.endswith(lora.SCALE)]
    for arrays, known in _KNOWN:
        if len(arrays) == len(named) and all(x() is leaf for x, (_, leaf) in zip(arrays, named, strict=True)):
            return known
    digest = hashlib.sha256()
    for name, leaf in named:
        digest.update(json.dumps([name, str(leaf.dtype), leaf.shape]).encode())
        for block in processes.blocks(leaf):
            digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    if all(isinstance(leaf, jax.Array) for _, leaf in named):  # which do not change
        _KNOWN[:] = [([weakref.ref(leaf) for _, leaf in named], digest.hexdigest())]
    return digest.hexdigest()
