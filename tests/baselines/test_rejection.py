"""Best of n against sorting in plain Python, and RAFT as a step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling, statistics
from grpo_jax.baselines.rejection_sampling import best_of_n, raft
from grpo_jax.policies import from_logits_fn
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Experience, Likeliest, Rollout, Turns
from grpo_jax.updates import Updates, init_state

V, EOS, B, G, T = 9, 1, 6, 4, 4


def bigram(params, tokens, mask):
    """Logits of the next token that depend on the last one alone."""
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def even_tokens(rollout):
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


def scored_experience(seed=0):
    """Unequal lengths, ties, and completions without a reward or with a NaN or an infinity for one."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    rollout = Rollout(
        random_prompts(seed, B, 3, V),
        jnp.asarray(np.where(mask, rng.integers(0, V, (B, G, T)), 0), jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(mask),
        jnp.asarray(rng.normal(size=(B, G, T)), jnp.float32),
        jnp.asarray(lengths == T),
    )
    rewards, given = rng.integers(-2, 3, (B, G, 2)).astype(np.float32), np.ones((B, G, 2), bool)
    given[0], given[1, :3], given[2, 1], rewards[3, 0], rewards[4, 3] = False, False, False, np.nan, -np.inf
    given[4, 1] = False
    return Experience(rollout, jnp.asarray(rewards), jnp.asarray(given), advantages=jnp.asarray(rewards[..., 0]))


def ranked(experience, weights):
    """The completions of each group that have a reward, best first, the earlier one first in a tie."""
    total = np.asarray(experience.rewards) @ np.array(weights)
    known = np.asarray(experience.reward_mask).all(-1) & ~np.isnan(total)
    return [sorted(np.flatnonzero(known[b]), key=lambda g: -total[b, g]) for b in range(B)], total


@pytest.mark.parametrize("keep", [1, 2, G])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_best_of_n_takes_the_highest_rewards_of_each_group_best_first(transform, keep):
    experience, weights = scored_experience(), (1.0, 0.5)
    best = transform(lambda e: best_of_n(e, keep=keep, weights=weights))(experience)
    order, _ = ranked(experience, weights)
    assert best.rollout.tokens.shape == (B, keep, T)
    chex.assert_trees_all_equal(best.rollout.prompts, experience.rollout.prompts)
    for b, place in np.ndindex(B, keep):
        if place >= len(order[b]):
            assert not best.rollout.mask[b, place].any()
            continue
        g = order[b][place]
        for name in ("tokens", "lengths", "mask", "log_probs", "truncated"):
            np.testing.assert_array_equal(
                getattr(best.rollout, name)[b, place], getattr(experience.rollout, name)[b, g]
            )
        for name in ("rewards", "reward_mask", "advantages"):
            np.testing.assert_array_equal(getattr(best, name)[b, place], getattr(experience, name)[b, g])


@pytest.mark.parametrize(("threshold", "keep"), [(None, 1), (0.5, 1), (0.0, G), (1.0, G)])
def test_raft_imitates_the_best_above_the_threshold_and_nothing_else(threshold, keep):
    """Its loss is the mean of the negative log-likelihood of their tokens."""
    experience, optimizer = scored_experience(), optax.sgd(1.0)
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0))
    learn = make_learn(POLICY, optimizer, loss=losses.sft(), transforms=(raft(threshold, keep=keep),))
    after, metrics = jax.jit(learn)(state, experience)
    order, total = ranked(experience, (1.0, 1.0))
    taken = [(b, g) for b in range(B) for g in order[b][:keep] if threshold is None or total[b, g] > threshold]
    log_probs = score(POLICY, state.params, experience.rollout).log_probs
    tokens = [float(log_probs[b, g, t]) for b, g in taken for t in range(int(experience.rollout.lengths[b, g]))]
    numbers = statistics.summary(metrics)
    np.testing.assert_allclose(numbers["loss"], -np.mean(tokens), rtol=1e-5)
    np.testing.assert_allclose(numbers["kept"], len(taken) / (B * keep), rtol=1e-6)
    assert 0 < len(taken) < B * keep
    assert after.skipped == 0


def test_a_threshold_may_be_traced():
    experience = scored_experience()
    kept = jax.jit(jax.vmap(lambda threshold: statistics.summary(raft(threshold)(experience)[1])["kept"]))
    by_hand = [statistics.summary(raft(threshold)(experience)[1])["kept"] for threshold in (-1.0, 1.0)]
    np.testing.assert_allclose(kept(jnp.array([-1.0, 1.0])), by_hand, rtol=1e-6)
    assert by_hand[0] > by_hand[1]


def test_what_was_not_taken_has_no_gradient_whatever_it_holds():
    experience, optimizer = scored_experience(), optax.sgd(1.0)
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0))
    learn = jax.jit(make_learn(POLICY, optimizer, loss=losses.sft(), transforms=(raft(0.5),)))
    order, total = ranked(experience, (1.0, 1.0))
    taken = np.zeros((B, G, 1), bool)
    for b in range(B):
        for g in order[b][:1]:
            taken[b, g] = total[b, g] > 0.5
    tokens = jnp.where(taken & np.asarray(experience.rollout.mask), experience.rollout.tokens, 3)
    spoilt = experience._replace(rollout=experience.rollout._replace(tokens=tokens))
    after, spoilt_after = learn(state, experience)[0], learn(state, spoilt)[0]
    assert np.any(after.params["table"] != state.params["table"])
    chex.assert_trees_all_close(spoilt_after.params, after.params, atol=1e-6)


def test_a_threshold_that_nothing_reaches_leaves_everything_as_it_was():
    optimizer = optax.adamw(0.1)
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0))
    learn = make_learn(
        POLICY, optimizer, loss=losses.sft(), transforms=(raft(100.0),), updates=Updates(micro_batches=2)
    )
    after, metrics = jax.jit(learn)(state, scored_experience())
    chex.assert_trees_all_equal(after.params, state.params)
    assert (after.step, after.skipped, statistics.summary(metrics)["kept"]) == (1, 0, 0)


def test_raft_raises_the_reward_as_one_step_that_is_traced_once():
    optimizer = optax.adam(0.1)
    settings = {"loss": losses.sft(), "transforms": (raft(0.5),)}
    sampler = sampling.sampler(group_size=6, max_tokens=5, eos_ids=(EOS,))
    made = make_train_step(POLICY, optimizer, sampler, reward=even_tokens, updates=Updates(minibatches=2), **settings)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda *x: made(*x), n=1))
    state, rewards = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0)), []
    for seed in range(12):
        state, metrics = step(state, random_prompts(seed, 16, 3, V))
        rewards.append(float(statistics.summary(metrics)["reward"]))
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.25


def test_the_best_of_more_is_better():
    """As in evaluation: the reward of the best rises with the number that it is chosen from."""
    rng = np.random.default_rng(0)
    experience = scored_experience()._replace(
        rewards=jnp.asarray(rng.normal(size=(B, G, 1)), jnp.float32), reward_mask=jnp.ones((B, G, 1), bool)
    )
    best = best_of_n(experience).rewards
    np.testing.assert_array_equal(best[:, 0, 0], experience.rewards.max(axis=(1, 2)))


@pytest.mark.parametrize("keep", [0, G + 1])
def test_refuses_to_keep_none_or_more_than_there_are(keep):
    with pytest.raises(ValueError, match=f"from 1 to the group's 4 completions, got {keep}"):
        best_of_n(scored_experience(), keep=keep)


def test_an_experience_without_rewards_is_refused():
    with pytest.raises(ValueError, match="the experience has no rewards"):
        best_of_n(Experience(scored_experience().rollout))


def test_turns_and_what_a_teacher_says_go_with_their_completions():
    experience, numbers = scored_experience(), jnp.arange(B * G * T * 2).reshape(B, G, T, 2)
    turns = Turns(numbers[..., 0], 1.0 * numbers[..., 1], numbers[..., 0] > 30, numbers[..., 0, 0] > 60)
    prompts = experience.rollout.prompts
    given = experience._replace(
        rollout=experience.rollout._replace(turns=turns),
        teacher_top=Likeliest(numbers, -1.0 * numbers),
        teacher_prompts=prompts,
    )
    best = best_of_n(given, keep=2, weights=(1.0, 1.0))
    order, _ = ranked(experience, (1.0, 1.0))
    assert best.teacher_prompts is prompts
    for b in range(B):
        for place, g in enumerate(order[b][:2]):
            held = (best.rollout.turns, best.teacher_top), (turns, given.teacher_top)
            jax.tree.map(lambda a, e, b=b, g=g, p=place: np.testing.assert_array_equal(a[b, p], e[b, g]), *held)
