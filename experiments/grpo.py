"""GRPO of a Hugging Face model on your own prompts, with your own reward functions.

    python experiments/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k.jsonl \
        --prompt-column question --answer-after "####" --chat --reward my_rewards:correct

`--model` is a folder or a repository of the Hugging Face Hub. `--data` is JSONL, CSV or Parquet: one prompt per line,
as text or as chat messages, with any other columns. `--reward` names functions as `module:function`, as TRL's:

    def correct(prompts, completions, answer, **kwargs) -> list[float | None]

and as `module:maker(...)` a function that a maker returns, such as `grpo_jax.rewards:accuracy()`.

The algorithm is the loop below: `collect` samples (one program), the rewards are computed on the host, and `learn`
trains (another program). A batch that a reward function raises on is masked, with a warning and the metric
`<name>/failed`; the run ends at the `--stop-after-failed`th in a row. The state is saved every few steps and on the way
out; the same command goes on where the run stopped, to the same bits. The model is exported as a Hugging Face folder
every `--export-every` steps, after the last one, and to `best` whenever the evaluation is better than ever before.

`--lora-rank 16` trains adapters in place of the weights, and `--quantize nf4` holds the weights in 4 bits meanwhile.
`--export adapters` writes a folder that PEFT reads, in place of a whole model.

`--tools my_tools:weather calculator` lets the policy call functions in the words of its chat template, and
`--environment my_game:respond` lets it talk with an environment, for `--max-turns` turns (`grpo_jax.tools`,
`grpo_jax.environments`). Rewards then see whole conversations, and `grpo_jax.rewards:environment` is the environment's.

`--mesh data=2,fsdp=4` divides all of it over eight devices: rows over both, the weights and the optimiser's state over
`fsdp`. A run is resumed on another mesh, too, where it goes on to rounding. Where the devices are those of several
processes, the same command is given in each, with `--coordinator HOST:PORT --processes 2 --process-id 0` (and 1), or
with `--coordinator cluster` where Slurm, Open MPI, Kubernetes or Cloud TPUs started them.

With `--overlap` the next batch is sampled while the rewards of this one are computed, for verifiers that keep the
device waiting. It then comes from the policy before the update, which the ratio takes into account.
"""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import advantages, data, losses, packing, rewards, run, sampling
from grpo_jax.freezing import bind
from grpo_jax.models import hf, quantized, sharding
from grpo_jax.models.settings import WeightSettings
from grpo_jax.protocols import Advantage, Loss
from grpo_jax.run import completions, digests, inputs, measured, memory, metrics, overlap
from grpo_jax.run.conversations import ConversationSettings
from grpo_jax.run.names import make_with, resolve
from grpo_jax.run.precision import ComputeDtype, compute_dtype
from grpo_jax.run.together import ProcessSettings
from grpo_jax.schedules import Scheduled, learning_rates, loss_scale, running_advantages
from grpo_jax.schedules.running_advantages import RunningAdvantage
from grpo_jax.study.evaluation import make_mean_rewards
from grpo_jax.train_step import followed_by, make_train_step
from grpo_jax.types import Experience, Metrics, Params, TrainState
from grpo_jax.updates import Updates, init_state

MAY_CHANGE = (  # of a run that is resumed
    *("steps", "save_every", "export", "export_every", "show_every", "tensorboard", "wandb", "profile"),
    *("stop_after_skipped", "stop_after_failed", "reward_timeout", "answer_timeout"),
    *("environment_workers", "mesh", "coordinator", "processes", "process_id"),
)


@dataclasses.dataclass(frozen=True)
class Config(ConversationSettings, WeightSettings, ProcessSettings):
    """Settings of a run."""

    model: str
    data: pathlib.Path
    reward: tuple[str, ...]  # as module:function, of this folder or installed
    run_dir: pathlib.Path = pathlib.Path("runs/grpo")
    reward_weights: tuple[float, ...] | None = None  # one per function; 1 each if not given
    held_out: tuple[str, ...] = ()  # verifiers that nothing is learned from, as --reward: held_out/<name> tells hacking
    held_out_every: int = 10  # steps between the batches that they are asked about
    reward_timeout: float = 300.0  # seconds after which a reward function that has not returned is reported

    loss: str = "grpo"  # of grpo_jax.losses, or your own as module:function
    advantage: str = "group_advantages"  # of grpo_jax.advantages, or your own as module:function; see from_function
    # or spo or rae, of schedules.running_advantages: a running baseline per prompt
    baseline_column: str | None = None  # of spo and rae: prompts of one value in it, such as a role, share a baseline
    baseline_decay: float | None = None  # of spo and rae: their own, if not given
    transform: tuple[str, ...] = ()  # of grpo_jax.transforms, such as "top_entropy(0.2)", in this order
    score_old: bool = False  # the policy that sampled, for what asks for it; measures its gap to the sampler, too
    epsilon: float | None = None  # the loss's own, if not given
    epsilon_high: float | None = None
    beta: float = 0.0  # weight of the KL term (k3); above 0, the first policy is kept as the reference

    load_balance: float = 0.0  # weight of the balance of loads in a mixture of experts
    record_experts: bool = False  # tokens are scored by the experts that they were sampled by (router replay)

    steps: int = 500
    prompts_per_step: int = 16
    group_size: int = 8
    max_tokens: int = 512  # of a completion
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    replay_truncation: bool = True  # score under top-k, top-p and min-p, too; TRL and verl do not
    stop: tuple[str, ...] = ()  # texts that end a completion, such as "</answer>", beside the end-of-sequence tokens
    iterations: int = 1  # over each rollout
    minibatches: int = 1  # updates in an iteration
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    memory_gib: float | None = None  # of the device: in place of --micro-batches, the fewest with which a step fits
    completion_bucket: int = 256  # to learn, completions are cut to the longest, up to a multiple of this
    pack: bool = False  # and several are laid into a row of such a length; more programs, less padding
    learning_rate: float | None = None  # 1e-6 of whole weights and 1e-5 of adapters, if not given
    warmup_steps: int = 10
    decay: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate after the warm-up
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    compute_dtype: ComputeDtype = "auto"  # float32 on CPUs, else bfloat16; trained weights are float32 in any case
    sample_weights: Literal["int8", "fp8"] | None = None  # sample from a copy of 8 bits; see --score-old, --loss dppo
    attention: str = "auto"  # of grpo_jax.models.attention (cudnn, splash, ...), or module:function
    mesh: str | None = None  # devices to share the work, such as data=2,fsdp=4; see grpo_jax.models.sharding

    eval_data: pathlib.Path | None = None
    eval_rows: int = 0  # without --eval-data: held out of the data
    eval_batch: int = 64
    eval_group_size: int | None = None  # sample so many completions of each prompt; otherwise one likeliest completion
    evaluate_every: int = 50
    save_every: int = 50
    export_every: int | None = None
    show_every: int = 10  # steps between the completions that are shown; 0 shows none
    tensorboard: bool = False
    wandb: str | None = None  # the project to log to
    stop_after_skipped: int = 5  # updates in a row that were not finite
    stop_after_failed: int = 3  # batches in a row that a reward function raised on; 1 stops at once
    profile: bool = False  # write a trace of the second step and the next two into the run's folder, for xprof
    overlap: bool = False  # sample the next batch while this one is rewarded, from the policy before the update


def main(config: Config) -> None:
    """Trains, together with other processes where there are some."""
    with config.joined():
        train(config)


def train(config: Config) -> Params:
    """Trains; returns the trained parameters."""
    # Everything that can be wrong with the input is looked at before the weights are read.
    mesh = None if config.mesh is None else sharding.parse(config.mesh)
    updates = check(config, mesh)
    functions = [resolve(name) for name in config.reward]
    verifiers = [resolve(name) for name in config.held_out]
    names = [rewards.name_of(function) for function in functions]
    group_size = (config.eval_group_size or 1) if config.eval_data or config.eval_rows else None
    inputs.check_rewards(functions, weights=config.reward_weights, group_size=group_size)
    loss, attention = make_loss(config), resolve(config.attention, "grpo_jax.models.attention")
    chosen = [resolve(name, "grpo_jax.transforms") for name in config.transform]
    chosen += [measured.sampler_gap()] if config.score_old else []
    score_old = config.overlap or config.score_old
    tokenizer = hf.load_tokenizer(config.model)
    rows = config.read(config.data)
    held_out = [] if config.eval_data is None else config.read(config.eval_data)
    if config.eval_rows and config.eval_data is None:
        rows, held_out = data.hold_out(rows, config.eval_rows, seed=config.seed)
    talk = config.talk(tokenizer, rows)
    prompts, held_out = config.encode(tokenizer, rows), config.encode(tokenizer, held_out)
    advantage, running = make_advantage(config, names, prompts.rows)
    inputs.check_arguments([*functions, *verifiers], prompts.rows[0], prompt_column=config.prompt_column)
    inputs.check_tokens(config.model, tokenizer, [*prompts.prompts, *held_out.prompts], max_tokens=config.max_tokens)
    sampler = sampling.sampler(
        group_size=config.group_size, max_tokens=config.max_tokens, eos_ids=hf.eos_ids(config.model, tokenizer),
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
        stop=sampling.stop_strings(tokenizer, config.stop) if config.stop else None,
        record_experts=config.record_experts,
    )  # fmt: skip
    logged = metrics.Logged()
    tolerant = [rewards.skip_failed_batches(function, batches=config.stop_after_failed) for function in functions]
    reward = rewards.host(
        tolerant, prompts.rows, tokenizer, prompt_column=config.prompt_column, eos_ids=sampler.eos_ids,
        log_metric=logged, report_after=config.reward_timeout, read=talk.read,
    )  # fmt: skip
    verify = rewards.host(
        verifiers, prompts.rows, tokenizer, prompt_column=config.prompt_column, eos_ids=sampler.eos_ids,
        report_after=config.reward_timeout, read=talk.read,
    )  # fmt: skip

    dtype = compute_dtype(config.compute_dtype)
    policy, params, frozen = config.load(
        config.model, compute_dtype=dtype, seed=config.seed, attention=attention, mesh=mesh
    )  # fmt: skip
    if config.sample_weights is not None:
        policy = quantized.sampled(policy, config.sample_weights)
    rate = learning_rates.learning_rate(
        config.rate(config.learning_rate, 1e-6), config.steps, warmup_steps=config.warmup_steps,
        updates_per_step=updates.count, decay=resolve(config.decay, "grpo_jax.schedules.learning_rates"),
    )  # fmt: skip
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay)
    width = data.bucket(max(map(len, prompts.prompts)), config.bucket)
    if config.memory_gib is not None:
        updates = memory.fit(
            updates, policy, optimizer, sampler, loss=loss, prompts=config.prompts_per_step, prompt_tokens=width,
            reference=config.beta > 0, params=params, frozen=frozen, score_old=score_old,
            budget=int(config.memory_gib * 2**30),
        )  # fmt: skip
    kept: dict[str, Any] = {} if running is None else {"baselines": running.begin}  # in the state, beside the weights
    if dtype == np.float16:
        kept["loss_scale"] = loss_scale.init()
        updates = dataclasses.replace(updates, loss_scale=Scheduled(lambda step, kept: kept["loss_scale"].scale))

    def follow(state: TrainState, experience: Experience) -> TrainState:
        kept = dict(state.extra)
        if running is not None:
            kept["baselines"] = running.after(kept["baselines"], experience)
        if "loss_scale" in kept:
            kept["loss_scale"] = loss_scale.follow(kept["loss_scale"], state.skipped, updates=updates.count)
        return state._replace(extra=kept)

    whole_step = make_train_step(
        policy, optimizer, talk.converse(sampler, prompts.rows), loss=loss, advantage=advantage, updates=updates,
        score_old=score_old, transforms=(measured.repetition(), measured.unscored(names), *chosen),
        replay_truncation=config.replay_truncation,
    )  # fmt: skip
    whole_step = (followed_by(whole_step, follow) if kept else whole_step).jit()
    evaluate = make_mean_rewards(
        policy, sampler, tokenizer, held_out, functions, group_size=config.eval_group_size,
        weights=config.reward_weights, stop_after_failed=config.stop_after_failed, batch_size=config.eval_batch,
        prompt_column=config.prompt_column, bucket=config.bucket, talk=talk,
    )  # fmt: skip
    began_with = digests.of_run(tokenizer, bind(params, frozen), prompts=prompts.prompts, held_out=held_out.prompts)
    key = jax.random.key(config.seed)
    state = init_state(params, optimizer, key, frozen=frozen, reference=config.beta > 0, extra=kept or ())
    del params
    batch = functools.partial(prompts.batch, config.seed, size=config.prompts_per_step, multiple=config.bucket)
    if mesh is not None:
        state, batch = sharding.place(mesh, state), sharding.batches(mesh, batch)
    step = overlap.in_turn(whole_step, batch)
    if config.overlap:
        step, state = overlap.ahead(whole_step, batch, state, width=width)

    def export(name: str) -> None:
        with loop.exporting(name) as folder:
            about = {"base_model": config.model, "tokenizer": tokenizer, "eos_ids": sampler.eos_ids}
            config.save(policy, loop.state, folder, **about)

    def evaluate_and_keep_the_best() -> None:
        loop.log(evaluate(bind(loop.state.params, frozen), rewards.TrainerState(loop.step, config.steps)))
        if loop.improved("eval/reward"):
            export("best")

    keys = ("reward", *(f"reward/{name}" for name in names), "eval/reward", "kl", "entropy", "length")
    allow = MAY_CHANGE if config.decay == "constant" else MAY_CHANGE[1:]  # a decay goes by the number of steps
    with run.loop(
        config, state, steps=config.steps, save_every=config.save_every, allow=allow, digests=began_with, keys=keys,
        stop_after_skipped=config.stop_after_skipped, tensorboard=config.tensorboard, wandb=config.wandb,
        profile=config.profile,
    ) as loop:  # fmt: skip
        del state
        for n in loop:
            if n % config.evaluate_every == 0:
                evaluate_and_keep_the_best()
            if n and config.export_every and n % config.export_every == 0:
                export(f"step_{n}")
            experience = jax.block_until_ready(step.collect(loop.state, n))
            loop.lap("sample")
            given, mask = reward(experience.rollout, rewards.TrainerState(n, config.steps))
            if any(logged.last(f"{name}/failed") for name in names):
                mask = np.zeros_like(mask)  # nothing is learned from the rewards that did not fail alone
            held_out_metrics: Metrics = {}
            if verifiers and n % config.held_out_every == 0:
                held_out_metrics = rewards.held_out_metrics(
                    [rewards.name_of(verifier) for verifier in verifiers],
                    verify(experience.rollout, rewards.TrainerState(n, config.steps)),
                    (given, mask), weights=config.reward_weights,
                )  # fmt: skip
            loop.lap("reward")
            experience = experience._replace(rewards=given, reward_mask=mask)
            if config.show_every and n % config.show_every == 0:
                loop.show(completions.lines(experience, tokenizer, prompts.rows, names, column=config.prompt_column))
            experience = packing.trim(experience, multiple=config.completion_bucket)
            if config.pack:
                packed = packing.pack(experience.rollout, multiple=config.completion_bucket)
                experience = experience._replace(packing=packed)
            loop.state, statistics = step.learn(loop.state, experience)
            loop.log(statistics | held_out_metrics | logged.take() | {"learning_rate": rate(n * updates.count)})
            loop.lap("learn")
        evaluate_and_keep_the_best()
        export(f"step_{loop.step}")
    print(f"model: {config.run_dir / f'step_{loop.step}'}")
    return loop.state.params


def check(config: Config, mesh: Mesh | None = None) -> Updates:
    """Refuses settings that do not go together."""
    if config.memory_gib is not None and config.micro_batches != 1:
        raise ValueError(f"--memory-gib chooses the micro-batches, so give no --micro-batches {config.micro_batches}")
    if config.pack and config.attention in ("cudnn", "splash"):
        raise ValueError(f"--attention {config.attention} cannot keep packed completions apart: leave out --pack")
    if jax.process_count() > 1 and (config.tools or config.environment):
        raise ValueError("conversations go through the host of one process: leave out --coordinator")
    names = ("iterations", "minibatches", "micro_batches", "max_grad_norm")
    updates = Updates(**{name: getattr(config, name) for name in names})
    updates.check(config.prompts_per_step)
    if mesh is None and jax.process_count() > 1:
        count = f"{jax.device_count()} devices of the {jax.process_count()} processes"
        raise ValueError(f"say how the {count} share the work: --mesh fsdp={jax.device_count()}, for instance")
    if mesh is not None:
        sharding.check_rows(mesh, config.prompts_per_step // updates.parts, config.group_size)
    return updates


def make_advantage(
    config: Config, names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> tuple[Advantage | Scheduled, RunningAdvantage | None]:
    """The advantage by its name, and what it keeps in the state, if it is one of running baselines."""
    function = resolve(config.advantage, "grpo_jax.advantages", "grpo_jax.schedules.running_advantages")
    settings = {"weights": config.reward_weights, "names": names}
    if "of_row" in inspect.signature(function).parameters:
        decay = {} if config.baseline_decay is None else {"decay": config.baseline_decay}
        running = function(running_advantages.of_rows(rows, config.baseline_column), **settings, **decay)
        return Scheduled(lambda step, kept: running.advantage(kept["baselines"])), running
    for flag in ("baseline_column", "baseline_decay"):
        if (value := getattr(config, flag)) is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')} {value} is of --advantage spo and rae, not {config.advantage}"
            )
    if config.group_size < 2:
        raise ValueError(f"a group needs at least 2 completions to compare, got --group-size {config.group_size}")
    return advantages.from_function(function, **settings), None


def make_loss(config: Config) -> Loss:
    """The loss by its name, with the settings that were given; its own defaults for the rest."""
    stated = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
    stated["penalty"] = losses.k3(config.beta) if config.beta else None
    make = resolve(config.loss, "grpo_jax.losses")
    loss = make_with(make, config.loss, stated, offered={"max_tokens": config.max_tokens})
    return losses.plus(loss, losses.load_balance(config.load_balance)) if config.load_balance else loss


if __name__ == "__main__":
    run.command(main, Config, __doc__)
