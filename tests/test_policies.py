"""Any network behind `from_logits_fn` is sampled, scored and differentiated as it is without it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from grpo_jax import models, sampling
from grpo_jax.losses import grpo
from grpo_jax.policies import from_logits_fn
from grpo_jax.rewards import traced
from grpo_jax.scoring import score
from grpo_jax.statistics import summary
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import init_state

V = 13
LONGEST = 32


def causal_mean(params, tokens, mask):
    """Plain JAX: the mean of the embeddings so far; learned positions tell a token that is out of place."""
    x = (params["embed"][tokens] + params["position"][: tokens.shape[1]]) * mask[..., None]
    mean = jnp.cumsum(x, axis=1) / jnp.cumsum(mask, axis=1)[..., None]
    return jnp.tanh(x + mean) @ params["head"]


def causal_mean_init(key):
    shapes = {"embed": (V, 16), "position": (LONGEST, 16), "head": (16, V)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


class Transformer(nnx.Module):
    """One block of causal attention in flax.nnx."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, 16, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.position = nnx.Embed(LONGEST, 16, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, V, rngs=rngs)

    def __call__(self, tokens, mask):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        visible = nnx.combine_masks(nnx.make_causal_mask(tokens), mask[:, None, None, :])
        return self.head(x + self.attention(x, mask=visible))


GRAPH = nnx.split(Transformer(nnx.Rngs(0)))[0]


def transformer(params, tokens, mask):
    return nnx.merge(GRAPH, params)(tokens, mask)


def transformer_init(key):
    return nnx.split(Transformer(nnx.Rngs(key)))[1]


DECODER = tiny_policy("qwen3", vocab_size=V)


def whole_decoder(params, tokens, mask):
    """Our decoder over whole rows, each read after a prompt of one token."""
    one = jnp.ones(len(tokens), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)[:, None]
    hidden, _ = DECODER.extend(params, tokens[:, None], positions, DECODER.prefill(params, tokens[:, :1], one))
    return DECODER.unembed(params, hidden)[:, 0]


NETWORKS = {"plain JAX": (causal_mean, causal_mean_init), "flax.nnx": (transformer, transformer_init)}
POLICIES = {name: from_logits_fn(f, init=init) for name, (f, init) in NETWORKS.items()}
every_network = pytest.mark.parametrize("name", NETWORKS)
IN_A_LOOP = models.decoder(dataclasses.replace(DECODER.config, layers_apart=False))
every_policy = pytest.mark.parametrize(
    "policy", [*POLICIES.values(), DECODER, IN_A_LOOP], ids=[*POLICIES, "decoder", "decoder in a loop"]
)


@functools.cache
def rolled_out(name):
    policy = POLICIES[name]
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = random_prompts(0, 3, 5, V)
    return params, sampling.sampler(group_size=4, max_tokens=6, eos_ids=(1, 2), temperature=0.8)(
        policy, params, prompts, jax.random.key(1)
    )


def packed(rollout):
    """Row `b*G + g` holds prompt and completion without a gap, written out in NumPy; True where a token is."""
    rollout = jax.device_get(rollout)
    B, G, T = rollout.tokens.shape
    rows = np.zeros((B * G, rollout.prompts.tokens.shape[1] + T), np.int32)
    mask = np.zeros(rows.shape, bool)
    for n in range(B * G):
        b, g = divmod(n, G)
        prompt = rollout.prompts.tokens[b, : rollout.prompts.lengths[b]]
        row = np.concatenate([prompt, rollout.tokens[b, g, : rollout.lengths[b, g]]])
        rows[n, : len(row)], mask[n, : len(row)] = row, True
    return rows, mask


def direct_log_probs(f, params, rollout):
    """The log-probs `[B, G, T]` of a rollout by the network alone."""
    B, G, T = rollout.tokens.shape
    logits = f(params, *map(jnp.asarray, packed(rollout)))
    places = jnp.repeat(rollout.prompts.lengths, G)[:, None] - 1 + jnp.arange(T)
    log_probs = jax.nn.log_softmax(jnp.take_along_axis(logits, places[..., None], axis=1))
    drawn = jnp.take_along_axis(log_probs, rollout.tokens.reshape(-1, T, 1), axis=-1)
    return jnp.where(rollout.mask, drawn.reshape(B, G, T), 0.0)


@functools.cache
def likelihood_and_gradient(name):
    _, rollout = rolled_out(name)
    return jax.jit(jax.value_and_grad(lambda params: jnp.sum(score(POLICIES[name], params, rollout).log_probs)))


@every_network
def test_sampled_log_probs_are_those_that_are_scored(name):
    params, rollout = rolled_out(name)
    scores = score(POLICIES[name], params, rollout, temperature=0.8)
    assert len(np.unique(rollout.lengths)) > 1
    np.testing.assert_allclose(scores.log_probs, rollout.log_probs, atol=1e-4)


@every_network
def test_log_probs_and_their_gradient_are_those_of_the_network_itself(name):
    params, rollout = rolled_out(name)
    direct = jax.value_and_grad(lambda params: jnp.sum(direct_log_probs(NETWORKS[name][0], params, rollout)))
    chex.assert_trees_all_close(likelihood_and_gradient(name)(params), jax.jit(direct)(params), rtol=1e-4, atol=1e-5)


@every_network
def test_gradient_ascent_makes_the_sampled_completions_likelier(name):
    params, _ = rolled_out(name)
    values = []
    for _ in range(5):
        value, direction = likelihood_and_gradient(name)(params)
        values.append(value)
        params = jax.tree.map(lambda leaf, slope: leaf + 3e-4 * slope, params, direction)
    assert np.all(np.diff(values) > 0)


@every_network
def test_the_network_trains_by_the_train_step(name):
    def even(rollout):
        return jnp.sum((rollout.tokens % 2 == 0) & rollout.mask, axis=-1) / rollout.lengths

    sampler = sampling.sampler(group_size=8, max_tokens=4, eos_ids=())
    optimizer = optax.adam(0.05)
    step = jax.jit(make_train_step(POLICIES[name], optimizer, sampler, reward=traced(even), loss=grpo()))
    state = init_state(jax.jit(POLICIES[name].init)(jax.random.key(0)), optimizer, jax.random.key(1))
    rewards = []
    for _ in range(25):
        state, metrics = step(state, random_prompts(0, 2, 5, V))
        rewards.append(float(summary(metrics)["reward"]))
    assert rewards[0] < 0.8
    assert np.mean(rewards[-3:]) > 0.95


def test_a_decoder_wrapped_whole_scores_as_with_its_caches():
    wrapped = from_logits_fn(whole_decoder)
    params = jax.jit(DECODER.init)(jax.random.key(0))
    prompts = random_prompts(1, 3, 5, V)
    rollout = sampling.sampler(group_size=4, max_tokens=6, eos_ids=(1, 2), temperature=0.8)(
        wrapped, params, prompts, jax.random.key(2)
    )
    scores = score(DECODER, params, rollout, temperature=0.8)
    np.testing.assert_allclose(rollout.log_probs, scores.log_probs, atol=1e-4)
    chex.assert_trees_all_close(score(wrapped, params, rollout, temperature=0.8), scores, atol=1e-4)


@every_policy
def test_tokens_are_read_at_their_positions_in_whatever_columns_they_come(policy):
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = random_prompts(2, 2, 4, V)
    prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
    tokens = jax.random.randint(jax.random.key(3), (2, 3, 6), 0, V)
    positions = jnp.broadcast_to(prompts.lengths[:, None, None] - 1 + jnp.arange(6), tokens.shape)
    order = np.array([1, 2, 0, 5, 3, 4])

    @jax.jit
    def read(params):
        whole, _ = policy.extend(params, tokens, positions, prompt_cache)
        shuffled, _ = policy.extend(params, tokens[..., order], positions[..., order], prompt_cache)
        cache, parts = policy.init_cache(2, 3, 8), []  # two columns are never written
        for part in (order[:3], order[3:]):  # three tokens at a time
            hidden, cache = policy.extend(params, tokens[..., part], positions[..., part], prompt_cache, cache)
            parts.append(hidden)
        return whole[..., order, :], shuffled, jnp.concatenate(parts, axis=2)

    whole, shuffled, in_parts = read(params)
    np.testing.assert_allclose(shuffled, whole, atol=1e-4)
    np.testing.assert_allclose(in_parts, whole, atol=1e-4)


@every_policy
def test_taken_rows_of_a_prompt_cache_are_read_as_those_prompts(policy):
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = random_prompts(4, 3, 4, V)
    rows = jnp.array([2, 0, 2, 1])
    tokens = jax.random.randint(jax.random.key(5), (4, 1, 2), 0, V)
    positions = prompts.lengths[rows][:, None, None] - 1 + jnp.arange(2)[None, None]

    @jax.jit
    def read(params):
        taken = policy.gather_prompts(policy.prefill(params, prompts.tokens, prompts.lengths), rows)
        there = policy.prefill(params, prompts.tokens[rows], prompts.lengths[rows])
        return [policy.extend(params, tokens, positions, prompt_cache)[0] for prompt_cache in (taken, there)]

    np.testing.assert_allclose(*read(params), atol=1e-5)


@every_policy
def test_kept_rows_of_a_cache_go_on_as_those_completions(policy):
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = random_prompts(4, 3, 4, V)
    rows = jnp.array([2, 0])
    tokens = jax.random.randint(jax.random.key(6), (3, 1, 3), 0, V)
    positions = prompts.lengths[:, None, None] - 1 + jnp.arange(3)[None, None]

    @jax.jit
    def read(params):
        prompt_cache = policy.prefill(params, prompts.tokens, prompts.lengths)
        _, cache = policy.extend(params, tokens[..., :2], positions[..., :2], prompt_cache, policy.init_cache(3, 1, 4))
        whole, _ = policy.extend(params, tokens[..., 2:], positions[..., 2:], prompt_cache, cache)
        kept, _ = policy.extend(
            params,
            tokens[rows, :, 2:],
            positions[rows, :, 2:],
            policy.gather_prompts(prompt_cache, rows),
            policy.gather_rows(cache, rows),
        )
        return kept, whole[rows]

    np.testing.assert_allclose(*read(params), atol=1e-5)


def test_the_network_sees_prompt_and_completion_without_a_gap_and_a_mask_of_the_tokens():
    seen = []

    def spy(params, tokens, mask):
        seen.append((np.asarray(tokens), np.asarray(mask)))
        return jnp.zeros((*tokens.shape, V))

    policy = from_logits_fn(spy)
    prompt_cache = policy.prefill((), jnp.array([[5, 6, 9], [7, 99, 99]]), jnp.array([2, 1]))  # 9 and 99: padding
    cache = policy.init_cache(2, 1, 3)
    _, cache = policy.extend((), jnp.array([[[6]], [[7]]]), jnp.array([[[1]], [[0]]]), prompt_cache, cache)
    policy.extend((), jnp.array([[[3, 4]], [[3, 4]]]), jnp.array([[[2, 3]], [[1, 2]]]), prompt_cache, cache)
    np.testing.assert_array_equal(seen[0][0], [[5, 6, 0, 0, 0], [7, 0, 0, 0, 0]])
    np.testing.assert_array_equal(seen[0][1], seen[0][0] > 0)
    np.testing.assert_array_equal(seen[1][0], [[5, 6, 3, 4, 0], [7, 3, 4, 0, 0]])
    np.testing.assert_array_equal(seen[1][1], seen[1][0] > 0)


def test_the_same_function_gives_the_same_policy_and_is_compiled_once():
    f = chex.assert_max_traces(lambda params, tokens, mask: params[tokens], n=1)
    prompts = random_prompts(5, 2, 3, V)
    for seed in range(3):
        table = jax.random.normal(jax.random.key(seed), (V, V))
        sampling.sampler(group_size=2, max_tokens=2, eos_ids=())(
            from_logits_fn(f), table, prompts, jax.random.key(seed)
        )
    assert from_logits_fn(f) is from_logits_fn(f)


def test_logits_are_float32_whatever_the_network_computes_in_and_params_stay_as_they_are():
    policy = from_logits_fn(lambda params, tokens, mask: params[tokens])
    table = jnp.ones((V, V), jnp.bfloat16)
    prompts = random_prompts(6, 2, 3, V)
    prompt_cache = policy.prefill(table, prompts.tokens, prompts.lengths)
    hidden, _ = policy.extend(table, prompts.tokens[:, None, :1], jnp.zeros((2, 1, 1), jnp.int32), prompt_cache)
    assert policy.unembed(table, hidden).dtype == jnp.float32
    assert policy.cast(table) is table


def test_what_the_wrapper_cannot_do_is_refused():
    policy = from_logits_fn(lambda params, tokens, mask: jnp.zeros((*tokens.shape, V)))
    prompts = random_prompts(7, 2, 3, V)
    read = prompts.tokens[:, None], jnp.zeros((2, 1, 3), jnp.int32), policy.prefill((), *prompts[:2])
    with pytest.raises(ValueError, match="one per row, segments=None"):
        policy.extend((), *read, segments=jnp.zeros((2, 1, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"pass from_logits_fn\(f, init=...\)"):
        policy.init(jax.random.key(0))
    only_the_last = from_logits_fn(lambda params, tokens, mask: jnp.zeros((len(tokens), V)))
    with pytest.raises(AssertionError, match="shape"):
        only_the_last.extend((), *read)
