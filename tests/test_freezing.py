"""Frozen parameters against whole training in which optax sets their changes to zero."""

import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from grpo_jax import losses, sampling, statistics
from grpo_jax.baselines import dpo, heads, ppo, reward_model
from grpo_jax.freezing import bind, partition
from grpo_jax.policies import from_logits_fn
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Experience, Rollout
from grpo_jax.updates import Updates, init_state

V, EOS = 9, 1
SIZES = {"group_size": 2, "max_tokens": 5, "eos_ids": (EOS,)}
SGD = optax.sgd(0.1, momentum=0.9)  # Adam turns rounding of gradients near zero into whole steps


def two_tables(params, tokens, mask):
    """Logits of the last token by a product of two tables, in lists beside a dict."""
    first, second = params["tables"]
    return first["weight"][tokens] @ second["weight"] + params["bias"]


def init_tables(key):
    first, second = jax.random.normal(key, (2, V, V))
    return {"tables": [{"weight": first}, {"weight": second}], "bias": jnp.zeros(V)}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, 8, rngs=rngs)
        self.out = nnx.Linear(8, V, rngs=rngs)


GRAPH, _ = nnx.split(Network(nnx.Rngs(0)))


def nnx_logits(params, tokens, mask):
    model = nnx.merge(GRAPH, params)
    return model.out(model.embed(tokens))


# A policy of each kind, and a pattern of what is frozen.
POLICIES = {
    "plain JAX": (from_logits_fn(two_tables, init=init_tables), "tables/0"),
    "nnx": (from_logits_fn(nnx_logits, init=lambda key: nnx.split(Network(nnx.Rngs(key)))[1]), "embed"),
    "decoder": (tiny_policy("qwen3", vocab_size=V, tie_word_embeddings=False), "embed_tokens|lm_head|gate_proj"),
}


def last_even(rollout):
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


def prompts_of(seed, B=4):
    return random_prompts(seed, B, 3, V)


def pairs_of(seed, B=4, T=4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, 2))
    mask = np.arange(T) < lengths[..., None]
    tokens = np.where(mask, rng.integers(2, V, (B, 2, T)), 0)
    rollout = Rollout(prompts_of(seed, B), tokens, lengths, mask, np.zeros((B, 2, T)), lengths == T)
    return Experience(jax.tree.map(jnp.asarray, rollout))


def trainings(policy, optimizer):
    """Each kind of training: how its params are made of the policy's, a step of it, and what the step takes."""
    sampler = sampling.sampler(**SIZES)
    updates = Updates(iterations=2, minibatches=2, micro_batches=2)
    grpo = make_train_step(
        policy, optimizer, sampler, reward=last_even, loss=losses.grpo(penalty=losses.k3(0.1)), updates=updates
    )
    of_ppo = ppo.make_train_step(
        policy, policy, optimizer, sampler, reward=last_even, advantage=ppo.gae_advantages(kl_weight=0.1)
    )
    one = Updates(micro_batches=2)
    return {
        "GRPO": (lambda params: params, grpo, prompts_of),
        "SFT": (lambda params: params, make_learn(policy, optimizer, loss=losses.sft(), updates=one), pairs_of),
        "DPO": (lambda params: params, make_learn(policy, optimizer, loss=dpo.dpo(), updates=one), pairs_of),
        "PPO": (lambda params: {"policy": params, "critic": heads.init_from(policy, params)}, of_ppo, prompts_of),
        "reward model": (
            lambda params: heads.init_from(policy, params),
            reward_model.make_learn(policy, optimizer, updates=one),
            pairs_of,
        ),
    }


def only_unmatched(optimizer, params, pattern):
    """The optimiser, by optax, of those parameters that the pattern does not match."""
    trained, _ = partition(params, pattern)
    is_trained = jax.tree.map(lambda x: x is not None, whole_like(trained, params), is_leaf=lambda x: x is None)
    return optax.partition({True: optimizer, False: optax.set_to_zero()}, is_trained)


def whole_like(part, whole):
    """The part with None wherever it lacks a leaf of the whole."""
    if isinstance(whole, dict):
        return {name: whole_like(None if part is None else part.get(name), child) for name, child in whole.items()}
    return jax.tree.map(lambda _: None, whole) if part is None else part


@pytest.mark.parametrize(
    ("kind", "training"),
    [("plain JAX", training) for training in ("GRPO", "SFT", "DPO", "reward model")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("plain JAX", "PPO"), ("nnx", "GRPO"), ("decoder", "GRPO"))
    ],
)
def test_training_with_frozen_parameters_equals_whole_training_without_their_changes(kind, training):
    policy, pattern = POLICIES[kind]
    to_params, _, batch = trainings(policy, SGD)[training]
    whole = to_params(jax.jit(policy.init)(jax.random.key(0)))
    params, frozen = partition(whole, pattern)
    masked = only_unmatched(SGD, whole, pattern)
    ours = init_state(params, SGD, jax.random.key(1), frozen=frozen, reference=True)
    theirs = init_state(whole, masked, jax.random.key(1), reference=True)
    step, step_of_the_whole = (jax.jit(trainings(policy, optimizer)[training][1]) for optimizer in (SGD, masked))
    for n in range(2):
        (ours, measured), (theirs, expected) = step(ours, batch(n)), step_of_the_whole(theirs, batch(n))
    measured, expected = statistics.summary(measured), statistics.summary(expected)
    for name in measured.keys() - {"grad_norm"}:
        np.testing.assert_allclose(measured[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(bind(ours.params, ours.frozen), theirs.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(ours.frozen, frozen)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_partition_is_bound_to_the_same_arrays(kind):
    policy, pattern = POLICIES[kind]
    whole = jax.jit(policy.init)(jax.random.key(0))
    params, frozen = partition(whole, pattern)
    assert 0 < len(jax.tree.leaves(frozen)) < len(jax.tree.leaves(whole))
    bound = bind(params, frozen)
    assert jax.tree.structure(bound) == jax.tree.structure(whole)
    assert all(a is b for a, b in zip(jax.tree.leaves(bound), jax.tree.leaves(whole), strict=True))
    assert bind(whole, None) is whole


def test_a_partition_of_dicts_has_no_empty_places():
    params, frozen = partition({"a": {"x": jnp.ones(1), "y": jnp.ones(2)}, "b": {"x": jnp.ones(3)}}, "x$")
    assert jax.tree.map(jnp.shape, params) == {"a": {"y": (2,)}}
    assert jax.tree.map(jnp.shape, frozen) == {"a": {"x": (1,)}, "b": {"x": (3,)}}


def test_optimiser_reference_norm_and_donation_know_what_is_trained_alone():
    policy, pattern = POLICIES["decoder"]
    params, frozen = partition(jax.jit(policy.init)(jax.random.key(0)), pattern)
    adam = optax.adam(1e-2)
    state = init_state(params, adam, jax.random.key(1), frozen=frozen, reference=True)
    kept = (state.opt_state[0].mu, state.ref_params, params)
    moments, reference, trained = (sorted(x.shape for x in jax.tree.leaves(tree)) for tree in kept)
    assert moments == reference == trained
    learn = make_train_step(policy, adam, sampling.sampler(**SIZES), loss=losses.grpo()).jit().learn
    experience = pairs_of(0)._replace(rewards=jnp.array([[[0.0], [1.0]]] * 4), reward_mask=jnp.ones((4, 2, 1), bool))
    after, _ = learn(state, experience)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    assert all(a is b for a, b in zip(jax.tree.leaves(after.frozen), jax.tree.leaves(frozen), strict=True))
    chex.assert_trees_all_equal(after.ref_params, state_again(policy, pattern))


def state_again(policy, pattern):
    return partition(jax.jit(policy.init)(jax.random.key(0)), pattern)[0]


def test_the_guard_refuses_a_loss_that_is_not_finite_because_of_what_is_frozen():
    policy, pattern = POLICIES["plain JAX"]
    params, frozen = partition(policy.init(jax.random.key(0)), pattern)
    state = init_state(params, SGD, jax.random.key(1), frozen=jax.tree.map(lambda x: x * jnp.nan, frozen))
    after, _ = jax.jit(make_learn(policy, SGD, loss=losses.sft()))(state, pairs_of(0))
    assert after.skipped == 1
    chex.assert_trees_all_equal(after.params, params)


def test_what_is_frozen_is_an_argument_of_the_program_and_no_constant_of_it():
    """The same program serves another base, and computes with that one."""
    policy, pattern = POLICIES["plain JAX"]
    traced = []

    def reward(rollout):
        traced.append(rollout.tokens.shape)
        return last_even(rollout)

    step = jax.jit(make_train_step(policy, SGD, sampling.sampler(**SIZES), reward=reward, loss=losses.grpo()))
    (params, one), (_, other) = (partition(policy.init(jax.random.key(seed)), pattern) for seed in range(2))
    learned = [
        step(init_state(params, SGD, jax.random.key(1), frozen=frozen), prompts_of(0))[0].params
        for frozen in (one, other)
    ]
    assert len(traced) == 1
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(*learned)


def test_a_step_with_frozen_parameters_is_one_program_and_may_be_vmapped_over_what_is_trained():
    policy, pattern = POLICIES["plain JAX"]
    _, frozen = partition(policy.init(jax.random.key(0)), pattern)
    several = jax.vmap(lambda key: partition(policy.init(key), pattern)[0])(jax.random.split(jax.random.key(1), 3))
    step = make_train_step(policy, SGD, sampling.sampler(**SIZES), reward=last_even, loss=losses.grpo())

    def trained(params, frozen):
        state, _ = step(init_state(params, SGD, jax.random.key(2), frozen=frozen), prompts_of(0))
        return state.params

    together = jax.jit(jax.vmap(trained, (0, None)))(several, frozen)
    apart = [jax.jit(trained)(jax.tree.map(operator.itemgetter(i), several), frozen) for i in range(3)]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *x: jnp.stack(x), *apart), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- bad input


def test_a_pattern_that_matches_nothing_is_told_with_near_names():
    params = jax.eval_shape(POLICIES["decoder"][0].init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"matches no parameter; near it are embed_tokens.*lm_head"):
        partition(params, r"embed_token\.|lmhead")
    with pytest.raises(ValueError, match="near it are embed_tokens"):
        partition(params, "embd_tokens")
    with pytest.raises(ValueError, match=r"there are .*q_proj"):
        partition(params, "transformer.h.0")


def test_a_pattern_that_matches_everything_or_is_none_is_refused():
    with pytest.raises(ValueError, match="all 2 parameters, so that nothing would be trained"):
        partition({"a": jnp.ones(1), "b": jnp.ones(1)}, "")
    with pytest.raises(ValueError, match="no regular expression"):
        partition({"a": jnp.ones(1)}, "(")


@pytest.mark.parametrize(
    ("params", "frozen", "message"),
    [
        ({"a": {"x": 1.0}}, {"a": {"x": 2.0}}, "a/x is both trained and frozen"),
        ({"a": {"x": 1.0}}, {"a": 2.0}, "a is both dict and float"),
        ([1.0, None], [None, 2.0, 3.0], "the whole is both list and list"),
    ],
)
def test_a_parameter_that_is_trained_and_frozen_is_refused_before_training(params, frozen, message):
    params, frozen = (jax.tree.map(jnp.asarray, tree) for tree in (params, frozen))
    with pytest.raises(ValueError, match=message.replace("float", "ArrayImpl")):
        init_state(params, SGD, jax.random.key(0), frozen=frozen)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint4, jnp.float8_e4m3fn])
def test_codes_are_not_trained(dtype):
    with pytest.raises(ValueError, match=r"cannot be trained, such as a/codes.*adapters"):
        init_state({"a": {"codes": jnp.ones(3, dtype)}}, SGD, jax.random.key(0))
