"""The experts that a sampler's network chose are those that the scorer takes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, packing, sampling, testing
from grpo_jax.run.drawing import SamplingSettings
from grpo_jax.scoring import score

SIZES = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
SAMPLER = SamplingSettings(group_size=3, max_tokens=9, record_experts=True).make_sampler(None, (1, 2, 3))
PROMPTS = testing.random_prompts(0, 3, 5)


@functools.cache
def policy_of(dtype=jnp.float32):
    policy = testing.tiny_policy("qwen3_moe", dtype=dtype, **SIZES)
    return policy, jax.jit(policy.init)(jax.random.key(0))


@jax.jit
def log_probs(params, rollout, packed):
    return score(policy_of()[0], params, rollout, packing=packed).log_probs


@pytest.mark.parametrize("slots", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sampler_records_the_experts_by_which_each_token_was_predicted(slots):
    """Recorded ones are the scorer's own, and with them the log-probs are those sampled; packed or not."""
    policy, params = policy_of()
    sampler = dataclasses.replace(SAMPLER, slots=slots)
    rollout = sampler(policy, params, PROMPTS, jax.random.key(1))
    assert rollout.experts.shape == (3, 3, 9, 2, 2)
    plain = dataclasses.replace(sampler, record_experts=False)(policy, params, PROMPTS, jax.random.key(1))
    assert plain.experts is None
    np.testing.assert_array_equal(plain.tokens, rollout.tokens)

    read = jnp.concatenate([jnp.zeros((3, 3, 1), jnp.int32), rollout.tokens[..., :-1]], -1)
    last = jnp.take_along_axis(PROMPTS.tokens, PROMPTS.lengths[:, None] - 1, axis=1)
    read = read.at[..., 0].set(last)
    positions = PROMPTS.lengths[:, None, None] - 1 + jnp.broadcast_to(jnp.arange(9), read.shape)
    prompt_cache = jax.jit(policy.prefill)(params, PROMPTS.tokens, PROMPTS.lengths)
    _, _, routes = jax.jit(policy.extend_routed)(params, read, positions, prompt_cache)
    np.testing.assert_array_equal(
        np.sort(rollout.experts)[rollout.mask], np.sort(routes.experts)[rollout.mask]
    )  # the order of two is that of their weights

    for packed in (None, packing.pack(rollout, multiple=2)):
        replayed = log_probs(params, rollout, packed)
        np.testing.assert_allclose(replayed, rollout.log_probs, rtol=0, atol=2e-5)
        others = rollout._replace(experts=(rollout.experts + 1) % 8)
        moved = log_probs(params, others, packed)
        assert np.max(np.abs(moved - rollout.log_probs)) > 0.01  # the scorer takes what it is given


@pytest.mark.slow
def test_where_the_scorer_rounds_in_another_way_replay_brings_its_log_probs_nearer():
    """A sampler in bfloat16, a scorer in float32: the experts of some tokens are others, and of none under replay."""
    policy, params = policy_of()
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.05 * x if path[-1].key == "router" else x, params
    )  # logits that are near to each other
    coarse = models.decoder(dataclasses.replace(policy.config, dtype=jnp.bfloat16))
    sampler = dataclasses.replace(SAMPLER, group_size=8, max_tokens=24)
    rollout = sampler(coarse, params, PROMPTS, jax.random.key(1))
    gaps = [
        np.abs(score(policy, params, x).log_probs - rollout.log_probs)[rollout.mask].mean()
        for x in (rollout, rollout._replace(experts=None))
    ]
    print(f"mean gap with replay {gaps[0]:.2e}, without {gaps[1]:.2e}")
    assert gaps[0] < 0.8 * gaps[1]


def test_a_policy_without_experts_and_conversations_are_refused():
    policy = testing.tiny_policy()
    params = jax.jit(policy.init)(jax.random.key(0))
    with pytest.raises(ValueError, match="record_experts=True is for a mixture of experts"):
        SAMPLER(policy, params, PROMPTS, jax.random.key(0))
    rollout = sampling.sampler(group_size=1, max_tokens=2, eos_ids=(1,))(policy, params, PROMPTS, jax.random.key(0))
    with pytest.raises(ValueError, match="the rollout has experts, and this policy has none"):
        score(policy, params, rollout._replace(experts=jnp.zeros((3, 1, 2, 2, 2), jnp.int16)))
    with pytest.raises(ValueError, match="record_experts is for completions of one turn"):
        sampling.conversations(SAMPLER, None, None, [], max_turns=2)
    with pytest.raises(ValueError, match="record_experts is for completions of one turn"):
        sampling.traced_conversations(SAMPLER, None, None, max_turns=2, turn_tokens=1)
