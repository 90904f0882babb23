"""Attention against the softmax in NumPy float64, and each form against the reference, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, testing
from grpo_jax.models import attention
from grpo_jax.models.attention import KeyValues
from grpo_jax.scoring import score
from grpo_jax.types import Rollout

B, G, N, K, h = 2, 3, 4, 2, 8
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # it would take most of the time
CASES = {  # queries, own columns, prompt columns or None
    "completions": (5, 5, 7),
    "a cache": (2, 9, 7),
    "one query": (1, 6, 7),
    "a prompt alone": (6, 6, None),
    "a prompt of one token": (5, 5, 0),
    "nothing": (0, 0, None),
}


def inputs(case, dtype=jnp.float32):
    """Arguments of an attention, with masks in which every query sees some of its own columns and maybe no prompt."""
    S, C, P = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    own_mask = jnp.asarray(rng.random((B, G, S, C)) < 0.5).at[..., :1].set(True)
    query, own = normal(B, G, S, N, h), KeyValues(normal(B, G, C, K, h), normal(B, G, C, K, h))
    if P is None:
        return query, own, own_mask, None, None
    prompt_mask = jnp.asarray(rng.random((B, G, S, P)) < 0.5).at[0, :1].set(False)
    return query, own, own_mask, KeyValues(normal(B, P, K, h), normal(B, P, K, h)), prompt_mask


def softmax_of_the_concatenation(query, own, own_mask, prompt, prompt_mask):
    """The definition, a query and head at a time, in NumPy."""
    query, own, own_mask, prompt, prompt_mask = jax.tree.map(
        lambda x: np.asarray(x, bool if x.dtype == bool else np.float64), (query, own, own_mask, prompt, prompt_mask)
    )
    out = np.zeros(query.shape)
    for b, g, s, n in np.ndindex(query.shape[:4]):
        k = n // (N // K)
        keys, values = (x[b, g, :, k][own_mask[b, g, s]] for x in own)
        if prompt is not None:
            more = [x[b, :, k][prompt_mask[b, g, s]] for x in prompt]
            keys, values = np.concatenate([more[0], keys]), np.concatenate([more[1], values])
        logits = keys @ query[b, g, s, n] / np.sqrt(h)
        weights = np.exp(logits - logits.max())
        out[b, g, s, n] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("form", [attention.joint, attention.blockwise, attention.by_platform])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_softmax_over_prompt_and_own_tokens(form, case):
    given = inputs(case)
    np.testing.assert_allclose(jax.jit(form)(*given), softmax_of_the_concatenation(*given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [attention.blockwise, attention.by_platform])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(form, case):
    query, own, own_mask, prompt, prompt_mask = inputs(case)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form, query, own, prompt):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(form(x[0], x[1], own_mask, x[2], prompt_mask))), (0, 1, 2))(
            query, own, prompt
        )

    expected, actual = gradients(attention.joint, query, own, prompt), gradients(form, query, own, prompt)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6 * np.max(np.abs(e), initial=0.1))


def test_in_bfloat16_it_rounds_as_the_reference_does():
    given = inputs("completions", jnp.bfloat16)
    actual = jax.jit(attention.blockwise)(*given)
    assert actual.dtype == jnp.bfloat16
    exact = softmax_of_the_concatenation(*given)
    np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=0, atol=2e-2)

    def gradients(form, query, own, own_mask, prompt, prompt_mask):
        def loss(query, own, prompt):
            return jnp.sum(jnp.sin(form(query, own, own_mask, prompt, prompt_mask).astype(jnp.float32)))

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2)))(query, own, prompt))

    precise = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32), given)
    for a, e in zip(gradients(attention.blockwise, *given), gradients(attention.joint, *precise), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), e, rtol=0, atol=2e-2 * np.abs(e).max())


def test_it_can_be_mapped_over():
    """As by runs with several seeds in one program."""
    given = inputs("completions")
    both = jax.tree.map(lambda x: jnp.stack([x, jnp.flip(x, 0)]), given)
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attention.blockwise(*x))))
    mapped = jax.jit(jax.vmap(gradient))(*both)
    for i in range(2):
        one = gradient(*jax.tree.map(lambda x, i=i: x[i], both))
        np.testing.assert_allclose(mapped[i], one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.save_only_these_names("attention")])
def test_the_attention_and_what_is_kept_are_arguments_of_the_network(remat):
    """The gradient of a network's log-probs is the same, and the policy of `jax.checkpoint` reaches the layers."""
    prompts = testing.random_prompts(0, B, 6)
    tokens = jax.random.randint(jax.random.key(1), (B, G, 5), 0, 61)
    full = jnp.full((B, G), 5)
    rollout = Rollout(prompts, tokens, full, jnp.ones((B, G, 5), bool), jnp.zeros((B, G, 5)), jnp.zeros((B, G), bool))
    plain = testing.tiny_policy("qwen2")
    params = plain.init(jax.random.key(0))

    def gradient(**settings):
        policy = models.decoder(dataclasses.replace(plain.config, **settings))
        return jax.grad(lambda params: jnp.sum(score(policy, params, rollout, entropy=False).log_probs))

    program = gradient(attention=attention.blockwise, remat=remat)
    actual, expected = jit(program)(params), jit(gradient(attention=attention.joint, remat=False))(params)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-6 * np.abs(e).max())
    exponentials = [
        str(jax.make_jaxpr(gradient(attention=attention.blockwise, remat=remat))(params)).count("= exp ")
        for remat in (remat, True)
    ]
    assert (exponentials[0] < exponentials[1]) == callable(remat), exponentials
