"""What a verifier that is not trained on says beside the reward that is, and the warning when they part."""

import numpy as np
import pytest

from grpo_jax import statistics
from grpo_jax.rewards import held_out_metrics
from grpo_jax.run import monitoring


def test_means_deviations_and_correlations_are_those_of_the_completions_that_both_scored():
    rng = np.random.default_rng(0)
    values, trained = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 2))
    there, given = rng.random((3, 4, 2)) < 0.7, rng.random((3, 4, 2)) < 0.7
    values[..., 1] = 2.0  # the same for all: no correlation
    metrics = held_out_metrics(["strict", "flat"], (values, there), (trained, given), weights=(1.0, 0.5))
    both = there[..., 0] & given.any(-1)
    total = np.where(given[..., 0], trained[..., 0], 0) + 0.5 * np.where(given[..., 1], trained[..., 1], 0)
    summary = statistics.summary(metrics)
    assert summary["held_out/strict"] == pytest.approx(values[..., 0][both].mean())
    assert summary["held_out/strict_std"] == pytest.approx(np.std(values[..., 0][both]))
    assert summary["held_out/strict_agreement"] == pytest.approx(np.corrcoef(values[..., 0][both], total[both])[0, 1])
    assert summary["held_out/flat"] == 2.0
    assert "held_out/flat_agreement" not in metrics
    assert held_out_metrics(["none"], (values[..., :1], np.zeros((3, 4, 1), bool)), (trained, given)) == {}


def history(held, reward, every=4):
    lines = []
    for step, now in enumerate(reward):
        line = {"step": step, "reward": now, "reward_std": 0.1}
        if step % every == 0:
            line |= {"held_out/strict": held[step], "held_out/strict_std": 0.1, "held_out/strict_agreement": -0.25}
        lines.append(line)
    return lines


def test_a_reward_that_rises_while_the_verifier_falls_is_told_once():
    steps = np.arange(48)
    rising, falling = 0.2 + 0.5 * (steps > 23), 0.6 - 0.3 * (steps > 23)
    warning = monitoring.held_out_disagrees(history(falling, rising))
    assert "the reward rose from 0.3 to 0.7, while held_out/strict, which is not trained on, fell from" in warning
    assert "their correlation is -0.25" in warning
    assert monitoring.held_out_disagrees(history(rising, rising)) is None
    assert monitoring.held_out_disagrees(history(falling, falling)) is None
    assert monitoring.held_out_disagrees(history(falling, rising)[:30]) is None  # too few that were asked
    assert monitoring.held_out_disagrees in monitoring.DEFAULT
