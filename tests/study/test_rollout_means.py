"""The means of rewards of rollouts, against their sums in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.study.rollout_means import make_rollout_means
from grpo_jax.types import Prompts, Rollout


def sampler(policy, params, prompts, key):
    """Completions of as many tokens as the prompt's token says."""
    lengths = prompts.tokens[:, :1]
    tokens = jnp.broadcast_to(prompts.tokens[:, :, None], (len(lengths), 1, 4)) * params
    held = jnp.arange(4) < lengths[..., None]
    return Rollout(prompts, tokens, lengths, held, jnp.zeros(held.shape), jnp.zeros(lengths.shape, bool))


def reward(rollout):
    """The token, of all; and its square, of those that divide by 4, which is no number elsewhere."""
    token = np.asarray(rollout.tokens[..., 0], np.float32)
    given = token % 4 == 0
    return np.stack([token, np.where(given, token**2, np.nan)], -1), np.stack([np.ones_like(given), given], -1)


def test_a_mean_is_over_the_completions_that_have_the_reward():
    batches = [np.array([1, 2, 3]), np.array([4])]
    evaluate = make_rollout_means(
        None, {"all": sampler}, batches, lambda rows: Prompts(jnp.asarray(rows)[:, None], jnp.ones(len(rows), int)),
        reward, ("token", "square"),
    )  # fmt: skip
    found = evaluate(jnp.int32(2))
    assert found == pytest.approx({"all/token": 5.0, "all/square": (16 + 64) / 2, "all/length": 2.5})
