"""GRPO on Countdown: reach a target with the four operations, using each number once.

    python experiments/countdown.py --model Qwen/Qwen3-1.7B
    python experiments/countdown.py --model Qwen/Qwen2.5-3B --style dialogue        # a base model, as in TinyZero
    python experiments/countdown.py --smoke                                         # minutes on a CPU, a tiny model

Hardware: float32 weights with Adam take 16 bytes per parameter, and a reference 4 more: about
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
import pathlib
from typing import Literal

import jax
import optax

from grpo_jax import advantages, data, losses, run, sampling, testing
from grpo_jax.models import hf
from grpo_jax.run import measured, ranges, resuming
from grpo_jax.run.precision import compute_dtype
from grpo_jax.schedules import learning_rates
from grpo_jax.study.task_runs import TaskSettings
from grpo_jax.tasks import countdown, dialogue, with_prompts
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import Updates, init_state

MAY_CHANGE = ("steps", "save_every", "evaluate_every", "micro_batches")  # of a run that is resumed


@dataclasses.dataclass(frozen=True)
class Config(TaskSettings):
    """Settings of a run."""

    model: str = "Qwen/Qwen3-1.7B"
    style: Literal["chat", "dialogue"] = "chat"  # a chat template, or plain words for a base model
    run_dir: pathlib.Path = pathlib.Path("runs/countdown")
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
    train_rows: int = 10_000
    eval_rows: int = 256  # of each of validation, test and ood
    samples: int = 8  # completions of a problem in the last evaluation, for pass@k
    evaluate_every: int = 20
    save_every: int = 20


def train(config: Config) -> dict[str, float]:
    """Trains, evaluates before and after, and returns the results."""
    ranges.check(config)
    updates = Updates(minibatches=config.minibatches, micro_batches=config.micro_batches, max_grad_norm=1.0)
    updates.check(config.prompts_per_step)
    resuming.check(config, allow=MAY_CHANGE)
    task = countdown.task(
        config.seed, train=config.train_rows, **dict.fromkeys(("validation", "test", "ood"), config.eval_rows)
    )
    task = with_prompts(task, data.chat if config.style == "chat" else dialogue)
    used = config.begin(task, config.model, config.run_dir, max_tokens=config.max_tokens)

    rate = learning_rates.learning_rate(
        config.learning_rate, warmup_steps=config.warmup_steps, updates_per_step=updates.count
    )
    policy, params = hf.load_pretrained(config.model, compute_dtype=compute_dtype(config.compute_dtype))
    optimizer = optax.adamw(rate, b2=0.99)
    sampler = sampling.sampler(group_size=config.group_size, max_tokens=config.max_tokens, eos_ids=used.eos_ids)
    step = make_train_step(
        policy,
        optimizer,
        sampler,
        loss=losses.grpo(epsilon=config.epsilon, penalty=losses.k3(config.beta)),
        advantage=advantages.from_rewards(weights=config.weights, names=used.names),
        transforms=(measured.repetition(), measured.unscored(used.names)),
        updates=updates,
    ).jit()
    state, began_with = init_state(params, optimizer, jax.random.key(config.seed), reference=True), used.digests(params)
    del params
    keys = ("reward", *(f"reward/{name}" for name in used.names), "validation/accuracy")
    settings = {
        "save_every": config.save_every,
        "allow": MAY_CHANGE,
        "digests": began_with,
        "keys": keys,
    }
    with run.loop(config, state, steps=config.steps, **settings) as loop:
        del state
        for n in loop:
            if n % config.evaluate_every == 0:
                loop.log(used.evaluate(policy, loop.state.params, "validation"))
            experience = step.collect(loop.state, used.batch(config.seed, n, config.prompts_per_step))
            given, mask = used.reward(experience.rollout)
            loop.state, metrics = step.learn(loop.state, experience._replace(rewards=given, reward_mask=mask))
            loop.log(metrics | used.logged.take() | learning_rates.rate_of_step(rate, loop.state, metrics))
        loop.log(used.evaluate(policy, loop.state.params, "validation"))
    return used.finish(policy, loop.state.params, config.samples)


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


if __name__ == "__main__":
    run.command(train, Config, __doc__, smoke=smoke)
