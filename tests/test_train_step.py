"""The whole step, against its stages put together by hand and, for a table of bigrams, against NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling, statistics
from grpo_jax.advantages import batch_normalised_advantages, from_rewards, group_advantages
from grpo_jax.losses import (
    completion_mean,
    constant_length,
    grpo,
    k2,
    k3,
    policy_loss,
    ppo_clip,
    prompt_mean,
    sft,
    token_mean,
)
from grpo_jax.policies import from_logits_fn
from grpo_jax.scoring import score
from grpo_jax.statistics import Max, Mean
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import make_collect, make_learn, make_train_step, step_keys
from grpo_jax.types import Experience, Prompts, Rollout
from grpo_jax.updates import Updates, init_state, update

V, EOS = 9, 1
SIZES = {"group_size": 4, "max_tokens": 5, "eos_ids": (EOS,)}
PLAIN, MOMENTUM = optax.sgd(1.0), optax.sgd(0.5, momentum=0.9)


def bigram(params, tokens, mask):
    """Logits of the next token that depend on the last one alone: small enough to differentiate by hand."""
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def even_tokens(rollout):
    """Rewards the share of even tokens: random policies differ in it."""
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


def state_of(optimizer, seed=0, **settings):
    key = jax.random.key(seed)
    return init_state(POLICY.init(key), optimizer, key, **settings)


def with_other_reference(state, seed=99):
    return state._replace(ref_params=POLICY.init(jax.random.key(seed)))


def prompts_of(seed, B=4):
    return random_prompts(seed, B, 3, V)


@functools.cache
def experience_of(seed=0, B=8, G=3, T=5, *, old=True):
    """A rollout written by hand, of unequal lengths, with rewards and the log-probs of another policy."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    tokens = np.where(mask, rng.integers(0, V, (B, G, T)), 0)
    rollout = Rollout(
        prompts_of(seed, B)._replace(info={"row": jnp.arange(B)}),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(mask),
        jnp.zeros((B, G, T)),
        jnp.asarray(lengths == T),
    )
    rewards = jnp.asarray(rng.normal(size=(B, G, 1)), jnp.float32)
    old_params = POLICY.init(jax.random.key(seed + 1000))
    old_log_probs = score(POLICY, old_params, rollout).log_probs if old else None
    return Experience(rollout, rewards, jnp.ones(rewards.shape, bool), old_log_probs)


def raw(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


# Programs that several tests run, so that they are compiled once.


@functools.cache
def compiled_step():
    return jax.jit(
        make_train_step(
            POLICY,
            MOMENTUM,
            sampling.sampler(**SIZES),
            reward=even_tokens,
            loss=grpo(penalty=k3(0.1)),
            updates=Updates(minibatches=2),
        )
    )


@functools.cache
def compiled_collect():
    return jax.jit(make_collect(POLICY, sampling.sampler(**SIZES), score_old=True))


@functools.cache
def compiled_learn():
    return jax.jit(make_learn(POLICY, PLAIN, loss=grpo(), advantage=from_rewards()))


# --------------------------------------------------------------------------- references


def hand_gradient(table, rollout, slope, temperature=1.0):
    """The gradient by the table of a loss whose gradient by the log-probs is `slope [B, G, T]`, in float64."""
    table, gradient = np.asarray(table, np.float64), np.zeros((V, V))
    prompts = rollout.prompts
    for b, g, t in np.argwhere(slope != 0):
        last = prompts.tokens[b, prompts.lengths[b] - 1] if t == 0 else rollout.tokens[b, g, t - 1]
        p = np.exp(table[last] / temperature)
        gradient[last] -= slope[b, g, t] * p / p.sum() / temperature
        gradient[last, rollout.tokens[b, g, t]] += slope[b, g, t] / temperature
    return gradient


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_on_policy_step_matches_the_formula_in_numpy_and_leaves_out_what_was_not_scored(micro_batches):
    """Unscored completions, a group of one scored completion and a group of none: in no baseline and no divisor."""
    experience = experience_of(old=False)
    given = np.ones((8, 3), bool)
    given[0, 1], given[2, 1:], given[5] = False, False, False
    rewards = np.where(given, experience.rewards[..., 0], np.nan)
    advantages = np.zeros((8, 3))
    for b in range(8):
        if given[b].sum() > 1:
            kept = rewards[b, given[b]].astype(np.float64)
            advantages[b, given[b]] = (kept - kept.mean()) / (kept.std() + 1e-4)
    slope = -advantages / np.asarray(experience.rollout.lengths) / given.sum()
    slope = np.where(np.asarray(experience.rollout.mask), slope[..., None], 0.0)

    experience = experience._replace(
        rewards=jnp.asarray(rewards, jnp.float32)[..., None], reward_mask=jnp.asarray(given)[..., None]
    )
    state, optimizer = state_of(optax.sgd(0.5)), optax.sgd(0.5)

    def learn(temperature):
        settings = {
            "temperature": temperature,
            "updates": Updates(micro_batches=micro_batches),
            "advantage": from_rewards(),
        }
        after, metrics = make_learn(POLICY, optimizer, loss=grpo(), **settings)(state, experience)
        return after.params["table"], statistics.summary(metrics)

    temperatures = [1.0, 0.7]
    tables, numbers = jax.jit(jax.vmap(learn))(jnp.array(temperatures))
    for n, temperature in enumerate(temperatures):
        gradient = hand_gradient(state.params["table"], experience.rollout, slope, temperature)
        np.testing.assert_allclose(tables[n], state.params["table"] - 0.5 * gradient, atol=1e-6)
        np.testing.assert_allclose(numbers["grad_norm"][n], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(numbers["loss"], -np.sum(advantages) / given.sum(), atol=1e-6)
    np.testing.assert_allclose(numbers["ratio_max"], 1.0)
    np.testing.assert_allclose(numbers["reward"], np.nanmean(rewards), rtol=1e-5)


def test_a_step_is_its_stages_put_together_by_hand():
    """Sampling and scores at one temperature, a clipped gradient, a penalty against a reference of its own."""
    policy, optimizer = tiny_policy(num_hidden_layers=1), optax.sgd(0.3, momentum=0.9)
    key, prompts = jax.random.key(1), random_prompts(2, 4, 5)
    params, ref_params = (jax.jit(policy.init)(jax.random.key(seed)) for seed in (3, 4))
    state = init_state(params, optimizer, key)._replace(ref_params=ref_params, step=jnp.int32(7))
    loss = grpo(epsilon=0.1, penalty=k3(0.5))
    sizes = {"group_size": 3, "max_tokens": 4, "eos_ids": (1,)}
    step = make_train_step(
        policy,
        optimizer,
        sampling.sampler(**sizes, temperature=0.7),
        reward=even_tokens,
        loss=loss,
        updates=Updates(max_grad_norm=0.5),
    )
    after, metrics = jax.jit(step)(state, prompts)

    sample_key, _ = jax.random.split(jax.random.fold_in(key, 7))
    rollout = sampling.sampler(temperature=0.7, **sizes)(policy, params, prompts, sample_key)
    rewards, given = even_tokens(rollout)
    experience = Experience(
        rollout,
        rewards,
        given,
        old_log_probs=score(policy, params, rollout, temperature=0.7).log_probs,
        ref_log_probs=score(policy, ref_params, rollout, temperature=0.7).log_probs,
        advantages=group_advantages(rewards[..., 0]),
    )

    def value(params):
        terms, of_loss = loss(score(policy, params, rollout, temperature=0.7), experience)
        return losses.value(terms), of_loss

    (total, of_loss), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    expected, of_update = jax.jit(lambda state: update(state, grads, optimizer, max_grad_norm=0.5))(state)
    assert_close((after.params, after.opt_state), (expected.params, expected.opt_state))
    assert after.step == 8
    numbers = statistics.summary(metrics)
    assert numbers["grad_norm"] > 0.5  # so that the clipping was at work
    assert numbers["kl"] > 0.01
    expected_numbers = statistics.summary(of_loss | of_update) | {
        "loss": total,
        "reward": jnp.mean(rewards),
        "length": jnp.mean(rollout.lengths),
        "truncated": jnp.mean(rollout.truncated),
    }
    assert_close({name: numbers[name] for name in expected_numbers}, expected_numbers)


# ---------------------------------------------------------------- one program, transformed


def test_a_step_is_traced_once_whatever_the_batches_hold():
    optimizer, traces = optax.adamw(1e-2), []

    def reward(rollout):
        traces.append(rollout)
        return even_tokens(rollout)

    step = make_train_step(POLICY, optimizer, sampling.sampler(**SIZES), reward=reward, loss=grpo())
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(lambda *x: step(*x), n=1))
    state = state_of(optimizer)
    for seed in range(3):
        state, _ = jitted(state, prompts_of(seed))
    assert len(traces) == 1
    assert state.step == 3


BATCHES = [prompts_of(seed) for seed in range(3)]
DEFAULTS = {"seed": 0, "learning_rate": 1.0, "beta": 0.3, "epsilon": 0.05, "temperature": 0.9}
# The first is the default; then each setting is changed alone, and the key.
GRID = [{}, {"learning_rate": 0.1}, {"beta": 0.0}, {"epsilon": 0.4}, {"temperature": 0.5}, {"seed": 1}]


def begin(setting):
    key = jax.random.key(setting["seed"])
    return init_state(POLICY.init(key), optax.sgd(setting["learning_rate"]), key, reference=True)


def step_with(setting, state, prompts):
    """A step whose settings may be traced."""
    step = make_train_step(
        POLICY,
        optax.sgd(setting["learning_rate"]),
        sampling.sampler(**SIZES, temperature=setting["temperature"]),
        reward=even_tokens,
        loss=grpo(epsilon=setting["epsilon"], penalty=k3(setting["beta"])),
        updates=Updates(iterations=2),
    )
    state, metrics = step(state, prompts)
    return state, statistics.summary(metrics)


@functools.cache
def looped_runs():
    """The tables and metrics of a run of each setting of the grid, one step and one run after the other."""
    step = jax.jit(step_with)

    def loop(setting):
        state, numbers = begin(setting), []
        for prompts in BATCHES:
            state, of_step = step(setting, state, prompts)
            numbers.append(of_step)
        return state.params, jax.tree.map(lambda *x: jnp.stack(x), *numbers)

    return [loop(DEFAULTS | changed) for changed in GRID]


def test_scanned_and_vmapped_over_keys_and_settings_a_step_is_the_loops_of_the_separate_runs():
    def scan(setting):
        batches = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)
        state, numbers = jax.lax.scan(functools.partial(step_with, setting), begin(setting), batches)
        return state.params, numbers

    settings = jax.tree.map(lambda *x: jnp.array(x), *(DEFAULTS | changed for changed in GRID))
    together = jax.jit(jax.vmap(scan))(settings)
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *looped_runs()))


def test_every_setting_and_the_key_have_an_effect():
    tables = [np.asarray(params["table"]) for params, _ in looped_runs()]
    for changed, table in zip(GRID[1:], tables[1:], strict=True):
        assert np.abs(table - tables[0]).max() > 1e-3, f"{changed} has no effect"


def test_the_same_key_and_step_give_the_same_bits_and_another_step_other_noise():
    state, prompts = state_of(MOMENTUM, reference=True), prompts_of(0)
    again = [compiled_step()(state, prompts) for _ in range(2)]
    assert raw((again[0][0].params, again[0][1])) == raw((again[1][0].params, again[1][1]))
    collect = compiled_collect()
    tokens = [collect(state._replace(step=jnp.int32(n)), prompts).rollout.tokens for n in (0, 0, 1)]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert np.any(tokens[0] != tokens[2])
    other_key = collect(state._replace(key=jax.random.key(1)), prompts).rollout.tokens
    assert np.any(other_key != tokens[0])


def test_a_donated_state_is_used_in_place_and_its_reference_stays():
    donating = jax.jit(compiled_step(), donate_argnums=0)
    donated, kept = (state_of(MOMENTUM, reference=True) for _ in range(2))
    first, reference = donated, raw(donated.ref_params)
    for seed in range(3):
        donated, _ = donating(donated, prompts_of(seed))
        kept, _ = compiled_step()(kept, prompts_of(seed))
    assert first.params["table"].is_deleted()
    assert raw(donated.ref_params) == reference
    assert raw(donated.params) != reference
    assert_close((donated.params, donated.opt_state, donated.step), (kept.params, kept.opt_state, 3))


# ------------------------------------------------------------------------ micro-batches


AGGREGATES = (completion_mean, token_mean, prompt_mean, constant_length(11))


@pytest.mark.parametrize(("minibatches", "micro_batches"), [pytest.param(1, 4, marks=pytest.mark.slow), (2, 2)])
def test_micro_batches_give_the_same_gradient_and_metrics_for_every_aggregate(minibatches, micro_batches):
    """Of unequal lengths, off-policy, with a reference and with completions that nobody scored."""
    experience = experience_of()
    experience = experience._replace(reward_mask=experience.reward_mask.at[3].set(False).at[6, 1].set(False))
    state = with_other_reference(state_of(PLAIN))

    def learn(chosen, micro_batches):
        def loss(scores, experience):
            """The terms of all aggregates, of which all but the chosen are multiplied by 0."""
            of_each = [policy_loss(ppo_clip(0.2), a, penalty=k2(0.3))(scores, experience) for a in AGGREGATES]
            terms = [Mean(on * t.sum, t.count) for on, (pair, _) in zip(chosen, of_each, strict=True) for t in pair]
            return tuple(terms), of_each[0][1]

        settings = {
            "advantage": from_rewards(),
            "updates": Updates(minibatches=minibatches, micro_batches=micro_batches),
        }
        after, metrics = make_learn(POLICY, PLAIN, loss=loss, **settings)(state, experience)
        return after.params["table"], statistics.summary(metrics)

    whole, parts = (
        jax.jit(jax.vmap(functools.partial(learn, micro_batches=n)))(jnp.eye(4)) for n in (1, micro_batches)
    )
    assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    tables, numbers = whole
    assert len({np.asarray(table).tobytes() for table in tables}) == 4
    assert np.all(numbers["grad_norm"] > 1e-3)
    assert np.all(numbers["clip_high"] > 0)


def test_the_sweep_that_counts_does_not_run_the_network():
    """XLA drops it, since counts hang on masks alone: the program holds no more products than that of one batch."""

    def factored(params, tokens, mask):
        return params["in"][tokens] @ params["out"]

    policy, optimizer = from_logits_fn(factored), optax.sgd(1.0)
    params = {"in": jnp.ones((V, 64)), "out": jnp.ones((64, V))}
    state, experience = init_state(params, optimizer, jax.random.key(0)), experience_of()

    def products(micro_batches):
        learn = make_learn(
            policy, optimizer, loss=grpo(), advantage=from_rewards(), updates=Updates(micro_batches=micro_batches)
        )
        return jax.jit(learn).lower(state, experience).compile().as_text().count(" dot(")

    assert products(1) > 0
    assert products(4) == products(1)


# ---------------------------------------------------------------- minibatches and iterations


def recorder(updates):
    """An optimiser that changes nothing and keeps every gradient it gets: `(count, [updates, V, V])`."""

    def record(grads, state, params=None):
        count, log = state
        return jax.tree.map(jnp.zeros_like, grads), (count + 1, log.at[count].set(grads["table"]))

    return optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.zeros((updates, V, V))), record)


@pytest.mark.parametrize(("iterations", "minibatches"), [(3, 8), (4, 2)])
def test_every_pass_sees_every_prompt_once_in_an_order_of_its_own(iterations, minibatches):
    """Of one-token completions, the gradient by the table is in the rows of the prompts' last tokens."""
    B, updates = 8, iterations * minibatches
    experience = experience_of(B=B, T=1)
    prompts = Prompts(jnp.arange(B, dtype=jnp.int32)[:, None], jnp.ones(B, jnp.int32), {"row": jnp.arange(B)})
    experience = experience._replace(rollout=experience.rollout._replace(prompts=prompts))
    optimizer = recorder(updates)
    learn = jax.jit(
        make_learn(POLICY, optimizer, loss=sft(), updates=Updates(iterations=iterations, minibatches=minibatches))
    )

    def orders(state):
        after, _ = learn(state, experience)
        count, log = after.opt_state
        assert count == updates
        return np.any(np.asarray(log) != 0, axis=-1).reshape(iterations, minibatches, V)

    state = state_of(optimizer)
    seen = orders(state)
    np.testing.assert_array_equal(seen.sum(-1), B // minibatches)
    np.testing.assert_array_equal(seen.sum(1)[:, :B], 1)
    assert len({order.tobytes() for order in seen}) > 1
    np.testing.assert_array_equal(orders(state), seen)
    assert np.any(orders(state._replace(step=jnp.int32(1))) != seen)


def test_the_fields_of_an_experience_stay_together_when_it_is_shuffled():
    """One prompt an update: its gradient is that of learning from that prompt alone."""
    B, optimizer = 8, recorder(8)
    experience = experience_of(B=B)
    settings = {"loss": grpo(penalty=k2(0.5)), "advantage": from_rewards()}
    state = with_other_reference(state_of(optimizer))
    after, _ = jax.jit(make_learn(POLICY, optimizer, updates=Updates(minibatches=B), **settings))(state, experience)
    of_minibatches = np.asarray(after.opt_state[1])

    alone = jax.jit(make_learn(POLICY, recorder(1), **settings))
    state = state._replace(opt_state=recorder(1).init(state.params))
    for b in range(B):
        one, _ = alone(state, jax.tree.map(lambda x: x[b : b + 1], experience))  # noqa: B023
        distance = np.abs(of_minibatches - np.asarray(one.opt_state[1])).max(axis=(1, 2))
        assert np.sum(distance < 1e-6) == 1


def test_later_updates_have_ratios_to_the_policy_that_sampled():
    optimizer, experience = optax.sgd(0.7), experience_of(old=False)
    state = state_of(optimizer)
    old_log_probs = score(POLICY, state.params, experience.rollout).log_probs
    experience = experience._replace(old_log_probs=old_log_probs)
    loss = grpo(epsilon=0.05)
    settings = {"loss": loss, "advantage": from_rewards()}

    with_advantages = experience._replace(advantages=group_advantages(experience.rewards[..., 0]))

    @jax.jit
    @jax.grad
    def gradient(params):
        return losses.value(loss(score(POLICY, params, experience.rollout), with_advantages)[0])

    params = state.params
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.7 * g, params, gradient(params))

    after, metrics = jax.jit(make_learn(POLICY, optimizer, updates=Updates(iterations=3), **settings))(
        state, experience
    )
    assert_close(after.params, params)
    assert statistics.summary(metrics)["ratio_max"] > 1.05
    assert statistics.summary(metrics)["clip_high"] > 0
    assert after.step == 1


def test_the_first_update_has_ratio_1_at_the_temperature_of_sampling():
    """The temperature is in the sampling, in the old log-probs and in the scores."""
    optimizer = optax.sgd(0.0)
    state = state_of(optimizer)
    collect = make_collect(POLICY, sampling.sampler(**SIZES, temperature=0.7), reward=even_tokens, score_old=True)
    experience = collect(state, prompts_of(0))
    np.testing.assert_allclose(experience.old_log_probs, experience.rollout.log_probs, atol=1e-5)
    at_one = score(POLICY, state.params, experience.rollout).log_probs
    assert np.abs(at_one - experience.old_log_probs).max() > 0.1

    def ratio_max(temperature):
        settings = {"advantage": from_rewards(), "updates": Updates(minibatches=2), "temperature": temperature}
        _, metrics = make_learn(POLICY, optimizer, loss=grpo(), **settings)(state, experience)
        return statistics.summary(metrics)["ratio_max"]

    same, other = jax.jit(jax.vmap(ratio_max))(jnp.array([0.7, 0.3]))
    np.testing.assert_allclose(same, 1.0, atol=1e-5)
    assert other > 1.01


def test_several_updates_without_the_old_log_probs_say_what_to_do():
    optimizer = optax.sgd(1.0)
    experience = experience_of(old=False)
    for updates in (Updates(iterations=2), Updates(minibatches=2)):
        learn = make_learn(POLICY, optimizer, loss=grpo(), advantage=from_rewards(), updates=updates)
        with pytest.raises(ValueError, match="score_old=True"):
            learn(state_of(optimizer), experience)
        imitate = make_learn(POLICY, optimizer, loss=losses.sft(), updates=updates)
        jax.eval_shape(imitate, state_of(optimizer), experience)  # which asks for none


# ---------------------------------------------------------------- what must not be learned


def test_a_completion_that_nobody_scored_changes_nothing_whatever_it_holds():
    optimizer, experience = optax.sgd(1.0), experience_of()
    mask = experience.reward_mask.at[2].set(False).at[4, 0].set(False)
    experience = experience._replace(reward_mask=mask)
    rollout = experience.rollout
    spoilt = experience._replace(
        rollout=rollout._replace(tokens=jnp.where(mask, rollout.tokens, 3)),
        rewards=jnp.where(mask, experience.rewards, jnp.nan),
        old_log_probs=jnp.where(mask, experience.old_log_probs, -1e4),
    )
    loss = policy_loss(ppo_clip(0.2), token_mean, penalty=k3(0.2))
    learn = jax.jit(make_learn(POLICY, optimizer, loss=loss, advantage=from_rewards()))
    state = with_other_reference(state_of(optimizer))
    after, metrics = learn(state, experience)
    spoilt_after, spoilt_metrics = learn(state, spoilt)
    assert np.any(after.params["table"] != state.params["table"])
    assert_close(spoilt_after.params, after.params)
    assert_close(statistics.summary(spoilt_metrics), statistics.summary(metrics))


def test_a_batch_that_nobody_scored_changes_nothing_and_is_counted_as_a_step():
    """Nor do the optimiser's momentum and weight decay, which need no gradient to move the params."""
    optimizer, experience = optax.adamw(0.1, weight_decay=0.1), experience_of()
    experience = experience._replace(
        rewards=jnp.full_like(experience.rewards, jnp.nan), reward_mask=jnp.zeros_like(experience.reward_mask)
    )
    settings = {"updates": Updates(minibatches=2, micro_batches=2), "loss": grpo(penalty=k3(0.5))}
    learn = make_learn(POLICY, optimizer, advantage=from_rewards(), **settings)
    state = with_other_reference(state_of(optimizer))
    state = state._replace(opt_state=jax.tree.map(jnp.ones_like, state.opt_state))
    after, metrics = jax.jit(learn)(state, experience)
    numbers = statistics.summary(metrics)
    assert raw((after.params, after.opt_state)) == raw((state.params, state.opt_state))
    assert (after.step, after.skipped) == (1, 0)
    assert all(np.all(np.isfinite(x)) for x in numbers.values())
    assert numbers["grad_norm"] == numbers["loss"] == 0
    assert numbers["zero_variance_groups"] == 0  # there is no group that was judged


def test_groups_of_equal_rewards_teach_nothing():
    experience, state = experience_of(), state_of(PLAIN)
    experience = experience._replace(rewards=jnp.full_like(experience.rewards, 1.1))
    after, metrics = compiled_learn()(state, experience)
    assert raw(after.params) == raw(state.params)
    assert statistics.summary(metrics)["zero_variance_groups"] == 1


def test_a_reward_of_nan_that_is_not_masked_is_refused():
    experience, state = experience_of(), state_of(PLAIN)
    experience = experience._replace(rewards=experience.rewards.at[1, 1].set(jnp.nan))
    after, _ = compiled_learn()(state, experience)
    assert after.skipped == 1
    assert raw(after.params) == raw(state.params)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_loss_that_is_not_finite_is_refused_and_training_goes_on(minibatches):
    """Of two minibatches, the one without the bad prompt is learned from."""
    optimizer, experience = optax.adam(1e-2), experience_of()

    def loss(scores, experience):
        (term,), metrics = sft()(scores, experience)
        bad = jnp.any(experience.rollout.prompts.info["row"] == 3)
        return (term._replace(sum=jnp.where(bad, jnp.nan, term.sum)),), metrics

    learn = jax.jit(make_learn(POLICY, optimizer, loss=loss, updates=Updates(minibatches=minibatches)))
    state = state_of(optimizer)
    after, metrics = learn(state, experience)
    assert (after.skipped, after.step) == (1, 1)
    assert statistics.summary(metrics)["skipped"] == 1 / minibatches
    assert np.isfinite(statistics.summary(metrics)["grad_norm"])
    assert np.all(np.isfinite(after.params["table"]))
    assert (raw(after.params) == raw(state.params)) == (minibatches == 1)
    prompts = experience.rollout.prompts
    good = experience._replace(
        rollout=experience.rollout._replace(prompts=prompts._replace(info={"row": jnp.arange(8) + 8}))
    )
    recovered, _ = learn(after, good)
    assert recovered.skipped == 1
    assert raw(recovered.params) != raw(after.params)


# ------------------------------------------------------------------- reference, SFT, metrics


@pytest.mark.parametrize("parts", [Updates(), Updates(minibatches=2, micro_batches=2)])
def test_the_reference_is_scored_at_the_temperature_and_never_changes(parts):
    optimizer, experience = optax.sgd(0.0), experience_of()
    state = with_other_reference(state_of(optimizer))
    learn = make_learn(
        POLICY, optimizer, loss=grpo(penalty=k2(0.5)), advantage=from_rewards(), temperature=0.7, updates=parts
    )
    after, metrics = jax.jit(learn)(state, experience)
    own, ref = (
        score(POLICY, p, experience.rollout, temperature=0.7).log_probs for p in (state.params, state.ref_params)
    )
    mask = np.asarray(experience.rollout.mask)
    kl = np.mean(np.asarray(own - ref, np.float64)[mask] ** 2 / 2)
    np.testing.assert_allclose(statistics.summary(metrics)["kl"], kl, rtol=1e-5)
    assert raw(after.ref_params) == raw(state.ref_params)


def test_reference_log_probs_that_came_with_the_experience_are_kept():
    optimizer, experience = optax.sgd(0.0), experience_of()
    state = with_other_reference(state_of(optimizer))
    own = score(POLICY, state.params, experience.rollout).log_probs
    learn = make_learn(POLICY, optimizer, loss=grpo(penalty=k2(1.0)), advantage=from_rewards())
    _, metrics = jax.jit(learn)(state, experience._replace(ref_log_probs=own - 2.0))
    np.testing.assert_allclose(statistics.summary(metrics)["kl"], 2.0, rtol=1e-5)


def test_a_kl_penalty_without_a_reference_says_what_to_do():
    optimizer = optax.sgd(0.0)
    learn = make_learn(POLICY, optimizer, loss=grpo(penalty=k3(0.1)), advantage=from_rewards())
    with pytest.raises(ValueError, match="reference=True"):
        learn(state_of(optimizer), experience_of())


def test_supervised_learning_of_single_completions_makes_them_likelier():
    optimizer, experience = optax.adam(0.1), experience_of(G=1, B=6)
    experience = Experience(experience.rollout)  # neither rewards nor anything else
    learn = jax.jit(make_learn(POLICY, optimizer, loss=sft(), updates=Updates(micro_batches=2)))
    state, values = state_of(optimizer), []
    for _ in range(20):
        log_probs = np.asarray(score(POLICY, state.params, experience.rollout).log_probs, np.float64)
        state, metrics = learn(state, experience)
        values.append(statistics.summary(metrics)["loss"])
        np.testing.assert_allclose(values[-1], -np.mean(log_probs[np.asarray(experience.rollout.mask)]), rtol=1e-5)
    assert values[-1] < 0.7 * values[0]


def test_metrics_tell_lengths_and_how_many_completions_were_cut():
    state, prompts = state_of(MOMENTUM, reference=True), prompts_of(0)
    rollout = compiled_collect()(state, prompts).rollout
    _, metrics = compiled_step()(state, prompts)
    numbers = statistics.summary(metrics)
    tokens = np.asarray(rollout.tokens).reshape(-1, SIZES["max_tokens"]).tolist()
    lengths = [row.index(EOS) + 1 if EOS in row else len(row) for row in tokens]
    np.testing.assert_allclose(numbers["length"], np.mean(lengths), rtol=1e-6)
    assert numbers["length_max"] == max(lengths)
    np.testing.assert_allclose(numbers["truncated"], np.mean([EOS not in row for row in tokens]))
    assert 0 < numbers["truncated"] < 1
    assert all(np.shape(x) == () for x in numbers.values())


def watched(widths):
    """The policy, which notes how many prompts it reads at a time whenever that is traced."""

    def prefill(params, tokens, lengths):
        widths.append(len(tokens))
        return POLICY.prefill(params, tokens, lengths)

    return POLICY._replace(prefill=prefill, forward=None)


def test_the_old_policy_is_scored_in_as_many_parts_as_asked_for_to_the_same_numbers():
    state, prompts = state_of(MOMENTUM), prompts_of(1)
    B, widths = len(prompts.lengths), []
    policy = watched(widths)

    def collect(parts):
        return make_collect(policy, sampling.sampler(**SIZES), score_old=True, score_parts=parts)(state, prompts)

    whole, parted = collect(1), collect(B // 2)
    assert widths == [B, B, 2]  # the sampler, traced once, and the two scorings
    np.testing.assert_allclose(parted.old_log_probs, whole.old_log_probs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(parted.old_entropy, whole.old_entropy, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=rf"{B} prompts do not divide into 3 parts, minibatches times micro_batches"):
        collect(3)


def test_a_step_scores_the_old_policy_in_parts_of_its_micro_batches():
    state, prompts, widths = state_of(MOMENTUM), prompts_of(1), []
    settings = {"reward": even_tokens, "loss": grpo(), "score_old": True, "updates": Updates(micro_batches=2)}
    jax.eval_shape(make_train_step(watched(widths), MOMENTUM, sampling.sampler(**SIZES), **settings), state, prompts)
    B = len(prompts.lengths)
    assert set(widths) == {B, B // 2}
    assert widths.count(B) == 1  # by the sampler alone


def test_host_rewards_go_between_the_two_halves():
    state, prompts = state_of(MOMENTUM, reference=True), prompts_of(1)
    whole, _ = compiled_step()(state, prompts)
    experience = compiled_collect()(state, prompts)
    assert experience.rewards is None
    rewards, given = even_tokens(experience.rollout)
    experience = experience._replace(rewards=rewards, reward_mask=given)
    learn = make_learn(
        POLICY, MOMENTUM, loss=grpo(penalty=k3(0.1)), advantage=from_rewards(), updates=Updates(minibatches=2)
    )
    halves, _ = jax.jit(learn)(state, experience)
    assert_close(halves.params, whole.params)


# -------------------------------------------------------------------------------- refusals


def test_a_group_of_one_is_refused_by_what_compares_and_by_nothing_else():
    sizes = SIZES | {"group_size": 1}
    step = make_train_step(POLICY, PLAIN, sampling.sampler(**sizes), reward=even_tokens, loss=grpo())
    with pytest.raises(ValueError, match=r"at least 2 completions, got rewards of shape \(\d+, 1\)"):
        step(state_of(PLAIN), experience_of().rollout.prompts)
    batch = from_rewards(batch_normalised_advantages)
    step = make_train_step(POLICY, PLAIN, sampling.sampler(**sizes), reward=even_tokens, loss=grpo(), advantage=batch)
    jax.eval_shape(step, state_of(PLAIN), experience_of().rollout.prompts)


@pytest.mark.parametrize("setting", ["iterations", "minibatches", "micro_batches"])
def test_refuses_fewer_than_one_update_or_part(setting):
    with pytest.raises(ValueError, match=r"at least 1, got (0, 1 and 1|1, 0 and 1|1, 1 and 0)"):
        Updates(**{setting: 0})


def test_refuses_a_batch_that_does_not_divide_and_tells_the_numbers():
    optimizer = optax.sgd(1.0)
    learn = make_learn(
        POLICY, optimizer, loss=grpo(), advantage=from_rewards(), updates=Updates(minibatches=2, micro_batches=3)
    )
    with pytest.raises(ValueError, match=r"8 prompts do not divide into 2 minibatches of 3 .* multiple of 6"):
        learn(state_of(optimizer), experience_of())


def test_what_is_missing_from_an_experience_is_said():
    state, experience = state_of(PLAIN), experience_of()._replace(rewards=None, reward_mask=None)
    with pytest.raises(ValueError, match="the experience has no rewards"):
        make_learn(POLICY, PLAIN, loss=grpo(), advantage=from_rewards())(state, experience)
    with pytest.raises(ValueError, match="needs advantages"):
        make_learn(POLICY, PLAIN, loss=grpo())(state, experience)


@pytest.mark.parametrize("updates", [Updates(micro_batches=2), Updates(minibatches=2)])
def test_refuses_a_metric_that_parts_cannot_be_merged_into_and_names_it(updates):
    def loss(scores, experience):
        terms, metrics = sft()(scores, experience)
        return terms, metrics | {"typical": jnp.median(scores.log_probs)}

    optimizer = optax.sgd(1.0)
    with pytest.raises(TypeError, match=r"typical.* is neither a Mean nor a Max"):
        make_learn(POLICY, optimizer, loss=loss, updates=updates)(state_of(optimizer), experience_of())


def test_means_and_maxima_merge_as_if_they_had_never_been_parts():
    parts = {"a": Mean(jnp.array([1.0, 5.0]), jnp.array([1, 3])), "b": Max(jnp.array([2.0, -7.0]))}
    assert statistics.summary(statistics.merge(parts)) == {"a": 1.5, "b": 2.0}
    assert statistics.summary({"nothing": Mean(jnp.float32(0), jnp.int32(0)), "number": jnp.float32(3)}) == {
        "nothing": 0.0,
        "number": 3.0,
    }


def test_the_keys_of_a_step_are_functions_of_the_run_and_the_step_alone():
    state = state_of(optax.sgd(1.0))
    keys = [np.asarray(jax.random.key_data(jnp.stack(step_keys(state._replace(step=jnp.int32(n)))))) for n in (4, 4, 5)]
    np.testing.assert_array_equal(keys[0], keys[1])
    assert len({key.tobytes() for key in np.concatenate([keys[0], keys[2]])}) == 4
