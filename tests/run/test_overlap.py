"""Batches that are sampled ahead: of the policy before the update, held by the state; through the host, by a thread."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import sharding
from grpo_jax.run import overlap
from grpo_jax.train_step import Step
from grpo_jax.types import Experience, Prompts, Rollout, TrainState

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
    seen = []
    for n in steps:
        experience = halves.collect(state, n)
        assert experience.rollout.prompts.tokens.shape == batch(n).tokens.shape
        np.testing.assert_array_equal(experience.rollout.prompts.tokens, batch(n).tokens)
        seen.append(int(experience.rollout.tokens[0, 0, 0]))
        state, _ = halves.learn(state, experience)
    return seen, state


@pytest.mark.parametrize("on_host", [False, True], ids=["program", "host"])
def test_a_batch_is_of_the_policy_before_the_update_and_a_state_that_is_kept_goes_on_with_it(on_host):
    threads = []

    def collect_told(state, prompts):
        threads.append(threading.current_thread().name)
        return collect(state, prompts)

    step = Step(collect_told if on_host else jax.jit(collect), learn, on_host)
    halves, state = overlap.ahead(step, batch, state_of(), width=WIDTH)
    seen, state = run(halves, state, range(3))
    assert seen == [0, 1, 102]  # 100 times the updates of its policy, and its step
    np.testing.assert_array_equal(state.extra.extra["kept"], [1, 1])
    resumed, fresh = overlap.ahead(step, batch, state_of(), width=WIDTH)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    chosen = jax.tree.map(lambda x: x.copy(), state)  # as a checkpoint gives it back
    assert run(resumed, chosen, range(3, 5))[0] == run(halves, state, range(3, 5))[0] == [203, 304]
    if on_host:
        assert threads[0] == "MainThread"
        assert all(name.startswith("collect") for name in threads[1:4])


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

    halves, state = overlap.ahead(Step(collect_late, learn_first, True), batch, state_of(), width=WIDTH)
    assert run(halves, state, range(1))[0] == [0]


def at_once(executor, function, *arguments):
    """As a thread that has ended when its result is first asked for."""
    future = concurrent.futures.Future()
    try:
        future.set_result(function(*arguments))
    except LookupError as error:
        future.set_exception(error)
    return future


@pytest.mark.parametrize("early", [True, False], ids=["before the device learns", "while it learns"])
def test_what_a_collector_raises_is_raised_where_the_state_is_whole(early, monkeypatch):
    learning, down = threading.Event(), [True]

    def fails(state, prompts):
        if int(state.step) == 2 and down:
            assert early or learning.wait(20)
            raise LookupError("the server is gone")
        return collect(state, prompts)

    def learn_told(state, experience):
        after = learn(state, experience)
        learning.set() if int(after[0].step) == 2 else None
        return after

    if early:
        monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", at_once)
    step = Step(fails, learn_told, True)
    halves, state = overlap.ahead(step, batch, state_of(), width=WIDTH)
    _, state = run(halves, state, range(1))
    experience = halves.collect(state, 1)
    if early:
        with pytest.raises(LookupError, match="the server is gone"):
            halves.learn(state, experience)
    else:
        state, _ = halves.learn(state, experience)
        with pytest.raises(LookupError, match="the server is gone"):
            halves.collect(state, 2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    down.clear()
    resumed, _ = overlap.ahead(step, batch, state_of(), width=WIDTH)
    kept = jax.tree.map(lambda x: x.copy(), state)
    assert run(resumed, kept, range(int(state.step), 4))[0] == ([1, 102, 203] if early else [202, 203])


def test_on_a_mesh_the_room_for_a_batch_lies_as_one_that_was_sampled():
    mesh = sharding.mesh(data=1, devices=jax.devices()[:1])
    batches = sharding.batches(mesh, batch)
    state = sharding.place(mesh, state_of())
    halves, state = overlap.ahead(Step(jax.jit(collect), learn), batches, state, width=WIDTH)
    empty, (_, state) = state.extra.experience, run(halves, state, range(1))
    for room, made in zip(jax.tree.leaves(empty), jax.tree.leaves(state.extra.experience), strict=True):
        assert room.sharding == made.sharding == jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
