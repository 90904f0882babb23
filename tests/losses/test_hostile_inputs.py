"""What does not count may hold anything, 16 bits and large ratios stay finite, and other shapes are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from losses_reference import case_of, differentiated, experience_of

from grpo_jax import losses
from grpo_jax.losses import (
    cispo,
    covariant_kl,
    distill,
    distill_top,
    echo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    k1,
    k2,
    k3,
    m2po,
    off_policy_mask,
    policy_loss,
    ppo_clip,
    reinforce,
    reverse_kl,
    sampled_reverse_kl,
    squared_log_ratio,
    token_mean,
    token_ratio,
    vespo,
)
from grpo_jax.types import Likeliest, Scores

NAN, INF = np.nan, np.inf


def both(loss, experience, scores):
    """Value and gradient by the log-probs, eagerly."""
    (value, _), (gradient, _) = differentiated(loss)(scores.log_probs, scores.entropy, experience)
    return np.asarray(value, np.float64), np.asarray(gradient, np.float64)


def inputs(**options):
    case = case_of(precision=np.float32, **options)
    return experience_of(case), Scores(jnp.asarray(case.log_probs), jnp.asarray(case.entropy))


@pytest.mark.parametrize(
    "loss", [grpo(), gspo_token(), vespo(), reinforce()], ids=["grpo", "gspo_token", "vespo", "reinforce"]
)
@pytest.mark.parametrize("anything", [NAN, INF], ids=["nan", "inf"])
def test_the_advantage_of_a_token_that_is_left_out_may_be_anything(loss, anything):
    experience, scores = inputs(full=True)
    left_out = ~experience.rollout.mask | (experience.weights == 0)
    assert bool((left_out & experience.rollout.mask).any())
    advantages = jnp.where(left_out, anything, experience.advantages)
    weights = jnp.where(experience.rollout.mask, experience.weights, anything)
    actual = both(loss, experience._replace(advantages=advantages, weights=weights), scores)
    for x, expected in zip(actual, both(loss, experience, scores), strict=True):
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    "loss",
    [
        *(grpo(penalty=k(0.0)) for k in (k1, k2, k3)),
        grpo(penalty=k3(0.0, correction=token_ratio)),
        grpo(penalty=squared_log_ratio(0.0)),
        grpo(penalty=covariant_kl(0.0)),
        *(losses.plus(grpo(), loss) for loss in (sampled_reverse_kl(0.0), echo(0.0), distill(0.0))),
    ],
    ids=["k1", "k2", "k3", "k3_corrected", "squared", "covariant", "sampled", "echo", "distill"],
)
def test_a_cost_of_weight_0_costs_nothing_though_it_is_infinite(loss):
    experience, scores = inputs()
    mask = experience.rollout.mask
    plain = both(grpo(), experience, scores)
    first = mask & (jnp.arange(mask.shape[-1]) == 0) & (experience.advantages[..., None] > 0)
    cut = scores._replace(divergence=jnp.where(first, INF, 1.0))
    experience = experience._replace(
        ref_log_probs=jnp.where(first, -INF, experience.ref_log_probs),
        rollout=experience.rollout._replace(log_probs=jnp.where(first, -INF, experience.rollout.log_probs)),
        high_covariance=first,
        environment_mask=first,
    )

    def with_divergence(scores, experience):
        return loss(scores._replace(divergence=cut.divergence), experience)

    for x, expected in zip(both(with_divergence, experience, scores), plain, strict=True):
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    "loss", [grpo(), gspo(), gmpo(), grpo(penalty=k3(0.1, correction=token_ratio))], ids=["grpo", "gspo", "gmpo", "k3"]
)
@pytest.mark.parametrize("shift", [100.0, 1e6], ids=str)
def test_a_bad_token_that_has_become_very_likely_breaks_no_update(loss, shift):
    """Its ratio is beyond float32; counted as e^20, it has no gradient."""
    experience, scores = inputs()
    b, g = np.argwhere((np.asarray(experience.advantages) < 0) & np.asarray(experience.rollout.mask[..., 0]))[0]
    experience = experience._replace(old_log_probs=experience.old_log_probs.at[b, g, 0].add(-shift))
    value, gradient = both(loss, experience, scores)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_log_probs_in_16_bits_give_the_loss_of_the_same_numbers_in_32(dtype):
    experience, scores = inputs()
    experience, scores = experience._replace(old_log_probs=experience.old_log_probs - 15), scores
    narrow, wide = (
        (
            experience._replace(
                rollout=experience.rollout._replace(log_probs=cast(experience.rollout.log_probs)),
                **{name: cast(getattr(experience, name)) for name in ("old_log_probs", "ref_log_probs", "advantages")},
            ),
            Scores(cast(scores.log_probs), cast(scores.entropy)),
        )
        for cast in (lambda x: x.astype(dtype), lambda x: x.astype(dtype).astype(jnp.float32))
    )
    for loss in (grpo(penalty=k3(0.1)), cispo(weight=off_policy_mask(0.1)), m2po()):
        np.testing.assert_array_equal(both(loss, *narrow)[0], both(loss, *wide)[0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_a_teachers_top_in_16_bits_leaves_a_probability_to_the_rest(dtype):
    experience, scores = inputs()
    shape = (*experience.rollout.mask.shape, 2)
    theirs = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.5])), shape).astype(dtype)  # nothing is left, to rounding
    scores = scores._replace(top_log_probs=jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25])), shape))
    narrow, wide = (
        distill_top(reverse_kl)(scores, experience._replace(teacher_top=Likeliest(jnp.zeros(shape, jnp.int32), x)))[0]
        for x in (theirs, theirs.astype(jnp.float32))
    )
    assert np.isfinite(losses.value(wide))
    np.testing.assert_array_equal(losses.value(narrow), losses.value(wide))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("advantages", (4,)),
        ("advantages", (4, 1)),
        ("advantages", (4, 4, 4)),
        ("weights", (4, 4)),
        ("old_log_probs", (4, 4, 1)),
        ("ref_log_probs", (4, 1, 8)),
    ],
    ids=str,
)
def test_arrays_of_another_shape_are_refused_and_not_spread(field, shape):
    experience, scores = inputs()
    experience = experience._replace(**{field: jnp.ones(shape)})
    with pytest.raises((ValueError, AssertionError), match=r"\(4"):
        policy_loss(ppo_clip(0.2), token_mean, penalty=k3(0.1))(scores, experience)


@pytest.mark.parametrize("epsilon", [-0.2, np.float32(-0.2), np.int64(0), float("nan")], ids=repr)
def test_a_clip_out_of_range_is_refused_whatever_the_type_of_its_number(epsilon):
    with pytest.raises(ValueError, match="epsilon is above 0"):
        grpo(epsilon=epsilon)
