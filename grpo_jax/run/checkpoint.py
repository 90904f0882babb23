"""Checkpoints that restore exactly what was saved, or say that they cannot.

Orbax writes the files and makes each checkpoint appear whole or not at all. It has no integrity check, though: one
flipped bit in a data file restores as other weights, and a changed dtype is cast without a word. So a digest of every
leaf is kept beside the state, and names, shapes and dtypes are compared here. `run.loop` calls these; without it:

    with preemption.lock(run_dir), checkpoint.manager(run_dir / "checkpoints") as checkpoints:
        state = initial_state(config)
        if (restored := checkpoint.restore(checkpoints, state)) is not None:
            state, meta = restored
            checkpoint.check_config(meta["config"], config)
        ...
        checkpoint.save(checkpoints, state, {"config": config})

Several processes write into one folder, that all of them see: each its parts of the arrays that are divided over them,
of which each part has a digest of its own. They are read onto any mesh and any number of processes.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from grpo_jax import processes
from grpo_jax.models.sharding import put
from grpo_jax.programs import give_back_freed
from grpo_jax.types import Params, TrainState

_ABSENT = "(absent)"
_CHUNK, _FILE = 2**24, 2**26  # bytes of a piece of an array, and of a file of a checkpoint
_PART = 2**27  # bytes that are read at a time


class CheckpointCorruptError(OSError):
    """A checkpoint cannot be read back as it was written."""


def manager(
    directory: str | os.PathLike[str], *, max_to_keep: int | None = 3, read_only: bool = False
) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints; close it, or use it in a `with`.

    Args:
      directory: created where absent. What a killed save left in it is removed: hold `preemption.lock` meanwhile.
      max_to_keep: older checkpoints than this many are deleted after a save; None keeps all.
      read_only: to look at the folder of a run that may be alive; nothing is created or removed.
    """
    folder = pathlib.Path(directory).absolute()
    if not read_only:
        with processes.alike("leftovers"):
            _remove_leftovers(folder)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        create=not read_only,
        read_only=read_only,
        enable_async_checkpointing=False,  # an asynchronous save reports a full disk only at the next one
    )
    return ocp.CheckpointManager(folder, options=options, handler_registry=_handlers())


def _remove_leftovers(folder: pathlib.Path) -> None:
    if not processes.is_first():
        return
    for leftover in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}"):
        shutil.rmtree(leftover)  # not by Orbax, which does it in the background, also of a save begun meanwhile
    for step in folder.glob("[0-9]*"):
        if step.is_dir() and not any(step.iterdir()):
            step.rmdir()  # its deletion was killed; it would count as a checkpoint


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Orbax's own, but for the arrays of a state, of which no copy is made: nothing changes them meanwhile."""
    arrays = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)), (jax.Array, type_handlers.ArrayHandler())
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    of_state = ocp.PyTreeCheckpointHandler(type_handler_registry=arrays)
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        handlers.add("state", args, of_state)
    return handlers


def save(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    meta: Mapping[str, Any],
    *,
    initial: Sequence[str] = ("ref_params", "frozen"),
) -> None:
    """Writes the state as checkpoint `state.step`, and returns when it is on disk.

    Takes the time of a copy to the host, one SHA-256 of it and the writing; the host holds what is written once
    meanwhile, or not at all where it is the device, and some 300 MB of it compressed. What is not written is digested
    a leaf at a time, and not again while the arrays are the same ones.

    Args:
      checkpoints: from `manager`.
      state: any pytree in each field; keys are typed ones.
      meta: what else a resumed run needs, such as its config and position in the data; must be JSON.
      initial: fields that are still as they were when the run began, such as the base of adapters. They are not
        written, only their digest is, and `restore` takes them from its `like`. Pass `("frozen",)` in a run that
        updates its reference.

    Raises:
      FileExistsError: if this step is saved already. (One that does not verify is replaced: it is what a resumed run
        meets after it fell back to an older step.)
      ValueError: if an `initial` field is not what it was in the checkpoint before.
    """
    step = int(state.step)
    _make_room(checkpoints, step, state)
    leaves = _leaves(state)
    unwritten = sorted(path for path in leaves if path.partition("/")[0] in initial)
    arrays = {path: _held(leaf) for path, leaf in leaves.items() if path not in unwritten}
    facts = {path: _facts(leaf, arrays[path]) if path in arrays else _facts_of(leaf) for path, leaf in leaves.items()}
    facts = _merged(processes.exchange("facts", facts))
    content = {"meta": meta, "leaves": facts, "initial": unwritten, "made_with": _made_with(leaves)}
    content = json.loads(json.dumps(content))  # as it will be read: tuples are lists, keys are strings
    if checkpoints.all_steps():
        _refuse_changed_initial(checkpoints, content)
    # Orbax refuses arrays without elements; they are made anew from their shape.
    written = {path: _stored(array) for path, array in arrays.items() if array.size}
    # In pieces: Orbax holds what it has compressed until a file is full, and a whole array while it compresses it.
    pieces = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK) for path in written}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(written, save_args=pieces, ocdbt_target_data_file_size=_FILE),
        meta=ocp.args.JsonSave({"content": content, "sha256": _json_digest(content)}),
    )
    below_a_broken_one = step < max(checkpoints.all_steps(), default=0)  # where Orbax would skip it
    saved = checkpoints.save(step, args=items, force=below_a_broken_one)
    checkpoints.wait_until_finished()
    give_back_freed()
    if not saved:
        raise RuntimeError(f"Orbax did not save step {step} in {checkpoints.directory}; was it opened read-only?")


def restore(
    checkpoints: ocp.CheckpointManager,
    like: TrainState,
    *,
    step: int | None = None,
    check: Callable[[dict[str, Any]], Any] | None = None,
    report: Callable[[str], Any] = warnings.warn,
) -> tuple[TrainState, dict[str, Any]] | None:
    """Reads a checkpoint into the structure and onto the devices of `like`, verified to the bit.

    Args:
      checkpoints: from `manager`.
      like: arrays, or `jax.ShapeDtypeStruct`s (with a sharding where it matters), so that a large state need not be
        held twice. Fields that were not written are taken from it and must be arrays; they are shared, not copied.
      step: None for the newest checkpoint that verifies, reporting which newer ones were passed over.
      check: called with a checkpoint's `meta` before its arrays are read, to refuse it by raising.
      report: takes one line on checkpoints passed over, or on what keeps the resumed run from being bit-exact.

    Returns:
      The state and the `meta` of `save`, or None where nothing has been saved yet.

    Raises:
      CheckpointCorruptError: if `step`, or every checkpoint there is, fails to verify.
      FileNotFoundError: if there is no checkpoint `step`.
      ValueError: if names, shapes or dtypes differ from `like`, with all that do; nothing is ever cast.
    """
    steps = sorted(checkpoints.all_steps(), reverse=True)
    if step is not None:
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {checkpoints.directory}, only {steps[::-1]}")
        steps = [step]
    failures = []
    for candidate in steps:
        try:
            state, content = _read(checkpoints, candidate, like, check)
        except CheckpointCorruptError as error:
            failures.append(str(error))
            continue
        if failures:
            report(f"restored step {candidate}, having passed over: " + "; ".join(failures))
        now = _made_with(_leaves(like))
        then = content["made_with"]
        changes = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
        if changes:
            report(f"not bit-exact from step {candidate} on: " + ", ".join(changes))
        return state, content["meta"]
    if failures:
        raise CheckpointCorruptError(f"nothing to restore in {checkpoints.directory}: " + "; ".join(failures))
    return None


def read_meta(directory: str | os.PathLike[str], *, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, the newest if None is given, and the `meta` that it was saved with.

    Raises:
      CheckpointCorruptError: if the meta fails to verify.
      FileNotFoundError: if the folder has no checkpoint, or not that one.
    """
    with manager(directory, read_only=True) as checkpoints:
        step = _chosen(checkpoints, step)
        return step, _read_content(checkpoints, step)["meta"]


def restore_params(directory: str | os.PathLike[str], like: Params, *, step: int | None = None) -> Params:
    """Reads the parameters of a checkpoint and nothing else of its state, verified to the bit.

    Args:
      directory: of the checkpoints of a run, which may be alive.
      like: arrays or `jax.ShapeDtypeStruct`s, into the structure and onto the devices of which they are read.
      step: None for the newest checkpoint.

    Raises:
      CheckpointCorruptError: if it fails to verify. No older one is taken in its place.
      FileNotFoundError: if the folder has no checkpoint, or not that one.
      ValueError: if names, shapes or dtypes differ from `like`, with all that do.
    """
    with manager(directory, read_only=True) as checkpoints:
        step = _chosen(checkpoints, step)
        saved = _read_content(checkpoints, step)["leaves"]
        facts = {path: fact for path, fact in saved.items() if path.partition("/")[0] == "params"}
        leaves = _leaves({"params": like})
        _refuse_mismatch(facts, leaves, f"step {step} in {checkpoints.directory}")
        arrays = _read_arrays(checkpoints, step, leaves, facts)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in leaves])


def _chosen(checkpoints: ocp.CheckpointManager, step: int | None) -> int:
    steps = sorted(checkpoints.all_steps())
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {checkpoints.directory}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {checkpoints.directory}, only {steps}")
    return steps[-1] if step is None else step


def check_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, allow: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume under another configuration.

    Args:
      saved: the configuration in the checkpoint's `meta`.
      current: that of this run, of JSON values; nested mappings become dotted names. Two texts that name one file or
        folder are the same.
      allow: fields, or whole sections, that may change: `("optimizer.learning_rate",)`.

    Returns:
      The allowed changes, `{field: (old, new)}`, for the record.

    Raises:
      ValueError: lists each changed field that is not allowed with both values.
    """
    old, new = _dotted(saved), _dotted(current)
    changes = {
        field: (old.get(field, _ABSENT), new.get(field, _ABSENT))
        for field in sorted(old.keys() | new.keys())
        if not _same(old.get(field, _ABSENT), new.get(field, _ABSENT))
    }
    refused = [
        f"  {field}: {before!r} -> {after!r}"
        for field, (before, after) in changes.items()
        if not any(field == name or field.startswith(f"{name}.") for name in allow)
    ]
    if refused:
        raise ValueError(
            "the configuration is not the checkpoint's; go back to it, or begin anew in another folder:\n"
            + "\n".join(refused)
        )
    return changes


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves by name, such as `params/layers/kernel`; Python and NumPy numbers become arrays, as jit makes them."""
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two leaves share a name: {sorted({name for name in names if names.count(name) > 1})}")
    return {
        name: leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.asarray(leaf) for name, leaf in found
    }


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _held(leaf: jax.Array) -> Any:
    """The array on the host, or as it is where other processes have parts of it."""
    return leaf if processes.is_spread(leaf) else _to_host(leaf)


def _to_host(leaf: jax.Array) -> np.ndarray:
    array = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    # A second array of the same buffers, because a NumPy copy lives as long as the array that it was taken of.
    buffers = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers))


def _host_form(leaf: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _facts(leaf: jax.Array, array: Any) -> dict[str, Any]:
    kind = {"impl": jax.random.key_impl(leaf)} if _is_key(leaf) else {"weak": leaf.weak_type}
    facts = {"dtype": str(leaf.dtype), "shape": list(leaf.shape), **kind}
    if not processes.is_spread(array):
        return facts | {"sha256": _digest(array)}
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return facts | {"parts": {_place_of(shard.index, leaf.shape): _digest(np.asarray(shard.data)) for shard in own}}


def _merged(of_processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts with the parts of all processes."""
    merged = of_processes[0]
    for facts in of_processes[1:]:
        for path, fact in facts.items():
            if "parts" in fact:
                merged[path]["parts"] |= fact["parts"]
    return merged


def _place_of(index: Sequence[slice], shape: Sequence[int]) -> str:
    """`0:4,8:16` of slices."""
    return ",".join("{}:{}".format(*part.indices(n)) for part, n in zip(index, shape, strict=True))


def _index_of(place: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in place.split(","))


_KNOWN: dict[int, tuple[weakref.ref[jax.Array], dict[str, Any]]] = {}  # id of an array, which may be another's later


def _facts_of(leaf: jax.Array) -> dict[str, Any]:
    """`_facts` of an array that stays what it is for a whole run."""
    known = _KNOWN.get(id(leaf))
    if known is None or known[0]() is not leaf:
        place = id(leaf)
        facts = _facts(leaf, _to_host(leaf)) if not processes.is_spread(leaf) else _facts_of_blocks(leaf)
        known = weakref.ref(leaf, lambda _: _KNOWN.pop(place, None)), facts
        _KNOWN[place] = known
    return known[1]


def _facts_of_blocks(leaf: jax.Array) -> dict[str, Any]:
    """`_facts` with one digest of an array that is divided over processes, which is the same on every mesh."""
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "sha256": _digest(leaf), "weak": leaf.weak_type}


def _stored(array: Any) -> Any:
    """The array as Orbax can save it: a code of 4 bits without a sign as a byte."""
    if array.dtype != jnp.uint4:
        return array
    return array.view(np.uint8) if isinstance(array, np.ndarray) else array.astype(jnp.uint8)


def _digest(array: Any) -> str:
    """Of the whole array, wherever it lies."""
    digest = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
    for block in processes.blocks(array):
        digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()


def _is_as_saved(array: Any, fact: dict[str, Any]) -> bool:
    """Whether an array has the digest, or those of its parts, that were written with it."""
    if "sha256" in fact:
        return _digest(array) == fact["sha256"]
    here, somewhere, same = {}, set(), True
    if processes.is_spread(array):
        here = {_place_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
        somewhere = {_place_of(i, array.shape) for i in array.sharding.devices_indices_map(array.shape).values()}
    for place, digest in sorted(fact["parts"].items()):
        if place in here:
            same &= _digest(np.asarray(here[place])) == digest
        elif place not in somewhere:  # else another process looks at it; this is gathered by all of them
            same &= _digest(processes.whole(array[_index_of(place)])) == digest
    return same


def _json_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _made_with(leaves: dict[str, Any]) -> dict[str, str]:
    """What must be equal for two runs to be equal to the bit, beside their inputs."""
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves.values()]
    meshes = {str(dict(s.mesh.shape)) for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy")
    together = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}{together}",
        "mesh": " ".join(sorted(meshes)) or "none",
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def _make_room(checkpoints: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    if step not in checkpoints.all_steps():
        return
    try:
        _read(checkpoints, step, state)
    except CheckpointCorruptError:
        checkpoints.delete(step)
    else:
        raise FileExistsError(f"step {step} is saved already in {checkpoints.directory}; use another folder")


def _refuse_changed_initial(checkpoints: ocp.CheckpointManager, content: dict[str, Any]) -> None:
    """Told at the second save, so that a run does not go on writing checkpoints that it can never restore."""
    try:
        before = _read_content(checkpoints, max(checkpoints.all_steps()))["leaves"]
    except CheckpointCorruptError:
        return
    digests = {path: content["leaves"][path]["sha256"] for path in content["initial"]}
    if changed := [path for path, digest in digests.items() if before.get(path, {}).get("sha256") != digest]:
        raise ValueError(f"not as in the last checkpoint, so they must be written, see `initial`: {', '.join(changed)}")


def _refuse_other_initial(unwritten: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    for path, (leaf, fact) in unwritten.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{path} was not written, so `like` must hold its array")
        if _facts_of(leaf)["sha256"] != fact["sha256"]:
            raise ValueError(f"{path} was not written, and that of `like` is not what the run began with")


def _from_orbax(checkpoints: ocp.CheckpointManager, step: int, **item: Any) -> Any:
    """One item of a checkpoint; whatever Orbax makes of broken files (any exception there is) becomes one error."""
    found, raised = None, None
    try:
        found = next(iter(checkpoints.restore(step, args=ocp.args.Composite(**item)).values()))
    except Exception as error:
        raised = error
    if (raised := processes.shared_error("read", raised)) is not None:
        reason = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
        raise CheckpointCorruptError(f"step {step} ({next(iter(item))} unreadable, {reason})") from raised
    return found


def _read_content(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    read = _from_orbax(checkpoints, step, meta=ocp.args.JsonRestore())
    if not isinstance(read, dict) or _json_digest(read.get("content", {})) != read.get("sha256"):
        raise CheckpointCorruptError(f"step {step} (the digest of meta differs)")
    return read["content"]


def _read(
    checkpoints: ocp.CheckpointManager,
    step: int,
    like: TrainState,
    check: Callable[[dict[str, Any]], Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    content = _read_content(checkpoints, step)
    if check is not None:
        check(content["meta"])
    facts, leaves = content["leaves"], _leaves(like)
    _refuse_mismatch(facts, leaves, f"step {step} in {checkpoints.directory}")
    _refuse_other_initial({path: (leaves[path], facts[path]) for path in content["initial"]})
    wanted = {path: leaf for path, leaf in leaves.items() if path not in content["initial"]}
    leaves |= _read_arrays(checkpoints, step, wanted, facts)
    return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values())), content


def _read_arrays(
    checkpoints: ocp.CheckpointManager, step: int, leaves: dict[str, Any], facts: dict[str, Any]
) -> dict[str, jax.Array]:
    """What was saved of the leaves, verified, on their devices; the host holds some of them at a time.

    Of several processes each reads the parts that its devices hold, and all of what is not divided.
    """
    placed: dict[str, jax.Array] = {}
    broken: list[str] = []
    for part in _parts({path: _host_form(leaf) for path, leaf in leaves.items()}):
        # Read as NumPy arrays: the devices and shardings of the run that saved then play no part.
        arrays = {
            path: form if processes.is_spread(form) else np.zeros(form.shape, form.dtype) for path, form in part.items()
        }
        written = {path: _form_of(array) for path, array in arrays.items() if array.size}
        if written:
            how = ocp.checkpoint_utils.construct_restore_args(written)
            item = ocp.args.PyTreeRestore(written, restore_args=how, partial_restore=True)
            read = _from_orbax(checkpoints, step, state=item)
            arrays |= {path: _unstored(x, arrays[path].dtype) for path, x in read.items()}
            del read
        wrong = [path for path, array in arrays.items() if not _is_as_saved(array, facts[path])]
        broken += sorted({path for paths in processes.exchange("wrong", wrong) for path in paths})
        if not broken:
            placed |= {path: _place(arrays.pop(path), leaves[path], facts[path]) for path in part}
        give_back_freed()
    if broken:
        raise CheckpointCorruptError(f"step {step} (the digest of {', '.join(broken)} differs)")
    return placed


def _parts(forms: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The leaves in parts of at most `_PART` bytes, or of one leaf."""
    part: dict[str, Any] = {}
    room = _PART
    for path, form in forms.items():
        size = form.size * form.dtype.itemsize
        if part and size > room:
            yield part
            part, room = {}, _PART
        part[path] = form
        room -= size
    yield part


def _form_of(array: Any) -> Any:
    """What Orbax is to read: a NumPy array, or parts of one that lies on many devices."""
    if isinstance(array, np.ndarray):
        return _stored(array)
    dtype = np.uint8 if array.dtype == jnp.uint4 else array.dtype
    return jax.ShapeDtypeStruct(array.shape, dtype, sharding=array.sharding)


def _unstored(array: Any, dtype: Any) -> Any:
    """The inverse of `_stored`."""
    if dtype != jnp.uint4:
        return array
    return array.view(dtype) if isinstance(array, np.ndarray) else array.astype(dtype)


def _place(array: Any, like: Any, fact: dict[str, Any]) -> jax.Array:
    if isinstance(array, jax.Array):
        return array  # read onto its devices
    sharding = like.sharding if getattr(like, "committed", like.sharding is not None) else None
    if "impl" in fact:
        made = jax.random.wrap_key_data(jnp.array(array), impl=fact["impl"])
    elif fact["weak"]:  # a weak float32 beside bfloat16 gives bfloat16, a strong one float32: other bits
        made = jnp.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
    else:
        made = jnp.array(array) if sharding is None else array
    # What was not committed to a device must not be now, or it could not meet arrays on a mesh.
    return made if sharding is None else put(made, sharding)


def _refuse_mismatch(facts: dict[str, Any], leaves: dict[str, Any], where: str) -> None:
    saved = {path: f"{fact['dtype']}{fact['shape']}" for path, fact in facts.items()}
    wanted = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
    differing = [
        f"  {path}: saved {saved.get(path, _ABSENT)}, wanted {wanted.get(path, _ABSENT)}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if differing:
        raise ValueError(f"{where} is of another state:\n" + "\n".join(differing))


def _same(old: Any, new: Any) -> bool:
    """Whether two settings are equal, or name the same file: `model/` and `model`, or a path from elsewhere."""
    if json.dumps(old) == json.dumps(new):
        return True
    paths = isinstance(old, str) and isinstance(new, str) and old and new
    return bool(paths) and os.path.exists(new) and os.path.realpath(old) == os.path.realpath(new)


def _dotted(config: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(
        json.loads(json.dumps(config)), is_leaf=lambda node: not isinstance(node, dict) or not node
    )
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
