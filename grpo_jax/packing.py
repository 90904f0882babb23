"""Less to compute: completions cut to the longest, several in a row, or as a tree where they begin alike.

All run on the host, between `collect` and `learn`, and look at the completions, so that they
wait for the rollout. Each shape of their results compiles its own program: `trim` has one for each multiple up to `T`,
`pack` and `tree` those of `shapes`, so that who packs does not trim as well; `compile_ahead` compiles what the next
batches are likely to need while they are sampled. Of several processes each sees the lengths of all groups, so that all
of them come to the same packing.
"""

import collections
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import processes
from grpo_jax.types import Array, Experience, Packing, Rollout, TrainState
from grpo_jax.updates import JittedLearn, Learn

Tuple = TypeVar("Tuple", Experience, Rollout)


def trim(experience: Experience, *, multiple: int = 64) -> Experience:
    """Cuts the completions' axis `T` to the longest completion, rounded up to a multiple.

    Nothing but padding goes, so that every loss and metric stays what it was; except for a
    loss that divides by `T` itself, which takes that number as `max_tokens`.

    Args:
      experience: as `collect` returns it, before `learn`; not under jit.
      multiple: of what the new `T` is one, unless the old one is smaller.

    Raises:
      ValueError: for an experience that is packed, whose packing is for the `T` that it has.
    """
    _check(multiple)
    if experience.packing is not None:
        raise ValueError("a packed experience is not trimmed: pack computes no padding. Do the one or the other")
    rollout = experience.rollout
    longest = max(1, int(np.max(processes.whole(rollout.lengths))))
    width = min(rollout.tokens.shape[-1], -(-longest // multiple) * multiple)

    def cut(held: Tuple, *names: str) -> Tuple:
        per_token = {name: getattr(held, name) for name in names}
        return held._replace(**{name: x[..., :width] for name, x in per_token.items() if x is not None and x.ndim == 3})

    experience = cut(
        experience,
        "old_log_probs",
        "ref_log_probs",
        "advantages",
        "old_entropy",
        "weights",
        "old_collision",
        "high_covariance",
        "environment_mask",
        "step_rewards",
        "step_mask",
    )
    if experience.teacher_top is not None:
        top = experience.teacher_top
        experience = experience._replace(teacher_top=type(top)(*(x[:, :, :width] for x in top)))
    if rollout.experts is not None:
        rollout = rollout._replace(experts=rollout.experts[:, :, :width])
    return experience._replace(rollout=cut(rollout, "tokens", "mask", "log_probs"))


def shapes(G: int, T: int, *, multiple: int = 64) -> list[tuple[int, int]]:
    """The shapes `(R, W)` that `pack` chooses from: rows of a group and their width, the most tokens first.

    Rows as wide as a completion may be, of which there are 1, 2, 3, 4, 6, 8, 12 and so on below `G`; then a single
    row of a half, a quarter and an eighth of that width. Each has at least half as many tokens as the one before, or
    two thirds. A run whose `T` stays compiles no more than `len(shapes(G, T)) + 1` programs of `learn`: at most 9 for
    groups of 8, 11 for groups of 16.

    Args:
      G: completions of a group.
      T: the longest that a completion may be.
      multiple: of what widths are one.
    """
    _check(multiple)
    widths = [-(-T // (parts * multiple)) * multiple for parts in (1, 2, 4, 8)]
    rows = sorted({number for n in range(G.bit_length()) for number in (2**n, 3 * 2**n)}, reverse=True)
    found = [(R, widths[0]) for R in rows] + [(1, W) for W in widths[1:]]
    return [(R, W) for R, W in dict.fromkeys(found) if R * W < G * T]


def pack(rollout: Rollout, *, multiple: int = 64) -> Packing | None:
    """Lays the completions of each group into few rows, longest first, each into the first row with room for it.

    The network then computes `B R W` tokens in place of `B G T`, in the last of `shapes` that has room for every
    group. A group's prompt is still read once. For a policy whose `extend` takes `segments`:

        experience = experience._replace(packing=pack(experience.rollout))

    Args:
      rollout: the completions, as wide as they were sampled, not trimmed: its `T` says which shapes there are; not
        under jit.
      multiple: as in `shapes`.

    Returns:
      The packing, or None where none of the shapes has room.
    """
    lengths = processes.whole(rollout.lengths)
    B, G, T = rollout.tokens.shape
    found = _smallest(lengths, shapes(G, T, multiple=multiple))
    if found is None:
        return None
    (R, W), starts = found
    segments, tokens = np.full((B, R * W), -1, np.int32), np.zeros((B, R * W), np.int32)
    for b, g in np.ndindex(B, G):
        start, length = int(starts[b, g]), int(lengths[b, g])
        segments[b, start : start + length] = g
        tokens[b, start : start + length] = g * T + np.arange(length)
    places = starts[..., None] + np.arange(T, dtype=np.int32)
    in_rows = [jnp.asarray(x.reshape(B, R, W)) for x in (tokens, segments)]
    return Packing(in_rows[0], jnp.asarray(places), in_rows[1])


def tree(rollout: Rollout, *, multiple: int = 64) -> Packing | None:
    """Lays the completions of each group into one row as a tree: what several of them begin with is there once.

    For conversations that were continued from common turns, and wherever completions of a group begin alike. Those
    that share tokens are found by the tokens themselves. Each token sees its ancestors alone, at the positions that
    it has in its completion, so that scores are those of `B G` rows, and the gradient of a shared token is the sum of
    theirs. A policy's `extend` takes `segments` with `descendants`; `attention.cudnn`, `attention.splash` and others
    for causal rows do not, nor does `from_logits_fn`, and the sums of routers of experts could not be told.

        experience = experience._replace(packing=packing.tree(experience.rollout))

    The network computes `B W` tokens, and the attention without blocks that are left out `W^2` products for each
    group, where rows have `G T^2`: it pays where what is shared is a large part and `T` is well below the width of
    the network's layers.

    Args:
      rollout: as in `pack`.
      multiple: as in `shapes`; `W` is the fewest `R W` of these that has room.

    Returns:
      The packing, or None where the fewest is not below `G T`.
    """
    lengths, tokens = processes.whole((rollout.lengths, rollout.tokens))
    B, G, T = tokens.shape
    grown = [_grow([tokens[b, g, : lengths[b, g]] for g in range(G)], T) for b in range(B)]
    most = max(len(held) for held, *_ in grown)
    W = min((R * W for R, W in shapes(G, T, multiple=multiple) if most <= R * W), default=None)
    if W is None:
        return None

    def rows(which: int, empty: int) -> Array:
        table = np.full((B, 1, W), empty, np.int32)
        for b, found in enumerate(grown):
            table[b, 0, : len(found[which])] = found[which]
        return jnp.asarray(table)

    places = jnp.asarray(np.stack([found[1] for found in grown]))
    return Packing(rows(0, 0), places, rows(2, -1), descendants=rows(3, -1))


def compile_ahead(
    learn: Learn, state: TrainState, experience: Experience, *, at_most: int = 2, multiple: int = 64, draws: int = 50
) -> list[tuple[int, int] | None]:
    """Compiles in a thread the programs of `learn` that the next batches are most likely to need.

    Batches of the lengths seen are drawn anew, with replacement, and packed; the shapes that come most often are
    compiled, one after the other, while the next batch is sampled. Called once, before the first `learn`:

        if n == 0:
            packing.compile_ahead(step.learn, state, experience)

    Args:
      learn: of `step.jit()`.
      state: of the run.
      experience: that `learn` is given next, with its packing or None, whose program is not among them.
      at_most: so many programs.
      multiple: as `pack` is given.
      draws: batches that are drawn.

    Returns:
      The shapes that are compiled, most likely first; None stands for no packing.

    Raises:
      ValueError: if `learn` is not jitted by `step.jit()`.
    """
    if not isinstance(learn, JittedLearn):
        raise ValueError("what is compiled ahead is step.learn of step = make_train_step(...).jit()")
    lengths = processes.whole(experience.rollout.lengths)
    B, G, T = experience.rollout.tokens.shape
    known, rng = shapes(G, T, multiple=multiple), np.random.default_rng(0)
    counts: collections.Counter[tuple[int, int] | None] = collections.Counter()
    for _ in range(draws):
        found = _smallest(rng.choice(lengths.ravel(), (B, G)), known)
        counts[found and found[0]] += 1
    packing = experience.packing
    now = None if packing is None else packing.segments.shape[1:]
    likely = [shape for shape, _ in counts.most_common() if shape != now][:at_most]

    def packed(shape: tuple[int, int] | None) -> Experience:
        if shape is None:
            return experience._replace(packing=None)
        wanted = ((B, *shape), (B, G, T), (B, *shape))
        form = jax.eval_shape(lambda: Packing(*(jnp.zeros(x, jnp.int32) for x in wanted)))
        return experience._replace(packing=form)

    learn.ahead(state, [packed(shape) for shape in likely])
    return likely


def _smallest(lengths: np.ndarray, known: list[tuple[int, int]]) -> tuple[tuple[int, int], np.ndarray] | None:
    """The last of the shapes that has room for every group, and where each completion begins there."""
    for R, W in reversed(known):
        if lengths.max() > W or lengths.sum(axis=1).max() > R * W:
            continue
        starts = _lay_out(lengths, W)
        if int(starts.max()) < R * W:
            return (R, W), starts
    return None


def _grow(completions: Sequence[np.ndarray], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A group as a tree: which token stands at each place, the places `[G, T]`, and the segments and descendants.

    A segment is what a completion adds to those before it in the order of their tokens.
    """
    places = np.zeros((len(completions), T), np.int32)
    tokens, segments, descendants = np.zeros((3, len(completions) * T), np.int32)
    n, path, before = 0, np.zeros(0, np.int32), np.zeros(0, np.int32)  # of the completion before
    for segment, g in enumerate(sorted(range(len(completions)), key=lambda g: completions[g].tolist())):
        shared = _alike(before, completions[g])
        new = len(completions[g]) - shared
        tokens[n : n + new], segments[n : n + new] = g * T + shared + np.arange(new), segment
        path = np.concatenate([path[:shared], np.arange(n, n + new)])
        descendants[path] = segment
        places[g, : len(path)], before, n = path, completions[g], n + new
    return tokens[:n], places, segments[:n], descendants[:n]


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two completions have in common at their beginnings."""
    n = min(len(a), len(b))
    return int(np.argmin(np.append(a[:n] == b[:n], False)))


def _lay_out(lengths: np.ndarray, width: int) -> np.ndarray:
    """Where each completion begins in rows of this width; `[B, G]` int32."""
    starts = np.zeros(lengths.shape, np.int32)
    for b, group in enumerate(lengths):
        filled: list[int] = []
        for g in np.argsort(-group, kind="stable")[: np.count_nonzero(group)]:
            row = next((row for row, used in enumerate(filled) if used + group[g] <= width), len(filled))
            if row == len(filled):
                filled.append(0)
            starts[b, g] = row * width + filled[row]
            filled[row] += int(group[g])
    return starts


def _check(multiple: int) -> None:
    if multiple < 1:
        raise ValueError(f"multiple is at least 1, got {multiple}")
