"""Objectives by the names of their parts, as on a command line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses
from grpo_jax.advantages import group_advantages
from grpo_jax.run.objective import ObjectiveSettings
from grpo_jax.testing import random_prompts
from grpo_jax.types import Experience, Rollout, Scores

MODULE = """
from grpo_jax import losses

def whole(scores, experience, weight=1.0):
    return (losses.token_mean(-weight * scores.log_probs, experience.rollout.mask),), {}

def made(*, epsilon=0.2, scale):
    return whole

def to_the_best(rewards, mask):
    return rewards - rewards.max(1, keepdims=True)

def halved(experience):
    return experience, {}

def anything(e):
    return e, {}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "objectives_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


LOG_RATIO = np.array([[[0.4, -0.3, 2.0], [1.8, 0.1, -2.5]]], np.float32)
REWARDS = np.array([[1.0, 0.0]], np.float32)


def experience():
    """One group of two, of three tokens each, under a policy that has moved since."""
    mask, zeros = jnp.ones((1, 2, 3), bool), jnp.zeros((1, 2, 3))
    rollout = Rollout(
        random_prompts(0, 1, 2), mask.astype(jnp.int32), jnp.full((1, 2), 3), mask, zeros, jnp.zeros((1, 2), bool)
    )
    scored = jnp.asarray(REWARDS)[..., None], jnp.ones((1, 2, 1), bool)
    return Experience(rollout, *scored, old_log_probs=zeros - 3.0, advantages=jnp.array([[1.0, -1.0]]))


def value_of(loss):
    scores = Scores(jnp.asarray(LOG_RATIO) - 3.0, jnp.zeros((1, 2, 3)))
    return float(losses.value(loss(scores, experience())[0]))


def test_numbers_of_a_loss_are_given_with_its_name_and_those_of_the_settings_beside_them():
    """PPO's clip written out, with the bound `delta` of negative advantages; CISPO's weight."""
    ratio, A = np.exp(LOG_RATIO.astype(np.float64)), np.array([[[1.0], [-1.0]]])
    clipped = np.minimum(np.minimum(ratio, 4.0) * A, np.clip(ratio, 0.9, 1.3) * A)
    expected = -np.where(A > 0, np.minimum(ratio * A, np.clip(ratio, 0.9, 1.3) * A), clipped).mean()
    settings = ObjectiveSettings(loss="grpo(delta=4.0, epsilon=0.1)", epsilon_high=0.3)
    assert value_of(settings.make_loss(max_tokens=3)) == pytest.approx(expected, rel=1e-5)
    expected = -(np.minimum(ratio, 1.5) * A * (LOG_RATIO - 3.0)).mean()
    assert value_of(ObjectiveSettings(loss="cispo(max_ratio=1.5)").make_loss(max_tokens=3)) == pytest.approx(
        expected, rel=1e-5
    )
    fixed, offered = (
        ObjectiveSettings(loss=name).make_loss(max_tokens=3) for name in ("dr_grpo(max_tokens=6)", "dr_grpo")
    )
    assert value_of(fixed) == pytest.approx(value_of(offered) / 2, rel=1e-5)


def test_a_function_of_scores_and_experience_is_a_loss_itself(folder):
    expected = -(LOG_RATIO - 3.0).mean()
    made = ObjectiveSettings(loss="objectives_of_mine:whole").make_loss(max_tokens=3)
    assert value_of(made) == pytest.approx(expected, rel=1e-5)
    made = ObjectiveSettings(loss="objectives_of_mine:whole(weight=0.5)").make_loss(max_tokens=3)
    assert value_of(made) == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": "cispo", "epsilon_high": 5.0},
            r"cispo has no setting epsilon_high; it has max_ratio, min_ratio, given as 'cispo\(max_ratio=...\)'",
        ),
        ({"loss": "grpo(epsilon=0.1)", "epsilon": 0.2}, r"epsilon of the loss grpo\(epsilon=0.1\) is given twice"),
        ({"loss": "grpo(clip=0.1)"}, r"the loss grpo\(clip=0.1\): .*unexpected keyword argument 'clip'"),
        ({"loss": "token_mean"}, "the loss token_mean requires per_token, mask"),
        ({"loss": "objectives_of_mine:made"}, r"requires scale: 'objectives_of_mine:made\(scale=...\)'"),
        ({"loss": "objectives_of_mine:whole", "beta": 0.1}, "--beta has no effect: objectives_of_mine:whole is a loss"),
    ],
    ids=["setting", "twice", "argument", "aggregate", "required", "whole"],
)
def test_settings_that_a_loss_does_not_have_are_refused_with_those_that_it_has(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**settings).make_loss(max_tokens=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("group_advantages(eps=-1)", "eps is at least 0, got -1"),
        ("group_advantages(ddof=4)", "ddof is 0, the population's deviation, or 1, the sample's, got 4"),
    ],
)
def test_numbers_of_an_estimator_are_looked_at_before_a_model_is_read(name, message):
    """With `eps` below 0 the advantages of most groups would change their sign."""
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(advantage=name).make_advantage([{}], ["r"], weights=None, group_size=2)


def advantages_of(name):
    made, running = ObjectiveSettings(advantage=name).make_advantage([{}], ["r"], weights=None, group_size=2)
    assert running is None
    values, metrics = made(experience())
    assert "reward/r" in metrics
    return np.asarray(values)


def test_numbers_of_an_estimator_are_given_with_its_name_and_so_are_those_of_what_makes_one(folder):
    sample = np.std(REWARDS.astype(np.float64), ddof=1) + 1e-4
    np.testing.assert_allclose(advantages_of("group_advantages(ddof=1)"), (REWARDS - 0.5) / sample, rtol=1e-5)
    np.testing.assert_allclose(advantages_of("pass_at_k(2)"), 2 * REWARDS, rtol=1e-5)  # the only right one of two
    np.testing.assert_allclose(
        advantages_of("from_normalised_rewards(ddof=1)"), advantages_of("group_advantages(ddof=1)"), rtol=1e-3
    )  # of one group, but for the second eps
    np.testing.assert_allclose(advantages_of("objectives_of_mine:to_the_best"), REWARDS - 1.0)
    np.testing.assert_allclose(advantages_of("group_advantages"), group_advantages(jnp.asarray(REWARDS)))


def test_a_maker_without_its_arguments_is_told_and_so_is_an_argument_that_it_does_not_have():
    with pytest.raises(ValueError, match="unexpected keyword argument 'dof'; it has rewards, mask, ddof, eps"):
        advantages_of("group_advantages(dof=1)")
    with pytest.raises(ValueError, match=r"pass_at_k takes neither rewards .* 'pass_at_k\(...\)'"):
        advantages_of("pass_at_k")
    for name in ("top_entropy", "clip_cov"):
        with pytest.raises(ValueError, match=rf"--transform {name} takes no experience. .* '{name}\(share=...\)'"):
            ObjectiveSettings(transform=(name,)).transforms()


def test_transforms_are_named_with_their_arguments_or_are_functions_of_an_experience(folder):
    names = (
        "top_entropy(0.2)",
        "clip_cov()",
        "mask_truncated",
        "objectives_of_mine:halved",
        "objectives_of_mine:anything",
    )
    transforms = ObjectiveSettings(transform=names).transforms()
    assert all(len(inspect.signature(transform).parameters) == 1 for transform in transforms)
    jax.tree.map(np.testing.assert_array_equal, transforms[3](experience())[0], experience())
