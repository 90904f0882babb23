"""PPO with a critic against GRPO: accuracy by step and by second.

python experiments/ppo_vs_grpo.py

Task, start and network are those of `experiments/ablations/setting.py`. Every method samples 64 completions per step
and has the same optimiser and learning rate: GRPO 8 prompts x 8, PPO 64 prompts x 1, which is its usual way, and 8 x 8.
The large critic starts as a copy of the policy; the small one, of half the width and half the layers, at random; both
have a value head of zeros. PPO's gamma, lambda, value and entropy weight are 0.99, 0.95, 0.5 and 0.01. No method has
a reward model, since rewards are verified, nor a reference policy. What memory a critic takes: `ppo_memory.py`.

Written are `ppo_vs_grpo.csv`, `.md` and `.png` (by step) and `ppo_vs_grpo_by_second.png`.
Seconds a step are those of all seeds in one program, without the evaluation: the fastest chunk less the
fastest evaluation, since what else the machine does can only add to them.

What came of it: `docs/pages/results/neighbours.md`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import optax
import ppo_memory
from ablations import setting
from ablations.setting import Config, Hyper

from grpo_jax import models
from grpo_jax.baselines import heads, ppo
from grpo_jax.policies import Policy
from grpo_jax.study import figures, footprints, grid, results, runs, tables
from grpo_jax.study.grid import Condition
from grpo_jax.study.intervals import bootstrap
from grpo_jax.study.results import Record
from grpo_jax.train_step import Step
from grpo_jax.types import Params, PRNGKey, TrainState
from grpo_jax.updates import init_state

NAME = "ppo_vs_grpo"
# The run folder, with its starts, is the ablations'.
DEFAULT = Config(results=pathlib.Path(__file__).parent / "results")
GRPO = "GRPO, 8 x 8, iterations 1"
SECONDS = "seconds of steps"


def experiment(config: Config) -> None:
    """One grid, drawn by step and by second."""
    setting.run(
        NAME,
        config,
        conditions(config),
        metrics=("greedy", "sampled", "length", "entropy"),
        curves=("greedy", "sampled", "length", "explained_variance"),
        against=GRPO,
    )
    rows = results.read(config.results / f"{NAME}.csv")
    seconds = seconds_per_step(config, results.read(config.run_dir / NAME / grid.TIMING))
    timed_rows = [row | {SECONDS: row["step"] * seconds[row["condition"]]} for row in rows]
    by_second = config.results / f"{NAME}_by_second.png"
    figures.curves(timed_rows, ("greedy", "sampled"), by_second, x=SECONDS, together=8)
    table = seconds_table(rows, seconds)
    path = config.results / f"{NAME}.md"
    path.write_text(f"{path.read_text()}\n{table}")
    print(table)


# --------------------------------------------------------------------------- conditions


def conditions(config: Config) -> list[Condition]:
    """GRPO, and PPO with either critic; what differs from the first line of each is named."""
    large = functools.partial(ppo_run, config, setting.policy, copied)
    small = functools.partial(ppo_run, config, models.decoder(ppo_memory.half(setting.policy.config)), from_nothing)
    four = setting.make(config, lambda hyper: {"updates": dataclasses.replace(setting.UPDATES, iterations=4)})
    discounted, undiscounted = {"gamma": 0.99, "gae_lambda": 0.95}, {"gamma": 1.0, "gae_lambda": 1.0}
    once = large(1)
    found = [
        Condition(GRPO, setting.make(config)),
        Condition("PPO, large critic, 64 x 1, iterations 1", once, discounted),
        Condition("PPO, large critic, 64 x 1, iterations 1, gamma = lambda = 1", once, undiscounted),
        Condition("PPO, large critic, 8 x 8, iterations 1", large(1, prompts=8), discounted),
        Condition("PPO, small critic, 64 x 1, iterations 1", small(1), discounted),
        Condition("GRPO, 8 x 8, iterations 4", four),
        Condition("PPO, large critic, 64 x 1, iterations 4", large(4), discounted),
        Condition("PPO, small critic, 64 x 1, iterations 4", small(4), discounted),
    ]
    return [found[0], found[4], found[6]] if config.smoke else found


COMPLETIONS = 64  # of a step, under every method


def ppo_run(
    config: Config,
    critic: Policy,
    init_critic: Callable[[Policy, PRNGKey, Params], Params],
    iterations: int,
    prompts: int = COMPLETIONS,
) -> runs.Run:
    """The standard run with PPO in the place of GRPO.

    Args:
      config: of the experiment.
      critic: its network.
      init_critic: `(critic, key, params of the policy) -> params of the critic`.
      iterations: of the updates.
      prompts: of a step, each with its share of the completions.
    """
    optimizer = optax.adam(setting.LEARNING_RATE[config.task], b2=0.99)
    terms, make_problems = setting.terms_of(config, setting.STANDARD), setting.problems_of(config)

    def init(key: PRNGKey, hyper: Hyper) -> TrainState:
        params = {"policy": hyper["params"], "critic": init_critic(critic, key, hyper["params"])}
        return init_state(params, optimizer, key)

    def step(hyper: Hyper) -> Step:
        guide = {"gamma": hyper["gamma"], "gae_lambda": hyper["gae_lambda"]}
        return ppo.make_train_step(
            setting.policy,
            critic,
            optimizer,
            setting.sampler(terms, group_size=COMPLETIONS // prompts),
            reward=setting.reward(),
            advantage=ppo.gae_advantages(**guide, weights=setting.WEIGHTS),
            loss=ppo.ppo_loss(value_weight=0.5, entropy_weight=0.01),
            updates=dataclasses.replace(setting.UPDATES, iterations=iterations),
        )

    return runs.make_run(
        init,
        step,
        lambda key, n, hyper: make_problems(jax.random.fold_in(key, n), prompts, terms=terms),
        num_steps=config.steps,
        evaluate=lambda params, hyper: setting.evaluate(params["policy"], config),
        evaluate_every=config.steps // config.evaluations,
    )


def copied(critic: Policy, key: PRNGKey, params: Params) -> Params:
    """A critic that starts as the policy."""
    return heads.init_from(critic, params)


def from_nothing(critic: Policy, key: PRNGKey, params: Params) -> Params:
    """A critic that starts from nothing."""
    return heads.init(critic, key)


# ------------------------------------------------------------------------------ seconds


def seconds_per_step(config: Config, timing: Sequence[Record]) -> dict[str, float]:
    """By condition. The first chunk, which compiles, is left out."""
    evaluate = jax.jit(jax.vmap(functools.partial(setting.evaluate, config=config)))
    params = jax.block_until_ready(setting.starts(config))
    evaluation = min(footprints.timed(evaluate, params)[0] for _ in range(10))
    chunks: dict[str, list[float]] = {}
    for row in timing:
        if row["chunk"] > 1:
            chunks.setdefault(row["condition"], []).append(row["seconds"])
    steps = config.steps // config.evaluations
    return {name: (min(of_chunks) - evaluation) / steps for name, of_chunks in chunks.items()}


def seconds_table(rows: Sequence[Record], seconds: Mapping[str, float]) -> str:
    """Seconds a step, and the greedy accuracy when the fastest method has ended."""
    steps = sorted({row["step"] for row in rows})
    budget = min(seconds.values()) * steps[-1]
    lines = []
    for condition, of_step in seconds.items():
        of_condition = [row for row in rows if row["condition"] == condition]
        at_the_end = functools.partial(np.interp, budget / of_step, steps)
        reached = bootstrap(results.per_seed(of_condition, "greedy", at_the_end)[condition])
        lines.append([condition, f"{of_step:.4f}", f"{of_step / seconds[GRPO]:.2f}", tables.text(reached)])
    return tables.markdown(
        ["condition", "seconds per step", f"times {GRPO}", f"greedy after {budget:.1f} seconds"], lines
    )


if __name__ == "__main__":
    setting.main(experiment, __doc__, default=DEFAULT)
