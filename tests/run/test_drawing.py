"""The settings of scripts for sampling."""

import pytest

from grpo_jax import sampling
from grpo_jax.run import ranges
from grpo_jax.run.drawing import SamplingSettings


def test_settings_make_the_sampler_that_a_script_would_write():
    settings = SamplingSettings(group_size=3, max_tokens=5, temperature=0.8, top_p=0.9)
    written = {"group_size": 3, "max_tokens": 5, "temperature": 0.8, "top_p": 0.9, "eos_ids": (1, 2)}
    assert settings.make_sampler(None, [1, 2]) == sampling.sampler(**written)
    slots = SamplingSettings(group_size=3, max_tokens=5, temperature=0.8, top_p=0.9, slots=4)
    assert slots.make_sampler(None, [1, 2]) == sampling.continuous(slots=4, **written)


def test_slots_are_at_least_one():
    with pytest.raises(ValueError, match="--slots is at least 1, got 0"):
        ranges.check(SamplingSettings(slots=0))
