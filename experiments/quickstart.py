"""GRPO from nothing to over 95% in about a minute on a laptop: 2-digit addition with worked steps.

    python experiments/quickstart.py                          # one update a rollout, no KL term
    python experiments/quickstart.py --passes 2 --beta 0.04   # in which clipping and the KL term act

A transformer of 0.4 M parameters is made from scratch and gets a short supervised
warm-up on the demonstrations of an imperfect teacher, who forgets most carries:

    37+58=  ->  <think>7+8+0=15,3+5+0=08</think><answer>085</answer>

It learns the format, and both ways of adding, the wrong one more often. Then GRPO
rewards right answers (1.0) and the format (0.1), and nobody shows it anything more.
So this is elicitation: what GRPO does here is to move probability from a way that
was taught and is wrong to one that was taught and is right.

Greedy accuracy on the test split goes from about 0.3 to 0.98 or more for each of seeds
0 to 4, in about 40 s on 2 CPU cores with Python 3.11 and jax 0.10.2; the README has the
table.

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

import jax
import numpy as np
import optax
import transformers
import tyro

from grpo_jax import data, losses, models, rewards, sampling, statistics
from grpo_jax.advantages import from_rewards
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.run import checkpoint, compilation, display, metrics, plots, preemption
from grpo_jax.tasks import arithmetic
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Experience, Metrics, Params, Prompts, TrainState
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
    passes: int = 1  # over each rollout; from 2 on, the ratio leaves 1 and clipping acts
    epsilon: float = 0.2
    beta: float = 0.0  # weight of the KL term; above 0, the warmed-up policy is kept as the reference
    evaluate_every: int = 10
    save_every: int = 20
    smoke: bool = False  # a few steps of everything, to see that it runs


def make_policy(tokenizer: transformers.PreTrainedTokenizerFast) -> Policy:
    """A Llama of 0.4 M parameters."""
    return models.decoder(
        models.from_hf_config(
            transformers.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    )


def run(config: Config) -> dict[str, float]:
    """The whole experiment; returns the test accuracies."""
    started = time.monotonic()
    tokenizer = arithmetic.tokenizer()
    splits = arithmetic.splits(config.seed)
    policy = make_policy(tokenizer)
    accuracy, formed = arithmetic.accuracy(tokenizer), arithmetic.strict_format(tokenizer)
    eos_ids = (tokenizer.eos_token_id,)

    @jax.jit
    def evaluate(params: Params, prompts: Prompts) -> dict[str, jax.Array]:
        settings = {"group_size": 1, "max_tokens": arithmetic.MAX_TOKENS, "eos_ids": eos_ids}
        greedy = dataclasses.replace(sampling.sampler(**settings), greedy=True)(
            policy, params, prompts, jax.random.key(0)
        )
        sampled = sampling.sampler(**settings)(policy, params, prompts, jax.random.key(0))
        return {"greedy": accuracy(greedy).mean(), "sampled": accuracy(sampled).mean(), "tokens": greedy.tokens[:, 0]}

    with preemption.lock(config.run_dir), preemption.graceful_stop() as stop_requested:
        # ------------------------------------------------------------ supervised warm-up
        prompts, completions = arithmetic.flawed_demonstrations(splits.demonstrations, config.seed)
        demonstrations = data.make_demonstrations(tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"])
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            config.warmup_learning_rate,
            min(20, config.warmup_steps // 2),
            config.warmup_steps,
            0.05 * config.warmup_learning_rate,
        )
        optimizer = optax.adamw(schedule, weight_decay=0.01)
        learn = make_learn(policy, optimizer, loss=losses.sft(), updates=Updates(max_grad_norm=1.0))

        @jax.jit
        def imitate(state: TrainState, rows: np.ndarray) -> tuple[TrainState, Metrics]:
            return learn(state, Experience(jax.tree.map(lambda x: x[rows], demonstrations)))

        def warmup_step(state: TrainState, n: int) -> tuple[TrainState, Metrics]:
            return imitate(state, data.batch_indices(config.seed, n, len(prompts), config.warmup_batch))

        print(f"supervised warm-up on {len(prompts)} demonstrations, such as {prompts[0]}{completions[0]}")
        state = init_state(jax.jit(policy.init)(jax.random.key(config.seed)), optimizer, jax.random.key(config.seed))
        folder = config.run_dir / "warmup"
        state = train(folder, config, state, warmup_step, config.warmup_steps, stop_requested, keys=("loss",))
        before = evaluate(state.params, arithmetic.encode(tokenizer, splits.test))

        # ------------------------------------------------------------------------- GRPO
        learning_rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, config.learning_rate, 5),
                optax.linear_schedule(config.learning_rate, 0.1 * config.learning_rate, config.steps - 5),
            ],
            [5],
        )
        optimizer = optax.adam(learning_rate, b2=0.99)
        step = jax.jit(
            make_train_step(
                policy,
                optimizer,
                sampling.sampler(group_size=config.group_size, max_tokens=arithmetic.MAX_TOKENS, eos_ids=eos_ids),
                reward=rewards.traced(accuracy, formed),
                advantage=from_rewards(weights=(1.0, 0.1), names=("accuracy", "format")),
                loss=losses.grpo(epsilon=config.epsilon, penalty=losses.k3(config.beta) if config.beta else None),
                updates=Updates(iterations=config.passes, max_grad_norm=1.0),
            )
        )

        def grpo_step(state: TrainState, n: int) -> tuple[TrainState, Metrics]:
            rows = data.batch_indices(config.seed, n, len(splits.train), config.prompts_per_step)
            return step(state, arithmetic.encode(tokenizer, splits.train[rows]))

        print(f"GRPO: {config.prompts_per_step} prompts x {config.group_size} completions a step")
        validation = arithmetic.encode(tokenizer, splits.validation)
        keys = ("reward", "reward/accuracy", "validation", "kl", "entropy", "length")
        state = init_state(state.params, optimizer, jax.random.key(config.seed + 1), reference=config.beta > 0)
        state = train(
            config.run_dir,
            config,
            state,
            grpo_step,
            config.steps,
            stop_requested,
            keys=keys,
            evaluate=lambda params: {"validation": evaluate(params, validation)["greedy"]},
        )

    # -------------------------------------------------------------------------- results
    after = evaluate(state.params, arithmetic.encode(tokenizer, splits.test))
    for problem, old, new in list(zip(splits.test, before["tokens"], after["tokens"], strict=True))[:4]:
        print(f"\n{arithmetic.prompt(problem)}\n  before  {text(tokenizer, old)}\n  after   {text(tokenizer, new)}")
    results = {
        f"{name}_{when}": float(found[name])
        for when, found in (("before", before), ("after", after))
        for name in ("greedy", "sampled")
    }
    print(f"\ntest accuracy over {len(splits.test)} problems   before   after")
    for name in ("greedy", "sampled"):
        print(f"  {name:36s}{results[f'{name}_before']:8.3f}{results[f'{name}_after']:8.3f}")
    (config.run_dir / "results.json").write_text(json.dumps(results, indent=2))
    curves = ("reward", "reward/accuracy", "validation", "kl" if config.beta else "grad_norm", "entropy", "length")
    curves = (*curves, "clip_low", "clip_high")
    print(f"curves: {plots.plot(config.run_dir, keys=curves)}")
    export(policy, state.params, tokenizer, config.run_dir / "model", arithmetic.prompt(splits.test[0]))
    print(f"{time.monotonic() - started:.0f} s in all")
    return results


def train(
    folder: pathlib.Path,
    config: Config,
    state: TrainState,
    step: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    steps: int,
    stop_requested: Callable[[], bool],
    *,
    keys: tuple[str, ...],
    evaluate: Callable[[Params], dict[str, jax.Array]] | None = None,
) -> TrainState:
    """Runs `step` until `steps` have been made, from the newest checkpoint in the folder if there is one."""
    settings = json.loads(json.dumps(dataclasses.asdict(config) | {"run_dir": str(config.run_dir)}))
    with checkpoint.manager(folder / "checkpoints") as checkpoints:
        if (found := checkpoint.restore(checkpoints, state)) is not None:
            state, meta = found
            checkpoint.check_config(meta["config"], settings, allow=("run_dir",))
            print(f"resumed at step {int(state.step)} of {steps}")
        metrics.truncate(folder, int(state.step))
        with display.progress(steps, start=int(state.step), keys=keys) as show:
            for n in range(int(state.step), steps):
                started = time.monotonic()
                state, measured = step(state, n)
                measured = jax.device_get(statistics.summary(measured))
                seconds = time.monotonic() - started
                if evaluate is not None and ((n + 1) % config.evaluate_every == 0 or n + 1 == steps):
                    measured |= jax.device_get(evaluate(state.params))
                tokens = measured["length"] * config.prompts_per_step * config.group_size
                metrics.append(folder, n, measured, {"seconds": seconds})
                show(n, measured, None if evaluate is None else tokens / seconds)
                stopping = stop_requested()
                if stopping or (n + 1) % config.save_every == 0 or n + 1 == steps:
                    checkpoint.save(checkpoints, state, {"config": settings})
                if stopping:
                    raise SystemExit(f"stopped after step {n + 1}; the same command goes on from there")
    return state


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
    """`run`, or a few steps of it."""
    if config.smoke:
        config = dataclasses.replace(config, warmup_steps=60, warmup_batch=32, steps=6, evaluate_every=3, save_every=2)
    return run(config)


if __name__ == "__main__":
    compilation.enable_compilation_cache()
    main(tyro.cli(Config, description=__doc__))
