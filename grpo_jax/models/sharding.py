"""Where arrays lie when there are several devices: one table of the decoder's parameters, and the rows of a batch.

    mesh = sharding.mesh(data=2, fsdp=4)
    policy, params = hf.load_pretrained(model, mesh=mesh)
    state = sharding.place(mesh, init_state(params, optimizer, key, reference=True))
    state, metrics = step(state, sharding.batch(mesh, prompts))

The mesh has three axes, each of them 1 unless given:

    data     copies of the parameters, each with rows of its own
    fsdp     rows, too; and the parameters in parts, gathered a layer at a time where they are used (Rajbhandari et al.
             2020, arXiv:1910.02054, stage 3). Of TPUs rather an axis or two of a slice than all of its chips, the rest
             `data`: over all the compiler sends twice the bytes
    tensor   heads, columns of the MLP, experts and the vocabulary (Shoeybi et al. 2019, arXiv:1909.08053)

The program stays the one of a single device. JAX divides it (GSPMD), and the decoder of a config with a `mesh` says
where its parameters, activations and caches are to lie. The rows of `[B, G]` are divided over `data` and `fsdp` by
prompts, and where these do not divide, by completions.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from grpo_jax.types import Array, Params

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes over which rows are divided

# The end of a parameter's path, and the axes over which its last dimensions are divided; all before are whole (L).
TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head", ("fsdp", "tensor")),
    (r"(q|k|v|gate|up)_proj/kernel(/qvalue|/scale)?", ("fsdp", "tensor")),
    (r"(q|k|v|gate|up)_proj/bias", ("tensor",)),
    (r"(q|k|v|gate|up)_proj/lora_a", ("fsdp", None)),
    (r"(q|k|v|gate|up)_proj/lora_b", (None, "tensor")),
    (r"(o|down)_proj/kernel(/qvalue|/scale)?", ("tensor", "fsdp")),
    (r"(o|down)_proj/lora_a", ("tensor", None)),
    (r"(o|down)_proj/lora_b", (None, "fsdp")),
    (r"(o|down)_proj/bias", ("fsdp",)),
    (r"router", ("fsdp", None)),
    (r"router_bias", ("fsdp",)),
    (r"experts_(gate|up|down)/(kernel(/qvalue|/scale)?|lora_a)", ("tensor", "fsdp", None)),
    (r"experts_(gate|up|down)/lora_b", ("tensor", None, "fsdp")),
    (r"experts_(gate|up|down)/bias", ("tensor", "fsdp")),
)


def mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data * fsdp * tensor` devices.

    On a slice of TPUs each size is laid onto whole axes of the slice where that can be; else an axis is split.

    Args:
      data: copies of the parameters.
      fsdp: parts of the parameters, with rows of their own.
      tensor: parts of each layer that work on the same rows; of devices with a fast connection.
      devices: all of them unless given; those of a topology compile programs for machines that are not there.

    Raises:
      ValueError: for a size below 1, or if the sizes do not make the number of devices.
    """
    shape = (data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"data={data}, fsdp={fsdp}, tensor={tensor} makes {math.prod(shape)} devices and there are {len(devices)}: "
            "the product of the three, each at least 1, is the number of devices"
        )
    types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    except NotImplementedError:  # a size that no whole axes of a TPU slice make
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def parse(text: str, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a setting such as `data=2,fsdp=4`.

    Raises:
      ValueError: as `sizes` and `mesh`.
    """
    return mesh(**sizes(text), devices=devices)


def sizes(text: str) -> dict[str, int]:
    """The axes that a setting such as `data=2,fsdp=4` names.

    Raises:
      ValueError: for an unknown axis or what is no number.
    """
    found = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.isdecimal() or name in found:
            raise ValueError(f"{text!r} is no mesh: name each of {', '.join(AXES)} at most once, as in data=2,fsdp=4")
        found[name] = int(size)
    return found


def spec(mesh: Mesh, path: str, shape: Sequence[int]) -> PartitionSpec:
    """Where a parameter lies, by the table; whole where no line names it.

    Args:
      mesh: of `mesh`.
      path: such as `layers/self_attn/q_proj/kernel`; anything may stand before, such as an optimiser's `0/mu`.
      shape: of the array. A dimension that an axis does not divide is not divided by it.
    """
    for pattern, axes in TABLE:
        if re.search(rf"(^|/)({pattern})$", path) and len(shape) >= len(axes):
            whole = len(shape) - len(axes)
            fits = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape[whole:], strict=True)]
            return PartitionSpec(*[None] * whole, *fits)
    return PartitionSpec()


def shardings(mesh: Mesh, tree: Tree) -> Tree:
    """Where the arrays of a tree lie: parameters, what is frozen, an optimiser's moments, or a whole state."""

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(mesh, name, leaf.shape))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def place(mesh: Mesh, tree: Tree) -> Tree:
    """The same tree on the devices of the mesh, by the table; what it does not name is whole on each device."""
    return jax.tree.map(put, tree, shardings(mesh, tree))


def put(x: Array, where: NamedSharding) -> Array:
    """An array, which each of several processes has, or which lies on a mesh already, on the devices of a sharding."""
    if jax.process_count() == 1:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim):
        return x
    return jax.jit(lambda x: x, out_shardings=where)(x)


def batch(mesh: Mesh, tree: Tree) -> Tree:
    """Arrays of leading axis `B`, such as prompts, with their rows divided over `data` and `fsdp`.

    Of several processes each has the whole arrays, and puts its rows on its devices.
    """

    def of_leaf(x: Array, where: NamedSharding) -> Array:
        return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)

    where = batch_shardings(mesh, tree)
    return jax.device_put(tree, where) if jax.process_count() == 1 else jax.tree.map(of_leaf, tree, where)


def batches(mesh: Mesh, of_step: Callable[[int], Tree]) -> Callable[[int], Tree]:
    """`batch` of what a function makes for a step."""
    return lambda n: batch(mesh, of_step(n))


def batch_shardings(mesh: Mesh, tree: Tree) -> Tree:
    """Where `batch` puts the arrays of a tree."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(rows(mesh, x.shape[0])[0])), tree)


def rows(mesh: Mesh, B: int, G: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes over which prompts are divided, and those over which the completions of each are.

    Prompts take `data`, then `fsdp`, as far as they divide; completions take what is left.
    """
    taken: dict[str, tuple[str, ...]] = {"B": (), "G": ()}
    left = {"B": B, "G": G}
    for axis in ROWS:
        for name in ("B", "G"):
            if left[name] % mesh.shape[axis] == 0:
                taken[name], left[name] = (*taken[name], axis), left[name] // mesh.shape[axis]
                break
    return taken["B"], taken["G"]


def row_parts(mesh: Mesh, B: int, G: int = 1) -> int:
    """Into how many parts `rows` divides them."""
    return math.prod(mesh.shape[axis] for axes in rows(mesh, B, G) for axis in axes)


def rows_divide(mesh: Mesh, B: int, G: int = 1) -> bool:
    """Whether each device has rows of its own, or its `tensor` devices have."""
    return row_parts(mesh, B, G) == math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(mesh: Mesh, B: int, G: int) -> None:
    """Refuses rows that would leave devices to compute what others do.

    Args:
      mesh: of `mesh`.
      B: prompts that go through the network at a time, those of a micro-batch.
      G: completions of each.

    Raises:
      ValueError: with the numbers.
    """
    over = [mesh.shape[axis] for axis in ROWS]
    if not rows_divide(mesh, B, G):
        raise ValueError(
            f"{B} prompts at a time x {G} completions do not divide over data={over[0]}, fsdp={over[1]}: take a "
            f"multiple of {math.prod(over)} prompts at a time or of as many completions, or more of tensor"
        )


def check_slots(mesh: Mesh, slots: int) -> None:
    """Refuses slots of continuous batching, each a row, that would leave devices to compute what others do.

    Raises:
      ValueError: with the numbers.
    """
    if not rows_divide(mesh, slots):
        over = [mesh.shape[axis] for axis in ROWS]
        raise ValueError(
            f"{slots} slots do not divide over data={over[0]}, fsdp={over[1]}: take a multiple of {math.prod(over)}"
        )


def constrain(mesh: Mesh | None, x: Array, *last: str | None) -> Array:
    """Says where `x [B, G, ...]` or `[B, ...]` lies: its rows as ever, its last dimensions over the axes in `last`.

    A dimension that its axis does not divide stays whole. Without a mesh nothing is said, and within `by_rows` nothing
    of the rows.
    """
    if mesh is None:
        return x
    fits = [
        a if a and n % mesh.shape[a] == 0 else None for a, n in zip(last, x.shape[x.ndim - len(last) :], strict=True)
    ]
    leading = x.shape[: x.ndim - len(last)]
    of_rows = rows(mesh, *leading[:2])[: len(leading)]
    return _lies(mesh, x, PartitionSpec(*of_rows, *[None] * (len(leading) - len(of_rows)), *fits))


def by_rows(mesh: Mesh | None, dtype: DTypeLike, f: Callable[..., Tree]) -> Callable[..., Tree]:
    """`f(params, of_rows, *others)`, of the rows that a device has, on each device.

    A loop in `f` then adds up the gradient of `params` on each device, and the devices' sums are added after it; else
    they were added in each turn of the loop.

    Args:
      mesh: None gives `f` itself.
      dtype: that devices send their sums in.
      f: of the embedding and the head, gathered; of a tree of arrays `[B, G, ...]`; and of what is whole. Returns a
        tree of arrays `[B, G, ...]`.
    """
    if mesh is None:
        return f

    def divided(params: Params, of_rows: Any, *others: Any) -> Tree:
        ends = _map(params, lambda name, leaf: leaf if re.search(_ENDS, name) else None)
        where = _map(ends, lambda name, leaf: spec(mesh, name, leaf.shape))
        parts = jax.tree.map(lambda at: PartitionSpec(*[a if a == "fsdp" else None for a in at]), where)
        places = PartitionSpec(*rows(mesh, *jax.tree.leaves(of_rows)[0].shape[:2]))

        def on_a_device(ends: Params, of_rows: Any, *others: Any) -> Tree:
            whole = jax.tree.map(lambda x, at: _put_together(at, dtype, x) if "fsdp" in at else x, ends, where)
            return f(whole, of_rows, *others)

        specs = (parts, places, *[PartitionSpec()] * len(others))
        return jax.shard_map(
            on_a_device, mesh=mesh, in_specs=specs, out_specs=places, axis_names=frozenset(ROWS), check_vma=False
        )(*_before_layers(ends, of_rows), *others)

    return divided


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _put_together(where: PartitionSpec, dtype: DTypeLike, x: Array) -> Array:
    """On each device, the parts that `fsdp` has of a matrix; the gradient is summed into the parts in a dtype."""
    axis = where.index("fsdp")
    return _of_tensor(where, lambda x: jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True), x)


def _put_together_forward(where: PartitionSpec, dtype: DTypeLike, x: Array) -> tuple[Array, None]:
    return _put_together(where, dtype, x), None


def _put_together_backward(where: PartitionSpec, dtype: DTypeLike, _: None, cotangent: Array) -> tuple[Array]:
    summed = _of_tensor(where, lambda x: _summed_into_parts(x, where.index("fsdp"), dtype), cotangent)
    return (summed.astype(cotangent.dtype),)


_put_together.defvjp(_put_together_forward, _put_together_backward)


def _of_tensor(where: PartitionSpec, f: Callable[[Array], Array], x: Array) -> Array:
    """`f` of the part that each device of `tensor` has, within a function of the other axes' parts.

    Else the compiler gathers it over `tensor` before it sends it over the others.
    """
    parts = PartitionSpec(*[a if a == "tensor" else None for a in where])
    return jax.shard_map(f, in_specs=parts, out_specs=parts, axis_names=frozenset({"tensor"}), check_vma=False)(x)


def _summed_into_parts(x: Array, axis: int, dtype: DTypeLike) -> Array:
    """The sum over `fsdp` of matrices, of which each device has its part along an axis, sent in a dtype.

    The parts get a first axis of their own, and the other axis of the matrix is padded: where parts lie within the
    lanes, or have a number of columns that is no multiple of four times 128, a TPU's program sums all of it on every
    chip, which is twice the bytes, and takes its part from that. It goes in pieces, of a multiple of eight rows: of the
    whole matrix in that dtype there would be a copy.
    """
    parts = x.reshape(*x.shape[:axis], jax.lax.axis_size("fsdp"), -1, *x.shape[axis + 1 :])
    rows, columns = parts.shape[axis + 1], x.shape[1 - axis]
    pieces = max(1, math.gcd(rows, 64) // 8)

    def of_piece(n: Array) -> Array:
        piece = jax.lax.dynamic_slice_in_dim(parts, n * (rows // pieces), rows // pieces, axis + 1).astype(dtype)
        first = jnp.moveaxis(piece, (axis, axis + 1), (0, 1))
        padded = jnp.pad(first, ((0, 0), (0, 0), (0, -columns % 512)))
        return jax.lax.psum_scatter(padded, "fsdp")[:, :columns]

    return jnp.moveaxis(jax.lax.map(of_piece, jnp.arange(pieces)).reshape(rows, columns), 0, axis)


@jax.custom_vjp
def _before_layers(ends: Params, of_rows: Any) -> tuple[Params, Any]:
    """Both as they are; that of the rows has its gradient after that of the ends.

    Else the head's gradient, whole and in float32 on every device, waits for that of the layers to be summed.
    """
    return ends, of_rows


def _before_layers_forward(ends: Params, of_rows: Any) -> tuple[tuple[Params, Any], None]:
    return (ends, of_rows), None


def _before_layers_backward(_: None, cotangents: tuple[Params, Any]) -> tuple[Params, Any]:
    leaves, form = jax.tree.flatten(cotangents)
    real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    ordered = iter(jax.lax.optimization_barrier([x for x, is_real in zip(leaves, real, strict=True) if is_real]))
    return jax.tree.unflatten(form, [next(ordered) if is_real else x for x, is_real in zip(leaves, real, strict=True)])


_before_layers.defvjp(_before_layers_forward, _before_layers_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(mesh: Mesh, table: Array, tokens: Array) -> Array:
    """`table[tokens]` of an embedding `[V, D]`, gathered over `fsdp` and divided over `tensor`; tokens `[B, G, S]`.

    The gradient is added up on each device, and then into the devices' parts.
    """
    parts = spec(mesh, "embed_tokens/embedding", table.shape)
    places = PartitionSpec(*rows(mesh, *tokens.shape[:2]))

    def on_a_device(table: Array, tokens: Array) -> Array:
        place, held = _own(parts, table.shape[0], tokens)
        found = jnp.where(held[..., None], jnp.take(table, place, axis=0), 0)
        return found if parts[0] is None else jax.lax.psum(found, "tensor")

    whole = _without_fsdp(parts)
    return jax.shard_map(on_a_device, mesh=mesh, in_specs=(whole, places), out_specs=places, check_vma=False)(
        _lies(mesh, table, whole), tokens
    )


def _look_up_forward(mesh: Mesh, table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up(mesh, table, tokens), (tokens, jnp.empty((0, *table.shape), table.dtype))


def _look_up_backward(mesh: Mesh, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    tokens, like = kept
    parts = spec(mesh, "embed_tokens/embedding", like.shape[1:])
    places = rows(mesh, *tokens.shape[:2])
    V, D = like.shape[1] // (1 if parts[0] is None else mesh.shape["tensor"]), like.shape[2]
    summed = [axis for axis in (*places[0], *places[1]) if axis not in parts]

    def on_a_device(cotangent: Array, tokens: Array) -> Array:
        place, held = _own(parts, V, tokens)
        # In float32: in bfloat16 the sum over more than 256 equal tokens stands still.
        total = jnp.zeros((V, D), jnp.float32).at[place].add(jnp.where(held[..., None], cotangent, 0))
        if "fsdp" in (*places[0], *places[1]) and parts[1] is not None:
            total = _summed_into_parts(total, 1, like.dtype)
        elif parts[1] is not None:  # the same rows on all of these devices
            n = D // mesh.shape["fsdp"]
            total = jax.lax.dynamic_slice_in_dim(total, n * jax.lax.axis_index("fsdp"), n, axis=1)
        total = total.astype(like.dtype)
        return jax.lax.psum(total, summed) if summed else total

    of_rows = PartitionSpec(*places)
    divided = jax.shard_map(on_a_device, mesh=mesh, in_specs=(of_rows, of_rows), out_specs=parts, check_vma=False)
    return divided(cotangent, tokens), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _own(parts: PartitionSpec, V: int, tokens: Array) -> tuple[Array, Array]:
    """Where tokens are among the `V` rows of the table that a device has, and whether they are."""
    place = tokens if parts[0] is None else tokens - V * jax.lax.axis_index("tensor")
    held = (place >= 0) & (place < V)
    return jnp.where(held, place, 0), held


def each_its_rows(
    mesh: Mesh | None, f: Callable[[tuple[Any, ...], Params], tuple[Any, ...]]
) -> Callable[[tuple[Any, ...], Params], tuple[Any, ...]]:
    """`f(streams, params)` on each device for its own rows; for what sorts or counts rows.

    Each stream is a tree of arrays `[B, G, ...]`, with a `G` of its own, and so is what `f` returns of it. Params are
    gathered over `fsdp`, and each device has its part of what the table divides over `tensor`; what `f` returns is the
    same on all of them.
    """
    if mesh is None:
        return f

    def divided(of_rows: tuple[Any, ...], params: Params) -> tuple[Any, ...]:
        places = tuple(PartitionSpec(*rows(mesh, *jax.tree.leaves(stream)[0].shape[:2])) for stream in of_rows)
        parts = _map(params, lambda name, leaf: _without_fsdp(spec(mesh, name, leaf.shape)))
        return jax.shard_map(f, mesh=mesh, in_specs=(places, parts), out_specs=places, check_vma=False)(of_rows, params)

    return divided


def gather(mesh: Mesh | None, tree: Tree, path: str) -> Tree:
    """A layer's parameter with the parts of `fsdp` put together; the gradient is summed into the parts again.

    Args:
      mesh: None changes nothing.
      tree: an array, or a quantised kernel.
      path: the end of its path, such as `q_proj/kernel`.
    """
    if mesh is None:
        return tree

    def of_leaf(at: Any, leaf: Array) -> Array:
        name = "/".join([path, jax.tree_util.keystr(at, simple=True, separator="/")]).rstrip("/")
        return _gather(mesh, spec(mesh, name, leaf.shape), leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def gather_all(mesh: Mesh | None, params: Params) -> Params:
    """Params gathered over `fsdp` for many steps of decoding; they stay divided over `tensor`."""
    return params if mesh is None else _map(params, lambda name, leaf: gather(mesh, leaf, name))


_ENDS = r"(^|/)(embed_tokens/embedding|lm_head)$"


def gathered_shardings(mesh: Mesh, params: Params) -> Params:
    """Where `gather_all` puts params."""
    return jax.tree.map(lambda where: NamedSharding(mesh, _without_fsdp(where.spec)), shardings(mesh, params))


def _map(tree: Params, f: Callable[[str, Array], Any]) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def _without_fsdp(parts: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*[None if axis == "fsdp" else axis for axis in parts])


def _lies(mesh: Mesh, x: Array, parts: PartitionSpec) -> Array:
    """A constraint; within `by_rows` on what is left to JAX there, the axis `tensor`."""
    if manual := jax.sharding.get_abstract_mesh().manual_axes:
        left = [None if axis is None or set(manual) & set(np.ravel(axis)) else axis for axis in parts]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*left))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, parts))


# The transpose of a constraint is the same constraint: a gathered parameter would have a gathered gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(mesh: Mesh, parts: PartitionSpec, x: Array) -> Array:
    return _lies(mesh, x, _without_fsdp(parts))


def _gather_forward(mesh: Mesh, parts: PartitionSpec, x: Array) -> tuple[Array, None]:
    return _gather(mesh, parts, x), None


def _gather_backward(mesh: Mesh, parts: PartitionSpec, _: None, cotangent: Array) -> tuple[Array]:
    if not jnp.issubdtype(cotangent.dtype, jnp.inexact):
        return (cotangent,)
    if "fsdp" not in parts:
        return (_lies(mesh, cotangent, parts),)
    axis, others = parts.index("fsdp"), [axis for axis in parts if axis != "fsdp"]
    first = _lies(mesh, jnp.moveaxis(cotangent, axis, 0), PartitionSpec("fsdp", *others))  # as `_summed_into_parts`
    return (jnp.moveaxis(first, 0, axis),)


_gather.defvjp(_gather_forward, _gather_backward)
