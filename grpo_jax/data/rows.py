"""Rows of files and data sets, checked as they are read: an error names the file and the row."""

import csv
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]


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
    if missing := [column for column in columns if field(row, column) is None]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; the row has {', '.join(row)}")


def field(row: Row, name: str) -> Any:
    """The value of a column, or None; `outer.inner` also names a field of the object in column `outer`."""
    value: Any = row
    while isinstance(value, dict) and name not in value and "." in name:
        outer, _, name = name.partition(".")
        value = value.get(outer)
    return value.get(name) if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value")
