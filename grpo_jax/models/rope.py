"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their long-context variants."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Array


class Rope(NamedTuple):
    """Position `p` turns the pair `i` by the angle `p * frequencies[i]`; `scale` multiplies cosine and sine."""

    frequencies: tuple[float, ...]  # radians a token, of head_dim / 2 pairs, or of the first of them
    scale: float = 1.0


def from_parameters(parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    """Reads `rope_parameters` of a Hugging Face config.

    Args:
      parameters: `rope_type` (`default`, `linear`, `llama3` or `yarn`), `rope_theta`
        and what that type needs.
      head_dim: width of an attention head.
      max_position_embeddings: positions of the model, for YaRN without a factor.

    Raises:
      ValueError: for another type or a parameter that the type does not have.
    """
    parameters = {name: value for name, value in parameters.items() if value is not None}
    kind = parameters.pop("rope_type", "default")
    parameters.pop("type", None)  # the old spelling of rope_type, kept by transformers
    theta = parameters.pop("rope_theta", 10000.0)
    if kind not in _VARIANTS:
        raise ValueError(f"rope_parameters.rope_type = {kind!r} is not supported; supported are {sorted(_VARIANTS)}")
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters.partial_rotary_factor other than 1 is not supported")
    variant, known = _VARIANTS[kind]
    if kind == "yarn" and parameters.pop("attn_factor", None) is not None:
        warnings.warn("rope_parameters.attn_factor is passed over, as transformers does", stacklevel=2)
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"rope_parameters.{name} = {value!r} is not supported with rope_type {kind!r}")
    if kind == "yarn" and "factor" not in parameters:
        parameters["factor"] = max_position_embeddings / parameters["original_max_position_embeddings"]
    frequencies, scale = variant(theta, head_dim, **parameters)
    return Rope(tuple(float(frequency) for frequency in frequencies), float(scale))


def _periods(theta: float, head_dim: int) -> np.ndarray:
    """`theta ** (2 i / head_dim)` for each pair `i`, in the float32 arithmetic that models are trained with."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float32(theta), exponents, dtype=np.float32)


def _default(theta: float, head_dim: int) -> tuple[np.ndarray, float]:
    return 1.0 / _periods(theta, head_dim), 1.0


def _linear(theta: float, head_dim: int, *, factor: float) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions divided by `factor`."""
    return 1.0 / _periods(theta, head_dim) / np.float32(factor), 1.0


def _llama3(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[np.ndarray, float]:
    """Llama 3.1: waves longer than the old context are stretched, short ones kept, between them a blend."""
    frequencies = 1.0 / _periods(theta, head_dim)
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # in the old context
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (keep * frequencies + (1 - keep) * frequencies / factor).astype(np.float32), 1.0


def _yarn(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float = 0.0,
    mscale_all_dim: float = 0.0,
    truncate: bool = True,
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 22 for the scale)."""

    def pair_that_turns(times: float) -> float:  # `times` in the old context
        # In this order of operations, as published code has it: the result is rounded to a pair below.
        return head_dim * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(beta_fast or 32.0), pair_that_turns(beta_slow or 1.0)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first if last != first else 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    periods = _periods(theta, head_dim)
    frequencies = (keep / periods + (1 - keep) / (factor * periods)).astype(np.float32)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is None:
        both = mscale and mscale_all_dim  # as DeepSeek has them
        attention_factor = temperature(mscale) / temperature(mscale_all_dim) if both else temperature(1.0)
    return frequencies, attention_factor


def longrope(parameters: Mapping[str, Any], width: int, longest: int, original: int) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753) of rows no longer than in pretraining.

    Args:
      parameters: `rope_parameters` with `short_factor`, by which the period of each pair is multiplied; `long_factor`,
        of longer rows, is not read.
      width: of a head, as far as it rotates.
      longest: positions of the model.
      original: positions in pretraining.

    Raises:
      ValueError: for a parameter that is not known, or factors of another number than that of pairs.
    """
    known = {"rope_type", "type", "rope_theta", "short_factor", "long_factor", "original_max_position_embeddings"}
    given = {name: value for name, value in parameters.items() if value is not None}
    if unknown := sorted(given.keys() - known - {"factor", "attention_factor"}):
        raise ValueError(f"rope_parameters.{unknown[0]} = {given[unknown[0]]!r} is not supported with longrope")
    factors = np.asarray(given["short_factor"], np.float32)
    if factors.shape != (width // 2,):
        raise ValueError(f"short_factor has {factors.size} numbers for the {width // 2} pairs of a head that rotate")
    stretch = given.get("factor", longest / original)
    scale = given.get("attention_factor")
    if scale is None:
        scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    frequencies = 1.0 / (factors * _periods(given["rope_theta"], width))
    return Rope(tuple(float(frequency) for frequency in frequencies), float(scale))


_VARIANTS: dict[str, tuple[Callable[..., tuple[np.ndarray, float]], set[str]]] = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": (
        _yarn,
        {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}


def none(rope: Rope) -> Rope:
    """A rotation of the same pairs by nothing."""
    return Rope((0.0,) * len(rope.frequencies))


def angles(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine, `[..., F]` float32, of positions `[...]` and `F` frequencies."""
    # float32 whatever the compute dtype: bfloat16 cannot tell position 257 from 258.
    theta = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)
    return jnp.cos(theta) * rope.scale, jnp.sin(theta) * rope.scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the first `2 F` of `x [..., heads, head_dim]` by `F` angles; pair `i` is `(x[i], x[i + F])`."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    first, second, rest = jnp.split(x, [cos.shape[-1], 2 * cos.shape[-1]], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
