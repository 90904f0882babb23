"""Dynamic sampling: zero-variance groups are replaced by others, at equal updates and at equal samples.

python experiments/ablations/dynamic_sampling.py

Two CPU cores take a few minutes. What came of it: `docs/pages/results/ablations.md`.
"""

from typing import Any

import setting
from setting import Condition, Config, Metrics, Prompts, TrainState

from grpo_jax.dynamic_sampling import dynamic_sampling, nonzero_variance_of
from grpo_jax.study.runs import StepFunction
from grpo_jax.train_step import make_train_step

ROUNDS = 3


def experiment(config: Config) -> None:
    """Plain steps of 8 and of 24 prompts, and steps that fill 8 groups from up to 24 prompts."""
    more = 8 * ROUNDS
    conditions = [
        Condition("8 prompts", setting.make(config)),
        Condition("8 prompts with spread", setting.make(config, prompts=more, build=filling)),
        Condition(f"{more} prompts", setting.make(config, prompts=more)),
    ]
    setting.run(
        "dynamic_sampling",
        config,
        conditions,
        metrics=("greedy", "sampled", "zero_variance_groups", "groups_sampled"),
        curves=("greedy", "sampled", "zero_variance_groups"),
        against="8 prompts",
        seconds=True,
    )


def filling(*arguments: Any, **settings: Any) -> StepFunction:
    """A train step with dynamic sampling in it."""
    step = make_train_step(*arguments, **settings)
    collect = dynamic_sampling(step.collect, rounds=ROUNDS, keep=nonzero_variance_of((1.0, 0.0)))

    def fill_and_learn(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
        experience, wasted = collect(state, prompts)
        state, measured = step.learn(state, experience)
        return state, measured | wasted

    return fill_and_learn


if __name__ == "__main__":
    setting.main(experiment, __doc__)
