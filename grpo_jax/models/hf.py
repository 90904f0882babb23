"""Hugging Face checkpoints in and out: safetensors <-> params, strict both ways.

Names are mechanical. The decoder's modules are called what transformers calls
them; its layers are stacked on axis 0, and its kernels are transposed:

    params["layers"]["self_attn"]["q_proj"]["kernel"][i] = model.layers.{i}.self_attn.q_proj.weight.T

Only safetensors is read: no pickle is opened and no code of a repository is run.
"""

import contextlib
import fnmatch
import functools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import transformers
from jax.typing import DTypeLike

from grpo_jax import models
from grpo_jax.models.attention import Attention, auto
from grpo_jax.policies import Policy
from grpo_jax.types import Array, Params

_WEIGHTS = "model.safetensors"
_BLOCK = 2**22  # numbers read at a time; the host holds two copies of them
_EMBEDDING = "model.embed_tokens.weight"
_INDEX = "model.safetensors.index.json"
_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # configs, chat templates, vocabularies
_EXPORTED_FILES = [*_TEXT_FILES, "additional_chat_templates", "model*.safetensors"]
_MARK = {"written_by": "grpo_jax"}  # in the metadata of a shard: what an export may replace


def load_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    cache_dtype: DTypeLike | None = None,
    logits_dtype: DTypeLike = jnp.float32,
    attention: Attention = auto,
    remat: bool | Callable[..., bool] = True,
    revision: str | None = None,
) -> tuple[Policy, Params]:
    """Reads a model of one of the families in `models`.

    Every tensor of the checkpoint is used once and every parameter is filled
    once. Tensors are read in blocks of at most 16 MB, so that the host holds little
    more than the params in `dtype`, and where they live on a device not even those.

    Args:
      path_or_repo: a folder, or the id of a repository on the Hugging Face Hub.
      dtype: of the params, whatever the checkpoint's. Train in float32.
      compute_dtype: of the layers' arithmetic; None for `dtype`.
      cache_dtype: of the keys and values of completions while they are sampled; None for
        `compute_dtype`. A narrower one saves memory and moves sampled log-probs away from scored ones.
      logits_dtype: of the operands of the last product.
      attention: how attention is computed, one of `models.attention` (`cudnn` and `splash` for
        long rows on GPUs and TPUs) or a function like them; they agree to rounding.
      remat: recompute a layer in the backward pass instead of keeping its activations. A
        policy of `jax.checkpoint`, which says what to keep, must be the same object in
        every call, or jit compiles again.
      revision: a branch, tag or commit of the repository; a commit repeats a run.

    Returns:
      The policy, and its params on the default device.

    Raises:
      FileNotFoundError: if there is no folder, or nothing in it that may be read.
      ValueError: for a config that the decoder does not honour, a file that cannot
        be read, or tensors that do not fit the config; all of them are named.
    """
    folder = _folder(path_or_repo, revision, [*_TEXT_FILES, "*.safetensors"])
    config = models.from_hf_config(
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False),
        param_dtype=dtype,
        dtype=dtype if compute_dtype is None else compute_dtype,
        cache_dtype=cache_dtype,
        logits_dtype=logits_dtype,
        attention=attention,
        remat=remat,
    )
    policy = models.decoder(config)
    shapes = _shapes(policy)
    params = _read(folder, _leaves(shapes), config.tie_embeddings)
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
    folder = _folder(path_or_repo, revision, [*_TEXT_FILES, "*.safetensors"])
    hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    hf_config.tie_word_embeddings = True  # there is no head over the vocabulary
    compute = dtype if compute_dtype is None else compute_dtype
    policy = models.decoder(models.from_hf_config(hf_config, param_dtype=dtype, dtype=compute))
    shapes = _shapes(policy)
    head = _Leaf(["score.weight"], (hf_config.hidden_size, 1), np.dtype(dtype), stacked=False, transposed=True)
    *params, weight = _read(folder, [*_leaves(shapes), head], tied=False)
    return policy, jax.tree.unflatten(jax.tree.structure(shapes), params), weight


def _read(folder: Path, leaves: list["_Leaf"], tied: bool) -> list[Array]:
    """The parameters, if the folder's tensors are exactly theirs."""
    with contextlib.ExitStack() as stack:
        weight_map = _weight_map(folder)
        shards = {file: stack.enter_context(_open(folder / file)) for file in sorted(set(weight_map.values()))}
        if offenders := list(_offenders(leaves, shards, weight_map, tied)):
            raise ValueError("\n  ".join([f"{folder} does not hold the tensors of its config.json:", *offenders]))
        return [_fill(leaf, shards, weight_map) for leaf in leaves]


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

    The folder appears whole or not at all. Where `path` holds an earlier export,
    that is put aside first and deleted last.

    Args:
      policy: a decoder whose config came from `models.from_hf_config`.
      params: its parameters.
      path: a new or empty folder, or one that this function wrote.
      tokenizer: saved beside the weights.
      eos_ids: tokens that end a completion, beside those of the config and the tokenizer.
      dtype: of the tensors; None for that of the params.
      max_shard_bytes: the largest file, unless one tensor is larger; the host holds one at a time.

    Raises:
      FileExistsError: if `path` holds what no export wrote.
      AssertionError: if the params are not those of the policy.
      ValueError: if the tokenizer has more tokens than the model.
    """
    fields = json.loads(getattr(policy.config, "hf_config", None) or "null")
    if fields is None:
        raise ValueError("the policy has no Hugging Face config; make it by models.from_hf_config")
    if tokenizer is not None and len(tokenizer) > fields["vocab_size"]:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {fields['vocab_size']}")
    shapes = _shapes(policy)
    chex.assert_trees_all_equal_shapes(params, shapes)
    leaves, arrays = _leaves(shapes), jax.tree.leaves(params)
    dtypes = [jnp.dtype(array.dtype if dtype is None else dtype) for array in arrays]

    path = Path(path).expanduser().resolve()
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        _write_shards(partial, leaves, arrays, dtypes, max_shard_bytes)
        _write_json(partial / "config.json", _exported_config(fields, dtypes[0].name))
        ends = {*_ids(fields.get("eos_token_id")), *_ids(getattr(tokenizer, "eos_token_id", None)), *eos_ids}
        if ends:
            others = {name: fields.get(name) for name in ("bos_token_id", "pad_token_id")}
            _write_json(partial / "generation_config.json", others | {"eos_token_id": sorted(ends)})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for written in [*partial.rglob("*"), partial]:
            _sync(written)
        replaced = partial.with_name(partial.name + ".replaced")
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_tokenizer(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None
) -> transformers.PreTrainedTokenizerBase:
    """Reads a tokenizer; one that needs code of its repository is refused."""
    source = _local(path_or_repo, revision) or path_or_repo
    # An id goes through as it is: transformers repairs some tokenizers, such as DeepSeek's, by the repository's name.
    return transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def eos_ids(
    path_or_repo: str | os.PathLike[str],
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    *,
    also: Sequence[int] = (),
    revision: str | None = None,
) -> tuple[int, ...]:
    """The tokens that end a completion: those of generation_config.json, config.json and the tokenizer together.

    Chat models end a turn with a token of their own, which often only one of the
    three names; a sampler that misses it runs to the limit every time.

    Args:
      path_or_repo: a folder, or the id of a repository on the Hugging Face Hub.
      tokenizer: None reads that of `path_or_repo`, if it has one.
      also: more of them.
      revision: a branch, tag or commit of the repository.

    Raises:
      ValueError: if there is none.
    """
    folder = _folder(path_or_repo, revision, _TEXT_FILES)
    if tokenizer is None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(folder)
    ids = {*also, *_ids(getattr(tokenizer, "eos_token_id", None))}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids |= _ids(_read_json(folder / name).get("eos_token_id"))
    if not ids:
        raise ValueError(f"neither the configs nor the tokenizer of {folder} name an end-of-sequence token; pass also=")
    return tuple(sorted(ids))


class _Leaf(NamedTuple):
    """A parameter and the Hugging Face tensors that it is made of."""

    names: list[str]  # one for each layer if stacked, else one
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def _shapes(policy: Policy) -> Params:
    return jax.eval_shape(policy.init, jax.random.key(0))


def _leaves(shapes: Params) -> list[_Leaf]:
    return [_leaf([key.key for key in path], leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]


def _leaf(path: list[str], leaf: jax.ShapeDtypeStruct) -> _Leaf:
    stacked, transposed = path[0] == "layers", path[-1] in ("kernel", "lm_head")
    if path == ["lm_head"]:
        return _Leaf(["lm_head.weight"], leaf.shape, leaf.dtype, stacked, transposed)
    kind = "bias" if path[-1] == "bias" else "weight"
    modules = [f"layers.{layer}" for layer in range(leaf.shape[0])] if stacked else [path[0]]
    names = [".".join(["model", module, *path[1:-1], kind]) for module in modules]
    return _Leaf(names, leaf.shape, leaf.dtype, stacked, transposed)


def _folder(path_or_repo: str | os.PathLike[str], revision: str | None, patterns: list[str]) -> Path:
    """The folder itself, or a repository's files of those patterns."""
    if folder := _local(path_or_repo, revision):
        return folder
    # Some repositories hold the weights a second time in another layout.
    twice = ["*/*.safetensors", "consolidated*.safetensors"]
    return Path(
        huggingface_hub.snapshot_download(
            os.fspath(path_or_repo), revision=revision, allow_patterns=patterns, ignore_patterns=twice
        )
    )


def _local(path_or_repo: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The folder, or None for what can only be the id of a repository."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder and has no revision {revision!r}")
        return path
    try:
        huggingface_hub.utils.validate_repo_id(os.fspath(path_or_repo))
    except huggingface_hub.errors.HFValidationError:
        raise FileNotFoundError(f"{path_or_repo} is neither a folder nor the id of a repository") from None
    return None


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor; files lie in the folder itself, whatever the index says."""
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {_WEIGHTS} and {_INDEX}; delete the one that is not meant")
    if single.is_file():
        with _open(single) as shard:
            return dict.fromkeys(shard.keys(), _WEIGHTS)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no {_WEIGHTS} or {_INDEX}, only {sorted(os.listdir(folder))}. A .bin or .pt file is a "
            "pickle, which can run code, and is never opened; where you trust it, convert it with transformers and "
            "torch: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    if outside := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
        raise ValueError(f"{index} names what is no safetensors file of its folder: {outside}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {missing}")
    return weight_map


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file; was its download cut short? {error}") from error


def _offenders(
    leaves: list[_Leaf], shards: Mapping[str, Any], weight_map: Mapping[str, str], tied: bool
) -> Iterator[str]:
    """A line for each tensor that is missing, superfluous, twice there or of another shape or dtype."""
    wanted = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    held = {(name, file) for file, shard in shards.items() for name in shard.keys()}  # noqa: SIM118
    for name, file in sorted(weight_map.items() - held):
        yield f"{name}: the index puts it in {file}, where it is not"
    for name, file in sorted(held - weight_map.items()):
        yield f"{name}: in {file}, where the index does not put it"
    for name in sorted(wanted.keys() - weight_map.keys()):
        yield f"{name}: missing, shape {list(wanted[name])}"
    for name, file in sorted(weight_map.items() & held):
        tensor = shards[file].get_slice(name)
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if name not in wanted:
            if name == "lm_head.weight" and tied and (_EMBEDDING, weight_map.get(_EMBEDDING)) in held:
                embedding = shards[weight_map[_EMBEDDING]].get_tensor(_EMBEDDING)
                # Of two that differ, transformers 5 uses the head and vLLM the embedding.
                if not _same_bits(shards[file].get_tensor(name), embedding):
                    yield f"{name}: differs from {_EMBEDDING}, to which tie_word_embeddings = true ties it"
            # Rotation frequencies, which old checkpoints store, follow from the config.
            elif not name.endswith(".rotary_emb.inv_freq"):
                yield f"{name}: unexpected, shape {list(shape)}"
        elif shape != wanted[name]:
            yield f"{name}: shape {list(shape)} instead of {list(wanted[name])}"
        elif dtype not in ("F32", "BF16", "F16"):
            yield f"{name}: dtype {dtype} instead of F32, BF16 or F16"


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.itemsize}"
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))


def _fill(leaf: _Leaf, shards: Mapping[str, Any], weight_map: Mapping[str, str]) -> Array:
    """Reads a parameter's tensors into its buffer, some rows at a time."""
    buffer = jnp.zeros(leaf.shape, leaf.dtype)
    for layer, name in enumerate(leaf.names):
        tensor = shards[weight_map[name]].get_slice(name)
        rows, *rest = leaf.tensor_shape
        step = max(1, _BLOCK // max(1, math.prod(rest)))
        for row in range(0, rows, step):
            buffer = _put(buffer, tensor[row : min(row + step, rows)], layer, row, leaf.stacked, leaf.transposed)
            buffer.block_until_ready()  # else many blocks are on their way at a time
    return buffer


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(4, 5))
def _put(buffer: Array, block: Array, layer: Array, row: Array, stacked: bool, transposed: bool) -> Array:
    """Writes rows of a Hugging Face tensor where they belong, cast and transposed on the device."""
    start: tuple[Any, ...] = (row, *[0] * (block.ndim - 1))
    if transposed:
        block, start = block.T, start[::-1]
    if stacked:
        block, start = block[None], (layer, *start)
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), start)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _get(leaf: Array, layer: Array, stacked: bool, transposed: bool, dtype: np.dtype) -> Array:
    tensor = leaf[layer] if stacked else leaf
    return (tensor.T if transposed else tensor).astype(dtype)


def _write_shards(
    folder: Path, leaves: list[_Leaf], arrays: list[Array], dtypes: list[np.dtype], max_shard_bytes: int
) -> None:
    """Writes the weights into one file, or into several with an index."""
    shards: list[dict[str, tuple[int, int]]] = [{}]  # name -> leaf, layer
    room, total = max_shard_bytes, 0
    for number, leaf in enumerate(leaves):
        size = math.prod(leaf.tensor_shape) * dtypes[number].itemsize
        for layer, name in enumerate(leaf.names):
            if size > room and shards[-1]:
                shards.append({})
                room = max_shard_bytes
            shards[-1][name] = (number, layer)
            room, total = room - size, total + size

    def tensor(number: int, layer: int) -> np.ndarray:
        leaf = leaves[number]
        # safetensors writes another array's numbers, without a word, where one is not contiguous.
        return np.ascontiguousarray(_get(arrays[number], layer, leaf.stacked, leaf.transposed, dtypes[number]))

    files = [_WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: tensor(*place) for name, place in shard.items()}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"} | _MARK)


def _exported_config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, with the rotation also in the spelling of transformers 4, which would else take its default."""
    rope = fields["rope_parameters"]
    scaled = rope.get("rope_type", "default") != "default"
    replaced = {
        "architectures": [fields["model_type"].capitalize() + "ForCausalLM"],
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"} if scaled else None,
    }
    return {name: value for name, value in fields.items() if name != "auto_map"} | replaced


def _check_replaceable(path: Path) -> None:
    """An export may take the place of nothing, of an empty folder or of another export with nothing added."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    marks = []
    if path.is_dir():
        for shard in path.glob("model*.safetensors"):
            with _open(shard) as opened:
                marks.append((opened.metadata() or {}).items() >= _MARK.items())
    if not marks or not all(marks):
        raise FileExistsError(f"{path} exists and was not written by save_pretrained; choose another path")
    is_exported = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in _EXPORTED_FILES)  # noqa: E731
    if added := sorted(name for name in os.listdir(path) if not is_exported(name)):
        raise FileExistsError(f"{path} also holds what save_pretrained did not write: {added}; choose another path")


def _ids(eos: int | Sequence[int] | None) -> set[int]:
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
