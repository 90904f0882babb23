"""Evaluation of any checkpoint on a task or on your own rows: greedy accuracy, pass@k and majority@k, with intervals.

    python experiments/evaluate.py --model Qwen/Qwen2.5-0.5B-Instruct --task countdown --chat
    python experiments/evaluate.py --model runs/grpo/step_500 --data gsm8k_test.jsonl --prompt-column question \
        --answer-after "####" --chat --reward my_rewards:correct --group-size 16 --k 1 4 16 --extract my_rewards:answer

`--model` is a folder or a repository of the Hugging Face Hub, such as `best` and `step_N`
that a run exports into its folder, also of adapters, whose base is read beside them (quantised as in the run, by
`--quantize`); or a run's `checkpoints`, of which the newest is taken,
or one of them, `checkpoints/N`. Of a checkpoint the parameters are read, and the rest of the
model is what the run began from.

`--task` is a module of `grpo_jax.tasks`, or your own as `module:function`, a function
`seed -> Task`. `--data` is a file of rows (JSONL, CSV, Parquet) or a data set of the Hub,
with rewards of the signature that TRL uses, as in `grpo.py`. The first reward function, or
the task's verifier, says what is right: from `--threshold` on.

Into the folder `--output`, in place of an earlier evaluation's: `greedy.jsonl` and `samples.jsonl`, a prompt a line
with its completions, each reward and the pass rate; `summary.json`, with the settings.
With `--tools` or `--environment`, as in `grpo.py`, each completion is a conversation; its item has the `turns`, of
the policy and of the environment.
`--server` has vLLM or SGLang sample, which is given the model's weights as the folder `engine` of the output.
`--filtered` writes the rows that the model solves sometimes, to train on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import rich

from grpo_jax import data, sampling
from grpo_jax.freezing import bind
from grpo_jax.models import hf, quantized, sharding
from grpo_jax.run import checkpoint, command, files, inputs, metrics, ranges
from grpo_jax.run.conversations import ConversationSettings
from grpo_jax.run.names import resolve
from grpo_jax.run.precision import WithFloat16, compute_dtype
from grpo_jax.run.serving import ServerSettings
from grpo_jax.sampling.servers import EngineSampler
from grpo_jax.study import evaluation, items


@dataclasses.dataclass(frozen=True)
class Config(ConversationSettings, ServerSettings):
    """Settings of an evaluation."""

    model: str
    revision: str | None = None  # of a repository; a commit repeats an evaluation
    output: pathlib.Path = pathlib.Path("evaluation")

    task: str | None = None  # of grpo_jax.tasks, or your own as module:function
    task_seed: int = 0  # that of the run, or its training rows may be among those looked at
    split: str | None = None  # of the task, `test` unless given, or of a data set of the Hub
    data: str | None = None  # instead of a task
    subset: str | None = None  # of a data set of the Hub
    reward: tuple[str, ...] = ()  # as module:function, of this folder or installed; after the task's verifier
    rows: int | None = None  # the first ones only

    max_prompt_tokens: int = dataclasses.field(default=2048, kw_only=True)

    greedy: bool = True  # one likeliest completion per prompt
    group_size: int = 8  # completions per prompt beside it; 0 for none
    k: tuple[int, ...] = (1, 8)  # of pass@k and majority@k
    max_tokens: int = 512  # of a completion
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    slots: int | None = None  # decode so many completions at a time, refilled as they end; all together if not given
    stop: tuple[str, ...] = ()  # texts that end a completion, beside the end-of-sequence tokens
    extract: str | None = "grpo_jax.rewards:answer_of"  # completion -> answer, for the majority
    threshold: float = 1.0  # of the first reward, from which on a completion is right
    level: float = 0.95  # of the intervals
    seed: int = 0
    batch_size: int = 64  # prompts at a time
    compute_dtype: WithFloat16 = "auto"  # float32 on CPUs, else bfloat16
    quantize: quantized.Kind | None = None  # the base of adapters, as they were trained over it
    mesh: str | None = None  # devices to share the work, such as fsdp=8; of a whole model

    filtered: pathlib.Path | None = None  # where to write the rows whose pass rate lies between the next two
    low: float = 0.0
    high: float = 1.0
    shown: int = 4  # prompts in the table


def run(config: Config) -> dict[str, dict[str, float]]:
    """Evaluates, and returns the summaries by name: `greedy`, `samples`."""
    # Everything that can be wrong with the input is looked at before the model is loaded.
    check(config)
    rows, problems, functions = read(config)
    extract = None if config.extract is None else resolve(config.extract)
    model, adapters, checkpoints, step = locate(config.model)
    mesh = None if config.mesh is None else sharding.parse(config.mesh)
    if mesh is not None:
        if adapters is not None or checkpoints is not None:
            raise ValueError(
                f"--mesh {config.mesh} is of a whole model, a folder or a repository, and not of {config.model}"
            )
        for group_size in (*([1] if config.greedy else []), *([config.group_size] if config.group_size else [])):
            sharding.check_rows(mesh, config.batch_size, group_size)
        if config.slots is not None:
            sharding.check_slots(mesh, min(config.slots, config.batch_size * config.group_size))
    if config.quantize is not None and adapters is None:
        raise ValueError(f"--quantize {config.quantize} is of the base of adapters, and {config.model} has none")
    tokenizer = hf.load_tokenizer(model, revision=config.revision)
    chats = config.has_chats(problems)
    also = sorted(set() if adapters is None else hf.adapter_ends(adapters))
    if checkpoints is not None and (eos := checkpoint.read_meta(checkpoints, step=step)[1]["config"].get("eos")):
        also.append(tokenizer.convert_tokens_to_ids(eos))  # of sft.py --eos
    eos_ids = hf.eos_ids(model, tokenizer, chat=chats, template=config.template, also=also, revision=config.revision)
    as_read = dict(zip(map(id, problems), rows, strict=True))
    talk = config.talk(tokenizer, problems)
    problems = config.encode(tokenizer, problems)
    inputs.check_arguments(functions, problems.rows, prompt_column=config.prompt_column)
    inputs.check_tokens(
        model, tokenizer, problems.prompts, max_tokens=config.max_tokens, revision=config.revision, rows=problems.rows
    )
    config.output.mkdir(parents=True, exist_ok=True)
    if config.filtered is not None:
        as_lines(rows)
        config.filtered.parent.mkdir(parents=True, exist_ok=True)
    dtype = compute_dtype(config.compute_dtype, float16=True)
    about: dict[str, Any] = {"mesh": mesh}
    if adapters is not None:  # their base is held as in training
        about |= {"dtype": dtype, "quantize": config.quantize}
    policy, params = hf.load_pretrained(model, compute_dtype=dtype, revision=config.revision, **about)
    if adapters is not None:
        params = bind(*hf.load_adapters(policy, params, adapters))
    if checkpoints is not None:
        like = jax.eval_shape(lambda tree: tree, params)
        del params  # before as much is read again
        params = checkpoint.restore_params(checkpoints, like, step=step)
        print(f"the parameters of step {step} in {checkpoints}")

    stop = sampling.stop_strings(tokenizer, config.stop) if config.stop else None
    common: dict[str, Any] = {"max_tokens": config.max_tokens, "eos_ids": eos_ids, "stop": stop}
    samplers: dict[str, Any] = {"greedy": sampling.greedy(**common)} if config.greedy else {}
    if config.group_size:
        drawn = sampling.sampler(
            group_size=config.group_size, temperature=config.temperature,
            top_k=config.top_k, top_p=config.top_p, min_p=config.min_p, **common,
        )  # fmt: skip
        samplers["samples"] = dataclasses.replace(drawn, slots=config.slots)
    served = config.serve(
        [*samplers.values()][-1], stop=config.stop, model=model, tokenizer=tokenizer,
        folder=config.output / "engine", adapters=adapters is not None,
    )  # fmt: skip
    if isinstance(served, EngineSampler):
        samplers = {name: dataclasses.replace(served, drawing=drawing) for name, drawing in samplers.items()}
    evaluates = {
        name: evaluation.make_evaluate(
            policy, sampler, tokenizer, problems, functions,
            prompt_column=config.prompt_column, batch_size=config.batch_size, bucket=config.bucket,
            talk=talk,
        )
        for name, sampler in samplers.items()
    }  # fmt: skip
    scored, summaries = {}, {}
    for written in ("greedy.jsonl", "samples.jsonl", "summary.json"):  # of an earlier evaluation, of another model
        (config.output / written).unlink(missing_ok=True)
    for name, evaluate in evaluates.items():
        sampled = name == "samples"
        scored[name] = evaluate(params, seed=config.seed)
        items.write_items(config.output / f"{name}.jsonl", scored[name])  # whatever --extract raises
        scored[name] = items.mark_right(scored[name], threshold=config.threshold, extract=extract if sampled else None)
        items.write_items(config.output / f"{name}.jsonl", scored[name])
        k = config.k if sampled else ()
        summaries[name] = items.summarise(scored[name], k=k, level=config.level, seed=config.seed)

    for name, summary in summaries.items():
        rich.print(items.sample_table(scored[name], config.shown))
        print(f"{name}, {len(scored[name])} prompts:\n{report(summary)}")
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    content = {"config": settings} | {name: metrics.plain(summary) for name, summary in summaries.items()}
    files.write_text(config.output / "summary.json", json.dumps(content, indent=2) + "\n")
    print(f"items and summary: {config.output}")
    if config.filtered is not None:
        rates = items.pass_rates(scored["samples"])
        between = items.between(
            [as_read[id(problem)] for problem in problems.rows], rates, low=config.low, high=config.high
        )
        files.write_text(config.filtered, as_lines(between))
        print(f"{len(between)} of {len(rates)} rows have a pass rate between {config.low} and {config.high}: "
              f"{config.filtered}")  # fmt: skip
    return summaries


def check(config: Config) -> None:
    """Refuses settings that are out of range or do not go together."""
    ranges.check(config, group_size=0)
    if not 0 < config.level < 1:
        raise ValueError(f"--level is between 0 and 1, got {config.level}")
    if not config.low < config.high:
        raise ValueError(f"--low is below --high, got {config.low} and {config.high}")
    if (config.task is None) == (config.data is None):
        raise ValueError("what to evaluate on is either --task or --data")
    if config.task is None and not config.reward:
        raise ValueError("--data needs a --reward, as module:function, which says what is right")
    if not config.greedy and not config.group_size:
        raise ValueError("nothing to do: neither --greedy nor --group-size")
    if config.group_size and (wrong := [k for k in config.k if not 1 <= k <= config.group_size]):
        raise ValueError(f"--k is from 1 to --group-size {config.group_size}, got {wrong[0]}")
    if config.filtered is not None:
        if config.group_size < 2:
            raise ValueError("--filtered goes by the pass rate of several completions: --group-size is at least 2")
        if config.filtered.is_dir():
            raise ValueError(f"--filtered {config.filtered} is a folder: name a file")
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"--output {config.output} is a file: name a folder")
    for flag, path in (("--output", config.output), ("--filtered", config.filtered)):
        if path is not None and not files.is_writable(path, folder=flag == "--output"):
            raise ValueError(f"{flag} {path} cannot be written")
    if not config.group_size:
        ranges.tell_unused(config, ["temperature", "top_k", "top_p", "min_p", "slots", "k"], without="a --group-size")
    if config.filtered is None:
        ranges.tell_unused(config, ["low", "high"], without="--filtered")
    folder = pathlib.Path(config.model)
    models = sorted(path.parent.name for name in ("config", "adapter_config") for path in folder.glob(f"*/{name}.json"))
    models += ["checkpoints"] if any(folder.glob("checkpoints/*/meta")) else []
    if models and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is the folder of a run; evaluate one of the models in it: {', '.join(models)}")


def locate(model: str) -> tuple[str, pathlib.Path | None, pathlib.Path | None, int | None]:
    """The model to load; the folder of its adapters, and the folder and step of a checkpoint, where there are any."""
    folder, step = pathlib.Path(model), None
    if (settings := folder / "adapter_config.json").is_file():
        if (base := json.loads(settings.read_text()).get("base_model_name_or_path")) is None:
            raise ValueError(f"{settings} names no base model: write its folder there, as base_model_name_or_path")
        return base, folder, None, None
    if folder.name.isdigit() and (folder / "meta").is_dir():
        folder, step = folder.parent, int(folder.name)
    elif not any(folder.glob("[0-9]*/meta")):
        return model, None, None, None
    step, meta = checkpoint.read_meta(folder, step=step)
    if "model" not in meta.get("config", {}):
        raise ValueError(f"the checkpoints in {folder} do not say which model they began from; evaluate an export")
    if meta["config"].get("lora_rank") is not None:
        raise ValueError(f"the checkpoints in {folder} are of adapters, without their base; evaluate an export")
    return meta["config"]["model"], None, folder, step


def read(config: Config) -> tuple[list[data.Row], list[data.Row], list[Callable[..., Any]]]:
    """The rows as they are, as rewards see them, and the rewards, of which the first says what is right."""
    functions = [resolve(name) for name in config.reward]
    if config.task is not None:
        name = config.task if ":" in config.task else f"grpo_jax.tasks.{config.task}:task"
        task = resolve(name)(config.task_seed)
        split = config.split or "test"
        if split not in task.splits._fields:
            raise ValueError(f"{config.task} has the splits {', '.join(task.splits._fields)}, not {split!r}")
        rows = problems = getattr(task.splits, split)
        functions = [task.verifier, *functions]
    else:
        problems = config.read(config.data, split=config.split, subset=config.subset)
        rows = data.read_rows(config.data, split=config.split, subset=config.subset)
    if config.task is not None and config.prompt_column != "prompt":
        raise ValueError(f"the prompt's column of a task is `prompt`, got --prompt-column {config.prompt_column}")
    for group_size in (*([1] if config.greedy else []), *([config.group_size] if config.group_size else [])):
        inputs.check_rewards(functions, group_size=group_size)
    return rows[: config.rows], problems[: config.rows], functions


def as_lines(rows: list[data.Row]) -> str:
    """Rows as JSON Lines."""
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(json.dumps(row) + "\n")
        except TypeError as error:
            raise ValueError(f"--filtered writes JSON, which row {number} cannot be: {error}") from error
    return "".join(lines)


def report(summary: dict[str, float]) -> str:
    """A line a number, with its interval where it has one."""
    lines = []
    for name, value in summary.items():
        if f"{name}_low" in summary:
            lines.append(f"  {name} {value:.4f} [{summary[f'{name}_low']:.4f}, {summary[f'{name}_high']:.4f}]")
        elif not name.endswith(("_low", "_high")):
            lines.append(f"  {name} {value:.4g}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(run, Config, __doc__)
