"""Rows as they are read, and errors that name the file and the row."""

import codecs
import copy
import csv
import gzip
import io
import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.data import read_csv, read_hugging_face, read_jsonl, read_parquet, read_rows
from grpo_jax.run.digests import of_rows

# ---------------------------------------------------------------------------- rows


def write(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_are_read_in_order_and_empty_lines_skipped(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "answer": 1}\n\n  \t\n{"prompt": "b", "answer": [2]}\r\n\n')
    assert read_jsonl(path, ["prompt", "answer"]) == [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": [2]}]


def test_the_last_line_needs_no_end(tmp_path):
    assert read_jsonl(write(tmp_path, '{"a": 1}\n{"a": 2}')) == [{"a": 1}, {"a": 2}]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert read_jsonl(write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n'), ["prompt"]) == [{"prompt": "a"}]


@settings(deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"text": st.text(st.characters(exclude_categories=["Cs"]))}), min_size=1))
def test_any_text_is_read_as_it_was_written(tmp_path_factory, rows):
    """U+2028 and U+0085 among it, which end lines for `str.splitlines`, and all that is not ASCII."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON: Expecting ',' delimiter"),
        ("prompt: a", "not JSON: Expecting value"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data"),
        ('{"prompt": NaN}', "prompt is nan, which is no value"),
        ('{"prompt": [{"a": -Infinity}]}', "prompt is -inf, which is no value"),
        ('{"prompt": 1e999}', "prompt is inf, which is no value"),
        ('{"prompt": "a", "x": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        (r'{"prompt": "a\ud83db"}', r"not JSON of whole characters: \ud83d is half of a surrogate pair"),
        (r'{"prompt": "a", "x": {"y": ["\udc00"]}}', r"not JSON of whole characters: \udc00 is half of a surrogate"),
        ('{"prompt": "a", "answer": 1, "prompt": "b"}', "not JSON: an object has 'prompt' twice"),
        ('{"prompt": "a", "x": [{"y": 1, "y": 1}]}', "not JSON: an object has 'y' twice"),
        ('{"prompt": "a", "x": ' + '{"y":' * 100 + "1" + "}" * 101, "not JSON that can be read: nested too deep"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON that can be read: nested too deep"),
        (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        ('["a", "b"]', "a row is an object, got"),
        ('"a"', "a row is an object, got"),
        ("null", "a row is an object, got"),
        ('{"answer": 1, "id": 7}', "no column prompt; the row has answer, id"),
        ('{"answer": 1, "prompt": null}', "no column prompt; the row has answer, prompt"),
        ('{"id": 7}', "no column prompt, answer; the row has id"),
        ("{}", "no column prompt, answer"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, b'{"prompt": "a", "answer": 1}\n\n' + line + b'\n{"prompt": "b", "answer": 2}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {message}")):
        read_jsonl(path, ["prompt", "answer"])


def test_what_is_nested_less_deep_can_be_copied_for_rewards_and_digested(tmp_path):
    deep = '{"prompt": "a", "x": ' + "[" * 99 + "NaN" + "]" * 99 + "}"
    with pytest.warns(UserWarning, match="is read as null"):
        (row,) = read_jsonl(write(tmp_path, deep + "\n"))
    assert json.dumps(copy.deepcopy(row)) == deep.replace("NaN", "null")
    assert of_rows([row])


def test_a_column_that_is_false_or_empty_is_there(tmp_path):
    assert read_jsonl(write(tmp_path, '{"a": 0, "b": "", "c": false}'), ["a", "b", "c"])


def test_a_long_bad_line_is_shown_in_part(tmp_path):
    with pytest.raises(ValueError, match="not JSON") as error:
        read_jsonl(write(tmp_path, "x" * 1_000_000))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the file has no rows")):
        read_jsonl(path)


# ----------------------------------------------------------------------------- CSV


def write_csv(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_of_csv_are_text_under_the_names_of_the_first_line(tmp_path):
    path = write_csv(tmp_path, 'prompt,answer\na,1\r\n\n"b, ""c""\nd",\n')
    assert read_csv(path, ["prompt"]) == [{"prompt": "a", "answer": "1"}, {"prompt": 'b, "c"\nd', "answer": ""}]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert read_csv(write_csv(tmp_path, b"\xef\xbb\xbfprompt\na\n"), ["prompt"]) == [{"prompt": "a"}]


FIELDS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\r\n,"\ufeff'), min_size=1)


@settings(deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"a": FIELDS, "b": FIELDS}), min_size=1))
def test_any_text_is_read_as_the_csv_module_wrote_it(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["a", "b"])
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())
    assert read_csv(path, ["a", "b"]) == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b", "1 fields for the 2 columns prompt, answer"),
        ("b,2,3", "3 fields for the 2 columns prompt, answer"),
        ("b,", "no column answer; the row has prompt"),
        (",", "no column prompt, answer; the row has "),
        ('"b"c,2', "not CSV: ',' expected after '\"'"),
        ('"b,2', "not CSV: unexpected end of data"),
        (b"b\xff,2", "not CSV: 'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["too few", "too many", "empty", "all empty", "after a quote", "no end", "not UTF-8"],
)
def test_a_bad_row_of_csv_is_refused_with_its_file_and_the_line_it_begins_at(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write_csv(tmp_path, b'prompt,answer\n\n"a\na",1\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:5: {message}")) as error:
        read_csv(path, ["prompt", "answer"])
    assert len(str(error.value)) < 1000


def test_a_column_that_a_csv_file_does_not_have_is_refused_at_its_first_row(tmp_path):
    path = write_csv(tmp_path, "question,answer\na,1\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: no column prompt; the row has question, answer")):
        read_csv(path, ["prompt"])


@pytest.mark.parametrize("names", ["prompt,prompt", "prompt,"], ids=["twice", "empty"])
def test_names_that_do_not_name_are_refused(tmp_path, names):
    path = write_csv(tmp_path, f"{names}\na,b\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:1: the first line names every column, each differently")):
        read_csv(path)


@pytest.mark.parametrize("content", ["", "\n\n", "prompt,answer\n"], ids=["empty", "empty lines", "names alone"])
def test_a_csv_file_without_rows_is_refused(tmp_path, content):
    path = write_csv(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the file has no rows")):
        read_csv(path)


# ------------------------------------------------------------- Parquet and Hugging Face


def write_parquet(path, columns, **types):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_rows_of_parquet_have_the_values_that_were_written(tmp_path):
    columns = {
        "prompt": ["a", "é\n", "c"],
        "answer": [1, 2, 3],
        "tests": [["x"], [], ["y", "z"]],
        "note": ["", None, "n"],
    }
    path = write_parquet(tmp_path / "rows.parquet", columns)
    expected = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert read_parquet(path, ["prompt", "answer", "tests"]) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a", "b", None]}, "row 3: no column prompt; the row has prompt"),
        ({"answer": ["a", "b", "c"]}, "row 1: no column prompt; the row has answer"),
        ({"prompt": [1.0, 2.0, float("nan")]}, "row 3: prompt is nan, which is no value"),
        ({"prompt": [1.0, float("inf"), 2.0]}, "row 2: prompt is inf, which is no value"),
    ],
    ids=["null", "missing", "nan", "infinity"],
)
def test_a_bad_row_of_parquet_is_refused_with_its_file_and_number(tmp_path, columns, message):
    path = write_parquet(tmp_path / "rows.parquet", columns)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_parquet(path, ["prompt"])


def test_two_columns_of_parquet_with_one_name_are_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["q", "q"]), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: two columns are called q")):
        read_parquet(path)


def test_arguments_that_arrow_adds_to_the_calls_of_tools_are_left_out(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": [2]}}}]
    prompt = [
        {"role": "user", "content": "w?"},
        *({"role": "assistant", "content": "so", "tool_calls": [call]} for call in calls),
    ]
    path = write_parquet(tmp_path / "rows.parquet", {"prompt": [prompt], "note": [None], "x": [{"y": None}]})
    (row,) = read_parquet(path)
    assert [message["tool_calls"] for message in row["prompt"][1:]] == [[call] for call in calls]
    assert (row["note"], row["x"]) == (None, {"y": None})  # of what is no call, null may be a value


def test_text_of_parquet_that_is_no_utf_8_is_refused_with_its_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    prompts = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "rows.parquet", {"prompt": prompts})
    with pytest.raises(ValueError, match=re.escape(f"{path}: not Parquet: 'utf-8' codec can't decode")):
        read_parquet(path)


def test_a_parquet_file_that_is_none_or_empty_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    for content in (b"", b"PAR1 or so", b"prompt\na\n" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: not Parquet: ")):
            read_parquet(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: there are no rows")):
        read_parquet(write_parquet(path, {"prompt": []}))
    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "absent.parquet")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """`datasets` with a cache of its own and no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield tmp_path / "dataset"
    datasets.enable_progress_bars()


def write_dataset(folder, **splits):
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_split_of_a_hugging_face_data_set_is_read(offline):
    write_dataset(offline, train=[{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}], test=[{"prompt": "c"}])
    assert read_rows(offline, ["prompt"], split="train") == [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    assert read_rows(str(offline), ["prompt"], split="test")[0]["prompt"] == "c"


def test_a_split_need_not_be_named_where_there_is_only_one(offline):
    write_dataset(offline, train=[{"prompt": "a"}])
    assert read_rows(offline) == [{"prompt": "a"}]


def test_a_data_set_that_was_saved_to_disk_is_read(offline, tmp_path):
    datasets = pytest.importorskip("datasets")
    one, other = (datasets.Dataset.from_list([{"prompt": text}]) for text in "ab")
    one.save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one", ["prompt"]) == read_rows(tmp_path / "one", split="train") == [{"prompt": "a"}]
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "both", split="test") == [{"prompt": "b"}]
    with pytest.raises(ValueError, match="has the splits train, test; name one of them"):
        read_rows(tmp_path / "both")
    with pytest.raises(ValueError, match="has no subset 'main'"):
        read_rows(tmp_path / "one", subset="main")


@pytest.mark.parametrize("split", [None, "dev"])
def test_a_split_that_is_not_there_or_not_named_is_refused(offline, split):
    write_dataset(offline, train=[{"prompt": "a"}], test=[{"prompt": "b"}])
    with pytest.raises(ValueError, match=re.escape(f"has the splits train, test; name one of them, got {split!r}")):
        read_hugging_face(offline, split=split)


def test_a_folder_with_a_file_that_cannot_be_read_is_an_error_of_input(offline):
    write_dataset(offline, train=[{"prompt": "a"}])
    (path,) = offline.rglob("train*")
    path.write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=re.escape(f"{offline}: ") + ".*JSON"):
        read_hugging_face(offline)


def test_a_field_that_a_row_lacks_does_not_become_none(offline):
    """`datasets` fills it in without a word."""
    write_dataset(offline, train=[{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
    with pytest.raises(
        ValueError, match=re.escape(f"{offline}[train]: row 2: no column answer; the row has prompt, answer")
    ):
        read_rows(offline, ["prompt", "answer"])


def test_a_subset_is_read(offline):
    for name in ("one", "two"):
        (offline / name).mkdir(parents=True)
        (offline / name / "train.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("one", "two"))
    (offline / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read_rows(offline, subset="two") == [{"prompt": "two"}]


def test_the_suffix_chooses_the_reader(tmp_path):
    assert read_rows(write(tmp_path, '{"a": "1"}\n'), ["a"]) == [{"a": "1"}]
    assert read_rows(str(write_csv(tmp_path, "a\n1\n")), ["a"]) == [{"a": "1"}]
    assert read_rows(write_parquet(tmp_path / "rows.parquet", {"a": ["1"]}), ["a"]) == [{"a": "1"}]
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        with pytest.raises(ValueError, match=re.escape(name)):
            read_rows(tmp_path / name, ["b"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSONL", "rows.ndjson", "rows.v2.jsonl.gz", "rows.Json.GZ"])
def test_json_lines_have_several_suffixes_and_may_be_compressed(tmp_path, name):
    content = b'{"a": "1"}\n{"a": "\\ud83d\\ude42"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert read_rows(tmp_path / name, ["a"]) == [{"a": "1"}, {"a": "🙂"}]
    with pytest.raises(ValueError, match=re.escape(f"{name}:1: no column b; the row has a")):
        read_rows(tmp_path / name, ["b"])


def test_csv_may_be_compressed(tmp_path):
    (tmp_path / "rows.CSV.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert read_rows(tmp_path / "rows.CSV.gz") == [{"a": "1", "b": "2"}]


def test_a_json_file_holds_a_list_or_lines(tmp_path):
    path = tmp_path / "rows.json"
    for content in ('[{"a": 1},\n {"a": 2}]', '\ufeff [{"a": 1}, {"a": 2}]\n', '{"a": 1}\n{"a": 2}'):
        path.write_text(content)
        assert read_rows(path, ["a"]) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "rows.json: there are no rows"),
        ('[{"a": 1}, 2]', "rows.json: row 2: a row is an object, got 2"),
        ('[{"a": 1}, {"b": 2}]', "rows.json: row 2: no column a; the row has b"),
        ('[{"a": 1}, {"a": NaN}]', "rows.json: row 2: a is nan, which is no value"),
        ('[{"a": 1}', "rows.json: not JSON: Expecting ',' delimiter"),
        ("[" * 100_000, "rows.json: not JSON that can be read: nested too deep"),
        ("", "rows.json: the file has no rows"),
    ],
)
def test_a_bad_list_of_json_is_refused_with_its_file_and_row(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_rows(tmp_path / "rows.json", ["a"])
    assert len(str(error.value)) < 1000


def test_a_compressed_file_that_is_cut_or_none_is_refused(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (whole[:-20], b'{"a": 1}\n', whole[:30] + b"x" * 20):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'rows.jsonl.gz'}: no whole gzip file: ")):
            read_rows(tmp_path / "rows.jsonl.gz")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.parquet.gz", "rows.gz"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name}: a file of rows ends in .jsonl, .ndjson, .json, .csv, .parq"):
        read_rows(tmp_path / name)


def test_a_number_of_json_that_is_none_is_null_and_told_where_nobody_asked_for_it(tmp_path):
    path = write(tmp_path, '{"a": 1, "loss": NaN}\n{"a": 2.5, "x": [{"y": -1e400, "z": 1.5}]}\n{"a": 3, "loss": 2}\n')
    with pytest.warns(UserWarning, match=re.escape(f"{path}:1 and 1 more: a number that is not finite")):
        rows = read_jsonl(path, ["a"])
    assert rows == [{"a": 1, "loss": None}, {"a": 2.5, "x": [{"y": None, "z": 1.5}]}, {"a": 3, "loss": 2}]
    (tmp_path / "rows.json").write_text('[{"a": 1, "loss": Infinity}]')
    with pytest.warns(UserWarning, match=re.escape("rows.json: a number that is not finite is read as null")):
        assert read_rows(tmp_path / "rows.json", ["a"]) == [{"a": 1, "loss": None}]


def test_a_number_that_is_none_is_null_where_nobody_asked_for_it(tmp_path):
    columns = {"a": [{"b": [1.0, float("nan")]}], "c": [float("-inf")], "d": [2.0]}
    path = write_parquet(tmp_path / "rows.parquet", columns)
    assert read_parquet(path, ["d"]) == [{"a": {"b": [1.0, None]}, "c": None, "d": 2.0}]
    with pytest.raises(ValueError, match=r"row 1: a\.b is nan, which is no value"):
        read_parquet(path, ["a.b"])


def test_a_field_of_csv_may_be_long_and_a_byte_order_mark_may_stand_alone(tmp_path):
    (tmp_path / "long.csv").write_text(f"prompt,answer\n{'a' * 200_000},1\n")
    limit = csv.field_size_limit()
    assert len(read_rows(tmp_path / "long.csv")[0]["prompt"]) == 200_000
    assert csv.field_size_limit() == limit  # of other readers
    for name, content in {
        "mark.jsonl": b'\n{"a": "1"}\n',
        "mark.csv": b"\na\n1\n",
        "mark.json": b'\n[{"a": "1"}]',
    }.items():
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
        assert read_rows(tmp_path / name) == [{"a": "1"}]


@pytest.mark.parametrize("settings", [{"split": "train"}, {"subset": "main"}], ids=["split", "subset"])
def test_a_split_of_a_file_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="is one file and has no split"):
        read_rows(write(tmp_path, '{"a": 1}\n'), **settings)


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "rows.parquet"), ("datasets", "openai/gsm8k")], ids=str)
def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch, module, source):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'grpo-jax[data]'")):
        read_rows(source)
