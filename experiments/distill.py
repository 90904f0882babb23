"""Distillation of one Hugging Face model into another on your own prompts, on what the smaller one writes.

    python experiments/distill.py --model Qwen/Qwen2.5-0.5B-Instruct --teacher runs/grpo/best \
        --data gsm8k.jsonl --prompt-column question --chat
    python experiments/distill.py --smoke                        # minutes on a CPU, two tiny random models

The policy samples completions of the prompts; at each of their tokens it is moved towards the teacher. No rewards and
no answers are needed. Both models have the same tokenizer; their sizes and families may differ.

`--divergence` is of `grpo_jax.losses`: `reverse_kl`, `forward_kl`, "generalised_jsd(0.5)", each over the vocabulary;
with `--top-k 64` over the teacher's likeliest tokens and all others as one. `--divergence sampled` compares the
log-prob of the token drawn alone, which is then the advantage of that token (Thinking Machines, "On-Policy
Distillation", 2025). The teacher's logits are computed a chunk of tokens at a time; its weights are kept in the
compute dtype.

The loop below is the algorithm. The state is saved every few steps and on the way out; the same command goes on where
the run stopped. The model is exported as a Hugging Face folder after the last step.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax

from grpo_jax import advantages, data, losses, packing, run, sampling, testing
from grpo_jax.freezing import bind
from grpo_jax.models import hf
from grpo_jax.models.settings import WeightSettings
from grpo_jax.protocols import Advantage, Loss, VocabularyDivergence
from grpo_jax.run import digests, inputs
from grpo_jax.run.names import resolve
from grpo_jax.run.precision import ComputeDtype, compute_dtype
from grpo_jax.schedules import learning_rates
from grpo_jax.scoring import Teacher
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Array, Experience, Metrics, Params
from grpo_jax.updates import Updates, init_state

MAY_CHANGE = ("steps", "save_every", "tensorboard", "wandb")  # of a run that is resumed


@dataclasses.dataclass(frozen=True)
class Config(data.PromptSettings, WeightSettings):
    """Settings of a run."""

    model: str = ""  # a folder or a repository of the Hugging Face Hub: what is trained
    teacher: str = ""  # the same, of the same tokenizer
    data: pathlib.Path = pathlib.Path()
    run_dir: pathlib.Path = pathlib.Path("runs/distill")
    smoke: bool = False  # two tiny models and a few steps

    divergence: str = "reverse_kl"  # of grpo_jax.losses, or your own as module:function; or sampled
    top_k: int | None = None  # of the teacher; the whole vocabulary, if not given
    early: float = 0.0  # of --divergence sampled: early tokens weigh up to 1 + early (IW-OPD has 0.5)
    steps: int = 200
    prompts_per_step: int = 16
    group_size: int = 2  # completions of a prompt
    max_tokens: int = 512  # of a completion
    temperature: float = 1.0
    minibatches: int = 1  # updates of a rollout
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    completion_bucket: int = 256  # to learn, completions are cut to the longest, up to a multiple of this
    learning_rate: float | None = None  # 5e-6 of whole weights and 5e-5 of adapters, if not given
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    seed: int = 0
    compute_dtype: ComputeDtype = "auto"  # float32 on CPUs, else bfloat16; trained weights are float32 in any case
    save_every: int = 50
    tensorboard: bool = False
    wandb: str | None = None  # the project to log to


def train(config: Config) -> Params:
    """Trains; returns the trained parameters."""
    if not (config.model and config.teacher and config.data.is_file()):
        raise ValueError("give --model, --teacher and --data, or --smoke")
    updates = Updates(
        minibatches=config.minibatches, micro_batches=config.micro_batches, max_grad_norm=config.max_grad_norm
    )
    updates.check(config.prompts_per_step)
    loss, divergence, advantage = make_loss(config)
    tokenizer, teachers = hf.load_tokenizer(config.model), hf.load_tokenizer(config.teacher)
    if tokenizer.get_vocab() != teachers.get_vocab():
        raise ValueError(
            f"--teacher {config.teacher} has other tokens than --model {config.model}: they cannot compare"
        )
    prompts = config.encode(tokenizer, config.read(config.data))
    for model in (config.model, config.teacher):
        inputs.check_tokens(model, tokenizer, prompts.prompts, max_tokens=config.max_tokens)
    sampler = sampling.sampler(
        group_size=config.group_size, max_tokens=config.max_tokens, eos_ids=hf.eos_ids(config.model, tokenizer),
        temperature=config.temperature,
    )  # fmt: skip

    dtype = compute_dtype(config.compute_dtype)
    policy, params, frozen = config.load(config.model, compute_dtype=dtype, seed=config.seed)
    teacher, teacher_params = hf.load_pretrained(config.teacher, dtype=dtype, compute_dtype=dtype)
    rate = learning_rates.learning_rate(
        config.rate(config.learning_rate, 5e-6), warmup_steps=config.warmup_steps, updates_per_step=updates.count
    )
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=0.0)
    step = make_train_step(
        policy, optimizer, sampler, loss=loss, advantage=advantage, updates=updates,
        teacher=Teacher(teacher, divergence),
    ).jit()  # fmt: skip
    began_with = digests.of_run(tokenizer, bind(params, frozen), prompts=prompts.prompts)
    began_with["the weights of the teacher"] = digests.of_arrays(teacher_params)
    state = init_state(params, optimizer, jax.random.key(config.seed), frozen=frozen)
    state = state._replace(ref_params=teacher_params)
    del params, teacher_params

    keys = ("divergence", "reverse_kl", "entropy", "length", "grad_norm")
    with run.loop(
        config, state, steps=config.steps, save_every=config.save_every, allow=MAY_CHANGE, digests=began_with,
        keys=keys, tensorboard=config.tensorboard, wandb=config.wandb,
    ) as loop:  # fmt: skip
        del state
        for n in loop:
            batch = prompts.batch(config.seed, n, size=config.prompts_per_step, multiple=config.bucket)
            experience = packing.trim(step.collect(loop.state, batch), multiple=config.completion_bucket)
            loop.state, statistics = step.learn(loop.state, experience)
            loop.log(statistics | {"learning_rate": rate(n * updates.count)})
        with loop.exporting("model") as folder:
            config.save(
                policy, loop.state, folder, base_model=config.model, tokenizer=tokenizer, eos_ids=sampler.eos_ids
            )
    print(f"model: {folder}")
    return loop.state.params


def make_loss(config: Config) -> tuple[Loss, VocabularyDivergence | None, Advantage]:
    """The loss, the divergence that the scores are to hold, None where the token drawn is enough, and the advantage."""
    if config.divergence == "sampled":
        if config.top_k is not None:
            raise ValueError(f"--divergence sampled looks at no other tokens: leave out --top-k {config.top_k}")
        # The score function, weighed by the ratio where a rollout has several updates.
        return losses.cispo(), None, advantages.distillation_advantages(gamma=config.early)
    if config.early:
        raise ValueError(f"--early {config.early} is of --divergence sampled, not of {config.divergence}")
    divergence: VocabularyDivergence = resolve(config.divergence, "grpo_jax.losses")
    return losses.distill(), divergence if config.top_k is None else losses.of_top_k(divergence, config.top_k), unused


def unused(experience: Experience) -> tuple[Array, Metrics]:
    """Advantages of 0, so that the teacher is not asked for the tokens drawn beside its whole distribution."""
    return jnp.zeros(experience.rollout.lengths.shape), {}


def smoke(config: Config) -> Config:
    """Two tiny random models and the least of everything."""
    files = config.run_dir / "tiny"
    if not files.exists():
        testing.tiny_checkpoint(files / "student")
        testing.tiny_checkpoint(files / "teacher", seed=1)
        (files / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a} plus 2 is "}}\n' for a in range(8)))
    return dataclasses.replace(
        config, model=str(files / "student"), teacher=str(files / "teacher"), data=files / "prompts.jsonl", steps=4,
        prompts_per_step=4, max_tokens=8, minibatches=1, micro_batches=2, warmup_steps=0, save_every=2,
        learning_rate=1e-2, compute_dtype="float32", prompt_column="prompt", bucket=16, completion_bucket=8,
    )  # fmt: skip


def main(config: Config) -> Params:
    """`train`, or a few steps of it."""
    return train(smoke(config) if config.smoke else config)


if __name__ == "__main__":
    run.command(main, Config, __doc__)
