"""JSON files that are whole, and parts of a work that are found again."""

import json

import pytest

from grpo_jax.run import files, preemption


def test_parts_that_are_there_are_read_and_the_others_are_made_in_their_order(tmp_path):
    made = []

    def make(number, part):
        if part == "c" and len(made) < 3:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(part)
        return {"number": number, "part": part}

    with pytest.raises(KeyboardInterrupt):
        files.made_once(tmp_path / "parts", "abcd", make)
    found = files.made_once(tmp_path / "parts", "abcd", make)
    assert found == [{"number": i, "part": part} for i, part in enumerate("abcd")]
    assert made == ["a", "b", "killed", "c", "d"]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [f"{i:05d}.json" for i in range(4)]


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert files.is_writable(tmp_path / "file")
    assert files.is_writable(tmp_path / "not" / "there" / "file")
    assert files.is_writable(tmp_path / "not" / "there", folder=True)
    assert not files.is_writable(tmp_path)
    assert not files.is_writable(tmp_path / "file" / "below")
    assert not files.is_writable(tmp_path / "file", folder=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write whatever the modes are
    assert not files.is_writable(tmp_path / "file")
    assert not files.is_writable(tmp_path, folder=True)


def test_a_request_to_stop_ends_it_between_two_parts(tmp_path, monkeypatch, capsys):
    asked = iter([False, True])

    class Graceful:
        def __enter__(self):
            return lambda: next(asked)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(preemption, "graceful_stop", Graceful)
    with pytest.raises(SystemExit) as stopped:
        files.made_once(tmp_path, "ab", lambda number, part: part)
    assert stopped.value.code == preemption.STOPPED
    assert "stopped after 1 parts" in capsys.readouterr().out


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}


def test_text_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    files.write_text(tmp_path / "x.jsonl", "é\n")
    monkeypatch.setattr(files.os, "replace", lambda half, path: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        files.write_text(tmp_path / "x.jsonl", "more")
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == "é\n"
