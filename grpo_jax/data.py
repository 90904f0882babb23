"""Rows to tokenised, bucketed prompts; their order is a pure function of (seed, step).

Nothing here holds a position: the rows of a batch follow from the seed and the
step, so that a resumed run reads on where it stopped.
"""

import csv
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo_jax.types import Prompts, Rollout

Row = dict[str, Any]
Text = str | Sequence[Mapping[str, str]]  # plain, or chat messages of role and content
TooLong = Literal["refuse", "drop", "cut"]


def read_rows(
    source: str | os.PathLike[str],
    columns: Sequence[str] = (),
    *,
    split: str | None = None,
    subset: str | None = None,
) -> list[Row]:
    """Reads a file by its suffix (`.jsonl`, `.csv`, `.parquet`), and anything else as a data set of Hugging Face.

    Args:
      source: a file; or the id of a data set on the Hub, or a folder that `datasets.load_dataset` reads.
      columns: what every row must have, and not as null.
      split: of a data set, such as `train`; may be left out where there is only one.
      subset: of a data set, such as `main`; `datasets` calls it a configuration.

    Raises:
      ValueError: at the first bad row, with file and line, or the row's number counted
        from 1; for a source without a row, or a file of another kind; for a `split` or
        `subset` of a file.
      ImportError: without the extra `data`, for Parquet and Hugging Face.
    """
    readers = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
    suffix = pathlib.Path(source).suffix
    if suffix not in readers and not pathlib.Path(source).is_file():
        return read_hugging_face(source, columns, split=split, subset=subset)
    if suffix not in readers:
        raise ValueError(f"{source}: a file of rows ends in {', '.join(readers)}, got {suffix or 'no suffix'!r}")
    if split is not None or subset is not None:
        raise ValueError(f"{source} is one file and has no split {split!r} or subset {subset!r}; leave them out")
    return readers[suffix](source, columns)


def read_jsonl(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads one JSON object a line; empty lines are skipped. NaN, which is not JSON, is refused.

    Args:
      path: of the file, UTF-8 with or without a byte-order mark.
      columns: what every row must have, and not as null.

    Raises:
      ValueError: at the first bad line, with file and line number; or for a file
        without a row.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}: {line[:80]!r}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a row is an object, got {line[:80]!r}")
            _check_columns(row, columns, f"{path}:{number}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def read_csv(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads comma-separated values under a line of column names; every value is text, as it stands there.

    Fields may be quoted, and then have commas, line ends and doubled quotes. Empty lines
    are skipped. CSV has no null: an empty field is an empty string, and refused where it
    is one of `columns`.

    Args:
      path: of the file, UTF-8 with or without a byte-order mark.
      columns: what every row must have, and not as an empty field.

    Raises:
      ValueError: at the first bad row, with file and the line that it begins at: one with
        another number of fields than there are names, for instance; for a file without a
        row, or a line of names with one that is empty or there twice.
    """
    rows: list[Row] = []
    names: list[str] = []
    with open(path, "rb") as file:
        # Lines are decoded one at a time, so that an error knows its line.
        lines = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(file))
        reader = csv.reader(lines, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{where}: not CSV: {error}") from None
            if fields is None:
                break
            if not fields:
                continue
            if not names:
                if "" in fields or len(set(fields)) < len(fields):
                    raise ValueError(f"{where}: the first line names every column, each differently; got {fields}")
                names = fields
                continue
            if len(fields) != len(names):
                raise ValueError(f"{where}: {len(fields)} fields for the {len(names)} columns {', '.join(names)}")
            row = dict(zip(names, fields, strict=True))
            _check_columns({name: field for name, field in row.items() if field}, columns, where)
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads a Parquet file. NaN is refused, as in JSON: it is how some writers say that there is no value.

    Args:
      path: of the file.
      columns: what every row must have, and not as null.

    Raises:
      ValueError: at the first bad row, with file and row number, from 1; if the file is
        not Parquet, or has no row.
      ImportError: without the extra `data`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'grpo-jax[data]'") from error
    with open(path, "rb") as file:  # so that a file that is not there is told as for the other kinds
        try:
            found = [row for batch in pyarrow.parquet.ParquetFile(file).iter_batches() for row in batch.to_pylist()]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not Parquet: {error}") from None
    return list(_checked(found, columns, f"{path}"))


def read_hugging_face(
    source: str | os.PathLike[str],
    columns: Sequence[str] = (),
    *,
    split: str | None = None,
    subset: str | None = None,
) -> list[Row]:
    """Reads one split of a data set of the Hugging Face Hub, or of a folder, by `datasets.load_dataset`.

    `datasets` fills a field that a row lacks with None: name in `columns` what must be there.

    Args:
      source: id of the data set, such as `openai/gsm8k`, or a folder.
      columns: what every row must have, and not as null.
      split: such as `train`; may be left out where there is only one.
      subset: such as `main`; `datasets` calls it a configuration.

    Raises:
      ValueError: at the first bad row, with its number, from 1; where a split must be
        named; and whatever `datasets` raises itself.
      ImportError: without the extra `data`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: data sets of Hugging Face need: pip install 'grpo-jax[data]'") from error
    splits = datasets.load_dataset(os.fspath(source), subset)
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise ValueError(f"{source} has the splits {', '.join(splits)}; name one of them, got {split!r}")
    return list(_checked(splits[split].to_list(), columns, f"{source}[{split}]"))


def _checked(rows: Sequence[Row], columns: Sequence[str], source: str) -> Iterator[Row]:
    if not rows:
        raise ValueError(f"{source}: there are no rows")
    for number, row in enumerate(rows, start=1):
        where = f"{source}: row {number}"
        if bad := [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise ValueError(f"{where}: {bad[0]} is {row[bad[0]]}, which is no value")
        _check_columns(row, columns, where)
        yield row


def _check_columns(row: Row, columns: Sequence[str], where: str) -> None:
    if missing := [column for column in columns if row.get(column) is None]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; the row has {', '.join(row)}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value")


def chat(text: str, system: str | None = None) -> list[dict[str, str]]:
    """A prompt as chat messages: the system's where there is one, then the user's."""
    user = {"role": "user", "content": text}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text, **template: Any) -> list[int]:
    """Token ids of a prompt: messages through the chat template, text as it is.

    Special tokens in the content of a message stay text: a user who writes the
    end-of-turn token does not end the turn. Plain text is taken as the author of the
    data wrote it, special tokens included.

    Args:
      tokenizer: of the model.
      prompt: a string, or messages of `role` and `content`.
      template: arguments of the chat template, such as `enable_thinking=False`.

    Raises:
      ValueError: for messages where the tokenizer has no chat template, or whose
        content is not a string.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is chat messages, but the tokenizer has no chat template: give prompts as text, "
            f"or put a chat_template.jinja beside the tokenizer; the prompt is {prompt!r}"
        )
    # Not all_special_tokens, which has only those that are named, as eos_token is; often not what starts a turn.
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    messages, inert = [dict(message) for message in prompt], {}
    for i, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of a message is text, got {message}")
        if any(token in message["content"] for token in [*special, "\ue000"]):
            placeholder = f"\ue000{i}\ue001"  # of the private-use area
            inert[placeholder], message["content"] = message["content"], placeholder
    template = {"add_generation_prompt": True} | template
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **template)
    ids: list[int] = []
    for part in re.split("(\ue000[0-9]+\ue001)", text):  # in any order: a template may move or drop a message
        content = inert.get(part)
        if content is None:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
        else:
            ids += tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def limit_prompts(prompts: Sequence[list[int]], max_tokens: int, *, too_long: TooLong = "refuse") -> list[int]:
    """The indices of the prompts that can be used; prompts longer than `max_tokens` are cut in place if asked.

    Args:
      prompts: token ids.
      max_tokens: the longest prompt that is taken.
      too_long: `refuse` raises, `drop` leaves them out, `cut` keeps their last
        `max_tokens` tokens.

    Raises:
      ValueError: for an empty prompt; for one too long, under `refuse`; if none is left.
    """
    if too_long not in get_args(TooLong):
        raise ValueError(f"too_long is one of {get_args(TooLong)}, got {too_long!r}")
    kept = []
    for i, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {i} has no tokens; a prompt needs at least 1")
        if len(ids) > max_tokens and too_long == "refuse":
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens and the limit is {max_tokens}: raise the limit, "
                "drop such prompts, or cut them on the left"
            )
        if len(ids) > max_tokens and too_long == "cut":
            del ids[:-max_tokens]
        if len(ids) <= max_tokens:
            kept.append(i)
    if not kept:
        raise ValueError(f"all {len(prompts)} prompts are longer than the limit of {max_tokens} tokens")
    return kept


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


def make_prompts(prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None, *, multiple: int = 1) -> Prompts:
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
