"""A reward model against the Bradley-Terry formula in NumPy, as a step and as a reward."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, rewards, sampling, statistics
from grpo_jax.advantages import from_rewards
from grpo_jax.baselines import heads, preferences, reward_model
from grpo_jax.policies import from_logits_fn
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Experience, Prompts, Rollout
from grpo_jax.updates import Updates, init_state

V, EOS = 9, 1
PLAIN = optax.sgd(0.5)


def bigram(params, tokens, mask):
    """Hidden states that depend on the last token alone."""
    return params["table"][tokens]


NETWORK = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def with_random_head(network, seed=0):
    params = jax.jit(lambda key: heads.init(network, key))(jax.random.key(seed))
    kernel = jax.random.normal(jax.random.key(seed + 1), params["head"]["kernel"].shape)
    return params | {"head": {"kernel": 0.3 * kernel, "bias": jnp.float32(0.2)}}


def rollout_of(seed=0, B=6, G=2, T=4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    return Rollout(
        random_prompts(seed, B, 3, V),
        jnp.asarray(np.where(mask, rng.integers(0, V, (B, G, T)), 0), jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(mask),
        jnp.zeros((B, G, T)),
        jnp.asarray(lengths == T),
    )


def pairs_of(seed=0, **sizes):
    """Pairs of which in one the rejected completion, and in one neither, has a token that counts."""
    rollout = rollout_of(seed, **sizes)
    return Experience(rollout._replace(mask=rollout.mask.at[1, 1].set(False).at[4].set(False)))


def last_even(rollout):
    """What is preferred: a completion that ends in an even token."""
    last = jnp.take_along_axis(rollout.tokens, rollout.lengths[..., None] - 1, axis=-1)[..., 0]
    return (last % 2 == 0).astype(jnp.float32)


def state_of(optimizer=PLAIN, params=None):
    return init_state(with_random_head(NETWORK) if params is None else params, optimizer, jax.random.key(0))


def recorder(updates):
    """An optimiser that changes nothing and keeps the table's gradient of each update."""

    def record(grads, log, params=None):
        count, kept = log
        kept = kept.at[count].set(grads["network"]["table"])
        return jax.tree.map(jnp.zeros_like, grads), (count + 1, kept)

    return optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.zeros((updates, V, V))), record)


def of_the_first(experience):
    """The advantage from the first reward alone; the second is looked at, and teaches nothing."""
    return from_rewards(weights=(1.0, 0.0))(experience)


@functools.cache
def compiled_learn():
    return jax.jit(reward_model.make_learn(NETWORK, PLAIN))


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------- the score


def test_the_score_is_the_heads_at_the_last_token_of_prompt_and_completion():
    network = tiny_policy(num_hidden_layers=1)
    params, rollout = with_random_head(network), rollout_of(B=3)
    prompts = rollout.prompts
    joined = [
        [
            *np.asarray(prompts.tokens[b, : prompts.lengths[b]]),
            *np.asarray(rollout.tokens[b, g, : rollout.lengths[b, g]]),
        ]
        for b, g in np.ndindex(3, 2)
    ]
    lengths = jnp.array([len(row) for row in joined])
    texts = Prompts(jnp.array([row + [0] * (8 - len(row)) for row in joined]), lengths)
    last = jnp.array([row[-1:] for row in joined])

    @jax.jit
    def read(params):
        cache = network.prefill(params, texts.tokens, lengths)
        return network.extend(params, last[:, None], (lengths - 1)[:, None, None], cache)[0]

    hidden = read(params["network"])
    expected = hidden[:, 0, 0] @ params["head"]["kernel"][:, 0] + params["head"]["bias"]
    scores = reward_model.score(network, params, rollout)
    np.testing.assert_allclose(scores.reshape(-1), expected, rtol=1e-4, atol=1e-5)
    spoilt = rollout._replace(tokens=jnp.where(rollout.mask, rollout.tokens, 10**6))
    np.testing.assert_array_equal(reward_model.score(network, params, spoilt), scores)


# --------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_bradley_terry_matches_the_formula_in_numpy(transform, label_smoothing):
    differences, counted = np.array([0.3, -2.0, 5.0, 0.0, 1.0]), np.array([True, True, True, True, False])
    right = 1 / (1 + np.exp(-differences[:4]))
    expected = np.mean(-(1 - label_smoothing) * np.log(right) - label_smoothing * np.log(1 - right))
    loss = transform(functools.partial(preferences.bradley_terry, label_smoothing=label_smoothing))
    term, metrics = loss(jnp.array(differences), jnp.array(counted))
    np.testing.assert_allclose(losses.value((term,)), expected, rtol=1e-6)
    numbers = statistics.summary(metrics)
    np.testing.assert_allclose([numbers["accuracy"], numbers["margin"]], [0.5, differences[:4].mean()], rtol=1e-6)


def test_differences_beyond_every_exponential_have_a_finite_loss_and_gradient():
    def value(d):
        return losses.value((preferences.bradley_terry(d, jnp.array([True, True, False]))[0],))

    loss, gradient = jax.value_and_grad(value)(jnp.array([1e4, -1e4, jnp.nan]))
    assert loss == 5e3
    np.testing.assert_array_equal(gradient, [0.0, -0.5, 0.0])


def test_equal_scores_have_a_loss_of_log_2():
    params = heads.init(NETWORK, jax.random.key(0))
    _, metrics = compiled_learn()(state_of(params=params), pairs_of())
    np.testing.assert_allclose(statistics.summary(metrics)["loss"], np.log(2), rtol=1e-6)


# --------------------------------------------------------------------------------- the step


def test_an_update_matches_the_gradient_worked_out_in_numpy():
    experience, state = pairs_of(), state_of()
    after, metrics = compiled_learn()(state, experience)
    table = np.asarray(state.params["network"]["table"], np.float64)
    kernel = np.asarray(state.params["head"]["kernel"], np.float64)[:, 0]
    rollout, costs = experience.rollout, []
    of_table, of_kernel = np.zeros(table.shape), np.zeros(kernel.shape)
    for b in (0, 2, 3, 5):
        chosen, rejected = (int(rollout.tokens[b, g, rollout.lengths[b, g] - 1]) for g in range(2))
        difference = (table[chosen] - table[rejected]) @ kernel
        costs.append(np.log1p(np.exp(-difference)))
        slope = -1 / (1 + np.exp(difference)) / 4
        of_table[chosen] += slope * kernel
        of_table[rejected] -= slope * kernel
        of_kernel += slope * (table[chosen] - table[rejected])
    np.testing.assert_allclose(statistics.summary(metrics)["loss"], np.mean(costs), rtol=1e-5)
    np.testing.assert_allclose(after.params["network"]["table"], table - 0.5 * of_table, atol=1e-6)
    np.testing.assert_allclose(after.params["head"]["kernel"][:, 0], kernel - 0.5 * of_kernel, atol=1e-6)
    assert after.step == 1


def test_micro_batches_change_neither_the_update_nor_the_metrics():
    experience, state = pairs_of(), state_of()
    parts = jax.jit(reward_model.make_learn(NETWORK, PLAIN, updates=Updates(micro_batches=3)))(state, experience)
    whole = compiled_learn()(state, experience)
    assert_close(parts[0].params, whole[0].params)
    assert_close(statistics.summary(parts[1]), statistics.summary(whole[1]))


def test_each_pass_goes_through_every_pair_once_in_an_order_of_its_own():
    """One pair an update, recorded by an optimiser that does not move: the gradient of each tells which it was."""
    B, passes = 4, 3
    rollout = rollout_of(B=B, T=1)._replace(tokens=jnp.array([[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]))
    learn = jax.jit(
        reward_model.make_learn(NETWORK, recorder(passes * B), updates=Updates(iterations=passes, minibatches=B))
    )
    state = state_of(recorder(passes * B))
    after, _ = learn(state, Experience(rollout))
    updates = np.asarray(after.opt_state[1]).reshape(passes, B, -1)
    alone = jax.jit(reward_model.make_learn(NETWORK, recorder(1)))
    of_pairs = []
    for b in range(B):
        one, _ = alone(state_of(recorder(1)), Experience(jax.tree.map(operator.itemgetter(slice(b, b + 1)), rollout)))
        of_pairs.append(np.asarray(one.opt_state[1])[0].reshape(-1))
    orders = [[int(np.argmin([np.abs(x - y).max() for y in of_pairs])) for x in of_pass] for of_pass in updates]
    for order, of_pass in zip(orders, updates, strict=True):
        assert sorted(order) == list(range(B))
        np.testing.assert_allclose(of_pass, np.array(of_pairs)[order], atol=1e-6)
    assert len(set(map(tuple, orders))) > 1


def test_padding_and_pairs_that_do_not_count_change_nothing_whatever_they_hold():
    experience, state = pairs_of(), state_of()
    rollout = experience.rollout
    counted = rollout.mask & preferences.whole_pairs(experience)[:, None, None]
    spoilt = Experience(rollout._replace(tokens=jnp.where(counted, rollout.tokens, 8)))
    wider = Experience(
        rollout._replace(
            tokens=jnp.pad(rollout.tokens, ((0, 0), (0, 0), (0, 3)), constant_values=7),
            mask=jnp.pad(rollout.mask, ((0, 0), (0, 0), (0, 3))),
            log_probs=jnp.pad(rollout.log_probs, ((0, 0), (0, 0), (0, 3))),
        )
    )
    after, metrics = compiled_learn()(state, experience)
    assert np.any(np.asarray(after.params["head"]["kernel"]) != state.params["head"]["kernel"])
    for other in (spoilt, wider):
        other_after, other_metrics = compiled_learn()(state, other)
        assert_close(other_after.params, after.params)
        assert_close(statistics.summary(other_metrics), statistics.summary(metrics))


def test_no_pair_that_counts_leaves_everything_as_it_was():
    optimizer, experience = optax.adamw(0.1), pairs_of()
    experience = Experience(experience.rollout._replace(mask=jnp.zeros_like(experience.rollout.mask)))
    state = state_of(optimizer)
    after, metrics = jax.jit(reward_model.make_learn(NETWORK, optimizer))(state, experience)
    chex.assert_trees_all_equal(after.params, state.params)
    assert (after.step, after.skipped, statistics.summary(metrics)["loss"]) == (1, 0, 0)


@pytest.mark.slow
def test_it_learns_what_is_preferred_and_then_teaches_it_to_a_policy():
    """Pairs of random groups, by whether they end in an even token; a new critic's params, one trace, then GRPO."""
    optimizer = optax.adam(0.1)
    learn = reward_model.make_learn(NETWORK, optimizer, updates=Updates(minibatches=2))
    chex.clear_trace_counter()
    learn = jax.jit(chex.assert_max_traces(learn, n=1))
    state, seen = state_of(optimizer, heads.init(NETWORK, jax.random.key(5))), []

    def pairs(seed):
        rollout = rollout_of(seed, B=16, G=4)
        scored = last_even(rollout)[..., None]
        return preferences.pairs(Experience(rollout, scored, jnp.ones(scored.shape, bool)))

    for seed in range(12):
        state, metrics = learn(state, pairs(seed))
        seen.append(statistics.summary(metrics))
    assert seen[-1]["accuracy"] > 0.95
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]

    policy_optimizer = optax.adam(0.3)
    reward = rewards.traced(lambda rollout: reward_model.score(NETWORK, state.params, rollout), last_even)
    settings = {"loss": losses.grpo(), "advantage": of_the_first}
    sampler = sampling.sampler(group_size=8, max_tokens=1, eos_ids=())
    step = jax.jit(make_train_step(NETWORK, policy_optimizer, sampler, reward=reward, **settings))
    policy_state = init_state(NETWORK.init(jax.random.key(2)), policy_optimizer, jax.random.key(2))
    truth = []
    for seed in range(12):
        policy_state, metrics = step(policy_state, random_prompts(seed, 16, 3, V))
        truth.append(float(statistics.summary(metrics)["reward/1"]))
    assert np.mean(truth[-3:]) > np.mean(truth[:2]) + 0.25


def test_refuses_settings_out_of_range_and_groups_that_are_no_pairs():
    with pytest.raises(ValueError, match=r"label_smoothing is at least 0 and below 0.5, got 0.7"):
        reward_model.make_learn(NETWORK, PLAIN, label_smoothing=0.7)
    with pytest.raises(ValueError, match="at least 1, got 1, 0 and 1"):
        reward_model.make_learn(NETWORK, PLAIN, updates=Updates(minibatches=0))
    with pytest.raises(ValueError, match="6 prompts do not divide into"):
        reward_model.make_learn(NETWORK, PLAIN, updates=Updates(minibatches=2, micro_batches=2))(state_of(), pairs_of())
    with pytest.raises(ValueError, match=r"2 completions, got a mask of shape \(6, 3, 4\)"):
        reward_model.make_learn(NETWORK, PLAIN)(state_of(), Experience(rollout_of(G=3)))
