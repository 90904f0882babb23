"""What a step takes, against arrays that exist, halves of known size, and a clock that is set by hand."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest

from grpo_jax import losses, sampling, testing
from grpo_jax.run import memory
from grpo_jax.study import footprints
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import Experience
from grpo_jax.updates import init_state

POLICY = testing.tiny_policy("qwen2")
OPTIMIZER = optax.adam(1e-3)
SAMPLER = sampling.sampler(group_size=2, max_tokens=5, eos_ids=(0,))
STEP = make_train_step(POLICY, OPTIMIZER, SAMPLER, loss=losses.grpo(penalty=losses.k3(0.04)))
PROMPTS = testing.random_prompts(0, 4, 9)


def init(key):
    return init_state(POLICY.init(key), OPTIMIZER, key, reference=True)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_on_paper_is_the_size_of_the_arrays():
    state = init(jax.random.key(0))
    assert footprints.on_paper(init) == {
        "parameters": nbytes(state.params),
        "gradients": nbytes(state.params),
        "optimizer": 2 * nbytes(state.params) + 4,  # the two moments, and the count of steps
        "reference": nbytes(state.params),
    }


@pytest.mark.slow
def test_a_footprint_is_what_is_kept_with_the_larger_program():
    line = footprints.footprint(init, STEP, PROMPTS)
    state = init(jax.random.key(0))
    sampling, learning = memory.programs(STEP, state, PROMPTS)
    kept = nbytes(state.params) + nbytes(state.opt_state) + nbytes(state.ref_params)
    assert (line["sampling"], line["learning"]) == (sampling, learning)
    assert line["on paper"] == kept + nbytes(state.params)
    assert line["compiled"] == kept + max(sampling, learning)
    assert line["activations"] == learning - nbytes(state.params) > 0


def test_the_programs_hold_what_they_return_and_learning_the_rewards():
    """Halves of known size: sampling makes an experience, learning writes over its state."""
    state = jax.eval_shape(lambda: jnp.zeros(1000))
    rollout = jax.eval_shape(STEP.collect, jax.eval_shape(init, jax.random.key(0)), PROMPTS).rollout

    def collect(state, prompts):
        return Experience(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rollout))

    def learn(state, experience):
        return state + jnp.sum(experience.rewards) + jnp.sum(experience.reward_mask), {}

    sampling, learning = memory.programs(Step(collect, learn), state, PROMPTS)
    assert memory.size(rollout) <= sampling < memory.size(rollout) + 1000
    rewards = 4 * 2 * (4 + 1)
    assert memory.size(rollout) + rewards <= learning < memory.size(rollout) + rewards + 1000


@pytest.mark.slow
def test_seconds_are_medians_without_the_first_step(monkeypatch):
    """By a clock on which the steps take 100, 1, 9 and 2 seconds to sample and ten times that to learn."""
    taken = [seconds for n in (100.0, 1.0, 9.0, 2.0) for seconds in (n, 10 * n)]
    ticks = iter([t for seconds in taken for t in (0.0, seconds)])
    monkeypatch.setattr(footprints.time, "perf_counter", lambda: next(ticks))
    found = footprints.measure(init, STEP, PROMPTS, repeats=3)
    assert found == {"seconds of sampling": 2.0, "seconds of learning": 20.0} | (
        {"peak": found["peak"]} if "peak" in found else {}
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_only_a_gpu_measures_in_a_process_of_its_own(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert (footprints.in_a_process(os.getpid) == os.getpid()) == (backend == "cpu")
