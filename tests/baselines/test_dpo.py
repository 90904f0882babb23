"""DPO against its formula in NumPy, pairs against plain Python, and both as a step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import data, losses, packing, sampling, statistics
from grpo_jax.baselines import preferences
from grpo_jax.baselines.dpo import dpo
from grpo_jax.policies import from_logits_fn
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.types import Experience, Rollout, Scores
from grpo_jax.updates import Updates, init_state

V, EOS = 9, 1
SIZES = {"group_size": 6, "max_tokens": 5, "eos_ids": (EOS,)}


def bigram(params, tokens, mask):
    """Logits of the next token that depend on the last one alone."""
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def even_tokens(rollout):
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


def experience_of(seed=0, B=6, G=2, T=4):
    """Unequal lengths; in pair 1 the chosen completion has no token that counts, in 4 neither has."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    mask[1, 0], mask[4] = False, False
    rollout = Rollout(
        random_prompts(seed, B, 3, V),
        jnp.asarray(np.where(mask, rng.integers(0, V, (B, G, T)), 0), jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(mask),
        jnp.asarray(rng.normal(size=(B, G, T)), jnp.float32),
        jnp.asarray(rng.random((B, G)) < 0.5),
    )
    ref = score(POLICY, POLICY.init(jax.random.key(seed + 99)), rollout).log_probs
    return Experience(rollout, ref_log_probs=ref)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_matches_equation_7_in_numpy(transform, label_smoothing):
    experience, beta = experience_of(), 0.7
    log_probs = score(POLICY, POLICY.init(jax.random.key(3)), experience.rollout).log_probs
    costs, margins, chosen = [], [], []
    for b in (0, 2, 3, 5):
        gain = np.where(
            experience.rollout.mask[b], np.float64(log_probs[b]) - np.float64(experience.ref_log_probs[b]), 0
        )
        margin = beta * (gain[0].sum() - gain[1].sum())
        right = 1 / (1 + np.exp(-margin))
        costs.append(-(1 - label_smoothing) * np.log(right) - label_smoothing * np.log(1 - right))
        margins.append(margin)
        chosen.append(beta * gain[0].sum())
    terms, metrics = transform(dpo(beta=beta, label_smoothing=label_smoothing))(Scores(log_probs), experience)
    np.testing.assert_allclose(losses.value(terms), np.mean(costs), rtol=1e-5)
    expected = {
        "accuracy": np.mean(np.array(margins) > 0),
        "margin": np.mean(margins),
        "chosen_reward": np.mean(chosen),
    }
    expected["rejected_reward"] = expected["chosen_reward"] - expected["margin"]
    assert_close({name: float(x) for name, x in statistics.summary(metrics).items()}, expected)
    assert 0 < expected["accuracy"] < 1


def test_equal_policies_have_a_loss_of_log_2():
    experience = experience_of()
    terms, metrics = dpo(beta=0.3)(Scores(experience.ref_log_probs), experience)
    np.testing.assert_allclose(losses.value(terms), np.log(2), rtol=1e-6)
    assert statistics.summary(metrics)["margin"] == 0


def test_the_gradient_is_that_of_finite_differences():
    experience = experience_of()
    log_probs = score(POLICY, POLICY.init(jax.random.key(1)), experience.rollout).log_probs
    loss = dpo(beta=0.7, label_smoothing=0.1)
    chex.assert_numerical_grads(
        lambda x: losses.value(loss(Scores(x), experience)[0]), (log_probs,), order=1, atol=2e-2, rtol=2e-2
    )


def test_what_does_not_count_changes_neither_loss_nor_gradient_whatever_it_holds():
    experience = experience_of()
    log_probs = score(POLICY, POLICY.init(jax.random.key(1)), experience.rollout).log_probs
    counted = experience.rollout.mask & preferences.whole_pairs(experience)[:, None, None]

    @jax.value_and_grad
    def value(log_probs, ref_log_probs):
        return losses.value(dpo()(Scores(log_probs), experience._replace(ref_log_probs=ref_log_probs))[0])

    expected, slope = value(log_probs, experience.ref_log_probs)
    for junk in (jnp.nan, -jnp.inf, 1e30):
        spoilt = [jnp.where(counted, x, junk) for x in (log_probs, -experience.ref_log_probs)]
        spoilt_value, spoilt_slope = value(spoilt[0], jnp.where(counted, experience.ref_log_probs, junk))
        np.testing.assert_array_equal(spoilt_value, expected)
        np.testing.assert_array_equal(spoilt_slope, slope)
    assert np.all(np.asarray(slope)[~np.asarray(counted)] == 0)
    assert np.any(slope != 0)


def test_no_pair_that_counts_is_a_loss_of_0_and_no_update():
    experience, optimizer = experience_of(), optax.adamw(0.1)
    experience = experience._replace(rollout=experience.rollout._replace(mask=jnp.zeros_like(experience.rollout.mask)))
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0), reference=True)
    after, metrics = make_learn(POLICY, optimizer, loss=dpo())(state, experience)
    assert_close(after.params, state.params, rtol=0, atol=0)
    assert after.skipped == 0
    assert statistics.summary(metrics)["loss"] == 0


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_any_number_of_micro_batches_gives_the_same_update_and_metrics(micro_batches):
    """The pairs without a token that counts are not spread evenly over the parts."""
    optimizer, experience = optax.sgd(1.0), experience_of()
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0))
    settings = [Updates(), Updates(micro_batches=micro_batches)]
    whole, parts = (jax.jit(make_learn(POLICY, optimizer, loss=dpo(), updates=s))(state, experience) for s in settings)
    assert np.abs(np.asarray(whole[0].params["table"] - state.params["table"])).max() > 1e-3
    assert_close(parts[0].params, whole[0].params)
    assert_close(statistics.summary(parts[1]), statistics.summary(whole[1]))


def test_beta_and_label_smoothing_may_be_traced():
    experience = experience_of()
    scores = score(POLICY, POLICY.init(jax.random.key(1)), experience.rollout)

    def value(beta, label_smoothing):
        return losses.value(dpo(beta=beta, label_smoothing=label_smoothing)(scores, experience)[0])

    traced = jax.jit(jax.vmap(value))(jnp.array([0.1, 0.9, 0.1]), jnp.array([0.0, 0.0, 0.3]))
    np.testing.assert_allclose(traced, [value(0.1, 0.0), value(0.9, 0.0), value(0.1, 0.3)], rtol=1e-5)
    assert len(set(np.asarray(traced).tolist())) == 3


def test_refuses_what_it_cannot_use_and_names_it():
    experience = experience_of()
    with pytest.raises(ValueError, match="beta is above 0, got 0"):
        dpo(beta=0)
    with pytest.raises(ValueError, match=r"label_smoothing is at least 0 and below 0.5, got 0.5"):
        dpo(label_smoothing=0.5)
    with pytest.raises(ValueError, match="reference=True"):
        dpo()(Scores(experience.ref_log_probs), experience._replace(ref_log_probs=None))
    three = experience_of(G=3)
    with pytest.raises(ValueError, match=r"2 completions, got a mask of shape \(6, 3, 4\)"):
        dpo()(Scores(three.ref_log_probs), three)


# --------------------------------------------------------------------------------- the pairs


def scored_experience():
    """Groups of four, whose rewards are from a few values so that there are ties; some without any."""
    experience, rng = experience_of(B=8, G=4), np.random.default_rng(3)
    rollout = experience.rollout._replace(mask=jnp.arange(4) < experience.rollout.lengths[..., None])
    rewards = rng.integers(0, 4, (8, 4, 2)).astype(np.float32)
    given = np.ones((8, 4, 2), bool)
    rewards[0] = 2.0  # no spread
    given[1], given[2, 1:], given[3, 0] = False, False, False  # none, one and three with a reward
    rewards[4, 2] = np.nan
    return experience._replace(
        rollout=rollout,
        rewards=jnp.asarray(rewards),
        reward_mask=jnp.asarray(given),
        advantages=jnp.asarray(rewards[..., 0]),
    )


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_pairs_are_the_best_and_the_worst_of_each_group(transform):
    experience, weights = scored_experience(), (1.0, 0.5)
    experience = experience._replace(packing=packing.pack(experience.rollout, multiple=1), token_share=jnp.ones(8))
    paired = transform(lambda e: preferences.pairs(e, weights=weights))(experience)
    assert (paired.packing, paired.token_share) == (None, None)
    seen = 0
    for b in range(8):
        total = {
            g: float(experience.rewards[b, g] @ jnp.array(weights))
            for g in range(4)
            if experience.reward_mask[b, g].all() and not np.isnan(experience.rewards[b, g]).any()
        }
        if len(set(total.values())) < 2:
            assert not paired.rollout.mask[b].any()
            continue
        chosen, rejected = max(total, key=total.get), min(total, key=total.get)
        for place, g in enumerate((chosen, rejected)):
            rollout = paired.rollout
            for name in ("tokens", "lengths", "mask", "log_probs", "truncated"):
                np.testing.assert_array_equal(getattr(rollout, name)[b, place], getattr(experience.rollout, name)[b, g])
            for name in ("rewards", "reward_mask", "ref_log_probs", "advantages"):
                np.testing.assert_array_equal(getattr(paired, name)[b, place], getattr(experience, name)[b, g])
        seen += 1
    assert seen == 5
    chex.assert_trees_all_equal(paired.rollout.prompts, experience.rollout.prompts)


def test_a_completion_without_a_token_that_counts_is_in_no_pair():
    experience = scored_experience()
    best = preferences.pairs(experience).rewards[5, 0]
    is_best = jnp.all(experience.rewards[5] == best, axis=-1)
    mask = experience.rollout.mask.at[5].set(experience.rollout.mask[5] & ~is_best[:, None])
    without = preferences.pairs(experience._replace(rollout=experience.rollout._replace(mask=mask)))
    assert without.rewards[5, 0].sum() < best.sum()
    assert without.rollout.mask[5].any()


def test_refuses_groups_of_one():
    rollout = experience_of(G=1).rollout
    rewards, given = even_tokens(rollout)
    with pytest.raises(ValueError, match=r"at least 2 completions, got rewards of shape \(6, 1\)"):
        preferences.pairs(Experience(rollout, rewards, given))


# -------------------------------------------------------------------------------- the steps


def test_online_dpo_raises_the_reward_in_one_program():
    optimizer = optax.adam(0.1)
    collect = make_collect(POLICY, sampling.sampler(**SIZES), reward=even_tokens)
    learn = make_learn(POLICY, optimizer, loss=dpo(beta=0.5))

    def step(state, prompts):
        experience = collect(state, prompts)
        state, metrics = learn(state, preferences.pairs(experience))
        return state, metrics | {"reward": jnp.mean(experience.rewards)}

    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step, n=1))
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0), reference=True)
    rewards = []
    for seed in range(15):
        state, metrics = step(state, random_prompts(seed, 16, 3, V))
        rewards.append(float(metrics["reward"]))
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.25
    assert state.skipped == 0


def test_offline_dpo_learns_the_pairs_that_were_given():
    prompts = [[2, 3], [4], [5, 6, 7], [8]]
    chosen = data.make_demonstrations(prompts, [[2, EOS], [4, 4, EOS], [6, EOS], [8, EOS]], max_tokens=3)
    rejected = data.make_demonstrations(prompts, [[3, EOS], [5, EOS], [7, 7, EOS], [3, EOS]], max_tokens=3)
    experience = preferences.from_demonstrations(chosen, rejected)
    np.testing.assert_array_equal(experience.rollout.tokens[:, 0], chosen.tokens[:, 0])
    np.testing.assert_array_equal(experience.rollout.lengths, [[2, 2], [3, 2], [2, 3], [2, 2]])
    optimizer = optax.adam(0.1)
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0), reference=True)
    learn, seen = jax.jit(make_learn(POLICY, optimizer, loss=dpo())), []
    for _ in range(20):
        state, metrics = learn(state, experience)
        seen.append(statistics.summary(metrics))
    np.testing.assert_allclose(seen[0]["loss"], np.log(2), rtol=1e-5)
    assert seen[-1]["loss"] < 0.5
    assert seen[-1]["accuracy"] == 1

    narrow = data.make_demonstrations(prompts, [[3], [5], [7], [3]])
    with pytest.raises(ValueError, match=r"got \(4, 1, 3\) and \(4, 1, 1\)"):
        preferences.from_demonstrations(chosen, narrow)
    of_others = data.make_demonstrations(prompts[::-1], [[3, EOS], [5, EOS], [7, 7, EOS], [3, EOS]], max_tokens=3)
    with pytest.raises(ValueError, match="of the same prompts, in one order; these are of others"):
        preferences.from_demonstrations(chosen, of_others)
