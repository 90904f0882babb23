"""A mixture of experts against its definition, one token and expert at a time, in NumPy float64; and its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import models, testing
from grpo_jax.models import experts, hf, lora
from grpo_jax.models.decoder import Mixture
from grpo_jax.models.experts import Experts

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
    params = module.init(jax.random.key(0), x)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.7 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return module, jax.tree.unflatten(structure, noise), x


def one_at_a_time(e, params, x):
    """The formula in NumPy."""
    w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    out = np.zeros(x.shape)
    for r, row in enumerate(np.asarray(x, np.float64)):
        logits = row @ w["router"] + w.get("router_bias", 0)
        chosen = np.argsort(-logits)[: e.per_token]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen] if e.normalised else logits).sum()
        for i, weight in zip(chosen, weights, strict=True):
            bias = {n: w[f"experts_{n}_bias"][i] if e.bias else 0 for n in ("gate", "up", "down")}
            gate, up = (row @ w[f"experts_{n}"][i] + bias[n] for n in ("gate", "up"))
            if e.clip is None:
                inner = gate / (1 + np.exp(-gate)) * up
            else:
                alpha, limit = e.clip
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                inner = (up + 1) * gate / (1 + np.exp(-alpha * gate))
            out[r] += weight * (inner @ w["experts_down"][i] + bias["down"])
    return out


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_weighted_sum_of_the_chosen_experts(name):
    module, params, x = mixture(name)
    actual = jit(lambda params, x: module.apply({"params": params}, x))(params, x)
    np.testing.assert_allclose(actual, one_at_a_time(CASES[name], params, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["normalised", "clipped, with biases"])
def test_gradients_are_those_of_all_experts_computed_and_most_weighted_by_zero(name):
    module, params, x = mixture(name)
    e = CASES[name]

    def dense(params, x):
        logits = x @ params["router"] + params.get("router_bias", 0)
        routing = experts.route(logits, e)
        weights = jnp.sum(jax.nn.one_hot(routing.experts, e.number) * routing.weights[..., None], axis=1)

        def product(x, n, equation):
            y = jnp.einsum(equation, x, params[f"experts_{n}"])
            return y + params[f"experts_{n}_bias"] if e.bias else y

        gate, up = product(x, "gate", "rd,edf->ref"), product(x, "up", "rd,edf->ref")
        inner = jax.nn.silu(gate) * up if e.clip is None else experts.clipped_gate(gate, up, *e.clip)
        return jnp.einsum("red,re->rd", product(inner, "down", "ref,efd->red"), weights)

    def gradients(f):
        return jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(f(params, x))), (0, 1)))(params, x)

    actual, expected = gradients(lambda params, x: module.apply({"params": params}, x)), gradients(dense)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_a_token_is_computed_the_same_whatever_else_is_in_the_batch():
    """There is no capacity that others could use up."""
    module, params, x = mixture("normalised")
    alone = [module.apply({"params": params}, row[None])[0] for row in x]
    np.testing.assert_allclose(module.apply({"params": params}, x), np.stack(alone), rtol=1e-5, atol=1e-6)


def test_experts_have_no_adapters_and_are_not_quantised(tmp_path):
    policy = testing.tiny_policy("qwen3_moe", **SOME)
    params = jit(policy.init)(jax.random.key(0))
    adapters, _ = lora.adapt(policy, params, rank=2, key=jax.random.key(1))
    assert sorted(adapters["layers"]) == ["self_attn"]
    with pytest.raises(ValueError, match="this model has no down_proj, only experts, which have no adapters"):
        lora.adapt(policy, params, rank=2, key=jax.random.key(1), targets=("q_proj", "down_proj"))
    folder = testing.tiny_checkpoint(tmp_path / "model", "qwen3_moe", **SOME)
    with pytest.raises(ValueError, match="those of experts, which are not quantised: leave it out"):
        hf.load_pretrained(folder, quantize="int8")
