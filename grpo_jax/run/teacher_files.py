"""A teacher's likeliest tokens on disk: computed once for given completions, read by any number of runs.

    with teacher_files.writing(path, about) as write:                       # about = teacher_files.about(...)
        for rollout in batches: write(scoring.likeliest(teacher, params, rollout, k), rollout.lengths)
    held = teacher_files.read(path, about)
    experience = Experience(rollout, teacher_top=held.batch(rows, T))

A file is one of safetensors. For the completions of all rows in a line, one after the other:

    tokens     [N, k] int32      the likeliest first
    log_probs  [N, k] float32
    ends       [rows] int64      where each completion ends among the N places

Its metadata are `about`: what the numbers belong to, by which a reader refuses those of other tokens.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from grpo_jax.run import digests
from grpo_jax.types import Array, Likeliest

FORMAT = "grpo_jax.likeliest.1"
COMPARED = ("format", "the tokenizer", "the prompts and completions", "k", "temperature")


class TeacherFile(NamedTuple):
    """A teacher's likeliest tokens for the completions of a data set."""

    tokens: np.ndarray  # [N, k] int32
    log_probs: np.ndarray  # [N, k] float32
    ends: np.ndarray  # [rows] int64

    def batch(self, rows: Sequence[int] | np.ndarray, T: int) -> Likeliest:
        """Of these rows, for rollouts of one completion each, `[B, 1, T, k]`; 0 on padding.

        Raises:
          ValueError: if a completion is longer than `T`.
        """
        k = self.tokens.shape[-1]
        tokens, log_probs = (np.zeros((len(rows), 1, T, k), x.dtype) for x in (self.tokens, self.log_probs))
        for b, row in enumerate(rows):
            end = int(self.ends[row])
            begin = int(self.ends[row - 1]) if row else 0
            if end - begin > T:
                raise ValueError(f"the completion of row {row} has {end - begin} tokens, more than the width of {T}")
            tokens[b, 0, : end - begin] = self.tokens[begin:end]
            log_probs[b, 0, : end - begin] = self.log_probs[begin:end]
        return Likeliest(jnp.asarray(tokens), jnp.asarray(log_probs))


def about(
    tokenizer: object,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    k: int,
    temperature: float,
    teacher: str = "",
) -> dict[str, str]:
    """What a file belongs to.

    Args:
      tokenizer: of both models.
      pairs: the tokens of all prompts and completions, in their order.
      k: tokens at each place.
      temperature: that the teacher's logits are divided by.
      teacher: its name, for whoever looks; it is not compared.
    """
    digest = digests.of_json([[list(prompt), list(completion)] for prompt, completion in pairs])
    values = (FORMAT, digests.of_tokenizer(tokenizer), digest, str(k), repr(float(temperature)))
    return dict(zip(COMPARED, values, strict=True)) | {"teacher": teacher}


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], about: Mapping[str, str]
) -> Iterator[Callable[[Likeliest, Array | np.ndarray], None]]:
    """Gives `write(likeliest [B, 1, T, k], lengths [B, 1])`, to be called for all rows in their order.

    The file appears whole or not at all.

    Raises:
      ValueError: if nothing was written.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def write(top: Likeliest, lengths: Array | np.ndarray) -> None:
        held = np.asarray(lengths).reshape(-1)
        there = np.arange(top.tokens.shape[-2]) < held[:, None]
        k = top.tokens.shape[-1]
        tokens, log_probs = (np.asarray(x).reshape(*there.shape, k)[there] for x in top)
        parts.append((tokens, log_probs, held.astype(np.int64)))

    yield write
    if not parts:
        raise ValueError(f"there is nothing to write to {path}: write was not called for any rows")
    tokens, log_probs, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".tmp")
    arrays = {"tokens": tokens.astype(np.int32), "log_probs": log_probs.astype(np.float32), "ends": np.cumsum(lengths)}
    safetensors.numpy.save_file(arrays, whole, metadata=dict(about))
    whole.replace(path)


def read(path: str | os.PathLike[str], about: Mapping[str, str]) -> TeacherFile:
    """The file, if it belongs to what is trained on.

    Raises:
      ValueError: with the names of all that differ: another tokenizer, prompts, completions or `k`, or no such file.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            saved = file.metadata() or {}
            differing = [name for name in COMPARED if saved.get(name) != about[name]]
            if differing:
                raise ValueError(
                    f"{path} is of something else: {', '.join(differing)} differ. Compute it anew from these prompts "
                    "and completions"
                )
            return TeacherFile(*(file.get_tensor(name) for name in TeacherFile._fields))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no file of a teacher's likeliest tokens: {error}") from error
