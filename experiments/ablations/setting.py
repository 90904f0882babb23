"""What all ablations share: the task, the small model and its start, a run, and the command line.

The task is sums of digits modulo 10 with worked steps (`grpo_jax.tasks.modular_sums`). Its
dial is the number of terms: 4 is easy, 5 the standard here, 6 hard. Each seed makes a
transformer of 0.1 M parameters from nothing and warms it up on the demonstrations of a
teacher who leaves out 60% of the terms after the first, works a fifth of the sums
twice, and guesses a tenth of them without any work. So the start knows the format and two ways of adding, the
wrong one better, and GRPO has to find out which is which: as in the quickstart, elicitation.
All conditions of a seed start from the same parameters and see the same problems.

`--task exploration` asks for the opposite: the start is warmed up on a teacher who always guesses, `guess=1`, on sums
of 2 digits modulo 3. Its answers are independent of the digits, so that no way to add can have been shown, and none
can be elicited: what the policy can do after GRPO it has found out by trying. That this is so follows from how the
demonstrations are made, and shows in the start's accuracy, which is chance, a third. 100 steps are too few here. After
300 at a rate of 7e-4 and temperature 1, 14 seeds of 32 are still at chance or below it, and none at 3e-4 and
temperature 0.6: temperatures are ranked on this task in `docs/pages/results/ablations.md`.

A run is 100 steps of 8 prompts x 8 completions unless the ablation says otherwise. Problems
are drawn anew at each step and for the evaluation, from 10^terms: in 100 steps a run sees at most 8%
of the easy ones and 0.8% of the standard ones.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich

from grpo_jax import losses, models, rewards, sampling, statistics
from grpo_jax.advantages import from_rewards, group_advantages
from grpo_jax.protocols import Advantage, Estimator, Reward
from grpo_jax.run import checkpoint, command, ranges
from grpo_jax.sampling import PolicySampler
from grpo_jax.statistics import Mean
from grpo_jax.study import figures, grid, intervals, ranking, results, runs, tables
from grpo_jax.study.grid import Condition
from grpo_jax.study.results import Record, Summary
from grpo_jax.study.runs import Run, make_run
from grpo_jax.tasks import modular_sums
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Array, Experience, Metrics, Number, Params, PRNGKey, Prompts, TrainState
from grpo_jax.updates import Updates, init_state

EASY, STANDARD, HARD = 4, 5, 6  # terms
UNSHOWN = {"terms": 2, "modulus": 3}  # of the task of exploration
LEARNING_RATE = {"elicitation": 3e-4, "exploration": 1e-3}  # by the task
WEIGHTS = (1.0, 0.1)  # of accuracy and format
UPDATES = Updates(max_grad_norm=1.0)
TEACHER = modular_sums.TeacherRates(slip=0.6, guess=0.1, check=0.2)
START_SEEDS = 8  # models that are warmed up at once
GUESSER = modular_sums.TeacherRates(guess=1.0)  # of the task of exploration
HERE = pathlib.Path(__file__).parent

policy = models.small_llama(modular_sums.VOCABULARY, width=64, eos_id=modular_sums.EOS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of an ablation."""

    run_dir: pathlib.Path = pathlib.Path("runs/ablations")
    results: pathlib.Path = HERE / "results"  # where the CSV, the table and the figure go
    seeds: int = 8
    steps: int = 100  # of a run, if not under --rank
    evaluations: int = 10  # of a run, besides that of the start
    warmup_steps: int = 400
    task: Literal["elicitation", "exploration"] = "elicitation"  # see above; the second one has 2 terms throughout
    smoke: bool = False  # two seeds and a few steps of everything, to see that it runs
    rank: bool = False  # each condition at its own best learning rate, on seeds of its own: see `rank`
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)  # of --rank
    rate_seeds: int = 8  # that choose the rates
    rank_seeds: int = 32  # that compare
    rank_steps: int = 48  # of a run under --rank
    rank_evaluations: int = 4  # of a run under --rank, greedy and of half the problems
    estimate: bool = False  # of --rank: measure a chunk of each program, say how long all of it will take, and end


# ----------------------------------------------------------------------------- a run

Hyper = Mapping[str, Any]  # the numbers of a condition, and the params that a seed starts from
Settings = dict[str, Any]  # of a train step
NOTHING: Hyper = {}


def adam(hyper: Hyper, rate: Number) -> optax.GradientTransformation:
    """The optimiser of the standard run."""
    del hyper
    return optax.adam(rate, b2=0.99)


def make(
    config: Config,
    settings: Callable[[Hyper], Settings] = lambda hyper: {},
    *,
    terms: int = STANDARD,
    prompts: int = 8,
    problems: Callable[..., Prompts] | None = None,
    build: Callable[..., runs.StepFunction] = make_train_step,
    optimizer: Callable[[Hyper, Number], optax.GradientTransformation] = adam,
    reference: bool = False,
    initial: Callable[[PRNGKey, Hyper, optax.GradientTransformation], TrainState] | None = None,
    begin: Callable[[TrainState], TrainState] = lambda state: state,
    after: Callable[[TrainState], TrainState] = lambda state: state,
) -> Run:
    """The run of a condition: the standard one but for what is given.

    Args:
      config: of the ablation.
      settings: `hyper -> settings` of the train step that are not the standard ones.
      terms: the dial of the task.
      prompts: of a step.
      problems: makes them, `(key, count, terms=) -> Prompts`; the task's unless given.
      build: `(policy, optimizer, sampler, **settings) -> step`.
      optimizer: `(hyper, learning rate) -> optimizer`.
      reference: True keeps the start as the reference policy.
      initial: `(key, hyper, optimizer) -> state`, if another than one that trains all of `hyper["params"]`.
      begin: what changes the state before the first step.
      after: what changes the state after each step.
    """
    terms, make_problems = terms_of(config, terms), problems or problems_of(config)

    def at_its_rate(hyper: Hyper) -> optax.GradientTransformation:
        return optimizer(hyper, hyper.get("learning_rate", LEARNING_RATE[config.task]))

    def init(key: PRNGKey, hyper: Hyper) -> TrainState:
        if initial is not None:
            return begin(initial(key, hyper, at_its_rate(hyper)))
        return begin(init_state(hyper["params"], at_its_rate(hyper), key, reference=reference))

    def step(hyper: Hyper) -> runs.StepFunction:
        standard = {
            "sampler": sampler(terms),
            "reward": reward(),
            "advantage": advantage(),
            "loss": losses.grpo(),
            "transforms": (measure,),
            "updates": UPDATES,
        }
        train_step = build(policy, at_its_rate(hyper), **standard | settings(hyper))

        def step_and_after(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
            state, measured = train_step(state, prompts)
            return after(state), measured

        return step_and_after

    return make_run(
        init,
        step,
        lambda key, n, hyper: make_problems(jax.random.fold_in(key, n), prompts, terms=terms),
        num_steps=config.steps,
        evaluate=lambda params, hyper: evaluate(params, config, terms),
        evaluate_every=config.steps // config.evaluations,
    )


def terms_of(config: Config, terms: int) -> int:
    """The terms that an ablation asks for, or those of the task of exploration."""
    return UNSHOWN["terms"] if config.task == "exploration" else terms


def problems_of(config: Config) -> Callable[..., Prompts]:
    """What makes the problems of the task, `(key, count, terms=) -> Prompts`."""
    return functools.partial(modular_sums.problems, modulus=modulus_of(config))


def modulus_of(config: Config) -> int:
    """Digits of the task are below it."""
    return UNSHOWN["modulus"] if config.task == "exploration" else 10


def sampler(terms: int = STANDARD, *, group_size: int = 8, temperature: Number = 1.0) -> PolicySampler:
    """Completions as long as a problem of so many terms may need."""
    max_tokens = modular_sums.max_tokens(terms)
    return sampling.sampler(
        group_size=group_size, max_tokens=max_tokens, eos_ids=(modular_sums.EOS,), temperature=temperature
    )


def reward() -> Reward:
    """Accuracy and format."""
    return rewards.traced(modular_sums.accuracy(), modular_sums.strict_format())


def advantage(estimator: Estimator = group_advantages) -> Advantage:
    """The advantage of accuracy and a tenth of the format."""
    return from_rewards(estimator, weights=WEIGHTS, names=("accuracy", "format"))


def measure(experience: Experience) -> tuple[Experience, Metrics]:
    """A transform that only measures: the spread of the advantages, and the lengths of right and wrong completions."""
    right = modular_sums.accuracy()(experience.rollout) > 0
    lengths, advantages = experience.rollout.lengths, experience.advantages
    return experience, {
        "advantage_variance": jnp.var(advantages),
        "length_right": Mean(jnp.sum(lengths * right), jnp.sum(right)),
        "length_wrong": Mean(jnp.sum(lengths * ~right), jnp.sum(~right)),
    }


def evaluate(params: Params, config: Config, terms: int = STANDARD) -> dict[str, Array]:
    """Accuracy on problems that are the same for all runs: of 512, greedy and sampled at temperature 1.

    Under `--rank`, which goes by the greedy accuracy, of 256 and greedy alone: a quarter of the time. A smoke run has
    16.
    """
    terms, number = terms_of(config, terms), 16 if config.smoke else 256 if config.rank else 512
    problems = problems_of(config)(jax.random.key(2**31 - 1), number, terms=terms)
    draw, accuracy = sampler(terms, group_size=1), modular_sums.accuracy()
    greedy = dataclasses.replace(draw, greedy=True)(policy, params, problems, jax.random.key(0))
    if config.rank:
        return {"greedy": accuracy(greedy).mean()}
    sampled = draw(policy, params, problems, jax.random.key(0))
    return {"greedy": accuracy(greedy).mean(), "sampled": accuracy(sampled).mean(), "length": sampled.lengths.mean()}


# -------------------------------------------------------------------------- the start


def warm_up(
    key: PRNGKey, terms: int, steps: int, teacher: modular_sums.TeacherRates = TEACHER, modulus: int = 10
) -> Params:
    """A model from nothing, after `steps` of supervised learning from the teacher, 128 demonstrations each.

    The first of the steps has rate 0, unlike in a run: the models of the committed results were made so.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(20, steps // 2), steps, 1.5e-4)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    learn = make_learn(policy, optimizer, loss=losses.sft(), updates=UPDATES)

    def imitate(state: TrainState, n: Array) -> tuple[TrainState, Array]:
        of_problems, of_teacher = jax.random.split(jax.random.fold_in(runs.prompt_key(key), n))
        problems = modular_sums.problems(of_problems, 128, terms=terms, modulus=modulus)
        shown = modular_sums.demonstrations(of_teacher, problems, teacher, modulus=modulus)
        state, measured = learn(state, Experience(shown))
        return state, statistics.summary(measured)["loss"]

    state = init_state(policy.init(key), optimizer, key)
    return jax.lax.scan(imitate, state, jnp.arange(steps))[0].params


def starts(config: Config, terms: int = STANDARD, seeds: int | None = None) -> Params:
    """The parameters that each seed starts from, `[seeds, ...]`; made once, then read from the run folder."""
    seeds = config.seeds if seeds is None else seeds
    terms, teacher = terms_of(config, terms), GUESSER if config.task == "exploration" else TEACHER
    make_all = jax.jit(jax.vmap(lambda key: warm_up(key, terms, config.warmup_steps, teacher, modulus_of(config))))
    about = f"start_{config.task}_{terms}_terms_{config.warmup_steps}_steps"
    blocks = []
    for first in range(0, seeds, START_SEEDS):
        last = min(first + START_SEEDS, seeds)
        keys = jax.vmap(jax.random.key)(jnp.arange(first, last) + 1_000_000)  # none of the runs' own
        with checkpoint.manager(config.run_dir / f"{about}_seeds_{first}_to_{last - 1}") as checkpoints:
            like = _as_state(jax.eval_shape(make_all, keys))
            if (found := checkpoint.restore(checkpoints, like)) is None:
                print(f"warming up the models of seeds {first} to {last - 1} on sums of {terms} terms")
                found = _as_state(make_all(keys)), {}
                checkpoint.save(checkpoints, *found)
        blocks.append(found[0].params)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)


def _as_state(params: Params) -> TrainState:
    """The form in which parameters alone are saved."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, opt_state=(), key=jax.random.key(0), step=zero, skipped=zero)


# ------------------------------------------------------------------- the command line


def run(
    name: str,
    config: Config,
    conditions: Sequence[Condition],
    *,
    terms: int = STANDARD,
    metrics: Sequence[str] = ("greedy", "sampled"),
    curves: Sequence[str] = ("greedy", "sampled"),
    against: str,
    seconds: bool = False,
    shared: Hyper = NOTHING,
) -> None:
    """Runs a grid, writes `name.csv` (what is shown), `.md` and `.png` among the results, and shows the table.

    The table has the metrics at the end of the run, and the greedy accuracy averaged over the run, which is
    higher for what learns sooner, with its difference to the condition `against`. `seconds` adds the mean time
    of a step, of all seeds together and with its share of the evaluation. `shared` are arrays that every run finds in
    its `hyper`, such as the parameters of a teacher.
    """
    name = name if config.task == "elicitation" else f"{name}_{config.task}"
    if config.rank:
        return rank(name, config, conditions, terms=terms, against=against, shared=shared)
    per_seed = {"params": starts(config, terms)} | _for_each(shared, config.seeds)
    if config.smoke:  # traces all conditions and runs the two that the table needs
        for condition in {condition.run: condition for condition in conditions}.values():
            hyper = {**condition.hyper, **jax.tree.map(lambda x: x[0], per_seed)}
            jax.eval_shape(condition.run, jax.random.key(0), hyper)
        conditions = [c for c in conditions if c.name == against] + [c for c in conditions if c.name != against][:1]
    path = grid.run_grid(
        config.run_dir / name, conditions, seeds=range(config.seeds), per_seed=per_seed, show=("greedy",)
    )
    rows = results.read(path)
    config.results.mkdir(parents=True, exist_ok=True)
    columns = {"condition", "seed", "step", *metrics, *curves, "greedy"}
    kept = [{column: x for column, x in row.items() if column in columns} for row in rows]
    results.write(config.results / f"{name}.csv", kept)
    summary = summarise(rows, metrics, against=against)
    if seconds:
        times = results.read(path.with_name(grid.TIMING))
        for condition, columns in summary.items():
            later = [row["seconds"] for row in times if row["condition"] == condition and row["chunk"] > 1]
            columns["seconds per step"] = intervals.bootstrap(np.array(later) / (config.steps // config.evaluations))
    header, lines = tables.cells(summary)
    (config.results / f"{name}.md").write_text(tables.markdown(header, lines))
    rich.print(tables.terminal(header, lines))
    print(figures.curves(rows, curves, config.results / f"{name}.png", against=against))


def rank(
    name: str, config: Config, conditions: Sequence[Condition], *, terms: int, against: str, shared: Hyper = NOTHING
) -> None:
    """Ranks the conditions by the greedy accuracy averaged over the run, each at its own best learning rate.

    `rate_seeds` seeds run every condition at each of `rates`; `rank_seeds` others run it at its best one and are
    compared with `against` in pairs. Leaves `name_rates.csv`, `.png` (accuracy over learning rates), `name_ranked.csv`,
    `.png` (accuracy over steps) and `.md` (means, paired differences, Holm's p, seeds that a difference of 0.02 needs;
    and the mean accuracy over all rates, which says how much a search for the rate matters). All runs of a condition
    are one program. A run that was killed goes on where it was, at the newest evaluation of the condition.
    """
    seeds = config.rate_seeds + config.rank_seeds
    params = starts(config, terms, seeds)
    first, others = (
        {"params": jax.tree.map(lambda x, part=part: x[part], params)}
        for part in (slice(config.rate_seeds), slice(config.rate_seeds, None))
    )
    if config.estimate:
        return estimate(config, conditions, first | _for_each(shared, config.rate_seeds))
    at_once = config.rate_seeds * len(config.rates)  # a condition at all rates
    path = grid.run_grid(
        config.run_dir / f"{name}_rates", ranking.at_each_rate(conditions, config.rates),
        seeds=range(config.rate_seeds), per_seed=first | _for_each(shared, config.rate_seeds), at_once=at_once,
        show=("greedy",),
    )  # fmt: skip
    rows = results.read(path)
    best = ranking.best_rates(rows, "greedy", results.average)
    if edge := ranking.at_the_edge(rows, best, "greedy"):
        print(f"the best rate is the lowest or the highest of the grid, for {', '.join(edge)}: widen --rates")
    sensitive = ranking.sensitivity(rows, "greedy", results.average)
    of_rates = ranking.by_rate(rows, "greedy", results.average)
    config.results.mkdir(parents=True, exist_ok=True)
    results.write(config.results / f"{name}_rates.csv", _greedy(rows))
    print(figures.rates(of_rates, "greedy over the run", config.results / f"{name}_rates.png", against=against))
    path = grid.run_grid(
        config.run_dir / f"{name}_ranked", ranking.at_rates(conditions, best),
        seeds=range(config.rate_seeds, seeds), per_seed=others | _for_each(shared, config.rank_seeds),
        at_once=min(at_once, config.rank_seeds), show=("greedy",),
    )  # fmt: skip
    rows = results.read(path)
    results.write(config.results / f"{name}_ranked.csv", _greedy(rows))
    print(figures.curves(rows, ("greedy",), config.results / f"{name}_ranked.png", against=against))
    ranked = ranking.rank(rows, "greedy", against=against, reduce=results.average)
    header, lines = ranking.cells(ranked, best, "greedy over the run")
    header.append("over all rates")
    lines = [[*line, tables.text(sensitive[line[0]])] for line in lines]
    (config.results / f"{name}_ranked.md").write_text(tables.markdown(header, lines))
    rich.print(tables.terminal(header, lines))


def estimate(config: Config, conditions: Sequence[Condition], per_seed: Mapping[str, Any]) -> None:
    """Measures one chunk of each program, of as many runs as go together, and says what all of them take."""
    together = config.rate_seeds * len(config.rates)
    runs_each = together + config.rank_seeds
    keys = jax.vmap(jax.random.key)(jnp.arange(together))
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * len(config.rates)), dict(per_seed))
    compiling = seconds = cpu = 0.0
    programs = {condition.run: condition.hyper for condition in conditions}
    for run, numbers in programs.items():
        numbers = {**numbers, ranking.RATE: LEARNING_RATE[config.task]}
        hyper = repeated | {name: jnp.full(together, x, jnp.float32) for name, x in numbers.items()}
        began = time.perf_counter()
        state, _ = jax.jit(jax.vmap(run.start))(keys, hyper)
        advance = jax.jit(jax.vmap(run.advance)).lower(state, hyper).compile()
        compiled, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(advance(state, hyper))
        chunks = sum(condition.run == run for condition in conditions) * run.chunks * runs_each / together
        compiling += compiled - began
        seconds += chunks * (time.perf_counter() - compiled)
        cpu += chunks * (time.process_time() - used)
    print(
        f"{len(conditions)} conditions, {len(programs)} programs, {len(conditions) * runs_each} runs of {config.steps} "
        f"steps: about {seconds / 60:.0f} minutes here, {cpu / 60:.0f} of CPU time, and {compiling / 60:.0f} to compile"
    )


def _for_each(shared: Hyper, count: int) -> dict[str, Any]:
    """The same arrays for each of so many runs."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), dict(shared))


def _greedy(rows: Sequence[Record]) -> list[Record]:
    columns = {"condition", "seed", "step", "greedy"}
    return [{column: x for column, x in row.items() if column in columns} for row in rows]


def summarise(rows: Sequence[Record], metrics: Sequence[str], *, against: str) -> Summary:
    """The metrics at the end, and the greedy accuracy averaged over the run with its difference to a condition."""
    summary = results.summarise(rows, metrics)
    sooner = results.summarise(rows, ["greedy"], reduce=results.average, against=against)
    for condition, columns in sooner.items():
        summary[condition] |= {name.replace("greedy", "greedy over the run", 1): x for name, x in columns.items()}
    return summary


def main(experiment: Callable[[Config], Any], description: str | None, default: Config | None = None) -> None:
    """The command line of an ablation."""
    command(lambda config: experiment(configured(config)), Config, description, default=default)


def configured(config: Config) -> Config:
    """The configuration, or that of a smoke run, whose results stay in the run folder."""
    ranges.check(config)
    if config.estimate and not config.rank:
        raise ValueError("--estimate is of --rank")
    if config.rank:
        ranking.at_each_rate((), config.rates)  # refuses, before models are warmed up, what it would refuse after
        config = dataclasses.replace(config, steps=config.rank_steps, evaluations=config.rank_evaluations)
    if not config.smoke:
        return config
    seeds = {"seeds": 2, "rate_seeds": 2, "rank_seeds": 4}  # a condition at both rates is as many runs as rank it
    small = {"steps": 4, "warmup_steps": 4, "rates": config.rates[:2], "evaluations": 2}
    return dataclasses.replace(config, **seeds, **small, results=config.run_dir / "results")
