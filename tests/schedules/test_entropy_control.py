"""The adaptive entropy bonus, against Skywork-OR1's rule in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.policies import from_logits_fn
from grpo_jax.run import checkpoint
from grpo_jax.schedules import Scheduled, entropy_control
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import init_state

V = 9


def bigram(params, tokens, mask):
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": 0.1 * jax.random.normal(key, (V, V))})


@pytest.mark.parametrize("low", [0.0, 0.003])
def test_the_coefficient_follows_the_rule_of_the_paper(low):
    entropies = [0.5, 0.3, 0.1, 0.15, 0.2, 0.19, 0.18, 0.1, 0.4]
    control, coefficient = entropy_control.init(0.005), 0.005
    seen = float("inf")
    for entropy in entropies:
        expected = coefficient if seen <= 0.2 else 0.0
        np.testing.assert_allclose(entropy_control.bonus(control, target=0.2), expected, atol=1e-8)
        control = entropy_control.follow(control, jnp.asarray(entropy), target=0.2, delta=0.005, low=low, high=0.012)
        coefficient += 0.005 if entropy < 0.2 else -0.005
        coefficient, seen = min(max(coefficient, low), 0.012), entropy
        np.testing.assert_allclose(control.coefficient, coefficient, atol=1e-8)
    assert coefficient == 0.012 - 0.005  # it has been at both bounds


def test_before_anything_was_seen_there_is_no_bonus():
    assert entropy_control.bonus(entropy_control.init(0.5)) == 0


def make_run(target):
    """Rewards one token, so that the entropy falls unless the bonus holds it."""

    def reward(rollout):
        share = jnp.sum((rollout.tokens == 2) & rollout.mask, axis=-1) / rollout.lengths
        return share[..., None], jnp.ones((*share.shape, 1), bool)

    def loss(step, control):
        return losses.plus(losses.dapo(), losses.entropy_bonus(entropy_control.bonus(control, target=target)))

    optimizer = optax.adam(0.1)
    step = make_train_step(
        POLICY,
        optimizer,
        sampling.sampler(group_size=8, max_tokens=6, eos_ids=(1,)),
        reward=reward,
        loss=Scheduled(loss),
    )

    @jax.jit
    def run_step(state):
        state, metrics = step(state, random_prompts(0, 8, 3, V))
        entropy = summary(metrics)["entropy"]
        extra = entropy_control.follow(state.extra, entropy, target=target, delta=0.05, high=5.0)
        return state._replace(extra=extra), entropy

    initial = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0), extra=entropy_control.init())
    return run_step, initial


@pytest.mark.slow
def test_the_bonus_holds_the_entropy_that_falls_without_it():
    entropies = {}
    for target in (0.0, 1.0):
        run_step, state = make_run(target)
        for _ in range(60):
            state, entropy = run_step(state)
        entropies[target] = float(entropy)
    assert entropies[0.0] < 0.5
    assert entropies[1.0] > entropies[0.0] + 0.3


def test_a_resumed_run_goes_on_with_its_coefficient(tmp_path):
    run_step, initial = make_run(2.5)  # above the largest entropy, so that the bonus acts from the second step on
    state = initial
    for _ in range(4):
        state, _ = run_step(state)
    assert state.extra.coefficient > 0
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
    with checkpoint.manager(tmp_path) as checkpoints:
        resumed, _ = checkpoint.restore(checkpoints, initial)
    for _ in range(2):
        state, resumed = run_step(state)[0], run_step(resumed)[0]
    np.testing.assert_array_equal(resumed.params["table"], state.params["table"])
    np.testing.assert_array_equal(resumed.extra, state.extra)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"delta": 0}, "^delta is above 0, got 0$"), ({"low": 2.0}, r"^low is at most high = 1.0, got 2.0$")],
    ids=["delta", "low"],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        entropy_control.follow(entropy_control.init(), jnp.asarray(0.1), **settings)
