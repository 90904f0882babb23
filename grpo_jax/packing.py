"""Less padding to compute: completions cut to the longest, and several in a row.

Both run on the host, between `collect` and `learn`, and look at the lengths, so that they
wait for the rollout. Each shape of their results compiles its own program; `multiple` keeps the shapes few.
"""

from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from grpo_jax import processes
from grpo_jax.types import Experience, Packing, Rollout

Tuple = TypeVar("Tuple", Experience, Rollout)


def trim(experience: Experience, *, multiple: int = 64) -> Experience:
    """Cuts the completions' axis `T` to the longest completion, rounded up to a multiple.

    Nothing but padding goes, so that every loss and metric stays what it was; except for a
    loss that divides by `T` itself, which takes that number as `max_tokens`.

    Args:
      experience: as `collect` returns it, before `learn`; not under jit.
      multiple: of what the new `T` is one, unless the old one is smaller.
    """
    _check(multiple)
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


def pack(rollout: Rollout, *, multiple: int = 64) -> Packing | None:
    """Lays the completions of each group into few rows, longest first, each into the first row with room for it.

    The network then computes `B R W` tokens in place of `B G T`, where `R` rows of `W` are
    enough for every group. `W` is the multiple that makes `R W` least, of those up to twice the longest
    completion: attention looks at `W` columns for each token, so that wide rows cost more than they save. A group's
    prompt is still read once. For a policy whose `extend` takes `segments`:

        experience = experience._replace(packing=pack(experience.rollout))

    Args:
      rollout: the completions; not under jit.
      multiple: of what `W` is one.

    Returns:
      The packing, or None where it would not save a token.
    """
    _check(multiple)
    lengths = processes.whole(rollout.lengths)
    B, G, T = rollout.tokens.shape
    shortest = max(1, -(-int(lengths.max()) // multiple))  # rows in multiples
    widest = min(2 * shortest, max(shortest, -(-int(lengths.sum(axis=1).max()) // multiple)))
    laid = [(width * multiple, _lay_out(lengths, width * multiple)) for width in range(shortest, widest + 1)]
    W, starts = min(laid, key=lambda x: x[0] * (x[1].max() // x[0] + 1))
    rows = int(starts.max()) // W + 1
    if rows * W >= G * T:
        return None
    segments = np.full((B, rows * W), -1, np.int32)
    for b, g in np.ndindex(B, G):
        segments[b, starts[b, g] : starts[b, g] + lengths[b, g]] = g
    return Packing(jnp.asarray(starts), jnp.asarray(segments.reshape(B, rows, W)))


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
