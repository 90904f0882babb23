"""The rewards of scripts: what is held out fails as gently as what is learned from, and is named apart."""

import dataclasses
import sys

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.data import make_prompts
from grpo_jax.run.rewarding import RewardSettings
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Rollout

MODULE = """
def right(prompts, completions, **columns):
    return [1.0] * len(completions)

def strict(prompts, completions, **columns):
    raise TimeoutError("no answer")
"""
ROWS = [{"prompt": "p"}]


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "rewarded.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "rewarded", raising=False)


def test_a_held_out_verifier_that_fails_costs_a_batch_and_is_counted():
    config = RewardSettings(reward=("rewarded:right",), held_out=("rewarded:strict",), held_out_every=2)
    reward = config.make_reward(ROWS, tiny_tokenizer(), eos_ids=(1,))
    tokens = np.full((1, 2, 3), 5, np.int32)
    lengths, held = np.full((1, 2), 3, np.int32), np.ones((1, 2, 3), bool)
    rollout = Rollout(make_prompts([[5, 6]], [0]), tokens, lengths, held, held * -1.0, held[..., 0])
    with pytest.warns(RuntimeWarning, match="strict failed on a batch of 2 completions"):
        given, mask, metrics = reward(rollout, rewards.TrainerState(0, 4))
    assert given.tolist() == [[[1.0], [1.0]]]
    assert mask.all()
    assert metrics == {"right/failed": 0.0, "held_out/strict/failed": 1.0}
    assert "held_out/strict/failed" not in reward(rollout, rewards.TrainerState(1, 4))[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_every": 0}, "--held-out-every is at least 1, got 0"),
        ({"held_out": ("rewarded:right",)}, "have one name each, got right, right"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_model_is_loaded(changes, message):
    config = dataclasses.replace(RewardSettings(reward=("rewarded:right",)), **changes)
    with pytest.raises(ValueError, match=message):
        config.make_reward(ROWS, tiny_tokenizer(), eos_ids=(1,))
