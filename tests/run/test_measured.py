"""The metrics that transforms add, against plain Python, and that the checks read them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.policies import from_logits_fn
from grpo_jax.run import measured, metrics, monitoring
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Experience, Rollout
from grpo_jax.updates import init_state


def rollout_of(completions, T=12):
    lengths = np.array([[len(ids) for ids in group] for group in completions])
    tokens = np.zeros((*lengths.shape, T), np.int32)
    for b, group in enumerate(completions):
        for g, ids in enumerate(group):
            tokens[b, g, : len(ids)] = ids
    mask = np.arange(T) < lengths[..., None]
    return Rollout(
        random_prompts(0, len(completions), 3), *map(jnp.asarray, (tokens, lengths, mask, mask * 0.0, lengths == T))
    )


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_repetition_is_the_share_of_n_grams_that_were_there_before(n, transform):
    rng = np.random.default_rng(0)
    completions = [[rng.integers(0, 3, rng.integers(0, 13)).tolist() for _ in range(5)] for _ in range(6)]
    completions[0][:4] = [], [0] * 12, list(range(12)), [0, 1] * 6
    shares = []
    for ids in (ids for group in completions for ids in group):
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    measure = transform(lambda rollout: measured.repetition(n)(Experience(rollout))[1])
    found = measure(rollout_of(completions))["repetition"]
    assert found.count == len(shares)
    assert found.sum == pytest.approx(sum(shares), rel=1e-5)


def test_repetition_is_the_policys_own():
    """Of a conversation in which the environment repeats itself between turns that do not."""
    rollout = rollout_of([[[1, 2, 3, *[9] * 5, 4, 5, 6]]])
    wrote = np.isin(rollout.tokens, [1, 2, 3, 4, 5, 6])
    found = summary(measured.repetition(2)(Experience(rollout._replace(mask=jnp.asarray(wrote))))[1])
    assert found["repetition"] == 0
    again = rollout._replace(tokens=jnp.where(rollout.tokens > 3, rollout.tokens - 3, rollout.tokens))
    found = summary(measured.repetition(2)(Experience(again._replace(mask=jnp.asarray(wrote))))[1])
    assert found["repetition"] == pytest.approx(1 / 2)


def test_repetition_looks_at_no_padding_and_at_no_completion_that_is_too_short():
    loop, varied = [7, 8] * 4, list(range(20, 28))
    once = summary(measured.repetition(2)(Experience(rollout_of([[loop, varied]])))[1])
    padded = summary(measured.repetition(2)(Experience(rollout_of([[loop, varied, [7], []]], T=40)))[1])
    assert once["repetition"] == padded["repetition"] == pytest.approx((1 - 2 / 7) / 2)
    short = summary(measured.repetition(4)(Experience(rollout_of([[[1, 2]]], T=3)))[1])
    assert short["repetition"] == 0
    with pytest.raises(ValueError, match="at least 1 token, got n = 0"):
        measured.repetition(0)


def test_unjudged_is_the_share_of_completions_without_a_reward():
    mask = jnp.asarray([[[True, False], [True, True]], [[True, False], [False, False]]])
    rollout = rollout_of([[[1], [2, 3]], [[4], []]])  # the last place holds no completion
    experience = Experience(rollout, rewards=mask * 1.0, reward_mask=mask)
    found = summary(jax.jit(lambda e: measured.unscored(["right", "format"])(e)[1])(experience))
    assert found == {"unscored/right": 0, "unscored/format": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match=r"1 names for a reward_mask \[B, G, R\] of shape \(2, 2, 2\)"):
        measured.unscored(["right"])(experience)


def table(params, tokens, mask):
    return params[tokens]


POLICY = from_logits_fn(table)


def test_the_hooks_measure_in_a_step_what_the_checks_read():
    """A policy that can only say 5, and rewards of which half are missing, as a loop meets them."""
    params = jnp.full((9, 9), -1e9).at[:, 5].set(0.0)
    state = init_state(params, optax.sgd(0.0), jax.random.key(0))
    names = ["right", "format"]
    step = make_train_step(
        POLICY, optax.sgd(0.0), sampling.sampler(group_size=2, max_tokens=10, eos_ids=[1]), loss=losses.grpo(),
        advantage=from_rewards(names=names), transforms=[measured.repetition(), measured.unscored(names)],
    ).jit()  # fmt: skip
    history = []
    for n in range(12):
        experience = step.collect(state, random_prompts(n, 4, 3, 9))
        mask = jnp.stack([jnp.ones((4, 2), bool), jnp.arange(8).reshape(4, 2) % 2 == 0], axis=-1)
        state, statistics = step.learn(state, experience._replace(rewards=jnp.zeros((4, 2, 2)), reward_mask=mask))
        history.append({"step": n, **metrics.plain(summary(statistics))})
    assert history[-1]["repetition"] == pytest.approx(6 / 7)
    assert (history[-1]["unscored/right"], history[-1]["unscored/format"]) == (0, 0.5)
    told = [text for end in range(1, 13) for text in monitoring.warnings(json.loads(json.dumps(history[:end])))]
    for words in (
        "have said before",
        "`unscored/format`",
        "cut at the token limit",
        "had the same reward",
        "entropy is 0 ",
    ):
        assert sum(words in text for text in told) == 1, words
    assert len(told) == 5, told


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_the_gap_of_sampler_and_scorer_is_measured_by_place_over_the_tokens_that_count(parts):
    rng = np.random.default_rng(0)
    rollout = rollout_of([[rng.integers(0, 3, n).tolist() for n in (12, 5, 1)] for _ in range(2)])
    sampled, scored = rng.normal(size=(2, 2, 3, 12))
    experience = Experience(rollout._replace(log_probs=jnp.asarray(sampled)), old_log_probs=jnp.asarray(scored))
    _, found = measured.sampler_gap(parts)(experience)
    numbers = summary(found)
    mask, gap = np.asarray(rollout.mask), sampled - scored
    np.testing.assert_allclose(numbers["sampler_kl"], gap[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(numbers["sampler_gap"], np.abs(gap)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(numbers["sampler_gap_max"], np.abs(gap)[mask].max(), rtol=1e-5)
    width = 12 // parts
    for i in range(parts):
        span = slice(i * width, (i + 1) * width)
        there = gap[..., span][mask[..., span]]
        np.testing.assert_allclose(numbers[f"sampler_kl/{i}"], there.mean(), rtol=1e-5)
        np.testing.assert_allclose(numbers[f"sampler_gap/{i}"], np.abs(there).mean(), rtol=1e-5)
    assert len(numbers) == 3 + 2 * parts
    with pytest.raises(ValueError, match="score_old=True"):
        measured.sampler_gap()(experience._replace(old_log_probs=None))
    with pytest.raises(ValueError, match="at least 1 part, got 0"):
        measured.sampler_gap(0)
