"""Reads safetensors into params: every tensor is used once, and every parameter filled once."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from grpo_jax import models
from grpo_jax.models import quantized, sharding
from grpo_jax.models.attention import Attention, auto
from grpo_jax.models.hf import views
from grpo_jax.models.hf.folders import TEXT_FILES, local_folder, read_config, read_json, short, weight_map
from grpo_jax.models.hf.layout import Leaf, leaves_of, shapes_of
from grpo_jax.models.hf.shards import Stored, read_shard
from grpo_jax.policies import Policy
from grpo_jax.programs import give_back_freed
from grpo_jax.types import Array, Params

_BLOCK = 2**21  # numbers read at a time; the host holds two copies of them
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = ("F32", "BF16", "F16")
_NAMED = 20  # offending tensors in a message
_QUANTIZED_NAME = re.compile(  # the end of a repository's name
    r"[-_](unsloth-)?(bnb-4bit|bnb-8bit|gptq|awq|fp8|nvfp4|mxfp4|int[48]|4bit|8bit|(quantized\.)?w\d+a\d+)[^/]*/?$",
    re.IGNORECASE,
)
_CODES = re.compile(r".*\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|SCB|absmax)$")


def load_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    cache_dtype: DTypeLike | None = None,
    logits_dtype: DTypeLike = jnp.float32,
    last_norm_dtype: DTypeLike | None = None,
    quantize: quantized.Kind | None = None,
    attention: Attention = auto,
    remat: bool | Callable[..., bool] = True,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> tuple[Policy, Params]:
    """Reads a model of one of the families in `models`.

    Every tensor of the checkpoint is used once and every parameter is filled
    once. Tensors are read in blocks of at most 8 MB, so that the host holds little
    more than the params in `dtype`, and where they live on a device not even those.

    Args:
      path_or_repo: a folder, or the id of a repository on the Hugging Face Hub.
      dtype: of the params, whatever the checkpoint's. Train in float32.
      compute_dtype: of the layers' arithmetic; None for `dtype`.
      cache_dtype: of the keys and values of completions while they are sampled; None for
        `compute_dtype`. A narrower one saves memory and moves sampled log-probs away from scored ones.
      logits_dtype: of the operands of the last product.
      last_norm_dtype: of what the last norm returns; None for `compute_dtype`.
      quantize: `"nf4"`, `"int4"`, `"int8"` or `"fp8"` quantises the kernels of the layers while they are read, a
        layer at a time, so that neither host nor device ever holds them as floats; see `models.quantized`. They are
        then to be frozen, and adapters trained. A checkpoint that is quantised already is refused.
      attention: how attention is computed, one of `models.attention` (`cudnn` and `splash` for
        long rows on GPUs and TPUs) or a function like them; they agree to rounding.
      remat: recompute a layer in the backward pass instead of keeping its activations. A
        policy of `jax.checkpoint`, which says what to keep, must be the same object in
        every call, or jit compiles again.
      mesh: of `models.sharding`, the devices over which policy and params are divided. A process reads only the parts
        that its devices hold, and its host holds one of them at a time.
      revision: a branch, tag or commit of the repository; a commit repeats a run.

    Returns:
      The policy, and its params on the default device or over the mesh.

    Raises:
      FileNotFoundError: if there is no folder, or nothing in it that may be read.
      ValueError: for a config that the decoder does not honour, a file that cannot
        be read, or tensors that do not fit the config; all of them are named.
    """
    if quantize is not None:
        quantized.check(quantize)
    folder = local_folder(path_or_repo, revision, [*TEXT_FILES, "*.safetensors"])
    hf_config = read_config(folder)
    _refuse_quantized(hf_config, os.fspath(path_or_repo))
    config = models.from_hf_config(
        hf_config,
        param_dtype=dtype,
        dtype=dtype if compute_dtype is None else compute_dtype,
        cache_dtype=cache_dtype,
        logits_dtype=logits_dtype,
        last_norm_dtype=last_norm_dtype,
        attention=attention,
        remat=remat,
        mesh=mesh,
        generation_config=_generation_config(folder),
    )
    policy = models.decoder(config)
    shapes = shapes_of(policy)
    if codes := sorted(filter(_CODES.fullmatch, weight_map(folder))):
        _refuse(os.fspath(path_or_repo), f"what made {codes[0]}")
    params = _read(folder, leaves_of(policy), config.tie_embeddings, quantize, mesh)
    return policy, jax.tree.unflatten(jax.tree.structure(shapes), params)


def load_reward_model(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> tuple[Policy, Params, Array]:
    """Reads a sequence-classification checkpoint with one label, `*ForSequenceClassification` in transformers.

    Args:
      path_or_repo: as in `load_pretrained`.
      dtype: as in `load_pretrained`.
      compute_dtype: as in `load_pretrained`.
      revision: as in `load_pretrained`.

    Returns:
      The network, whose `unembed` is not to be used; its params; and the head `[D, 1]`,
      which makes the score of the last token's hidden state.

    Raises:
      FileNotFoundError: as in `load_pretrained`.
      ValueError: as in `load_pretrained`.
    """
    folder = local_folder(path_or_repo, revision, [*TEXT_FILES, "*.safetensors"])
    hf_config = read_config(folder)
    hf_config.tie_word_embeddings = True  # there is no head over the vocabulary
    compute = dtype if compute_dtype is None else compute_dtype
    policy = models.decoder(models.from_hf_config(hf_config, param_dtype=dtype, dtype=compute))
    shapes = shapes_of(policy)
    head = Leaf(["score.weight"], (hf_config.hidden_size, 1), np.dtype(dtype), stacked=0, transposed=True)
    *params, weight = _read(folder, [*leaves_of(policy), head], tied=False)
    return policy, jax.tree.unflatten(jax.tree.structure(shapes), params), weight


def _refuse_quantized(hf_config: transformers.PretrainedConfig, path_or_repo: str) -> None:
    """Says which model to load in place of one that is quantised already."""
    if found := getattr(hf_config, "quantization_config", None):
        method = (found if isinstance(found, dict) else found.to_dict()).get("quant_method", "an unnamed method")
        _refuse(path_or_repo, str(getattr(method, "value", method)))


def _refuse(path_or_repo: str, method: str) -> None:
    name = _QUANTIZED_NAME.sub("", path_or_repo)
    whole = f" (by its name, {name})" if name != path_or_repo else ""
    raise ValueError(
        f"{path_or_repo} is quantised already, by {method}, whose codes are not read: load the model that it was made "
        f'of{whole}, with quantize="nf4" for 4 bits or quantize="int8" for 8'
    )


def _read(
    folder: Path, leaves: list[Leaf], tied: bool, quantize: quantized.Kind | None = None, mesh: Mesh | None = None
) -> list[Any]:
    """The parameters, if the folder's tensors are exactly theirs."""
    with contextlib.ExitStack() as stack:
        places: views.Places = weight_map(folder)
        opened = {file: stack.enter_context(open(folder / file, "rb")) for file in sorted(set(places.values()))}
        files = {name: read_shard(file) for name, file in opened.items()}
        places, shards = views.of_floats(*views.of_text(places, files))
        offenders = _offenders(leaves, shards, places, tied)
        if named := [short(line) for line in itertools.islice(offenders, _NAMED)]:
            more = sum(1 for _ in offenders)
            named += [f"and {more} more"] if more else []
            raise ValueError("\n  ".join([f"{folder} does not hold the tensors of its config.json:", *named]))
        filled = [
            _fill_quantized(leaf, shards, places, quantize, mesh)
            if quantize and leaf.is_kernel
            else _fill(leaf, shards, places, mesh)
            for leaf in leaves
        ]
    if wrong := [name for _, names in filled for name in names]:
        raise ValueError(
            f"{folder} holds weights that are NaN or infinite, in {len(wrong)} tensors: "
            f"{short(', '.join(wrong))}. Was it saved by a run that had diverged? Take an earlier export"
        )
    return [leaf for leaf, _ in filled]


def _generation_config(folder: Path) -> str:
    """The content of generation_config.json as JSON, "" if there is none; an export keeps it."""
    file = folder / "generation_config.json"
    return json.dumps(read_json(file), sort_keys=True) if file.is_file() else ""


def _offenders(leaves: list[Leaf], shards: views.Shards, weight_map: views.Places, tied: bool) -> Iterator[str]:
    """A line for each tensor that is missing, superfluous, twice there or of another shape or dtype."""
    wanted = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    held = {(name, file) for file, shard in shards.items() for name in sorted(shard.keys())}
    for name, file in sorted(weight_map.items() - held):
        yield f"{name}: the index puts it in {file}, where it is not"
    for name, file in sorted(held - weight_map.items()):
        yield f"{name}: in {file}, where the index does not put it"
    for name in sorted(wanted.keys() - weight_map.keys()):
        yield f"{name}: missing, shape {list(wanted[name])}"
    for name, file in sorted(weight_map.items() & held):
        tensor = shards[file][name]
        shape, dtype = tensor.shape, tensor.dtype
        if name not in wanted:
            if name == "lm_head.weight" and tied and (_EMBEDDING, weight_map.get(_EMBEDDING)) in held:
                # Of two that differ, transformers 5 uses the head and vLLM the embedding.
                if not _same_bits(tensor, shards[weight_map[_EMBEDDING]][_EMBEDDING]):
                    yield f"{name}: differs from {_EMBEDDING}, to which tie_word_embeddings = true ties it"
            # Rotation frequencies, which old checkpoints store, follow from the config.
            elif not name.endswith(".rotary_emb.inv_freq"):
                yield f"{name}: unexpected, shape {list(shape)}"
        elif shape != wanted[name]:
            yield f"{name}: shape {list(shape)} instead of {list(wanted[name])}"
        elif dtype not in _FLOATS:
            yield f"{name}: dtype {dtype} instead of F32, BF16 or F16"


def _same_bits(a: Stored, b: Stored) -> bool:
    """Whether two tensors are equal to the bit; some rows of them are read at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype not in _FLOATS:
        return False
    return all(np.array_equal(a[rows].view(np.uint8), b[rows].view(np.uint8)) for rows in _blocks(a.shape))


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """The rows of a tensor, so many at a time that they are `_BLOCK` numbers, or one."""
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return (slice(row, min(row + step, shape[0])) for row in range(0, shape[0], step))


def _fill(leaf: Leaf, shards: views.Shards, weight_map: views.Places, mesh: Mesh | None) -> tuple[Array, list[str]]:
    """Reads a parameter's tensors into its buffer, some rows at a time; with the names of those that are not finite."""
    if mesh is not None:
        return _fill_parts(leaf, shards, weight_map, mesh)
    wrong: dict[str, None] = {}
    if math.prod(leaf.shape) <= _BLOCK:  # made on the host: a small one is not worth a program of its own
        return jnp.asarray(_part(leaf, shards, weight_map, (slice(None),) * len(leaf.shape), wrong)), list(wrong)
    buffer = jnp.zeros(leaf.shape, leaf.dtype)
    on_cpu = next(iter(buffer.devices())).platform == "cpu"
    for index, name in zip(np.ndindex(leaf.shape[: leaf.stacked]), leaf.names, strict=True):
        tensor = shards[weight_map[name]][name]
        for rows in _blocks(leaf.part_shape):
            block = tensor[leaf.first_row + rows.start : leaf.first_row + rows.stop]
            if leaf.columns is not None:
                block = block[..., leaf.columns[0] :: leaf.columns[1]]
            if not _is_finite(block, leaf.dtype):
                wrong[name] = None
            start = (rows.start, *[0] * (block.ndim - 1))
            start = (*index, *(start[::-1] if leaf.transposed else start))
            if leaf.transposed and on_cpu:
                block = _transpose(block, np.empty(block.shape[::-1], block.dtype))
            buffer = _put(buffer, block, start, leaf.transposed and not on_cpu)
            buffer.block_until_ready()  # else many blocks are on their way at a time
    return buffer, list(wrong)


def _is_finite(block: np.ndarray, dtype: np.dtype) -> bool:
    """Whether all are finite in the dtype that they become; on the host, since it is what takes long to compile."""
    with np.errstate(over="ignore"):
        return bool(np.all(np.isfinite(block.astype(dtype, copy=False))))


def _transpose(matrix: np.ndarray, into: np.ndarray) -> np.ndarray:
    """The transpose, 16 rows at a time: their parts of a column are no more than a line of the processor's cache."""
    for row in range(0, len(matrix), 16):
        into[:, row : row + 16] = matrix[row : row + 16].T
    return into


def _fill_parts(leaf: Leaf, shards: views.Shards, weight_map: views.Places, mesh: Mesh) -> tuple[Array, list[str]]:
    """`_fill` over the devices of a mesh; the host holds the part of one of them, which is put there."""
    where = NamedSharding(mesh, sharding.spec(mesh, leaf.path, leaf.shape))
    wrong: dict[str, None] = {}

    parts: dict[str, Array] = {}  # of devices with the same one, the first reads it
    arrays = []
    for device, index in where.devices_indices_map(leaf.shape).items():
        if device not in where.addressable_devices:
            continue
        known = parts.get(str(index))
        part = _part(leaf, shards, weight_map, index, wrong) if known is None else known
        arrays.append(jax.device_put(part, device).block_until_ready())  # else the host holds the next one, too
        parts[str(index)] = arrays[-1]
    return jax.make_array_from_single_device_arrays(leaf.shape, where, arrays), list(wrong)


def _part(
    leaf: Leaf,
    shards: views.Shards,
    weight_map: views.Places,
    index: tuple[slice, ...],
    wrong: dict[str, None],
) -> np.ndarray:
    """A part of a parameter, on the host; the names of tensors that are not finite in it are put into `wrong`."""
    part = np.empty([len(range(*x.indices(n))) for x, n in zip(index, leaf.shape, strict=True)], leaf.dtype)
    numbers = np.reshape(range(len(leaf.names)), leaf.shape[: leaf.stacked])[index[: leaf.stacked]]
    rows, *others = index[leaf.stacked :][::-1] if leaf.transposed else index[leaf.stacked :]
    first, step = leaf.columns or (0, 1)
    if step > 1:
        start, stop, _ = others[-1].indices(leaf.part_shape[-1])
        others[-1] = slice(start * step, stop * step)
    begin, end, _ = rows.indices(leaf.part_shape[0])
    of_tensors = part.reshape(numbers.size, *part.shape[leaf.stacked :])
    for of_tensor, number in zip(of_tensors, np.ravel(numbers), strict=True):
        tensor = shards[weight_map[leaf.names[number]]][leaf.names[number]]
        for block in _blocks((end - begin, *tensor.shape[1:])):
            start = leaf.first_row + begin
            found = tensor[(slice(start + block.start, start + block.stop), *others)][..., first::step]
            if not _is_finite(found, leaf.dtype):
                wrong[leaf.names[number]] = None
            with np.errstate(over="ignore"):
                if leaf.transposed:
                    _transpose(found, of_tensor[:, block])
                else:
                    of_tensor[block] = found
    return part


def _fill_quantized(
    leaf: Leaf, shards: views.Shards, weight_map: views.Places, kind: quantized.Kind, mesh: Mesh | None
) -> tuple[Any, list[str]]:
    """`_fill` of a quantised kernel; one layer of it is held as floats."""
    where, wrong = None, []
    if mesh is None:
        stack = quantized.empty(leaf.shape, kind)
    else:
        form = jax.eval_shape(lambda: {leaf.path: quantized.empty(leaf.shape, kind)})
        where = sharding.shardings(mesh, form)[leaf.path]
        stack = jax.jit(quantized.empty, static_argnums=(0, 1), out_shardings=where)(leaf.shape, kind)
    number = len(leaf.names) // leaf.shape[0]  # a layer's tensors: 1, or 1 for each expert
    for layer in range(leaf.shape[0]):
        names = leaf.names[layer * number : (layer + 1) * number]
        one = leaf._replace(names=names, shape=leaf.shape[1:], dtype=np.dtype(np.float32), stacked=leaf.stacked - 1)
        kernel, of_layer = _fill(one, shards, weight_map, mesh)
        stack = jax.block_until_ready(quantized.put(stack, jnp.asarray(layer), kernel, kind))  # else many layers wait
        wrong += of_layer
        give_back_freed()
    return stack if where is None else jax.device_put(stack, where), wrong


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(buffer: Array, block: Array, start: tuple[int | Array, ...], transposed: bool) -> Array:
    """The buffer with rows of a Hugging Face tensor where they belong, cast and perhaps transposed on the device."""
    block = block.T if transposed else block
    block = block.reshape((1,) * (buffer.ndim - block.ndim) + block.shape)
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), start)
