"""Losses and advantages that verl 0.9.1 computed (`tests/golden/verl/algorithms.npz`), against compositions of ours.

What the two do differently:

- verl's Clip-Cov and KL-Cov take the covariance of the policy that learns, ours that of the policy that sampled: here
  the two are one. Its Clip-Cov draws tokens at random; here it takes all in the band.
- Its `seq-mean-token-mean` adds 1e-8 to a length.
- Its means over completions leave out those without a token, as ours do.
- The tail of its optimal token baseline begins behind as many tokens as the second longest completion has, ours behind
  its last one: they differ where a completion has a hole, as one of the second group here.
- Its optimal token baseline gives the tail of a group of equal rewards the reward itself, ours 0.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import advantages as adv
from grpo_jax import losses, transforms
from grpo_jax.losses import (
    binary_kl,
    bnpo,
    completion_mean,
    completion_sum,
    dppo,
    dro,
    kl_cov,
    old_policy,
    token_mean,
)
from grpo_jax.types import Experience, Prompts, Rollout, Scores

B, G, T = 3, 4, 6

with np.load(Path(__file__).parents[1] / "golden" / "verl" / "algorithms.npz") as file:
    VERL = {name: file[name] for name in file.files}

MODES = {"token": token_mean, "completion": completion_mean, "completion_sum": completion_sum}
to_old = functools.partial(dppo, anchor=old_policy)
# name -> our loss, the transform before it, and whether the old policy is the new one
LOSSES = {
    "dppo_tv": (functools.partial(to_old, low=0.1), None, False),
    "dppo_tv_uneven": (functools.partial(to_old, low=0.05, high=0.2, max_ratio=1.2), None, False),
    "dppo_kl": (functools.partial(to_old, low=0.02, divergence=binary_kl), None, False),
    "dppo_kl_uneven": (
        functools.partial(to_old, low=0.01, high=0.05, divergence=binary_kl, max_ratio=3.0),
        None,
        False,
    ),
    "dro": (functools.partial(dro, beta=0.3), None, False),
    "kl_cov": (kl_cov, transforms.high_covariance(0.1), True),
    "kl_cov_most": (functools.partial(kl_cov, coefficient=0.3), transforms.high_covariance(0.5), True),
    "clip_cov_all": (bnpo, transforms.clip_cov(1.0, low=0.2, high=2.0), True),
}


def grouped(name):
    """`[B * G, ...]` to `[B, G, ...]`."""
    rows = VERL[f"inputs/{name}"]
    return jnp.asarray(rows.reshape(B, G, *rows.shape[1:]))


def experience_of(*, on_policy=False):
    mask = grouped("mask")
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    old = grouped("log_probs" if on_policy else "old_log_probs")
    rollout = Rollout(prompts, jnp.zeros((B, G, T), jnp.int32), mask.sum(-1), mask, old, mask.all(-1))
    rewards = grouped("rewards")[..., None]
    return Experience(
        rollout,
        rewards=rewards,
        reward_mask=jnp.ones(rewards.shape, bool),
        old_log_probs=old,
        ref_log_probs=grouped("ref_log_probs"),
        advantages=grouped("advantages"),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_value_and_the_gradient_are_those_of_verl(name, mode):
    make, transform, on_policy = LOSSES[name]
    with jax.enable_x64(True):
        experience = experience_of(on_policy=on_policy)
        if transform is not None:
            experience, _ = transform(experience)
        loss = make(aggregate=MODES[mode])
        value, gradient = jax.value_and_grad(lambda x: losses.value(loss(Scores(x), experience)[0]))(
            grouped("log_probs")
        )
    expected = VERL[f"loss/{name}/{mode}/gradient"].reshape(B, G, T)
    size = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8 * size)
    np.testing.assert_allclose(value, VERL[f"loss/{name}/{mode}/value"], rtol=1e-7)


ADVANTAGES = {
    "opo": adv.from_experience(adv.length_weighted_advantages),
    "best_minus_second": adv.from_rewards(adv.best_minus_second_advantages),
    "best_minus_second_scaled": adv.from_rewards(functools.partial(adv.best_minus_second_advantages, scaled=True)),
    "optimal_token": adv.from_experience(adv.optimal_token_advantages),
    "optimal_token_with_tail": adv.from_experience(
        lambda rewards, mask, experience: adv.optimal_token_advantages(rewards, mask, experience, zero_tail=False)
    ),
    "reinforce_plus_plus": adv.reinforce_plus_plus(ddof=1),
    "reinforce_plus_plus_kl": adv.reinforce_plus_plus(0.1, gamma=0.9, ddof=1),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_advantages_are_those_of_verl(name):
    with jax.enable_x64(True):
        experience = experience_of()
        if "optimal" in name:
            experience = experience._replace(old_log_probs=grouped("otb_log_probs"), old_collision=grouped("collision"))
        actual, _ = ADVANTAGES[name](experience)
        actual = jnp.where(experience.rollout.mask, actual if actual.ndim == 3 else actual[..., None], 0.0)
    groups = [0, 2] if name == "optimal_token" else [0, 1, 2]
    np.testing.assert_allclose(actual[jnp.array(groups)], VERL[f"advantage/{name}"].reshape(B, G, T)[groups], atol=1e-7)


def test_everything_in_the_file_is_a_case():
    assert {name.split("/")[1] for name in VERL if name.startswith("loss/")} == set(LOSSES)
    assert {name.split("/")[1] for name in VERL if name.startswith("advantage/")} == set(ADVANTAGES)
    for name in LOSSES:
        assert np.abs(VERL[f"loss/{name}/token/gradient"]).max() > 0
