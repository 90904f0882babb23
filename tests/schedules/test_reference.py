"""Renewal of the reference policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, sampling
from grpo_jax.policies import from_logits_fn
from grpo_jax.run import checkpoint
from grpo_jax.schedules.reference import sync_reference
from grpo_jax.testing import random_prompts
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import init_state

V = 9
OPTIMIZER = optax.adam(0.1)


def bigram(params, tokens, mask):
    return params["table"][tokens]


POLICY = from_logits_fn(bigram, init=lambda key: {"table": jax.random.normal(key, (V, V))})


def state_at(step, params=(3.0, -0.0, 1e-30), ref=(1.0, 2.0, 4.0)):
    state = init_state({"w": jnp.array(params)}, OPTIMIZER, jax.random.key(0), reference=True)
    return state._replace(ref_params={"w": jnp.array(ref)}, step=jnp.int32(step))


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_every_n_steps_the_reference_becomes_the_policy_exactly_and_in_between_it_stays(transform):
    renew = transform(functools.partial(sync_reference, every=400))
    for step in (400, 800, 1200):
        state = state_at(step)
        renewed = renew(state)
        np.testing.assert_array_equal(renewed.ref_params["w"], state.params["w"])
        assert renewed.ref_params["w"].unsafe_buffer_pointer() != renewed.params["w"].unsafe_buffer_pointer()
    for step in (0, 1, 399, 401):
        np.testing.assert_array_equal(renew(state_at(step)).ref_params["w"], [1.0, 2.0, 4.0])


def test_a_mixture_moves_the_reference_part_of_the_way():
    """TR-DPO's 0.6 every 512: 0.6 of the policy and 0.4 of what was."""
    renewed = sync_reference(state_at(512), every=512, mixture=0.6)
    np.testing.assert_allclose(renewed.ref_params["w"], [0.6 * 3 + 0.4 * 1, 0.4 * 2, 0.4 * 4], rtol=1e-6)


def test_the_reference_keeps_its_dtype():
    state = state_at(2)
    state = state._replace(ref_params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ref_params))
    assert sync_reference(state, every=2).ref_params["w"].dtype == jnp.bfloat16


def test_a_run_with_renewal_resumes_to_the_same_bits(tmp_path):
    """Saved between two renewals, when the reference is neither the initial one nor the policy."""

    def reward(rollout):
        even = jnp.mean(rollout.tokens % 2 == 0, axis=-1)[..., None]
        return even, jnp.ones(even.shape, bool)

    step = make_train_step(
        POLICY,
        OPTIMIZER,
        sampling.sampler(group_size=4, max_tokens=5, eos_ids=(1,)),
        reward=reward,
        loss=losses.grpo(penalty=losses.k3(0.1)),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def run_step(state):
        state, _ = step(state, random_prompts(0, 4, 3, V))
        return sync_reference(state, every=2, mixture=0.6)

    def initial():
        return init_state(POLICY.init(jax.random.key(0)), OPTIMIZER, jax.random.key(0), reference=True)

    state = initial()
    with checkpoint.manager(tmp_path) as checkpoints:
        for _ in range(6):
            state = run_step(state)
            if state.step == 3:
                checkpoint.save(checkpoints, state, {}, initial=("frozen",))
                assert np.abs(state.ref_params["table"] - state.params["table"]).max() > 0
                assert np.abs(state.ref_params["table"] - initial().params["table"]).max() > 0
    with checkpoint.manager(tmp_path) as checkpoints:
        resumed, _ = checkpoint.restore(checkpoints, initial())
    for _ in range(3):
        resumed = run_step(resumed)
    for a, b in zip(jax.tree.leaves(resumed._replace(key=0)), jax.tree.leaves(state._replace(key=0)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "^every is at least 1, got 0$"),
        ({"every": 2, "mixture": 0}, "^mixture is above 0 and at most 1, got 0$"),
        ({"every": 2, "mixture": 1.5}, "^mixture is above 0 and at most 1, got 1.5$"),
    ],
    ids=["every", "mixture_0", "mixture_1.5"],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        sync_reference(state_at(2), **settings)


def test_says_that_there_is_no_reference():
    with pytest.raises(ValueError, match="reference=True"):
        sync_reference(state_at(2)._replace(ref_params=None), every=2)
