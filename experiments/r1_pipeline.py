r"""The stages of DeepSeek-R1 (DeepSeek-AI 2025, arXiv:2501.12948, sections 2.3 and 2.4), on a small task.

    python experiments/r1_pipeline.py                  # the small task, from nothing
    python experiments/r1_pipeline.py --smoke          # a few steps of everything
    python experiments/r1_pipeline.py --model Qwen/Qwen2.5-3B --task grpo_jax.tasks.countdown:task --chat \
        --demonstrations cold_start.jsonl --bucket 64 --micro-batches 8 --prompts-per-step 32 --group-size 16 \
        --minibatches 4 --rl-steps 200 --final-steps 100 --rl-learning-rate 3e-6 --sft-learning-rate 1e-5 \
        --test-batch 64 --min-language 0.95

1. Cold start: supervised learning of a few demonstrations.
2. GRPO with rewards for the right answer, the format and the language.
3. Rejection sampling: the policy of stage 2 writes a data set, of which the verifier, the language reward and, if there
   is one, a judge keep what is good. From the base again, not from stage 2, a model is trained on it.
4. GRPO with the rewards of stage 2 and one for preference.
5. Distillation: a smaller model learns, supervised, what stage 3 kept, without GRPO (section 2.4): `--student` beside
   `--model`; in the small task a student of half the width, made from the same texts as the base.

Each stage has its folder with checkpoints, metrics, its test and the model as a Hugging Face folder. A run that was
killed goes on in the stage where it was when the command is given again, and ends with the same parameters to the bit;
other data, answers, tokenizer or weights under the same names are refused. The test's problems are touched after each
stage and nowhere else.

The small task is sums of five digits modulo 10 (`grpo_jax.tasks.modular_sums`), for a Llama of 0.1 M parameters. Its
base is made here, as stage 0, on 4096 texts of a majority that forgets 40% of the terms after the first, works a fifth
of the sums twice, guesses 5% and writes 30% of the digits of its working in a second script
(`<think>5五1七9</think>`). The cold start is 256 demonstrations of a teacher who forgets 30% of the terms, works half
of the sums twice and writes 10% in the other script. So the second script stands for R1's mixed languages, and the
language reward is the share of digits in the first. The preference is for short right answers
(`rewards.cosine_length`): it stands for R1's preference models.

Results of three seeds, about 3 minutes each on 2 CPU cores, and what did not work: docs/pages/results/neighbours.md.
The stage of distillation has no result yet, and neither has a model: with one, this has been run on a tiny random model
only. `--data` and `--verifier`, or a `--task`, then give the problems, and functions are named as in `grpo.py`.

Departures from the paper. R1 sums accuracy and language (section 2.3.2); here they are weighted, and there is a reward
for the format. Its third stage adds 200k samples that are not about reasoning (`--mix` adds the demonstrations), and
filters long paragraphs and code as well; here the format only ranks. Its last stage has prompts of its own for the
preference, which is a model's, in its last 400 of 1700 steps; here every completion gets all rewards in all steps. Its
reference is renewed every 400 updates; here it is the start of the stage.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from r1_problems import Pair, Problem, ProblemSettings, make_problem

from grpo_jax import data, losses, packing, run, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.baselines.rejection_sampling import best_of_n
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.protocols import Reward
from grpo_jax.run import checkpoint, digests, preemption, ranges, resuming
from grpo_jax.run.files import made_once, write_json
from grpo_jax.run.supervised import fine_tune
from grpo_jax.schedules import learning_rates
from grpo_jax.study import tables
from grpo_jax.study.rollout_means import make_rollout_means
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Array, Experience, Params, Prompts, Rollout
from grpo_jax.updates import Updates, init_state

STAGES = ("base", "cold_start", "reasoning_rl", "rejection_sampling", "final_rl", "student", "distilled")
REWARDS = ("accuracy", "format", "language", "preference")  # the last one in the last stage only
MAY_CHANGE = ("data", "demonstrations", "save_every", "micro_batches")  # of a run that is resumed; not what is in them


@dataclasses.dataclass(frozen=True)
class Config(ProblemSettings):
    """Settings of a run; those that are not given are meant for the small task."""

    run_dir: pathlib.Path = pathlib.Path("runs/r1_pipeline")

    # Stages 1 and 3, supervised; and before them, for the small task alone, a base from nothing.
    base_steps: int = 800
    base_learning_rate: float = 3e-3
    cold_start_steps: int = 50
    sft_steps: int = 150
    sft_batch: int = 64
    sft_learning_rate: float = 1e-3
    start: Literal["base", "cold_start", "policy"] = "base"  # where the third stage starts; R1: at the base
    sampled_prompts: int = 2048
    samples: int = 8  # completions of each of these prompts
    keep: int = 2  # of them at most, the best
    min_language: float = 1.0  # share of the wanted language that is asked of what is kept
    judge_threshold: float = 0.5  # the judge has to give more
    distill_steps: int = 300
    mix: bool = False  # put the cold start's demonstrations among what was kept

    # Stages 2 and 4, GRPO.
    rl_steps: int = 30
    final_steps: int = 60
    prompts_per_step: int = 16
    group_size: int = 8
    rl_learning_rate: float = 3e-4
    temperature: float = 1.0
    final_temperature: float = 0.7
    minibatches: int = 1
    epsilon: float = 10.0  # R1's; with one minibatch the ratio is 1 and nothing is clipped
    beta: float = 0.001  # weight of the KL term to the start of the stage
    weights: tuple[float, float, float, float] = (1.0, 0.1, 0.2, 0.2)  # of the rewards, in the order of REWARDS

    test_batch: int = 512
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    save_every: int = 50
    smoke: bool = False  # a few steps of everything, to see that it runs


def train(config: Config) -> dict[str, Any]:
    """All stages, or those that are still to be done; returns the content of `results.json`."""
    began = time.monotonic()
    check(config)
    problem = make_problem(config)
    shown, reasoning = problem.demonstrations, problem.reasoning
    tests: dict[str, dict[str, float]] = {}
    evaluate = functools.cache(functools.partial(make_evaluate, problem, config))

    def finish(name: str, params: Params, policy: Policy = problem.policy) -> Params:
        """The test of a stage and its export, unless they are there."""
        folder = folder_of(config, name)
        if not (folder / "test.json").exists():
            hf.save_pretrained(policy, params, folder / "model", tokenizer=problem.tokenizer, eos_ids=problem.eos_ids)
            write_json(folder / "test.json", evaluate(policy)(params))
        tests[name] = json.loads((folder / "test.json").read_text())
        return params

    def base() -> Params:
        """The model before any stage: as it was given, or from nothing, trained once and then read."""
        params, texts = problem.load(), problem.pretraining
        if not texts:
            return params
        return sft(config, problem, "base", params, texts, config.base_steps, rate=config.base_learning_rate, key=0)

    def learn(name: str, params: Params, pairs: list[Pair], steps: int, *, key: int) -> Params:
        return sft(config, problem, name, params, pairs, steps, rate=config.sft_learning_rate, key=key)

    with preemption.lock(config.run_dir):
        # ------------------------------------------------------------------- 1 cold start
        params = finish("base", base())
        params = finish("cold_start", learn("cold_start", params, shown, config.cold_start_steps, key=1))

        # --------------------------------------------------- 2 GRPO: accuracy, format, language
        first = {"reward": reasoning, "names": REWARDS[:3], "temperature": config.temperature, "key": 2}
        params = finish("reasoning_rl", grpo(config, problem, "reasoning_rl", params, config.rl_steps, **first))

        # ------------------------------------- 3 rejection sampling, and SFT on its completions
        pairs, counts = rejection_sample(config, problem, folder_of(config, "rejection_sampling") / "samples", params)
        if config.start == "base":
            params = base()
        elif config.start == "cold_start":
            params = checkpoint.restore_params(folder_of(config, "cold_start") / "checkpoints", params)
        pairs = [*pairs, *shown] if config.mix else pairs
        params = learn("rejection_sampling", params, pairs, config.sft_steps, key=3)
        params = finish("rejection_sampling", params)

        # ------------------------------------------------------- 4 GRPO: mixed rewards
        def mixed(rollout: Rollout) -> tuple[Any, Any]:
            return joined(reasoning(rollout), problem.preference(rollout))

        last = {"reward": mixed, "names": REWARDS, "temperature": config.final_temperature, "key": 4}
        finish("final_rl", grpo(config, problem, "final_rl", params, config.final_steps, **last))

        # ------------------------------------------------------------------ 5 distillation
        if problem.student is not None:
            network, params = problem.student()
            smaller, rate = problem._replace(policy=network), config.sft_learning_rate
            if texts := problem.pretraining:
                of_base = {"rate": config.base_learning_rate, "key": 6}
                params = sft(config, smaller, "student", params, texts, config.base_steps, **of_base)
            params = finish("student", params, network)
            params = sft(config, smaller, "distilled", params, pairs, config.distill_steps, rate=rate, key=7)
            finish("distilled", params, network)

        results = {"stages": tests, "rejection_sampling": counts}
        write_json(config.run_dir / "results.json", results)
    print(f"test, {len(problem.test)} problems")
    names = ("greedy/accuracy", "sampled/accuracy", "sampled/format", "sampled/language", "sampled/length")
    lines = [[stage, *(f"{tested[name]:.3f}" for name in names)] for stage, tested in tests.items()]
    rich.print(tables.terminal(["stage", *names], lines))
    drawn = "{drawn} completions drawn, {right} right, {kept} kept".format(**counts)
    print(f"rejection sampling: {drawn}\n{time.monotonic() - began:.0f} s in all")
    return results


# ------------------------------------------------------------------------------- stages


def sft(
    config: Config, problem: Problem, stage: str, params: Params, pairs: Sequence[Pair], steps: int, *, rate: float,
    key: int,
) -> Params:  # fmt: skip
    """Supervised learning of completions."""

    def batch(n: int) -> Rollout:
        rows = data.batch_indices(config.seed + key, n, len(pairs), config.sft_batch)
        return data.make_demonstrations(*zip(*(pairs[row] for row in rows), strict=True), multiple=config.bucket)

    print(f"{stage}: {len(pairs)} completions to learn, such as {problem.text([*pairs[0][0], *pairs[0][1]])}")
    return fine_tune(
        config, problem.policy, params, batch, steps=steps, learning_rate=rate, key=stage_key(config, key),
        run_dir=folder_of(config, stage), save_every=config.save_every, micro_batches=config.micro_batches,
        allow=MAY_CHANGE, digests=began_with(problem, params, pairs),
    )  # fmt: skip


def grpo(
    config: Config, problem: Problem, stage: str, params: Params, steps: int, *, reward: Reward, names: Sequence[str],
    temperature: float, key: int,
) -> Params:  # fmt: skip
    """GRPO with the given rewards."""
    updates = Updates(minibatches=config.minibatches, micro_batches=config.micro_batches, max_grad_norm=1.0)
    rate = learning_rates.learning_rate(config.rl_learning_rate, warmup_steps=4, updates_per_step=updates.count)
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=0.0)
    step = make_train_step(
        problem.policy,
        optimizer,
        make_sampler(problem, group_size=config.group_size, temperature=temperature),
        loss=losses.grpo(epsilon=config.epsilon, penalty=losses.k3(config.beta) if config.beta else None),
        advantage=from_rewards(weights=config.weights[: len(names)], names=names),
        updates=updates,
    ).jit()

    def batch(n: int) -> Prompts:
        rows = data.batch_indices(config.seed + key, n, len(problem.train), config.prompts_per_step)
        return problem.prompts(problem.train[rows])

    print(f"{stage}: {config.prompts_per_step} prompts x {config.group_size} completions per step")
    state = init_state(params, optimizer, stage_key(config, key), reference=config.beta > 0)
    keys = ("reward", *(f"reward/{name}" for name in names), "entropy", "length")
    with run.loop(
        config, state, steps=steps, run_dir=folder_of(config, stage), save_every=config.save_every, allow=MAY_CHANGE,
        digests=began_with(problem, params), keys=keys,
    ) as loop:  # fmt: skip
        for n in loop:
            experience = step.collect(loop.state, batch(n))
            given, mask = reward(experience.rollout)
            experience = experience._replace(rewards=jnp.asarray(given), reward_mask=jnp.asarray(mask))
            loop.state, metrics = step.learn(loop.state, packing.trim(experience, multiple=config.bucket))
            loop.log(metrics | learning_rates.rate_of_step(rate, loop.state, metrics))
    return loop.state.params


def rejection_sample(
    config: Config, problem: Problem, folder: pathlib.Path, params: Params
) -> tuple[list[Pair], dict[str, int]]:
    """The best right completions of each prompt, without duplicates, and how many were drawn, right and kept.

    Each batch has a file, in which it is found again.
    """
    sampler = make_sampler(problem, group_size=config.samples, temperature=config.temperature)
    draw = jax.jit(functools.partial(sampler, problem.policy))
    rows = problem.train[data.batch_indices(config.seed + 3, 0, len(problem.train), config.sampled_prompts)]
    rows = np.unique(rows)  # a prompt comes once, also where there are fewer than are asked for

    def kept(n: int, batch: np.ndarray) -> dict[str, Any]:
        key = jax.random.fold_in(stage_key(config, 5), n)
        return select(config, problem, draw(params, problem.prompts(batch), key))

    lines = made_once(folder, batches(rows, config.test_batch), kept)
    counts = {name: sum(line[name] for line in lines) for name in ("drawn", "right")}
    # Two rows may have the same prompt; a dict keeps what came first, in order.
    pairs = list({(tuple(item["prompt"]), tuple(item["completion"])): None for line in lines for item in line["kept"]})
    if not pairs:
        raise ValueError(
            f"none of {counts['drawn']} completions passed, of which {counts['right']} were right: sample more, "
            "train longer, or lower --min-language or --judge-threshold"
        )
    return [(list(prompt), list(completion)) for prompt, completion in pairs], counts | {"kept": len(pairs)}


def select(config: Config, problem: Problem, rollout: Rollout) -> dict[str, Any]:
    """The kept completions of a batch, as JSON."""
    given, mask = joined(*(reward(rollout) for reward in (problem.reasoning, problem.judge) if reward is not None))
    weights = (*config.weights[:3], *[1.0] * (given.shape[-1] - 3))
    ranked = best_of_n(Experience(rollout, given, mask), keep=config.samples, weights=weights)  # best first
    rollout, given, mask = jax.device_get((ranked.rollout, ranked.rewards, ranked.reward_mask))
    right = mask[..., 0] & (given[..., 0] > 0.5)
    passed = right & ~rollout.truncated & mask[..., 2] & (given[..., 2] >= config.min_language)
    if problem.judge is not None:  # not judged is not approved
        passed &= mask[..., 3] & (given[..., 3] > config.judge_threshold)
    kept = []
    for group, of_group in zip(data.token_pairs(rollout), passed, strict=True):
        different = dict.fromkeys(tuple(ids) for (_, ids), good in zip(group, of_group, strict=True) if good)
        prompt = group[0][0]
        for ids in list(different)[: config.keep]:
            kept.append({"prompt": prompt, "completion": list(ids), "text": problem.text([*prompt, *ids])})
    return {"drawn": right.size, "right": int(right.sum()), "kept": kept}


def joined(*parts: tuple[Any, Any]) -> tuple[Array, Array]:
    """Several rewards and their masks as one."""
    rewards, mask = (jnp.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
    return rewards, mask


def make_sampler(problem: Problem, **settings: Any) -> sampling.PolicySampler:
    """A sampler of completions of the problem."""
    return sampling.sampler(max_tokens=problem.max_tokens, eos_ids=problem.eos_ids, **settings)


def make_evaluate(problem: Problem, config: Config, policy: Policy) -> Callable[[Params], dict[str, float]]:
    """The test of a policy: the mean of each reward, greedy and sampled at temperature 1."""
    samplers = {
        "greedy": sampling.greedy(max_tokens=problem.max_tokens, eos_ids=problem.eos_ids),
        "sampled": make_sampler(problem, group_size=1),
    }
    rows = batches(problem.test, config.test_batch)
    return make_rollout_means(policy, samplers, rows, problem.prompts, problem.reasoning, REWARDS[:3])


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in parts of `size`, of which the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def stage_key(config: Config, stage: int) -> Array:
    """The key of a stage."""
    return jax.random.fold_in(jax.random.key(config.seed), stage)


def folder_of(config: Config, stage: str) -> pathlib.Path:
    """Where a stage writes."""
    return config.run_dir / f"{STAGES.index(stage)}_{stage}"


def began_with(problem: Problem, params: Params, pairs: Sequence[Pair] = ()) -> dict[str, str]:
    """Digests of all that a stage depends on beside its settings."""
    found = {"the weights that the stage begins with": digests.of_arrays(params)}
    found["the completions to learn"] = digests.of_json(pairs)
    return {**problem.digests, **found}


def check(config: Config) -> None:
    """Refuses settings that are out of range or do not go together, and stages that were made under others."""
    ranges.check(config)
    config.check()
    if config.group_size < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, got --group-size {config.group_size}")
    for name, size in (
        ("prompts_per_step", config.minibatches * config.micro_batches),
        ("sft_batch", config.micro_batches),
    ):
        if getattr(config, name) % size:
            raise ValueError(f"{name} = {getattr(config, name)} does not divide into {size} parts of an update")
    for folder in (folder_of(config, stage) for stage in STAGES):
        if folder.exists():
            resuming.check(dataclasses.replace(config, run_dir=folder), allow=MAY_CHANGE)


def main(config: Config) -> dict[str, Any]:
    """`train`, or a few steps of it."""
    if config.smoke:  # stages with the same settings share their programs
        config = dataclasses.replace(
            config, base_steps=30, cold_start_steps=30, sft_steps=30, sft_learning_rate=config.base_learning_rate,
            sft_batch=32, rl_steps=4, final_steps=4, final_temperature=1.0, prompts_per_step=4, group_size=4,
            sampled_prompts=96, samples=4, distill_steps=30, test_rows=64, test_batch=64, save_every=15,
        )  # fmt: skip
    return train(config)


if __name__ == "__main__":
    run.command(main, Config, __doc__)
