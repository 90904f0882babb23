"""A supervised stage of a run."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from grpo_jax import data, models
from grpo_jax.run import metrics
from grpo_jax.run.supervised import fine_tune

STEPS, PEAK = 6, 1e-2


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


def learned(run_dir, policy, *, config=Config(), completions=((4, 5, 1), (6, 1)), seen=None):
    def batch(n):
        if seen is not None:
            seen.append(n)
        return data.make_demonstrations([[2, 3], [3]], completions, multiple=4)

    return fine_tune(
        config, policy, jax.jit(policy.init)(jax.random.key(0)), batch, steps=STEPS, learning_rate=PEAK,
        key=jax.random.key(1), run_dir=run_dir, save_every=4, digests={"the completions": str(completions)},
    )  # fmt: skip


@pytest.mark.slow
def test_a_stage_learns_at_its_rate_and_is_found_again(tmp_path):
    policy, seen = models.small_llama(8, width=16, eos_id=1), []
    params = learned(tmp_path, policy, seen=seen)
    lines = metrics.read(tmp_path)
    assert seen == list(range(STEPS))
    assert lines[-1]["loss"] < lines[0]["loss"]
    warmup = STEPS // 2
    decayed = [0.05 + 0.95 * (1 + math.cos(math.pi * i / (STEPS - warmup))) / 2 for i in range(STEPS - warmup)]
    rates = [PEAK * x for x in [*((n + 1) / (warmup + 1) for n in range(warmup)), *decayed]]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)

    again = learned(tmp_path, policy, seen=seen)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert len(seen) == STEPS, "a finished stage is not made again"
    with pytest.raises(ValueError, match="not what the run began with: the completions"):
        learned(tmp_path, policy, completions=((4, 4, 1), (6, 1)))
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        learned(tmp_path, policy, config=Config(seed=1))
