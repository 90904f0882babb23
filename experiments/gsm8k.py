"""GSM8K under a published recipe.

    python experiments/gsm8k.py --model Qwen/Qwen2.5-1.5B-Instruct                  # DeepSeekMath's settings
    python experiments/gsm8k.py --model Qwen/Qwen3-0.6B --recipe dapo --prompts 64 --micro-batches 4
    python experiments/gsm8k.py --train train.jsonl --test test.jsonl               # files instead of the Hub
    python experiments/gsm8k.py --smoke                                             # minutes on a CPU, a tiny model

`--recipe` is a function of `grpo_jax.recipes`: loss, advantage, transforms, optimizer and sizes are
the recipe's, but for those given on the command line. The Hub needs the extra `data`.

Hardware: float32 weights with Adam take 16 bytes per parameter, and a reference 4 more: 10 GB
for 0.5B, 30 GB for 1.5B, 60 GB for 3B before activations; `--micro-batches` bounds those.

Published result to compare with: DeepSeekMath, GSM8K 82.9 before, 88.2 after (greedy, with a
learned reward model, a 7B model and 144 thousand questions of GSM8K and MATH; its figures
for the same settings: learning rate 1e-6, KL coefficient 0.04, 64 completions of each of 16
questions a step, at most 1024 tokens). Here the reward is the right number (1.0) and the
format (0.1), and the questions are GSM8K's own 7,473 less a validation split.

This script has been run on a tiny random model only, which learns nothing here: it has no
result of its own yet.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from grpo_jax import data, recipes, run, sampling, schedules, testing
from grpo_jax.freezing import bind
from grpo_jax.models.settings import WeightSettings
from grpo_jax.run import ranges, resuming
from grpo_jax.run.precision import compute_dtype
from grpo_jax.study.task_runs import TaskSettings
from grpo_jax.tasks import gsm8k, with_prompts
from grpo_jax.train_step import Step, make_train_step
from grpo_jax.updates import init_state

# Of a run that is resumed.
MAY_CHANGE = ("steps", "save_every", "evaluate_every", "samples", "micro_batches", "train", "test")


@dataclasses.dataclass(frozen=True)
class Config(TaskSettings, WeightSettings):
    """Settings of a run; None is the recipe's."""

    model: str = "Qwen/Qwen2.5-1.5B-Instruct"
    recipe: str = "deepseekmath"
    train: pathlib.Path | None = None  # JSONL, CSV or Parquet with `question` and `answer`; None is the Hub
    test: pathlib.Path | None = None
    run_dir: pathlib.Path = pathlib.Path("runs/gsm8k")
    steps: int = 450
    prompts: int | None = None  # in a step
    group_size: int | None = None
    max_tokens: int | None = None
    minibatches: int | None = None
    learning_rate: float | None = None  # of adapters, ten times the recipe's
    micro_batches: int = 16
    validation_rows: int = 500
    samples: int = 4  # completions of a problem in the last evaluation, beside the greedy one
    evaluate_every: int = 50
    save_every: int = 50


def make_recipe(config: Config) -> recipes.Recipe:
    """The recipe with what was given in its place, and with the weights of the two rewards."""
    names = ("prompts", "group_size", "max_tokens", "minibatches", "learning_rate")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    make = getattr(recipes, config.recipe, None)
    if make not in recipes.ALL:
        raise ValueError(f"{config.recipe!r} is no recipe; there are {', '.join(f.__name__ for f in recipes.ALL)}")
    recipe = dataclasses.replace(make(), **given)
    if recipe.learning_rate is not None:
        rate = config.rate(config.learning_rate, recipe.learning_rate)
        recipe = dataclasses.replace(recipe, learning_rate=rate)
    if missing := [name for name in names[:3] if getattr(recipe, name) is None]:
        raise ValueError(f"{recipe.name} leaves open, and so asks for: {', '.join(missing)}")

    parts = (recipe.minibatches or 1) * config.micro_batches
    if recipe.prompts % parts:
        raise ValueError(
            f"{recipe.prompts} prompts do not divide into {recipe.minibatches or 1} minibatches of "
            f"{config.micro_batches} micro-batches: choose --prompts or --micro-batches"
        )
    _ = recipe.optimizer  # a learning rate that is not stated is missed here rather than after loading

    def to_advantages(*estimator: Any, **settings: Any) -> Any:
        return make().to_advantages(*estimator, weights=config.weights, **settings)

    return dataclasses.replace(recipe, to_advantages=to_advantages)


def make_step(recipe: recipes.Recipe, config: Config, policy: Any, eos_ids: Any) -> Step:
    """The recipe's step, in micro-batches."""
    settings = recipe.settings
    updates = dataclasses.replace(settings.pop("updates"), micro_batches=config.micro_batches)
    sampler = sampling.sampler(eos_ids=eos_ids, **recipe.sampling)
    return make_train_step(policy, recipe.optimizer, sampler, updates=updates, **settings)


def train(config: Config) -> dict[str, float]:
    """Trains, evaluates before and after, and returns the results."""
    ranges.check(config)
    recipe = make_recipe(config)
    resuming.check(config, allow=MAY_CHANGE)
    rows = gsm8k.from_hub() if config.train is None else {}
    for split in ("train", "test"):
        if (path := getattr(config, split)) is not None:
            rows[split] = data.read_rows(path, gsm8k.FIELDS)
    task = with_prompts(gsm8k.task(config.seed, validation=config.validation_rows, **rows), data.chat)
    used = config.begin(task, config.model, config.run_dir, max_tokens=recipe.max_tokens)
    print(f"{recipe.name} leaves to you:\n  " + "\n  ".join(recipe.leaves))

    policy, params, frozen = config.load(
        config.model, compute_dtype=compute_dtype(config.compute_dtype), seed=config.seed
    )
    step = make_step(recipe, config, policy, used.eos_ids).jit()
    after = jax.jit(recipe.after)  # renews the reference or moves an entropy bonus, where the recipe does
    with run.loop(
        config,
        init_state(params, recipe.optimizer, jax.random.key(config.seed), frozen=frozen, **recipe.initial),
        steps=config.steps,
        save_every=config.save_every,
        allow=MAY_CHANGE,
        digests=used.digests(bind(params, frozen)),
        # A reference that is renewed belongs to what changes.
        initial=("frozen",) if recipe.reference_updates else ("frozen", "ref_params"),
        keys=("reward", "reward/0", "reward/1", "kl", "validation/accuracy"),
    ) as loop:
        del params
        for n in loop:
            if n % config.evaluate_every == 0:
                loop.log(used.evaluate(policy, bind(loop.state.params, frozen), "validation"))
            experience = step.collect(loop.state, used.batch(config.seed, n, recipe.prompts))
            given, mask = used.reward(experience.rollout)
            state, metrics = step.learn(loop.state, experience._replace(rewards=given, reward_mask=mask))
            loop.state = after(state, metrics)
            loop.log(metrics | used.logged.take() | schedules.rate_of_step(recipe.rate, loop.state, metrics))
        loop.log(used.evaluate(policy, bind(loop.state.params, frozen), "validation"))
    save = functools.partial(config.save, policy, loop.state, base_model=config.model)
    results = used.finish(policy, bind(loop.state.params, frozen), config.samples, save=save)
    print(f"please cite:\n{recipes.citation(recipe)}")
    return results


def smoke(config: Config) -> Config:
    """A tiny random model, a few problems in the data set's format, and the least of everything."""
    # Beside train.jsonl and test.jsonl, which evaluations write there.
    model, train, test = (config.run_dir / name for name in ("tiny", "train_rows.jsonl", "test_rows.jsonl"))
    if not model.exists():
        testing.tiny_checkpoint(model)
    for path, start in ((train, 0), (test, 50)):
        problems = ((a, b) for a in range(start, start + 8) for b in range(1, 4))
        rows = (
            {"question": f"Ann has {a} apples and gets {b}. How many?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
            for a, b in problems
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(
        config, model=str(model), train=train, test=test, steps=3, prompts=4, group_size=4, max_tokens=12,
        minibatches=2, micro_batches=1, validation_rows=4, samples=2, evaluate_every=2, save_every=2,
        learning_rate=1e-3, compute_dtype="float32",
    )  # fmt: skip


if __name__ == "__main__":
    run.command(train, Config, __doc__, smoke=smoke)
