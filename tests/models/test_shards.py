"""Safetensors files, as they are written by an export and read in parts."""

import contextlib
import os
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from grpo_jax.models.hf.shards import Tensor, held, read_shard, write_shard

RNG = np.random.default_rng(0)
ARRAYS = {
    "half": RNG.normal(size=(3,)).astype(np.float16),
    "transposed": RNG.normal(size=(4, 3)).astype(np.float32).T,
    "bfloat16": np.asarray(jnp.asarray(RNG.normal(size=(2, 5)), jnp.bfloat16)),
    "wide": RNG.normal(size=(2, 2)),
    "scalar": np.float32(3.5).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def opened():
    """Opens files that are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda path: stack.enter_context(open(path, "rb"))


def test_safetensors_reads_the_same_bits_and_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {name: held(array) for name, array in ARRAYS.items()}
    write_shard(tmp_path / "a", tensors)
    read = safetensors.numpy.load_file(tmp_path / "a")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    with safetensors.safe_open(tmp_path / "a", "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "written_by": "grpo_jax"}
    write_shard(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_rows_asked_for_are_read_of_what_safetensors_has_written(tmp_path, opened):
    arrays = {name: ARRAYS[name] for name in ("half", "bfloat16", "empty")}
    arrays |= {"cube": RNG.normal(size=(5, 3, 2)).astype(np.float32), "bytes": np.arange(6, dtype=np.uint8)[::-1]}
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in arrays.items()}, tmp_path / "a", {"b": "c"}
    )
    stored = read_shard(opened(tmp_path / "a"))
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: x.shape for name, x in arrays.items()}
    for name, array in arrays.items():
        whole = stored[name][:]
        assert (whole.dtype, whole.shape, whole.tobytes()) == (array.dtype, array.shape, array.tobytes())
    np.testing.assert_array_equal(stored["cube"][1:4], arrays["cube"][1:4])
    np.testing.assert_array_equal(stored["cube"][3:9, 1:, :1], arrays["cube"][3:9, 1:, :1])
    assert stored["cube"][4:2].shape == (0, 3, 2)


def test_a_file_that_is_replaced_while_it_is_read_stays_the_one_and_one_that_is_cut_is_an_error(tmp_path, opened):
    array = np.arange(400_000, dtype=np.float32).reshape(4, -1)
    write_shard(tmp_path / "a", {"x": held(array)})
    stored = read_shard(opened(tmp_path / "a"))["x"]
    write_shard(tmp_path / "b", {"x": held(-array)})
    (tmp_path / "c").hardlink_to(tmp_path / "a")
    (tmp_path / "b").replace(tmp_path / "a")
    np.testing.assert_array_equal(stored[:], array)
    os.truncate(tmp_path / "c", (tmp_path / "c").stat().st_size - 1)
    np.testing.assert_array_equal(stored[:3], array[:3])
    with pytest.raises(ValueError, match="a has become shorter while it was read"):
        stored[1:]


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    made = []

    def make():
        assert all(array() is None for array in made)
        array = np.ones((5, 7), np.float32)
        made.append(weakref.ref(array))
        return array

    write_shard(tmp_path / "shard", {name: Tensor((5, 7), np.dtype(np.float32), make) for name in "abc"})
    assert len(made) == 3


def test_a_tensor_that_is_not_made_as_announced_and_other_dtypes_are_refused(tmp_path):
    array = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"a was announced as float32\[3, 2\] and made as float32\[2, 3\]"):
        write_shard(tmp_path / "shard", {"a": Tensor((3, 2), array.dtype, lambda: array)})
    with pytest.raises(ValueError, match="not int32"):
        write_shard(tmp_path / "shard", {"a": held(array.astype(np.int32))})
