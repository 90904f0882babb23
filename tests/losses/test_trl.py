"""Every loss and advantage that TRL 1.16.0 computed (`tests/golden/trl/losses.npz`), against a composition of ours.

`objective` says what TRL's settings are called here. What the two do differently:

- TRL's means over completions count those without a token that counts: `completion_mean_of_all`, and
  `per_prompt_count` where the divisor is a number of tokens.
- TRL's GMPO gives such a completion the ratio `exp(0)`, so that it adds `-A / completions` to the value and nothing to
  the gradient. Ours leaves it out.
- TRL's entropy filter looks at the policy that learns, ours at the one that sampled; here both are given the same.
- The filter is a weight of 0 that stays in denominators in both, but TRL takes the tokens out of GMPO's geometric mean
  and of the mean of the entropy bonus, and out of no KL: `drop_weightless` for the one term, `plus` for the other.
- TRL adds the logarithm of the bounded rollout weight to VESPO's log-ratio: `corrected`.
- TRL's VESPO has the ratio of the whole completion at either `importance_sampling_level`; that of its KL follows it.
- TRL's GMPO ignores `use_bias_correction_kl`.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import advantages as adv
from grpo_jax import losses, transforms
from grpo_jax.losses import (
    bnpo,
    cispo,
    completion_mean_of_all,
    corrected,
    dapo,
    dr_grpo,
    entropy_bonus,
    gmpo,
    grpo,
    k3,
    luspo,
    masked_importance,
    off_policy_mask,
    old_policy,
    penalty_loss,
    per_prompt_count,
    plus,
    product,
    product_ratio,
    sapo,
    sequence_ratio,
    token_ratio,
    truncated_importance,
    vespo,
)
from grpo_jax.types import Experience, Prompts, Rollout, Scores

B, G, T = 4, 3, 7

with np.load(Path(__file__).parents[1] / "golden" / "trl" / "losses.npz") as file:
    TRL = {name: file[name] for name in file.files}
SETTINGS = json.loads(str(TRL["settings"]))
ADVANTAGE_SETTINGS = json.loads(str(TRL["advantage_settings"]))

every_case = pytest.mark.parametrize("name", sorted(SETTINGS))
# name -> enable_x64, type, tolerances of value and gradient as shares of the largest gradient. In float32 the value has
# more room: SAPO's is a difference of gains twenty times as large as that gradient.
PRECISIONS = {"float64": (True, np.float64, 1e-12, 1e-12), "float32": (False, np.float32, 3e-6, 1e-6)}
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


# ----------------------------------------------------------- TRL's settings in our words

LEVELS = {"token": token_ratio, "sequence": sequence_ratio}


def objective(s):
    """TRL's settings as a loss of ours."""
    kind, level, penalty = s["loss_type"], LEVELS[s["importance_sampling_level"]], kl(s)
    clip = {"epsilon": s["epsilon"], "epsilon_high": s["epsilon_high"]}
    dual_clip = clip | {"delta": s["delta"]}
    parts = {"ratio": level, "weight": weight(s), "penalty": penalty}

    if kind == "grpo":
        loss = grpo(**dual_clip, **parts, aggregate=completion_mean_of_all)
    elif kind == "bnpo":
        loss = bnpo(**dual_clip, **parts)
    elif kind == "dr_grpo":
        max_tokens = s["max_completion_length"]
        loss = dr_grpo(max_tokens, **dual_clip, **parts, aggregate=per_prompt_count(G * max_tokens))
    elif kind == "dapo":  # one update a rollout: the mean over the rollout's tokens is that over the update's
        loss = dapo(**dual_clip, **parts)
    elif kind == "cispo":
        loss = cispo(max_ratio=s["epsilon_high"], **parts)
    elif kind == "sapo":
        temperatures = {"tau_pos": s["sapo_temperature_pos"], "tau_neg": s["sapo_temperature_neg"]}
        loss = sapo(**temperatures, **parts, aggregate=completion_mean_of_all)
    elif kind == "luspo":
        assert s["delta"] is None
        loss = luspo(**clip, **parts, aggregate=per_prompt_count(G))
    elif kind == "vespo":
        shape = {"k_pos": s["vespo_k_pos"], "lambda_pos": s["vespo_lambda_pos"]}
        shape |= {"k_neg": s["vespo_k_neg"], "lambda_neg": s["vespo_lambda_neg"]}
        anchor = corrected(rollout_weight(s)) if corrects_rollout(s) else old_policy
        loss = vespo(**shape, penalty=penalty, anchor=anchor)
    elif kind == "gmpo":
        assert parts["weight"] is None
        assert not (s["beta"] and s["use_bias_correction_kl"])
        loss = gmpo(**clip, aggregate=completion_mean_of_all)
        if s["top_entropy_quantile"] < 1:
            loss = after(*only_top_entropy(s), loss=loss)
        if penalty is not None:
            loss = plus(loss, penalty_loss(penalty, completion_mean_of_all))
    else:
        raise ValueError(f"no composition for loss_type {kind}")

    if kind != "gmpo" and s["top_entropy_quantile"] < 1:
        loss = after(transforms.top_entropy(s["top_entropy_quantile"]), loss=loss)
    if s["entropy_coef"]:
        bonus = entropy_bonus(s["entropy_coef"])
        loss = plus(loss, after(*only_top_entropy(s), loss=bonus) if s["top_entropy_quantile"] < 1 else bonus)
    return loss


def kl(s):
    if not s["beta"]:
        return None
    correction = LEVELS[s["importance_sampling_level"]] if s["use_bias_correction_kl"] else None
    return k3(s["beta"], correction=correction)


def weight(s):
    weights = []
    if s["off_policy_mask_threshold"] is not None:
        weights.append(off_policy_mask(s["off_policy_mask_threshold"]))
    if corrects_rollout(s) and s["loss_type"] != "vespo":
        weights.append(rollout_weight(s))
    return product(*weights) if weights else None


def corrects_rollout(s):
    return s["use_vllm"] and s["vllm_importance_sampling_correction"]


def rollout_weight(s):
    level, _, bound = s["vllm_importance_sampling_mode"].partition("_")
    ratio = {"token": token_ratio, "sequence": product_ratio}[level]
    low, high = s["vllm_importance_sampling_clip_min"] or 0.0, s["vllm_importance_sampling_clip_max"]
    if bound == "truncate":
        return truncated_importance(high, low=low, ratio=ratio)
    assert bound == "mask"
    return masked_importance(low, high, ratio=ratio)


def after(*hooks, loss):
    """The loss of a prepared experience; in training `make_learn(..., transforms=hooks)` prepares it for all terms."""

    def prepared(scores, experience):
        for hook in hooks:
            experience, _ = hook(experience)
        return loss(scores, experience)

    return prepared


def only_top_entropy(s):
    """The filter as a mask instead of a weight."""
    return transforms.top_entropy(s["top_entropy_quantile"]), transforms.drop_weightless


# ---------------------------------------------------------------------------- evaluation


def grouped(rows):
    """`[B * G, ...]` to `[B, G, ...]`, in float64 where that is enabled."""
    return jnp.asarray(rows.reshape(B, G, *rows.shape[1:]))


def inputs_of(s):
    """The scores and the experience that TRL was given."""
    x = {name.removeprefix("inputs/"): grouped(rows) for name, rows in TRL.items() if name.startswith("inputs/")}
    mask, truncated = x["mask"] == 1, x["mask"][..., 0] != x["mask_truncated"][..., 0]
    old = x["log_probs" if s["inputs"] == "on_policy" else "old_log_probs"]
    # What a policy has drifted from is the sampler where TRL knows its log-probs, else the old policy.
    sampler = x["sampler_log_probs"] if s["use_vllm"] else old
    prompts = Prompts(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
    tokens, lengths = jnp.zeros((B, G, T), jnp.int32), jnp.sum(mask, axis=-1, dtype=jnp.int32)
    experience = Experience(
        Rollout(prompts, tokens, lengths, mask, sampler, truncated),
        old_log_probs=old,
        ref_log_probs=x["ref_log_probs"],
        advantages=x["advantages_per_token" if s["inputs"] == "per_token_advantages" else "advantages"],
        old_entropy=x["entropies"],
    )
    if s["mask_truncated_completions"]:
        experience, _ = transforms.mask_truncated(experience)
        np.testing.assert_array_equal(experience.rollout.mask, x["mask_truncated"] == 1)
    return Scores(x["log_probs"], x["entropies"]), experience


def evaluate(s):
    """Value and gradients; eagerly, since most cases are a composition of their own, and compiling takes longer."""
    loss = objective(s)
    scores, experience = inputs_of(s)
    value, gradient = jax.value_and_grad(lambda x: losses.value(loss(x, experience)[0]))(scores)
    return np.asarray(value), jax.tree.map(np.asarray, gradient)


def value_of_empty_completions(s):
    """What completions without a token that counts add to the value in TRL's GMPO, where their ratio is 1."""
    if s["loss_type"] != "gmpo":
        return 0.0
    empty = ~np.any(TRL["inputs/mask_truncated" if s["inputs"] == "truncated" else "inputs/mask"], axis=-1)
    return -TRL["inputs/advantages"][empty].sum() / (B * G)


# --------------------------------------------------------------------------------- losses


@every_precision
@every_case
def test_the_value_and_the_gradients_are_those_of_trl(name, precision):
    x64, dtype, of_value, of_gradient = PRECISIONS[precision]
    s = SETTINGS[name]
    with jax.enable_x64(x64):
        value, gradient = evaluate(s)
    expected = TRL[f"case/{name}/loss"] - value_of_empty_completions(s)
    by_log_probs, by_entropy = (TRL[f"case/{name}/grad_{x}"].reshape(B, G, T) for x in ("log_probs", "entropy"))
    assert value.dtype == gradient.log_probs.dtype == gradient.entropy.dtype == dtype
    largest = np.abs(by_log_probs).max()
    assert largest > 0
    np.testing.assert_allclose(value, expected, rtol=0, atol=of_value * max(largest, abs(expected)))
    np.testing.assert_allclose(gradient.log_probs, by_log_probs, rtol=0, atol=of_gradient * largest)
    np.testing.assert_allclose(gradient.entropy, by_entropy, rtol=0, atol=of_gradient * np.abs(by_entropy).max())


def test_every_loss_in_the_file_is_a_case():
    """No case of TRL's goes without a comparison: `every_case` walks the settings, and they name all arrays."""
    named = {name.split("/")[1] for name in TRL if name.startswith("case/")}
    assert set(SETTINGS) == named
    assert len(named) == 171
    for name in named:
        arrays = {key.removeprefix(f"case/{name}/") for key in TRL if key.startswith(f"case/{name}/")}
        corrected = {"importance_sampling_ratio"} if corrects_rollout(SETTINGS[name]) else set()
        assert arrays == {"loss", "grad_log_probs", "grad_entropy"} | corrected


@pytest.mark.parametrize("name", sorted(name for name in SETTINGS if corrects_rollout(SETTINGS[name])))
def test_the_rollout_weight_is_that_of_trl(name):
    """On its own, too: a completion masked whole would hide what its tokens weigh."""
    with jax.enable_x64(True):
        _, experience = inputs_of(SETTINGS[name])
        bounded, _ = rollout_weight(SETTINGS[name])(None, experience)
    expected = TRL[f"case/{name}/importance_sampling_ratio"].reshape(B, G, -1)
    mask = np.asarray(experience.rollout.mask)
    np.testing.assert_allclose(bounded[mask], np.broadcast_to(expected, mask.shape)[mask], rtol=1e-12)


def test_trl_counts_empty_completions_into_the_value_of_gmpo():
    """The one expected value that is corrected, and by how much."""
    corrections = {name: value_of_empty_completions(s) for name, s in SETTINGS.items()}
    assert {name: x for name, x in corrections.items() if x} == {"gmpo_kl_truncated": (0.75 - 0.875 + 0.375) / 12}


# ----------------------------------------------------------------------------- advantages


def advantage_of(s):
    """TRL's settings as an advantage function of ours."""
    weights = s["reward_weights"]
    if s["multi_objective_aggregation"] == "normalize_then_sum":  # whatever `scale_rewards` says
        return adv.from_normalised_rewards(weights=weights, ddof=1)
    estimators = {
        "group": functools.partial(adv.group_advantages, ddof=1, eps=1e-4),
        "batch": functools.partial(adv.batch_scaled_advantages, ddof=1, eps=1e-4),
        "none": adv.centered_advantages,
    }
    return adv.from_rewards(estimators[s["scale_rewards"]], weights=weights)


@every_precision
@pytest.mark.parametrize("name", sorted(ADVANTAGE_SETTINGS))
def test_the_advantages_are_those_of_trl(name, precision):
    x64, dtype, _, tolerance = PRECISIONS[precision]
    s = ADVANTAGE_SETTINGS[name]
    with jax.enable_x64(x64):
        _, experience = inputs_of(SETTINGS["grpo"])
        rewards = grouped(TRL[f"rewards/{s['rewards']}"])
        experience = experience._replace(rewards=rewards, reward_mask=~jnp.isnan(rewards))
        advantages, _ = advantage_of(s)(experience)
    expected = TRL[f"advantages/{name}"].reshape(B, G)
    assert advantages.dtype == dtype
    np.testing.assert_allclose(advantages, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_every_advantage_in_the_file_is_a_case():
    assert {f"advantages/{name}" for name in ADVANTAGE_SETTINGS} == {x for x in TRL if x.startswith("advantages/")}
    assert len(ADVANTAGE_SETTINGS) == 8
