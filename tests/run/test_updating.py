"""The settings of updates."""

import pytest

from grpo_jax.run.updating import UpdateSettings


def test_a_warm_up_that_outlasts_the_run_is_told(capsys):
    settings = UpdateSettings(warmup_steps=9, iterations=2)
    updates = settings.updates(prompts=4)
    rate = settings.make_rate(1.0, steps=10, updates=updates)
    assert (float(rate(0)), float(rate(19))) == pytest.approx((0.1, 1.0))
    assert capsys.readouterr().out == ""
    settings.make_rate(1.0, steps=5, updates=updates)
    told = "warning: the warm-up of 9 steps outlasts the run of 5: its learning rate is at most 0.5, not 1"
    assert told in capsys.readouterr().out
