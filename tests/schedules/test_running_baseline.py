"""Baselines kept from step to step, against their rules in plain Python, and what a restart does to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.policies import from_logits_fn
from grpo_jax.run import checkpoint
from grpo_jax.schedules import Scheduled, running_advantages, running_baseline
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Experience, Prompts, Rollout
from grpo_jax.updates import init_state

V = 9
POLICY = from_logits_fn(
    lambda params, tokens, mask: params["table"][tokens], init=lambda key: {"table": jax.random.normal(key, (V, V))}
)


def rows_of(experience):
    return experience.rollout.prompts.info


def experience_of(rewards, rows, given=None):
    """Rewards `[B, G]` of these rows."""
    rewards = jnp.asarray(rewards, jnp.float32)
    given = jnp.ones(rewards.shape, bool) if given is None else jnp.asarray(given)
    B, G = rewards.shape
    empty = jnp.zeros((B, G, 1))
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32), jnp.asarray(rows))
    rollout = Rollout(prompts, empty, empty[..., 0], empty > 0, empty, empty[..., 0] > 0)
    return Experience(rollout, rewards=rewards[..., None], reward_mask=given[..., None])


STEPS = [  # rewards of two prompts, which rows they are, and one that is not given
    ([[1.0, 0.0], [1.0, 1.0]], [3, 0], [[True, True], [True, True]]),
    ([[0.0, 0.0], [1.0, 0.0]], [3, 1], [[True, False], [True, True]]),
    ([[1.0, 1.0], [0.0, 1.0]], [0, 0], [[True, True], [True, True]]),  # one row twice
]


def test_spo_is_a_beta_that_forgets():
    """Alpha and beta of the paper, one prompt at a time."""
    alpha, beta = np.full(4, 1.5), np.full(4, 0.5)
    running = running_baseline.init(4, value=0.75, count=2.0)
    for rewards, rows, given in STEPS:
        np.testing.assert_allclose(running_baseline.baseline(running), alpha / (alpha + beta), rtol=1e-6)
        distance = np.asarray(rewards) - (alpha / (alpha + beta))[rows][:, None]
        kept = distance[np.asarray(given)]
        expected = np.where(given, (distance - kept.mean()) / (kept.std() + 1e-4), 0.0)
        experience = experience_of(rewards, rows, given)
        advantages, metrics = running_baseline.spo(running, rows_of)(experience)
        np.testing.assert_allclose(advantages, expected, atol=1e-5)
        assert "reward" in metrics
        running = running_baseline.observe(running, experience, rows_of, decay=0.9)
        for row in set(rows):
            seen = [
                r
                for row_, of_one, mask in zip(rows, rewards, given, strict=True)
                for r, kept in zip(of_one, mask, strict=True)
                if row_ == row and kept
            ]
            alpha[row] = 0.9 * alpha[row] + sum(seen)
            beta[row] = 0.9 * beta[row] + len(seen) - sum(seen)
    np.testing.assert_allclose(running_baseline.baseline(running), alpha / (alpha + beta), rtol=1e-6)
    assert running_baseline.baseline(running)[2] == 0.75  # never seen


@pytest.mark.parametrize("move", [running_baseline.observe, running_baseline.follow])
def test_a_reward_that_is_no_number_is_left_out_of_its_baseline(move):
    running = running_baseline.init(2)
    spoilt = experience_of([[1.0, np.nan], [np.inf, np.nan]], [0, 1])
    moved = move(running, spoilt, rows_of, decay=0.5)
    whole = move(running, experience_of([[1.0, 9.0]], [0], [[True, False]]), rows_of, decay=0.5)
    jax.tree.map(np.testing.assert_array_equal, moved, whole)


def test_rewards_that_are_what_was_expected_have_no_advantages_of_rounding():
    """Baselines of 0.9 that were seen one to eight times differ in their last bit."""
    running, rewards = running_baseline.init(8), np.full((8, 8), 0.9)
    observe = jax.jit(lambda running, seen: running_baseline.observe(running, seen, rows_of, decay=0.9))
    for seen in np.tri(8, dtype=bool).T:
        running = observe(running, experience_of(rewards, list(range(8)), np.broadcast_to(seen[:, None], (8, 8))))
    assert len(set(running_baseline.baseline(running).tolist())) > 1
    spo = jax.jit(lambda running, experience: running_baseline.spo(running, rows_of)(experience)[0])
    advantages = spo(running, experience_of(rewards, list(range(8))))
    assert np.max(np.abs(advantages)) < 0.01


def test_rae_is_an_exponential_average_per_role():
    expected = {0: 0.0, 1: 0.0}
    running = running_baseline.init(2)
    for rewards, roles in (([[1.0], [-1.0]], [0, 1]), ([[1.0], [0.5]], [0, 0]), ([[-1.0], [1.0]], [1, 0])):
        experience = experience_of(rewards, roles)
        advantages, _ = running_baseline.rae(running, rows_of)(experience)
        distances = [r[0] - expected[role] for r, role in zip(rewards, roles, strict=True)]
        np.testing.assert_allclose(advantages[:, 0], distances, rtol=1e-6)
        running = running_baseline.follow(running, experience, rows_of, decay=0.8)
        for role in set(roles):
            seen = [r[0] for r, other in zip(rewards, roles, strict=True) if other == role]
            expected[role] = 0.8 * expected[role] + 0.2 * sum(seen) / len(seen)
        np.testing.assert_allclose(running_baseline.baseline(running), list(expected.values()), rtol=1e-6)


def test_a_decay_of_1_is_the_mean_of_all_rewards():
    running = running_baseline.init(1)
    rewards = np.random.default_rng(0).normal(size=(5, 1, 3))
    for of_step in rewards:
        running = running_baseline.observe(running, experience_of(of_step, [0]), rows_of, decay=1.0)
    np.testing.assert_allclose(running_baseline.baseline(running), [rewards.mean()], rtol=1e-5)


def test_refuses_what_is_out_of_range():
    running, experience = running_baseline.init(1), experience_of([[1.0]], [0])
    with pytest.raises(ValueError, match=r"decay is from 0 to 1, got 1\.5"):
        running_baseline.observe(running, experience, rows_of, decay=1.5)
    with pytest.raises(ValueError, match="decay is from 0 to 1, got -1"):
        running_baseline.follow(running, experience, rows_of, decay=-1)
    with pytest.raises(ValueError, match="at least 1 baseline, got 0"):
        running_baseline.init(0)
    with pytest.raises(ValueError, match="count is at least 0, got -1"):
        running_baseline.init(1, count=-1)


def test_rows_of_one_value_share_a_baseline_and_without_a_column_each_has_its_own():
    rows = [{"role": "white"}, {"role": ["x"]}, {"role": "white"}, {"role": None}]
    np.testing.assert_array_equal(running_advantages.of_rows(rows), [0, 1, 2, 3])
    np.testing.assert_array_equal(running_advantages.of_rows(rows, "role"), [0, 1, 0, 2])
    with pytest.raises(ValueError, match="1 rows have no column 'role', the first is row 1"):
        running_advantages.of_rows([{"role": 1}, {}], "role")


@pytest.mark.parametrize(
    ("whole", "make", "move", "decay"),
    [
        (running_advantages.spo, running_baseline.spo, running_baseline.observe, 0.7),
        (running_advantages.rae, running_baseline.rae, running_baseline.follow, 0.6),
    ],
)
def test_a_whole_advantage_is_its_parts_by_the_rows_of_the_data(whole, make, move, decay):
    of_row = np.array([0, 1, 0, 1], np.int32)
    kept = whole(of_row, decay=decay, weights=(2.0,), names=("r",))
    experience = experience_of([[1.0], [0.0], [0.5]], [3, 2, 0])
    prompts = experience.rollout.prompts
    by_name = prompts._replace(info={"row": prompts.info})
    by_name = experience._replace(rollout=experience.rollout._replace(prompts=by_name))
    held, running = kept.begin, running_baseline.init(2)

    def index(experience):
        return of_row[experience.rollout.prompts.info]

    for _ in range(2):
        advantages, _ = kept.advantage(held)(by_name)
        expected, _ = make(running, index, weights=(2.0,))(experience)
        np.testing.assert_array_equal(advantages, expected)
        held = kept.after(held, by_name)
        running = move(running, experience, index, decay=decay, weights=(2.0,))
    np.testing.assert_array_equal(held.running.total, running.total)
    assert np.any(running.total)
    with pytest.raises(ValueError, match=r"decay is from 0 to 1, got 1\.5"):
        whole(of_row, decay=1.5)


def test_with_a_half_life_a_baseline_forgets_by_how_far_the_policy_has_moved_since_it_was_seen():
    """Three prompts of a baseline each, in plain Python; a step without a reward for a prompt has not seen it."""
    kept = running_advantages.spo(np.arange(3, dtype=np.int32), half_life=0.1, lowest=0.2, highest=0.9)
    held = kept.begin
    total, number, seen, length = np.zeros(3), np.zeros(3), np.zeros(3), 0.0
    steps = [
        ([[1.0, 0.0], [1.0, 1.0]], [0, 1], [[True, True], [True, False]], 0.05),
        ([[1.0, 1.0], [0.0, 0.0]], [0, 2], [[True, True], [False, False]], 0.1),
        ([[0.0, 1.0], [0.0, 0.0]], [1, 0], [[True, True], [True, True]], 0.7),
        ([[1.0, 1.0], [1.0, 0.0]], [2, 1], [[True, True], [True, True]], 0.0),
        ([[1.0, 1.0], [0.0, 0.0]], [1, 0], [[True, True], [True, True]], 0.0),
    ]
    decays = []
    for rewards, rows, given, moved in steps:
        for row, of_one, mask in zip(rows, np.array(rewards), np.array(given), strict=True):
            if mask.any():
                decays.append(min(max(2 ** (-(length - seen[row]) / 0.1), 0.2), 0.9))
                total[row] = decays[-1] * total[row] + of_one[mask].sum()
                number[row] = decays[-1] * number[row] + mask.sum()
                seen[row] = length
        length += moved
        experience = experience_of(rewards, rows, given)
        prompts = experience.rollout.prompts._replace(info={"row": jnp.asarray(rows)})
        experience = experience._replace(rollout=experience.rollout._replace(prompts=prompts))
        held = kept.after(held, experience, jnp.float32(moved))
        np.testing.assert_allclose(held.running.total, total, rtol=1e-5)
        np.testing.assert_allclose(held.running.number, number, rtol=1e-5)
    assert {0.2, 0.9} < set(decays)  # both bounds, and what is between
    for moved in (np.inf, np.nan, 0.1):  # a step that went too far to be measured is not felt for good
        held = kept.after(held, experience, jnp.float32(moved))
    assert np.isfinite(held.path.length)
    assert np.isfinite(held.running.total).all()
    with pytest.raises(ValueError, match="half_life is above 0 nats per token, got 0"):
        running_advantages.spo(np.arange(3), half_life=0)
    with pytest.raises(ValueError, match=r"0 <= lowest <= highest <= 1, got 0\.5 and 0\.4"):
        running_advantages.spo(np.arange(3), half_life=1.0, lowest=0.5, highest=0.4)


def test_a_resumed_run_has_the_baselines_of_one_that_was_not_stopped(tmp_path):
    """Two steps, a checkpoint, and the third from it, to the same bits."""

    def reward(rollout):
        share = jnp.sum((rollout.tokens == 2) & rollout.mask, axis=-1) / rollout.lengths
        return share[..., None], jnp.ones((*share.shape, 1), bool)

    optimizer = optax.adam(0.1)
    step = make_train_step(
        POLICY,
        optimizer,
        sampling.sampler(group_size=1, max_tokens=4, eos_ids=(1,)),
        reward=reward,
        advantage=Scheduled(lambda n, running: running_baseline.spo(running, rows_of)),
        loss=losses.reinforce(),
    )

    @jax.jit
    def whole(state):
        prompts = random_prompts(0, 4, 3, V)._replace(info=jnp.array([2, 0, 2, 1]))
        experience = step.collect(state, prompts)
        state, _ = step.learn(state, experience)
        return state._replace(extra=running_baseline.observe(state.extra, experience, rows_of, decay=0.9))

    start = init_state(
        POLICY.init(jax.random.key(0)), optimizer, jax.random.key(0), extra=running_baseline.init(3, value=0.5, count=1)
    )
    two = whole(whole(start))
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, two, {})
        resumed, _ = checkpoint.restore(checkpoints, start)
    straight, continued = whole(two), whole(resumed)
    assert np.all(np.asarray(running_baseline.baseline(straight.extra)) != 0.5)
    for a, b in zip(
        jax.tree.leaves((straight.params, straight.extra)),
        jax.tree.leaves((continued.params, continued.extra)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
