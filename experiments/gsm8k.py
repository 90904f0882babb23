"""GSM8K under a published recipe.

    python experiments/gsm8k.py --model Qwen/Qwen2.5-1.5B-Instruct                  # DeepSeekMath's settings
    python experiments/gsm8k.py --model Qwen/Qwen3-0.6B --recipe dapo --prompts 64 --micro-batches 4
    python experiments/gsm8k.py --train train.jsonl --test test.jsonl               # files instead of the Hub
    python experiments/gsm8k.py --smoke                                             # minutes on a CPU, a tiny model

`--recipe` is a function of `grpo_jax.recipes`: loss, advantage, hooks, optimizer and sizes are
the recipe's, but for those given on the command line. The Hub needs the extra `data`.

Hardware: float32 weights with Adam take 16 bytes a parameter, and a reference 4 more: 10 GB
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
import json
import pathlib
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from grpo_jax import data, recipes, rewards, sampling, statistics, testing, types
from grpo_jax.models import hf
from grpo_jax.run import checkpoint, compilation, display, metrics, monitoring, plots, preemption
from grpo_jax.study import evaluation
from grpo_jax.tasks import gsm8k, with_prompts
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.updates import Updates, init_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run; None is the recipe's."""

    model: str = "Qwen/Qwen2.5-1.5B-Instruct"
    recipe: str = "deepseekmath"
    train: pathlib.Path | None = None  # JSONL, CSV or Parquet with `question` and `answer`; None is the Hub
    test: pathlib.Path | None = None
    run_dir: pathlib.Path = pathlib.Path("runs/gsm8k")
    seed: int = 0
    steps: int = 450
    prompts: int | None = None  # in a step
    group_size: int | None = None
    max_tokens: int | None = None
    minibatches: int | None = None
    learning_rate: float | None = None
    micro_batches: int = 16
    format_weight: float = 0.1
    validation_rows: int = 500
    samples: int = 4  # completions of a problem in the last evaluation, beside the greedy one
    evaluate_every: int = 50
    save_every: int = 50
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    smoke: bool = False  # a tiny model and a few steps of everything


def make_recipe(config: Config) -> recipes.Recipe:
    """The recipe with what was given in its place, and with the weights of the two rewards."""
    names = ("prompts", "group_size", "max_tokens", "minibatches", "learning_rate")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    make = getattr(recipes, config.recipe, None)
    if make not in recipes.ALL:
        raise ValueError(f"{config.recipe!r} is no recipe; there are {', '.join(f.__name__ for f in recipes.ALL)}")
    recipe = dataclasses.replace(make(), **given)
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
        return make().to_advantages(*estimator, weights=(1.0, config.format_weight), **settings)

    return dataclasses.replace(recipe, to_advantages=to_advantages)


def run(config: Config) -> dict[str, float]:
    """Trains, evaluates before and after, and returns the results."""
    recipe = make_recipe(config)
    tokenizer = hf.load_tokenizer(config.model)
    eos_ids = hf.eos_ids(config.model, tokenizer)
    rows = gsm8k.from_hub() if config.train is None else {}
    for split in ("train", "test"):
        if (path := getattr(config, split)) is not None:
            rows[split] = data.read_rows(path, gsm8k.FIELDS)
    task = with_prompts(gsm8k.task(config.seed, validation=config.validation_rows, **rows), data.chat)
    prompts = [data.encode_prompt(tokenizer, row["prompt"]) for row in task.splits.train]
    functions = [task.verifier, rewards.strict_format()]
    logged: dict[str, list[float]] = {}  # what reward functions log of a step
    reward = rewards.host(
        functions, task.splits.train, tokenizer, eos_ids=eos_ids,
        log_metric=lambda name, value: logged.setdefault(name, []).append(float(value)),
    )  # fmt: skip

    with preemption.lock(config.run_dir), preemption.graceful_stop() as stop_requested:
        policy, params = hf.load_pretrained(config.model, compute_dtype=jnp.dtype(config.compute_dtype))
        collect = jax.jit(make_collect(policy, sampling.sampler(eos_ids=eos_ids), **recipe.collecting))
        learn = jax.jit(
            make_learn(
                policy, recipe.optimizer, updates=Updates(micro_batches=config.micro_batches), **recipe.learning
            ),
            donate_argnums=0,
        )
        after = jax.jit(recipe.after)  # renews the reference or moves an entropy bonus, where the recipe does

        def evaluate(params: types.Params, split: str, **settings: Any) -> dict[str, float]:
            summary, items = evaluation.evaluate(
                policy, params, tokenizer, getattr(task.splits, split), functions,
                eos_ids=eos_ids, max_tokens=recipe.max_tokens, **settings,
            )  # fmt: skip
            evaluation.write_items(config.run_dir / f"{split}.jsonl", items)
            return {f"{split}/{name}": value for name, value in summary.items()}

        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        state = init_state(params, recipe.optimizer, jax.random.key(config.seed), **recipe.initial)
        del params
        # A reference that is renewed belongs to what changes.
        initial = ("frozen",) if recipe.reference_updates else ("frozen", "ref_params")
        with checkpoint.manager(config.run_dir / "checkpoints") as checkpoints:
            if (found := checkpoint.restore(checkpoints, state)) is not None:
                state, meta = found
                checkpoint.check_config(meta["config"], settings, allow=("run_dir", "steps"))
                print(f"resumed at step {int(state.step)} of {config.steps}")
            first = int(state.step)
            metrics.truncate(config.run_dir, first)
            history = metrics.read(config.run_dir) if first else []
            if not first:
                print(f"{recipe.name} leaves to you:\n  " + "\n  ".join(recipe.leaves))
                print("before training:", evaluate(state.params, "validation", greedy=True))
            with display.progress(config.steps, start=first, keys=("reward", "reward/0", "reward/1", "kl")) as show:
                for n in range(first, config.steps):
                    started = time.monotonic()
                    chosen = data.batch_indices(config.seed, n, len(prompts), recipe.prompts)
                    experience = collect(state, data.make_prompts([prompts[i] for i in chosen], chosen, multiple=64))
                    given, mask = reward(experience.rollout)
                    state, measured = learn(state, experience._replace(rewards=given, reward_mask=mask))
                    state = after(state, measured)
                    measured = jax.device_get(statistics.summary(measured))
                    measured = {name: float(np.mean(values)) for name, values in logged.items()} | measured
                    logged.clear()
                    seconds = time.monotonic() - started
                    last, stopping = n + 1 == config.steps, stop_requested()
                    if last or (n + 1) % config.evaluate_every == 0:
                        measured |= evaluate(state.params, "validation", greedy=True)
                    metrics.append(config.run_dir, n, measured, {"seconds": seconds})
                    history.append({"step": n} | metrics.plain(measured))
                    for warning in monitoring.warnings(history):
                        print(f"step {n + 1}: {warning}")
                    show(n, measured, float(np.sum(experience.rollout.lengths)) / seconds)
                    if last or stopping or (n + 1) % config.save_every == 0:
                        checkpoint.save(checkpoints, state, {"config": settings}, initial=initial)
                    if stopping and not last:
                        raise SystemExit(f"stopped after step {n + 1}; the same command goes on from there")

        # ---------------------------------------------------------------------- results
        results = {f"greedy/{k}": v for k, v in evaluate(state.params, "test", greedy=True).items()}
        for split in ("test", "ood") if task.splits.ood else ("test",):
            results |= evaluate(state.params, split, group_size=config.samples, k=(1, config.samples))
        (config.run_dir / "results.json").write_text(json.dumps(results, indent=2))
        hf.save_pretrained(policy, state.params, config.run_dir / "model", tokenizer=tokenizer, eos_ids=eos_ids)
        print(f"curves: {plots.plot(config.run_dir)}\nmodel: {config.run_dir / 'model'}")
        for name, value in results.items():
            print(f"  {name:32s}{value:8.3f}")
        print(f"please cite:\n{recipes.citation(recipe)}")
    return results


def smoke(config: Config) -> Config:
    """A tiny random model, a few problems in the data set's format, and the least of everything."""
    model, train, test = (config.run_dir / name for name in ("tiny", "train.jsonl", "test.jsonl"))
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


def main(config: Config) -> dict[str, float]:
    """`run`, or a few steps of it."""
    return run(smoke(config) if config.smoke else config)


if __name__ == "__main__":
    compilation.enable_compilation_cache()
    compilation.trim_malloc()
    main(tyro.cli(Config, description=__doc__))
