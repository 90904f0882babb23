"""GRPO of a Hugging Face model on your own prompts, with your own reward functions.

    python experiments/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k.jsonl \
        --prompt-column question --answer-after "####" --chat --reward my_rewards:correct

`--model` is a folder or a repository of the Hugging Face Hub; `--data` is JSONL, CSV or Parquet, a prompt a line, as
text or as chat messages, with any other columns. `--reward` names functions as `module:function`, as TRL's:

    def correct(prompts, completions, answer, **kwargs) -> list[float | None]

and as `module:maker(...)` what a maker returns, such as `grpo_jax.rewards:accuracy()`.

The algorithm is the loop below: `collect` samples (one program), the rewards are computed on the host, and `learn`
trains (another program). A batch that a reward raises on is masked; the run ends at the `--stop-after-failed`th in a
row. The state is saved every few steps and on the way out; the same command goes on where the run stopped, to the same
bits. The model is exported every `--export-every` steps, after the last one, and to `best` at a better evaluation.

`--lora-rank 16` trains adapters in place of the weights, and `--quantize nf4` holds the weights in 4 bits meanwhile.
`--tools my_tools:weather calculator` lets the policy call functions, and `--environment my_game:respond` lets it talk
with an environment, for `--max-turns` turns; rewards then see whole conversations. `--server http://localhost:8000` has
vLLM or SGLang sample. `--mesh data=2,fsdp=4` divides all of it over eight devices, of several processes with
`--coordinator`. `--overlap 1` samples a batch ahead, while rewards are computed. docs/pages/how-to has a page on each.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import data, packing, rewards, run, schedules
from grpo_jax.freezing import bind
from grpo_jax.models import hf, quantized, sharding
from grpo_jax.models.settings import WeightSettings
from grpo_jax.run import completions, digests, inputs, keeping, measured, memory, metrics, overlap, ranges, resuming
from grpo_jax.run.conversations import ConversationSettings
from grpo_jax.run.drawing import SamplingSettings
from grpo_jax.run.evaluating import EvaluationSettings
from grpo_jax.run.names import named_in, resolve
from grpo_jax.run.objective import ObjectiveSettings
from grpo_jax.run.precision import WithFloat16, compute_dtype
from grpo_jax.run.rewarding import RewardSettings
from grpo_jax.run.serving import ServerSettings
from grpo_jax.run.together import ProcessSettings
from grpo_jax.run.updating import UpdateSettings
from grpo_jax.study.evaluation import make_mean_rewards
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Params
from grpo_jax.updates import Updates, init_state

MAY_CHANGE = (  # of a run that is resumed
    *("steps", "save_every", "export", "export_dtype", "export_every", "show_every", "tensorboard", "wandb", "profile"),
    *("stop_after_skipped", "stop_after_failed", "reward_timeout", "answer_timeout", "environment_workers"),
    *("server", "server_model", "server_timeout", "evaluate_every", "eval_batch", "held_out", "held_out_every"),
    *("data", "eval_data"),  # what is in them may not
    *("micro_batches", "memory_gib", "slots", "mesh", "coordinator", "processes", "process_id"),  # equal to rounding
)


@dataclasses.dataclass(frozen=True)
class Config(
    RewardSettings, ObjectiveSettings, SamplingSettings, UpdateSettings, ConversationSettings, WeightSettings,
    ProcessSettings, ServerSettings, EvaluationSettings,
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
    max_lag: int = 0  # batches for which a --server may keep its weights after the first of them
    overlap: int = 0  # batches sampled ahead while earlier ones are rewarded, of the policy so many updates before
    compute_dtype: WithFloat16 = "auto"  # float32 on CPUs, else bfloat16; trained weights are float32 in any case
    sample_weights: Literal["int8", "fp8"] | None = None  # sample from a copy of 8 bits; see --score-old, --loss dppo
    attention: str = "auto"  # of grpo_jax.models.attention (cudnn, splash, ...), or module:function

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
    updates, mesh, allow = check(config)
    rate = config.make_rate(config.rate(config.learning_rate, 1e-6), steps=config.steps, updates=updates)
    functions, names = config.reward_functions, config.reward_names
    inputs.check_rewards(functions, weights=config.reward_weights, group_size=config.evaluated_group)
    loss = config.make_loss(max_tokens=config.max_tokens)
    attention = resolve(config.attention, "grpo_jax.models.attention")
    gap = config.score_old or config.server is not None
    transforms = [*config.transforms(), *([measured.sampler_gap()] if gap else [])]
    score_old = config.overlap > 0 or gap
    config.tell_unclipped(updates=updates.count, score_old=score_old)
    tokenizer = hf.load_tokenizer(config.model)
    rows, held_out = config.hold_out(config.read(config.data), config.read, seed=config.seed)
    talk = config.talk(tokenizer, rows)
    prompts, held_out = config.encode(tokenizer, rows), config.encode(tokenizer, held_out)
    advantage, running = config.make_advantage(
        prompts.rows, names, weights=config.reward_weights, group_size=config.group_size
    )
    advantage = config.with_steps(advantage)
    both = data.PromptSet([*prompts.rows, *held_out.rows], [*prompts.prompts, *held_out.prompts])
    inputs.check_arguments([*functions, *config.verifiers], both.rows, prompt_column=config.prompt_column)
    inputs.check_tokens(config.model, tokenizer, both.prompts, max_tokens=config.max_tokens, rows=both.rows)
    inputs.check_experts(config.model, record_experts=config.record_experts, load_balance=config.load_balance)
    inputs.tell_repeated(prompts.prompts, held_out.prompts)
    chats = config.has_chats(both.rows)
    own = config.make_sampler(tokenizer, hf.eos_ids(config.model, tokenizer, chat=chats, template=config.template))
    sampler = config.serve(
        own, stop=config.stop, model=config.model, folder=config.run_dir / "engine",
        adapters=config.lora_rank is not None, tokenizer=tokenizer, max_lag=config.max_lag,
    )  # fmt: skip
    seen = {"eos_ids": sampler.eos_ids, "prompt_column": config.prompt_column}
    reward = config.make_reward(prompts.rows, tokenizer, read=talk.read, **seen)
    of_steps = config.make_step_rewards(prompts.rows, tokenizer, **seen)
    dtype = compute_dtype(config.compute_dtype, float16=True)
    policy, params, frozen = config.load(
        config.model, compute_dtype=dtype, seed=config.seed, attention=attention, mesh=mesh
    )  # fmt: skip
    trained = quantized.sampled(policy, config.sample_weights) if config.sample_weights else policy
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay)
    width = data.bucket(max(map(len, prompts.prompts)), config.bucket)
    if config.memory_gib is not None:
        updates = memory.fit(
            updates, trained, optimizer, own, loss=loss, prompts=config.prompts_per_step, prompt_tokens=width,
            reference=config.beta > 0, params=params, frozen=frozen, score_old=score_old,
            budget=int(config.memory_gib * 2**30), packed=config.pack,
        )  # fmt: skip
    kept = keeping.begin(running, scaled=dtype == np.float16)
    updates = keeping.scaled(updates) if "loss_scale" in kept else updates
    whole_step = make_train_step(
        trained, optimizer, talk.converse(sampler, prompts.rows), loss=loss, advantage=advantage, updates=updates,
        score_old=score_old, transforms=(measured.repetition(), measured.unscored(names), *transforms),
        replay_truncation=config.replay_truncation,
    )  # fmt: skip
    if kept:
        whole_step = keeping.followed(whole_step, running, updates, trained, sampler, replay=config.replay_truncation)
    whole_step = whole_step.jit()
    evaluate = make_mean_rewards(
        policy, sampler, tokenizer, held_out, functions, group_size=config.eval_group_size,
        weights=config.reward_weights, stop_after_failed=config.stop_after_failed, batch_size=config.eval_batch,
        prompt_column=config.prompt_column, bucket=config.bucket, talk=talk, report_after=config.reward_timeout,
    )  # fmt: skip
    began_with = digests.of_run(
        tokenizer, bind(params, frozen), prompts=prompts.prompts, held_out=held_out.prompts, rows=prompts.rows,
        held_out_rows=held_out.rows, eos_ids=sampler.eos_ids, code=[*functions, *config.verifiers, *named_in(config)],
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
        with loop.exporting(name) as path:
            config.save(policy, loop.state, path, base_model=config.model, tokenizer=tokenizer, eos_ids=sampler.eos_ids)

    def evaluate_and_keep_the_best() -> None:
        loop.log(evaluate(bind(loop.state.params, frozen), rewards.TrainerState(loop.step, config.steps)))
        if loop.improved("eval/reward"):
            export("best")

    keys = ("reward", *(f"reward/{name}" for name in names), "eval/reward", "kl", "entropy", "length")
    with run.loop(
        config, state, steps=config.steps, save_every=config.save_every, allow=allow, keys=keys,
        digests=began_with, stop_after_skipped=config.stop_after_skipped, tensorboard=config.tensorboard,
        wandb=config.wandb, profile=config.profile, whole=step.whole,
    ) as loop:  # fmt: skip
        del state
        multiple = config.completion_bucket
        more_shapes = config.pack and not config.overlap and jax.process_count() == 1  # to compile; several may block
        for n in loop:
            if n % config.evaluate_every == 0:
                evaluate_and_keep_the_best()
            if n and config.export_every and n % config.export_every == 0:
                export(f"step_{n}")
            experience = jax.block_until_ready(step.collect(loop.state, n))
            loop.lap("sample")
            given, mask, logged = reward(experience.rollout, place := rewards.TrainerState(n, config.steps))
            experience = experience._replace(rewards=given, reward_mask=mask, **of_steps(experience.rollout, place))
            loop.lap("reward")
            if config.show_every and n % config.show_every == 0:
                loop.show(completions.lines(experience, tokenizer, prompts.rows, names, column=config.prompt_column))
            if config.pack:
                experience = experience._replace(packing=packing.pack(experience.rollout, multiple=multiple))
            else:
                experience = packing.trim(experience, multiple=multiple)
            if more_shapes:
                packing.compile_ahead(step.learn, loop.state, experience, multiple=multiple)
                more_shapes = False
            loop.state, learned = step.learn(loop.state, experience)
            loop.log(metrics.beside(learned, logged) | schedules.rate_of_step(rate, loop.state, learned))
            loop.lap("learn")
        evaluate_and_keep_the_best()
        export(f"step_{loop.step}")
    print(f"model: {config.run_dir / f'step_{loop.step}'}")
    return loop.state.params


def check(config: Config) -> tuple[Updates, Mesh | None, Sequence[str]]:
    """Refuses settings that are out of range or do not go together."""
    ranges.check(config)
    updates = config.updates(prompts=config.prompts_per_step)
    mesh = config.make_mesh(
        prompts=config.prompts_per_step // updates.parts, group_size=config.group_size, packed=config.pack,
        slots=config.slots and min(config.slots, config.prompts_per_step * config.group_size),
    )  # fmt: skip
    talks, several = bool(config.tools or config.environment), jax.process_count() > 1
    if config.pack and config.attention in ("cudnn", "splash"):
        raise ValueError(f"--attention {config.attention} cannot keep packed completions apart: leave out --pack")
    if config.server is not None and (config.sample_weights is not None or config.memory_gib is not None):
        raise ValueError("--sample-weights and --memory-gib are about sampling in this process, not by a --server")
    if several and talks and config.overlap:
        raise ValueError(f"conversations of several processes are not held ahead: leave out --overlap {config.overlap}")
    if config.step_reward is not None and (talks or several):
        raise ValueError("--step-reward grades one turn in one process: no --tools, --environment or --coordinator")
    allow = MAY_CHANGE if config.decay == "constant" else MAY_CHANGE[1:]  # a decay goes by the number of steps
    resuming.check(config, allow=allow)
    return updates, mesh, allow


if __name__ == "__main__":
    run.command(main, Config, __doc__)
