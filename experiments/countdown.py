"""GRPO on Countdown: reach a target with the four operations, using each number once.

    python experiments/countdown.py --model Qwen/Qwen3-1.7B
    python experiments/countdown.py --model Qwen/Qwen2.5-3B --style dialogue        # a base model, as in TinyZero
    python experiments/countdown.py --smoke                                         # minutes on a CPU, a tiny model

Hardware: float32 weights with Adam take 16 bytes a parameter, and a reference 4 more: about
34 GB for Qwen3-1.7B before activations, so one GPU of 80 GB with `--micro-batches` as it
needs; 0.5B and 0.6B fit into 24 GB with small batches.

Published results to compare with: lmpo, Qwen3-1.7B, share of problems solved 0.446 before,
0.67 after 20 steps, 0.68 after 40, 0.75 after 60; nano-aha-moment, Qwen2.5-3B, about 0.6;
TinyZero, which is PPO with a critic, finds that 3B learn it and 0.5B do not. Their
problems are drawn alike (three or four numbers), not the same ones. Learning rate 1e-6 and
KL coefficient 0.001 are nano-aha-moment's and TinyZero's; the batch is this script's.

This script has been run on a tiny random model only, which learns nothing here: it has no
result of its own yet.

`ood` in the results are problems with five or six numbers, which training never shows.
"""

import dataclasses
import json
import pathlib
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from grpo_jax import advantages, data, losses, rewards, statistics, testing, types
from grpo_jax.models import hf
from grpo_jax.run import checkpoint, compilation, display, metrics, monitoring, plots, preemption
from grpo_jax.run import measured as measured_metrics
from grpo_jax.study import evaluation
from grpo_jax.tasks import countdown, dialogue, with_prompts
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.updates import Updates, init_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    model: str = "Qwen/Qwen3-1.7B"
    style: Literal["chat", "dialogue"] = "chat"  # a chat template, or plain words for a base model
    run_dir: pathlib.Path = pathlib.Path("runs/countdown")
    seed: int = 0
    steps: int = 100
    prompts_per_step: int = 32
    group_size: int = 8
    max_tokens: int = 1024
    minibatches: int = 1
    micro_batches: int = 8
    learning_rate: float = 1e-6
    warmup_steps: int = 5
    beta: float = 0.001
    epsilon: float = 0.2
    format_weight: float = 0.1
    train_rows: int = 10_000
    eval_rows: int = 256  # of each of validation, test and ood
    samples: int = 8  # completions of a problem in the last evaluation, for pass@k
    evaluate_every: int = 20
    save_every: int = 20
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    smoke: bool = False  # a tiny model and a few steps of everything


def run(config: Config) -> dict[str, float]:
    """Trains, evaluates before and after, and returns the results."""
    if config.prompts_per_step % (config.minibatches * config.micro_batches):
        raise ValueError(
            f"{config.prompts_per_step} prompts do not divide into {config.minibatches} minibatches of "
            f"{config.micro_batches} micro-batches: choose --prompts-per-step or --micro-batches"
        )
    tokenizer = hf.load_tokenizer(config.model)
    eos_ids = hf.eos_ids(config.model, tokenizer)
    sizes = {"validation": config.eval_rows, "test": config.eval_rows, "ood": config.eval_rows}
    task = countdown.task(config.seed, train=config.train_rows, **sizes)
    task = with_prompts(task, data.chat if config.style == "chat" else dialogue)
    prompts = [data.encode_prompt(tokenizer, row["prompt"]) for row in task.splits.train]
    functions = [task.verifier, rewards.strict_format()]
    logged: dict[str, list[float]] = {}  # what reward functions log of a step
    reward = rewards.host(
        functions, task.splits.train, tokenizer, eos_ids=eos_ids,
        log_metric=lambda name, value: logged.setdefault(name, []).append(float(value)),
    )  # fmt: skip
    names = [rewards.name_of(function) for function in functions]
    sampling = {"max_tokens": config.max_tokens, "eos_ids": eos_ids}

    with preemption.lock(config.run_dir), preemption.graceful_stop() as stop_requested:
        policy, params = hf.load_pretrained(config.model, compute_dtype=jnp.dtype(config.compute_dtype))
        optimizer = optax.adamw(optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps), b2=0.99)
        several = config.minibatches > 1
        parts = config.minibatches * config.micro_batches
        collect = jax.jit(
            make_collect(
                policy, sampling.sampler(group_size=config.group_size), score_old=several, score_parts=parts, **sampling
            )
        )
        learn = jax.jit(
            make_learn(
                policy,
                optimizer,
                loss=losses.grpo(epsilon=config.epsilon, penalty=losses.k3(config.beta)),
                advantage=advantages.from_rewards(weights=(1.0, config.format_weight), names=names),
                transforms=(measured_metrics.repetition(), measured_metrics.unscored(names)),
                updates=Updates(minibatches=config.minibatches, micro_batches=config.micro_batches, max_grad_norm=1.0),
            ),
            donate_argnums=0,
        )

        def evaluate(params: types.Params, split: str, **settings: object) -> dict[str, float]:
            summary, items = evaluation.evaluate(
                policy, params, tokenizer, getattr(task.splits, split), functions, **sampling, **settings
            )
            evaluation.write_items(config.run_dir / f"{split}.jsonl", items)
            return {f"{split}/{name}": value for name, value in summary.items()}

        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        state = init_state(params, optimizer, jax.random.key(config.seed), reference=True)
        del params
        with checkpoint.manager(config.run_dir / "checkpoints") as checkpoints:
            if (found := checkpoint.restore(checkpoints, state)) is not None:
                state, meta = found
                checkpoint.check_config(meta["config"], settings, allow=("run_dir", "steps"))
                print(f"resumed at step {int(state.step)} of {config.steps}")
            first = int(state.step)
            metrics.truncate(config.run_dir, first)
            history = metrics.read(config.run_dir) if first else []
            if not first:
                print("before training:", evaluate(state.params, "validation", greedy=True))
            with display.progress(config.steps, start=first, keys=("reward", *(f"reward/{n}" for n in names))) as show:
                for n in range(first, config.steps):
                    started = time.monotonic()
                    rows = data.batch_indices(config.seed, n, len(prompts), config.prompts_per_step)
                    batch = data.make_prompts([prompts[row] for row in rows], rows, multiple=64)
                    experience = collect(state, batch)
                    given, mask = reward(experience.rollout)
                    state, measured = learn(state, experience._replace(rewards=given, reward_mask=mask))
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
                        checkpoint.save(checkpoints, state, {"config": settings})
                    if stopping and not last:
                        raise SystemExit(f"stopped after step {n + 1}; the same command goes on from there")

        # ---------------------------------------------------------------------- results
        results: dict[str, float] = {}
        for split in ("test", "ood"):
            results |= evaluate(state.params, split, group_size=config.samples, k=(1, config.samples))
        (config.run_dir / "results.json").write_text(json.dumps(results, indent=2))
        hf.save_pretrained(policy, state.params, config.run_dir / "model", tokenizer=tokenizer, eos_ids=eos_ids)
        print(f"curves: {plots.plot(config.run_dir)}\nmodel: {config.run_dir / 'model'}")
        for name, value in results.items():
            print(f"  {name:32s}{value:8.3f}")
    return results


def smoke(config: Config) -> Config:
    """A tiny random model and the least of everything."""
    model = config.run_dir / "tiny"
    if not model.exists():
        testing.tiny_checkpoint(model)
    return dataclasses.replace(
        config, model=str(model), steps=4, prompts_per_step=4, group_size=4, max_tokens=16, minibatches=2,
        micro_batches=1, train_rows=40, eval_rows=8, samples=2, evaluate_every=2, save_every=2, learning_rate=1e-3,
        compute_dtype="float32",
    )  # fmt: skip


def main(config: Config) -> dict[str, float]:
    """`run`, or a few steps of it."""
    return run(smoke(config) if config.smoke else config)


if __name__ == "__main__":
    compilation.enable_compilation_cache()
    compilation.trim_malloc()
    main(tyro.cli(Config, description=__doc__))
