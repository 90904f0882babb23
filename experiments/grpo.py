"""GRPO of a Hugging Face model on your own prompts, with your own reward functions.

    python experiments/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k.jsonl \
        --prompt-column question --answer-after "####" --chat --reward my_rewards:correct

`--model` is a folder or a repository of the Hugging Face Hub. `--data` is JSONL, CSV or Parquet: a
prompt a line, as text or as chat messages, with any other columns. `--reward` names
functions as `module:function`, with the signature that TRL uses:

    def correct(prompts, completions, answer, **kwargs) -> list[float | None]

and as `module:maker()` what makes one, such as `grpo_jax.rewards:accuracy()`.

The loop below is all there is: `collect` samples (one program), the rewards are
computed here on the host, and `learn` trains (another program). A batch that a reward
function raises on is masked, with a warning and the metric `<name>/failed`; the run ends at the
`--stop-after-failed`th in a row. The state is saved every few steps and on the way out; the same
command goes on where the run stopped. The model is exported as a Hugging Face folder
every `--export-every` steps and whenever the evaluation is the best so far.

With `--overlap` the next batch is sampled while the rewards of this one are computed,
for verifiers that keep the device waiting. That batch then comes from the policy before
the update, which the ratio takes into account. No batch is in flight at the checkpoints
of `--save-every`; one that is when the run ends between two of them is written beside the
state, to `in_flight_N.npz` for step N. So a run goes on to the same bits, killed or stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from grpo_jax import advantages, data, losses, packing, protocols, rewards, sampling, statistics, types
from grpo_jax.models import hf
from grpo_jax.run import checkpoint, compilation, display, memory, metrics, monitoring, plots, preemption
from grpo_jax.run import measured as measured_metrics
from grpo_jax.run import writers as writers_of
from grpo_jax.study import evaluation
from grpo_jax.train_step import make_collect, make_learn
from grpo_jax.types import Params
from grpo_jax.updates import Updates, init_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    model: str
    data: pathlib.Path
    reward: tuple[str, ...]  # as module:function, of this folder or installed
    run_dir: pathlib.Path = pathlib.Path("runs/grpo")
    reward_weights: tuple[float, ...] | None = None  # one a function; 1 each if not given

    prompt_column: str = "prompt"
    answer_column: str | None = None  # passed to the rewards as `answer` as well
    answer_after: str | None = None  # keep of the answer only what follows the last of these, as "####" in GSM8K
    chat: bool = False  # put prompts that are text through the chat template, as a user's message
    system: str | None = None  # a system message before each prompt; implies --chat
    max_prompt_tokens: int = 512
    too_long: data.TooLong = "refuse"  # what to do with longer prompts
    bucket: int = 64  # prompts are padded to a multiple of this, so that few programs compile

    loss: str = "grpo"  # of grpo_jax.losses, or your own as module:function
    advantage: str = "group_advantages"  # of grpo_jax.advantages, or your own as module:function
    epsilon: float | None = None  # the loss's own, if not given
    epsilon_high: float | None = None
    beta: float = 0.0  # weight of the KL term (k3); above 0, the first policy is kept as the reference

    steps: int = 500
    prompts_per_step: int = 16
    group_size: int = 8
    max_tokens: int = 512  # of a completion
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    passes: int = 1  # over each rollout
    minibatches: int = 1  # updates in a pass
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    memory_gib: float | None = None  # of the device: in place of --micro-batches, the fewest with which a step fits
    completion_bucket: int = 256  # to learn, completions are cut to the longest, up to a multiple of this
    pack: bool = False  # and several are laid into a row of such a length; more programs, less padding
    learning_rate: float = 1e-6
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # trained weights are float32 in any case
    attention: str = "auto"  # of grpo_jax.models.attention (cudnn, splash, ...), or module:function

    eval_data: pathlib.Path | None = None
    eval_rows: int = 0  # without --eval-data: held out of the data
    eval_batch: int = 64
    evaluate_every: int = 50
    save_every: int = 50
    export_every: int | None = None
    tensorboard: bool = False
    wandb: str | None = None  # the project to log to
    stop_after_skipped: int = 5  # updates in a row that were not finite
    stop_after_failed: int = 3  # batches in a row that a reward function raised on; 1 stops at once
    profile: bool = False  # write a trace of the second step and the next two into the run's folder, for xprof
    overlap: bool = False  # sample the next batch while this one is rewarded, from the policy before the update


def run(config: Config) -> Params:
    """Trains; returns the trained parameters."""
    # Everything that can be wrong with the input is looked at before the model is loaded.
    functions = [load(name.removesuffix("()"))() if name.endswith("()") else load(name) for name in config.reward]
    functions = [rewards.skip_failed_batches(function, batches=config.stop_after_failed) for function in functions]
    names = [rewards.name_of(function) for function in functions]
    check(config, names)
    loss = make_loss(config)
    attention = load(config.attention, "grpo_jax.models.attention")
    tokenizer = hf.load_tokenizer(config.model)
    eos_ids = hf.eos_ids(config.model, tokenizer)
    train_rows, eval_rows = read_rows(config)
    train_prompts, train_rows = encode(tokenizer, train_rows, config)
    eval_prompts, eval_rows = encode(tokenizer, eval_rows, config) if eval_rows else ([], [])
    logged: dict[str, list[float]] = {}  # what reward functions log of a step
    reward = rewards.host(
        functions, train_rows, tokenizer, eos_ids=eos_ids, prompt_column=config.prompt_column,
        log_metric=lambda name, value: logged.setdefault(name, []).append(float(value)),
    )  # fmt: skip
    advantage = advantages.from_rewards(
        load(config.advantage, "grpo_jax.advantages"), weights=config.reward_weights, names=names
    )

    with preemption.lock(config.run_dir), preemption.graceful_stop() as stop_requested:
        policy, params = hf.load_pretrained(
            config.model, compute_dtype=jnp.dtype(config.compute_dtype), attention=attention
        )
        learning_rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        optimizer = optax.adamw(learning_rate, b2=0.99, weight_decay=config.weight_decay)
        sampling_settings = {"max_tokens": config.max_tokens, "eos_ids": eos_ids}
        score_old = config.overlap or config.passes * config.minibatches > 1
        micro_batches = config.micro_batches
        if config.memory_gib is not None:
            longest = max(map(len, train_prompts))
            planned = functools.partial(
                memory.plan, policy, optimizer, loss=loss, prompts=config.prompts_per_step,
                group_size=config.group_size, prompt_tokens=-(-longest // config.bucket) * config.bucket,
                max_tokens=config.max_tokens, reference=config.beta > 0, minibatches=config.minibatches,
                score_old=score_old,
            )  # fmt: skip
            micro_batches = memory.fewest_micro_batches(
                lambda parts: planned(micro_batches=parts).peak,
                config.prompts_per_step // config.minibatches,
                int(config.memory_gib * 2**30),
            )
            print(f"micro-batches with which a step fits into {config.memory_gib} GiB: {micro_batches}")
        collect = jax.jit(
            make_collect(
                policy,
                sampling.sampler(
                    **sampling_settings,
                    group_size=config.group_size,
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                ),
                score_old=score_old,
                score_parts=config.minibatches * micro_batches,
            )
        )
        learn = jax.jit(
            make_learn(
                policy,
                optimizer,
                loss=loss,
                advantage=advantage,
                transforms=(measured_metrics.repetition(), measured_metrics.unscored(names)),
                temperature=config.temperature,
                updates=Updates(
                    iterations=config.passes,
                    minibatches=config.minibatches,
                    micro_batches=micro_batches,
                    max_grad_norm=config.max_grad_norm,
                ),
            ),
            donate_argnums=0,
            compiler_options=compilation.cpu_memory_options(),
        )

        def collect_batch(state: types.TrainState, n: int) -> types.Experience:
            """The batch of step `n`, with the policy of `state`; under way when this returns."""
            rows = data.batch_indices(config.seed, n, len(train_prompts), config.prompts_per_step)
            prompts = data.make_prompts([train_prompts[row] for row in rows], rows, multiple=config.bucket)
            return collect(state._replace(step=jnp.int32(n)), prompts)

        def evaluate(params: Params) -> dict[str, float]:
            """Mean rewards of the likeliest completions of the evaluation split; NaN where a reward failed on some."""
            failed = []
            summary, _ = evaluation.evaluate(
                policy, params, tokenizer, eval_rows, functions, prompts=eval_prompts, greedy=True,
                prompt_column=config.prompt_column, batch_size=config.eval_batch, bucket=config.bucket,
                log_metric=lambda name, value: failed.append(name.endswith("/failed") and value > 0),
                **sampling_settings,
            )  # fmt: skip
            means = {name: summary[f"reward/{name}"] for name in names}
            total = float(np.dot(config.reward_weights or np.ones(len(names)), list(means.values())))
            total = np.nan if any(failed) else total
            return {"eval/reward": total} | {f"eval/{name}": mean for name, mean in means.items()}

        # ------------------------------------------------------------------ the run, from its newest checkpoint
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        state = init_state(params, optimizer, jax.random.key(config.seed), reference=config.beta > 0)
        del params
        with checkpoint.manager(config.run_dir / "checkpoints") as checkpoints:
            if (found := checkpoint.restore(checkpoints, state)) is not None:
                state, meta = found
                allowed = ["run_dir", "steps", "export_every", "tensorboard", "wandb", "profile"]
                allowed += ["stop_after_skipped", "stop_after_failed"]
                if not config.overlap:  # there, it says which batches are sampled ahead
                    allowed.append("save_every")
                checkpoint.check_config(meta["config"], settings, allow=allowed)
                print(f"resumed at step {int(state.step)} of {config.steps}")
            first = int(state.step)
            metrics.truncate(config.run_dir, first)
            history = metrics.read(config.run_dir) if first else []
            evaluated = [line["eval/reward"] for line in history if line.get("eval/reward") is not None]
            best = max(evaluated, default=-np.inf)
            writers = [writers_of.tensorboard(config.run_dir, purge_step=first).metrics] if config.tensorboard else []
            if config.wandb is not None:
                run_id = hashlib.sha256(str(config.run_dir.absolute()).encode()).hexdigest()[:16]
                writers.append(
                    writers_of.wandb(project=config.wandb, id=run_id, resume="allow", config=settings).metrics
                )
            if eval_prompts and first == 0:
                print("before training:", {name: round(value, 4) for name, value in evaluate(state.params).items()})

            keys = ("reward", *(f"reward/{name}" for name in names), "eval/reward", "kl", "entropy", "length")
            skipped_in_a_row, ahead, before = 0, None, time.monotonic()
            programs = compilation.count_compilations()
            if (path := config.run_dir / f"in_flight_{first}.npz").exists():
                like = jax.eval_shape(functools.partial(collect_batch, n=first), state)
                with np.load(path) as file:
                    ahead = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(file[name]) for name in file])
            with display.progress(config.steps, start=first, keys=keys) as show, contextlib.ExitStack() as tracing:
                for n in range(first, config.steps):
                    started = time.monotonic()
                    if config.profile and n == first + 1:
                        tracing.enter_context(jax.profiler.trace(config.run_dir / "trace"))
                    if n == first + 4:
                        tracing.close()
                    last = n + 1 == config.steps
                    saving = last or (n + 1) % config.save_every == 0
                    experience = collect_batch(state, n) if ahead is None else ahead
                    ahead = collect_batch(state, n + 1) if config.overlap and not saving else None
                    jax.block_until_ready(experience)
                    sampled = time.monotonic()
                    try:
                        given, mask = reward(experience.rollout)
                    except Exception:
                        save(checkpoints, state, settings, experience if config.overlap else None, "a reward failed")
                        raise
                    if any(logged.get(f"{name}/failed", [0.0])[-1] for name in names):
                        mask = np.zeros_like(mask)  # nothing is learned from the rewards that did not fail alone
                    rewarded = time.monotonic()
                    experience = experience._replace(rewards=given, reward_mask=mask)
                    experience = packing.trim(experience, multiple=config.completion_bucket)
                    if config.pack:
                        laid = packing.pack(experience.rollout, multiple=config.completion_bucket)
                        experience = experience._replace(packing=laid)
                    state, measured = learn(state, experience)
                    measured = jax.device_get(statistics.summary(measured))
                    measured = {name: float(np.mean(values)) for name, values in logged.items()} | measured
                    logged.clear()
                    learned = time.monotonic()

                    exported = {"tokenizer": tokenizer, "eos_ids": eos_ids}
                    if last or (config.export_every and (n + 1) % config.export_every == 0):
                        folder = config.run_dir / f"step_{n + 1}"
                        hf.save_pretrained(policy, state.params, folder, **exported)
                    if eval_prompts and ((n + 1) % config.evaluate_every == 0 or last):
                        try:
                            measured |= evaluate(state.params)
                        except Exception:
                            metrics.append(config.run_dir, n, measured)
                            save(checkpoints, state, settings, ahead, "a reward failed")
                            raise
                        if measured["eval/reward"] > best:
                            best = measured["eval/reward"]
                            hf.save_pretrained(policy, state.params, config.run_dir / "best", **exported)
                    tokens = int(np.sum(experience.rollout.lengths))
                    timing = {  # under --overlap, the sampling of the next batch goes on within `reward` and `learn`
                        "sample": sampled - started,
                        "reward": rewarded - sampled,
                        "learn": learned - rewarded,
                        "host": started - before,  # what came after the step before: evaluation, logging, saving
                        "tokens_per_second": tokens / (learned - started),
                        "programs": programs(),  # compiled so far
                    }
                    before = learned
                    metrics.append(config.run_dir, n, measured, timing)
                    history.append({"step": n} | metrics.plain(measured))
                    for warning in monitoring.warnings(history):
                        print(f"step {n + 1}: {warning}")
                    for write in writers:
                        write(n, measured)
                    show(n, measured, timing["tokens_per_second"])
                    skipped_in_a_row = skipped_in_a_row + 1 if measured["skipped"] == 1 else 0
                    if skipped_in_a_row >= config.stop_after_skipped:
                        save(checkpoints, state, settings, ahead, "updates are not finite")
                        raise FloatingPointError(
                            f"the last {skipped_in_a_row} updates were not finite and were not applied; lower the "
                            "learning rate, or look at the metrics of the steps before"
                        )
                    stopping = stop_requested()
                    if saving or stopping:
                        save(checkpoints, state, settings, ahead)
                    if stopping and not last:
                        raise SystemExit(f"stopped after step {n + 1}; the same command goes on from there")
        if first < config.steps:
            print(f"curves: {plots.plot(config.run_dir)}\nmodel: {config.run_dir / f'step_{config.steps}'}")
    return state.params


def load(name: str, package: str | None = None) -> Callable[..., Any]:
    """The function called `module:function`, or `function` of the given package."""
    module, _, function = name.rpartition(":")
    if not module and package is None:
        raise ValueError(f"a function is named module:function, got {name!r}")
    if str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, str(pathlib.Path.cwd()))
    found = getattr(importlib.import_module(module or package), function, None)
    if not callable(found):
        raise ValueError(f"{module or package} has no function {function!r}")
    return found


def check(config: Config, names: Sequence[str]) -> None:
    """Refuses settings that do not go together."""
    if len(set(names)) < len(names):
        raise ValueError(f"reward functions have one name each, got {', '.join(names)}")
    if config.reward_weights is not None and len(config.reward_weights) != len(names):
        raise ValueError(f"{len(config.reward_weights)} weights for {len(names)} reward functions")
    if config.prompts_per_step % (config.minibatches * config.micro_batches):
        raise ValueError(
            f"{config.prompts_per_step} prompts do not divide into {config.minibatches} minibatches of "
            f"{config.micro_batches} micro-batches: choose --prompts-per-step or --micro-batches"
        )
    if config.memory_gib is not None and config.micro_batches != 1:
        raise ValueError(f"--memory-gib chooses the micro-batches, so give no --micro-batches {config.micro_batches}")
    if config.pack and config.attention in ("cudnn", "splash"):
        raise ValueError(f"--attention {config.attention} cannot keep packed completions apart: leave out --pack")
    if config.group_size < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, got --group-size {config.group_size}")


def make_loss(config: Config) -> protocols.Loss:
    """The loss by its name, with the settings that were given; its own defaults for the rest."""
    make = load(config.loss, "grpo_jax.losses")
    given = {
        "epsilon": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "penalty": losses.k3(config.beta) if config.beta else None,
    }
    given = {name: setting for name, setting in given.items() if setting is not None}
    known = inspect.signature(make).parameters
    if "max_tokens" in known:
        given["max_tokens"] = config.max_tokens
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if unknown := set(given) - set(known) - ({"penalty"} if takes_any else set()):
        raise ValueError(f"the loss {config.loss} has no setting {', '.join(sorted(unknown))}")
    return make(**given)


def read_rows(config: Config) -> tuple[list[data.Row], list[data.Row]]:
    """The rows to train on and those to evaluate on."""
    answer = config.answer_column or ("answer" if config.answer_after else None)
    columns = [config.prompt_column, *([answer] if answer else [])]
    rows = data.read_rows(config.data, columns)
    held_out = data.read_rows(config.eval_data, columns) if config.eval_data else []
    if config.eval_rows and not held_out:
        if config.eval_rows >= len(rows):
            raise ValueError(f"--eval-rows {config.eval_rows} leaves none of the {len(rows)} rows to train on")
        order = np.random.default_rng(config.seed).permutation(len(rows))
        held_out = [rows[i] for i in order[: config.eval_rows]]
        rows = [rows[i] for i in order[config.eval_rows :]]
    if answer:
        for row in [*rows, *held_out]:
            text = row[answer]
            row["answer"] = text.rpartition(config.answer_after)[2].strip() if config.answer_after else text
    return rows, held_out


def encode(tokenizer: Any, rows: list[data.Row], config: Config) -> tuple[list[list[int]], list[data.Row]]:
    """The prompts as tokens, and their rows, less those that are too long."""

    def prompt(row: data.Row) -> data.Text:
        text = row[config.prompt_column]
        if config.system is None and not config.chat:
            return text
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        return messages if config.system is None else [{"role": "system", "content": config.system}, *messages]

    prompts = [data.encode_prompt(tokenizer, prompt(row)) for row in rows]
    kept = data.limit_prompts(prompts, config.max_prompt_tokens, too_long=config.too_long)
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} of {len(rows)} prompts, longer than {config.max_prompt_tokens} tokens")
    return [prompts[i] for i in kept], [rows[i] for i in kept]


def save(
    checkpoints: Any, state: types.TrainState, settings: dict[str, Any], ahead: types.Experience | None, why: str = ""
) -> None:
    """Saves the state, unless this step is saved already, with the batch in flight."""
    folder = pathlib.Path(checkpoints.directory).parent
    in_flight = folder / f"in_flight_{int(state.step)}.npz"
    if ahead is not None:  # before the state, which then never is without its batch
        np.savez(folder / "half_written.npz", *jax.tree.leaves(ahead))
        os.replace(folder / "half_written.npz", in_flight)
    with contextlib.suppress(FileExistsError):
        checkpoint.save(checkpoints, state, {"config": settings})
    kept = {folder / f"in_flight_{step}.npz" for step in checkpoints.all_steps()}
    for path in set(folder.glob("in_flight_*.npz")) - kept:
        path.unlink()
    if why:
        print(f"{why}; the state of step {int(state.step)} is saved in {checkpoints.directory}")


if __name__ == "__main__":
    compilation.enable_compilation_cache()
    compilation.trim_malloc()
    run(tyro.cli(Config, description=__doc__))
