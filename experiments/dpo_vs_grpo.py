"""DPO, fine-tuning and rejection sampling against GRPO, at equal samples.

python experiments/dpo_vs_grpo.py

Task, start and network are those of `experiments/ablations/setting.py`. Every method gets 8 completions of each of
8 problems a step, scored by the same verifier, and makes one update of them. They differ in two things.

Who samples: online methods the policy as it is, offline ones the start, whose completions might as well have been
collected before the first step. A completion is used once, offline too.

What is made of a group:

    GRPO          every completion, with its advantage
    RAFT, SFT     imitation of its best completion, or of every right one; online it is RAFT, which is rejection
                  sampling, and offline fine-tuning on the same data as offline DPO
    DPO           its best against its worst completion; without a difference it contributes nothing

Best and worst are by accuracy and a tenth of the format, as GRPO's advantages are; right is by accuracy alone. Each
line runs with two learning rates, and DPO with two betas, all with 8 seeds. `dpo_vs_grpo.csv` and the first table of
`dpo_vs_grpo.md` hold them all; the second table and the figure the best learning rate of each line by the greedy
accuracy over the run, which says more than that at the end where several lines reach all of it. It is chosen on the
seeds and problems that it is shown on: a little kind to every line, and to all alike.

What came of it: `docs/pages/results/neighbours.md`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import rich
from ablations import setting
from ablations.setting import Config, Hyper, Settings

from grpo_jax import losses
from grpo_jax.baselines import dpo, preferences, rejection_sampling
from grpo_jax.protocols import ExperienceTransform
from grpo_jax.study import figures, results, tables
from grpo_jax.study.grid import Condition
from grpo_jax.study.results import Record
from grpo_jax.study.runs import Run
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.types import Experience, Metrics

NAME = "dpo_vs_grpo"
# The run folder, with its starts, is the ablations'.
DEFAULT = Config(results=pathlib.Path(__file__).parent / "results")
LEARNING_RATES = (3e-4, 1e-3)
BETAS = (0.1, 0.5)


def experiment(config: Config) -> None:
    """One grid, and from it the best learning rate of each method."""
    setting.run(
        NAME,
        config,
        conditions(config),
        metrics=("greedy", "sampled", "length"),
        against=condition_name("GRPO", 3e-4),
    )
    rows = results.read(config.results / f"{NAME}.csv")
    chosen = {method: condition_name(method, rate) for method, rate in best_rates(rows).items()}
    rows = [row for row in rows if row["condition"] in chosen.values()]
    summary = setting.summarise(rows, ("greedy", "sampled"), against=chosen["GRPO"])
    header, lines = tables.cells(summary)
    rich.print(tables.terminal(header, lines))
    path = config.results / f"{NAME}.md"
    path.write_text(f"{path.read_text()}\nWith the best learning rate of each:\n\n{tables.markdown(header, lines)}")
    print(figures.curves(rows, ("greedy", "sampled"), config.results / f"{NAME}.png", against=chosen["GRPO"]))


# ------------------------------------------------------------------------- who samples


def sampled_by_the_start(*arguments: Any, **settings: Any) -> Step:
    """A step whose completions come from the reference policy, which is the start."""
    step = make_train_step(*arguments, **settings)
    return dataclasses.replace(
        step, collect=lambda state, prompts: step.collect(state._replace(params=state.ref_params), prompts)
    )


# Both keep the start as the reference; imitation does not look at its scores.
ONLINE: Settings = {"build": make_train_step, "reference": True}
OFFLINE: Settings = {"build": sampled_by_the_start, "reference": True}


# ------------------------------------------------------------------- what becomes of a group


def pairs(config: Config, who: Settings) -> Run:
    """DPO on the best and the worst completion."""

    def change(hyper: Hyper) -> Settings:
        return {"loss": dpo.dpo(beta=hyper["beta"]), "transforms": (setting.measure, in_pairs)}

    return setting.make(config, change, **who)


def in_pairs(experience: Experience) -> tuple[Experience, Metrics]:
    """A transform. The reference has scored the whole group by then, which takes time and no samples."""
    return preferences.pairs(experience, weights=setting.WEIGHTS), {}


def imitation(config: Config, who: Settings, transform: ExperienceTransform) -> Run:
    """Supervised learning of the completions that a transform leaves."""
    return setting.make(config, lambda hyper: {"loss": losses.sft(), "transforms": (setting.measure, transform)}, **who)


BEST = rejection_sampling.raft(weights=setting.WEIGHTS)
ALL_RIGHT = rejection_sampling.raft(0.5, keep=8, weights=(1.0, 0.0))


def conditions(config: Config) -> list[Condition]:
    """Every method with every learning rate; rates, and the betas of DPO, share a program."""
    offline, online = pairs(config, OFFLINE), pairs(config, ONLINE)
    methods: dict[str, tuple[Run, dict[str, float]]] = {
        **{f"offline DPO, beta {beta}": (offline, {"beta": beta}) for beta in BETAS},
        **{f"online DPO, beta {beta}": (online, {"beta": beta}) for beta in BETAS},
        "SFT, the best": (imitation(config, OFFLINE, BEST), {}),
        "SFT, all right": (imitation(config, OFFLINE, ALL_RIGHT), {}),
        "RAFT, the best": (imitation(config, ONLINE, BEST), {}),
        "RAFT, all right": (imitation(config, ONLINE, ALL_RIGHT), {}),
        "GRPO": (setting.make(config), {}),
    }
    return [
        Condition(condition_name(method, rate), run, {"learning_rate": rate, **numbers})
        for method, (run, numbers) in methods.items()
        for rate in ((3e-4,) if config.smoke else LEARNING_RATES)
    ]


# ----------------------------------------------------------------------------- the best


def condition_name(method: str, rate: float) -> str:
    """Of a method with a learning rate."""
    return f"{method}, rate {rate:g}"


def best_rates(rows: Sequence[Record]) -> dict[str, float]:
    """Method -> the learning rate with the highest greedy accuracy over the run, the smaller one of equals."""
    best: dict[str, tuple[float, float]] = {}
    for condition, values in results.per_seed(rows, "greedy", results.average).items():
        method, _, rate = condition.rpartition(", rate ")
        best[method] = max(best.get(method, (-1.0, 0.0)), (float(values.mean()), -float(rate)))
    return {method: -rate for method, (_, rate) in best.items()}


if __name__ == "__main__":
    setting.main(experiment, __doc__, default=DEFAULT)
