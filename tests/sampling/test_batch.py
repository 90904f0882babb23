"""What a sampler draws, what it reports of it, and what it leaves undone."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, sampling
from grpo_jax.policies import from_logits_fn
from grpo_jax.sampling.drawing import completion_keys
from grpo_jax.scoring import score
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.truncation import Truncation, truncate
from grpo_jax.types import Prompts

V = 7


def _next_token_table(table, tokens, mask):
    """A network whose distributions are known exactly: row `a` of its only parameter follows token `a`."""
    return table[tokens]


TABLE_POLICY = from_logits_fn(_next_token_table)
TABLE = jax.random.uniform(jax.random.key(0), (V, V), minval=-0.6, maxval=0.6)
DECODER = tiny_policy("qwen3")


@functools.cache
def decoder_params():
    return jax.jit(DECODER.init)(jax.random.key(0))


def a_chain(*steps):
    """The table under which each of the steps is the one likely token after the step before."""
    table = np.zeros((V, V), np.float32)
    for before, after in itertools.pairwise(steps):
        table[before, after] = 50.0
    return jnp.array(table)


def truncated_softmax(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution over tokens of `logits [V]`, step by step in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    probs = np.exp(logits - logits.max())
    likeliest_first = np.argsort(-probs, kind="stable")
    if top_k is not None:
        probs[likeliest_first[top_k:]] = 0
    probs /= probs.sum()
    if top_p is not None:
        kept = total = 0
        while total < top_p:
            total += probs[likeliest_first[kept]]
            kept += 1
        probs[likeliest_first[kept:]] = 0
    if min_p is not None:
        probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


def chi_square(counts, probs):
    """Pearson's statistic of the counts, and its degrees of freedom."""
    assert np.all(counts[probs == 0] == 0), "a token outside the support was drawn"
    expected = (counts.sum() * probs)[probs > 0]
    assert expected.min() >= 5, "too few draws for the statistic to be chi-square"
    return np.sum((counts[probs > 0] - expected) ** 2 / expected), len(expected) - 1


def chi_square_bound(degrees, z=3.0902):
    """The 99.9% quantile of chi-square, by Wilson and Hilferty (1931), within 1% of exact from 4 degrees on."""
    return degrees * (1 - 2 / (9 * degrees) + z * np.sqrt(2 / (9 * degrees))) ** 3


DISTRIBUTIONS = [
    {"temperature": 0.5},
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.5},
    {"temperature": 0.6, "top_k": 5, "top_p": 0.8, "min_p": 0.3},
]
every_distribution = pytest.mark.parametrize("settings", DISTRIBUTIONS, ids=str)


@functools.cache
def _drawn(settings):
    prompts = Prompts(jnp.array([[4, 3], [5, 0]]), jnp.array([2, 1]))
    rollout = sampling.sampler(group_size=20_000, max_tokens=2, eos_ids=(), **dict(settings))(
        TABLE_POLICY, TABLE, prompts, jax.random.key(1)
    )
    return jax.device_get(rollout)


def drawn(settings):
    return _drawn(tuple(settings.items()))


@every_distribution
def test_first_tokens_follow_the_exact_distribution(settings):
    for tokens, last in zip(drawn(settings).tokens, (3, 5), strict=True):
        counts = np.bincount(tokens[:, 0], minlength=V)
        statistic, degrees = chi_square(counts, truncated_softmax(TABLE[last], **settings))
        assert statistic < chi_square_bound(degrees)


@every_distribution
def test_second_tokens_follow_the_exact_distribution_given_the_first(settings):
    tokens = drawn(settings).tokens.reshape(-1, 2)
    statistic = degrees = 0
    for first in np.unique(tokens[:, 0]):
        counts = np.bincount(tokens[tokens[:, 0] == first, 1], minlength=V)
        summands = chi_square(counts, truncated_softmax(TABLE[first], **settings))
        statistic, degrees = statistic + summands[0], degrees + summands[1]
    assert statistic < chi_square_bound(degrees)


@every_distribution
def test_log_probs_are_those_of_the_distribution_drawn_from_and_sum_to_one_over_its_support(settings):
    rollout = drawn(settings)
    for b, last in enumerate((3, 5)):
        first, second = rollout.tokens[b].T
        reference = np.stack([truncated_softmax(row, **settings) for row in TABLE])
        probs = np.exp(rollout.log_probs[b])
        np.testing.assert_allclose(probs, np.stack([reference[last, first], reference[first, second]], -1), rtol=1e-5)
        support = dict(zip(first, probs[:, 0], strict=True))
        assert set(support) == set(np.flatnonzero(reference[last]))
        assert sum(support.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 7}, {"top_k": 9}, {"top_p": 0.5}, {"top_p": 0.99}, {"min_p": 0.05}, {"top_k": 2, "min_p": 0.9}],
    ids=str,
)
def test_truncation_keeps_the_tokens_of_the_definition(settings):
    logits = 2 * jax.random.normal(jax.random.key(2), (50, V))
    kept = truncate(logits, Truncation(**settings))
    expected = np.stack([truncated_softmax(row, **settings) for row in logits])
    np.testing.assert_array_equal(kept, np.where(expected > 0, logits, -np.inf))


def test_top_k_keeps_every_token_that_ties_with_the_last_one_kept():
    kept = truncate(jnp.array([2.0, 1.0, 3.0, 1.0, 0.0, 1.0]), Truncation(top_k=3))
    np.testing.assert_array_equal(jnp.isfinite(kept), [True, True, True, True, False, True])


@pytest.mark.parametrize("top_p", [1e-9, np.finfo(np.float32).tiny], ids=str)
def test_top_p_keeps_at_least_the_likeliest_token(top_p):
    logits = jax.random.normal(jax.random.key(3), (20, V))
    kept = jnp.isfinite(truncate(logits, Truncation(top_p=top_p)))
    np.testing.assert_array_equal(kept, jax.nn.one_hot(jnp.argmax(logits, -1), V))


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary():
    logits = 3 * jax.random.normal(jax.random.key(4), (2, 50_000))  # float32 sums reach 1 before the last token
    np.testing.assert_array_equal(truncate(logits, Truncation(top_p=1.0)), logits)
    np.testing.assert_array_equal(jax.jit(truncate)(logits, Truncation(top_p=jnp.float32(1.0))), logits)


def test_the_same_key_gives_the_same_completions_and_another_key_others():
    draw = lambda key: sampling.sampler(group_size=4, max_tokens=5, eos_ids=(1,))(  # noqa: E731
        TABLE_POLICY, TABLE, random_prompts(0, 3, 4, V), key
    )
    chex.assert_trees_all_equal(draw(jax.random.key(0)), draw(jax.random.key(0)))
    assert np.mean(draw(jax.random.key(0)).tokens == draw(jax.random.key(1)).tokens) < 0.5


def test_every_completion_has_noise_of_its_own():
    keys = jax.random.key_data(completion_keys(jax.random.key(0), 20, 30)).reshape(600, -1)
    assert len(np.unique(keys, axis=0)) == 600


def a_batch(B=2, P=5):
    """The first `B` of four prompts, whose padding is full of tokens."""
    lengths = jnp.array([5, 2, 4, 1])
    tokens = jax.random.randint(jax.random.key(5), (4, 9), 2, V)
    return Prompts(tokens[:B, :P], lengths[:B])


def test_a_completion_stays_the_same_in_a_larger_group_and_a_larger_batch_of_wider_prompts():

    def draw(prompts, **sizes):
        return sampling.sampler(eos_ids=(1,), **sizes)(DECODER, decoder_params(), prompts, jax.random.key(6))

    narrow = draw(a_batch(), group_size=3, max_tokens=6)
    wide = draw(a_batch(B=4, P=9), group_size=5, max_tokens=8)
    np.testing.assert_array_equal(wide.tokens[:2, :3, :6], narrow.tokens)
    np.testing.assert_allclose(wide.log_probs[:2, :3, :6], narrow.log_probs, atol=1e-4)
    np.testing.assert_array_equal(np.minimum(wide.lengths[:2, :3], 6), narrow.lengths)


def test_greedy_takes_the_chain_of_likeliest_tokens():
    params, T = decoder_params(), 6
    prompts = random_prompts(1, 3, 4)
    settings = {"group_size": 2, "max_tokens": T, "eos_ids": (), "temperature": 0.7, "top_k": 5}
    rollout = dataclasses.replace(sampling.sampler(**settings), greedy=True)(
        DECODER, params, prompts, jax.random.key(0)
    )

    @jax.jit
    def whole(tokens):  # the network over a whole row, without a cache
        nothing = DECODER.prefill(params, tokens[:, :1], jnp.ones(3, jnp.int32))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)[:, None]
        return DECODER.unembed(params, DECODER.extend(params, tokens[:, None], positions, nothing)[0])[:, 0]

    rows = np.pad(prompts.tokens, ((0, 0), (0, T)))
    for t, b in itertools.product(range(T), range(3)):
        end = int(prompts.lengths[b]) + t
        logits = np.asarray(whole(rows)[b, end - 1])
        rows[b, end] = np.argmax(logits)
        np.testing.assert_array_equal(rollout.tokens[b, :, t], rows[b, end])
        expected = np.log(truncated_softmax(logits, 0.7)[rows[b, end]])  # of the whole softmax, whatever is kept
        np.testing.assert_allclose(rollout.log_probs[b, :, t], expected, atol=1e-4)


@pytest.mark.parametrize("eos_ids", [(1, 4, 6), ()], ids=str)
def test_a_completion_ends_with_the_first_of_several_end_tokens(eos_ids):
    T = 6
    rollout = sampling.sampler(group_size=16, max_tokens=T, eos_ids=eos_ids)(
        TABLE_POLICY, TABLE, a_batch(4), jax.random.key(7)
    )
    rollout = jax.device_get(rollout)
    seen = set()
    for b, g in np.ndindex(4, 16):
        tokens, length = rollout.tokens[b, g], rollout.lengths[b, g]
        ends = np.flatnonzero(np.isin(tokens[:length], eos_ids))
        seen |= set(tokens[ends])
        assert rollout.truncated[b, g] == (len(ends) == 0)
        assert length == (T if rollout.truncated[b, g] else ends[0] + 1)
        np.testing.assert_array_equal(rollout.mask[b, g], np.arange(T) < length)
        assert np.all(tokens[length:] == 0)
        assert np.all(rollout.log_probs[b, g, length:] == 0)
        assert np.all(rollout.log_probs[b, g, :length] < 0)
    assert seen == set(eos_ids)
    assert np.any(rollout.truncated)


@pytest.mark.parametrize(("max_tokens", "truncated"), [(3, False), (2, True)])
def test_an_end_token_in_the_last_place_is_an_end(max_tokens, truncated):
    rollout = dataclasses.replace(sampling.sampler(group_size=2, max_tokens=max_tokens, eos_ids=(1,)), greedy=True)(
        TABLE_POLICY, a_chain(2, 3, 4, 1), Prompts(jnp.array([[2]]), jnp.array([1])), jax.random.key(0)
    )
    np.testing.assert_array_equal(rollout.tokens, [[[3, 4, 1][:max_tokens]] * 2])
    np.testing.assert_array_equal(rollout.truncated, [[truncated] * 2])


def test_decoding_stops_when_every_completion_has_ended():
    steps = []

    def extend(*arguments, **columns):
        jax.debug.callback(lambda: steps.append(1))
        return TABLE_POLICY.extend(*arguments, **columns)

    prompts = Prompts(jnp.array([[2], [4]]), jnp.array([1, 1]))
    rollout = dataclasses.replace(sampling.sampler(group_size=3, max_tokens=50, eos_ids=(1,)), greedy=True)(
        TABLE_POLICY._replace(extend=extend), a_chain(2, 3, 4, 1), prompts, jax.random.key(0)
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(rollout.lengths, [[3] * 3, [1] * 3])
    assert len(steps) == 3


def test_each_prompt_is_read_once_and_one_cache_serves_its_group():
    prefills, caches = [], []

    def prefill(params, tokens, lengths):
        prefills.append(tokens.shape)
        return DECODER.prefill(params, tokens, lengths)

    def extend(params, tokens, positions, prompt_cache, cache, **columns):
        caches.append(prompt_cache.layers.keys.shape[:3])
        return DECODER.extend(params, tokens, positions, prompt_cache, cache, **columns)

    policy = DECODER._replace(prefill=prefill, extend=extend)
    draw = functools.partial(sampling.sampler(group_size=3, max_tokens=4, eos_ids=()), policy)
    jax.eval_shape(draw, decoder_params(), random_prompts(2, 2, 6), jax.random.key(0))
    assert prefills == [(2, 6)]
    assert set(caches) == {(2, 2, 5)}  # layers, prompts, all prompt tokens but the last


def test_params_are_cast_once_before_decoding():
    policy = tiny_policy("qwen3", dtype=jnp.bfloat16)
    casts, read = [], []

    def cast(params):
        casts.append(params)
        return policy.cast(params)

    def extend(params, *arguments, **columns):
        read.append(params)
        return policy.extend(params, *arguments, **columns)

    sampler = sampling.sampler(group_size=3, max_tokens=4, eos_ids=())
    draw = functools.partial(sampler, policy._replace(cast=cast, extend=extend))
    jax.eval_shape(draw, decoder_params(), random_prompts(2, 2, 6), jax.random.key(0))
    assert len(casts) == 1
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, read[-1])
    assert dtypes.pop("lm_head") == jnp.float32  # logits keep their precision
    assert set(jax.tree.leaves(dtypes)) == {jnp.dtype(jnp.bfloat16)}


def test_in_bfloat16_scored_log_probs_stay_near_the_sampled_ones():
    policy = tiny_policy("qwen3", dtype=jnp.bfloat16)
    params = decoder_params()
    rollout = sampling.sampler(group_size=4, max_tokens=8, eos_ids=(1,))(
        policy, params, random_prompts(3, 4, 6), jax.random.key(1)
    )
    np.testing.assert_allclose(score(policy, params, rollout).log_probs, rollout.log_probs, atol=3e-2)


def test_the_cache_of_completions_may_be_narrower_than_the_arithmetic():
    wide, narrow = (models.decoder(dataclasses.replace(DECODER.config, cache_dtype=d)) for d in (None, jnp.bfloat16))
    cache = jax.eval_shape(lambda: narrow.init_cache(2, 3, 4))
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    cache = jax.eval_shape(lambda: wide.init_cache(2, 3, 4))
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.float32)}
    params, prompts = decoder_params(), random_prompts(3, 4, 6)

    def differs(policy):
        rollout = sampling.sampler(group_size=4, max_tokens=8, eos_ids=(1,))(policy, params, prompts, jax.random.key(1))
        return float(jnp.max(jnp.abs(score(policy, params, rollout).log_probs - rollout.log_probs)))

    assert differs(wide) < 1e-5 < 1e-4 < differs(narrow) < 3e-2


def test_layers_in_a_loop_draw_what_layers_one_after_the_other_do():
    loop, apart = (models.decoder(dataclasses.replace(DECODER.config, layers_apart=x)) for x in (False, True))
    assert jax.eval_shape(lambda: loop.init_cache(2, 3, 4)).layers.keys.shape[:4] == (2, 2, 3, 4)
    assert len(jax.eval_shape(lambda: apart.init_cache(2, 3, 4)).layers) == 2
    params, prompts = decoder_params(), random_prompts(3, 4, 6)
    ours, theirs = (
        sampling.sampler(group_size=4, max_tokens=8, eos_ids=(1,))(policy, params, prompts, jax.random.key(1))
        for policy in (loop, apart)
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


def test_traced_settings_and_keys_give_what_numbers_give_and_can_be_mapped_over():
    prompts = random_prompts(4, 2, 3, V)

    def draw(key, temperature, top_p, min_p):
        return sampling.sampler(
            group_size=4, max_tokens=6, eos_ids=(1, 2), temperature=temperature, top_p=top_p, min_p=min_p
        )(TABLE_POLICY, TABLE, prompts, key)

    keys = jax.random.split(jax.random.key(8), 3)
    settings = np.float32([[0.5, 1.0, 2.0], [0.6, 0.9, 1.0], [0.3, 0.1, 0.6]])
    mapped = jax.jit(jax.vmap(draw))(keys, *settings)
    for i in range(3):
        apart = draw(keys[i], *(float(x) for x in settings[:, i]))
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], mapped._replace(prompts=())), apart._replace(prompts=()), atol=1e-5
        )


def test_other_batches_keys_and_temperatures_do_not_compile_again():
    prefill = chex.assert_max_traces(lambda params, tokens, lengths: Prompts(tokens, lengths), n=1)
    policy = TABLE_POLICY._replace(prefill=prefill)
    for seed in range(3):
        sampling.sampler(group_size=2, max_tokens=3, eos_ids=(1,), temperature=1.0 + seed, min_p=0.1 * (seed + 1))(
            policy, TABLE + seed, random_prompts(seed, 2, 4, V), jax.random.key(seed)
        )


@pytest.mark.parametrize(
    ("settings", "sorts"),
    [({}, False), ({"min_p": 0.1}, False), ({"greedy": True}, False), ({"top_k": 3}, True), ({"top_p": 0.9}, True)],
    ids=str,
)
def test_the_vocabulary_is_sorted_only_for_top_k_and_top_p(settings, sorts):
    draw = lambda params, key: sampling.PolicySampler(group_size=2, max_tokens=3, eos_ids=(1, 5), **settings)(  # noqa: E731
        TABLE_POLICY, params, random_prompts(0, 2, 3, V), key
    )
    program = jax.jit(draw).lower(TABLE, jax.random.key(0)).as_text()
    assert bool(re.search(r"stablehlo\.sort|top_k", program)) == sorts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "at least 1, got 0 and 3"),
        ({"max_tokens": -2}, "at least 1, got 2 and -2"),
        ({"temperature": 0}, "temperature is above 0, got 0; .* greedy=True"),
        ({"temperature": -0.5}, "temperature is above 0, got -0.5"),
        ({"top_k": 0}, "top_k is at least 1, got 0"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p is above 0 and at most 1, got 1.5"),
        ({"min_p": -0.1}, "min_p is above 0 and at most 1, got -0.1"),
        ({"min_p": 2}, "min_p is above 0 and at most 1, got 2"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_their_value(settings, message):
    settings = {"group_size": 2, "max_tokens": 3, "eos_ids": ()} | settings
    with pytest.raises(ValueError, match=message):
        sampling.sampler(**settings)(TABLE_POLICY, TABLE, random_prompts(0, 1, 2, V), jax.random.key(0))
