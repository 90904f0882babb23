"""Small Llamas for experiments from nothing."""

import jax
import pytest

from grpo_jax.models import small_llama


@pytest.mark.parametrize(("V", "D", "fields"), [(26, 64, {}), (19, 128, {}), (10, 32, {"intermediate_size": 64})])
def test_it_has_two_layers_of_the_sizes_that_are_told(V, D, fields):
    """Counted by hand: embedding, head; in a layer queries, keys and values of half the width, output, MLP, norms."""
    params = jax.eval_shape(small_llama(V, width=D, eos_id=1, **fields).init, jax.random.key(0))
    inner = fields.get("intermediate_size", 3 * D)
    layer = D * D + 2 * D * D // 2 + D * D + 3 * D * inner + 2 * D
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * V * D + 2 * layer + D


def test_equal_sizes_are_the_same_policy_and_so_the_same_program():
    assert small_llama(10, width=32) == small_llama(10, width=32)
    assert small_llama(10, width=32) != small_llama(10, width=32, num_attention_heads=2)
