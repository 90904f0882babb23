"""Published settings, each with its source: to start from, to change one thing of, and to cite.

    recipe = dataclasses.replace(recipes.dapo(), max_tokens=1024, minibatches=4)
    state = init_state(params, recipe.optimizer, key, **recipe.initial)
    sampler = sampling.sampler(eos_ids=eos_ids, **recipe.sampling)
    step = make_train_step(policy, recipe.optimizer, sampler, reward=reward, **recipe.settings)
    ...
    state, metrics = step(state, prompts)
    state = recipe.after(state, metrics)

A recipe is a value. None is what its source does not state, and then the default of the
library holds. None is also what the source switches off: a KL coefficient of 0 is no term
at all, and a top-p of 1 no cut. What no field holds, and a run still needs, stands in
`leaves`.

    recipe.py                                       Recipe, with the properties that a step takes; citation
    first.py after_dapo.py completion_ratios.py     the recipes, a function a published work
    unclipped.py other_samplers.py
"""

from collections.abc import Callable

from grpo_jax.recipes.after_dapo import dapo, high_entropy_tokens, lite_ppo, skywork_or1
from grpo_jax.recipes.completion_ratios import gmpo, gspo, luspo, vespo
from grpo_jax.recipes.first import deepseekmath, dr_grpo, intellect_2, r1, r1_zero, two_grpo
from grpo_jax.recipes.other_samplers import deepseek_v3_2, gdpo, icepop, tis
from grpo_jax.recipes.recipe import Recipe, citation
from grpo_jax.recipes.unclipped import cispo, reinforce_plus_plus, rloo, sapo, scale_rl

ALL: tuple[Callable[[], Recipe], ...] = (
    deepseekmath,
    r1_zero,
    r1,
    dr_grpo,
    two_grpo,
    intellect_2,
    dapo,
    high_entropy_tokens,
    skywork_or1,
    lite_ppo,
    gspo,
    luspo,
    gmpo,
    vespo,
    cispo,
    scale_rl,
    sapo,
    rloo,
    reinforce_plus_plus,
    gdpo,
    tis,
    icepop,
    deepseek_v3_2,
)

__all__ = [
    "ALL",
    "Recipe",
    "cispo",
    "citation",
    "dapo",
    "deepseek_v3_2",
    "deepseekmath",
    "dr_grpo",
    "gdpo",
    "gmpo",
    "gspo",
    "high_entropy_tokens",
    "icepop",
    "intellect_2",
    "lite_ppo",
    "luspo",
    "r1",
    "r1_zero",
    "reinforce_plus_plus",
    "rloo",
    "sapo",
    "scale_rl",
    "skywork_or1",
    "tis",
    "two_grpo",
    "vespo",
]
