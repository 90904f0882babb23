"""Rows of files and data sets, checked as they are read: an error names the file and the row.

So does one that is found later, however the rows were shuffled meanwhile: `place_of(row)`.
"""

import codecs
import csv
import gzip
import json
import math
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


class _ReadRow(dict[str, Any]):
    """A row with what is known of it beside its columns, where reward functions do not see it."""

    __slots__ = ("gold_column", "place")

    def __init__(self, columns: Mapping[str, Any], place: str, gold_column: str | None = None) -> None:
        super().__init__(columns)
        self.place = place
        self.gold_column = gold_column  # the column with the answer, where somebody has said which it is

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.place, self.gold_column)


def place_of(row: Mapping[str, Any], number: int) -> str:
    """Where a row was read, as file and line, or file and row; of one that was not read here, `row {number}`.

    Args:
      row: of a data set; a copy of one that was read has no place.
      number: among the rows at hand, from 1.
    """
    return getattr(row, "place", f"row {number}")


def with_answer(row: Row, answer: Any) -> Row:
    """The row with its reference answer as the column `answer`, which verifiers then read (`rewards.accuracy`)."""
    return _ReadRow(row | {"answer": answer}, place_of(row, 1), "answer")


def gold_column_of(row: Mapping[str, Any]) -> str | None:
    """The column that `with_answer` has made the answer of; None where rewards look for it by its usual names."""
    return getattr(row, "gold_column", None)


def read_rows(
    source: str | os.PathLike[str],
    columns: Sequence[str] = (),
    *,
    split: str | None = None,
    subset: str | None = None,
) -> list[Row]:
    """Reads a file by its suffix, and anything else as a data set of Hugging Face.

    JSON lines (`.jsonl`, `.ndjson`, `.json`), a JSON list (`.json`), `.csv`, `.parquet`, in capitals or small letters;
    all but Parquet also compressed, as `.jsonl.gz`.

    Args:
      source: a file; or the id of a data set on the Hub, or a folder that `datasets.load_dataset` reads.
      columns: what every row must have, and not as null; `outer.inner` names a field of an object.
      split: of a data set, such as `train`; may be left out where there is only one.
      subset: of a data set, such as `main`; `datasets` calls it a configuration.

    Raises:
      ValueError: at the first bad row, with file and line, or the row's number counted
        from 1; for a source without a row, or a file of another kind; for a `split` or
        `subset` of a file.
      ImportError: without the extra `data`, for Parquet and Hugging Face.
    """
    suffixes = [suffix.lower() for suffix in pathlib.Path(source).suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    if (reader := _READERS.get(suffix)) is None and not pathlib.Path(source).is_file():
        return read_hugging_face(source, columns, split=split, subset=subset)
    if reader is None or (compressed and reader is read_parquet):
        raise ValueError(
            f"{source}: a file of rows ends in {', '.join(_READERS)}, all but Parquet also with .gz after it; "
            f"got {''.join(suffixes[-2:]) or 'no suffix'!r}"
        )
    if split is not None or subset is not None:
        raise ValueError(f"{source} is one file and has no split {split!r} or subset {subset!r}; leave them out")
    return reader(source, columns)


def read_jsonl(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads one JSON object per line; empty lines are skipped.

    NaN and infinity, which JSON does not have and Python writes all the same, and numbers that are too large for a
    float are refused in `columns`; elsewhere they are null, with a warning. An object with one name twice is refused,
    and so is one that is nested more than 100 deep.

    Args:
      path: of the file, UTF-8 with or without a byte-order mark.
      columns: what every row must have, and not as null.

    Raises:
      ValueError: at the first bad line, with file and line number; or for a file
        without a row.
    """
    rows: list[Row] = []
    with_nulls: list[str] = []  # places of rows
    for number, line in enumerate(_lines(path), start=1):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        where = f"{path}:{number}"
        row, finite = _parsed(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row is an object, got {line[:80]!r}")
        if not finite:
            row = _finite_row(row, columns, where)
            with_nulls.append(where)
        _check_columns(row, columns, where)
        rows.append(_ReadRow(row, where))
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    if with_nulls:
        _warn_of_nulls(with_nulls[0] + (f" and {len(with_nulls) - 1} more" if with_nulls[1:] else ""))
    return rows


def read_json(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads a list of JSON objects; a file that does not begin with `[` is read as JSON lines.

    Args:
      path: as in `read_jsonl`.
      columns: what every row must have, and not as null.

    Raises:
      ValueError: as `read_jsonl`, with file and row number, from 1.
    """
    content = b"".join(_lines(path))
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return read_jsonl(path, columns)
    rows, finite = _parsed(content, f"{path}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number}: a row is an object, got {_short(row)}")
    checked = list(_checked(rows, columns, f"{path}"))
    if not finite:
        _warn_of_nulls(f"{path}")
    return checked


def read_csv(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads comma-separated values under a line of column names; every value is text, as it stands there.

    Fields may be quoted, and then have commas, line ends and doubled quotes. Empty lines
    are skipped. A field may be of any length. CSV has no null: an empty field is an empty string, and refused where it
    is one of `columns`.

    Args:
      path: of the file, UTF-8 with or without a byte-order mark.
      columns: what every row must have, and not as an empty field.

    Raises:
      ValueError: at the first bad row, with file and the line that it begins at: one with
        another number of fields than there are names, for instance; for a file without a
        row, or a line of names with one that is empty or there twice.
    """
    limit = csv.field_size_limit(2**31 - 1)  # the module's, of 131,072 characters
    try:
        return _csv_rows(path, columns)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: str | os.PathLike[str], columns: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    names: list[str] = []
    # Lines are decoded one at a time, so that an error knows its line.
    lines = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(_lines(path)))
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
                raise ValueError(f"{where}: the first line names every column, each differently; got {_short(fields)}")
            names = fields
            continue
        if len(fields) != len(names):
            raise ValueError(f"{where}: {len(fields)} fields for the {len(names)} columns {', '.join(names)}")
        row = dict(zip(names, fields, strict=True))
        _check_columns({name: text for name, text in row.items() if text}, columns, where)
        rows.append(_ReadRow(row, where))
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[Row]:
    """Reads a Parquet file. NaN and infinity, which JSON does not have, are null: so some writers say it.

    Arrow gives every call of a tool the arguments of all others, as null; those that are null are left out.

    Args:
      path: of the file.
      columns: what every row must have, and not as null.

    Raises:
      ValueError: at the first bad row, with file and row number, from 1; if the file is
        not Parquet, has two columns of one name, or has no row.
      ImportError: without the extra `data`.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'grpo-jax[data]'") from error
    with open(path, "rb") as file:  # so that a file that is not there is told as for the other kinds
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}: two columns are called {twice[0]}; rename one of them")
            found = [row for batch in table.iter_batches() for row in batch.to_pylist()]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not Parquet: {error}") from None
    return list(_checked(map(_without_filling, found), columns, f"{path}"))


def read_hugging_face(
    source: str | os.PathLike[str],
    columns: Sequence[str] = (),
    *,
    split: str | None = None,
    subset: str | None = None,
) -> list[Row]:
    """Reads one split of a data set of the Hugging Face Hub, or of a folder, by `datasets.load_dataset`.

    A folder that `save_to_disk` wrote is read by `load_from_disk`; without splits it is the split `train`.
    `datasets` fills a field that a row lacks with None, and NaN and infinity are None, too: name in `columns` what must
    be there. Arguments of a tool's call that are None are left out.

    Args:
      source: id of the data set, such as `openai/gsm8k`, or a folder.
      columns: what every row must have, and not as null.
      split: such as `train`; may be left out where there is only one.
      subset: such as `main`; `datasets` calls it a configuration.

    Raises:
      ValueError: at the first bad row, with its number, from 1; where a split must be
        named; for files that `datasets` cannot read; and whatever it raises itself.
      ImportError: without the extra `data`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source}: data sets of Hugging Face need: pip install 'grpo-jax[data]'") from error
    if any((pathlib.Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        if subset is not None:
            raise ValueError(f"{source} was saved by itself and has no subset {subset!r}; leave it out")
        saved: Any = datasets.load_from_disk(os.fspath(source))
        splits = saved if isinstance(saved, dict) else {"train": saved}
    else:
        try:
            splits = datasets.load_dataset(os.fspath(source), subset)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{source}: {error.__cause__ or error}") from error
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise ValueError(f"{source} has the splits {', '.join(splits)}; name one of them, got {split!r}")
    return list(_checked(map(_without_filling, splits[split].to_list()), columns, f"{source}[{split}]"))


def _without_filling(row: Row) -> Row:
    """The row without the nulls by which Arrow makes the arguments of all calls of tools one type."""

    def without(value: Any, *, inside: bool) -> Any:
        if isinstance(value, dict):
            kept = {name: inner for name, inner in value.items() if not inside or inner is not None}
            return {name: without(inner, inside=inside or name == "tool_calls") for name, inner in kept.items()}
        return [without(inner, inside=inside) for inner in value] if isinstance(value, list) else value

    return {name: without(column, inside=False) for name, column in row.items()}


def _checked(rows: Iterable[Row], columns: Sequence[str], source: str) -> Iterator[Row]:
    number = 0
    for number, row in enumerate(rows, start=1):
        where = f"{source}: row {number}"
        finite = _finite_row(row, columns, where)
        _check_columns(finite, columns, where)
        yield _ReadRow(finite, where)
    if not number:
        raise ValueError(f"{source}: there are no rows")


def _finite_row(row: Row, columns: Sequence[str], where: str) -> Row:
    """The row with None in place of each number that is not finite; one in `columns` is refused."""
    for name in columns:
        if bad := [x for x in _values(field(row, name)) if isinstance(x, float) and not math.isfinite(x)]:
            raise ValueError(f"{where}: {name} is {bad[0]}, which is no value")
    return {name: _with_nulls(column) for name, column in row.items()}


def _warn_of_nulls(where: str) -> None:
    warnings.warn(f"{where}: a number that is not finite is read as null, in a column not asked for", stacklevel=3)


def _check_columns(row: Row, columns: Sequence[str], where: str) -> None:
    if missing := [column for column in columns if field(row, column) is None]:
        raise ValueError(f"{where}: no column {', '.join(missing)}; the row has {', '.join(row)}")


def field(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or None; `outer.inner` also names a field of the object in column `outer`."""
    value: Any = row
    while isinstance(value, dict) and name not in value and "." in name:
        outer, _, name = name.partition(".")
        value = value.get(outer)
    return value.get(name) if isinstance(value, dict) else None


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    compressed = pathlib.Path(path).suffix.lower() == ".gz"
    with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
        try:
            yield from file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: no whole gzip file: {error}") from None


def _parsed(content: bytes, where: str) -> tuple[Any, bool]:
    """The value, and whether all its numbers are finite."""
    finite = True

    def number(text: str) -> float:
        nonlocal finite
        finite &= math.isfinite(value := float(text))
        return value

    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=object_of)
        if content.count(b"[") + content.count(b"{") > _DEEPEST and _is_deep(value):
            raise RecursionError
        if b"\\u" in content:  # half of a pair, which no UTF-8 and so no tokenizer can say
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: nested too deep: {content[:80]!r}") from None
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{where}: not JSON of whole characters: {code} is half of a surrogate pair") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}: {content[:80]!r}") from None
    return value, finite


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `json.loads(..., object_pairs_hook=object_of)` makes it.

    Raises:
      ValueError: for a name that is there twice: either value may be meant, and Python keeps the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


_DEEPEST = 100  # beyond some hundreds, Python cannot copy a value, write it or compare it


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        objects = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for outer in objects for inner in outer if isinstance(inner, dict | list)]
    return bool(level)


def _values(column: Any) -> Iterator[Any]:
    """The column's value, or those inside of it."""
    if isinstance(column, dict | list):
        for inner in column.values() if isinstance(column, dict) else column:
            yield from _values(inner)
    else:
        yield column


def _with_nulls(column: Any) -> Any:
    """The column's value with None in place of each number in it that is not finite."""
    if isinstance(column, dict):
        return {name: _with_nulls(inner) for name, inner in column.items()}
    if isinstance(column, list):
        return [_with_nulls(inner) for inner in column]
    return None if isinstance(column, float) and not math.isfinite(column) else column


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


_READERS: dict[str, Callable[..., list[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
