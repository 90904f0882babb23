"""A sampler that is not the policy: in bfloat16, or some steps old; with and without truncated importance sampling.

python experiments/ablations/sampler_mismatch.py

Two CPU cores take a few minutes. What came of it: `docs/pages/results/ablations.md`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import setting
from setting import Condition, Config, Metrics, Prompts, TrainState

from grpo_jax import losses, models, transforms
from grpo_jax.policies import Policy
from grpo_jax.protocols import Reward, Sampler
from grpo_jax.scoring import score
from grpo_jax.study.runs import StepFunction
from grpo_jax.train_step import make_collect, make_learn

STALE = 8  # steps between the copies that sample


def experiment(config: Config) -> None:
    """Each sampler without a correction, with truncated importance sampling, and with the ratio taken to it."""
    samplers = {
        "the policy": ({}, setting.policy),
        "bfloat16": ({}, in_bfloat16()),
        "stale": (STALE_STATE, setting.policy),
    }
    corrections = {
        "none": {},
        "truncated importance": {"loss": losses.grpo(weight=losses.truncated_importance(2.0))},
        "ratio to the sampler": {"transforms": (setting.measure, transforms.old_from_sampler)},
    }
    conditions = []
    for sampler, (of_state, sampling_policy) in samplers.items():
        for correction, change in corrections.items():
            if sampler == "the policy" and correction != "none":
                continue  # the two are the same there
            run = setting.make(
                config, lambda hyper, change=change: change, build=sampled_by(sampling_policy), **of_state
            )
            conditions.append(Condition(f"{sampler}, {correction}", run))
    setting.run(
        "sampler_mismatch",
        config,
        conditions,
        metrics=("greedy", "sampled", "gap"),
        curves=("greedy", "sampled", "gap"),
        against="the policy, none",
    )


def in_bfloat16() -> Policy:
    """The network, computing in bfloat16."""
    return models.decoder(dataclasses.replace(setting.policy.config, dtype=jnp.bfloat16))


def renew(state: TrainState) -> TrainState:
    """Every few steps the sampler gets a copy of the policy; `extra` holds it."""
    due = state.step % STALE == 0
    return state._replace(extra=jax.tree.map(lambda new, old: jnp.where(due, new, old), state.params, state.extra))


STALE_STATE = {"begin": lambda state: state._replace(extra=jax.tree.map(jnp.copy, state.params)), "after": renew}


def sampled_by(sampling_policy: Policy) -> Any:
    """Makes a step whose completions come from another network, or from the parameters in `extra`."""

    def build(
        policy: Policy, optimizer: optax.GradientTransformation, sampler: Sampler, *, reward: Reward, **settings: Any
    ) -> StepFunction:
        collect = make_collect(sampling_policy, sampler, reward=reward)
        learn = make_learn(policy, optimizer, **settings)

        def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
            experience = collect(state._replace(params=state.extra or state.params), prompts)
            rollout = experience.rollout
            old = score(policy, state.params, rollout)
            gap = losses.token_mean(jnp.abs(old.log_probs - rollout.log_probs), rollout.mask)
            state, measured = learn(state, experience._replace(old_log_probs=old.log_probs))
            return state, measured | {"gap": gap}

        return step

    return build


if __name__ == "__main__":
    setting.main(experiment, __doc__)
