"""The arithmetic of the decoder by its dtypes: float16's range, the last norm, copies in few bits to sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, sampling
from grpo_jax.models import quantized
from grpo_jax.policies import forward
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.types import Prompts

POLICY = tiny_policy("qwen3")
PROMPTS = random_prompts(0, 2, 5)
SAMPLER = sampling.sampler(group_size=3, max_tokens=6, eos_ids=())


@functools.cache
def params_of():
    return jax.tree.map(lambda x: 3 * x, jax.jit(POLICY.init)(jax.random.key(0)))


def policy_in(dtype, **fields):
    return models.decoder(dataclasses.replace(POLICY.config, dtype=dtype, **fields))


@functools.cache
def rollout_of():
    return SAMPLER(POLICY, params_of(), PROMPTS, jax.random.key(1))


def error(policy):
    """The mean distance of log-probs from those in float32."""
    whole = score(POLICY, params_of(), rollout_of(), entropy=False).log_probs
    return float(jnp.mean(jnp.abs(score(policy, params_of(), rollout_of(), entropy=False).log_probs - whole)))


@pytest.mark.slow
def test_float16_is_nearer_to_float32_than_bfloat16_is():
    bfloat16, float16 = error(policy_in(jnp.bfloat16)), error(policy_in(jnp.float16))
    assert 3 * float16 < bfloat16  # it has 3 bits more


@pytest.mark.slow
def test_the_last_norm_in_float32_is_not_rounded():
    policy = policy_in(jnp.bfloat16, last_norm_dtype=jnp.float32)
    prompt_cache = policy.prefill(params_of(), *PROMPTS[:2])
    read = jnp.full((2, 1, 1), 7), jnp.full((2, 1, 1), 5)
    hidden, _ = policy.extend(params_of(), *read, prompt_cache)
    assert hidden.dtype == jnp.float32
    assert np.any(hidden != hidden.astype(jnp.bfloat16))
    cast, _ = policy.extend(policy.cast(params_of()), *read, prompt_cache)
    np.testing.assert_array_equal(cast, hidden)  # the sampler's copy rounds no more


@pytest.mark.slow
def test_the_gradient_of_a_token_that_is_read_often_is_summed_in_float32():
    """In bfloat16 a sum of equal numbers ends at 256 of them."""
    tokens, positions = jnp.full((1, 1, 1000), 7), jnp.arange(1000)[None, None]

    def gradient(dtype):
        policy = policy_in(dtype, num_layers=1)

        def value(params):
            hidden, _ = forward(policy, params, Prompts(tokens[:, 0, :1], jnp.ones(1, jnp.int32)), tokens, positions)
            return jnp.mean(hidden[..., 0].astype(jnp.float32))

        params = params_of() | {"layers": jax.tree.map(lambda x: x[:1], params_of()["layers"])}
        return jax.jit(jax.grad(value))(params)["embed_tokens"]["embedding"][7]

    whole, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    np.testing.assert_allclose(rounded, whole, rtol=0, atol=0.05 * np.max(np.abs(whole)))


def test_what_overflows_float16_leaves_values_and_gradients_finite():
    policy, params = policy_in(jnp.float16), params_of()
    mlp = params["layers"]["mlp"]
    large = mlp | {name: jax.tree.map(lambda x: 2e3 * x, mlp[name]) for name in ("up_proj", "gate_proj")}
    params = params | {"layers": params["layers"] | {"mlp": large}}

    def total(params):  # by a scale below 1: gradients of kernels are sums of large numbers, and overflow by themselves
        return 1e-4 * jnp.sum(score(policy, params, rollout_of(), entropy=False).log_probs)

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["lm_head"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "low", "high"), [("int8", 1e-4, 0.5), ("fp8", 1e-3, 1.0)])
def test_a_copy_in_few_bits_is_sampled_from_and_the_whole_weights_are_scored(kind, low, high):
    policy = quantized.sampled(POLICY, kind)
    assert policy == quantized.sampled(POLICY, kind)  # so that nothing is compiled twice
    rollout = SAMPLER(policy, params_of(), PROMPTS, jax.random.key(1))
    copy = score(POLICY, quantized.quantize(params_of(), kind), rollout, entropy=False).log_probs
    np.testing.assert_allclose(rollout.log_probs, copy, rtol=1e-4, atol=1e-4)
    gap = jnp.mean(jnp.abs(score(policy, params_of(), rollout, entropy=False).log_probs - rollout.log_probs))
    assert low < gap < high
