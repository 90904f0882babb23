"""One safetensors file, written a tensor at a time.

safetensors' own writer takes all tensors at once and makes a copy of each: twice the file's size in memory. It also
orders the metadata by chance, and gives the file to its owner alone.
"""

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.models.hf.replacing import MARK

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
