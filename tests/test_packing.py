"""Trimmed and packed completions give what whole ones give."""

import collections
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from grpo_jax import losses, models, packing, testing
from grpo_jax.policies import from_logits_fn
from grpo_jax.run import chips
from grpo_jax.run.compilation import count_compilations
from grpo_jax.scoring import Teacher, score
from grpo_jax.statistics import summary
from grpo_jax.train_step import make_learn
from grpo_jax.types import Experience, Likeliest, Rollout
from grpo_jax.updates import Updates, init_state, jit_learn

LENGTHS = np.array([[3, 12, 1, 4], [2, 2, 7, 5], [0, 6, 1, 1], [9, 1, 1, 1]])
B, G, T = 4, 4, 12
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # most of the time else


def rollout_of(lengths, T):
    """Completions of these lengths; what they say does not matter."""
    shape = (*lengths.shape, T)
    mask = np.arange(T) < lengths[..., None]
    return Rollout(None, np.zeros(shape, np.int32), lengths, mask, np.zeros(shape), np.zeros(lengths.shape, bool))


def experience():
    prompts = testing.random_prompts(0, B, 6)
    keys = jax.random.split(jax.random.key(1), 4)
    tokens = jax.random.randint(keys[0], (B, G, T), 0, 61)
    mask = jnp.arange(T) < LENGTHS[..., None]
    of_tokens = lambda key: jnp.where(mask, -jax.random.uniform(key, (B, G, T)), 0.0)  # noqa: E731
    rollout = Rollout(
        prompts, tokens, jnp.asarray(LENGTHS, jnp.int32), mask, of_tokens(keys[1]), jnp.zeros((B, G), bool)
    )
    return Experience(
        rollout, ref_log_probs=of_tokens(keys[2]), advantages=jax.random.normal(keys[3], (B, G))
    )._replace(weights=mask.astype(jnp.float32))


@settings(deadline=None)
@given(
    lengths=arrays.arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 40)),
    multiple=st.integers(1, 16),
)
def test_every_token_has_one_place_in_one_row_of_its_group(lengths, multiple):
    G = lengths.shape[1]
    known = packing.shapes(G, 40, multiple=multiple)
    packed = packing.pack(rollout_of(lengths, 40), multiple=multiple)
    if packed is None:
        return
    _, R, W = packed.segments.shape
    assert (R, W) in known
    assert W % multiple == 0
    assert R * W < G * 40
    packed = jax.device_get(packed)  # a slice of a jax.Array is a program for each length
    for b, g in np.ndindex(lengths.shape):
        places = np.flatnonzero(packed.segments[b] == g)
        np.testing.assert_array_equal(places, packed.places[b, g, : lengths[b, g]])
        np.testing.assert_array_equal(packed.tokens[b].reshape(-1)[places], g * 40 + np.arange(lengths[b, g]))
        assert len(set(places // W)) <= 1


def test_the_last_shape_with_room_is_taken():
    assert packing.shapes(4, T, multiple=4) == [(3, 12), (2, 12), (1, 12), (1, 8), (1, 4)]
    of = lambda lengths: packing.pack(rollout_of(np.array([lengths]), T), multiple=4)  # noqa: E731
    assert of([3, 12, 1, 4]).segments.shape == (1, 2, 12)
    assert of([3, 4, 1, 0]).segments.shape == (1, 1, 8)
    assert of([7, 7, 7, 3]).segments.shape == (1, 3, 12)  # 24 tokens, of which no two rows hold three sevens
    assert of([0, 0, 0, 0]).segments.shape == (1, 1, 4)
    assert of([7, 7, 7, 7]) is None
    with pytest.raises(ValueError, match="multiple is at least 1, got 0"):
        packing.pack(rollout_of(LENGTHS, T), multiple=0)


def test_a_row_is_not_taken_where_the_multiple_makes_it_wider_than_all_rows_were():
    assert packing.shapes(2, 64, multiple=256) == []
    assert packing.pack(rollout_of(np.full((1, 2), 60), 64), multiple=256) is None


@pytest.mark.parametrize(("G", "T", "most"), [(2, 16, 0), (8, 128, 6), (8, 2048, 8), (16, 1024, 10), (64, 512, 14)])
def test_random_lengths_make_no_more_shapes_than_are_told(G, T, most):
    known = packing.shapes(G, T)
    assert len(known) == most
    tokens = [R * W for R, W in known]
    assert tokens == sorted(tokens, reverse=True)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        lengths = np.minimum(rng.geometric(1 / rng.uniform(1, T), (4, G)), T)
        packed = packing.pack(rollout_of(lengths, T))
        seen.add(None if packed is None else packed.segments.shape[1:])
    assert seen <= {None, *known}
    assert len(seen) > 1 or not known


def test_the_shapes_that_come_most_often_are_compiled_ahead_and_no_more_than_told():
    lengths = np.random.default_rng(1).geometric(1 / 3, (B, G))
    packs = lambda lengths: packing.pack(rollout_of(lengths, T), multiple=4)  # noqa: E731
    given = Experience(rollout_of(lengths, T), packing=packs(lengths))
    learn = jit_learn(lambda state, batch: (state, {"segments": jnp.sum(batch.packing.segments)}))
    state = init_state({"w": jnp.zeros(2)}, optax.sgd(1.0), jax.random.key(0))
    drawn = [packs(np.random.default_rng(n).choice(lengths.ravel(), (B, G))) for n in range(200)]
    found = collections.Counter(x and x.segments.shape[1:] for x in drawn)
    now, count = given.packing.segments.shape[1:], count_compilations()
    likely = [shape for shape, _ in found.most_common() if shape != now][:2]
    assert packing.compile_ahead(learn, state, given, at_most=0, multiple=4) == []
    assert sorted(packing.compile_ahead(learn, state, given, at_most=2, multiple=4)) == sorted(likely)
    for thread in threading.enumerate():
        if thread.name == "compiling ahead":
            thread.join()
    for shape, compiled in [(likely[0], 2), (likely[1], 2), (now, 3)]:
        packed = next(x for x in drawn if x is not None and x.segments.shape[1:] == shape)
        state, metrics = learn(state, given._replace(packing=packed))
        assert (int(metrics["segments"]), count()) == (np.asarray(packed.segments).sum(), compiled)
    with pytest.raises(ValueError, match=r"step\.learn of step"):
        packing.compile_ahead(lambda state, batch: (state, {}), state, given)


@pytest.mark.parametrize(
    ("family", "multiple"), [pytest.param("llama", 6, marks=pytest.mark.slow), ("qwen2_window", 4)]
)
def test_packed_completions_have_the_same_scores_and_gradients(family, multiple):
    config = testing.tiny_policy("qwen2" if family == "qwen2_window" else family).config
    if family == "qwen2_window":
        config = dataclasses.replace(config, windows=(3,) * config.num_layers)
    policy = models.decoder(config)
    params, teacher = (jax.jit(policy.init)(jax.random.key(seed)) for seed in (0, 1))
    rollout = experience().rollout
    top_tokens = jax.random.randint(jax.random.key(3), (B, G, T, 2), 0, 20)
    weights = jax.random.normal(jax.random.key(2), (B, G, T))

    @jit
    def evaluate(params, packed):
        def loss(params):
            scores = score(
                policy, params, rollout, packing=packed, chunk_tokens=24, teacher=Teacher(policy, losses.reverse_kl),
                teacher_params=teacher, top_tokens=top_tokens,
            )  # fmt: skip
            return jnp.sum(weights * scores.log_probs) + jnp.sum(scores.entropy + scores.divergence), scores

        return jax.grad(loss, has_aux=True)(params)

    packed = packing.pack(rollout, multiple=multiple)
    (expected, scores), (actual, packed_scores) = evaluate(params, None), evaluate(params, packed)
    filled = {name for name, x in scores._asdict().items() if x is not None}
    assert filled == {"log_probs", "entropy", "collision", "divergence", "top_log_probs"}
    for a, e in zip(jax.tree.leaves(packed_scores), jax.tree.leaves(scores), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=5e-6)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


@settings(deadline=None, max_examples=30)
@given(
    tokens=arrays.arrays(np.int32, (2, 5, 6), elements=st.integers(0, 1)),
    lengths=arrays.arrays(np.int32, (2, 5), elements=st.integers(0, 6)),
)
def test_a_tree_has_each_beginning_once_and_its_tokens_see_their_ancestors(tokens, lengths):
    rollout = rollout_of(lengths, 6)._replace(tokens=tokens)
    beginnings = [
        {tuple(tokens[b, g, : t + 1]) for g in range(5) for t in range(lengths[b, g])} for b in range(len(tokens))
    ]
    grown = jax.device_get(packing.tree(rollout, multiple=1))
    if grown is None:
        assert max(map(len, beginnings)) > packing.shapes(5, 6, multiple=1)[0][0] * 6
        return
    for b, known in enumerate(beginnings):
        segments, last = grown.segments[b, 0], grown.descendants[b, 0]
        assert np.count_nonzero(segments >= 0) == len(known)
        begins = {}  # what stands at a place, with all before it
        for g in range(5):
            for t in range(lengths[b, g]):
                begins.setdefault(int(grown.places[b, g, t]), set()).add(tuple(tokens[b, g, : t + 1]))
        assert all(len(same) == 1 for same in begins.values())
        begins = {place: same.pop() for place, same in begins.items()}
        assert sorted(begins.values()) == sorted(known)
        for place, path in begins.items():
            g, t = divmod(int(grown.tokens[b, 0, place]), 6)
            assert tuple(tokens[b, g, : t + 1]) == path
            seen = [
                other for other, its in begins.items()
                if segments[other] <= segments[place] <= last[other] and len(its) <= len(path)
            ]  # fmt: skip
            assert {begins[other] for other in seen} == {path[: n + 1] for n in range(len(path))}


def binary_tree(B, depth, turn):
    """Conversations of `depth` turns, each continued in two ways; the first turn is common to all."""
    G = 2 ** (depth - 1)
    rng = np.random.default_rng(0)
    turns = [np.repeat(rng.integers(1, 61, (B, 2**n, turn)), G // 2**n, axis=1) for n in range(depth)]
    tokens = np.concatenate(turns, axis=-1).astype(np.int32)
    order = rng.permutation(G)  # a group is in no order
    rollout = rollout_of(np.full((B, G), depth * turn), depth * turn)
    prompts = testing.random_prompts(0, B, 6)
    return jax.tree.map(jnp.asarray, rollout._replace(prompts=prompts, tokens=tokens[:, order]))


@pytest.mark.slow
def test_a_tree_of_depth_four_has_the_scores_and_gradients_of_its_rows():
    policy = testing.tiny_policy("llama")
    params, rollout = jax.jit(policy.init)(jax.random.key(0)), binary_tree(B=2, depth=4, turn=3)
    weights = jax.random.normal(jax.random.key(2), rollout.tokens.shape)

    def loss(params, packed):
        scores = score(policy, params, rollout, packing=packed)
        return jnp.sum(weights * scores.log_probs) + jnp.sum(scores.entropy), scores

    gradient = jit(jax.grad(loss, has_aux=True))
    grown = packing.tree(rollout, multiple=1)
    assert grown.segments.shape == (2, 1, 48)  # 45 tokens, where rows have 96
    assert np.count_nonzero(grown.segments[0] >= 0) == 3 * (1 + 2 + 4 + 8)
    (expected, of_rows), (actual, of_tree) = gradient(params, None), gradient(params, grown)
    np.testing.assert_allclose(of_tree.log_probs, of_rows.log_probs, rtol=0, atol=5e-6)
    np.testing.assert_allclose(of_tree.entropy, of_rows.entropy, rtol=0, atol=5e-6)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())
    flops = [chips.flops(jax.make_jaxpr(loss)(params, packed).jaxpr) for packed in (None, grown)]
    assert flops[1] < 0.65 * flops[0]  # the prompts are in both


def test_completions_without_a_common_beginning_make_no_tree():
    rollout = binary_tree(B=1, depth=1, turn=12)
    assert packing.tree(rollout, multiple=1) is None
    tokens = jnp.arange(4 * 12).reshape(1, 4, 12)
    assert packing.tree(rollout_of(np.full((1, 4), 12), 12)._replace(tokens=tokens), multiple=1) is None


def test_a_tree_is_refused_where_shared_tokens_would_be_counted_once():
    policy, rollout = testing.tiny_policy("qwen3_moe"), binary_tree(B=1, depth=3, turn=4)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    with pytest.raises(ValueError, match="routers"):
        jax.eval_shape(lambda params: score(policy, params, rollout, packing=packing.tree(rollout, multiple=1)), params)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["trimmed", "packed and trimmed"])
def test_a_step_learns_the_same_from_less_padding(layout):
    policy = testing.tiny_policy("qwen3")
    optimizer = optax.sgd(0.1)
    whole = experience()
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 8))) if x.shape == (B, G, T) else x, whole)
    given = packing.trim(wide, multiple=4) if "trimmed" in layout else wide
    assert given.rollout.tokens.shape[-1] == (12 if "trimmed" in layout else 20)
    if "packed" in layout:
        given = given._replace(packing=packing.pack(given.rollout, multiple=4))
    assert jax.tree.structure(given._replace(packing=None)) == jax.tree.structure(whole)
    learn = jit(
        make_learn(policy, optimizer, loss=losses.grpo(penalty=losses.k3(0.04)), updates=Updates(micro_batches=2))
    )
    params = jax.jit(policy.init)(jax.random.key(0))
    state = init_state(params, optimizer, jax.random.key(3), reference=True)
    (expected, metrics), (actual, of_given) = (
        learn(state, experience._replace(ref_log_probs=None)) for experience in (whole, given)
    )
    for a, e in zip(jax.tree.leaves(actual.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6)
    for name, value in summary(metrics).items():
        np.testing.assert_allclose(summary(of_given)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_network_that_cannot_keep_packed_completions_apart_refuses():
    policy = from_logits_fn(lambda params, tokens, mask: params[tokens])
    with pytest.raises(ValueError, match="segments=None"):
        score(policy, jnp.zeros((61, 61)), experience().rollout, packing=packing.pack(experience().rollout, multiple=4))


def test_what_a_teacher_thought_likeliest_is_trimmed_with_the_tokens():
    whole = experience()
    rollout = whole.rollout._replace(lengths=jnp.minimum(whole.rollout.lengths, 3))
    tokens = jnp.arange(B * G * T * 2).reshape(B, G, T, 2)
    cut = packing.trim(whole._replace(rollout=rollout, teacher_top=Likeliest(tokens, -1.0 * tokens)), multiple=1)
    np.testing.assert_array_equal(cut.teacher_top.tokens, tokens[:, :, :3])
    np.testing.assert_array_equal(cut.teacher_top.log_probs, -1.0 * tokens[:, :, :3])


def test_what_is_packed_is_not_trimmed():
    whole = experience()
    packed = whole._replace(packing=packing.pack(whole.rollout, multiple=4))
    with pytest.raises(ValueError, match="a packed experience is not trimmed"):
        packing.trim(packed)
