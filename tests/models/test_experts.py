"""A mixture of experts against its definition, one token and expert at a time, in NumPy float64; and its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, testing
from grpo_jax.freezing import bind
from grpo_jax.models import experts, hf, lora, quantized
from grpo_jax.models.decoder import Mixture
from grpo_jax.models.experts import Experts
from grpo_jax.models.mixture import linear

R, D = 7, 6
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SOME = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
CASES = {
    "normalised": Experts(5, 2, 8, normalised=True),
    "shares of all": Experts(5, 3, 8, normalised=False),
    "clipped, with biases": Experts(4, 2, 8, normalised=True, bias=True, clip=(1.3, 0.7)),
    "all of them": Experts(3, 3, 8, normalised=False),
}


def mixture(name):
    """A module, with params that are all random, and its input."""
    config = models.from_hf_config(testing.tiny_hf_config("qwen3_moe", hidden_size=D, **SOME))
    module = Mixture(dataclasses.replace(config, experts=CASES[name]))
    x = jax.random.normal(jax.random.key(1), (R, D))
    params = module.init(jax.random.key(0), (x[None, None],), None, None)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.7 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return module, jax.tree.unflatten(structure, noise), x


def apply(module, params, x, given=None):
    """Of rows `[R, D]`."""
    given = None if given is None else given[None, None]
    (rows,), _ = module.apply({"params": params}, (x[None, None],), given, None)
    return rows[0, 0]


def one_at_a_time(e, params, x, given=None):
    """The formula in NumPy."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros(x.shape)
    for r, row in enumerate(np.asarray(x, np.float64)):
        logits = row @ w["router"] + w.get("router_bias", 0)
        chosen = np.argsort(-logits)[: e.per_token] if given is None else given[r]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen] if e.normalised else logits).sum()
        for i, weight in zip(chosen, weights, strict=True):
            bias = {n: w[f"experts_{n}"]["bias"][i] if e.bias else 0 for n in ("gate", "up", "down")}
            gate, up = (row @ w[f"experts_{n}"]["kernel"][i] + bias[n] for n in ("gate", "up"))
            if e.clip is None:
                inner = gate / (1 + np.exp(-gate)) * up
            else:
                alpha, limit = e.clip
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                inner = (up + 1) * gate / (1 + np.exp(-alpha * gate))
            out[r] += weight * (inner @ w["experts_down"]["kernel"][i] + bias["down"])
    return out


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_weighted_sum_of_the_chosen_experts(name):
    module, params, x = mixture(name)
    given = np.random.default_rng(0).permuted(np.tile(np.arange(CASES[name].number), (R, 1)), axis=1)
    given = given[:, : CASES[name].per_token]
    run = jit(lambda params, x, given: (apply(module, params, x), apply(module, params, x, given)))
    of_router, of_given = run(params, x, given)
    np.testing.assert_allclose(of_router, one_at_a_time(CASES[name], params, x), rtol=0, atol=2e-5)
    np.testing.assert_allclose(of_given, one_at_a_time(CASES[name], params, x, given), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["normalised", "clipped, with biases"])
def test_gradients_are_those_of_all_experts_computed_and_most_weighted_by_zero(name):
    module, params, x = mixture(name)
    e = CASES[name]

    def dense(params, x):
        logits = x @ params["router"] + params.get("router_bias", 0)
        routing = experts.route(logits, e)
        weights = jnp.sum(jax.nn.one_hot(routing.experts, e.number) * routing.weights[..., None], axis=1)

        def product(x, n, equation):
            y = jnp.einsum(equation, x, params[f"experts_{n}"]["kernel"])
            return y + params[f"experts_{n}"]["bias"] if e.bias else y

        gate, up = product(x, "gate", "rd,edf->ref"), product(x, "up", "rd,edf->ref")
        inner = jax.nn.silu(gate) * up if e.clip is None else experts.clipped_gate(gate, up, *e.clip)
        return jnp.einsum("red,re->rd", product(inner, "down", "ref,efd->red"), weights)

    def gradients(f):
        return jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(f(params, x))), (0, 1)))(params, x)

    actual, expected = gradients(lambda params, x: apply(module, params, x)), gradients(dense)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


@pytest.mark.parametrize("tokens", [R, 1300])
def test_experts_in_parts_add_up_to_all_of_them(tokens):
    """Of many tokens in blocks, which leave rows of other devices' experts as they happen to be."""
    _, params, _ = mixture("clipped, with biases")
    x = jax.random.normal(jax.random.key(3), (tokens, D))
    chosen = jax.random.randint(jax.random.key(4), (tokens, 2), 0, 4)
    weights = jax.random.uniform(jax.random.key(5), (tokens, 2))

    def value(leaves, x, parts):
        held, total = 4 // parts, jnp.zeros((tokens, 8))
        for first in range(0, 4, held):
            own = jax.tree.map(lambda leaf, first=first: leaf[first : first + held], leaves)
            rows = experts.group_of_part(x, chosen, held, first) if parts > 1 else experts.group(x, chosen, held)
            total += experts.combine(linear(rows.rows, rows, own), rows.back, weights)
        return jnp.sum(jnp.sin(total))

    run = jit(jax.value_and_grad(value, (0, 1)), static_argnums=2)
    found = (jax.tree.leaves(run(params["experts_up"], x, parts)) for parts in (1, 2))
    for whole, parts in zip(*found, strict=True):
        assert np.abs(whole).max() > 1e-3
        np.testing.assert_allclose(parts, whole, rtol=0, atol=3e-6 * np.abs(whole).max())


def test_a_token_is_computed_the_same_whatever_else_is_in_the_batch():
    """There is no capacity that others could use up."""
    module, params, x = mixture("normalised")
    alone = [apply(module, params, row[None])[0] for row in x]
    np.testing.assert_allclose(apply(module, params, x), np.stack(alone), rtol=1e-5, atol=1e-6)


def test_the_router_chooses_in_float32_where_the_rest_is_in_bfloat16():
    """Two experts whose logits are the same number in bfloat16: the larger one is the second."""
    config = models.from_hf_config(testing.tiny_hf_config("qwen3_moe", hidden_size=D, **SOME), dtype=jnp.bfloat16)
    module = Mixture(dataclasses.replace(config, experts=Experts(2, 1, 8, normalised=True)))
    x = jnp.ones((R, D), jnp.bfloat16)
    params = module.init(jax.random.key(0), (x[None, None],), None, None)["params"]
    params["router"] = jnp.stack([jnp.full(D, 1.0), jnp.full(D, 1.0 + 1e-4)], axis=1)
    assert jnp.array_equal(*params["router"].astype(jnp.bfloat16).T)
    first, second = (apply(module, params, x, jnp.full((R, 1), expert)) for expert in (0, 1))
    assert np.any(first != second)
    np.testing.assert_array_equal(apply(module, params, x), second)


LORA = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_adapters_of_experts_compute_and_learn_as_the_model_that_they_are_merged_into(kind):
    """By the chain rule, as those of other layers; over codes as over what the codes stand for."""
    policy = testing.tiny_policy("qwen3_moe", **LORA, num_hidden_layers=1)
    params = jit(policy.init)(jax.random.key(0))
    params = params if kind is None else quantized.quantize(params, kind)
    adapters, base = lora.adapt(policy, params, rank={"experts_up": 2, "experts_down": 3}, key=jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    tokens = jax.random.randint(jax.random.key(2), (2, 1, 6), 2, 60)

    def value(params):
        prompt_cache = policy.prefill(params, tokens[:, 0, :2], jnp.full(2, 2))
        positions = jnp.broadcast_to(1 + jnp.arange(5), (2, 1, 5))
        return jnp.sum(
            jnp.sin(policy.unembed(params, policy.extend(params, tokens[..., 1:], positions, prompt_cache)[0]))
        )

    found, gradients = jit(jax.value_and_grad(lambda x: value(bind(x, base))))(adapters)
    merged = lora.merge(adapters, base)  # in which kernels without adapters are codes, which have no gradient
    layers, names = merged["layers"], ("experts_up", "experts_down")

    def of_kernels(kernels):
        mlp = layers["mlp"] | {name: layers["mlp"][name] | {"kernel": kernels[name]} for name in names}
        return value(merged | {"layers": layers | {"mlp": mlp}})

    expected, dense = jit(jax.value_and_grad(of_kernels))({name: layers["mlp"][name]["kernel"] for name in names})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    for name, r in (("experts_up", 2), ("experts_down", 3)):
        a, b = (np.asarray(adapters["layers"]["mlp"][name][x], np.float64) for x in (lora.A, lora.B))
        dW = np.asarray(dense[name], np.float64)
        of = gradients["layers"]["mlp"][name]
        assert np.max(np.abs(of[lora.A])) > 0.1
        np.testing.assert_allclose(of[lora.A], 32 / r * dW @ b.swapaxes(-1, -2), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(of[lora.B], 32 / r * a.swapaxes(-1, -2) @ dW, rtol=1e-3, atol=1e-3)


def test_codes_of_experts_become_floats_within_their_layer_only():
    """The compiled program makes floats of one layer's experts at a time, never of the stack."""
    policy = testing.tiny_policy("qwen3_moe", **LORA, num_hidden_layers=3)
    params = jax.eval_shape(lambda key: quantized.quantize(policy.init(key), "int8"), jax.random.key(0))
    adapters, base = jax.eval_shape(lambda x: lora.adapt(policy, x, rank=2, key=jax.random.key(1)), params)
    tokens = jnp.ones((1, 1, 4), jnp.int32)

    def value(adapters, base):
        params = bind(adapters, base)
        prompt_cache = policy.prefill(params, tokens[:, 0, :2], jnp.full(1, 2))
        return jnp.sum(policy.extend(params, tokens, jnp.arange(1, 5)[None, None], prompt_cache)[0])

    text = jit(jax.grad(value)).lower(adapters, base).compile().as_text()
    assert "f32[4,32,16]" in text
    assert "f32[3,4,32,16]" not in text


def test_experts_are_read_as_the_codes_of_their_floats_and_have_adapters_only_if_they_are_named(tmp_path):
    folder = testing.tiny_checkpoint(tmp_path / "model", "qwen3_moe", **LORA)
    policy, params = hf.load_pretrained(folder)
    _, codes = hf.load_pretrained(folder, quantize="nf4")
    jax.tree.map(np.testing.assert_array_equal, codes, quantized.quantize(params, "nf4"))
    assert quantized.is_quantized(codes["layers"]["mlp"]["experts_up"]["kernel"])
    adapters, _ = lora.adapt(policy, params, rank=2, key=jax.random.key(1))
    assert sorted(adapters["layers"]) == ["self_attn"]
    with pytest.raises(ValueError, match="this model has no down_proj: leave it out; there are experts_down"):
        lora.adapt(policy, params, rank=2, key=jax.random.key(1), targets=("q_proj", "down_proj"))
