"""A teacher's likeliest tokens on disk: what is read is what was written, for what it was written for."""

import numpy as np
import pytest

from grpo_jax.run import teacher_files
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Likeliest

TOKENIZER = tiny_tokenizer()
PAIRS = [([1, 2], [3, 4, 5]), ([1], [6]), ([2], [7, 8, 9, 4])]
T, K = 5, 2


def top_of(seed, lengths):
    rng = np.random.default_rng(seed)
    shape = (len(lengths), 1, T, K)
    return Likeliest(rng.integers(0, 50, shape), rng.normal(size=shape).astype(np.float32))


def about(pairs=PAIRS, **changes):
    return teacher_files.about(TOKENIZER, pairs, **{"k": K, "temperature": 0.7, "teacher": "x"} | changes)


@pytest.fixture
def written(tmp_path):
    lengths = [[3], [1], [4]]
    first, second = top_of(0, lengths[:2]), top_of(1, lengths[2:])
    path = tmp_path / "folder" / "top.safetensors"
    with teacher_files.writing(path, about()) as write:
        write(first, np.array(lengths[:2]))
        write(second, np.array(lengths[2:]))
    return path, first, second


def test_rows_come_back_in_any_order_and_padded(written):
    path, first, second = written
    held = teacher_files.read(path, about(teacher="called otherwise"))
    batch = held.batch([2, 0, 1], T + 1)
    for b, (top, row, length) in enumerate([(second, 0, 4), (first, 0, 3), (first, 1, 1)]):
        for found, expected in zip(batch, top, strict=True):
            np.testing.assert_array_equal(found[b, 0, :length], expected[row, 0, :length])
            assert not np.any(found[b, 0, length:])
    with pytest.raises(ValueError, match="row 2 has 4 tokens, more than the width of 3"):
        held.batch([0, 2], 3)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: about(k=3), "k differ"),
        (lambda: about(temperature=1.0), "temperature differ"),
        (lambda: about([*PAIRS[:2], ([2], [7, 8, 9, 5])]), "the prompts and completions differ"),
        (lambda: about(PAIRS[::-1]), "the prompts and completions differ"),
        (lambda: about() | {"the tokenizer": "another"}, "the tokenizer differ"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_name(written, other, named):
    with pytest.raises(ValueError, match=named):
        teacher_files.read(written[0], other())


def test_what_is_no_such_file_is_refused_and_an_interrupted_one_leaves_nothing(tmp_path):
    (tmp_path / "text").write_text("hello")
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match=f"{name} is no file of a teacher's likeliest tokens"):
            teacher_files.read(tmp_path / name, about())
    with pytest.raises(KeyboardInterrupt), teacher_files.writing(tmp_path / "new", about()):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_a_file_of_no_rows_is_not_written(tmp_path):
    with (
        pytest.raises(ValueError, match=r"nothing to write to .*: write was not called for any rows"),
        teacher_files.writing(tmp_path / "top.safetensors", about()),
    ):
        pass
    assert not any(tmp_path.iterdir())
