"""The scale of the loss: what it follows, and what float16 does without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import statistics
from grpo_jax.schedules import Scheduled, loss_scale
from grpo_jax.statistics import Mean
from grpo_jax.updates import Updates, init_state, make_updates


def test_a_refused_update_halves_the_scale_and_many_that_are_not_double_it():
    held = loss_scale.init(2.0**10)
    expected, good, seen, skipped = 2.0**10, 0, 0, 0
    for step in range(12):  # by PyTorch's rule, in plain Python: two updates a step, growth after six
        skipped += {3: 1, 4: 2}.get(step, 0)
        good += 2
        if skipped > seen:
            expected, good = expected / 2, 0
        elif good >= 6:
            expected, good = expected * 2, 0
        seen = skipped
        held = loss_scale.follow(held, jnp.int32(skipped), updates=2, growth_updates=6)
        assert (held.scale, held.good, held.skipped) == (expected, good, skipped)
    assert expected == 2.0**11  # up, down, down, up, up


def evaluate(params, state, batch):
    """A mean of products in float16, whose gradient of one row is below what float16 holds."""
    products = (params["w"].astype(jnp.float16) * batch["x"].astype(jnp.float16)).astype(jnp.float32)
    return (Mean(1e-6 * jnp.sum(products), jnp.float32(len(batch["x"]))),), {}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_scale_keeps_a_gradient_that_float16_loses_and_one_that_overflows_is_refused(micro_batches):
    optimizer = optax.sgd(1.0)
    x = np.array([0.5, 1.5, -1.0, 4.0], np.float32)

    def learn(scale):
        scheduled = None if scale is None else Scheduled(lambda step, extra: extra.scale)
        updates = Updates(micro_batches=micro_batches, loss_scale=scheduled)
        extra = () if scale is None else loss_scale.init(scale)
        state = init_state({"w": jnp.zeros(())}, optimizer, jax.random.key(0), extra=extra)
        return make_updates(evaluate, optimizer, updates)(state, {"x": jnp.asarray(x)})

    exact = -1e-6 * np.mean(x)
    without, _ = learn(None)
    assert abs(without.params["w"] - exact) > 0.02 * abs(exact)
    state, metrics = learn(2.0**15)
    np.testing.assert_allclose(state.params["w"], exact, rtol=2e-3)
    summary = statistics.summary(metrics)
    assert summary["loss_scale"] == 2.0**15
    assert summary["grad_norm"] == pytest.approx(abs(exact), rel=2e-3)  # of the gradient, not of the scaled one
    assert summary["loss"] == 0.0
    state, metrics = learn(2.0**40)
    assert state.params["w"] == 0
    assert (state.skipped, loss_scale.follow(state.extra, state.skipped).scale) == (1, 2.0**39)


@pytest.mark.parametrize("scale", [2.0**15, 2.0**17])
def test_a_scale_beyond_float16_leaves_the_gradient_of_params_in_float16_what_it_is(scale):
    def of_mean(params, state, batch):
        return (Mean(1e-4 * jnp.sum(params["w"].astype(jnp.float32) * batch), jnp.float32(len(batch))),), {}

    state = init_state({"w": jnp.zeros((), jnp.float16)}, optax.sgd(1.0), jax.random.key(0))
    state, _ = make_updates(of_mean, optax.sgd(1.0), Updates(loss_scale=scale))(state, jnp.ones(4))
    assert state.skipped == 0
    np.testing.assert_allclose(state.params["w"], -1e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loss_scale.init(0.0), "scale is above 0, got 0.0"),
        (lambda: Updates(loss_scale=-1.0), "loss_scale is above 0, got -1.0"),
        (lambda: loss_scale.follow(loss_scale.init(), jnp.int32(0), growth_updates=0), "at least 1, got 1 and 0"),
    ],
)
def test_refuses_what_is_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
