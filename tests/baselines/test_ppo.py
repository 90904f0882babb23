"""PPO against its formulas in plain Python, and its whole step against stages put together by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import sampling, statistics
from grpo_jax.baselines import critic as critics
from grpo_jax.baselines import heads, ppo
from grpo_jax.policies import from_logits_fn
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import step_keys
from grpo_jax.types import Experience, Prompts, Rollout
from grpo_jax.updates import Updates, init_state, update

V, EOS = 9, 1
SIZES = {"group_size": 2, "max_tokens": 5, "eos_ids": (EOS,)}
PLAIN = optax.sgd(0.5)


def bigram(params, tokens, mask):
    """Logits of the next token that depend on the last one alone."""
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def even_tokens(rollout):
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


def random_critic(network, seed):
    """A critic whose head is not of zeros."""
    params = jax.jit(lambda key: heads.init(network, key))(jax.random.key(seed))
    kernel = jax.random.normal(jax.random.key(seed + 1), params["head"]["kernel"].shape)
    return params | {"head": {"kernel": 0.3 * kernel, "bias": jnp.float32(0.2)}}


def state_of(optimizer=PLAIN, seed=0):
    params = {"policy": POLICY.init(jax.random.key(seed)), "critic": random_critic(POLICY, seed + 10)}
    state = init_state(params, optimizer, jax.random.key(seed))
    return state._replace(ref_params={"policy": POLICY.init(jax.random.key(seed + 20))})


def experience_of(seed=0, B=4, G=2, T=5):
    """A rollout written by hand, of unequal lengths, with rewards and the log-probs of another policy."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    rollout = Rollout(
        random_prompts(seed, B, 3, V),
        jnp.asarray(np.where(mask, rng.integers(0, V, (B, G, T)), 0), jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(mask),
        jnp.zeros((B, G, T)),
        jnp.asarray(lengths == T),
    )
    rewards = jnp.asarray(rng.normal(size=(B, G, 1)), jnp.float32)
    old = score(POLICY, POLICY.init(jax.random.key(seed + 1000)), rollout).log_probs
    return Experience(rollout, rewards, jnp.ones(rewards.shape, bool), old)


def step_of(optimizer=PLAIN, *, temperature=1.0, **settings):
    """A step whose settings are given by name, whichever part they are of."""

    def of(names):
        return {name: settings.pop(name) for name in names if name in settings}

    advantage = ppo.gae_advantages(**of(["gamma", "gae_lambda", "kl_weight", "whiten", "weights"]))
    loss = ppo.ppo_loss(**of(["epsilon", "value_epsilon", "value_weight", "entropy_weight"]))
    updates = Updates(**{"iterations": 4} | of(["iterations", "minibatches", "micro_batches", "max_grad_norm"]))
    sampler = sampling.sampler(**SIZES | of(["group_size"]), temperature=temperature)
    return ppo.make_train_step(
        POLICY, POLICY, optimizer, sampler, advantage=advantage, loss=loss, updates=updates, **settings
    )


def raw(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def gae_by_hand(rewards, values, mask, gamma, gae_lambda):
    """Equation 11 of the paper as the double sum it is, over the tokens that count."""
    advantages = np.zeros(mask.shape)
    for b, g in np.ndindex(mask.shape[:2]):
        tokens = np.flatnonzero(mask[b, g])
        r, v = rewards[b, g, tokens].astype(np.float64), [*values[b, g, tokens].astype(np.float64), 0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(tokens))]
        for i, t in enumerate(tokens):
            advantages[b, g, t] = sum((gamma * gae_lambda) ** (j - i) * deltas[j] for j in range(i, len(tokens)))
    return advantages, np.where(mask, advantages + values, 0.0)


# -------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_the_sum_over_later_errors(transform, gamma, gae_lambda):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 4, 7)).astype(np.float32)
    mask = np.arange(7) < rng.integers(1, 8, (3, 4, 1))
    mask[0, 1] = False  # nothing counts
    mask[1, 2] = [True, False, False, True, True, False, True]  # tokens between that the policy did not write
    spoilt = [np.where(mask, x, np.nan) for x in (rewards, values)]
    actual = transform(functools.partial(critics.gae, gamma=gamma, gae_lambda=gae_lambda))(*spoilt, mask)
    expected = gae_by_hand(rewards, values, mask, gamma, gae_lambda)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4, atol=1e-5)


def test_without_a_critic_and_at_gamma_and_lambda_1_every_token_earns_the_whole_reward():
    mask = np.arange(4) < np.array([[[2], [4]]])
    rewards = critics.token_rewards(jnp.array([[3.0, -1.0]]), mask)
    np.testing.assert_array_equal(rewards, [[[0, 3, 0, 0], [0, 0, 0, -1]]])
    advantages, _ = critics.gae(rewards, jnp.zeros(mask.shape), mask, gamma=1.0, gae_lambda=1.0)
    np.testing.assert_array_equal(advantages, [[[3, 3, 0, 0], [-1, -1, -1, -1]]])


def test_the_reward_goes_to_the_last_token_that_counts_and_each_pays_its_cost():
    mask = jnp.array([[[True, False, True, False], [False] * 4]])
    cost = jnp.array([[[0.1, jnp.nan, 0.3, jnp.nan], [jnp.nan] * 4]])
    rewards = critics.token_rewards(jnp.array([[2.0, 5.0]]), mask, cost)
    np.testing.assert_allclose(rewards, [[[-0.1, 0, 1.7, 0], [0, 0, 0, 0]]], rtol=1e-6)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_what_counts():
    rng = np.random.default_rng(1)
    advantages, mask = 3 * rng.normal(size=(4, 2, 5)) + 7, rng.random((4, 2, 5)) < 0.6
    white = np.asarray(critics.whitened(jnp.where(mask, advantages, jnp.nan), mask))
    counted = advantages[mask]
    np.testing.assert_allclose(white[mask], (counted - counted.mean()) / counted.std(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(white[~mask], 0.0)
    np.testing.assert_array_equal(critics.whitened(jnp.full((2, 2, 2), 1.1), jnp.ones((2, 2, 2), bool)), 0.0)


def test_the_value_loss_is_the_larger_of_the_errors_with_and_without_the_clip():
    rng = np.random.default_rng(2)
    values, old, returns = rng.normal(size=(3, 2, 3, 4))
    expected = np.zeros(values.shape)
    for i in np.ndindex(values.shape):
        moved = min(max(values[i] - old[i], -0.3), 0.3)
        expected[i] = max((values[i] - returns[i]) ** 2, (old[i] + moved - returns[i]) ** 2) / 2
    np.testing.assert_allclose(critics.value_loss(values, old, returns, epsilon=0.3), expected, rtol=1e-5)
    np.testing.assert_allclose(
        critics.value_loss(values, old, returns, epsilon=None), (values - returns) ** 2 / 2, rtol=1e-5
    )
    assert np.any(expected > (values - returns) ** 2 / 2 + 1e-3)  # so that the clip was at work


def test_a_value_that_has_gone_far_enough_towards_its_return_gets_no_gradient():
    old, returns = jnp.zeros(4), jnp.array([1.0, 1.0, -1.0, 1.0])
    values = jnp.array([0.5, 0.1, -0.5, -0.5])  # past the clip; before it; past it; past it on the wrong side
    gradient = jax.grad(lambda v: jnp.sum(critics.value_loss(v, old, returns, epsilon=0.2)))(values)
    np.testing.assert_allclose(gradient, [0.0, -0.9, 0.0, -1.5], atol=1e-6)


def test_a_value_is_the_heads_of_the_prompt_and_the_tokens_before():
    """The state before token t is the last one of a prompt that ends in token t - 1."""
    network = tiny_policy(num_hidden_layers=1)
    params, rollout = random_critic(network, 3), experience_of(B=3, T=4).rollout
    prompts = rollout.prompts
    values = critics.values(network, params, rollout)
    joined = [
        [*np.asarray(prompts.tokens[b, : prompts.lengths[b]]), *np.asarray(rollout.tokens[b, g, :t])]
        for b, g, t in np.argwhere(rollout.mask)
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
    np.testing.assert_allclose(values[rollout.mask], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(values[~rollout.mask], 0.0)
    spoilt = rollout._replace(tokens=jnp.where(rollout.mask, rollout.tokens, 10**6))
    np.testing.assert_array_equal(critics.values(network, params, spoilt), values)


def test_a_new_critic_says_0_and_a_copied_one_reads_as_the_policy_does():
    params, rollout = POLICY.init(jax.random.key(0)), experience_of().rollout
    for critic in (heads.init(POLICY, jax.random.key(0)), heads.init_from(POLICY, params)):
        assert_close(critic["network"], params)
        np.testing.assert_array_equal(critics.values(POLICY, critic, rollout), 0.0)


# --------------------------------------------------------------------------- the whole step


def formula(params, experience, old_values, advantages, returns, settings):
    """Equation 9 written out, with the entropy from whole distributions."""
    rollout, mask = experience.rollout, experience.rollout.mask
    prompts = rollout.prompts
    last = prompts.tokens[jnp.arange(len(prompts.lengths)), prompts.lengths - 1]
    before = jnp.concatenate(
        [jnp.broadcast_to(last[:, None, None], (*rollout.lengths.shape, 1)), rollout.tokens[..., :-1]], axis=-1
    )
    probs = jax.nn.softmax(params["policy"]["table"][before] / settings["temperature"])
    log_probs = jnp.log(jnp.take_along_axis(probs, rollout.tokens[..., None], axis=-1)[..., 0])
    ratio = jnp.exp(log_probs - experience.old_log_probs)
    epsilon, value_epsilon = settings["epsilon"], settings["value_epsilon"]
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * advantages)
    critic = params["critic"]
    values = critic["network"]["table"][before] @ critic["head"]["kernel"][:, 0] + critic["head"]["bias"]
    near = jnp.clip(values, old_values - value_epsilon, old_values + value_epsilon)
    error = jnp.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    entropy = -jnp.sum(probs * jnp.log(probs), axis=-1)
    per_token = -gain + settings["value_weight"] * error - settings["entropy_weight"] * entropy
    return jnp.mean(per_token, where=mask), jnp.mean(error, where=mask)


def test_a_step_is_its_stages_put_together_by_hand():
    """Three passes, so that both clips are at work, with a cost against a reference and weighed rewards."""
    settings = {"epsilon": 0.05, "value_epsilon": 0.1, "value_weight": 0.7, "entropy_weight": 0.03, "temperature": 0.8}
    gamma, gae_lambda, kl_weight, optimizer = 0.9, 0.8, 0.2, optax.sgd(2.0)
    state, prompts = state_of(optimizer)._replace(step=jnp.int32(7)), random_prompts(1, 4, 3, V)

    def rewards(rollout):
        (even, given), (long, _) = even_tokens(rollout), (rollout.lengths[..., None].astype(jnp.float32), None)
        return jnp.concatenate([even, long], axis=-1), jnp.concatenate([given, given], axis=-1)

    shares = {"gamma": gamma, "gae_lambda": gae_lambda, "kl_weight": kl_weight, "weights": (2.0, -0.1)}
    step = step_of(optimizer, reward=rewards, iterations=3, max_grad_norm=0.8, **shares, **settings)
    after, metrics = jax.jit(step)(state, prompts)

    key, temperature = step_keys(state)[0], settings["temperature"]
    rollout = sampling.sampler(temperature=temperature, **SIZES)(POLICY, state.params["policy"], prompts, key)
    old, ref = (
        score(POLICY, params["policy"], rollout, temperature=temperature).log_probs
        for params in (state.params, state.ref_params)
    )
    total = 2 * even_tokens(rollout)[0][..., 0] - 0.1 * rollout.lengths
    mask, of_tokens = np.asarray(rollout.mask), np.zeros(rollout.mask.shape)
    for b, g in np.ndindex(total.shape):
        for t in range(int(rollout.lengths[b, g])):
            of_tokens[b, g, t] = -kl_weight * (old[b, g, t] - ref[b, g, t])
        of_tokens[b, g, int(rollout.lengths[b, g]) - 1] += total[b, g]
    old_values = critics.values(POLICY, state.params["critic"], rollout)
    advantages, returns = gae_by_hand(of_tokens, np.asarray(old_values), mask, gamma, gae_lambda)
    white = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-4)
    experience = Experience(rollout, old_log_probs=old)

    gradient = jax.jit(jax.grad(lambda p: formula(p, experience, old_values, white, returns, settings), has_aux=True))
    expected, errors, norms = state, [], []
    for _ in range(3):
        grads, error = gradient(expected.params)
        expected, of_update = update(expected, grads, optimizer, max_grad_norm=0.8)
        errors.append(float(error))
        norms.append(float(of_update["grad_norm"].sum))
    assert_close(after.params, expected.params, rtol=1e-4, atol=1e-5)
    assert after.step == 8

    numbers = statistics.summary(metrics)
    assert max(norms) > 0.8  # so that the gradients were clipped
    assert numbers["clip_high"] > 0
    left = (returns - old_values)[mask]
    expected_numbers = {
        "value_loss": np.mean(errors),
        "grad_norm": np.mean(norms),
        "reward": np.mean(total),
        "return": np.mean(returns[mask]),
        "kl": np.mean(np.asarray(old - ref)[mask]),
        "explained_variance": 1 - np.var(left) / np.var(returns[mask]),
        "length": np.mean(rollout.lengths),
    }
    assert_close({name: float(numbers[name]) for name in expected_numbers}, expected_numbers, rtol=1e-4)


@functools.cache
def compiled_learn(minibatches=2, micro_batches=1, **settings):
    split = {"minibatches": minibatches, "micro_batches": micro_batches}
    return jax.jit(step_of(kl_weight=0.1, iterations=2, **split, **settings).learn)


@pytest.mark.slow
def test_micro_batches_change_neither_the_updates_nor_the_metrics():
    experience = experience_of()
    experience = experience._replace(reward_mask=experience.reward_mask.at[2].set(False))
    whole, parts = (compiled_learn(micro_batches=n)(state_of(), experience) for n in (1, 2))
    assert np.any(np.asarray(whole[0].params["policy"]["table"]) != state_of().params["policy"]["table"])
    assert_close(parts[0].params, whole[0].params)
    assert_close(statistics.summary(parts[1]), statistics.summary(whole[1]))


def test_padding_and_completions_that_nobody_scored_change_nothing_whatever_they_hold():
    experience, state = experience_of(), state_of()
    given = experience.reward_mask.at[2].set(False).at[3, 0].set(False)
    experience = experience._replace(reward_mask=given)
    counted = experience.rollout.mask & given
    wider = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3))) if x.ndim == 3 and x.shape[-1] == 5 else x, experience
    )
    held = jnp.arange(5) < experience.rollout.lengths[..., None]
    spoilt = experience._replace(
        rollout=experience.rollout._replace(tokens=jnp.where(held, experience.rollout.tokens, 8)),
        rewards=jnp.where(given, experience.rewards, jnp.nan),
        old_log_probs=jnp.where(counted, experience.old_log_probs, -1e4),
    )
    after, metrics = compiled_learn(micro_batches=1)(state, experience)
    assert np.any(np.asarray(after.params["critic"]["head"]["kernel"]) != state.params["critic"]["head"]["kernel"])
    for other in (wider, spoilt):
        other_after, other_metrics = compiled_learn(micro_batches=1)(state, other)
        assert_close(other_after.params, after.params)
        assert_close(statistics.summary(other_metrics), statistics.summary(metrics))


def test_a_batch_that_nobody_scored_changes_nothing():
    experience, state = experience_of(), state_of()
    experience = experience._replace(
        rewards=jnp.full_like(experience.rewards, jnp.nan), reward_mask=jnp.zeros_like(experience.reward_mask)
    )
    after, metrics = compiled_learn(micro_batches=1)(state, experience)
    assert raw(after.params) == raw(state.params)
    assert (after.step, after.skipped) == (1, 0)
    assert all(np.all(np.isfinite(x)) for x in statistics.summary(metrics).values())


def test_a_reward_of_nan_that_is_not_masked_is_refused():
    experience, state = experience_of(), state_of()
    experience = experience._replace(rewards=experience.rewards.at[1, 1].set(jnp.nan))
    after, _ = compiled_learn(micro_batches=1)(state, experience)
    assert after.skipped == 4
    assert raw(after.params) == raw(state.params)


DEFAULTS = {
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "kl_weight": 0.1,
    "epsilon": 0.05,
    "value_epsilon": 0.05,
    "value_weight": 0.5,
    "entropy_weight": 0.01,
    "temperature": 0.9,
    "max_grad_norm": 10.0,
}
OTHERS = dict.fromkeys(DEFAULTS, 0.4)


def test_every_setting_may_be_traced_and_has_an_effect():
    experience = experience_of()

    def learn(setting):
        after, _ = step_of(iterations=2, **setting).learn(state_of(), experience)
        return after.params

    grid = [DEFAULTS, *(DEFAULTS | {name: other} for name, other in OTHERS.items())]
    grid[-1]["max_grad_norm"] = 0.01
    together = jax.jit(jax.vmap(learn))(jax.tree.map(lambda *x: jnp.array(x), *grid))
    assert_close(jax.tree.map(lambda x: x[0], together), jax.jit(lambda: learn(DEFAULTS))())
    for n, name in enumerate(OTHERS, 1):
        distance = max(float(jnp.abs(x[n] - x[0]).max()) for x in jax.tree.leaves(together))
        assert distance > 1e-5, f"{name} has no effect"


def test_the_raw_advantages_are_learned_from_without_whitening():
    experience, state = experience_of(), state_of()
    ood = experience._replace(rewards=3 * experience.rewards + 5)
    settings = {"value_weight": 0.0, "entropy_weight": 0.0, "gae_lambda": 1.0, "gamma": 1.0}
    state = state._replace(params=state.params | {"critic": heads.init_from(POLICY, state.params["policy"])})

    def table(experience, whiten):
        learn = compiled_learn(whiten=whiten, **settings)
        return learn(state, experience._replace(ref_log_probs=experience.old_log_probs))[0].params["policy"]["table"]

    np.testing.assert_allclose(table(ood, True), table(experience, True), atol=1e-3)
    assert np.abs(table(ood, False) - table(experience, False)).max() > 0.1


# --------------------------------------------------------------------------------- programs


def test_a_step_is_traced_once_and_learns():
    """Groups of one, with a critic that starts from the policy, and a donated state."""
    optimizer = optax.adam(0.1)
    step = step_of(optimizer, group_size=1, reward=even_tokens, minibatches=2)
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(lambda *x: step(*x), n=1), donate_argnums=0)
    policy_params = POLICY.init(jax.random.key(0))
    params = {"policy": policy_params, "critic": heads.init_from(POLICY, policy_params)}
    first, prompts = (
        init_state(params, optimizer, jax.random.key(0)),
        [random_prompts(seed, 16, 3, V) for seed in range(12)],
    )
    state, seen = first, []
    for batch in prompts:
        state, metrics = jitted(state, batch)
        seen.append(statistics.summary(metrics))
    assert first.params["critic"]["network"]["table"].is_deleted()
    rewards = [float(numbers["reward"]) for numbers in seen]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.25
    assert (state.step, state.skipped) == (12, 0)


def test_the_critic_learns_to_expect_the_rewards():
    """Those of one token that hang on the prompt alone, whose last token is all that a critic of bigrams sees."""
    optimizer, experience = optax.adam(0.1), experience_of(B=16, T=1)
    prompts = experience.rollout.prompts
    even = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1) % 2 == 0
    rewards = jnp.broadcast_to(even[..., None], experience.rewards.shape).astype(jnp.float32)
    params = {"policy": POLICY.init(jax.random.key(0)), "critic": heads.init(POLICY, jax.random.key(1))}
    state, explained = init_state(params, optimizer, jax.random.key(0)), []
    learn = jax.jit(step_of(optimizer, value_epsilon=None, iterations=8).learn)
    for _ in range(4):
        state, metrics = learn(state, experience._replace(rewards=rewards))
        explained.append(float(statistics.summary(metrics)["explained_variance"]))
    assert explained[0] == 0  # of a critic that says 0 of everything
    assert explained[-1] > 0.9


@functools.cache
def compiled_step():
    return jax.jit(step_of(reward=even_tokens, iterations=2))


def test_a_scan_over_steps_is_the_loop():
    batches = [random_prompts(seed, 4, 3, V) for seed in range(3)]
    scanned, _ = jax.lax.scan(compiled_step(), state_of(), jax.tree.map(lambda *x: jnp.stack(x), *batches))
    looped = state_of()
    for batch in batches:
        looped, _ = compiled_step()(looped, batch)
    assert_close(scanned.params, looped.params)


def test_host_rewards_go_between_the_two_halves():
    prompts = random_prompts(1, 4, 3, V)
    whole, _ = compiled_step()(state_of(), prompts)
    step = step_of(iterations=2)
    experience = step.collect(state_of(), prompts)
    assert experience.rewards is None
    rewards, given = even_tokens(experience.rollout)
    experience = experience._replace(rewards=np.asarray(rewards), reward_mask=np.asarray(given))
    halves, _ = jax.jit(step.learn)(state_of(), experience)
    assert_close(halves.params, whole.params)


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gamma": 1.1}, "gamma is from 0 to 1, got 1.1"),
        ({"gae_lambda": -0.1}, "gae_lambda is from 0 to 1, got -0.1"),
        ({"epsilon": 0.0}, "epsilon is above 0, got 0.0"),
        ({"value_epsilon": -1.0}, r"value_epsilon is above 0, got -1.0"),
        ({"value_weight": -0.5}, "value_weight is at least 0, got -0.5"),
        ({"kl_weight": -0.5}, "kl_weight is at least 0, got -0.5"),
        ({"iterations": 0}, "at least 1, got 0, 1 and 1"),
    ],
)
def test_refuses_settings_out_of_range_and_names_them(setting, message):
    with pytest.raises(ValueError, match=message):
        step_of(**setting)


def test_what_is_missing_is_said():
    experience, state = experience_of(), state_of()
    with pytest.raises(ValueError, match="its own `collect`"):
        step_of().learn(state, experience._replace(old_log_probs=None))
    with pytest.raises(ValueError, match="reference=True"):
        step_of(kl_weight=0.1).learn(state._replace(ref_params=None), experience)
    with pytest.raises(ValueError, match="4 prompts do not divide into 3 parts"):
        step_of(minibatches=3).learn(state, experience)
