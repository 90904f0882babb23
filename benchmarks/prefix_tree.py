"""Conversations that were continued from common turns: scores and gradients of their tree, beside those of their rows.

    python -m benchmarks.prefix_tree

A tree of depth 4, each turn continued in two ways: 8 conversations of a group. Tokens, operations of matrix products
and bytes are counted, so that they do not depend on what else the machine does; the seconds do.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import models, packing, testing
from grpo_jax.compiler_options import saving_memory
from grpo_jax.run import chips
from grpo_jax.scoring import score
from grpo_jax.types import Packing, Params, Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
}  # fmt: skip
B, P, DEPTH, TURN = 2, 64, 4, 64


def conversations() -> Rollout:
    """`2 ** (DEPTH - 1)` conversations a group, whose first turn is common to all of them."""
    rng, G, T = np.random.default_rng(0), 2 ** (DEPTH - 1), DEPTH * TURN
    turns = [np.repeat(rng.integers(2, SIZES["vocab_size"], (B, 2**n, TURN)), G // 2**n, axis=1) for n in range(DEPTH)]
    tokens, full = jnp.asarray(np.concatenate(turns, axis=-1), jnp.int32), jnp.full((B, G), T, jnp.int32)
    prompts = testing.random_prompts(0, B, P, SIZES["vocab_size"], ragged=False)
    return Rollout(prompts, tokens, full, full[..., None] > jnp.arange(T), jnp.zeros(tokens.shape), full < 0)


def measure(repeats: int = 5) -> list[dict[str, Any]]:
    """A row for each of the two layouts."""
    policy = models.decoder(models.from_hf_config(testing.tiny_hf_config("llama", **SIZES)))
    params, rollout = jax.jit(policy.init)(jax.random.key(0)), conversations()
    weights = jax.random.normal(jax.random.key(1), rollout.tokens.shape)

    def loss(params: Params, packed: Packing | None) -> jax.Array:
        return jnp.sum(weights * score(policy, params, rollout, packing=packed, entropy=False).log_probs)

    options: dict[str, str | bool] = {**saving_memory()}
    measured, gradients = [], []
    for name, packed in (("rows", None), ("tree", packing.tree(rollout))):
        compiled = jax.jit(jax.grad(loss)).lower(params, packed).compile(compiler_options=options)
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            gradients.append(jax.block_until_ready(compiled(params, packed)))
            seconds.append(time.perf_counter() - began)
        memory = compiled.memory_analysis()
        assert memory is not None
        measured.append({
            "layout": name,
            "tokens": (rollout.tokens if packed is None else packed.segments).size,
            "GFLOP": chips.flops(jax.make_jaxpr(jax.grad(loss))(params, packed).jaxpr) / 1e9,
            "temporary MB": memory.temp_size_in_bytes / 1e6,
            "median s": float(np.median(seconds[1:])),
        })  # fmt: skip
    gaps = jax.tree.map(lambda a, e: float(jnp.max(jnp.abs(a - e)) / jnp.max(jnp.abs(e))), gradients[-1], gradients[0])
    measured[-1]["largest difference of a gradient, of its largest"] = max(jax.tree.leaves(gaps))
    return measured


if __name__ == "__main__":
    for row in measure():
        print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()))  # fmt: skip
