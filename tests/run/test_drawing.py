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


def test_scoring_without_a_truncation_that_there_is_not_is_told(capsys):
    SamplingSettings(replay_truncation=False, top_p=0.9).make_sampler(None, [1])
    assert capsys.readouterr().out == ""
    SamplingSettings(replay_truncation=False).make_sampler(None, [1])
    assert "--no-replay-truncation has no effect without --top-k, --top-p or --min-p" in capsys.readouterr().out


def test_slots_are_at_least_one():
    with pytest.raises(ValueError, match="--slots is at least 1, got 0"):
        ranges.check(SamplingSettings(slots=0))
