"""Sampling in slots draws what sampling a group at a time draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import sampling, testing
from grpo_jax.policies import from_logits_fn
from grpo_jax.sampling.batch import live_columns
from grpo_jax.sampling.slots import halvings
from grpo_jax.scoring import score
from grpo_jax.train_step import make_collect
from grpo_jax.updates import init_state

B, G, T, EOS = 3, 4, 10, (3, 7)
SETTINGS = {"group_size": G, "max_tokens": T, "eos_ids": EOS}


@functools.cache
def model(kind):
    if kind == "a function of logits":

        def logits(params, tokens, mask):
            """Of the token and the place alone."""
            places = jnp.cumsum(mask, axis=1)[..., None] * params["place"]
            return params["table"][tokens] + places

        keys = jax.random.split(jax.random.key(5))
        params = {"table": jax.random.normal(keys[0], (9, 9)), "place": jax.random.normal(keys[1], (9,)) / 5}
        return from_logits_fn(logits), params
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0} if kind == "qwen2_window" else {}
    policy = testing.tiny_policy("qwen2", vocab_size=9, **fields)
    return policy, jax.jit(policy.init)(jax.random.key(0))


prompts = testing.random_prompts(0, B, 6, vocab_size=9)


@pytest.mark.parametrize(
    ("slots", "kind"),
    [
        (1, "qwen2"),
        (5, "qwen2"),
        pytest.param(100, "qwen2", marks=pytest.mark.slow),
        pytest.param(5, "qwen2_window", marks=pytest.mark.slow),
        (5, "a function of logits"),
    ],
)
def test_slots_change_nothing_of_what_is_drawn(kind, slots):
    policy, params = model(kind)
    expected = sampling.sampler(temperature=1.5, **SETTINGS)(policy, params, prompts, jax.random.key(1))
    actual = sampling.continuous(temperature=1.5, slots=slots, **SETTINGS)(policy, params, prompts, jax.random.key(1))
    assert len(set(np.ravel(expected.lengths).tolist())) > 3  # else there is nothing to refill
    assert expected.truncated.any() or kind == "a function of logits"
    for name in ("tokens", "lengths", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, rtol=0, atol=5e-6)


def test_log_probs_are_those_that_the_scorer_gives():
    policy, params = model("qwen2")
    rollout = sampling.continuous(slots=3, **SETTINGS)(policy, params, prompts, jax.random.key(2))
    scores = score(policy, params, rollout)
    np.testing.assert_allclose(rollout.log_probs, scores.log_probs, rtol=0, atol=5e-6)


def test_it_takes_the_settings_of_sample():
    policy, params = model("a function of logits")
    for setting in ({"greedy": True}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        sampler = dataclasses.replace(sampling.sampler(**SETTINGS), **setting)
        expected = sampler(policy, params, prompts, jax.random.key(1))
        actual = dataclasses.replace(sampler, slots=2)(policy, params, prompts, jax.random.key(1))
        np.testing.assert_array_equal(actual.tokens, expected.tokens, err_msg=str(setting))
    with pytest.raises(ValueError, match="slots is at least 1, got 0"):
        sampling.continuous(slots=0, **SETTINGS)(policy, params, prompts, jax.random.key(1))
    with pytest.raises(ValueError, match="temperature is above 0"):
        sampling.continuous(slots=2, temperature=0.0, **SETTINGS)(policy, params, prompts, jax.random.key(1))


def test_a_slot_takes_another_completion_when_one_ends():
    """As many steps as the work needs in so few slots, and not as many as slots times the longest."""
    policy, params = model("a function of logits")
    calls = []

    def extend(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return policy.extend(*args, **kwargs)

    rollout = sampling.continuous(slots=2, temperature=1.5, **SETTINGS)(
        policy._replace(extend=extend), params, prompts, jax.random.key(1)
    )
    jax.effects_barrier()
    work = int(rollout.lengths.sum())
    assert work / 2 <= len(calls) <= work / 2 + T  # at the end one slot may be alone with a long one
    assert len(calls) < B * G / 2 * T


def test_the_slots_are_halved_as_work_runs_out():
    """Each step is of the narrowest of these widths that what is still at work fits into."""
    assert halvings(64) == [64, 32, 16, 8]
    assert halvings(5) == [5, 2, 1]
    policy, params = model("a function of logits")
    widths = []

    def extend(params, tokens, *args, **kwargs):
        jax.debug.callback(lambda: widths.append(len(tokens)), ordered=True)
        return policy.extend(params, tokens, *args, **kwargs)

    rollout = sampling.continuous(slots=B * G, temperature=1.5, **SETTINGS)(
        policy._replace(extend=extend), params, prompts, jax.random.key(1)
    )
    jax.effects_barrier()
    at_work = [int(np.sum(rollout.lengths > t)) for t in range(int(rollout.lengths.max()))]
    assert widths == [min(width for width in halvings(B * G) if width >= busy) for busy in at_work]
    assert len(set(widths)) > 2


def test_a_step_takes_it_as_its_sampler():
    policy, params = model("a function of logits")

    optimizer = optax.sgd(1.0)
    state = init_state(params, optimizer, jax.random.key(3))
    expected, actual = (
        make_collect(policy, sampler)(state, prompts).rollout
        for sampler in (sampling.sampler(**SETTINGS), sampling.continuous(slots=3, **SETTINGS))
    )
    np.testing.assert_array_equal(actual.tokens, expected.tokens)


def test_the_cache_is_looked_at_as_far_as_it_is_filled():
    assert live_columns(100) == [100]
    assert live_columns(128) == [128]
    assert live_columns(300) == [128, 256, 300]
    policy, params = model("qwen2")
    seen = []

    def extend(*args, columns=None, **kwargs):
        seen.append(columns)
        return policy.extend(*args, columns=columns, **kwargs)

    T = 140
    rollout = sampling.sampler(group_size=2, max_tokens=T, eos_ids=())(
        policy._replace(extend=extend), params, prompts, jax.random.key(4)
    )
    assert set(seen) == {128, 140}
    np.testing.assert_allclose(rollout.log_probs, score(policy, params, rollout).log_probs, rtol=0, atol=5e-6)
