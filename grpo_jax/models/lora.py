"""LoRA: small trained matrices beside the frozen kernels of a decoder.

    y = x @ kernel + scale * (x @ lora_a) @ lora_b,   scale = alpha / rank

Hu et al. 2021, arXiv:2106.09685, section 4.1. The adapters are what is trained, and the base, quantised or not, is what
is frozen (`grpo_jax.freezing`):

    adapters, base = lora.adapt(policy, params, rank=16, alpha=32, key=key)
    state = init_state(adapters, optimizer, key, frozen=base, reference=True)     # the reference: adapters alone
    ...
    hf.save_pretrained(policy, lora.merge_later(state.params, state.frozen), folder)    # or hf.save_adapters

The policy stays the same one: where its decoder finds adapters beside a kernel, it uses them. As `lora_b` begins at 0,
a run begins with the base's own outputs, bit for bit.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.freezing import bind, near, partition
from grpo_jax.models import experts, quantized
from grpo_jax.models.config import DecoderConfig
from grpo_jax.policies import Policy
from grpo_jax.types import Array, Params, PRNGKey

# [L, in, r] and [L, r, out], or of experts [L, E, in, r] and [L, E, r, out], trained; [L], frozen
A, B, SCALE = "lora_a", "lora_b", "lora_scale"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of the decoder


def adapt(
    policy: Policy,
    params: Params,
    *,
    key: PRNGKey,
    rank: int | Mapping[str, int] = 16,
    alpha: float = 32.0,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
) -> tuple[Params, Params]:
    """Makes adapters for a decoder's linear layers.

    `lora_a` is uniform within `1 / sqrt(in)`, as in PEFT, and `lora_b` is 0. Both are float32 and cast where they
    are used, so that small updates are kept whatever the base's dtype.

    Args:
      policy: a decoder.
      params: its parameters, quantised or not; not copied.
      key: of `lora_a`. That of a layer does not depend on which others have adapters.
      rank: `r`, of all targets or by target, `{"q_proj": 8, "down_proj": 32}`. 8 to 64 are usual in supervised
        fine-tuning; reinforcement learning needs less.
      alpha: of the scale; 32 with a rank of 16 is PEFT's and TRL's usual choice.
      targets: names of linear layers, such as `("q_proj", "v_proj")`; None for all of them (those of `rank`, if it
        is by target), which is best (Dettmers et al. 2023, arXiv:2305.14314, figure 2), but experts. These are
        `experts_gate`, `experts_up` and `experts_down`, each expert with a pair of its own, so that a rank of 16 is
        many parameters: `rank={"q_proj": 16, "experts_up": 2}`.
      rslora: scale by `alpha / sqrt(r)`, so that the size of an update does not fall with the rank (Kalajdzievski
        2023, arXiv:2312.03732).

    Returns:
      `(adapters, base)`, to be trained and to be frozen. The base is `params` with the scales.

    Raises:
      ValueError: for a policy that is no decoder, an unknown target, with near names, params that have adapters
        already, or a rank or alpha out of range. A rank that is above a layer's width is a warning: it holds no more
        than a smaller one.
    """
    modules = linear_layers(policy, params)
    if held := [path[-1] for path, module in modules if A in module]:
        raise ValueError(f"{held[0]} has adapters already; adapt the base, or `merge` them first")
    ranks = ranks_of(rank, targets)
    if not alpha > 0:
        raise ValueError(f"alpha is above 0, got {alpha}")
    named = targets is not None or isinstance(rank, Mapping)
    if named and (absent := sorted(ranks.keys() - {path[-1] for path, _ in modules})):
        found = sorted({path[-1] for path, _ in modules})
        raise ValueError(f"this model has no {absent[0]}: leave it out; there are {', '.join(found)}")
    adapters: Params = {}
    scales: Params = {}
    for number, (path, module) in enumerate(modules):
        if (r := ranks.get(path[-1])) is None:
            continue
        *stack, inputs, outputs = module["kernel"].shape  # layers, and experts
        if r > min(inputs, outputs):
            warnings.warn(
                f"rank {r} of {path[-1]} is above the {min(inputs, outputs)} that its kernel of {inputs} x {outputs} "
                "has itself: train the kernel, or take a smaller rank",
                stacklevel=2,
            )
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, number), (*stack, inputs, r), jnp.float32, -bound, bound)
        put(adapters, path, {A: a, B: jnp.zeros((*stack, r, outputs), jnp.float32)})
        put(scales, path, {SCALE: jnp.full((stack[0],), alpha / (r**0.5 if rslora else r), jnp.float32)})
    return adapters, bind(params, scales)


def merge(params: Params, frozen: Params | None = None, *, dtype: Any = None) -> Params:
    """The parameters of a model without adapters that computes the same.

        kernel + scale * lora_a @ lora_b

    summed in float32, a layer at a time. Quantised kernels become floats, those without adapters, too.

    Args:
      params: adapters, or a tree that holds them, such as `{"policy": ..., "critic": ...}`.
      frozen: the base.
      dtype: of merged kernels; None for that of the base, whose quantised kernels become float32.

    Raises:
      ValueError: if there are no adapters.
    """
    later = merge_later(params, frozen, dtype=dtype)
    return jax.tree.map(lambda x: _merged(x.kernel, x.adapters, x.dtype) if isinstance(x, Merged) else x, later)


def merge_later(params: Params, frozen: Params | None = None, *, dtype: Any = None) -> Params:
    """`merge`, of which `hf.save_pretrained` makes a layer at a time: no device holds the merged model.

    Args:
      params: as in `merge`, and so the others.
      frozen: the base.
      dtype: of merged kernels.

    Returns:
      The parameters, with a `Merged` for each kernel that is a sum or has been codes.

    Raises:
      ValueError: as `merge`.
    """
    whole = bind(params, frozen)
    if not any(A in module for _, module in _modules(whole)):
        raise ValueError("there are no adapters to be merged: pass merge(state.params, state.frozen)")
    return _later(whole, None if dtype is None else jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Merged:
    """A kernel `[L, in, out]`, or `[L, E, in, out]` of experts, of which parts are made when they are asked for."""

    kernel: Any  # of floats or codes
    adapters: tuple[Array, Array, Array] | None  # lora_a, lora_b and lora_scale, where there are some
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape)

    def __getitem__(self, place: tuple[int, ...]) -> Array:
        """That of a layer, or of a layer's expert."""
        return _merged_at(self.kernel, self.adapters, place, self.dtype)


def rounded_off(params: Params, frozen: Params | None = None, *, dtype: Any = None) -> float:
    """What rounding makes of the adapters' update where they are merged.

        |round(W + D) - (W + D)| / |D|,   D = scale * lora_a @ lora_b

    in the Frobenius norm over all kernels. A checkpoint in bfloat16 has 8 bits of a weight: what an update changes in
    the bits below is lost, and 1 says that nothing of it is left.

    Args:
      params: as in `merge`, and so the others.
      frozen: the base.
      dtype: of merged kernels.

    Raises:
      ValueError: as `merge`.
    """
    merged = [x for x in jax.tree.leaves(merge_later(params, frozen, dtype=dtype)) if isinstance(x, Merged)]
    parts = [_squares(x.kernel, x.adapters, x.dtype) for x in merged if x.adapters is not None]
    lost, update = (float(sum(squares)) for squares in zip(*parts, strict=True))
    return (lost / update) ** 0.5 if update else 0.0


def stack(several: Sequence[tuple[Params, Params]]) -> tuple[Params, Params, Params]:
    """Adapters of different ranks and scales over one base, to be mapped over in one program.

        adapters, scales, base = lora.stack([lora.adapt(policy, params, rank=r, key=key) for r in (1, 4, 16)])
        run = lambda adapters, scales, base: train(init_state(adapters, ..., frozen=bind(scales, base)))
        jax.vmap(run, (0, 0, None))(adapters, scales, base)

    Args:
      several: `N` pairs of `adapt`, of the same targets and the same base: the same arrays.

    Returns:
      The adapters with a leading axis `N`, filled with zeros up to the largest rank, which stay zeros in training;
      their scales, likewise; and the base without scales.

    Raises:
      ValueError: if the targets or the bases differ.
    """
    targets = [sorted(path[-1] for path, _ in _modules(adapters)) for adapters, _ in several]
    if not targets or any(names != targets[0] for names in targets):
        raise ValueError(f"adapters that are mapped over have the same targets, got {targets}")
    parts = [partition(frozen, f"{SCALE}$") for _, frozen in several]
    arrays = [[id(leaf) for leaf in jax.tree.leaves(base)] for base, _ in parts]
    if any(of_base != arrays[0] for of_base in arrays):
        raise ValueError("adapters that are mapped over have one base: give `adapt` the same params for each of them")

    def stacked(*leaves: Array) -> Array:
        shape = tuple(max(sizes) for sizes in zip(*(leaf.shape for leaf in leaves), strict=True))
        pad = [[(0, size - own) for size, own in zip(shape, leaf.shape, strict=True)] for leaf in leaves]
        return jnp.stack([jnp.pad(leaf, widths) for leaf, widths in zip(leaves, pad, strict=True)])

    adapters = jax.tree.map(stacked, *(adapters for adapters, _ in several))
    return adapters, jax.tree.map(stacked, *(scales for _, scales in parts)), parts[0][0]


def delta(x: Array, a: Array, b: Array, scale: Array) -> Array:
    """What adapters add to a layer's output: `scale * (x @ a) @ b`, in the dtype of `x [..., in]`."""
    return scale.astype(x.dtype) * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))


def linear_layers(policy: Policy, params: Params) -> list[tuple[tuple[str, ...], Params]]:
    """The linear layers of a decoder, as `(path, {"kernel": [L, in, out], ...})` in a fixed order; [L, E, in, out] of
    experts.

    Raises:
      ValueError: for a policy that is no decoder, or params of another.
    """
    if not isinstance(policy.config, DecoderConfig):
        raise ValueError("adapters are for models.decoder: another policy computes its products itself")
    wanted = {path: module["kernel"].shape for path, module in _modules(jax.eval_shape(policy.init, jax.random.key(0)))}
    found = [(path, module) for path, module in _modules(params) if "kernel" in module]
    if wanted != {path: module["kernel"].shape for path, module in found}:
        raise ValueError(
            "the params are not this policy's: their linear layers are "
            + ", ".join(f"{path[-1]} {list(module['kernel'].shape)}" for path, module in found)
        )
    return found


def ranks_of(rank: int | Mapping[str, int], targets: Sequence[str] | None) -> dict[str, int]:
    """The rank of each target.

    Raises:
      ValueError: as `adapt`, which needs no weights for it.
    """
    if isinstance(rank, Mapping):
        if targets is not None and set(targets) != rank.keys():
            raise ValueError(f"rank has {sorted(rank)} and targets are {sorted(targets)}: leave out targets")
        ranks = dict(rank)
    else:
        ranks = dict.fromkeys(LAYERS if targets is None else targets, rank)
    if not ranks:
        raise ValueError(f"no targets: name some of {', '.join(LAYERS)}")
    known = (*LAYERS, *experts.LAYERS)
    for name, r in ranks.items():
        if name not in known:
            raise ValueError(f"{name!r} is no linear layer of the decoder{near(name, known)}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"the rank of {name} is a whole number from 1 on, got {r!r}")
    return ranks


def _modules(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Params]]:
    """Dicts that hold a linear layer's kernel or adapters, with their paths."""
    if not isinstance(tree, dict):
        return
    if "kernel" in tree or A in tree:
        yield path, tree
        return
    for name in sorted(tree):
        yield from _modules(tree[name], (*path, name))


def put(tree: Params, path: Sequence[str], leaves: Params) -> None:
    """Puts leaves into nested dicts at a path, making the dicts on the way."""
    for name in path:
        tree = tree.setdefault(name, {})
    tree |= leaves


def _later(tree: Any, dtype: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if A not in tree and not quantized.is_quantized(tree.get("kernel")):
        return {name: _later(child, dtype) for name, child in tree.items()}
    if A in tree and (missing := {"kernel", B, SCALE} - tree.keys()):
        raise ValueError(f"adapters without their base: {', '.join(sorted(missing))} is missing; pass frozen=")
    rest = {name: leaf for name, leaf in tree.items() if name not in (A, B, SCALE)}
    adapters = (tree[A], tree[B], tree[SCALE]) if A in tree else None
    return rest | {
        "kernel": Merged(tree["kernel"], adapters, jnp.dtype(tree["kernel"].dtype if dtype is None else dtype))
    }


def _update(a: Array, b: Array, scale: Array) -> Array:
    return scale * jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def _sum(kernel: Any, adapters: tuple[Array, Array, Array] | None) -> Array:
    """A layer's, in float32."""
    floats = quantized.dequantize(kernel).astype(jnp.float32)
    return floats if adapters is None else floats + _update(*adapters)


@functools.partial(jax.jit, static_argnums=2)
def _merged(kernel: Any, adapters: tuple[Array, Array, Array] | None, dtype: Any) -> Array:
    return jax.lax.map(lambda layer: _sum(*layer).astype(dtype), (kernel, adapters))


@functools.partial(jax.jit, static_argnums=3)
def _merged_at(
    kernel: Any, adapters: tuple[Array, Array, Array] | None, place: tuple[int | Array, ...], dtype: Any
) -> Array:
    of_place = jax.tree.map(lambda leaf: leaf[place], kernel)
    if adapters is not None:
        a, b, scale = adapters
        adapters = a[place], b[place], scale[place[0]]
    return _sum(of_place, adapters).astype(dtype)


@functools.partial(jax.jit, static_argnums=2)
def _squares(kernel: Any, adapters: tuple[Array, Array, Array], dtype: Any) -> tuple[Array, Array]:
    """The sums of squares of what rounding changes, and of the update."""
    bits = jnp.finfo(dtype)

    def of_layer(layer: tuple[Any, tuple[Array, Array, Array]]) -> tuple[Array, Array]:
        whole = _sum(*layer)
        rounded = jax.lax.reduce_precision(whole, bits.nexp, bits.nmant)  # XLA leaves out a cast there and back
        return jnp.sum(jnp.square(rounded - whole)), jnp.sum(jnp.square(_update(*layer[1])))

    lost, update = jax.lax.map(of_layer, (kernel, adapters))
    return jnp.sum(lost), jnp.sum(update)
