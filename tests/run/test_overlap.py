"""Batches that are sampled ahead: of the policy before the update, held by the state; through the host, by a thread."""

import threading
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import data, losses, make_train_step, sampling, testing
from grpo_jax.environments import Turn
from grpo_jax.models import sharding
from grpo_jax.run import checkpoint, overlap
from grpo_jax.statistics import summary
from grpo_jax.train_step import Step
from grpo_jax.types import Experience, Prompts, Rollout, TrainState
from grpo_jax.updates import init_state

B, G, T, WIDTH = 2, 2, 3, 6


def batch(n):
    return Prompts(jnp.full((B, 2 + n % 3), n, jnp.int32), jnp.full(B, 2 + n % 3, jnp.int32))


def collect(state, prompts):
    """Tokens that tell the policy and the step that they are of."""
    made = jnp.full((B, G, T), 100 * state.params["w"] + state.step, jnp.int32)
    mask = made >= 0
    return Experience(Rollout(prompts, made, made[..., 0], mask, made * 0.0, mask[..., 0]))


@jax.jit
def raised(w):
    return w + 1


def learn(state, experience):
    params = {"w": raised(state.params["w"])}
    state.params["w"].delete()  # as one that is donated
    state.key.delete() if state.step == 1 else None
    return state._replace(params=params, step=state.step + 1, key=jax.random.key(7)), {}


def state_of(w=0, step=0):
    return TrainState(
        {"w": jnp.int32(w)}, (), jax.random.key(7), jnp.int32(step), jnp.int32(0), extra={"kept": jnp.ones(2)}
    )


def run(halves, state, steps):
    seen, lags = [], []
    for n in steps:
        experience = halves.collect(state, n)
        assert experience.rollout.prompts.tokens.shape == batch(n).tokens.shape
        np.testing.assert_array_equal(experience.rollout.prompts.tokens, batch(n).tokens)
        seen.append(int(experience.rollout.tokens[0, 0, 0]))
        state, metrics = halves.learn(state, experience)
        lags.append(int(metrics["lag"]))
    return seen, lags, state


@pytest.mark.parametrize("on_host", [False, True], ids=["program", "host"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_batch_is_of_the_policy_some_updates_before_and_a_state_that_is_kept_goes_on_with_it(depth, on_host):
    threads = []

    def collect_told(state, prompts):
        threads.append(threading.current_thread().name)
        return collect(state, prompts)

    step = Step(collect_told if on_host else jax.jit(collect), learn, on_host, collect)
    halves, state = overlap.ahead(step, batch, state_of(), width=WIDTH, depth=depth)
    assert not threads  # not before the run has its folder
    seen, lags, state = run(halves, state, range(5))
    assert seen == [100 * max(0, n - depth) + n for n in range(5)]  # 100 times the updates of its policy, and its step
    assert lags == [min(n, depth) for n in range(5)]
    np.testing.assert_array_equal(state.extra.extra["kept"], [1, 1])
    state = halves.whole(state)
    assert state.extra.versions.tolist() == [5 - depth + i for i in range(depth)]
    resumed, fresh = overlap.ahead(step, batch, state_of(), width=WIDTH, depth=depth)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    chosen = jax.tree.map(lambda x: x.copy(), state)  # as a checkpoint gives it back
    expected = [100 * (n - depth) + n for n in (5, 6)]
    assert run(resumed, chosen, (5, 6))[0] == run(halves, state, (5, 6))[0] == expected
    assert all(name.startswith("collect") for name in threads)


def test_a_sampler_of_the_host_is_refused_where_there_are_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="the 2 processes would start its programs and those of `learn` in other orde"):
        overlap.ahead(Step(collect, learn, True, collect), batch, state_of(), width=WIDTH)


def test_a_depth_that_is_none_is_refused():
    with pytest.raises(ValueError, match="depth is at least 1, got 0"):
        overlap.ahead(Step(collect, learn), batch, state_of(), width=WIDTH, depth=0)


def test_environments_answer_while_the_device_learns():
    learning, collected = threading.Event(), threading.Event()

    def collect_late(state, prompts):
        if int(state.step) == 0:
            return collect(state, prompts)
        assert learning.wait(20)
        experience = collect(state, prompts)  # of params that `learn` has given away
        collected.set()
        return experience

    def learn_first(state, experience):
        after = learn(state, experience)
        learning.set()
        assert collected.wait(20)
        return after

    halves, state = overlap.ahead(Step(collect_late, learn_first, True, collect), batch, state_of(), width=WIDTH)
    assert run(halves, state, range(1))[0] == [0]


@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_collector_raises_is_raised_where_the_state_is_whole(depth):
    down = [True]

    def fails(state, prompts):
        if int(state.step) == 3 and down:
            raise LookupError("the server is gone")
        return collect(state, prompts)

    step = Step(fails, learn, True, collect)
    halves, state = overlap.ahead(step, batch, state_of(), width=WIDTH, depth=depth)
    _, _, state = run(halves, state, range(3))
    with pytest.raises(LookupError, match="the server is gone"):
        halves.collect(state, 3)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    state = halves.whole(state)
    assert state.extra.versions.tolist() == [-1, 2][:depth]
    down.clear()
    expected = [303, 304 if depth == 1 else 204]  # what failed is of the policy of now, what did not of that before
    resumed, _ = overlap.ahead(step, batch, state_of(), width=WIDTH, depth=depth)
    assert run(resumed, jax.tree.map(lambda x: x.copy(), state), (3, 4))[0] == expected
    assert run(halves, state, (3, 4))[0] == expected


def test_a_run_that_ends_between_the_halves_of_a_step_has_its_batch_in_the_state():
    step = Step(collect, learn, True)
    halves, state = overlap.ahead(step, batch, state_of(), width=WIDTH, depth=2)
    _, _, state = run(halves, state, range(3))
    halves.collect(state, 3)  # and the reward raises
    kept = jax.tree.map(lambda x: x.copy(), halves.whole(state))
    resumed, _ = overlap.ahead(step, batch, state_of(), width=WIDTH, depth=2)
    assert run(resumed, kept, (3, 4, 5))[0] == [103, 204, 305]


def test_on_a_mesh_the_room_for_a_batch_lies_as_one_that_was_sampled():
    mesh = sharding.mesh(data=1, devices=jax.devices()[:1])
    batches = sharding.batches(mesh, batch)
    state = sharding.place(mesh, state_of())
    halves, state = overlap.ahead(Step(jax.jit(collect), learn), batches, state, width=WIDTH)
    empty, (_, _, state) = state.extra, run(halves, state, range(1))
    for room, made in zip(jax.tree.leaves(empty.queue), jax.tree.leaves(state.extra.queue), strict=True):
        assert room.sharding == made.sharding == jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    assert empty.versions.sharding == state.extra.versions.sharding == jax.NamedSharding(mesh, jax.P())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the environment failed:RuntimeWarning")
def test_conversations_that_were_held_ahead_are_learned_from_after_a_stop(tmp_path):
    """The checkpoint of step 2 has two batches, one failed conversation among them; the run that went on reads none."""
    tokenizer = testing.tiny_tokenizer()
    prompts = data.encode_rows(tokenizer, [{"prompt": f"What is {n}?"} for n in range(4)], chat=True)
    policy = testing.tiny_policy(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=256)
    asked = []

    def respond(row, messages):
        asked.append(str(messages))
        if row["prompt"] == "What is 2?" and len(messages) > 2:
            raise LookupError("the game is broken")
        return Turn("go on", reward=zlib.crc32(messages[-1]["content"].encode()) / 2**32)  # no two alike

    sampler = sampling.sampler(group_size=2, max_tokens=48, eos_ids=(tokenizer.eos_token_id, *range(3, 90)))
    talking = sampling.conversations(
        sampler, respond, tokenizer, prompts.rows, max_turns=2, between=data.between_turns(tokenizer)
    )
    optimizer = optax.sgd(0.5)
    step = make_train_step(policy, optimizer, talking, loss=losses.grpo(), score_old=True).jit()

    def begin():
        def batch(n):
            return prompts.batch(0, n, 2, multiple=32)

        state = init_state(jax.jit(policy.init)(jax.random.key(0)), optimizer, jax.random.key(1))
        return overlap.ahead(step, batch, state, width=32, depth=2)

    def go_on(halves, state, steps):
        for n in steps:
            experience = halves.collect(state, n)
            rewards, mask = sampling.turn_rewards(experience.rollout)
            state, metrics = halves.learn(state, experience._replace(rewards=rewards, reward_mask=mask))
            assert metrics["lag"] == min(n, 2)
            assert summary(metrics)["grad_norm"] > 0
        return state

    halves, state = begin()
    state = halves.whole(go_on(halves, state, range(2)))
    assert state.extra.versions.tolist() == [0, 1]
    assert all((held.rollout.turns.ends[..., 1] > 0).any() for held in state.extra.queue)
    assert any(held.rollout.turns.failed.any() for held in state.extra.queue)
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, {})
    asked.clear()
    whole, expected = halves.whole(go_on(halves, state, (2, 3))), sorted(asked)
    asked.clear()
    halves, state = begin()
    with checkpoint.manager(tmp_path) as checkpoints:
        state, _ = checkpoint.restore(checkpoints, state)
    resumed = halves.whole(go_on(halves, state, (2, 3)))
    chex.assert_trees_all_equal(resumed.params, whole.params)
    chex.assert_trees_all_equal(resumed.extra, whole.extra)
    assert sorted(asked) == expected  # of the two batches after those, and of none before
