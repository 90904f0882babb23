"""The draw itself: the softmax, tail and all, at vocabularies of any size, and nothing that is ruled out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from grpo_jax.sampling.drawing import completion_keys, draw

LARGE = [pytest.param(V, marks=pytest.mark.slow) for V in (49_152, 50_257, 262_144)]


def logits_of(V, kind):
    """`[V]`, some of them ruled out: the last, a run longer than a block, and each seventh."""
    rng = np.random.default_rng(V)
    logits = 2 * rng.standard_normal(V).astype(np.float32)
    if kind == "peaked":  # all but one token share a twentieth
        others = np.log(np.sum(np.exp(logits.astype(np.float64))))
        logits[V // 2] = others + np.log(19)
    logits[-1] = logits[V // 8 : V // 4] = logits[3::7] = -np.inf
    logits[V // 2] = max(logits[V // 2], 0.0)
    return logits


def softmax(logits):
    probs = np.exp(logits.astype(np.float64) - logits.max())
    return probs / probs.sum()


def binned(counts, probs, least=20):
    """Counts and what was expected, of bins of tokens from the unlikeliest on, at least `least` expected in each."""
    order = np.argsort(probs)
    expected = counts.sum() * probs[order]
    bins = np.floor(np.cumsum(expected) / least).astype(int)
    bins = np.unique(bins, return_inverse=True)[1]
    seen, wanted = np.bincount(bins, counts[order]), np.bincount(bins, expected)
    if wanted[-1] < least:
        seen, wanted = (np.append(x[:-2], x[-2:].sum()) for x in (seen, wanted))
    return seen, wanted


@functools.partial(jax.jit, static_argnums=2)
def draw_many(key, logits, N):
    keys = completion_keys(key, N, 1)[:, 0]
    return jax.vmap(lambda key: draw(key[None], jnp.int32(5), logits[None], False))(keys)


@pytest.mark.parametrize("V", [511, 1021, 1024, *LARGE])
def test_draws_follow_the_softmax_with_its_tail_and_nothing_ruled_out_is_drawn(V):
    for kind in ("spread", "peaked"):
        logits = logits_of(V, kind)
        tokens, log_probs = (x[:, 0] for x in jax.device_get(draw_many(jax.random.key(1), logits, 20_000)))
        probs = softmax(logits)
        counts = np.bincount(tokens, minlength=V)
        assert len(counts) == V
        assert np.all(counts[probs == 0] == 0)
        seen, expected = binned(counts, probs)
        assert len(seen) > 20
        assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3
        np.testing.assert_allclose(log_probs, np.log(probs[tokens]), atol=2e-5)


@pytest.mark.parametrize("V", [100, 1000])
def test_a_draw_is_of_its_key_and_place_alone(V):
    keys, logits = completion_keys(jax.random.key(0), 4, 3), jax.random.normal(jax.random.key(1), (4, 3, V))
    together = jax.jit(draw, static_argnums=3)(keys, jnp.int32(2), logits, False)[0]
    apart = jax.jit(draw, static_argnums=3)(keys[2, 1:], jnp.array([2, 2]), logits[2, 1:], False)[0]
    np.testing.assert_array_equal(apart, together[2, 1:])
    later = draw(keys, jnp.int32(3), logits, False)[0]
    assert np.mean(later == together) < 0.5
