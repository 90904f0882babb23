"""One safetensors file, written a tensor at a time and read in parts.

safetensors' own writer takes all tensors at once and makes a copy of each: twice the file's size in memory. It also
orders the metadata by chance, and gives the file to its owner alone. Its reader maps the file into memory, where all
that was read once stays the process's until the file is closed.
"""

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.hf.folders import open_shard
from grpo_jax.models.hf.replacing import MARK

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_READ = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "U8": np.uint8}


class Tensor(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def held(array: np.ndarray) -> Tensor:
    """A tensor that is there already."""
    return Tensor(array.shape, array.dtype, lambda: array)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in an open file, of which rows are read when they are asked for.

    The file stays the one that was opened, though another may take its place meanwhile.
    """

    file: BufferedReader
    start: int  # bytes of the file before it
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        first, *others = index if isinstance(index, tuple) else (index,)
        start, stop, _ = first.indices(self.shape[0])
        dtype, rows = np.dtype(_READ[self.dtype]), max(0, stop - start)
        row = math.prod(self.shape[1:]) * dtype.itemsize  # bytes
        read = np.empty(rows * row, np.uint8)
        self.file.seek(self.start + start * row)
        if self.file.readinto(read.data) < read.size:
            raise ValueError(f"{self.file.name} has become shorter while it was read; is something writing it?")
        return read.view(dtype).reshape(rows, *self.shape[1:])[(slice(None), *others)]


def read_shard(file: BufferedReader) -> dict[str, Stored]:
    """The tensors of an open safetensors file, by name; none of them is read yet.

    Raises:
      ValueError: if it is no whole safetensors file.
    """
    with open_shard(Path(file.name)):  # which checks that header and size fit
        pass
    (size,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(size))
    return {
        name: Stored(file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_shard(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, of which the host holds one tensor at a time; the same tensors give the same bytes.

    The format (https://huggingface.co/docs/safetensors): the header's size in 8 bytes, the header as JSON, then the
    tensors without gaps. Wider numbers go first, so that each tensor begins at a multiple of its numbers' size.

    Args:
      file: to write.
      tensors: by name.
      metadata: of the file, beside the mark of an export.

    Raises:
      ValueError: for a dtype that a checkpoint does not have, or for a tensor that is not made as it was announced.
    """
    if other := sorted({tensor.dtype.name for tensor in tensors.values()} - _DTYPES.keys()):
        raise ValueError(f"a checkpoint holds {', '.join(_DTYPES)}, not {', '.join(other)}")
    ordered = _ordered(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(({"format": "pt"} | MARK | dict(metadata or {})).items()))}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.size
        header[name] = {"dtype": _DTYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            opened.write(_bytes(name, tensor))


@contextlib.contextmanager
def written_by_first(shards: Sequence[Mapping[str, Tensor]]) -> Iterator[list[dict[str, Tensor]]]:
    """Files whose tensors are made by all processes together and written, in the block, by the first.

    What the first has not come to when the block ends is made all the same, since the others wait for it.
    """
    made = 0

    def counted(tensor: Tensor) -> Tensor:
        def make() -> np.ndarray:
            nonlocal made
            made += 1
            return tensor.make()

        return tensor._replace(make=make)

    try:
        yield [{name: counted(tensor) for name, tensor in shard.items()} for shard in shards]
    finally:
        if jax.process_count() > 1:
            for _, tensor in [item for shard in shards for item in _ordered(shard)][made:]:
                tensor.make()


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def _bytes(name: str, tensor: Tensor) -> memoryview:
    array = tensor.make()
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        made, announced = (f"{x.dtype}{[*x.shape]}" for x in (array, tensor))
        raise ValueError(f"{name} was announced as {announced} and made as {made}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
