"""What is trained and what is not: `TrainState.params` beside `TrainState.frozen`.

    params, frozen = partition(params, "embed_tokens|lm_head")
    state = init_state(params, optimizer, key, frozen=frozen)
    evaluate(bind(state.params, state.frozen))

The network reads both together. Gradients, the optimiser's moments and the reference are of `params` alone, so that
what is frozen costs its own bytes and nothing else. Adapters are one more case: they are `params`, the base is frozen
(`models.lora`).
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.types import Params


def bind(params: Params, frozen: Params | None) -> Params:
    """What the network reads: `params` alone where nothing is frozen, else the two merged; nothing is copied.

    Args:
      params: a pytree, what is trained.
      frozen: a tree of the same kinds of nodes, with the leaves that `params` lacks. Dicts are merged by their
        keys; of other nodes (lists, `nnx.State`, a dataclass) both have the same children, and None in one of them
        stands for what the other holds.

    Raises:
      ValueError: with the path, if both hold a leaf there or are of different kinds.
    """
    return params if frozen is None else _merge(params, frozen, "")


def partition(params: Params, pattern: str) -> tuple[Params, Params]:
    """Divides params into those that are trained and those that are frozen, by the names of their paths.

    Args:
      params: of any policy.
      pattern: a regular expression that is looked for in each path, such as `layers/mlp/up_proj/kernel`: those with a
        match are frozen. `"embed_tokens|lm_head"` freezes both, `"^(?!.*norm)"` all but norms.

    Returns:
      `(params, frozen)`, of which `bind` makes the whole again. In dicts each has only its own keys; in other nodes
      None stands for what the other holds.

    Raises:
      ValueError: if the pattern matches nothing, with near names, or everything.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    paths, leaves = zip(*named_leaves(params), strict=True)
    matched = [found.search(path) is not None for path in paths]
    if not any(matched):
        raise ValueError(f"{pattern!r} matches no parameter{near(pattern, list(paths))}")
    if all(matched):
        raise ValueError(f"{pattern!r} matches all {len(paths)} parameters, so that nothing would be trained")

    def those(kind: bool) -> Params:
        kept = [leaf if match == kind else None for leaf, match in zip(leaves, matched, strict=True)]
        return _pruned(jax.tree.unflatten(jax.tree.structure(params), kept))

    return those(False), those(True)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves with their paths, such as `layers/mlp/up_proj/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def is_trainable(leaf: Any) -> bool:
    """Whether small steps can be added to it: a float of more than 8 bits."""
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1


def near(name: str, names: Sequence[str]) -> str:
    """`"; near it are ..."`, for a message on a name that is not one of `names`, which may be paths."""
    parts = {part: None for path in names for part in [path, *path.split("/")]}
    words = [word for word in re.split(r"[^\w/]+", name) if word]
    close = dict.fromkeys(match for word in words for match in difflib.get_close_matches(word, parts, n=3))
    shown = list(close) or list(dict.fromkeys(path.split("/")[-2] if "/" in path else path for path in names))
    return f"; {'near it are' if close else 'there are'} {', '.join(shown[:12])}"


def _merge(a: Any, b: Any, path: str) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict) and isinstance(b, dict):
        return {name: _merge(a.get(name), b.get(name), f"{path}/{name}") for name in a | b}
    (of_a, structure), (of_b, other) = (_children(node) for node in (a, b))
    if (leaf := jax.tree.structure(0)) in (structure, other) or structure != other:
        what = "trained and frozen" if structure == other == leaf else f"{type(a).__name__} and {type(b).__name__}"
        raise ValueError(f"{path[1:] or 'the whole'} is both {what}; a parameter is either in params or in frozen")
    merged = [_merge(x, y, f"{path}/{number}") for number, (x, y) in enumerate(zip(of_a, of_b, strict=True))]
    return jax.tree.unflatten(structure, merged)


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda x: x is not node)


def _pruned(node: Any) -> Any:
    """Without the keys of dicts that hold nothing."""
    if not isinstance(node, dict):
        return node
    kept = {name: _pruned(child) for name, child in node.items()}
    return {name: child for name, child in kept.items() if jax.tree.leaves(child)}
