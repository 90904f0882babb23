"""Hooks before the split, against their definitions in NumPy, and what they do to a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.losses import k3, token_mean
from grpo_jax.policies import from_logits_fn
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_collect, make_learn, make_train_step
from grpo_jax.transforms import (
    clip_cov,
    drop_weightless,
    environment_tokens,
    high_covariance,
    mask_truncated,
    mask_zero_variance_groups,
    old_from_sampler,
    reward_variance,
    second_moment,
    share_tokens,
    top_entropy,
)
from grpo_jax.types import Experience, Rollout, Scores
from grpo_jax.updates import Updates, init_state

V, B, G, T = 9, 4, 3, 5


def bigram(params, tokens, mask):
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def experience_of(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, G))
    lengths[0, 0] = T
    mask = np.arange(T) < lengths[..., None]
    numbers = [jnp.asarray(np.where(mask, x, 0.0), jnp.float32) for x in rng.normal(size=(4, B, G, T))]
    tokens = jnp.asarray(np.where(mask, rng.integers(0, V, mask.shape), 0), jnp.int32)
    rollout = Rollout(
        random_prompts(seed, B, 3, V), tokens, jnp.asarray(lengths), jnp.asarray(mask), numbers[0], lengths == T
    )
    return Experience(
        rollout,
        rewards=jnp.asarray(rng.normal(size=(B, G, 1)), jnp.float32),
        reward_mask=jnp.ones((B, G, 1), bool),
        old_log_probs=-jnp.abs(numbers[1]),
        ref_log_probs=-jnp.abs(numbers[2]),
        advantages=jnp.asarray(rng.normal(size=(B, G)), jnp.float32),
        old_entropy=jnp.abs(numbers[3]),
    )


def test_truncated_completions_leave_numerator_and_denominator_and_stay_in_the_baseline():
    experience = experience_of()
    masked, metrics = mask_truncated(experience)
    truncated = np.asarray(experience.rollout.truncated)
    assert 0 < truncated.sum() < truncated.size
    np.testing.assert_array_equal(masked.rollout.mask, experience.rollout.mask & ~truncated[..., None])
    assert metrics == {}
    counts = token_mean(jnp.ones((B, G, T)), masked.rollout.mask)
    assert counts.sum == counts.count == experience.rollout.lengths[~truncated].sum()

    def learn(transforms):
        state = init_state(POLICY.init(jax.random.key(0)), optax.sgd(1.0), jax.random.key(0))
        learn = make_learn(POLICY, optax.sgd(1.0), loss=losses.dapo(), advantage=recorded, transforms=transforms)
        return learn(state, experience)

    seen = []

    def recorded(experience):
        seen.append(np.asarray(experience.rewards))
        return experience.rewards[..., 0], {}

    moved, plain = learn((mask_truncated,))[0].params["table"], learn(())[0].params["table"]
    assert np.abs(moved - plain).max() > 1e-3
    np.testing.assert_array_equal(seen[0], experience.rewards)


def test_groups_of_equal_rewards_leave_the_loss():
    experience = experience_of()
    experience = experience._replace(advantages=experience.advantages.at[1].set(0.0))
    masked, _ = mask_zero_variance_groups(experience)
    expected = np.array(experience.rollout.mask)
    expected[1] = False
    np.testing.assert_array_equal(masked.rollout.mask, expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_tokens_of_highest_entropy_are_those_of_the_quantile_of_all_that_count(share):
    experience = experience_of()
    mask, entropy = np.asarray(experience.rollout.mask), np.asarray(experience.old_entropy)
    found, metrics = jax.jit(top_entropy(share))(experience)
    threshold = np.quantile(entropy[mask], 1 - share)
    np.testing.assert_allclose(metrics["entropy_threshold"], threshold, rtol=1e-6)
    kept = np.asarray(found.weights)[mask]
    ranked = np.sort(entropy[mask])
    np.testing.assert_array_equal(kept, entropy[mask] >= ranked[np.searchsorted(ranked, threshold - 1e-6)])
    assert abs(kept.mean() - share) <= 1 / mask.sum() + 1e-6


def test_what_padding_holds_is_no_entropy():
    experience = experience_of()
    mask = experience.rollout.mask
    spoiled = experience._replace(old_entropy=jnp.where(mask, experience.old_entropy, 99.0))
    np.testing.assert_array_equal(
        np.where(mask, top_entropy(0.3)(experience)[0].weights, 0),
        np.where(mask, top_entropy(0.3)(spoiled)[0].weights, 0),
    )


def test_weights_scale_the_gain_alone_and_dropping_them_changes_denominator_and_penalty_too():
    experience = experience_of()
    scores = Scores(experience.rollout.log_probs)
    weighted, _ = top_entropy(0.4)(experience)
    dropped, _ = drop_weightless(weighted)
    loss = losses.dapo(penalty=k3(0.5))
    (of_all, kl_of_all), _ = loss(scores, experience)
    (of_weighted, kl_of_weighted), _ = loss(scores, weighted)
    (of_dropped, kl_of_dropped), _ = loss(scores, dropped)
    kept = int((weighted.weights * experience.rollout.mask).sum())
    assert of_weighted.count == of_all.count > of_dropped.count == kept
    np.testing.assert_allclose(of_weighted.sum, of_dropped.sum, rtol=1e-5)
    assert abs(of_all.sum - of_weighted.sum) > 1e-2
    assert kl_of_weighted == kl_of_all
    assert kl_of_dropped.count == kept


def test_weights_of_two_hooks_multiply():
    experience = experience_of()
    half = experience._replace(weights=jnp.full((B, G, T), 0.5))
    np.testing.assert_array_equal(
        top_entropy(0.3)(half)[0].weights, 0.5 * np.asarray(top_entropy(0.3)(experience)[0].weights)
    )


def test_ratios_against_the_sampler_are_those_of_its_own_log_probs():
    experience, metrics = old_from_sampler(experience_of())
    np.testing.assert_array_equal(experience.old_log_probs, experience.rollout.log_probs)
    assert metrics == {}


def test_over_the_rollout_every_update_divides_by_the_average_number_of_tokens():
    """As TRL's dapo does; `token_mean` divides each by its own."""
    experience, _ = share_tokens(experience_of(1))
    scores = Scores(experience.rollout.log_probs)
    parts = [jax.tree.map(lambda x, p=p: x[p], (scores, experience)) for p in (slice(0, 2), slice(2, 4))]
    tokens = [int(part[1].rollout.mask.sum()) for part in parts]
    assert tokens[0] != tokens[1]
    make = losses.normalize_by_rollout_tokens(lambda mean: losses.dapo(aggregate=mean))
    for part, own in zip(parts, tokens, strict=True):
        ours, plain = losses.value(make(*part)[0]), losses.value(losses.dapo()(*part)[0])
        np.testing.assert_allclose(ours, plain * own / (sum(tokens) / 2), rtol=1e-5)


def test_over_the_rollout_says_what_it_needs():
    experience = experience_of()
    with pytest.raises(ValueError, match="share_tokens"):
        losses.normalize_by_rollout_tokens(lambda mean: losses.dapo(aggregate=mean))(
            Scores(experience.old_log_probs), experience
        )


def test_hooks_run_once_in_their_order_before_the_split_and_their_metrics_are_reported():
    seen = []

    def note(name):
        def hook(experience):
            seen.append((name, experience.rollout.tokens.shape[0], experience.advantages is not None))
            return experience, {f"seen_{name}": jnp.asarray(len(seen))}

        return hook

    def reward(rollout):
        return rollout.lengths[..., None].astype(jnp.float32), jnp.ones((*rollout.lengths.shape, 1), bool)

    step = make_train_step(
        POLICY,
        optax.sgd(1.0),
        sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1,)),
        reward=reward,
        loss=losses.grpo(),
        transforms=(note("a"), top_entropy(0.5), note("b")),
        updates=Updates(minibatches=2),
    )
    state = init_state(POLICY.init(jax.random.key(0)), optax.sgd(1.0), jax.random.key(0))
    _, metrics = jax.jit(step)(state, random_prompts(0, B, 3, V))
    assert seen == [("a", B, True), ("b", B, True)]
    assert summary(metrics)["seen_b"] == 2
    assert 0 < summary(metrics)["entropy_threshold"] < np.log(V)


@pytest.mark.parametrize("score_old", [False, True])
def test_one_update_a_rollout_asks_for_the_old_entropy_and_gets_it_by_score_old(score_old):
    state = init_state(POLICY.init(jax.random.key(0)), optax.sgd(1.0), jax.random.key(0))
    collect = make_collect(POLICY, sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1,)), score_old=score_old)
    experience = collect(state, random_prompts(0, B, 3, V))
    if score_old:
        expected = -jnp.sum(jax.nn.softmax(state.params["table"]) * jax.nn.log_softmax(state.params["table"]), axis=-1)
        last = experience.rollout.prompts.tokens[jnp.arange(B), experience.rollout.prompts.lengths - 1]
        np.testing.assert_allclose(experience.old_entropy[..., 0], np.tile(expected[last][:, None], (1, G)), rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="score_old=True"):
            top_entropy(0.2)(experience)


def test_a_whole_step_with_one_update_scores_the_old_policy_where_it_is_told_to():
    def reward(rollout):
        return rollout.lengths[..., None].astype(jnp.float32), jnp.ones((*rollout.lengths.shape, 1), bool)

    def step(**settings):
        sampler, filters = sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1,)), (top_entropy(0.5),)
        make = make_train_step(
            POLICY, optax.sgd(1.0), sampler, reward=reward, loss=losses.grpo(), transforms=filters, **settings
        )
        state = init_state(POLICY.init(jax.random.key(0)), optax.sgd(1.0), jax.random.key(0))
        return jax.jit(make)(state, random_prompts(0, B, 3, V))[1]

    metrics = summary(step(score_old=True))
    assert 0 < metrics["entropy_threshold"] < np.log(V)
    np.testing.assert_allclose(metrics["ratio_max"], 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="score_old=True"):
        step()


@pytest.mark.parametrize("share", [0, -0.2, 1.5, float("nan")])
def test_refuses_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=f"^share is above 0 and at most 1, got {share}$"):
        top_entropy(share)


def test_refuses_to_drop_what_has_no_weights():
    with pytest.raises(ValueError, match="after a transform that makes weights"):
        drop_weightless(experience_of())


# ------------------------------------------------------- what needs the whole rollout


def covariance_of(experience):
    """Of each token that counts, in NumPy; `[N]`, and their places."""
    mask = np.asarray(experience.rollout.mask)
    log_probs = np.asarray(experience.old_log_probs, np.float64)[mask]
    advantages = np.broadcast_to(np.asarray(experience.advantages, np.float64)[..., None], mask.shape)[mask]
    return (log_probs - log_probs.mean()) * (advantages - advantages.mean()), mask


def test_clip_cov_takes_its_share_of_tokens_from_the_band_and_repeats_itself():
    experience = experience_of()
    covariance, mask = covariance_of(experience)
    low, high = np.quantile(covariance, [0.3, 0.9])
    within = (covariance > low) & (covariance < high)
    all_taken, metrics = clip_cov(1.0, low=float(low), high=float(high))(experience)
    np.testing.assert_array_equal(np.asarray(all_taken.weights)[mask], np.where(within, 0.0, 1.0))
    assert summary(metrics)["clip_cov"] == pytest.approx(within.mean())
    some = clip_cov(0.2, low=float(low), high=float(high))
    taken = np.asarray(some(experience)[0].weights) == 0
    assert taken.sum() == int(0.2 * mask.sum())
    assert not (taken & (np.asarray(all_taken.weights) == 1)).any()
    np.testing.assert_array_equal(taken, np.asarray(jax.jit(some)(experience)[0].weights) == 0)
    others = experience._replace(old_log_probs=experience.old_log_probs - 0.01)  # the same covariances
    assert (taken != (np.asarray(some(others)[0].weights) == 0)).any()
    nothing, _ = clip_cov(0.2, low=1e3, high=1e4)(experience)
    assert np.all(np.asarray(nothing.weights) == 1)


def test_clip_cov_keeps_the_weights_that_are_there():
    experience = experience_of()._replace(weights=jnp.full((B, G, T), 0.25))
    taken, _ = clip_cov(0.2, low=0.0)(experience)
    assert set(np.asarray(taken.weights).ravel().tolist()) == {0.0, 0.25}


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_high_covariance_marks_the_largest(share):
    experience = experience_of()
    covariance, mask = covariance_of(experience)
    marked, _ = high_covariance(share)(experience)
    count = max(1, int(share * len(covariance)))
    expected = covariance >= np.sort(covariance)[-count]
    np.testing.assert_array_equal(np.asarray(marked.high_covariance)[mask], expected)
    assert not np.asarray(marked.high_covariance)[~mask].any()


def by_areal_rule(square, threshold):
    """Tokens that stay, written from AReaL's: the largest leave one by one until the mean of the rest is below."""
    kept = list(np.argsort(square, kind="stable"))
    while len(kept) > 1 and np.mean(square[kept]) >= threshold:
        kept.pop()
    return np.isin(np.arange(len(square)), kept)


@pytest.mark.parametrize("threshold", [1e-3, 0.3, 1.0, 100.0])
def test_second_moment_leaves_out_the_fewest_tokens(threshold):
    experience = experience_of()
    mask = np.asarray(experience.rollout.mask)
    square = np.asarray(experience.old_log_probs - experience.rollout.log_probs, np.float64)[mask] ** 2
    actual, metrics = second_moment(threshold)(experience)
    np.testing.assert_array_equal(np.asarray(actual.weights)[mask] == 1, by_areal_rule(square, threshold))
    assert summary(metrics)["second_moment"] == pytest.approx(square.mean(), rel=1e-6)


def test_second_moment_leaves_out_some_of_tokens_that_have_drifted_alike():
    """As in bfloat16, whose log-probs differ by whole steps."""
    experience = experience_of()
    mask = np.asarray(experience.rollout.mask)
    square = np.where(np.arange(mask.sum()) % 2, 0.25, 0.0)
    sampled, old = np.full((2, *mask.shape), -1.0, np.float32)
    old[mask] += np.sqrt(square)
    rollout = experience.rollout._replace(log_probs=jnp.asarray(sampled))
    actual, _ = second_moment(0.06)(experience._replace(rollout=rollout, old_log_probs=jnp.asarray(old)))
    kept = np.asarray(actual.weights)[mask] == 1
    assert square[kept].mean() < 0.06
    np.testing.assert_array_equal(kept, by_areal_rule(square, 0.06))


def by_top_share(variances, share):
    """RAGEN-2's rule in plain Python."""
    kept, total = set(), 0.0
    for b in sorted(range(len(variances)), key=lambda b: (-variances[b], b)):
        if variances[b] > 0 and total < share * sum(variances):
            kept.add(b)
            total += variances[b]
    return [b in kept for b in range(len(variances))]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_reward_variance_keeps_the_groups_that_carry_their_share(share):
    experience = experience_of()
    rewards = np.asarray(experience.rewards).copy()
    rewards[2] = 1.1  # a group without variance
    rewards[3] = rewards[1]  # a tie
    given = np.ones(rewards.shape, bool)
    given[0, 1] = False
    experience = experience._replace(rewards=jnp.asarray(rewards), reward_mask=jnp.asarray(given))
    variances = [np.var(np.asarray(rewards, np.float64)[b, given[b, :, 0], 0]) for b in range(B)]
    variances[2] = 0.0
    expected = by_top_share(variances, share)
    actual, metrics = reward_variance(share)(experience)
    kept = np.asarray(actual.rollout.mask).any((1, 2))
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(actual.rollout.mask, experience.rollout.mask & kept[:, None, None])
    assert summary(metrics)["kept_groups"] == pytest.approx(np.mean(expected))


def test_all_of_the_variance_is_that_of_small_rewards_too():
    experience = experience_of()
    rewards = np.zeros((B, G, 1), np.float32)
    rewards[:, 0, 0] = [1.0, 1e-4, 0.0, 3e-5]  # in float32 the variances of the last do not change the sum
    kept = reward_variance(1.0)(experience._replace(rewards=jnp.asarray(rewards)))[0].rollout.mask.any((1, 2))
    np.testing.assert_array_equal(kept, [True, True, False, True])


@pytest.mark.parametrize("scale", [1e20, 1e-25], ids=str)
def test_the_share_of_the_variance_is_that_of_rewards_of_any_size(scale):
    experience = experience_of()
    of_size, plain = (
        reward_variance(0.7)(experience._replace(rewards=experience.rewards * x))[0].rollout.mask.any((1, 2))
        for x in (scale, 1.0)
    )
    assert 0 < plain.sum() < B
    np.testing.assert_array_equal(of_size, plain)


def test_what_the_advantages_of_padding_hold_makes_no_group_vary():
    experience = experience_of()
    mask = experience.rollout.mask
    advantages = jnp.where(mask, 0.0, jnp.nan).at[1].set(1.0)
    kept = mask_zero_variance_groups(experience._replace(advantages=advantages))[0].rollout.mask.any((1, 2))
    np.testing.assert_array_equal(kept, np.arange(B) == 1)


def test_reward_variance_keeps_a_group_whose_rewards_are_no_numbers_so_that_its_update_is_refused():
    experience = experience_of()
    whole, broken = (
        reward_variance(0.5)(experience._replace(rewards=rewards))[0].rollout.mask.any((1, 2))
        for rewards in (experience.rewards.at[0].set(0.0), experience.rewards.at[0, 1].set(jnp.nan))
    )
    np.testing.assert_array_equal(broken, whole.at[0].set(True))


def test_reward_variance_is_of_the_weighted_sum():
    experience = experience_of()
    rewards = jnp.concatenate([experience.rewards, jnp.zeros((B, G, 1)).at[1, 0].set(100.0)], -1)
    experience = experience._replace(rewards=rewards, reward_mask=jnp.ones(rewards.shape, bool))
    kept = [
        np.asarray(reward_variance(0.5, weights=weights)(experience)[0].rollout.mask).any((1, 2))
        for weights in (None, (1.0, 0.0))
    ]
    np.testing.assert_array_equal(kept[0], [False, True, False, False])
    assert (kept[0] != kept[1]).any()


@pytest.mark.parametrize(
    ("make", "missing", "message"),
    [
        (clip_cov, {"old_log_probs": None}, "clip_cov needs old_log_probs"),
        (clip_cov, {"advantages": None}, "clip_cov needs advantages"),
        (high_covariance, {"old_log_probs": None}, "high_covariance needs old_log_probs"),
        (second_moment, {"old_log_probs": None}, "second_moment needs old_log_probs"),
        (reward_variance, {"rewards": None}, "no rewards"),
    ],
)
def test_a_transform_without_what_it_needs_says_what_to_do(make, missing, message):
    with pytest.raises(ValueError, match=message):
        make()(experience_of()._replace(**missing))


@pytest.mark.parametrize("make", [clip_cov, high_covariance, reward_variance])
@pytest.mark.parametrize("share", [0, 1.5, -0.1])
def test_a_share_of_tokens_or_variance_is_from_0_to_1(make, share):
    with pytest.raises(ValueError, match=f"share is above 0 and at most 1, got {share}"):
        make(share)


def test_refuses_an_empty_band_and_a_threshold_of_0():
    with pytest.raises(ValueError, match=r"low is below high = 5\.0, got 6"):
        clip_cov(low=6)
    with pytest.raises(ValueError, match="threshold is above 0, got 0"):
        second_moment(0)


def test_the_tokens_of_the_environment_are_those_that_the_mask_of_a_conversation_leaves_out():
    experience = experience_of()
    rollout = experience.rollout._replace(lengths=jnp.full((B, G), 4))
    mask = np.zeros((B, G, T), bool)
    mask[..., 0], mask[..., 3] = True, True
    mask[1, 2] = False  # the environment failed
    read, metrics = environment_tokens(experience._replace(rollout=rollout._replace(mask=jnp.asarray(mask))))
    expected = np.zeros((B, G, T), bool)
    expected[..., 1:3] = True
    expected[1, 2] = False
    np.testing.assert_array_equal(read.environment_mask, expected)
    assert metrics == {}
    np.testing.assert_array_equal(read.rollout.mask, mask)


def test_echo_learns_what_others_wrote_where_the_policy_has_nothing_to_learn():
    """All rewards are equal, so that the policy's own tokens are masked."""
    experience = experience_of()
    rollout = experience.rollout._replace(mask=experience.rollout.mask & (jnp.arange(T) != 1))
    experience = experience._replace(rollout=rollout, old_log_probs=None, advantages=jnp.zeros((B, G)))
    optimizer = optax.sgd(1.0)
    state = init_state(POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0))

    loss, transforms = losses.plus(losses.dapo(), losses.echo(1.0)), (environment_tokens, mask_zero_variance_groups)
    learn = jax.jit(make_learn(POLICY, optimizer, loss=loss, transforms=transforms))
    after, metrics = learn(state, experience)
    assert np.any(after.params["table"] != state.params["table"])
    assert summary(learn(after, experience)[1])["echo"] < summary(metrics)["echo"]
