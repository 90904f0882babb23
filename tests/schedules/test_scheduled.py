"""Settings that change during a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.policies import from_logits_fn
from grpo_jax.schedules import Scheduled, at, cosine_with_hold
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_collect, make_train_step, step_keys
from grpo_jax.updates import Updates, init_state

V, STEPS = 9, 10
SIZES = {"group_size": 4, "max_tokens": 5, "eos_ids": (1,)}


def bigram(params, tokens, mask):
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def two_rewards(rollout):
    even = jnp.mean(rollout.tokens % 2 == 0, axis=-1)
    short = -rollout.lengths.astype(jnp.float32)
    return jnp.stack([even, short], axis=-1), jnp.ones((*even.shape, 2), bool)


def state_of(step=0, extra=()):
    state = init_state(POLICY.init(jax.random.key(0)), optax.sgd(0.1), jax.random.key(0), reference=True, extra=extra)
    return state._replace(ref_params=POLICY.init(jax.random.key(9)), step=jnp.int32(step))


SAMPLER = sampling.sampler(**SIZES)


def compiled(make):
    """The step of the settings that `make` gives for a number, one program for all steps and all numbers."""

    def after_a_step(state, number):
        step = make_train_step(POLICY, optax.sgd(0.1), reward=two_rewards, **{"sampler": SAMPLER} | make(number))
        state, metrics = step(state, random_prompts(0, 4, 3, V))
        return state.params["table"], summary(metrics)

    return jax.jit(after_a_step)


def test_the_cosine_holds_at_the_start_falls_and_stays_at_the_end():
    schedule = cosine_with_hold(0.1, 0.04, 1000)
    steps = np.arange(1001)
    values = np.asarray(jax.vmap(schedule)(steps))
    np.testing.assert_allclose(values[:101], 0.1, rtol=1e-6)
    np.testing.assert_allclose(values[450], 0.07, rtol=1e-6)  # half way between 100 and 800
    np.testing.assert_allclose(values[800:], 0.04, rtol=1e-6)
    assert np.all(np.diff(values) <= 1e-8)  # it falls, and never jumps: the tutorial's code rises
    assert np.abs(np.diff(values)).max() < 0.06 * np.pi / 2 / 700 * 1.01
    between = optax.cosine_decay_schedule(0.06, 700)
    np.testing.assert_allclose(values[100:801], 0.04 + jax.vmap(between)(np.arange(701)), atol=1e-7)


@pytest.mark.parametrize(("hold", "tail"), [(0.25, 0.5), (0.5, 0.25), (0.0, 0.0)])
def test_hold_and_tail_say_where_the_cosine_begins_and_ends(hold, tail):
    values = np.asarray(jax.vmap(cosine_with_hold(3.0, 1.0, 100, hold=hold, tail=tail))(np.arange(101)))
    first, last = round(100 * hold), round(100 * (1 - tail))
    np.testing.assert_allclose(values[: first + 1], 3.0, rtol=1e-6)
    np.testing.assert_allclose(values[last:], 1.0, rtol=1e-6)
    between = 2.0 + np.cos(np.pi * np.linspace(0, 1, last - first + 1))
    np.testing.assert_allclose(values[first : last + 1], between, atol=1e-6)


@pytest.mark.parametrize(("hold", "tail"), [(-0.1, 0.2), (0.1, -0.2), (0.5, 0.5), (0.9, 0.2)])
def test_refuses_shares_that_leave_no_step(hold, tail):
    with pytest.raises(ValueError, match=f"got {hold} and {tail}$"):
        cosine_with_hold(0.1, 0.04, 100, hold=hold, tail=tail)


def test_what_is_not_scheduled_is_the_same_at_every_step():
    part = losses.grpo()
    assert at(part, state_of(3)) is part
    assert at(Scheduled(lambda step, extra: step + extra), state_of(3, extra=4)) == 7


SCHEDULES = {
    "constant": lambda step: 0.3,
    "linear": optax.linear_schedule(0.1, 0.04, STEPS),
    "cosine": cosine_with_hold(0.1, 0.04, STEPS),
}


@functools.cache
def with_beta():
    return compiled(lambda beta: {"loss": losses.grpo(penalty=losses.k3(beta))})


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduled_beta_is_the_loss_with_the_beta_of_that_step(name):
    schedule = SCHEDULES[name]
    loss = Scheduled(lambda step, extra: losses.grpo(penalty=losses.k3(schedule(step))))
    scheduled = compiled(lambda _: {"loss": loss})
    for step in (0, 5, 9):
        table, metrics = scheduled(state_of(step), 0.0)
        plain, expected = with_beta()(state_of(step), float(schedule(step)))
        np.testing.assert_allclose(table, plain, atol=1e-7)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_scheduled_clip_acts_on_every_update_of_a_step():
    clip = Scheduled(lambda step, extra: losses.grpo(epsilon=jnp.where(step < 5, 1e-3, 10.0)))
    updates = Updates(iterations=3, minibatches=2)
    scheduled = compiled(lambda _: {"loss": clip, "updates": updates})
    plain = compiled(lambda epsilon: {"loss": losses.grpo(epsilon=epsilon), "updates": updates})
    tight, _ = scheduled(state_of(4), 0.0)
    loose, _ = scheduled(state_of(5), 0.0)
    np.testing.assert_allclose(tight, plain(state_of(4), 1e-3)[0], rtol=1e-6)
    np.testing.assert_allclose(loose, plain(state_of(5), 10.0)[0], rtol=1e-6)
    assert np.abs(tight - plain(state_of(4), 10.0)[0]).max() > 1e-3


def test_scheduled_reward_weights_are_those_of_the_step():
    def advantage(step, extra):
        return from_rewards(weights=(1.0, jnp.where(step < 5, 1.0, 0.0)))

    scheduled = compiled(lambda _: {"loss": losses.grpo(), "advantage": Scheduled(advantage)})
    plain = compiled(lambda weight: {"loss": losses.grpo(), "advantage": from_rewards(weights=(1.0, weight))})
    for step, weight in ((4, 1.0), (5, 0.0)):
        table, _ = scheduled(state_of(step), 0.0)
        np.testing.assert_allclose(table, plain(state_of(step), weight)[0], atol=1e-7)
        assert np.abs(table - plain(state_of(step), 1.0 - weight)[0]).max() > 1e-3


def test_a_scheduled_temperature_is_that_of_sampling_and_of_the_scores():
    scheduled = Scheduled(lambda step, extra: sampling.sampler(**SIZES, temperature=jnp.where(step < 5, 1.0, 0.5)))
    collect = jax.jit(make_collect(POLICY, scheduled, score_old=True))
    moved = compiled(lambda _: {"loss": losses.grpo(), "sampler": scheduled})
    plain = compiled(lambda t: {"loss": losses.grpo(), "sampler": sampling.sampler(**SIZES, temperature=t)})
    for step, expected in ((4, 1.0), (5, 0.5)):
        state, prompts = state_of(step), random_prompts(0, 4, 3, V)
        sampler = sampling.sampler(temperature=expected, **SIZES)
        experience = collect(state, prompts)
        rollout = sampler(POLICY, state.params, prompts, step_keys(state)[0])
        np.testing.assert_array_equal(experience.rollout.tokens, rollout.tokens)
        np.testing.assert_allclose(experience.old_log_probs, rollout.log_probs, atol=1e-5)
        table, metrics = moved(state, 0.0)
        np.testing.assert_allclose(table, plain(state, expected)[0], atol=1e-7)
        np.testing.assert_allclose(metrics["ratio_max"], 1.0)


def test_a_schedule_may_look_at_extra():
    loss = Scheduled(lambda step, extra: losses.grpo(penalty=losses.k3(extra["beta"])))
    table, _ = compiled(lambda _: {"loss": loss})(state_of(extra={"beta": jnp.asarray(0.7)}), 0.0)
    np.testing.assert_allclose(table, with_beta()(state_of(), 0.7)[0], atol=1e-7)
