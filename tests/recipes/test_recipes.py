"""Recipes: each number against the source it was copied from, each loss against its composition written out."""

import dataclasses
import importlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import losses, recipes, sampling, transforms
from grpo_jax.advantages import (
    batch_normalised_advantages,
    batch_scaled_advantages,
    centered_advantages,
    from_normalised_rewards,
    from_rewards,
    group_advantages,
    kl_cost,
    leave_one_out_advantages,
)
from grpo_jax.losses import (
    clipped_importance,
    completion_mean,
    completion_sum,
    constant_length,
    entropy_bonus,
    gamma_weight,
    k3,
    masked_importance,
    off_policy_mask,
    plus,
    policy_gradient,
    policy_loss,
    ppo_clip,
    product_ratio,
    prompt_mean,
    sequence_ratio,
    soft_gate,
    token_mean,
    token_ratio,
    truncated_importance,
)
from grpo_jax.policies import from_logits_fn
from grpo_jax.schedules import Scheduled, entropy_control
from grpo_jax.schedules.learning_rates import learning_rate
from grpo_jax.statistics import Mean
from grpo_jax.testing import random_prompts, tiny_policy
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Experience, Rollout, Scores
from grpo_jax.updates import Updates, init_state

TRL = "TRL 1.16, paper index"

# ------------------------------------------------------------------------- the numbers

# recipe -> field -> (value, where it stands)
R1_ZERO = {
    "beta": (0.001, "Nature methods: 'the KL coefficient to 0.001'"),
    "reference_updates": (400, "Nature methods: 'Every 400 steps', of 'a training batch size of 512 per step'"),
    "prompts": (512, "Nature methods: 'each rollout generates 8,192 outputs', 16 a question"),
    "group_size": (16, "Nature methods: 'we sample 16 outputs'"),
    "max_tokens": (32768, "Nature methods: 'a maximum length of 32,768'"),
    "temperature": (1.0, "Nature methods: 'the sampling temperature to 1'"),
    "minibatches": (16, "Nature methods: 'randomly split into 16 minibatches'"),
    "iterations": (1, "Nature methods: 'trained for only a single inner epoch'"),
    "learning_rate": (3e-6, "Nature methods: 'the learning rate to 3e-6'"),
}
DAPO = {
    "epsilon": (0.2, "section 4.1: eps_low 0.2"),
    "epsilon_high": (0.28, "section 4.1: eps_high 0.28"),
    "prompts": (512, "section 4.1: 'the prompt batch size is 512'"),
    "group_size": (16, "section 4.1: 'we sample 16 responses for each prompt'"),
    "max_tokens": (20480, "section 4.1: 'the maximum number of tokens for generation is set to 20,480'"),
    "minibatches": (16, "section 4.1: '16 gradient updates for each rollout step'"),
    "learning_rate": (1e-6, "section 4.1: 'a constant learning rate of 1e-6'"),
    "warmup_rollouts": (20, "section 4.1: 'a linear warm-up over 20 rollout steps'"),
}
SCRIPT = "run_only_top20_high_entropy_tokens_dapo_qwen3_14b.sh"
NUMBERS = {
    "deepseekmath": {
        "beta": (0.04, "section 4.2: 'The KL coefficient is 0.04'"),
        "prompts": (16, "section 4.2: 'the training batch size is 1024', 64 a question"),
        "group_size": (64, "section 4.2: 'For each question, we sample 64 outputs'"),
        "max_tokens": (1024, "section 4.2: 'The max length is set to 1024'"),
        "minibatches": (1, "section 4.2: 'only has a single update following each exploration stage'"),
        "iterations": (1, "as minibatches"),
        "learning_rate": (1e-6, "section 4.2: 'the learning rate of the policy model as 1e-6'"),
    },
    "r1_zero": R1_ZERO,
    "r1": R1_ZERO | {"epsilon": (10.0, "Nature methods, first RL stage: 'the GRPO clip ratio to 10'")},
    "dr_grpo": {
        "epsilon": (0.2, "table 6"),
        "prompts": (128, "scripts: rollout batch 128"),
        "group_size": (8, "table 6"),
        "max_tokens": (3000, "table 6; the constant divisor"),
        "temperature": (1.0, "table 6"),
        "minibatches": (8, "scripts: train batch 128, of 128 x 8 completions"),
        "iterations": (1, "table 6: inner epochs"),
        "learning_rate": (1e-6, "table 6: constant"),
        "b1": (0.9, "table 6"),
        "b2": (0.95, "table 6"),
        "weight_decay": (0.0, "table 6"),
        "max_grad_norm": (1.0, "table 6"),
    },
    "two_grpo": {
        "epsilon": (0.2, "appendix D.1: 'clip ratio lower to 0.2'"),
        "epsilon_high": (0.28, "appendix D.1: 'the clip ratio high to 0.28'"),
        "prompts": (256, "appendix D.1: '256 prompts and 2 rollouts per prompt'"),
        "group_size": (2, "appendix D.1: '256 prompts and 2 rollouts per prompt'"),
        "max_tokens": (4096, "appendix D.1: 'sequence length to 4096 for Qwen-series model'"),
        "temperature": (1.0, "appendix D.1: 'we set temperature to 1'"),
        "minibatches": (1, "appendix D.1: '512 rollouts in each mini-batch', 256 x 2"),
        "learning_rate": (8e-6, "appendix D.1: 'the learning rate of 2-GRPO to 8e-6'"),
        "warmup_rollouts": (10, "appendix D.1: 'a linear warm-up over the first 10 steps'"),
    },
    "intellect_2": {
        "epsilon": (0.2, f"{TRL}: section 4.1"),
        "delta": (4.0, f"{TRL}: section 4.1"),
        "beta": (0.001, f"{TRL}: section 4.1"),
        "prompts": (256, "section 4.1: 4096 rollouts, 16 a prompt"),
        "group_size": (16, f"{TRL}: section 4.1"),
        "minibatches": (8, "section 4.1: 8 optimizer steps a rollout step"),
        "learning_rate": (3e-7, f"{TRL}: section 4.1"),
    },
    "dapo": DAPO,
    "high_entropy_tokens": DAPO
    | {
        "entropy_share": (0.2, f"{SCRIPT}: entropy_top_ratio=0.2"),
        "temperature": (1.0, f"{SCRIPT}: temperature=1.0"),
        "warmup_rollouts": (10, f"{SCRIPT}: lr_warmup_steps=10"),
        "weight_decay": (0.1, f"{SCRIPT}: weight_decay=0.1"),
        "max_grad_norm": (1.0, f"{SCRIPT}: grad_clip=1.0"),
    },
    "skywork_or1": {
        "entropy_target": (0.2, "section 3.2.5: 'we set tgt-ent = 0.2'"),
        "entropy_delta": (0.005, "section 3.2.5: 'Delta = 0.005'"),
        "group_size": (16, "tables 3 to 5"),
        "temperature": (1.0, "section 3.2.4 and table 5"),
        "learning_rate": (1e-6, "table 5"),
    },
    "lite_ppo": {
        "group_size": (8, TRL),
        "temperature": (0.99, TRL),
        "top_p": (0.99, TRL),
        "top_k": (100, TRL),
        "iterations": (1, TRL),
    },
    "gspo": {
        "epsilon": (3e-4, "section 5.1"),
        "epsilon_high": (4e-4, "section 5.1"),
        "minibatches": (4, "section 5.1: each rollout batch in 4 mini-batches"),
    },
    "luspo": {
        "epsilon": (2e-3, "section 5.1: eps_low 2e-3"),
        "epsilon_high": (2.5e-3, "section 5.1: eps_high 2.5e-3"),
        "prompts": (128, "section 5.1: 'Each prompt batch comprises 128 items'"),
        "group_size": (8, "section 5.1: '8 responses sampled per prompt'"),
        "max_tokens": (32768, "section 5.1: 'the maximum generation length is set to 32,768'"),
        "temperature": (1.0, "section 5.1: 'the temperature is set to 1.0 for the actor rollout'"),
        "top_p": (0.7, "section 5.1: 'The top-p is set to 0.7'"),
        "learning_rate": (1e-6, "section 5.1: 'a fixed learning rate of 1e-6'"),
        "warmup_rollouts": (20, "section 5.1: 'a linear warm-up spanning 20 rollout steps'"),
    },
    "gmpo": {
        "epsilon": (0.4, "section 4: a range of (e^-0.4, e^0.4)"),
        "epsilon_high": (0.4, "section 4: a range of (e^-0.4, e^0.4)"),
        "prompts": (128, "section 4: 1024 rollouts, 8 a question"),
        "group_size": (8, "section 4: 8 rollouts a question"),
        "max_tokens": (3000, "section 4: as Dr. GRPO"),
        "minibatches": (8, "section 4: updated 8 times with a batch size of 128"),
    },
    "vespo": {
        "k_pos": (2.0, "section 4.1: '(c1, c2) = (2.0, 3.0) for A > 0'"),
        "lambda_pos": (3.0, "section 4.1: '(c1, c2) = (2.0, 3.0) for A > 0'"),
        "k_neg": (3.0, "section 4.1: '(3.0, 2.0) for A < 0'"),
        "lambda_neg": (2.0, "section 4.1: '(3.0, 2.0) for A < 0'"),
        "group_size": (8, "appendix D: '8 responses per query'"),
        "max_tokens": (16384, "appendix D: 'maximum sequence length 16,384 tokens'"),
        "minibatches": (8, "section 4.1: 'staleness ratio N=gbs/mbs=8'"),
    },
    "cispo": {
        "b1": (0.9, "section 3.2"),
        "b2": (0.95, "section 3.2"),
        "adam_eps": (1e-15, "section 3.2"),
    },
    "scale_rl": {
        "max_ratio": (5.0, f"{TRL}: epsilon_high=5.0, which is the cap itself"),
        "prompts": (48, "appendix A.3: 'We sample 48 prompts in each batch'"),
        "group_size": (16, "appendix A.3: 'each with 16 generations per prompt'"),
        "max_tokens": (14336, "section 2: '12,288 for thinking, 2,048 for the solution'"),
        "minibatches": (1, "appendix A.3: '768 completions per gradient update step', 48 x 16"),
        "learning_rate": (5e-7, "appendix A.3: 'a constant learning rate of 5e-7'"),
        "warmup_rollouts": (100, "appendix A.3: 'a linear warmup of 100 steps'"),
        "adam_eps": (1e-15, "appendix A.3: 'eps = 1e-15'"),
        "weight_decay": (0.01, "appendix A.3: 'weight decay of 0.01'"),
    },
    "sapo": {
        "tau_pos": (1.0, "section 5: tau_pos = 1.0"),
        "tau_neg": (1.05, "section 5: tau_neg = 1.05"),
        "minibatches": (4, "section 5: 4 mini-batches"),
    },
    "rloo": {
        "beta": (0.03, f"{TRL}: appendix C"),
        "group_size": (4, f"{TRL}: 2 or 4"),
        "minibatches": (2, f"{TRL}: appendix C, two updates of a batch of 512"),
        "learning_rate": (1e-6, f"{TRL}: appendix C"),
    },
    "reinforce_plus_plus": {},
    "gdpo": {},
    "tis": {"limit": (2.0, f"{TRL}: clip_max=2; flash-int8-TIS-2 of the authors' FlashRL")},
    "icepop": {
        "low": (0.5, "INTELLECT-3 (arXiv:2512.16144) of IcePop: alpha 0.5"),
        "high": (5.0, "INTELLECT-3 (arXiv:2512.16144) of IcePop: beta 5"),
    },
    "deepseek_v3_2": {
        "threshold": (0.5, f"{TRL}: 'a good starting point could be 0.5'"),
        "beta": (0.001, TRL),
    },
}

every_recipe = pytest.mark.parametrize("make", recipes.ALL, ids=lambda make: make.__name__)


def numbers_of(recipe):
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


@every_recipe
def test_every_number_is_the_one_of_its_source(make):
    assert numbers_of(make()) == {name: value for name, (value, _) in NUMBERS[make.__name__].items()}


def test_the_table_has_every_recipe_once():
    assert sorted(NUMBERS) == sorted(make.__name__ for make in recipes.ALL)
    assert len({make().name for make in recipes.ALL}) == len(recipes.ALL)


# -------------------------------------------------------------------------- the losses


def experience_of(seed, B=4, G=4, T=6, R=2):
    """Policies far apart, so that every bound binds somewhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]

    def log_probs(base, scale):
        return jnp.asarray(np.where(mask, base + rng.normal(0, scale, mask.shape), 0.0), jnp.float32)

    old = log_probs(-3.0, 0.5)
    rollout = Rollout(
        random_prompts(seed, B, 3),
        jnp.zeros(mask.shape, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(mask),
        log_probs(np.asarray(old), 1.0),
        jnp.asarray(lengths == T),
    )
    return Experience(
        rollout,
        rewards=jnp.asarray(rng.normal(0, (1.0, 3.0), (B, G, R)), jnp.float32),
        reward_mask=jnp.ones((B, G, R), bool),
        old_log_probs=old,
        ref_log_probs=log_probs(np.asarray(old), 0.5),
        advantages=jnp.asarray(rng.normal(size=(B, G)), jnp.float32),
        old_entropy=jnp.asarray(np.where(mask, rng.uniform(0, 2, mask.shape), 0.0), jnp.float32),
    ), Scores(log_probs(np.asarray(old), 1.3), jnp.asarray(np.where(mask, 0.7, 0.0), jnp.float32))


EXPERIENCE, SCORES = experience_of(seed=7)
CONTROL = entropy_control.EntropyControl(jnp.asarray(0.05), jnp.asarray(0.15))  # the entropy is below the target


def loss_of(recipe, control=CONTROL):
    return recipe.loss.make(jnp.zeros((), jnp.int32), control) if isinstance(recipe.loss, Scheduled) else recipe.loss


def value_and_grad(loss):
    def value(log_probs):
        return losses.value(loss(SCORES._replace(log_probs=log_probs), EXPERIENCE)[0])

    return jax.value_and_grad(value)(SCORES.log_probs)


def geometric_mean_clipped(scores, experience):
    """GMPO, arXiv:2507.20673, equation 4: `prod_t min(ratio A, clip(ratio) A)` to the power of `1 / length`."""
    ratio = jnp.exp(scores.log_probs - experience.old_log_probs)
    mask, A = experience.rollout.mask, experience.advantages[..., None]
    bounded = jnp.minimum(ratio * A, jnp.clip(ratio, jnp.exp(-0.4), jnp.exp(0.4)) * A) / A
    mean = jnp.sum(jnp.where(mask, jnp.log(bounded), 0.0), axis=-1) / jnp.sum(mask, axis=-1)
    return (Mean(jnp.sum(-jnp.exp(mean) * A[..., 0]), jnp.asarray(A.size)),), {}


PPO, HIGHER = ppo_clip(0.2), ppo_clip(0.2, 0.28)
COMPOSITIONS = {
    "deepseekmath": policy_loss(PPO, completion_mean, penalty=k3(0.04)),
    "r1_zero": policy_loss(PPO, completion_mean, penalty=k3(0.001)),
    "r1": policy_loss(ppo_clip(10.0), completion_mean, penalty=k3(0.001)),
    "dr_grpo": policy_loss(PPO, constant_length(3000)),
    "two_grpo": policy_loss(HIGHER, completion_mean),
    "intellect_2": policy_loss(ppo_clip(0.2, None, 4.0), completion_mean, penalty=k3(0.001)),
    "dapo": policy_loss(HIGHER, token_mean),
    "high_entropy_tokens": policy_loss(HIGHER, token_mean),
    "skywork_or1": plus(policy_loss(PPO, token_mean), entropy_bonus(0.05)),
    "lite_ppo": policy_loss(PPO, token_mean),
    "gspo": policy_loss(ppo_clip(3e-4, 4e-4), completion_mean, ratio=sequence_ratio),
    "luspo": policy_loss(ppo_clip(2e-3, 2.5e-3), completion_sum, ratio=sequence_ratio),
    "gmpo": geometric_mean_clipped,
    "vespo": policy_loss(gamma_weight(2.0, 3.0, 3.0, 2.0), token_mean, ratio=product_ratio),
    "cispo": policy_loss(clipped_importance(5.0), token_mean),
    "scale_rl": policy_loss(clipped_importance(5.0), prompt_mean),
    "sapo": policy_loss(soft_gate(1.0, 1.05), completion_mean),
    "rloo": policy_loss(policy_gradient(), completion_sum),
    "reinforce_plus_plus": policy_loss(PPO, token_mean),
    "gdpo": policy_loss(PPO, completion_mean),
    "tis": policy_loss(PPO, completion_mean, weight=truncated_importance(2.0)),
    "icepop": policy_loss(PPO, completion_mean, weight=masked_importance(0.5, 5.0)),
    "deepseek_v3_2": policy_loss(
        PPO, completion_mean, weight=off_policy_mask(0.5), penalty=k3(0.001, correction=token_ratio)
    ),
}


@every_recipe
def test_the_loss_and_its_gradient_are_those_of_the_composition_written_out(make):
    value, gradient = value_and_grad(loss_of(make()))
    assert np.isfinite(value)
    assert np.any(gradient != 0)
    chex.assert_trees_all_close((value, gradient), value_and_grad(COMPOSITIONS[make.__name__]), rtol=1e-5, atol=1e-7)


ADVANTAGES = {
    "dr_grpo": from_rewards(centered_advantages),
    "lite_ppo": from_rewards(batch_scaled_advantages),
    "scale_rl": from_rewards(batch_scaled_advantages),
    "vespo": from_rewards(centered_advantages),
    "deepseek_v3_2": from_rewards(centered_advantages),
    "rloo": from_rewards(leave_one_out_advantages, cost=kl_cost(0.03)),
    "reinforce_plus_plus": from_rewards(batch_normalised_advantages),
    "gdpo": from_normalised_rewards(),
}


@every_recipe
def test_the_advantages_are_those_of_the_estimator_written_out(make):
    expected = ADVANTAGES.get(make.__name__, from_rewards(group_advantages))
    np.testing.assert_array_equal(make().advantage(EXPERIENCE)[0], expected(EXPERIENCE)[0])


HOOKS = {
    "dapo": (transforms.mask_truncated,),
    "scale_rl": (transforms.old_from_sampler,),
    "vespo": (transforms.old_from_sampler,),
}


@every_recipe
def test_the_hooks_are_those_of_the_work(make):
    hooks = make().settings["transforms"]
    if make is recipes.high_entropy_tokens:
        (hook,) = hooks
        weights = hook(EXPERIENCE)[0].weights
        np.testing.assert_array_equal(weights, transforms.top_entropy(0.2)(EXPERIENCE)[0].weights)
    else:
        assert hooks == HOOKS.get(make.__name__, ())


# ---------------------------------------------------------------- a recipe is a value


@every_recipe
def test_a_recipe_is_a_frozen_value(make):
    recipe = make()
    assert recipe == make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.group_size = 2


OF_LOSS = (
    *("epsilon", "epsilon_high", "delta", "max_ratio", "tau_pos", "tau_neg", "k_pos"),
    *("lambda_pos", "k_neg", "lambda_neg", "limit", "low", "high", "threshold", "beta"),
)


def numbers_in_losses():
    for make in recipes.ALL:
        for name in numbers_of(make()):
            if (name in OF_LOSS and make is not recipes.rloo) or (make, name) == (recipes.dr_grpo, "max_tokens"):
                yield pytest.param(make, name, id=f"{make.__name__}-{name}")


@pytest.mark.parametrize(("make", "name"), list(numbers_in_losses()))
def test_replacing_a_number_of_the_loss_changes_it(make, name):
    recipe = make()
    other = dataclasses.replace(recipe, **{name: getattr(recipe, name) / 2})
    assert abs(value_and_grad(loss_of(recipe))[0] - value_and_grad(loss_of(other))[0]) > 1e-6


def test_dr_grpo_divides_by_the_limit_that_is_put_in():
    recipe = dataclasses.replace(recipes.dr_grpo(), max_tokens=1024)
    expected = value_and_grad(policy_loss(PPO, constant_length(1024)))
    chex.assert_trees_all_close(value_and_grad(recipe.loss), expected, rtol=1e-5)
    assert recipe.sampling["max_tokens"] == 1024


def test_a_beta_adds_a_penalty_or_where_the_recipe_has_a_cost_a_cost():
    penalised = dataclasses.replace(recipes.dapo(), beta=0.5)
    expected = value_and_grad(policy_loss(HIGHER, token_mean, penalty=k3(0.5)))
    chex.assert_trees_all_close(value_and_grad(penalised.loss), expected, rtol=1e-5)
    assert penalised.initial == {"reference": True}
    assert recipes.dapo().initial == {"reference": False}
    for make, estimator in (
        (recipes.rloo, leave_one_out_advantages),
        (recipes.reinforce_plus_plus, batch_normalised_advantages),
    ):
        costly = dataclasses.replace(make(), beta=0.5)
        expected = from_rewards(estimator, cost=kl_cost(0.5))(EXPERIENCE)[0]
        np.testing.assert_array_equal(costly.advantage(EXPERIENCE)[0], expected)
        chex.assert_trees_all_equal(value_and_grad(costly.loss), value_and_grad(make().loss))


def test_a_weight_and_its_numbers_join_another_recipe():
    corrected = dataclasses.replace(recipes.dapo(), weight=truncated_importance, limit=1.5)
    expected = value_and_grad(policy_loss(HIGHER, token_mean, weight=truncated_importance(1.5)))
    chex.assert_trees_all_close(value_and_grad(corrected.loss), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (recipes.dapo, {"max_ratio": 3.0}, "max_ratio = 3.0 has no effect in DAPO: it is no argument of dapo"),
        (recipes.gspo, {"delta": 4.0}, "delta = 4.0 has no effect in GSPO"),
        (recipes.cispo, {"epsilon": 0.2}, "epsilon = 0.2 has no effect in CISPO"),
        (recipes.dapo, {"limit": 2.0}, "limit = 2.0 has no effect in DAPO"),
        (
            recipes.tis,
            {"high": 2.0},
            "high = 2.0 has no effect in TIS: it is no argument of grpo or truncated_importance",
        ),
        (recipes.icepop, {"weight": None}, "low = 0.5 has no effect in IcePop"),
        (recipes.sapo, {"k_pos": 2.0}, "k_pos = 2.0 has no effect in SAPO"),
        (recipes.r1_zero, {"beta": None}, "reference_updates = 400 has no effect in DeepSeek-R1-Zero without beta"),
        (recipes.r1_zero, {"minibatches": 3}, "no whole number of rollouts of 3 updates"),
        (recipes.dapo, {"entropy_delta": 0.1}, "entropy_delta = 0.1 has no effect in DAPO without entropy_target"),
        (recipes.dapo, {"epsilon": -0.2}, "epsilon is above 0"),
        (recipes.dapo, {"entropy_share": 2.0}, "share is above 0"),
        (recipes.rloo, {"beta": -1.0}, "beta is at least 0"),
    ],
    ids=lambda x: x.__name__ if callable(x) else next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_number_without_effect_or_out_of_range_is_refused(make, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(make(), **change)


# ----------------------------------------------------------------------- the run's numbers


@every_recipe
def test_settings_hold_what_the_source_states_and_nothing_else(make):
    recipe = make()
    for name in ("group_size", "max_tokens", "temperature", "top_p", "top_k"):
        assert recipe.sampling.get(name) == getattr(recipe, name), name
    stated = {name: getattr(recipe, name) for name in ("iterations", "minibatches", "max_grad_norm")}
    assert recipe.updates == Updates(**{name: value for name, value in stated.items() if value is not None})
    assert None not in (*recipe.sampling.values(), *recipe.settings.values())
    assert recipe.settings["updates"] == recipe.updates
    assert recipe.settings["score_old"] == (make is recipes.high_entropy_tokens)


def test_the_optimizer_is_adamw_with_a_warm_up_of_rollouts():
    recipe = recipes.scale_rl()
    expected = optax.adamw(learning_rate(5e-7, warmup_steps=100), eps=1e-15, weight_decay=0.01)
    assert_same_updates(recipe.optimizer, expected)
    warm = dataclasses.replace(recipes.dapo(), warmup_rollouts=2)  # of 16 updates each
    assert_same_updates(warm.optimizer, optax.adamw(learning_rate(1e-6, warmup_steps=2, updates_per_step=16)))
    plain = optax.adamw(1e-6, b1=0.9, b2=0.95, weight_decay=0.0)
    assert_same_updates(recipes.dr_grpo().optimizer, plain)
    for name in ("learning_rate", "b1", "b2", "weight_decay"):
        other = dataclasses.replace(recipes.dr_grpo(), **{name: getattr(recipes.dr_grpo(), name) / 2 + 0.1})
        assert not np.array_equal(updates_of(other.optimizer), updates_of(plain)), name
    assert not np.array_equal(updates_of(dataclasses.replace(recipe, adam_eps=1.0).optimizer), updates_of(expected))


def updates_of(optimizer, count=3):
    params = jnp.asarray([1.0, -2.0])
    state, history = optimizer.init(params), []
    for number in range(count):
        updates, state = optimizer.update(jnp.asarray([0.1, 0.3]) * (number + 1), state, params)
        history.append(updates)
    return np.asarray(history)


def assert_same_updates(optimizer, expected):
    np.testing.assert_array_equal(updates_of(optimizer), updates_of(expected))
    assert np.any(updates_of(expected) != 0)


def test_a_learning_rate_that_no_source_states_is_asked_for():
    with pytest.raises(ValueError, match=r"arXiv:2507\.18071v2, section 5\.1 states no learning rate"):
        _ = recipes.gspo().optimizer


# ------------------------------------------------------------------------------- runs


def even_tokens(rollout):
    even = jnp.sum(rollout.mask & (rollout.tokens % 2 == 0), axis=-1) / jnp.maximum(rollout.lengths, 1)
    return even[..., None], jnp.ones((*even.shape, 1), bool)


VOCABULARY = 9
SMALL = {"prompts": 4, "group_size": 2, "max_tokens": 3}


BIGRAMS = from_logits_fn(
    lambda params, tokens, mask: params[tokens], init=lambda key: jax.random.normal(key, (VOCABULARY, VOCABULARY))
)


def run_of(recipe, policy=BIGRAMS):
    """The state before and after a step, and its metrics."""
    key = jax.random.key(0)
    state = init_state(policy.init(key), recipe.optimizer, key, **recipe.initial)
    step = make_train_step(
        policy,
        recipe.optimizer,
        sampling.sampler(eos_ids=(1,), **recipe.sampling),
        reward=even_tokens,
        **recipe.settings,
    )
    after, metrics = jax.jit(step)(state, random_prompts(0, recipe.prompts, 3, VOCABULARY))
    return state, after, metrics


@pytest.mark.slow
def test_r1_trains_and_renews_its_reference_after_as_many_updates_as_are_due():
    recipe = dataclasses.replace(recipes.r1(), **SMALL, minibatches=2, reference_updates=4, learning_rate=1e-2)
    state, after, metrics = run_of(recipe, tiny_policy(num_hidden_layers=1))
    assert np.isfinite(metrics["loss"].sum)
    assert metrics["loss"].count == 2
    chex.assert_trees_all_equal(recipe.after(after, metrics).ref_params, state.params)  # 2 of 4 updates
    renewed = recipe.after(after._replace(step=jnp.asarray(2)), metrics)
    chex.assert_trees_all_equal(renewed.ref_params, after.params)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(after.params, state.params)


def test_80_20_trains_on_the_tokens_of_highest_entropy():
    recipe = dataclasses.replace(recipes.high_entropy_tokens(), **SMALL, minibatches=1, warmup_rollouts=None)
    state, after, metrics = run_of(recipe)
    assert "entropy_threshold" in metrics
    assert np.isfinite(metrics["loss"].sum)
    assert recipe.after(after, metrics) is after
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(after.params, state.params)


def test_skywork_moves_its_bonus_towards_the_target():
    recipe = dataclasses.replace(recipes.skywork_or1(), **SMALL)
    state, after, metrics = run_of(recipe)
    entropy = metrics["entropy"].sum / metrics["entropy"].count
    below = recipe.after(after, metrics).extra
    np.testing.assert_allclose(below.entropy, entropy, rtol=1e-6)
    assert state.extra.coefficient == below.coefficient == 0.0  # far above the target, and never below 0
    high = dataclasses.replace(recipe, entropy_target=10.0, entropy_delta=0.1)
    np.testing.assert_allclose(high.after(after, metrics).extra.coefficient, 0.1, rtol=1e-6)


def test_the_bonus_of_skywork_is_paid_at_the_target_and_below_it():
    recipe = recipes.skywork_or1()
    above = CONTROL._replace(entropy=jnp.asarray(0.3))
    plain = value_and_grad(policy_loss(PPO, token_mean))
    chex.assert_trees_all_close(value_and_grad(loss_of(recipe, above)), plain, rtol=1e-6)
    wider = dataclasses.replace(recipe, entropy_target=0.4)
    paid = value_and_grad(plus(policy_loss(PPO, token_mean), entropy_bonus(0.05)))
    chex.assert_trees_all_close(value_and_grad(loss_of(wider, above)), paid, rtol=1e-6)


# --------------------------------------------------------------------- words beside them


@every_recipe
def test_a_recipe_says_what_it_leaves_to_the_caller(make):
    recipe = make()
    assert recipe.leaves
    assert recipe.source
    for sentence in recipe.leaves:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
    text = " ".join(recipe.leaves)
    assert "model" in text
    assert "rewards" in text
    for module, name in re.findall(r"`(dynamic_sampling|losses|rewards\.tokens)\.(\w+)", text):
        assert hasattr(importlib.import_module(f"grpo_jax.{module}"), name), (module, name)


def test_what_dapo_leaves_has_the_numbers_of_its_paper():
    text = " ".join(recipes.dapo().leaves)
    assert "soft_overlong(max_tokens=20480, cache=4096)" in text  # section 4.1: 16,384 + 4,096
    assert "Dynamic sampling" in text


def fields_of(entry):
    """The fields of a BibTeX entry of one field a line."""
    kind, key = re.match(r"@(\w+)\{([\w]+),\n", entry).groups()
    fields = dict(re.findall(r"^  (\w+)\s*= \{(.*)\},$", entry, re.MULTILINE))
    return kind, key, fields


@every_recipe
def test_a_citation_is_a_bibtex_entry(make):
    entry = recipes.citation(make())
    depth = 0
    for character in entry:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert entry.endswith("}\n")
    kind, _, fields = fields_of(entry)
    assert kind in {"misc", "article"}
    assert len(fields) == entry.count("\n") - 2
    assert {"title", "author", "year"} <= fields.keys()
    assert fields.keys() & {"eprint", "doi", "url"}
    assert 2024 <= int(fields["year"]) <= 2026
    if "eprint" in fields:
        assert re.fullmatch(r"\d{4}\.\d{5}", fields["eprint"])
        assert fields["archivePrefix"] == "arXiv"
        assert "doi" in fields or f"arXiv:{fields['eprint']}" in make().source
    authors = fields["author"].split(" and ")
    assert all(author == "others" or author.startswith("{") or ", " in author for author in authors)


def test_keys_of_citations_name_one_work_each():
    entries = {recipes.citation(make()) for make in recipes.ALL}
    assert len(entries) == len(recipes.ALL) - 1  # R1 and R1-Zero are of one paper
    assert len({fields_of(entry)[1] for entry in entries}) == len(entries)
