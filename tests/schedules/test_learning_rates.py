"""Learning rates by steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import recipes
from grpo_jax.schedules.learning_rates import constant, cosine, learning_rate, linear, rate_of_step
from grpo_jax.statistics import Mean
from grpo_jax.updates import Updates, init_state, make_updates

PEAK, STEPS = 3e-4, 20


def by_formula(decay, *, warmup_steps, final_fraction):
    """The rate of each step, written out in NumPy."""
    rates = []
    for n in range(STEPS + 3):
        progress = min(1.0, (n - warmup_steps) / (STEPS - warmup_steps))
        shape = {None: 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + np.cos(np.pi * progress))}[decay]
        after = final_fraction + (1 - final_fraction) * shape
        rates.append(PEAK * ((n + 1) / (warmup_steps + 1) if n < warmup_steps else after))
    return np.array(rates)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
@pytest.mark.parametrize("updates_per_step", [1, 4])
@pytest.mark.parametrize(
    ("decay", "name", "final_fraction"),
    [(constant, None, 0.0), (linear, "linear", 0.0), (linear, "linear", 0.25), (cosine, "cosine", 0.0)],
)
def test_is_the_formula_and_every_update_of_a_step_has_the_same_rate(
    transform, warmup_steps, updates_per_step, decay, name, final_fraction
):
    schedule = learning_rate(
        PEAK,
        STEPS,
        warmup_steps=warmup_steps,
        decay=decay,
        final_fraction=final_fraction,
        updates_per_step=updates_per_step,
    )
    updates = jnp.arange((STEPS + 3) * updates_per_step)
    expected = by_formula(name, warmup_steps=warmup_steps, final_fraction=final_fraction)
    rates = jax.vmap(transform(schedule))(updates)
    np.testing.assert_allclose(rates, np.repeat(expected, updates_per_step), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("decay", [constant, linear, cosine])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_no_step_of_the_run_has_rate_0(decay, warmup_steps):
    rates = jax.vmap(learning_rate(PEAK, STEPS, warmup_steps=warmup_steps, decay=decay))(jnp.arange(STEPS))
    assert (rates > 0).all()
    assert rates[warmup_steps] == np.float32(PEAK)
    assert (rates[:warmup_steps] < PEAK).all()


def test_a_decay_of_ones_own():
    schedule = learning_rate(1.0, 10, decay=lambda progress: (1 - progress) ** 2)
    np.testing.assert_allclose(schedule(5), 0.25)


def test_the_peak_may_be_traced():
    rates = jax.vmap(lambda peak: learning_rate(peak, warmup_steps=1)(0))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(rates, [0.5, 1.0])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0.0,), {}, "learning rate is above 0, got 0.0"),
        ((1.0,), {"warmup_steps": -1}, "warmup_steps is at least 0"),
        ((1.0,), {"updates_per_step": 0}, "updates_per_step at least 1"),
        ((1.0,), {"decay": linear}, "needs more steps than those, got None"),
        ((1.0, 5), {"decay": linear, "warmup_steps": 5}, "needs more steps than those, got 5"),
        ((1.0, 5), {"decay": linear, "final_fraction": 1.5}, "final_fraction is from 0 to 1"),
        ((1.0, 5), {"final_fraction": 0.1}, "no effect without a decay"),
    ],
)
def test_refuses_settings_out_of_range(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(*arguments, **settings)


def moved_by(optimizer, updates):
    """The change of one parameter over updates of gradient 1."""
    params = jnp.zeros(())
    state, changes = optimizer.init(params), []
    for _ in range(updates):
        change, state = optimizer.update(jnp.ones(()), state, params)
        changes.append(float(change))
    return np.array(changes)


@pytest.mark.parametrize("warmup", [0, None, 1])
def test_the_first_update_of_a_recipe_moves_whatever_its_warm_up(warmup):
    recipe = dataclasses.replace(recipes.dapo(), warmup_rollouts=warmup, weight_decay=0.0)
    share = 1 / (1 + (warmup or 0))
    first = moved_by(recipe.optimizer, recipe.updates.count + 1)
    np.testing.assert_allclose(first[0], -recipe.learning_rate * share, rtol=1e-3)
    np.testing.assert_allclose(first[-1], -recipe.learning_rate, rtol=1e-3)


def test_serves_any_optimiser():
    changes = moved_by(optax.sgd(learning_rate(1.0, warmup_steps=1, updates_per_step=2)), 4)
    np.testing.assert_allclose(changes, [-0.5, -0.5, -1.0, -1.0])


@pytest.mark.parametrize("make", [optax.sgd, lambda rate: optax.chain(optax.scale(1.0), optax.sgd(rate))])
def test_the_rate_of_a_step_is_what_its_first_update_had_or_would_have_had(make):
    """Told by how far the parameter moves: updates that are left out are none of the optimiser's."""
    rate = learning_rate(1.0, 10, warmup_steps=2, decay=linear, updates_per_step=2)

    def evaluate(params, state, batch):  # a gradient of 1
        return (Mean(jnp.sum(params * batch["x"]), jnp.sum(batch["count"])),), {}

    optimizer = make(rate)
    learn = jax.jit(make_updates(evaluate, optimizer, Updates(minibatches=2)))
    state = init_state(jnp.zeros(()), optimizer, jax.random.key(0))
    nan = float("nan")
    batches = {
        "whole": ([1.0, 1.0], [1, 1], 2),
        "not finite": ([nan, nan], [1, 1], 0),
        "half": ([nan, 1.0], [1, 1], 1),
        "nothing counts": ([0.0, 0.0], [0, 0], 0),
    }
    made = 0
    for name in ["not finite", "whole", "nothing counts", "whole", "half", "not finite", "whole", "nothing counts"]:
        x, count, applied = batches[name]
        before = float(state.params)
        state, metrics = learn(state, {"x": jnp.array(x), "count": jnp.array(count)})
        np.testing.assert_allclose(before - state.params, sum(rate(made + i) for i in range(applied)), atol=1e-6)
        np.testing.assert_allclose(rate_of_step(rate, state, metrics)["learning_rate"], rate(made))
        made += applied
    assert made == 7


def test_an_optimiser_that_goes_by_no_schedule_has_no_rate_of_a_step():
    state = init_state(jnp.zeros(()), optax.adamw(1e-3), jax.random.key(0))
    with pytest.raises(ValueError, match="made with a number, and not with a schedule"):
        rate_of_step(learning_rate(1e-3), state, {"grad_norm": Mean(jnp.zeros(()), jnp.zeros((), jnp.int32))})
