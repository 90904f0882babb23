"""The rewards of scripts: what is held out fails as gently as what is learned from, and is named apart."""

import dataclasses
import sys

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.data import make_prompts
from grpo_jax.run.rewarding import RewardSettings
from grpo_jax.schedules import Scheduled
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Experience, Rollout

MODULE = """
import time

def slow(prompts, completions, **columns):
    time.sleep(0.3)
    return [1.0] * len(completions)

def right(prompts, completions, **columns):
    return [1.0] * len(completions)

def strict(prompts, completions, **columns):
    raise TimeoutError("no answer")

def counted(prompts, steps, trainer_state, **columns):
    scale = 1.0 if trainer_state is None else float(trainer_state.global_step)
    return [[scale * len(step) for step in cut] for cut in steps]

def halves(text):
    return [text[:1], text[1:]]
"""
ROWS = [{"prompt": "p"}]


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "rewarded.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "rewarded", raising=False)


def two_completions():
    tokens = np.full((1, 2, 3), 5, np.int32)
    lengths, held = np.full((1, 2), 3, np.int32), np.ones((1, 2, 3), bool)
    return Rollout(make_prompts([[5, 6]], [0]), tokens, lengths, held, held * -1.0, held[..., 0])


def test_a_reward_that_takes_longer_than_the_timeout_is_told():
    config = RewardSettings(reward=("rewarded:slow",), reward_timeout=0.1)
    reward = config.make_reward(ROWS, tiny_tokenizer(), eos_ids=(1,))
    with pytest.warns(RuntimeWarning, match="the reward slow has been at work"):
        given, mask, _ = reward(two_completions(), rewards.TrainerState(0, 4))
    assert given.tolist() == [[[1.0], [1.0]]]
    assert mask.all()


def test_a_held_out_verifier_that_fails_costs_a_batch_and_is_counted():
    config = RewardSettings(reward=("rewarded:right",), held_out=("rewarded:strict",), held_out_every=2)
    reward, rollout = config.make_reward(ROWS, tiny_tokenizer(), eos_ids=(1,)), two_completions()
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


@pytest.mark.parametrize("scheduled", [False, True])
def test_steps_are_graded_where_they_end_and_weigh_beside_the_whole_completion(scheduled):
    config = RewardSettings(
        reward=("rewarded:right",), step_reward="rewarded:counted", step_split="rewarded:halves", step_weight=0.5
    )
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("7+8", "7+89")]
    T = max(map(len, ids))
    tokens = np.array([[one + [0] * (T - len(one)) for one in ids]], np.int32)
    lengths = np.array([[len(one) for one in ids]], np.int32)
    held = np.arange(T) < lengths[..., None]
    rollout = Rollout(make_prompts([[5, 6]], [0]), tokens, lengths, held, held * -1.0, held[..., 0])
    graded = config.make_step_rewards(ROWS, tokenizer, eos_ids=(tokenizer.eos_token_id,))
    fields, later = graded(rollout), graded(rollout, rewards.TrainerState(3, 4))
    np.testing.assert_array_equal(later["step_rewards"], 3 * fields["step_rewards"])
    # One token a character: the first step is one, the second one the rest.
    assert fields["step_rewards"].tolist() == [[[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 3.0]]]

    def outcome(experience):
        return np.array([[10.0, 20.0]]), {"outcome": 1.0}

    advantage = config.with_steps(Scheduled(lambda step, extra: outcome) if scheduled else outcome)
    given, measured = (advantage.make(0, ()) if scheduled else advantage)(Experience(rollout, **fields))
    grades = np.array([1.0, 2.0, 1.0, 3.0])
    z = (grades - grades.mean()) / (grades.std() + 1e-4)  # DeepSeekMath, section 4.1.3
    to_go = [[z[0] + z[1], z[1], z[1], 0.0], [z[2] + z[3], z[3], z[3], z[3]]]
    expected = held * (0.5 * np.array(to_go) + np.array([[10.0], [20.0]]))
    np.testing.assert_allclose(given, expected, rtol=1e-5)
    assert set(measured) == {"step_reward", "steps", "outcome"}


def test_without_steps_nothing_is_added_and_their_settings_are_refused():
    config = RewardSettings(reward=("rewarded:right",))
    assert config.with_steps(len) is len
    assert config.make_step_rewards(ROWS, tiny_tokenizer(), eos_ids=(1,))(None) == {}
    for changes, message in (({"step_weight": 2.0}, "--step-weight 2.0"), ({"step_split": "lines"}, "--step-split l")):
        with pytest.raises(ValueError, match=f"{message}.* is of --step-reward"):
            dataclasses.replace(config, **changes).with_steps(len)
