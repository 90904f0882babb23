"""How far a step moves the policy, against the formula in NumPy and the divergence that it estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.policies import from_logits_fn
from grpo_jax.schedules.movement import make_movement
from grpo_jax.testing import random_prompts
from grpo_jax.types import Experience, Rollout
from grpo_jax.updates import init_state

V, B, G, T = 7, 4, 3, 5
POLICY = from_logits_fn(
    lambda params, tokens, mask: params["table"][tokens], init=lambda key: {"table": jax.random.normal(key, (V, V))}
)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(("parts", "scored"), [(1, False), (2, True)])
def test_it_is_the_mean_of_k3_over_the_tokens_that_count(parts, scored):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, G, T))
    lengths = rng.integers(1, T + 1, (B, G))
    mask = (np.arange(T) < lengths[..., None]) & (rng.random((B, G, T)) < 0.8)
    prompts = random_prompts(0, B, 3, V)
    last = np.asarray(prompts.tokens)[np.arange(B), np.asarray(prompts.lengths) - 1]
    read = np.concatenate([np.broadcast_to(last[:, None, None], (B, G, 1)), tokens[..., :-1]], axis=-1)
    before, after = rng.normal(size=(2, V, V))
    of_places = [log_softmax(x / 0.5)[read] for x in (before, after)]
    drawn, now = (np.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in of_places)
    log_ratio = (now - drawn)[mask]
    expected = (np.exp(log_ratio) - 1 - log_ratio).sum() / mask.sum()

    junk = np.full((B, G, T), -3.0, np.float32)  # of the sampler, where the policy was scored
    held = np.where(mask, drawn, 0.0).astype(np.float32)
    rollout = Rollout(prompts, jnp.asarray(tokens), jnp.asarray(lengths), mask, junk if scored else held, lengths < 0)
    experience = Experience(rollout, old_log_probs=held if scored else None)
    state = init_state({"table": jnp.asarray(after, jnp.float32)}, optax.sgd(0.1), jax.random.key(0))
    found = make_movement(POLICY, temperature=0.5, parts=parts)(state, experience)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
