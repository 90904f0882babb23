"""Muon on stacked layers against Newton-Schulz in NumPy, one layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import optimizers
from grpo_jax.models import lora
from grpo_jax.testing import tiny_policy


def orthogonalised(matrix):
    """Jordan's five steps of the quintic iteration, in float64."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def params_and_grads():
    params = jax.jit(tiny_policy(tie_word_embeddings=False).init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return params, jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)


def test_each_layers_matrix_is_orthogonalised_by_itself():
    params, grads = params_and_grads()
    optimizer = optimizers.muon(params, 0.1)
    changes, _ = optimizer.update(grads, optimizer.init(params), params)
    for module, name in (("mlp", "down_proj"), ("self_attn", "k_proj")):
        for layer in range(2):
            gradient = np.asarray(grads["layers"][module][name]["kernel"][layer], np.float64)
            scale = 0.2 * np.sqrt(max(gradient.shape))  # the momentum of a first step is the gradient, but for its size
            found = changes["layers"][module][name]["kernel"][layer]
            np.testing.assert_allclose(found, -0.1 * scale * orthogonalised(gradient), rtol=1e-2, atol=1e-3)


def test_embedding_head_and_norms_are_adams():
    params, grads = params_and_grads()
    optimizer = optimizers.muon(params, 0.1, adam_learning_rate=0.01)
    changes, _ = optimizer.update(grads, optimizer.init(params), params)
    adam = optax.nadam(0.01)  # with Nesterov's momentum, as the matrices
    expected, _ = adam.update(grads, adam.init(params), params)
    for find in (
        lambda tree: tree["embed_tokens"]["embedding"],
        lambda tree: tree["lm_head"],
        lambda tree: tree["layers"]["input_layernorm"]["scale"],
    ):
        np.testing.assert_allclose(find(changes), find(expected), rtol=1e-5)


def test_adapters_are_matrices_too():
    policy = tiny_policy()
    adapters, _ = lora.adapt(policy, jax.jit(policy.init)(jax.random.key(0)), rank=2, key=jax.random.key(1))
    optimizer = optimizers.muon(adapters, 0.1)
    state = optimizer.init(adapters)
    ones = jax.tree.map(jnp.ones_like, adapters)
    changes, _ = optimizer.update(ones, state, adapters)
    b = changes["layers"]["mlp"]["up_proj"]["lora_b"]
    np.testing.assert_allclose(b[0], -0.1 * 0.2 * np.sqrt(48) * orthogonalised(np.ones((2, 48))), rtol=1e-2)


def test_params_without_stacked_layers_are_refused():
    with pytest.raises(ValueError, match=r"no stacks of a decoder's layers; optax\.contrib\.muon"):
        optimizers.muon({"table": jnp.ones((3, 3))}, optax.constant_schedule(0.1))


def test_the_matrix_of_each_expert_is_orthogonalised_by_itself_and_their_biases_are_adams():
    rng = np.random.default_rng(0)
    shapes = {"experts_up": {"kernel": (2, 3, 4, 6), "bias": (2, 3, 6)}, "router": (2, 4, 3)}
    grads = {"layers": jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x), jnp.float32), shapes, is_leaf=is_shape)}
    optimizer = optimizers.muon(grads, 0.1)
    changes, _ = optimizer.update(grads, optimizer.init(grads), grads)
    experts, of_experts = changes["layers"]["experts_up"], grads["layers"]["experts_up"]
    for layer, expert in np.ndindex(2, 3):
        matrix = np.asarray(of_experts["kernel"][layer, expert], np.float64)
        expected = -0.1 * 0.2 * np.sqrt(6) * orthogonalised(matrix)
        np.testing.assert_allclose(experts["kernel"][layer, expert], expected, rtol=1e-2, atol=1e-3)
    router = np.asarray(grads["layers"]["router"][1], np.float64)
    np.testing.assert_allclose(changes["layers"]["router"][1], -0.04 * orthogonalised(router), rtol=1e-2, atol=1e-3)
    adam = optax.nadam(0.1)
    expected, _ = adam.update(of_experts["bias"], adam.init(of_experts["bias"]), of_experts["bias"])
    np.testing.assert_allclose(experts["bias"], expected, rtol=1e-5)


def is_shape(x):
    return isinstance(x, tuple)
