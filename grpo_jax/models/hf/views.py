"""Checkpoints that name or lay out their tensors in another way than the families do, seen as if they did not.

language_model.model.layers.0...             the text part of a model that also sees images; the rest is left out
...experts.down_proj_blocks, .._scales       gpt-oss in mxfp4: 32 weights share an exponent

Nothing is copied; what is packed becomes floats where it is read.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Places = Mapping[str, str]  # the file of each tensor
Shards = Mapping[str, Any]  # open safetensors files

_OF_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_OF_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?P<name>.*)")
_ENDS = ("_blocks", "_scales")
# The 16 values of a code: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_FP4 = np.array([sign * x for sign in (1, -1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], np.float32)


@dataclasses.dataclass(frozen=True)
class View:
    """What is used of an open safetensors file, under other names."""

    shard: Any
    names: dict[str, str]  # those that are seen, and the file's own

    def keys(self) -> list[str]:
        return sorted(self.names)

    def get_slice(self, name: str) -> Any:
        return self.shard.get_slice(self.names[name])

    def get_tensor(self, name: str) -> np.ndarray:
        return self.shard.get_tensor(self.names[name])


@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights `[E, in, out]` in mxfp4, of which parts are made when they are asked for."""

    blocks: Any  # [E, out, in / 32, 16] bytes, two codes each, the lower half first
    scales: Any  # [E, out, in / 32] bytes, exponents of 2, plus 127

    def get_shape(self) -> list[int]:
        E, out, groups, half = self.blocks.get_shape()
        return [E, groups * 2 * half, out]

    def get_dtype(self) -> str:
        fits = list(self.scales.get_shape()) == list(self.blocks.get_shape())[:-1]
        dtypes = {self.blocks.get_dtype(), self.scales.get_dtype()}
        return "F32" if fits and dtypes == {"U8"} else f"of blocks and scales {sorted(dtypes)}"

    def __getitem__(self, index: Any) -> np.ndarray:
        experts, *others = index if isinstance(index, tuple) else (index,)
        return unpack(self.blocks[experts], self.scales[experts])[(slice(None), *others)]


@dataclasses.dataclass(frozen=True)
class AllPacked:
    """The packed tensors of a checkpoint, whose halves may lie in several files."""

    places: Places
    shards: Shards
    names: list[str]

    def keys(self) -> list[str]:
        return self.names

    def get_slice(self, name: str) -> Packed:
        return Packed(*(self.shards[self.places[name + end]].get_slice(name + end) for end in _ENDS))


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`[..., in, out]` float32 of blocks `[..., out, in / 32, 16]` and scales `[..., out, in / 32]` of bytes.

    weight = value of the code * 2 ** (scale - 127)
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)
    with np.errstate(over="ignore"):  # what is not finite is refused where it is read
        values = np.ldexp(_FP4[codes], scales[..., None].astype(np.int32) - 127)
    return values.reshape(*values.shape[:-2], -1).swapaxes(-1, -2)


def of_text(places: Places, shards: Shards) -> tuple[Places, Shards]:
    """Without what a model that sees images has beside the language model, under a language model's names."""
    if not any(map(_OF_TEXT.fullmatch, places)):
        return places, shards

    def seen(name: str) -> str:
        match = _OF_TEXT.fullmatch(name)
        if match is None or match["name"] == "lm_head.weight":
            return name if match is None else match["name"]
        return f"model.{match['name']}"

    kept = {name: file for name, file in places.items() if not _OF_IMAGES.fullmatch(name)}
    views = {
        file: View(shard, {seen(name): name for name in sorted(shard.keys()) if not _OF_IMAGES.fullmatch(name)})
        for file, shard in shards.items()
    }
    return {seen(name): file for name, file in kept.items()}, views


def of_floats(places: Places, shards: Shards) -> tuple[Places, Shards]:
    """With tensors of floats where there are blocks and scales of mxfp4."""
    packed = sorted(
        name.removesuffix(_ENDS[0])
        for name in places
        if name.endswith(_ENDS[0]) and name.removesuffix(_ENDS[0]) + _ENDS[1] in places
    )
    if not packed:
        return places, shards
    halves = {name + end for name in packed for end in _ENDS}
    views: dict[str, Any] = {
        file: View(shard, {name: name for name in {*shard.keys()} - halves}) for file, shard in shards.items()
    }
    views["mxfp4"] = AllPacked(places, shards, packed)
    whole = {name: file for name, file in places.items() if name not in halves}
    return whole | dict.fromkeys(packed, "mxfp4"), views
