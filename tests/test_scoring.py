"""What `score` says of a rollout, what it holds while it does, and what it leaves undone."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, sampling
from grpo_jax.policies import from_logits_fn
from grpo_jax.scoring import Teacher, score
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.truncation import Truncation
from grpo_jax.types import Prompts

FAMILIES = {"llama": {}, "mistral": {"sliding_window": 4}, "qwen2": {}, "qwen3": {}}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
B, G, P, T, V = 2, 5, 13, 7, 61

# Nothing but an embedding and a head, where only the head matters.
HEAD = from_logits_fn(lambda params, tokens, mask: params["embed"][tokens])._replace(
    unembed=lambda params, hidden: hidden @ params["head"]
)
HEAD_PARAMS = {
    "embed": jax.random.normal(jax.random.key(2), (V, 32)),
    "head": 0.3 * jax.random.normal(jax.random.key(3), (32, V)),
}


@functools.cache
def policy_and_params(family="qwen3"):
    policy = tiny_policy(family, **FAMILIES[family])
    return policy, jax.jit(policy.init)(jax.random.key(0))


@functools.cache
def rolled_out(family="qwen3", temperature=1.0):
    policy, params = policy_and_params(family)
    prompts = random_prompts(0, B, P)
    return sampling.sampler(group_size=G, max_tokens=T, eos_ids=(1, 5, 9, 14, 23, 37), temperature=temperature)(
        policy, params, prompts, jax.random.key(1)
    )


@functools.partial(jax.jit, static_argnums=0)
def all_logits(policy, params, rollout):
    """Logits `[B, G, T, V]`: each completion behind its own prompt, as one row that is read at once."""
    places = rollout.prompts.lengths[:, None, None] - 1 + jnp.arange(T)  # of the token before
    places = jnp.broadcast_to(places, (B, G, T)).reshape(B * G, T)
    rows = jnp.pad(jnp.repeat(rollout.prompts.tokens, G, axis=0), ((0, 0), (0, T)))
    rows = jax.vmap(lambda row, places, tokens: row.at[places + 1].set(tokens))(
        rows, places, rollout.tokens.reshape(B * G, T)
    )
    positions = jnp.broadcast_to(jnp.arange(P + T), (B * G, 1, P + T))
    nothing = policy.prefill(params, rows[:, :1], jnp.ones(B * G, jnp.int32))
    logits = policy.unembed(params, policy.extend(params, rows[:, None], positions, nothing)[0])[:, 0]
    return jnp.take_along_axis(logits, places[..., None], axis=1).reshape(B, G, T, V)


def likelihood(params, rollout):
    return jnp.sum(score(policy_and_params()[0], params, rollout).log_probs)


_gradient = jax.jit(jax.grad(likelihood))


def shapes(f, *arguments):
    """The shape of every array in the program of `f`, those of inner programs included."""
    program = str(jax.make_jaxpr(f)(*arguments))
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]+\d+\[(\d+(?:,\d+)*)\]", program)}


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@every_temperature
def test_log_probs_and_entropy_are_those_of_the_softmax_of_all_logits(family, temperature):
    policy, params = policy_and_params(family)
    rollout = rolled_out(family, temperature)
    logits = np.asarray(all_logits(policy, params, rollout), np.float64) / temperature
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    drawn = np.take_along_axis(probs, np.asarray(rollout.tokens)[..., None], axis=-1)[..., 0]
    scores = score(policy, params, rollout, temperature=temperature)
    np.testing.assert_allclose(scores.log_probs, np.where(rollout.mask, np.log(drawn), 0), atol=1e-4)
    entropy = -np.sum(probs * np.log(probs), axis=-1)
    np.testing.assert_allclose(scores.entropy, np.where(rollout.mask, entropy, 0), atol=1e-4)


@every_family
@every_temperature
def test_scored_log_probs_are_those_that_were_sampled(family, temperature):
    policy, params = policy_and_params(family)
    rollout = rolled_out(family, temperature)
    scores = score(policy, params, rollout, temperature=temperature)
    assert len(np.unique(rollout.lengths)) > 1
    np.testing.assert_allclose(scores.log_probs, rollout.log_probs, atol=1e-4)


def test_the_collision_is_the_sum_of_squared_probabilities():
    policy, params = policy_and_params()
    rollout = rolled_out()
    probs = jax.nn.softmax(all_logits(policy, params, rollout) / 0.7, axis=-1)
    collision = score(policy, params, rollout, temperature=0.7).collision
    held = np.arange(T) < np.asarray(rollout.lengths)[..., None]
    np.testing.assert_allclose(collision, np.where(held, np.sum(np.asarray(probs) ** 2, -1), 0.0), rtol=1e-5)


def test_without_entropy_the_log_probs_are_the_same():
    with_entropy = score(HEAD, HEAD_PARAMS, rolled_out())
    without = score(HEAD, HEAD_PARAMS, rolled_out(), entropy=False)
    assert without.entropy is None
    assert without.collision is None
    np.testing.assert_array_equal(without.log_probs, with_entropy.log_probs)


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_entropy_that_is_not_used_costs_nothing_under_jit(transform):
    rollout = rolled_out()  # not sampled in the program that is measured

    def cost(entropy):
        def total(params):
            return jnp.sum(score(HEAD, params, rollout, entropy=entropy, chunk_tokens=2 * B * G).log_probs)

        analysis = jax.jit(transform(total)).lower(HEAD_PARAMS).compile().cost_analysis()
        return analysis["flops"], analysis["transcendentals"]

    assert cost(entropy=True) == cost(entropy=False)


def test_the_size_of_the_chunks_changes_neither_scores_nor_gradients():
    rollout = rolled_out()

    @functools.partial(jax.jit, static_argnums=1)
    def scores_and_gradient(params, chunk_tokens):
        def total(params):
            scores = score(HEAD, params, rollout, chunk_tokens=chunk_tokens)
            return jnp.sum(scores.log_probs) + 3 * jnp.sum(scores.entropy), scores

        return jax.grad(total, has_aux=True)(params)

    whole = scores_and_gradient(HEAD_PARAMS, 1024)
    for chunk_tokens in (1, 3 * B * G):  # one token of each completion; three, which do not divide seven
        chex.assert_trees_all_close(scores_and_gradient(HEAD_PARAMS, chunk_tokens), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_no_array_holds_logits_of_more_tokens_than_a_chunk(transform):
    policy, params = policy_and_params()

    def both(params, chunk_tokens):
        truncation = Truncation(top_k=9, top_p=0.8, min_p=0.1)
        scores = score(policy, params, rolled_out(), chunk_tokens=chunk_tokens, truncation=truncation)
        return jnp.sum(scores.log_probs) + jnp.sum(scores.entropy)

    def most_tokens(chunk_tokens):
        program = shapes(transform(functools.partial(both, chunk_tokens=chunk_tokens)), params)
        return max(np.prod(shape) // V for shape in program if V in shape and 32 not in shape)  # 32: the head's width

    assert most_tokens(2 * B * G) == 2 * B * G
    assert most_tokens(T * B * G) == T * B * G  # what a leak would look like


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_no_array_holds_logits_of_policy_or_teacher_of_more_tokens_than_a_chunk(transform):
    policy, params = policy_and_params()
    rollout = rolled_out()

    def total(params, teacher_params, chunk_tokens):
        scores = score(
            policy, params, rollout, chunk_tokens=chunk_tokens, teacher=Teacher(policy, losses.generalised_jsd(0.5)),
            teacher_params=teacher_params,
        )  # fmt: skip
        return jnp.sum(scores.divergence)

    def most_tokens(chunk_tokens):
        program = shapes(transform(functools.partial(total, chunk_tokens=chunk_tokens)), params, params)
        return max(np.prod(shape) // V for shape in program if V in shape and 32 not in shape)

    assert most_tokens(2 * B * G) == 2 * B * G
    assert most_tokens(T * B * G) == T * B * G


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_a_prompt_is_computed_once_for_its_group(transform):
    widths = {8, 32, 48}  # of a head, of the model, of the MLP
    groups = {G, B * G}

    def repeats_prompts(rollout):
        program = shapes(transform(functools.partial(likelihood, rollout=rollout)), policy_and_params()[1])
        return any(P - 1 in shape and groups & set(shape) and widths & set(shape) for shape in program)

    assert not repeats_prompts(rolled_out())
    assert repeats_prompts(one_row_a_completion(rolled_out()))


def one_row_a_completion(rollout):
    """The same completions as `B * G` groups of one, each with a copy of the prompt."""
    rollout = jax.device_get(rollout)
    prompts = jax.tree.map(lambda leaf: np.repeat(leaf, G, axis=0), rollout.prompts)
    completions = jax.tree.map(lambda leaf: leaf.reshape(B * G, 1, *leaf.shape[2:]), rollout._replace(prompts=()))
    return completions._replace(prompts=prompts)


def test_the_gradient_through_the_shared_prompt_is_that_of_rows_with_a_prompt_each():
    policy, params = policy_and_params()

    @jax.jit
    @jax.grad
    def whole_rows(params, rollout):
        log_probs = jax.nn.log_softmax(all_logits(policy, params, rollout))
        return jnp.sum(jnp.take_along_axis(log_probs, rollout.tokens[..., None], axis=-1)[..., 0] * rollout.mask)

    assert_gradients_close(_gradient(params, rolled_out()), whole_rows(params, rolled_out()))


def assert_gradients_close(actual, expected):
    """To 1e-5 of the largest entry: entries near 0 are sums that cancel."""
    scale = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(jax.device_get(expected)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("garbage", [60, 1000, -7], ids=["a token", "beyond the vocabulary", "below it"])
def test_neither_the_width_nor_the_content_of_padding_changes_anything(garbage):
    policy, params = policy_and_params()
    rollout = jax.device_get(rolled_out())
    prompts = rollout.prompts

    def widen(tokens, lengths, more):
        wide = np.full((*tokens.shape[:-1], tokens.shape[-1] + more), garbage, np.int32)
        held = np.arange(wide.shape[-1]) < lengths[..., None]
        wide[held] = tokens[held[..., : tokens.shape[-1]]]
        return wide, held

    tokens, mask = widen(rollout.tokens, rollout.lengths, 4)
    padded = rollout._replace(
        prompts=Prompts(widen(prompts.tokens, prompts.lengths, 3)[0], prompts.lengths),
        tokens=tokens,
        mask=mask,
        log_probs=np.zeros(mask.shape, np.float32),
    )
    expected, scores = score(policy, params, rollout), score(policy, params, padded)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[..., :T], scores), expected, atol=1e-5)
    assert not any(np.any(np.asarray(leaf)[~mask]) for leaf in jax.tree.leaves(scores))
    assert_gradients_close(_gradient(params, padded), _gradient(params, rollout))


def test_a_token_ruled_out_by_a_logit_of_minus_infinity_leaves_entropy_and_gradients_finite():
    policy = from_logits_fn(lambda table, tokens, mask: jnp.where(jnp.arange(V) < 3, table[tokens], -jnp.inf))
    table = jax.random.normal(jax.random.key(0), (V, V))
    rollout = sampling.sampler(group_size=2, max_tokens=4, eos_ids=())(
        policy, table, random_prompts(0, 2, 3), jax.random.key(0)
    )

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(table):
        entropy = score(policy, table, rollout).entropy
        return jnp.sum(entropy), entropy

    (_, entropy), gradient = jax.jit(total)(table)
    probs = np.exp(np.asarray(table, np.float64)[:, :3])
    probs /= probs.sum(-1, keepdims=True)
    expected = -np.sum(probs * np.log(probs), axis=-1)
    np.testing.assert_allclose(entropy[..., 1:], expected[np.asarray(rollout.tokens[..., :-1])], rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient)
