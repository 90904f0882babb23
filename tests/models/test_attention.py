"""Attention against the softmax in NumPy float64, and each form against the reference, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, testing
from grpo_jax.models import attention
from grpo_jax.models.attention import KeyValues, MaskInputs
from grpo_jax.scoring import score
from grpo_jax.types import Rollout

B, G, N, K, h = 2, 3, 4, 2, 8
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # it would take most of the time
CASES = {  # queries, own columns, prompt columns or None, whether packed, whether there is a window
    "completions": (5, 5, 7, False, False),
    "packed completions": (6, 6, 7, True, False),
    "a tree": (6, 6, 7, "tree", False),
    "a window": (5, 5, 7, False, True),
    "a cache": (2, 9, 7, False, False),
    "a cache and a window": (2, 9, 7, False, True),
    "one query": (1, 6, 7, False, False),
    "a prompt alone": (6, 6, None, False, False),
    "a prompt of one token": (5, 5, 0, False, False),
    "nothing": (0, 0, None, False, False),
}


def inputs(case, dtype=jnp.float32):
    """Arguments of an attention, positions in any order, in which every query sees one of its own columns."""
    S, C, P, packed, windowed = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    queries = rng.integers(3, 9, (B, G, S)).astype(np.int32)
    own = rng.integers(-1, 9, (B, G, C)).astype(np.int32)
    own[..., :S] = queries[..., :C]  # of these each query sees itself
    mask_inputs = MaskInputs(
        jnp.asarray(queries),
        jnp.asarray(own),
        None if P is None else jnp.asarray(rng.integers(0, P + 1, (B, 1)).repeat(G, 1), jnp.int32).at[0].set(0),
        jnp.asarray(rng.integers(0, 3, (B, G, S)), jnp.int32) if packed else None,
        jnp.int32(4) if windowed else None,
    )
    if packed == "tree":
        later = rng.integers(0, 2, (B, G, S))
        mask_inputs = mask_inputs._replace(descendants=mask_inputs.segments + jnp.asarray(later, jnp.int32))
    prompt = None if P is None else KeyValues(normal(B, P, K, h), normal(B, P, K, h))
    return normal(B, G, S, N, h), KeyValues(normal(B, G, C, K, h), normal(B, G, C, K, h)), prompt, mask_inputs


def softmax_of_the_concatenation(query, own, prompt, mask_inputs):
    """The definition, a query and head at a time, in NumPy."""
    query, own, prompt = jax.tree.map(lambda x: np.asarray(x, np.float64), (query, own, prompt))
    mask_inputs = jax.tree.map(np.asarray, mask_inputs)
    out = np.zeros(query.shape)
    for b, g, s, n in np.ndindex(query.shape[:4]):
        k, position = n // (N // K), mask_inputs.queries[b, g, s]
        since = -1 if mask_inputs.window is None else position - mask_inputs.window  # the last position out of sight
        columns = [c for c, at in enumerate(mask_inputs.own[b, g]) if at >= 0 and since < at <= position]
        if mask_inputs.descendants is not None:
            segments, last = mask_inputs.segments[b, g], mask_inputs.descendants[b, g]
            columns = [c for c in columns if segments[s] in range(segments[c], last[c] + 1)]
        elif mask_inputs.segments is not None:
            columns = [c for c in columns if mask_inputs.segments[b, g, c] == mask_inputs.segments[b, g, s]]
        keys, values = (x[b, g, columns, k] for x in own)
        if prompt is not None:
            seen = [p for p in range(mask_inputs.prompt[b, g]) if p > since]
            keys = np.concatenate([prompt.keys[b, seen, k], keys])
            values = np.concatenate([prompt.values[b, seen, k], values])
        logits = keys @ query[b, g, s, n] / np.sqrt(h)
        weights = np.exp(logits - logits.max())
        out[b, g, s, n] = weights / weights.sum() @ values
    return out


two_at_a_time = functools.partial(attention.blockwise, queries=2)
IN_BLOCKS = ("packed completions", "a window", "a prompt alone")  # of several blocks, the last not always full


@pytest.mark.parametrize("form", [attention.reference, attention.blockwise, attention.auto])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_softmax_over_prompt_and_own_tokens(form, case):
    given = inputs(case)
    np.testing.assert_allclose(jax.jit(form)(*given), softmax_of_the_concatenation(*given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [attention.reference, attention.auto])
@pytest.mark.parametrize("case", ["completions", "a cache and a window", "one query"])
def test_soft_caps_and_sinks_are_those_of_the_formula(form, case):
    """A sink is one more key, whose value is 0; the cap acts on the other logits."""
    query, own, prompt, mask_inputs = inputs(case)
    sinks, cap = jnp.asarray([0.3, -1.0, 2.0, 0.9]), 0.8
    actual = jax.jit(functools.partial(form, soft_cap=cap, sinks=sinks))(query, own, prompt, mask_inputs)
    columns = np.arange(prompt.keys.shape[1])
    for b, g, s, n in np.ndindex(query.shape[:4]):
        at, k = int(mask_inputs.queries[b, g, s]), n // (N // K)
        since = -1 if mask_inputs.window is None else at - int(mask_inputs.window)
        positions = np.asarray(mask_inputs.own[b, g])
        seen = (positions >= 0) & (positions <= at) & (positions > since)
        before = (columns < int(mask_inputs.prompt[b, g])) & (columns > since)
        keys, values = (
            np.concatenate([np.asarray(x[b, before, k]), np.asarray(y[b, g, seen, k])]).astype(np.float64)
            for x, y in zip(prompt, own, strict=True)
        )
        logits = cap * np.tanh(keys @ np.asarray(query[b, g, s, n], np.float64) / np.sqrt(h) / cap)
        weights = np.exp(logits)
        expected = weights @ values / (weights.sum() + np.exp(float(sinks[n])))
        np.testing.assert_allclose(actual[b, g, s, n], expected, rtol=0, atol=1e-6)


@functools.partial(jit, static_argnums=0)
def gradients(form, query, own, prompt, mask_inputs):
    """Those of a function of the output, in float32, of queries, keys and values."""

    def loss(query, own, prompt):
        return jnp.sum(jnp.sin(form(query, own, prompt, mask_inputs).astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2))(query, own, prompt)


def check_gradients(actual, expected, tolerance=2e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = a.astype(jnp.float32), e.astype(jnp.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.max(np.abs(e), initial=0.1))


@pytest.mark.parametrize("form", [attention.blockwise, attention.auto])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(form, case):
    given = inputs(case)
    check_gradients(gradients(form, *given), gradients(attention.reference, *given))


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_queries_in_several_blocks_give_the_same_and_the_same_gradients(case):
    given = inputs(case)
    np.testing.assert_allclose(jit(two_at_a_time)(*given), softmax_of_the_concatenation(*given), rtol=0, atol=1e-6)
    check_gradients(gradients(two_at_a_time, *given), gradients(attention.reference, *given))


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    def temporaries(S, form):
        x = jax.ShapeDtypeStruct((1, 1, S, N, h), jnp.float32)
        keys = jax.ShapeDtypeStruct((1, 1, S, K, h), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, 1, S), jnp.int32)
        program = jit(jax.grad(lambda x, own, inputs: jnp.sum(form(x, own, None, inputs))))
        compiled = program.lower(x, KeyValues(keys, keys), MaskInputs(positions, positions)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    form = functools.partial(attention.blockwise, queries=32)
    assert temporaries(1024, form) < 2.5 * temporaries(512, form)


def test_no_layer_of_a_network_that_recomputes_them_keeps_what_grows_with_the_square_of_the_tokens():
    """Such as masks, a byte for each query, key and head, which JAX takes out of the loop over the layers."""
    form = functools.partial(attention.blockwise, queries=32)
    policy = models.decoder(models.from_hf_config(testing.tiny_hf_config("llama"), attention=form))
    params = jax.eval_shape(policy.init, jax.random.key(0))

    def temporaries(T):
        tokens, numbers, flags = (jax.ShapeDtypeStruct((1, 1, T), kind) for kind in (jnp.int32, jnp.float32, bool))
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        rollout = Rollout(testing.random_prompts(0, 1, 5), tokens, one, flags, numbers, one)
        program = jit(jax.grad(lambda params, rollout: jnp.sum(score(policy, params, rollout).log_probs)))
        return program.lower(params, rollout).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.5 * temporaries(1024)


def causal_rows(query, keys, values):
    return jax.nn.dot_product_attention(query, keys, values, is_causal=True, implementation="xla")


def group(S=5, P=7, dtype=jnp.float32):
    """A group's completions after prompts of different lengths, the shortest empty."""
    query, own, prompt, _ = inputs("completions", dtype)
    query, own = jax.tree.map(lambda x: jnp.resize(x, (B, G, S, *x.shape[3:])), (query, own))
    prompt = jax.tree.map(lambda x: jnp.resize(x, (B, P, K, h)), prompt)
    lengths = jnp.array([P, 0], jnp.int32)
    positions = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(S), (B, G, S))
    return query, own, prompt, MaskInputs(positions, positions, jnp.broadcast_to(lengths[:, None], (B, G)))


def alone(query, own, _, mask_inputs):
    """The same without a prompt, as prompts themselves are read."""
    positions = mask_inputs.queries - mask_inputs.queries[..., :1]
    return query, own, None, MaskInputs(positions, positions)


def check_in_bfloat16(form, given):
    """Rounded as the reference rounds."""
    actual = jax.jit(form)(*given)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(jnp.float32), softmax_of_the_concatenation(*given), rtol=0, atol=2e-2)
    precise = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, given)
    rounded = gradients(form, *given)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(rounded))
    check_gradients(rounded, gradients(attention.reference, *precise), 3e-2)


@pytest.mark.parametrize("form", [attention.blockwise, attention.from_causal_kernel(causal_rows)])
def test_in_bfloat16_it_rounds_as_the_reference_does(form):
    check_in_bfloat16(form, group(dtype=jnp.bfloat16))


@pytest.mark.skipif(jax.default_backend() not in ("gpu", "tpu"), reason="the kernels of GPUs and TPUs")
def test_the_kernel_of_this_device_agrees():
    form = attention.cudnn if jax.default_backend() == "gpu" else attention.splash
    check_in_bfloat16(form, group(S=90, P=60, dtype=jnp.bfloat16))


KERNELS = {"JAX's own": causal_rows, "splash": functools.partial(attention.splash_kernel, interpret=True)}
GROUPS = {
    "prompts": group,
    "no prompt": lambda: alone(*group()),
    "prompts of one token": lambda: group(P=0),
    "several blocks": lambda: group(S=90, P=60),
}


@pytest.mark.parametrize(
    ("kernel", "given"),
    [
        ("JAX's own", "prompts"),
        ("JAX's own", "no prompt"),
        ("JAX's own", "prompts of one token"),
        ("splash", "prompts"),
        ("splash", "several blocks"),
    ],
)
def test_a_kernel_for_rows_gives_output_and_gradients_of_the_reference(kernel, given):
    form, given = attention.from_causal_kernel(KERNELS[kernel]), GROUPS[given]()
    np.testing.assert_allclose(jit(form)(*given), softmax_of_the_concatenation(*given), rtol=0, atol=2e-6)
    check_gradients(gradients(form, *given), gradients(attention.reference, *given), 5e-6)


@pytest.mark.parametrize("case", ["a cache", "a cache and a window", "one query"])
def test_what_reads_a_cache_does_not_go_to_the_kernel(case):
    given = inputs(case)
    form = attention.from_causal_kernel(None)  # which cannot be called
    np.testing.assert_array_equal(jax.jit(form)(*given), jax.jit(attention.reference)(*given))


@pytest.mark.parametrize("case", ["packed completions", "a tree", "a window"])
def test_what_a_kernel_for_rows_cannot_be_told_of_is_refused(case):
    with pytest.raises(ValueError, match="windows" if case == "a window" else "packing"):
        attention.from_causal_kernel(causal_rows)(*inputs(case))


def test_flash_attention_in_float32_is_refused():
    with pytest.raises(ValueError, match=r"not in float32.*compute dtype"):
        attention.cudnn(*group())


def test_it_can_be_mapped_over():
    """As by runs with several seeds in one program."""
    given = inputs("completions")
    both = jax.tree.map(lambda x: jnp.stack([x, jnp.flip(x, 0)]), given)
    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attention.blockwise(*x))))
    mapped = jit(jax.vmap(gradient))(*both)
    for i in range(2):
        one = jit(gradient)(*jax.tree.map(lambda x, i=i: x[i], both))
        np.testing.assert_allclose(mapped[i], one, rtol=0, atol=1e-6)


@functools.cache
def small_network():
    """A policy and its params."""
    policy = testing.tiny_policy("qwen2")
    return policy, jax.jit(policy.init)(jax.random.key(0))


@functools.cache
def gradient_of_log_probs(**settings):
    """A function of params, jitted: the gradient of a small network's log-probs; and the params."""
    prompts = testing.random_prompts(0, B, 6)
    tokens = jax.random.randint(jax.random.key(1), (B, G, 5), 0, 61)
    full = jnp.full((B, G), 5)
    rollout = Rollout(prompts, tokens, full, jnp.ones((B, G, 5), bool), jnp.zeros((B, G, 5)), jnp.zeros((B, G), bool))
    plain, params = small_network()
    policy = models.decoder(dataclasses.replace(plain.config, **settings))
    return jit(jax.grad(lambda params: jnp.sum(score(policy, params, rollout, entropy=False).log_probs))), params


@pytest.mark.parametrize("form", [attention.blockwise, attention.from_causal_kernel(causal_rows)])
def test_the_attention_is_an_argument_of_the_network(form):
    program, params = gradient_of_log_probs(attention=form)
    reference, _ = gradient_of_log_probs(attention=attention.reference)
    # Several layers' rounding adds up, by how much depends on the processor: 2.9e-6 was met.
    check_gradients(program(params), reference(params), tolerance=1e-5)


@pytest.mark.parametrize(
    ("form", "platform", "kernels"),
    [(attention.splash, "tpu", ["tpu_custom_call"]), (attention.cudnn, "cuda", ["fmhaSoftmax", "fmhaSoftmaxBackward"])],
)
def test_a_networks_gradient_is_lowered_for_the_device_of_the_kernel(monkeypatch, form, platform, kernels):
    """As far as that goes without one: shapes, dtypes and layouts are those that the kernel takes."""
    if platform == "cuda":
        cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
        monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
        monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    program, params = gradient_of_log_probs(attention=form, dtype=jnp.bfloat16)
    text = program.trace(params).lower(lowering_platforms=(platform,)).as_text()
    assert all(kernel in text for kernel in kernels)


def test_what_is_kept_for_the_backward_pass_is_an_argument_of_the_network():
    """The gradient is the same, and the policy of `jax.checkpoint` reaches the layers."""
    settings = [{}, {"remat": False}, {"remat": jax.checkpoint_policies.save_only_these_names("attention")}]
    programs = [gradient_of_log_probs(attention=attention.blockwise, **changes) for changes in settings]
    all_again, nothing_again, some_again = [program(params) for program, params in programs]
    check_gradients(all_again, nothing_again)
    check_gradients(some_again, nothing_again)
    exponentials = [str(program.trace(params).jaxpr).count("= exp ") for program, params in programs]
    assert exponentials[0] > exponentials[2] >= exponentials[1], exponentials
