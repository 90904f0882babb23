"""GRPO of a Hugging Face model on your own prompts, with your own reward functions.

    python experiments/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k.jsonl \
        --prompt-column question --answer-after "####" --chat --reward my_rewards:correct

`--model` is a folder or a repository of the Hugging Face Hub. `--data` is JSONL, CSV or Parquet: one prompt per line,
as text or as chat messages, with any other columns. `--reward` names functions as `module:function`, as TRL's:

    def correct(prompts, completions, answer, **kwargs) -> list[float | None]

and as `module:maker(...)` a function that a maker returns, such as `grpo_jax.rewards:accuracy()`. `--step-reward` names
one that grades the steps of the reasoning, `(prompts, steps, **columns) -> list of lists` (`grpo_jax.rewards.steps`).

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

`--server http://localhost:8000` has vLLM sample (SGLang with `--server-kind sglang`), here and in evaluations. It
is given the weights as a folder in that of the run, adapters as PEFT's, at every step or after `--max-lag` more. The
policy is then scored as well: `sampler_kl` tells how far the server is from it.

`--mesh data=2,fsdp=4` divides all of it over eight devices: rows over both, the weights and the optimiser's state over
`fsdp`. A run is resumed on another mesh, too, where it goes on to rounding. Where the devices are those of several
processes, the same command is given in each, with `--coordinator HOST:PORT --processes 2 --process-id 0` (and 1), or
with `--coordinator cluster` where Slurm, Open MPI, Kubernetes or Cloud TPUs started them.

With `--overlap 1` the next batch is sampled while the rewards of this one are computed, for verifiers that keep the
device waiting. It then comes from the policy before the update, which the ratio takes into account. `--overlap 3` has
three batches in flight, each of the policy three updates before.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import data, packing, rewards, run
from grpo_jax.freezing import bind, partition
from grpo_jax.models import hf, quantized, sharding
from grpo_jax.models.settings import WeightSettings
from grpo_jax.policies import Policy
from grpo_jax.run import completions, digests, inputs, keeping, measured, memory, overlap, ranges, resuming
from grpo_jax.run.conversations import ConversationSettings
from grpo_jax.run.drawing import SamplingSettings
from grpo_jax.run.names import resolve
from grpo_jax.run.objective import ObjectiveSettings
from grpo_jax.run.precision import WithFloat16, compute_dtype
from grpo_jax.run.rewarding import RewardSettings
from grpo_jax.run.serving import ServerSettings
from grpo_jax.run.together import ProcessSettings
from grpo_jax.run.updating import UpdateSettings
from grpo_jax.schedules.movement import make_movement
from grpo_jax.study.evaluation import make_mean_rewards
from grpo_jax.train_step import followed_by, make_train_step, temperature_of, truncation_of
from grpo_jax.types import Params
from grpo_jax.updates import Updates, init_state

MAY_CHANGE = (  # of a run that is resumed
    *("steps", "save_every", "export", "export_every", "show_every", "tensorboard", "wandb", "profile"),
    *("stop_after_skipped", "stop_after_failed", "reward_timeout", "answer_timeout", "environment_workers"),
    *("server", "server_model", "server_timeout"),
    *("evaluate_every", "eval_batch", "eval_group_size", "held_out", "held_out_every"),
    *("data", "eval_data"),  # what is in them may not
    *("micro_batches", "memory_gib", "mesh", "coordinator", "processes", "process_id"),  # equal to rounding
)


@dataclasses.dataclass(frozen=True)
class Config(
    RewardSettings, ObjectiveSettings, SamplingSettings, UpdateSettings, ConversationSettings, WeightSettings,
    ProcessSettings, ServerSettings,
):  # fmt: skip
    """Settings of a run."""

    model: str
    data: pathlib.Path
    run_dir: pathlib.Path = pathlib.Path("runs/grpo")
    steps: int = 500
    prompts_per_step: int = 16
    seed: int = 0

    score_old: bool = False  # the policy that sampled, for what asks for it; measures its gap to the sampler, too
    completion_bucket: int = 256  # to learn, completions are cut to the longest, up to a multiple of this
    pack: bool = False  # or several are laid into a row, of few shapes: `packing.shapes`
    overlap: int = 0  # batches sampled ahead while earlier ones are rewarded, of the policy so many updates before
    compute_dtype: WithFloat16 = "auto"  # float32 on CPUs, else bfloat16; trained weights are float32 in any case
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
    profile: bool = False  # write a trace of the second step and the next two into the run's folder, for xprof


def main(config: Config) -> None:
    """Trains, together with other processes where there are some."""
    with config.joined():
        train(config)


def train(config: Config) -> Params:
    """Trains; returns the trained parameters."""
    # Everything that can be wrong with the input is looked at before the weights are read.
    mesh = None if config.mesh is None else sharding.parse(config.mesh)
    updates = check(config, mesh)
    functions, names = config.reward_functions, config.reward_names
    group_size = (config.eval_group_size or 1) if config.eval_data or config.eval_rows else None
    inputs.check_rewards(functions, weights=config.reward_weights, group_size=group_size)
    loss = config.make_loss(max_tokens=config.max_tokens)
    attention = resolve(config.attention, "grpo_jax.models.attention")
    gap = config.score_old or config.server is not None
    transforms = [*config.transforms(), *([measured.sampler_gap()] if gap else [])]
    score_old = config.overlap > 0 or gap
    tokenizer = hf.load_tokenizer(config.model)
    rows = config.read(config.data)
    held_out = [] if config.eval_data is None else config.read(config.eval_data)
    if config.eval_rows and config.eval_data is None:
        rows, held_out = data.hold_out(rows, config.eval_rows, seed=config.seed)
    talk = config.talk(tokenizer, rows)
    prompts, held_out = config.encode(tokenizer, rows), config.encode(tokenizer, held_out)
    advantage, running = config.make_advantage(
        prompts.rows, names, weights=config.reward_weights, group_size=config.group_size
    )
    advantage = config.with_steps(advantage)
    both = data.PromptSet([*prompts.rows, *held_out.rows], [*prompts.prompts, *held_out.prompts])
    inputs.check_arguments([*functions, *config.verifiers], both.rows, prompt_column=config.prompt_column)
    inputs.check_tokens(config.model, tokenizer, both.prompts, max_tokens=config.max_tokens, rows=both.rows)
    chats = config.has_chats(both.rows)
    own = config.make_sampler(tokenizer, hf.eos_ids(config.model, tokenizer, chat=chats, template=config.template))
    sampler = config.serve(
        own, stop=config.stop, model=config.model, folder=config.run_dir / "engine",
        adapters=config.lora_rank is not None, write=functools.partial(write, config, tokenizer, own.eos_ids),
    )  # fmt: skip
    reward = config.make_reward(
        prompts.rows, tokenizer, eos_ids=sampler.eos_ids, prompt_column=config.prompt_column, read=talk.read
    )
    of_steps = config.make_step_rewards(
        prompts.rows, tokenizer, eos_ids=sampler.eos_ids, prompt_column=config.prompt_column
    )

    dtype = compute_dtype(config.compute_dtype, float16=True)
    policy, params, frozen = config.load(
        config.model, compute_dtype=dtype, seed=config.seed, attention=attention, mesh=mesh
    )  # fmt: skip
    trained = policy  # whole where it is evaluated
    if config.sample_weights is not None:
        trained = quantized.sampled(policy, config.sample_weights)
    rate = config.make_rate(config.rate(config.learning_rate, 1e-6), steps=config.steps, updates=updates)
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay)
    width = data.bucket(max(map(len, prompts.prompts)), config.bucket)
    if config.memory_gib is not None:
        updates = memory.fit(
            updates, trained, optimizer, own, loss=loss, prompts=config.prompts_per_step, prompt_tokens=width,
            reference=config.beta > 0, params=params, frozen=frozen, score_old=score_old,
            budget=int(config.memory_gib * 2**30),
        )  # fmt: skip
    kept = keeping.begin(running, scaled=dtype == np.float16)
    updates = keeping.scaled(updates) if "loss_scale" in kept else updates
    whole_step = make_train_step(
        trained, optimizer, talk.converse(sampler, prompts.rows), loss=loss, advantage=advantage, updates=updates,
        score_old=score_old, transforms=(measured.repetition(), measured.unscored(names), *transforms),
        replay_truncation=config.replay_truncation,
    )  # fmt: skip
    moved = make_movement(
        trained, temperature=temperature_of(sampler), parts=updates.parts,
        truncation=truncation_of(sampler) if config.replay_truncation else None,
    )  # fmt: skip
    whole_step = (followed_by(whole_step, keeping.follow(running, updates, moved)) if kept else whole_step).jit()
    evaluate = make_mean_rewards(
        policy, sampler, tokenizer, held_out, functions, group_size=config.eval_group_size,
        weights=config.reward_weights, stop_after_failed=config.stop_after_failed, batch_size=config.eval_batch,
        prompt_column=config.prompt_column, bucket=config.bucket, talk=talk,
    )  # fmt: skip
    began_with = digests.of_run(
        tokenizer, bind(params, frozen), prompts=prompts.prompts, held_out=held_out.prompts, rows=prompts.rows,
        held_out_rows=held_out.rows, eos_ids=sampler.eos_ids,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    state = init_state(params, optimizer, key, frozen=frozen, reference=config.beta > 0, extra=kept or ())
    del params
    batch = functools.partial(prompts.batch, config.seed, size=config.prompts_per_step, multiple=config.bucket)
    if mesh is not None:
        state, batch = sharding.place(mesh, state), sharding.batches(mesh, batch)
    step = overlap.in_turn(whole_step, batch)
    if config.overlap:
        step, state = overlap.ahead(whole_step, batch, state, width=width, depth=config.overlap)

    def export(name: str) -> None:
        with loop.exporting(name) as folder:
            about = {"base_model": config.model, "tokenizer": tokenizer, "eos_ids": sampler.eos_ids}
            config.save(policy, loop.state, folder, **about)

    def evaluate_and_keep_the_best() -> None:
        loop.log(evaluate(bind(loop.state.params, frozen), rewards.TrainerState(loop.step, config.steps)))
        if loop.improved("eval/reward"):
            export("best")

    keys = ("reward", *(f"reward/{name}" for name in names), "eval/reward", "kl", "entropy", "length")
    with run.loop(
        config, state, steps=config.steps, save_every=config.save_every, allow=may_change(config), keys=keys,
        digests=began_with, stop_after_skipped=config.stop_after_skipped, tensorboard=config.tensorboard,
        wandb=config.wandb, profile=config.profile, whole=step.whole,
    ) as loop:  # fmt: skip
        del state
        more_shapes = config.pack and not config.overlap  # to compile, once the lengths of a batch are known
        for n in loop:
            if n % config.evaluate_every == 0:
                evaluate_and_keep_the_best()
            if n and config.export_every and n % config.export_every == 0:
                export(f"step_{n}")
            experience = jax.block_until_ready(step.collect(loop.state, n))
            loop.lap("sample")
            given, mask, of_rewards = reward(experience.rollout, rewards.TrainerState(n, config.steps))
            experience = experience._replace(rewards=given, reward_mask=mask, **of_steps(experience.rollout))
            loop.lap("reward")
            if config.show_every and n % config.show_every == 0:
                loop.show(completions.lines(experience, tokenizer, prompts.rows, names, column=config.prompt_column))
            if config.pack:
                packed = packing.pack(experience.rollout, multiple=config.completion_bucket)
                experience = experience._replace(packing=packed)
                if more_shapes:
                    packing.compile_ahead(step.learn, loop.state, experience, multiple=config.completion_bucket)
                    more_shapes = False
            else:
                experience = packing.trim(experience, multiple=config.completion_bucket)
            loop.state, statistics = step.learn(loop.state, experience)
            loop.log(statistics | of_rewards | {"learning_rate": rate(n * updates.count)})
            loop.lap("learn")
        evaluate_and_keep_the_best()
        export(f"step_{loop.step}")
    print(f"model: {config.run_dir / f'step_{loop.step}'}")
    return loop.state.params


def write(
    config: Config, tokenizer: Any, eos_ids: Sequence[int], policy: Policy, params: Params, folder: pathlib.Path
) -> None:
    """Writes what a server is given: the whole model, or its adapters."""
    if config.lora_rank is None:
        hf.save_pretrained(policy, params, folder, tokenizer=tokenizer, eos_ids=eos_ids)
    else:
        all_but_adapters = "^(?!.*lora_[ab]$)"
        hf.save_adapters(policy, *partition(params, all_but_adapters), folder, base_model=config.model)


def may_change(config: Config) -> Sequence[str]:
    """What may when a run is resumed."""
    return MAY_CHANGE if config.decay == "constant" else MAY_CHANGE[1:]  # a decay goes by the number of steps


def check(config: Config, mesh: Mesh | None = None) -> Updates:
    """Refuses settings that are out of range or do not go together."""
    ranges.check(config)
    if config.eval_data is not None and config.eval_rows:
        raise ValueError(f"--eval-rows {config.eval_rows} are held out of --data: leave them out beside --eval-data")
    updates = config.updates(prompts=config.prompts_per_step)
    if config.pack and config.attention in ("cudnn", "splash"):
        raise ValueError(f"--attention {config.attention} cannot keep packed completions apart: leave out --pack")
    if config.server is not None and (config.sample_weights is not None or config.memory_gib is not None):
        raise ValueError("--sample-weights and --memory-gib are about sampling in this process, not by a --server")
    if jax.process_count() > 1 and (config.tools or config.environment):
        raise ValueError("conversations go through the host of one process: leave out --coordinator")
    if config.step_reward is not None and (config.tools or config.environment or jax.process_count() > 1):
        raise ValueError(
            f"--step-reward {config.step_reward} grades completions of one turn on one process: "
            "leave out --tools, --environment and --coordinator"
        )
    if mesh is None and jax.process_count() > 1:
        count = f"{jax.device_count()} devices of the {jax.process_count()} processes"
        raise ValueError(f"say how the {count} share the work: --mesh fsdp={jax.device_count()}, for instance")
    if mesh is not None:
        sharding.check_rows(mesh, config.prompts_per_step // updates.parts, config.group_size)
    resuming.check(config, allow=may_change(config))
    return updates


if __name__ == "__main__":
    run.command(main, Config, __doc__)
