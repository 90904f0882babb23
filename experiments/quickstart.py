"""GRPO from nothing to over 95% in a minute or two on a laptop: 2-digit addition with worked steps.

    python experiments/quickstart.py                          # one update a rollout, no KL term
    python experiments/quickstart.py --iterations 2 --beta 0.04   # in which clipping and the KL term act

A transformer of 0.4 M parameters is made from scratch and gets a short supervised
warm-up on the demonstrations of an imperfect teacher, who forgets most carries:

    37+58=  ->  <think>7+8+0=15,3+5+0=08</think><answer>085</answer>

It learns the format, and both ways of adding, the wrong one more often. Then GRPO
rewards right answers (1.0) and the format (0.1), and nobody shows it anything more.
So this is elicitation: what GRPO does here is to move probability from a way that
was taught and is wrong to one that was taught and is right.

Greedy accuracy on the test split goes from about 0.3 to 0.99 or more for each of seeds
0 to 4, in 44 to 147 s on 2 CPU cores, by the machine, with Python 3.11 and jax 0.10.2;
the README has the table.

The test split is touched twice, before and after GRPO; the curve is of a validation
split. Everything goes to a run folder. A run that was killed goes on where it was
when the command is given again, and ends with the same parameters to the bit.
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import transformers

from grpo_jax import data, losses, models, rewards, run, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.run import preemption, ranges
from grpo_jax.run.supervised import fine_tune
from grpo_jax.schedules import learning_rates
from grpo_jax.tasks import arithmetic
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Params, Prompts, Rollout
from grpo_jax.updates import Updates, init_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    run_dir: pathlib.Path = pathlib.Path("runs/quickstart")
    seed: int = 0
    warmup_steps: int = 360
    warmup_batch: int = 64
    warmup_learning_rate: float = 2e-3
    steps: int = 60
    prompts_per_step: int = 16
    group_size: int = 8
    learning_rate: float = 1e-4
    iterations: int = 1  # over each rollout; from 2 on, the ratio leaves 1 and clipping acts
    epsilon: float = 0.2
    beta: float = 0.0  # weight of the KL term; above 0, the warmed-up policy is kept as the reference
    evaluate_every: int = 10
    save_every: int = 20
    smoke: bool = False  # a few steps of everything, to see that it runs


def make_policy(tokenizer: transformers.PreTrainedTokenizerFast) -> Policy:
    """A Llama of 0.4 M parameters."""
    return models.small_llama(len(tokenizer), width=128, eos_id=tokenizer.eos_token_id)


def train(config: Config) -> dict[str, float]:
    """The whole experiment; returns the test accuracies."""
    started = time.monotonic()
    ranges.check(config)
    tokenizer = arithmetic.tokenizer()
    splits = arithmetic.splits(config.seed)
    policy = make_policy(tokenizer)
    evaluate = make_evaluate(policy, tokenizer)
    test = arithmetic.encode(tokenizer, splits.test)
    with preemption.lock(config.run_dir):
        params = warm_up(config, policy, tokenizer, splits)
        before = evaluate(params, test)
        params = grpo(config, policy, tokenizer, splits, params, evaluate)
    after = evaluate(params, test)
    for problem, old, new in list(zip(splits.test, before["tokens"], after["tokens"], strict=True))[:4]:
        print(f"\n{arithmetic.prompt(problem)}\n  before  {text(tokenizer, old)}\n  after   {text(tokenizer, new)}")
    results = {
        f"{name}_{when}": float(accuracies[name])
        for when, accuracies in (("before", before), ("after", after))
        for name in ("greedy", "sampled")
    }
    print(f"\ntest accuracy over {len(splits.test)} problems   before   after")
    for name in ("greedy", "sampled"):
        print(f"  {name:36s}{results[f'{name}_before']:8.3f}{results[f'{name}_after']:8.3f}")
    (config.run_dir / "results.json").write_text(json.dumps(results, indent=2))
    export(policy, params, tokenizer, config.run_dir / "model", arithmetic.prompt(splits.test[0]))
    print(f"{time.monotonic() - started:.0f} s in all")
    return results


def warm_up(config: Config, policy: Policy, tokenizer: Any, splits: Any) -> Params:
    """Supervised learning of the teacher's demonstrations, from nothing."""
    prompts, completions = arithmetic.flawed_demonstrations(splits.demonstrations, config.seed)
    ids = tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"]
    demonstrations = jax.device_get(data.make_demonstrations(*ids))

    def batch(n: int) -> Rollout:
        rows = data.batch_indices(config.seed, n, len(prompts), config.warmup_batch)
        return jax.tree.map(lambda x: x[rows], demonstrations)

    print(f"supervised warm-up on {len(prompts)} demonstrations, such as {prompts[0]}{completions[0]}")
    key = jax.random.key(config.seed)
    return fine_tune(
        config, policy, jax.jit(policy.init)(key), batch, steps=config.warmup_steps, key=key,
        learning_rate=config.warmup_learning_rate, run_dir=config.run_dir / "warmup", save_every=config.save_every,
    )  # fmt: skip


def grpo(
    config: Config,
    policy: Policy,
    tokenizer: Any,
    splits: Any,
    params: Params,
    evaluate: Callable[[Params, Prompts], dict[str, jax.Array]],
) -> Params:
    """GRPO with rewards for right answers and their format."""
    updates = Updates(iterations=config.iterations, max_grad_norm=1.0)
    rate = learning_rates.learning_rate(
        config.learning_rate,
        config.steps,
        warmup_steps=min(4, config.steps // 2),
        decay=learning_rates.linear,
        final_fraction=0.1,
        updates_per_step=updates.count,
    )
    optimizer = optax.adam(rate, b2=0.99)
    sampler = sampling.sampler(
        group_size=config.group_size, max_tokens=arithmetic.MAX_TOKENS, eos_ids=(tokenizer.eos_token_id,)
    )
    step = make_train_step(
        policy,
        optimizer,
        sampler,
        reward=rewards.traced(arithmetic.accuracy(tokenizer), arithmetic.strict_format(tokenizer)),
        advantage=from_rewards(weights=(1.0, 0.1), names=("accuracy", "format")),
        loss=losses.grpo(epsilon=config.epsilon, penalty=losses.k3(config.beta) if config.beta else None),
        updates=updates,
    )
    step = jax.jit(step)  # one program

    print(f"GRPO: {config.prompts_per_step} prompts x {config.group_size} completions per step")
    validation = arithmetic.encode(tokenizer, splits.validation)
    state = init_state(params, optimizer, jax.random.key(config.seed + 1), reference=config.beta > 0)
    keys = ("reward", "reward/accuracy", "validation", "kl", "entropy", "length")
    curves = ("reward", "reward/accuracy", "validation", "kl" if config.beta else "grad_norm", "entropy", "length")
    settings = {"keys": keys, "curves": (*curves, "clip_low", "clip_high"), "save_every": config.save_every}
    with run.loop(config, state, steps=config.steps, **settings) as loop:
        for n in loop:
            if n % config.evaluate_every == 0:
                loop.log({"validation": evaluate(loop.state.params, validation)["greedy"]})
            rows = data.batch_indices(config.seed, n, len(splits.train), config.prompts_per_step)
            loop.state, metrics = step(loop.state, arithmetic.encode(tokenizer, splits.train[rows]))
            loop.log(metrics | learning_rates.rate_of_step(rate, loop.state, metrics))
        loop.log({"validation": evaluate(loop.state.params, validation)["greedy"]})
    return loop.state.params


def make_evaluate(policy: Policy, tokenizer: Any) -> Callable[[Params, Prompts], dict[str, jax.Array]]:
    """`(params, prompts) -> ` accuracies of greedy and of sampled completions, and the greedy ones."""
    accuracy, settings = arithmetic.accuracy(tokenizer), {"max_tokens": arithmetic.MAX_TOKENS}
    greedy = sampling.greedy(eos_ids=(tokenizer.eos_token_id,), **settings)
    sampled = sampling.sampler(group_size=1, eos_ids=(tokenizer.eos_token_id,), **settings)

    @jax.jit
    def evaluate(params: Params, prompts: Prompts) -> dict[str, jax.Array]:
        likeliest = greedy(policy, params, prompts, jax.random.key(0))
        drawn = sampled(policy, params, prompts, jax.random.key(0))
        return {
            "greedy": accuracy(likeliest).mean(),
            "sampled": accuracy(drawn).mean(),
            "tokens": likeliest.tokens[:, 0],
        }

    return evaluate


def text(tokenizer: transformers.PreTrainedTokenizerFast, tokens: jax.Array) -> str:
    """A completion up to its end."""
    return tokenizer.decode(np.asarray(tokens)).split(arithmetic.EOS)[0]


def export(
    policy: Policy, params: Params, tokenizer: transformers.PreTrainedTokenizerFast, path: pathlib.Path, prompt: str
) -> None:
    """Writes the model as a Hugging Face folder and, where torch is installed, has transformers use it."""
    hf.save_pretrained(policy, params, path, tokenizer=tokenizer)
    print(f"model: {path}, a Hugging Face folder")
    if importlib.util.find_spec("torch") is None:
        print("  (install torch to see transformers load it)")
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=arithmetic.MAX_TOKENS)
    print(f"  transformers in torch: {tokenizer.decode(tokens[0])}")


def main(config: Config) -> dict[str, float]:
    """`train`, or a few steps of it."""
    if config.smoke:
        config = dataclasses.replace(config, warmup_steps=60, warmup_batch=32, steps=6, evaluate_every=3, save_every=2)
    return train(config)


if __name__ == "__main__":
    run.command(main, Config, __doc__)
