"""Dynamic sampling, against the list of groups that a plain loop would keep."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.dynamic_sampling import dynamic_sampling, host_dynamic_sampling, nonzero_variance, nonzero_variance_of
from grpo_jax.policies import from_logits_fn
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.updates import init_state

V, B = 9, 4
CASES = {1: 2, 3: 5, 4: 5}  # limit of the reward -> rounds: too few, more than enough, more than enough
SIZES = {"group_size": 3, "max_tokens": 4, "eos_ids": (1,)}


def bigram(params, tokens, mask):
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def starts_with(limit):
    """1 for a first token below the limit: the lower it is, the more groups have no spread."""

    def reward(rollout):
        right = (rollout.tokens[..., 0] < limit).astype(jnp.float32)
        return right[..., None], jnp.ones((*right.shape, 1), bool)

    return reward


def state_of(seed=0):
    return init_state(POLICY.init(jax.random.key(0)), optax.sgd(1.0), jax.random.key(seed))


def prompts_of(rounds):
    prompts = random_prompts(0, rounds * B, 3, V)
    return prompts._replace(info={"row": jnp.arange(rounds * B)})


@functools.cache
def programs(limit):
    """Of the rewards in the program, and of those on the host."""
    rounds = CASES[limit]
    traced = dynamic_sampling(make_collect(POLICY, sampling.sampler(**SIZES), reward=starts_with(limit)), rounds=rounds)
    host = host_dynamic_sampling(
        jax.jit(make_collect(POLICY, sampling.sampler(**SIZES))), starts_with(limit), rounds=rounds
    )
    return jax.jit(traced), host


def kept_rows(experience):
    rows = np.asarray(experience.rollout.prompts.info["row"])
    return rows[np.asarray(experience.rollout.lengths[:, 0]) > 0]


@pytest.mark.parametrize("limit", CASES)
@pytest.mark.parametrize("place", [0, 1], ids=["traced", "host"])
def test_keeps_the_first_groups_with_spread_in_their_order(limit, place):
    state, prompts = state_of(), prompts_of(CASES[limit])
    experience, metrics = programs(limit)[place](state, prompts)
    rewards, rows = np.asarray(experience.rewards[..., 0]), kept_rows(experience)
    places = len(rows)
    assert np.all(rewards[:places].max(1) > rewards[:places].min(1))
    assert np.all(np.diff(rows) > 0)
    sampled = int(metrics["groups_sampled"])
    assert sampled % B == 0
    assert rows.max() >= sampled - B  # it stopped as soon as it could
    assert places == B or sampled == CASES[limit] * B
    found = summary(metrics)
    np.testing.assert_allclose(found["groups_wasted"], 1 - places / sampled)
    np.testing.assert_allclose(found["groups_missing"], 1 - places / B)
    # No group was mixed with another: its rewards are those of its tokens, its prompt that of its row.
    np.testing.assert_array_equal(rewards[:places], (experience.rollout.tokens[:places, :, 0] < limit))
    np.testing.assert_array_equal(experience.rollout.prompts.tokens[:places], prompts.tokens[rows])


@pytest.mark.parametrize("limit", CASES)
def test_traced_and_host_rewards_give_the_same_batch(limit):
    traced, host = (program(state_of(), prompts_of(CASES[limit])) for program in programs(limit))
    chex.assert_trees_all_equal(traced, host)


def test_the_cases_run_into_the_limit_and_stop_before_it():
    found = {limit: programs(limit)[0](state_of(), prompts_of(rounds))[1] for limit, rounds in CASES.items()}
    assert 0 < summary(found[1])["groups_missing"] < 1
    assert B < found[3]["groups_sampled"] < CASES[3] * B


def test_where_every_group_has_spread_the_first_round_is_the_plain_batch():
    def different(rollout):
        shape = rollout.lengths.shape
        return jnp.broadcast_to(jnp.arange(3.0), shape)[..., None], jnp.ones((*shape, 1), bool)

    collect = make_collect(POLICY, sampling.sampler(**SIZES), reward=different, score_old=True)
    prompts = prompts_of(5)
    experience, metrics = jax.jit(dynamic_sampling(collect, rounds=5))(state_of(), prompts)
    plain = jax.jit(collect)(state_of(), jax.tree.map(lambda x: x[:B], prompts))
    chex.assert_trees_all_equal(experience, plain)
    assert summary(metrics)["groups_wasted"] == 0


def test_rounds_draw_other_noise():
    """The same prompts in every round, and no reward ever: every round is sampled, and each differs."""
    seen = []

    def reward(rollout):
        seen.append(np.asarray(rollout.tokens))
        return jnp.zeros((B, 3, 1)), jnp.ones((B, 3, 1), bool)

    prompts = random_prompts(0, B, 3, V)
    prompts = jax.tree.map(lambda x: jnp.concatenate([x] * 5), prompts)
    host_dynamic_sampling(jax.jit(make_collect(POLICY, sampling.sampler(**SIZES))), reward, rounds=5)(
        state_of(), prompts
    )
    assert len({tokens.tobytes() for tokens in seen}) == len(seen) == 5


@pytest.mark.slow
def test_places_left_over_count_nowhere():
    """A batch that could not be filled gives the gradient and metrics of its groups alone."""
    experience, _ = programs(1)[0](state_of(), prompts_of(2))
    places = len(kept_rows(experience))
    assert 0 < places < B
    alone = jax.tree.map(lambda x: x[:places], experience)
    for loss in (losses.grpo(), losses.dapo(), losses.dr_grpo(4), losses.reinforce()):
        learn = make_learn(POLICY, optax.sgd(1.0), loss=loss, advantage=from_rewards())
        (state, found), (expected, of_alone) = jax.jit(learn)(state_of(), experience), jax.jit(learn)(state_of(), alone)
        np.testing.assert_allclose(state.params["table"], expected.params["table"], atol=1e-6)
        for name in ("reward", "length", "truncated", "loss", "ratio_max"):
            np.testing.assert_allclose(summary(found)[name], summary(of_alone)[name], rtol=1e-5, err_msg=name)


def test_only_the_rewards_that_are_to_be_looked_at_decide():
    experience, _ = programs(4)[0](state_of(), prompts_of(5))
    rewards = jnp.concatenate([jnp.ones((B, 3, 1)), experience.rollout.log_probs[..., :1]], axis=-1)
    experience = experience._replace(rewards=rewards, reward_mask=jnp.ones(rewards.shape, bool))
    np.testing.assert_array_equal(nonzero_variance(experience), [True] * B)
    np.testing.assert_array_equal(nonzero_variance_of((1.0, 0.0))(experience), [False] * B)


def test_a_rule_of_ones_own_decides():
    collect = make_collect(POLICY, sampling.sampler(**SIZES), reward=starts_with(4))
    odd = dynamic_sampling(collect, rounds=5, keep=lambda experience: experience.rollout.prompts.info["row"] % 2 == 1)
    experience, metrics = odd(state_of(), prompts_of(5))
    np.testing.assert_array_equal(kept_rows(experience), [1, 3, 5, 7])
    assert metrics["groups_sampled"] == 2 * B


def test_vmapped_over_seeds_it_is_each_run_by_itself():
    states = jax.vmap(lambda key: state_of()._replace(key=key))(jax.random.split(jax.random.key(3), 3))
    program = dynamic_sampling(make_collect(POLICY, sampling.sampler(**SIZES), reward=starts_with(4)), rounds=5)
    together = jax.jit(jax.vmap(program, in_axes=(0, None)))(states, prompts_of(5))
    for n in range(3):
        alone = programs(4)[0](jax.tree.map(lambda x, n=n: x[n], states), prompts_of(5))
        chex.assert_trees_all_close(jax.tree.map(lambda x, n=n: x[n], together), alone, atol=1e-6)


def test_refuses_what_cannot_be():
    collect = make_collect(POLICY, sampling.sampler(**SIZES), reward=starts_with(4))
    with pytest.raises(ValueError, match=r"^rounds is at least 1, got 0$"):
        dynamic_sampling(collect, rounds=0)
    with pytest.raises(ValueError, match=r"^20 prompts do not divide into 3 rounds$"):
        dynamic_sampling(collect, rounds=3)(state_of(), prompts_of(5))
    with pytest.raises(ValueError, match="no rewards"):
        dynamic_sampling(make_collect(POLICY, sampling.sampler(**SIZES)), rounds=5)(state_of(), prompts_of(5))
