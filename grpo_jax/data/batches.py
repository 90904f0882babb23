"""The rows of a step and their arrays: functions of (seed, step) alone, so that a resumed run repeats them."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Prompts, Rollout


def batch_indices(seed: int, step: int, num_rows: int, batch_size: int) -> np.ndarray:
    """The rows `[batch_size]` of a step: one after the other from endless shuffled epochs.

    Each epoch has every row once, in an order of its own; a batch may end one epoch and
    begin the next.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(seed, place // num_rows, num_rows)[place % num_rows] for place in places])


def batch_rows_by_length(
    seed: int, step: int, lengths: Sequence[int], batch_size: int, *, window: int = 16
) -> np.ndarray:
    """As `batch_indices`, with rows of like length in a batch, so that less of it is padding.

    The rows of `window` steps are those of `batch_indices`; within them they are sorted by
    length, cut into batches, and the batches shuffled. Which rows share a batch then
    depends on their length; over a window, every row comes as often as it would without.

    Args:
      seed: of the run.
      step: whose rows are wanted.
      lengths: of the prompts of all rows, in tokens.
      batch_size: rows in a step.
      window: steps that are sorted together, from 1 on: the more, the less padding.

    Returns:
      `[batch_size]` rows.
    """
    if window < 1:
        raise ValueError(f"window is a number of steps, from 1 on, got {window}")
    rows = batch_indices(seed, step // window, len(lengths), window * batch_size)
    batches = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")].reshape(window, batch_size)
    return batches[np.random.default_rng([seed, step // window, window]).permutation(window)[step % window]]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def bucket(longest: int, multiple: int) -> int:
    """The width of a batch whose longest row has `longest` tokens: few widths, so that few programs compile."""
    return -(-longest // multiple) * multiple


def pad(sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """`[len(sequences), width]` int32, right-padded with 0."""
    if (longest := max(map(len, sequences), default=0)) > width:
        raise ValueError(f"a sequence has {longest} tokens, more than the width of {width}")
    padded = np.zeros((len(sequences), width), np.int32)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return padded


def make_prompts(
    prompts: Sequence[Sequence[int]], rows: Sequence[int] | np.ndarray | None = None, *, multiple: int = 1
) -> Prompts:
    """A batch of tokenised prompts.

    Args:
      prompts: token ids of `B` prompts.
      rows: their rows in the data set, kept as `info["row"]`; `rewards.host` finds
        the other columns by it.
      multiple: the width is rounded up to a multiple of it.

    Raises:
      ValueError: if there is no prompt or an empty one, or another number of rows.
    """
    lengths = [len(ids) for ids in prompts]
    if min(lengths, default=0) < 1:
        raise ValueError(f"a batch has at least one prompt, and each at least one token; got lengths {lengths}")
    if rows is not None and len(rows) != len(prompts):
        raise ValueError(f"{len(rows)} rows for {len(prompts)} prompts")
    tokens = pad(prompts, bucket(max(lengths), multiple))
    info = {} if rows is None else {"row": jnp.asarray(rows, jnp.int32)}
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), info)


def make_demonstrations(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    multiple: int = 1,
    max_tokens: int | None = None,
) -> Rollout:
    """Completions that were given, not sampled, as a rollout with `G = 1`, for supervised learning.

    Args:
      prompts: token ids of `B` prompts.
      completions: token ids of `B` completions, each with its end-of-sequence token.
      multiple: prompts' and completions' widths are rounded up to a multiple of it.
      max_tokens: the completions' width, where it is to be always the same.

    Raises:
      ValueError: if there is no prompt or an empty one, another number of
        completions, or one longer than `max_tokens`.
    """
    if len(completions) != len(prompts):
        raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts")
    lengths = np.array([len(ids) for ids in completions], np.int32)
    width = bucket(int(lengths.max()), multiple) if max_tokens is None else max_tokens
    tokens, lengths = pad(completions, width)[:, None], lengths[:, None]
    return Rollout(
        prompts=make_prompts(prompts, multiple=multiple),
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        mask=jnp.arange(width) < lengths[..., None],
        log_probs=jnp.zeros(tokens.shape, jnp.float32),
        truncated=jnp.zeros(lengths.shape, bool),
    )


def token_pairs(rollout: Rollout) -> list[list[tuple[list[int], list[int]]]]:
    """The token ids of each prompt and completion, without padding: `B` lists of `G` pairs.

    The inverse of `make_demonstrations`, and the way from what a policy has sampled to what another one learns.
    """
    tokens, lengths, prompts, ends = map(
        np.asarray, (rollout.tokens, rollout.lengths, rollout.prompts.tokens, rollout.prompts.lengths)
    )
    return [
        [(prompt[:end].tolist(), ids[:length].tolist()) for ids, length in zip(group, group_lengths, strict=True)]
        for prompt, end, group, group_lengths in zip(prompts, ends, tokens, lengths, strict=True)
    ]
