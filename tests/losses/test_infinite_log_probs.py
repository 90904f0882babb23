"""Tokens of probability 0: a log-prob of -inf reaches no product as `0 * inf`, in any objective."""

import numpy as np
import pytest
from losses_reference import case_of, evaluate
from test_losses import OBJECTIVES

from grpo_jax.losses import cispo, grpo, k1, k2, k3, masked_importance, reinforce, token_ratio

INF = np.inf
TOKENS = {"advantage_0": 0.0, "positive_advantage": 1.3, "negative_advantage": -0.7}
# Which policies give the token probability 0: the log-probs of the new, the old, the reference policy and the sampler.
WHERE = {
    "new": {"log_probs": -INF},
    "reference": {"ref": -INF},
    "new_and_reference": {"log_probs": -INF, "ref": -INF},
    "all": {"log_probs": -INF, "old": -INF, "ref": -INF, "sampler": -INF},
}


def case_with(advantage, fields):
    """Completion (0, 1) has this advantage, and its token 1 these log-probs."""
    case = case_of(154)
    assert case.mask[0, 1, 1]
    advantages = case.advantages.copy()
    advantages[0, 1] = advantage
    arrays = {name: getattr(case, name).copy() for name in fields}
    for name, number in fields.items():
        arrays[name][0, 1, 1] = number
    return case._replace(advantages=advantages, **arrays)


def near(name, advantage, where):
    """The same with a log-prob of -1e30 for -inf: what the value and the gradient tend to."""
    fields = dict.fromkeys(WHERE[where], -1e30)
    value, gradient, _ = evaluate(OBJECTIVES[name].loss, case_with(TOKENS[advantage], fields))
    return value, gradient.copy()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("advantage", TOKENS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_of_probability_0_never_makes_a_nan_and_an_objective_that_stays_finite_has_its_limit(
    name, advantage, where
):
    value, gradient, metrics = evaluate(OBJECTIVES[name].loss, case_with(TOKENS[advantage], WHERE[where]))
    assert not np.isnan(value)
    assert not np.isnan(gradient).any()
    assert not np.isnan(list(metrics.values())).any()
    limit, gradient_limit = near(name, advantage, where)
    if abs(limit) < 100:
        if "drpo" not in name or where not in ("new", "new_and_reference"):  # p_old is not in a ratio of 0
            np.testing.assert_allclose(value, limit, rtol=1e-5)
        if where in ("all", "new_and_reference"):  # a ratio of two probabilities of 0 is a constant 1
            assert gradient[0, 1, 1, 0] == 0
            gradient_limit[0, 1, 1, 0] = 0
        np.testing.assert_allclose(gradient, gradient_limit, atol=1e-5)
    elif not ("vespo" in name and np.isfinite(value)):  # its floor on the ratio is not for a ratio of 0
        # A log-prob or a divergence that the objective adds up: the infinity is true, and its update is refused.
        assert np.isinf(value)
        assert np.sign(value) == np.sign(limit)


def test_an_infinite_loss_is_the_exception():
    """Only objectives without a ratio before the log-prob, and uncorrected penalties, are infinite."""
    infinite = {
        name
        for name in OBJECTIVES
        if np.isinf(evaluate(OBJECTIVES[name].loss, case_with(TOKENS["positive_advantage"], WHERE["new"]))[0])
    }
    without_ratio = {name for name in OBJECTIVES if any(k in name for k in ("reinforce", "sft", "dro"))}
    penalised = {name for name in OBJECTIVES if any(k in name for k in ("_k1", "_k2", "_k3", "grpo_r1", "prompt_mean"))}
    penalised |= {"dppo_prime_rl", "squared_log_ratio_old", "kl_cov", "covariant_kl"}
    floored = {"cispo_floor", "dapo_entropy_penalty", "off_policy_truncated"}
    assert infinite <= without_ratio | penalised | floored
    assert {"reinforce", "sft", "grpo_k3", "cispo_floor"} <= infinite
    assert not {"grpo", "gspo", "gspo_token", "gmpo", "cispo", "sapo", "vespo", "luspo", "dapo_k3_token"} & infinite


@pytest.mark.parametrize("loss", [reinforce(weight=masked_importance()), cispo(weight=masked_importance())])
def test_a_token_of_weight_0_may_have_any_log_prob(loss):
    case = case_with(1.0, {"log_probs": -INF, "sampler": -50.0})  # old over sampler is beyond the band
    value, gradient, _ = evaluate(loss, case)
    assert np.isfinite(value)
    assert gradient[0, 1, 1, 0] == 0


@pytest.mark.parametrize("make", [k1, k2, k3])
def test_a_penalty_corrected_by_a_ratio_of_0_costs_nothing(make):
    corrected = grpo(penalty=make(0.5, correction=token_ratio))
    value, gradient, _ = evaluate(corrected, case_with(1.0, WHERE["new"]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
