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
Shards = Mapping[str, Mapping[str, Any]]  # the tensors of each file: shape, dtype, and rows to be read

_OF_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
_OF_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?P<name>.*)")
_ENDS = ("_blocks", "_scales")
# The 16 values of a code: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_FP4 = np.array([sign * x for sign in (1, -1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], np.float32)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights `[E, in, out]` in mxfp4, of which parts are made when they are asked for."""

    blocks: Any  # [E, out, in / 32, 16] bytes, two codes each, the lower half first
    scales: Any  # [E, out, in / 32] bytes, exponents of 2, plus 127

    @property
    def shape(self) -> tuple[int, ...]:
        E, out, groups, half = self.blocks.shape
        return E, groups * 2 * half, out

    @property
    def dtype(self) -> str:
        fits = self.scales.shape == self.blocks.shape[:-1]
        dtypes = {self.blocks.dtype, self.scales.dtype}
        return "F32" if fits and dtypes == {"U8"} else f"of blocks and scales {sorted(dtypes)}"

    def __getitem__(self, index: Any) -> np.ndarray:
        experts, *others = index if isinstance(index, tuple) else (index,)
        return unpack(self.blocks[experts], self.scales[experts])[(slice(None), *others)]


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

    def kept(names: Mapping[str, Any]) -> dict[str, Any]:
        return {seen(name): value for name, value in names.items() if not _OF_IMAGES.fullmatch(name)}

    return kept(places), {file: kept(tensors) for file, tensors in shards.items()}


def of_floats(places: Places, shards: Shards) -> tuple[Places, Shards]:
    """With tensors of floats where there are blocks and scales of mxfp4."""
    tensors = {name: shards[file][name] for name, file in places.items() if name in shards[file]}
    names = {name.removesuffix(_ENDS[0]) for name in tensors if name.endswith(_ENDS[0])}
    packed = {
        name: Packed(*(tensors[name + end] for end in _ENDS))  # which may lie in two files
        for name in sorted(names)
        if name + _ENDS[1] in tensors
    }
    if not packed:
        return places, shards
    halves = {name + end for name in packed for end in _ENDS}

    def others(names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in names.items() if name not in halves}

    whole = {file: others(of_file) for file, of_file in shards.items()}
    return others(places) | dict.fromkeys(packed, "mxfp4"), whole | {"mxfp4": packed}
