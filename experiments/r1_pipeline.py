r"""The stages of DeepSeek-R1 (DeepSeek-AI 2025, arXiv:2501.12948, sections 2.3 and 2.4), on a small task.

    python experiments/r1_pipeline.py                  # the small task, from nothing
    python experiments/r1_pipeline.py --smoke          # a few steps of everything
    python experiments/r1_pipeline.py --model Qwen/Qwen2.5-3B --task grpo_jax.tasks.countdown:task --chat \
        --demonstrations cold_start.jsonl --bucket 64 --micro-batches 8 --prompts-per-step 32 --group-size 16 \
        --minibatches 4 --rl-steps 200 --final-steps 100 --rl-learning-rate 3e-6 --sft-learning-rate 1e-5 \
        --test-batch 64 --min-language 0.95

1. Cold start: supervised learning of a few demonstrations.
2. GRPO with rewards for the right answer, the format and the language.
3. Rejection sampling: the policy of stage 2 writes a data set of which the verifier, the
   language reward and, if there is one, a judge keep what is good. From the base again,
   not from stage 2, a model is trained on it.
4. GRPO with the rewards of stage 2 and one for preference.
5. Distillation: a smaller model learns, supervised, what stage 3 kept, without GRPO (section 2.4). Of a model it takes
   `--student`; the small task makes a student of half the width from the same texts as the base.

Each stage has its folder with checkpoints, metrics, its test and the model as a Hugging
Face folder. A run that was killed goes on in the stage where it was when the command
is given again, and ends with the same parameters to the bit. The test's problems are
touched after each stage and nowhere else.

The small task is sums of five digits modulo 10 (`grpo_jax.tasks.modular_sums`), for a
Llama of 0.1 M parameters. Its base is made here, as stage 0, on 4096 texts of a majority that
forgets 40% of the terms after the first, works a fifth of the sums twice, guesses 5% and writes
30% of the digits of its working in a second script (`<think>5五1七9</think>`). The cold
start is 256 demonstrations of a teacher who forgets 30% of the terms, works half of the
sums twice and writes 10% in the other script. So the second script stands for R1's mixed
languages, and the language reward is the share of digits in the first. The preference is
for short right answers (`rewards.cosine_length`): it stands for R1's preference models.

Accuracy on 512 held-out problems for the seeds 0, 1 and 2; format, language and length are
of sampled completions, means of the three (2 CPU cores, Python 3.11, jax 0.10.2; about 3
minutes a seed, compiling included, with other programs on the same cores):

    stage                 greedy                 sampled                format   language length
    0 base                0.533  0.592  0.393    0.197  0.199  0.195    0.988    0.749     11.7
    1 cold start          0.465  0.547  0.516    0.258  0.324  0.299    0.984    0.914     13.5
    2 reasoning rl        0.994  0.979  0.994    0.777  0.846  0.854    0.990    0.954     12.6
    3 rejection sampling  1.000  1.000  1.000    0.959  0.969  0.961    0.993    0.997     12.9
    4 final rl            1.000  1.000  1.000    0.953  0.975  0.947    0.997    0.997     11.0

In stage 3, 16384 completions were drawn, of which 13095, 14011 and 14015 were right and 3359, 3039
and 2887 kept (at most 2 a prompt, without duplicates).

- GRPO does nearly all of the work on accuracy: after its 30 steps the greedy one is 0.979
  or more. The cold start alone is poor.
- Supervised learning of the filtered samples, from the base, then sharpens: sampled accuracy
  and language rise above those of the policy that wrote the samples. More steps of
  stage 2 do as much: with 100 in place of 30, from an earlier base (45% forgotten, 600
  steps), sampled accuracy was 0.97 and 0.98 for two seeds, and stage 3 added nothing.
- Stage 4 adds nothing to the accuracy. What it does is what its new reward asks for:
  working twice disappears (11 tokens is working once).
- The pipeline elicits and does not create. From that earlier base, seed 2 had not learned to
  add (0.09 greedy, which is chance), and no stage changed it. With random
  parameters for a base, stage 3 ended at chance in 3 of 4 trials, on sets of 2000 to 9000
  right completions.
- Weights matter. With 0.5 for the language in place of 0.2, and a cold start at chance,
  GRPO found that a guess without working mixes no scripts, and did nothing else.

Departures from the paper. R1 sums accuracy and language (section 2.3.2); here they are
weighed, and there is a reward for the format. Its third stage adds 200k samples that are not about
reasoning (`--mix` adds the demonstrations), and filters long paragraphs and code as well; here
the format only ranks. Its last stage has prompts of its own for the preference, which is a
model's, in its last 400 of 1700 steps; here every completion gets all rewards in all
steps. Its reference is renewed every 400 updates; here it is the start of the stage.

The stage of distillation has no result here yet.

With a model, `--data` and `--verifier`, or a `--task`, give the problems, and functions are named as in
`experiments/grpo.py`. This path has been run on a tiny random model only, and has no result of its own.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table
import transformers

from grpo_jax import data, losses, models, packing, rewards, run, sampling
from grpo_jax.advantages import from_rewards
from grpo_jax.baselines.rejection_sampling import best_of_n
from grpo_jax.models import hf
from grpo_jax.policies import Policy
from grpo_jax.protocols import Reward
from grpo_jax.run import checkpoint, preemption, ranges
from grpo_jax.run.files import made_once, write_json
from grpo_jax.run.names import resolve
from grpo_jax.run.precision import ComputeDtype, compute_dtype
from grpo_jax.schedules import learning_rates
from grpo_jax.study import tables
from grpo_jax.study.rollout_means import make_rollout_means
from grpo_jax.tasks import modular_sums
from grpo_jax.train_step import make_learn, make_train_step
from grpo_jax.types import Array, Experience, Params, PRNGKey, Prompts, Rollout
from grpo_jax.updates import Updates, init_state

STAGES = ("base", "cold_start", "reasoning_rl", "rejection_sampling", "final_rl", "student", "distilled")
OF_MODELS = ("data", "task", "demonstrations", "judge", "preference", "student")  # settings without the small task
REWARDS = ("accuracy", "format", "language", "preference")  # the last one in the last stage only


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run; those that are not given are meant for the small task."""

    run_dir: pathlib.Path = pathlib.Path("runs/r1_pipeline")
    seed: int = 0

    # The problem: the small task, unless there is a model.
    model: str | None = None  # a folder, or a repository of the Hugging Face Hub
    data: pathlib.Path | None = None  # its problems: rows with a `prompt` and the columns that the verifier wants
    verifier: str = "grpo_jax.rewards:accuracy()"  # for `data`, as module:function, or module:maker()
    task: str | None = None  # or a task in place of both, such as grpo_jax.tasks.countdown:task
    demonstrations: pathlib.Path | None = None  # of the cold start: JSONL with `prompt` and `completion`
    student: str | None = None  # a smaller model of the same tokenizer, for the stage of distillation
    judge: str | None = None  # a reward function that what is kept in the third stage has to please as well
    preference: str | None = None  # the last stage's reward; unless given, right answers had better be short
    script: str = "Latin"  # of the language that is wanted, for the language reward
    chat: bool = False  # put prompts that are text through the chat template, as a user's message
    max_prompt_tokens: int = 512
    max_tokens: int = 1024  # of a completion of a model; the small task has its own
    test_rows: int = 512
    test_batch: int = 512
    compute_dtype: ComputeDtype = "auto"  # of a model: float32 on CPUs, else bfloat16; trained weights are float32

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

    bucket: int = 16  # prompts and completions are padded to a multiple of this, so that few programs compile
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    save_every: int = 50
    smoke: bool = False  # a few steps of everything, to see that it runs


Pair = tuple[list[int], list[int]]  # a prompt and its completion, with the token that ends it


class Problem(NamedTuple):
    """What the four stages need to know, of the small task and of a Hugging Face model alike."""

    policy: Policy
    load: Callable[[], Params]  # the parameters before any stage, made or read anew
    eos_ids: tuple[int, ...]
    max_tokens: int
    pretraining: list[Pair]  # what makes a base of them; nothing where they are one
    demonstrations: list[Pair]  # of the cold start
    train: np.ndarray  # rows
    test: np.ndarray  # rows
    prompts: Callable[[np.ndarray], Prompts]  # of rows
    reasoning: Reward  # accuracy, format, language
    preference: Reward
    judge: Reward | None
    text: Callable[[Sequence[int]], str]
    student: Callable[[], tuple[Policy, Params]] | None = None  # a smaller model before it learns
    tokenizer: Any = None


def train(config: Config) -> dict[str, Any]:
    """All four stages, or those that are still to be done; returns the content of `results.json`."""
    began = time.monotonic()
    check(config)
    problem = small(config) if config.model is None else pretrained(config)
    folders = {name: config.run_dir / f"{number}_{name}" for number, name in enumerate(STAGES)}
    tests: dict[str, dict[str, float]] = {}

    evaluate = functools.cache(lambda policy: make_evaluate(problem._replace(policy=policy), config))

    def finish(name: str, params: Params, policy: Policy = problem.policy) -> Params:
        """The test of a stage and its export, unless they are there."""
        folder = folders[name]
        if not (folder / "test.json").exists():
            hf.save_pretrained(policy, params, folder / "model", tokenizer=problem.tokenizer, eos_ids=problem.eos_ids)
            write_json(folder / "test.json", evaluate(policy)(params))
        tests[name] = json.loads((folder / "test.json").read_text())
        return params

    def base() -> Params:
        """The model before any stage: as it was given, or from nothing, trained once and then read."""
        params, rate = problem.load(), config.base_learning_rate
        if not problem.pretraining:
            return params
        return sft(config, problem, folders["base"], params, problem.pretraining, config.base_steps, rate=rate, key=0)

    with preemption.lock(config.run_dir):
        # ------------------------------------------------------------------- 1 cold start
        params = finish("base", base())
        folder, rate = folders["cold_start"], config.sft_learning_rate
        shown = problem.demonstrations
        params = sft(config, problem, folder, params, shown, config.cold_start_steps, rate=rate, key=1)
        params = finish("cold_start", params)

        # --------------------------------------------------- 2 GRPO: accuracy, format, language
        folder, reward = folders["reasoning_rl"], problem.reasoning
        first = {"names": REWARDS[:3], "temperature": config.temperature, "key": 2}
        params = grpo(config, problem, folder, params, config.rl_steps, reward=reward, **first)
        params = finish("reasoning_rl", params)

        # ------------------------------------- 3 rejection sampling, and SFT on its completions
        folder = folders["rejection_sampling"]
        pairs, counts = rejection_sample(config, problem, folder / "samples", params)
        if config.start == "base":
            params = base()
        elif config.start == "cold_start":
            params = checkpoint.restore_params(folders["cold_start"] / "checkpoints", params)
        pairs = [*pairs, *shown] if config.mix else pairs
        params = sft(config, problem, folder, params, pairs, config.sft_steps, rate=rate, key=3)
        params = finish("rejection_sampling", params)

        # ------------------------------------------------------- 4 GRPO: mixed rewards
        def mixed(rollout: Rollout) -> tuple[Any, Any]:
            parts = problem.reasoning(rollout), problem.preference(rollout)
            return tuple(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))

        last = {"names": REWARDS, "temperature": config.final_temperature, "key": 4}
        params = grpo(config, problem, folders["final_rl"], params, config.final_steps, reward=mixed, **last)
        finish("final_rl", params)

        # ------------------------------------------------------------------ 5 distillation
        if problem.student is not None:
            network, params = problem.student()
            smaller, texts = problem._replace(policy=network), problem.pretraining
            if texts:
                rate_of = {"rate": config.base_learning_rate, "key": 6}
                params = sft(config, smaller, folders["student"], params, texts, config.base_steps, **rate_of)
            params = finish("student", params, network)
            params = sft(config, smaller, folders["distilled"], params, pairs, config.distill_steps, rate=rate, key=7)
            finish("distilled", params, network)

        results = {"stages": tests, "rejection_sampling": counts}
        write_json(config.run_dir / "results.json", results)
    print(f"test, {len(problem.test)} problems")
    rich.print(table(results))
    drawn = "{drawn} completions drawn, {right} right, {kept} kept".format(**counts)
    print(f"rejection sampling: {drawn}\n{time.monotonic() - began:.0f} s in all")
    return results


def table(results: dict[str, Any]) -> rich.table.Table:
    """What the test says after each stage."""
    names = ("greedy/accuracy", "sampled/accuracy", "sampled/format", "sampled/language", "sampled/length")
    lines = [[stage, *(f"{tested[name]:.3f}" for name in names)] for stage, tested in results["stages"].items()]
    return tables.terminal(["stage", *names], lines)


# ------------------------------------------------------------------------------- stages


def sft(
    config: Config,
    problem: Problem,
    folder: pathlib.Path,
    params: Params,
    pairs: Sequence[Pair],
    steps: int,
    *,
    rate: float,
    key: int,
) -> Params:
    """Supervised learning of completions."""
    schedule = learning_rates.learning_rate(
        rate, steps, warmup_steps=min(20, steps // 2), decay=learning_rates.cosine, final_fraction=0.05
    )
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    updates = Updates(micro_batches=config.micro_batches, max_grad_norm=1.0)
    learn = jax.jit(make_learn(problem.policy, optimizer, loss=losses.sft(), updates=updates), donate_argnums=0)

    def batch(n: int) -> Rollout:
        rows = data.batch_indices(config.seed + key, n, len(pairs), config.sft_batch)
        return data.make_demonstrations(*zip(*(pairs[row] for row in rows), strict=True), multiple=config.bucket)

    print(f"{folder.name}: {len(pairs)} completions to learn, such as {problem.text([*pairs[0][0], *pairs[0][1]])}")
    state = init_state(params, optimizer, stage_key(config, key))
    settings = {"run_dir": folder, "save_every": config.save_every, "keys": ("loss", "grad_norm", "length")}
    with run.loop(config, state, steps=steps, **settings) as loop:
        for n in loop:
            loop.state, metrics = learn(loop.state, Experience(batch(n)))
            loop.log(metrics | {"learning_rate": schedule(n)})
    return loop.state.params


def grpo(
    config: Config,
    problem: Problem,
    folder: pathlib.Path,
    params: Params,
    steps: int,
    *,
    reward: Reward,
    names: Sequence[str],
    temperature: float,
    key: int,
) -> Params:
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

    print(f"{folder.name}: {config.prompts_per_step} prompts x {config.group_size} completions a step")
    state = init_state(params, optimizer, stage_key(config, key), reference=config.beta > 0)
    keys = ("reward", *(f"reward/{name}" for name in names), "entropy", "length")
    with run.loop(config, state, steps=steps, run_dir=folder, save_every=config.save_every, keys=keys) as loop:
        for n in loop:
            experience = step.collect(loop.state, batch(n))
            given, mask = reward(experience.rollout)
            experience = experience._replace(rewards=jnp.asarray(given), reward_mask=jnp.asarray(mask))
            loop.state, metrics = step.learn(loop.state, packing.trim(experience, multiple=config.bucket))
            loop.log(metrics | {"learning_rate": rate(n * updates.count)})
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
    parts = [reward(rollout) for reward in (problem.reasoning, problem.judge) if reward is not None]
    given, mask = (jnp.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
    weights = (*config.weights[:3], *[1.0] * (given.shape[-1] - 3))
    ranked = best_of_n(Experience(rollout, given, mask), keep=config.samples, weights=weights)  # best first
    rollout, given, mask = jax.device_get((ranked.rollout, ranked.rewards, ranked.reward_mask))
    right = mask[..., 0] & (given[..., 0] > 0.5)
    passed = right & ~rollout.truncated & mask[..., 2] & (given[..., 2] >= config.min_language)
    if problem.judge is not None:  # not judged is not approved
        passed &= mask[..., 3] & (given[..., 3] > config.judge_threshold)
    kept = []
    for b in range(len(right)):
        prompt = rollout.prompts.tokens[b, : rollout.prompts.lengths[b]].tolist()
        completions = [rollout.tokens[b, g, : rollout.lengths[b, g]].tolist() for g in np.flatnonzero(passed[b])]
        different = [list(ids) for ids in dict.fromkeys(map(tuple, completions))]
        for ids in different[: config.keep]:
            kept.append({"prompt": prompt, "completion": ids, "text": problem.text([*prompt, *ids])})
    return {"drawn": right.size, "right": int(right.sum()), "kept": kept}


def make_sampler(problem: Problem, **settings: Any) -> sampling.PolicySampler:
    """A sampler of completions of the problem."""
    return sampling.sampler(max_tokens=problem.max_tokens, eos_ids=problem.eos_ids, **settings)


def make_evaluate(problem: Problem, config: Config) -> Callable[[Params], dict[str, float]]:
    """The test of a policy: the mean of each reward, greedy and sampled at temperature 1."""
    samplers = {
        "greedy": sampling.greedy(max_tokens=problem.max_tokens, eos_ids=problem.eos_ids),
        "sampled": make_sampler(problem, group_size=1),
    }
    rows = batches(problem.test, config.test_batch)
    return make_rollout_means(problem.policy, samplers, rows, problem.prompts, problem.reasoning, REWARDS[:3])


def batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in parts of `size`, of which the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def stage_key(config: Config, stage: int) -> Array:
    """The key of a stage."""
    return jax.random.fold_in(jax.random.key(config.seed), stage)


# ----------------------------------------------------------------------- the small task

TERMS = 5
MAJORITY = modular_sums.Teacher(slip=0.4, guess=0.05, check=0.2)  # who wrote what the base is made from
TEACHER = modular_sums.Teacher(slip=0.3, check=0.5)  # who wrote the demonstrations of the cold start
WORDS = modular_sums.WORDS_OF_TWO_SCRIPTS


def llama(*, width: int) -> Policy:
    """0.1 M parameters at a width of 64, and a quarter of that at 32."""
    hf_config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=modular_sums.EOS,
    )  # fmt: skip
    return models.decoder(models.from_hf_config(hf_config))


def small(config: Config) -> Problem:
    """Sums of five digits modulo 10, and a Llama of 0.1 M parameters that is made from nothing."""
    policy = llama(width=64)
    problems_key, majority_key, teacher_key, params_key = jax.random.split(jax.random.key(config.seed), 4)
    problems = jax.device_get(modular_sums.problems(problems_key, 12_000, terms=TERMS))
    _, first = np.unique(problems.tokens, axis=0, return_index=True)
    problems = jax.tree.map(lambda x: x[np.sort(first)], problems)  # each problem once: no two splits share one
    test, taught, shown, train = np.split(np.arange(len(first)), np.cumsum([config.test_rows, 4096, 256]))

    def prompts(rows: np.ndarray) -> Prompts:
        return jax.tree.map(lambda x: jnp.asarray(x[rows]), problems)

    def demonstrate(rows: np.ndarray, teacher: modular_sums.Teacher, mixed: float, key: PRNGKey) -> list[Pair]:
        """What a teacher writes, of whose working a share of the digits is in the other script."""
        words_key, script_key = jax.random.split(key)
        written = modular_sums.demonstrations(words_key, prompts(rows), teacher)
        written = jax.device_get(modular_sums.in_two_scripts(script_key, written, mixed))
        tokens, lengths = written.tokens[:, 0], written.lengths[:, 0]
        completions = [ids[:length].tolist() for ids, length in zip(tokens, lengths, strict=True)]
        return list(zip(problems.tokens[rows].tolist(), completions, strict=True))

    def student() -> tuple[Policy, Params]:
        half = llama(width=32)
        return half, jax.jit(half.init)(jax.random.fold_in(params_key, 1))

    max_tokens = modular_sums.max_tokens(TERMS)
    accuracy, formed = modular_sums.accuracy(), modular_sums.strict_format()
    brief = rewards.tokens.cosine_length(accuracy, rewards.cosine_scale(max_tokens))
    return Problem(
        policy,
        load=lambda: jax.jit(policy.init)(params_key),
        eos_ids=(modular_sums.EOS,),
        max_tokens=max_tokens,
        pretraining=demonstrate(taught, MAJORITY, 0.3, majority_key),
        demonstrations=demonstrate(shown, TEACHER, 0.1, teacher_key),
        train=train,
        test=test,
        prompts=prompts,
        reasoning=jax.jit(rewards.traced(accuracy, formed, modular_sums.first_script())),
        preference=jax.jit(rewards.traced(brief)),
        judge=None,
        text=lambda ids: "".join(WORDS[token] for token in ids),
        student=student,
    )


# ----------------------------------------------------------------- a Hugging Face model


def pretrained(config: Config) -> Problem:
    """A model, its problems and its demonstrations, from folders, files or the Hub."""
    tokenizer = hf.load_tokenizer(config.model)
    dtype = compute_dtype(config.compute_dtype)
    load_pretrained = functools.partial(hf.load_pretrained, config.model, compute_dtype=dtype)
    policy, params = load_pretrained()
    unused = [params]  # so that the first stage need not read them again
    del params

    def with_prompt(row: data.Row) -> data.Row:
        chat = config.chat and isinstance(row["prompt"], str)
        return row | {"prompt": data.chat(row["prompt"]) if chat else row["prompt"]}

    # The test's rows first, then those to train on; nothing of the test is trained on.
    if config.task is not None:
        task = resolve(config.task)(config.seed)
        tested, trained, verifier = task.splits.test[: config.test_rows], task.splits.train, task.verifier
    else:
        rows = data.read_rows(config.data, ["prompt"])
        order = np.random.default_rng(config.seed).permutation(len(rows))
        tested, trained = ([rows[i] for i in part] for part in np.split(order, [config.test_rows]))
        verifier = resolve(config.verifier)
    tested = [with_prompt(row) for row in tested]
    held_out = {json.dumps(row["prompt"]) for row in tested}

    def not_tested(rows: Sequence[data.Row], kind: str) -> list[data.Row]:
        kept = [row for row in map(with_prompt, rows) if json.dumps(row["prompt"]) not in held_out]
        if len(kept) < len(rows):
            print(f"left out {len(rows) - len(kept)} {kind} whose prompts are in the test")
        if not kept:
            raise ValueError(f"there are no {kind} beside the test of {len(tested)}: choose --test-rows")
        return kept

    rows = [*tested, *not_tested(trained, "problems")]
    encoded = data.encode_rows(tokenizer, rows, max_prompt_tokens=config.max_prompt_tokens).prompts
    shown = not_tested(data.read_rows(config.demonstrations, ["prompt", "completion"]), "demonstrations")
    end, eos_ids = hf.completion_end(config.model, tokenizer, chat=data.has_chats([*rows, *shown]))
    demonstrations = data.encode_demonstrations(tokenizer, shown, end=end, max_prompt_tokens=config.max_prompt_tokens)

    def reward(*functions: rewards.RewardFunction) -> Reward:
        return rewards.host(functions, rows, tokenizer)

    language = rewards.language_consistency(script=config.script)
    brief = rewards.cosine_length(verifier, rewards.cosine_scale(config.max_tokens))
    return Problem(
        policy,
        load=lambda: unused.pop() if unused else load_pretrained()[1],
        eos_ids=eos_ids,
        max_tokens=config.max_tokens,
        pretraining=[],
        demonstrations=list(zip(*demonstrations, strict=True)),
        train=np.arange(len(tested), len(rows)),
        test=np.arange(len(tested)),
        prompts=lambda rows: data.make_prompts([encoded[row] for row in rows], rows, multiple=config.bucket),
        reasoning=reward(verifier, rewards.strict_format(), language),
        preference=reward(brief if config.preference is None else resolve(config.preference)),
        judge=None if config.judge is None else reward(resolve(config.judge)),
        text=tokenizer.decode,
        student=None if config.student is None else lambda: hf.load_pretrained(config.student, compute_dtype=dtype),
        tokenizer=tokenizer,
    )


def check(config: Config) -> None:
    """Refuses settings that are out of range or do not go together."""
    ranges.check(config)
    if config.model is None:
        needs = [name for name in OF_MODELS if getattr(config, name)]
        if needs:
            raise ValueError(f"{', '.join(needs)} are for a model: give --model, or leave them out")
    elif config.demonstrations is None or (config.data is None) == (config.task is None):
        raise ValueError("a model needs --demonstrations for the cold start, and its problems by --data or by --task")
    if config.group_size < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, got --group-size {config.group_size}")
    for name, size in (
        ("prompts_per_step", config.minibatches * config.micro_batches),
        ("sft_batch", config.micro_batches),
    ):
        if getattr(config, name) % size:
            raise ValueError(f"{name} = {getattr(config, name)} does not divide into {size} parts of an update")


def main(config: Config) -> dict[str, Any]:
    """`train`, or a few steps of it."""
    if config.smoke:  # stages with the same settings share their programs
        config = dataclasses.replace(
            config, base_steps=60, cold_start_steps=60, sft_steps=60, sft_learning_rate=config.base_learning_rate,
            sft_batch=32, rl_steps=4, final_steps=4, final_temperature=1.0, prompts_per_step=4, group_size=4,
            sampled_prompts=96, samples=4, distill_steps=60, test_rows=64, test_batch=64, save_every=30,
        )  # fmt: skip
    return train(config)


if __name__ == "__main__":
    run.command(main, Config, __doc__)
