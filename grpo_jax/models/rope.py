"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their long-context variants."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Array


class Rope(NamedTuple):
    """Position `p` turns the pair `i` by the angle `p * frequencies[i]`; `scale` multiplies cosine and sine."""

    frequencies: tuple[float, ...]  # head_dim / 2, radians a token
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
    parameters = dict(parameters)
    kind = parameters.pop("rope_type", "default")
    parameters.pop("type", None)  # the old spelling of rope_type, kept by transformers
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters.partial_rotary_factor other than 1 is not supported")
    if kind not in _VARIANTS:
        raise ValueError(f"rope_parameters.rope_type = {kind!r} is not supported; known are {sorted(_VARIANTS)}")
    variant, known = _VARIANTS[kind]
    for name, value in parameters.items():
        if name != "rope_theta" and name not in known and value is not None:
            raise ValueError(f"rope_parameters.{name} = {value!r} is not supported with rope_type {kind!r}")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float32(parameters.pop("rope_theta", 10000.0)), exponents, dtype=np.float32)
    if kind == "yarn" and parameters.get("factor") is None:
        parameters["factor"] = max_position_embeddings / parameters["original_max_position_embeddings"]
    frequencies, scale = variant(periods, **{k: v for k, v in parameters.items() if v is not None})
    return Rope(tuple(float(f) for f in frequencies), float(scale))


def _default(periods: np.ndarray) -> tuple[np.ndarray, float]:
    return 1.0 / periods, 1.0


def _linear(periods: np.ndarray, *, factor: float) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions divided by `factor`."""
    return 1.0 / periods / np.float32(factor), 1.0


def _llama3(
    periods: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[np.ndarray, float]:
    """Llama 3.1: waves longer than the old context are stretched, short ones kept, between them a blend."""
    frequencies = 1.0 / periods
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)  # in the old context
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (keep * frequencies + (1 - keep) * frequencies / factor).astype(np.float32), 1.0


def _yarn(
    periods: np.ndarray,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 22 for the scale)."""
    pairs = len(periods)
    log_theta = math.log(periods[-1]) * pairs / (pairs - 1) if pairs > 1 else math.inf

    def pair_that_turns(times: float) -> float:  # `times` in the old context
        return pairs * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / log_theta

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = (np.arange(pairs, dtype=np.float32) - first) / (last - first if last != first else 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    frequencies = (keep / periods + (1 - keep) / (factor * periods)).astype(np.float32)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = temperature(mscale) / temperature(mscale_all_dim) if both else temperature(1.0)
    return frequencies, attention_factor


_VARIANTS = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    "yarn": (
        _yarn,
        (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def angles(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine, `[..., head_dim / 2]` float32, of positions `[...]`."""
    # float32 whatever the compute dtype: bfloat16 cannot tell position 257 from 258.
    theta = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)
    return jnp.cos(theta) * rope.scale, jnp.sin(theta) * rope.scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns `x [..., heads, head_dim]`, whose pair `i` is `(x[i], x[i + head_dim / 2])`."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
