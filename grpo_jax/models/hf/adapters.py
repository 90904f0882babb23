"""Adapters out and in, as folders that PEFT reads and writes (and with it transformers and vLLM).

    adapter_model.safetensors   base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [r, in]
                                base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight [out, r]
    adapter_config.json         rank, alpha, targets

The metadata of what is written here hold a digest of the base, so that adapters are not put on another one unawares.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers

from grpo_jax import processes
from grpo_jax.freezing import bind, named_leaves
from grpo_jax.models import lora
from grpo_jax.models.hf.folders import local_folder, open_shard, read_json, short, write_json
from grpo_jax.models.hf.layout import leaves_of
from grpo_jax.models.hf.replacing import replacing
from grpo_jax.models.hf.shards import held, write_shard
from grpo_jax.policies import Policy
from grpo_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DIGEST = "base_sha256"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.([a-z_.]+)\.lora_([AB])\.weight")

# Fields of a PEFT config that a reader has no use for, and the values that the others may have.
_NEUTRAL = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"),
    *("lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"),
    *("exclude_modules", "megatron_core", "runtime_config", "ensure_weight_tying", "layers_pattern"),
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
) -> None:
    """Writes adapters as a PEFT folder; it appears whole or not at all, as that of `save_pretrained`.

    Args:
      policy: the decoder.
      adapters: `state.params`.
      base: `state.frozen`, which holds their scales, and of which the digest is taken.
      path: a new or empty folder, or one that an export wrote.
      base_model: the folder or repository of the base, for `base_model_name_or_path`.
      tokenizer: saved beside.

    Raises:
      FileExistsError: if `path` holds what no export wrote.
      ValueError: if these are no adapters of this base, or its family's tensors hold several layers' kernels.
    """
    _refuse_fused(policy)
    tensors: dict[str, np.ndarray] = {}
    settings: dict[str, list[tuple[int, float]]] = {}  # rank and alpha of each layer, by target
    for layers, module in lora.linear_layers(policy, bind(adapters, base)):
        if lora.A not in module:
            continue
        a, b, scale = (processes.whole(module[name]).astype(np.float32) for name in (lora.A, lora.B, lora.SCALE))
        for i in range(len(a)):
            name = f"{_PREFIX}model.layers.{i}.{'.'.join(layers[1:])}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[i].T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[i].T)
        alphas = [float(f"{x * a.shape[-1]:.7g}") for x in scale.tolist()]
        settings[".".join(layers[1:])] = [(a.shape[-1], alpha) for alpha in alphas]
    if not tensors:
        raise ValueError("there are no adapters: pass save_adapters(policy, state.params, state.frozen, ...)")
    rank, alpha = next(iter(settings.values()))[0]
    others = {
        f"model.layers.{i}.{target}": values
        for target, of_layers in settings.items()
        for i, values in enumerate(of_layers)
        if values != (rank, alpha)
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in others.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in others.items() if a != alpha},
        "target_modules": sorted(target.rpartition(".")[2] for target in settings),
        "use_rslora": False,  # the scale is alpha / r, whatever it was made of
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    metadata = {_DIGEST: _digest(base)}
    with processes.alike("export"), contextlib.ExitStack() as stack:
        if not processes.is_first():
            return
        folder = stack.enter_context(replacing(Path(path).expanduser().resolve()))
        write_json(folder / CONFIG, config)
        write_shard(folder / WEIGHTS, {name: held(tensor) for name, tensor in tensors.items()}, metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


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
      filled with zeros, which stay zeros.

    Raises:
      FileNotFoundError: if there is no such folder, or no safetensors in it.
      ValueError: for another base, tensors that do not fit the decoder, or a config that asks for what it does not do;
        all that do are named.
    """
    _refuse_fused(policy)
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
    with open_shard(folder / WEIGHTS) as shard:
        trained_on = (shard.metadata() or {}).get(_DIGEST)
        tensors = {name: shard.get_tensor(name) for name in sorted(shard.keys())}
    modules = dict(lora.linear_layers(policy, params))
    if offenders := list(_offenders(tensors, modules)):
        raise ValueError("\n  ".join([f"{folder} does not hold adapters of this base:", *map(short, offenders[:20])]))
    if not any_base and trained_on not in (None, _digest(params)):
        raise ValueError(
            f"{folder} was trained on another base, of the digest {str(trained_on)[:12]}: its "
            f"base_model_name_or_path is {config.get('base_model_name_or_path')!r}. any_base=True puts it on this one"
        )
    adapters: Params = {}
    scales: Params = {}
    for path, module in modules.items():
        layers, inputs, outputs = module["kernel"].shape
        names = [f"{_PREFIX}model.layers.{i}.{'.'.join(path[1:])}" for i in range(layers)]
        if f"{names[0]}.lora_A.weight" not in tensors:
            continue
        pairs = [(tensors[f"{name}.lora_A.weight"].T, tensors[f"{name}.lora_B.weight"].T) for name in names]
        rank = max(a.shape[-1] for a, _ in pairs)
        a, b = np.zeros((layers, inputs, rank), np.float32), np.zeros((layers, rank, outputs), np.float32)
        for i, (of_a, of_b) in enumerate(pairs):
            a[i, :, : of_a.shape[-1]], b[i, : of_b.shape[0]] = of_a, of_b
        scale = [
            _scale(config, name.removeprefix(_PREFIX), pair[0].shape[-1])
            for name, pair in zip(names, pairs, strict=True)
        ]
        lora.put(adapters, path, {lora.A: jnp.asarray(a), lora.B: jnp.asarray(b)})
        lora.put(scales, path, {lora.SCALE: jnp.asarray(scale, jnp.float32)})
    return adapters, bind(params, scales)


def _refuse_fused(policy: Policy) -> None:
    """Where one tensor holds several kernels, as Phi-3's qkv_proj, PEFT adapts them together and the decoder apart."""
    if fused := sorted({leaf.names[0].split(".")[-2] for leaf in leaves_of(policy) if leaf.rows is not None}):
        raise ValueError(
            f"PEFT has one adapter for {' and one for '.join(fused)} of this family, and here each of the kernels in "
            "them has its own: export the merged model, by save_pretrained(policy, lora.merge(params, frozen), ...)"
        )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """`alpha / r`, or `alpha / sqrt(r)`; the first pattern that ends the module's name has its alpha, as in PEFT."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _offenders(tensors: dict[str, np.ndarray], modules: dict[tuple[str, ...], Params]) -> Iterator[str]:
    """A line for each tensor that is not an adapter's, of another shape, or missing."""
    targets = {match[2] for match in map(_TENSOR.fullmatch, tensors) if match}
    wanted: dict[str, int] = {}  # name -> the size that is not the rank
    for path, module in modules.items():
        layers, inputs, outputs = module["kernel"].shape
        if (target := ".".join(path[1:])) in targets:
            for i in range(layers):
                name = f"{_PREFIX}model.layers.{i}.{target}"
                wanted |= {f"{name}.lora_A.weight": inputs, f"{name}.lora_B.weight": outputs}
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
        if size != wanted[name]:
            yield f"{name}: shape {list(tensor.shape)}, and the layer's width there is {wanted[name]}"
        elif other in tensors and rank not in tensors[other].shape:
            yield f"{name}: rank {rank}, and that of {other} is another: {list(tensors[other].shape)}"
        elif not np.isfinite(tensor.astype(np.float32)).all():
            yield f"{name}: holds NaN or infinite numbers"


def _digest(base: Params) -> str:
    """Of the names, dtypes, shapes and bytes of a base without the scales of its adapters."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(base):
        if not name.endswith(lora.SCALE):
            digest.update(json.dumps([name, str(leaf.dtype), leaf.shape]).encode())
            for block in processes.blocks(leaf):
                digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()
