"""Distillation of one Hugging Face model into another on your own prompts, on what the smaller one writes.

    python experiments/distill.py --model Qwen/Qwen2.5-0.5B-Instruct --teacher runs/grpo/best \
        --data gsm8k.jsonl --prompt-column question --chat
    python experiments/distill.py --smoke                        # minutes on a CPU, two tiny random models
    python experiments/distill.py ... --completion-column completion --top-k 64 --write teacher.safetensors
    python experiments/distill.py ... --completion-column completion --top-k 64 --teacher-file teacher.safetensors

The policy samples completions of the prompts; at each of their tokens it is moved towards the teacher. No rewards and
no answers are needed. Both models have the same tokenizer; their sizes and families may differ.

`--divergence` is of `grpo_jax.losses`: `reverse_kl`, `forward_kl`, "generalised_jsd(0.5)", each over the vocabulary;
with `--top-k 64` over the teacher's likeliest tokens and all others as one. `--divergence sampled` compares the
log-prob of the token drawn alone, which is then the advantage of that token (Thinking Machines, "On-Policy
Distillation", 2025). The teacher's logits are computed a chunk of tokens at a time; its weights are kept in the
compute dtype.

With `--completion-column` the completions are given: off-policy, one of each prompt, as `sft.py` reads them; with
`--on-policy 0.5` beside it, half of the steps are on the policy's own (the mixture of GKD). For given ones the
teacher's likeliest tokens may be computed once: `--write` does that and ends, and `--teacher-file` trains by them,
without the teacher in memory (`run.teacher_files`: it refuses a file of another tokenizer, other prompts or
completions).
`--quantize-teacher int8` keeps the teacher's weights in 8 or 4 bits.

`--teacher-column` names what the teacher reads in place of the prompt, such as one with a demonstration or feedback in
it. Without `--teacher` the model is then its own teacher (SDFT, arXiv:2601.19897; SDPO, arXiv:2601.20802): as it began,
or copied from the policy every `--renew-every` steps, or moved towards it by `--renew-share` of the way each time.

The loop below is the algorithm. The state is saved every few steps and on the way out; the same command goes on where
the run stopped. The model is exported as a Hugging Face folder after the last step.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import advantages, data, losses, packing, run, sampling, testing
from grpo_jax.freezing import bind
from grpo_jax.models import hf, quantized
from grpo_jax.models.settings import WeightSettings
from grpo_jax.protocols import Advantage, Loss, VocabularyDivergence
from grpo_jax.run import digests, files, inputs, ranges, resuming, teacher_files
from grpo_jax.run.names import named_in, resolve
from grpo_jax.run.precision import ComputeDtype, compute_dtype
from grpo_jax.schedules import learning_rates
from grpo_jax.schedules.reference import sync_reference
from grpo_jax.scoring import Teacher, likeliest
from grpo_jax.train_step import followed_by, make_train_step
from grpo_jax.types import Array, Experience, Metrics, Params
from grpo_jax.updates import Updates, init_state

MAY_CHANGE = ("steps", "save_every", "tensorboard", "wandb", "data", "micro_batches")  # of a run that is resumed
Pair = tuple[list[int], list[int]]  # a prompt and its completion


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
    completion_column: str | None = None  # learn from these completions in place of the policy's own
    on_policy: float | None = None  # share of the steps that learn from its own all the same; 0 if not given
    teacher_column: str | None = None  # what the teacher reads in place of the prompt
    renew_every: int | None = None  # of a model that is its own teacher: steps between renewals; never, if not given
    renew_share: float | None = None  # of the policy in the renewed teacher; 1, a copy, if not given
    write: pathlib.Path | None = None  # compute the teacher's --top-k tokens at their places into this file, and end
    teacher_file: pathlib.Path | None = None  # of --write, in place of --teacher
    quantize_teacher: quantized.Kind | None = None  # its weights to few bits
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
    ranges.check(config)
    its_own = not config.teacher and config.teacher_file is None and config.teacher_column is not None
    if not (config.model and (config.teacher or config.teacher_file or its_own)) or config.data == pathlib.Path():
        raise ValueError("give --model, --teacher and --data, or --smoke")
    check(config, its_own=its_own)
    if config.write is not None or config.teacher_file is not None:
        check_file(config)
    updates = Updates(
        minibatches=config.minibatches, micro_batches=config.micro_batches, max_grad_norm=config.max_grad_norm
    )
    updates.check(config.prompts_per_step)
    rate = learning_rates.learning_rate(
        config.rate(config.learning_rate, 5e-6), warmup_steps=config.warmup_steps, updates_per_step=updates.count
    )
    loss, divergence, advantage = make_loss(config)
    tokenizer = hf.load_tokenizer(config.model)
    if config.teacher and tokenizer.get_vocab() != hf.load_tokenizer(config.teacher).get_vocab():
        raise ValueError(
            f"--teacher {config.teacher} has other tokens than --model {config.model}: they cannot compare"
        )
    prompts, completions, eos_ids = read(config, tokenizer)
    hinted = None
    if config.teacher_column is not None:
        asked = dataclasses.replace(config, prompt_column=config.teacher_column, too_long="refuse")
        hinted = asked.encode(tokenizer, prompts.rows).prompts
    for model in filter(None, (config.model, config.teacher)):
        for sequences in (prompts.prompts, *([] if hinted is None else [hinted])):
            inputs.check_tokens(model, tokenizer, sequences, max_tokens=config.max_tokens, rows=prompts.rows)
    sampler = sampling.sampler(
        group_size=config.group_size, max_tokens=config.max_tokens, eos_ids=eos_ids, temperature=config.temperature
    )

    dtype = compute_dtype(config.compute_dtype)
    pairs = [] if completions is None else list(zip(prompts.prompts, completions, strict=True))
    about = teacher_files.about(
        tokenizer, pairs, k=config.top_k or 0, temperature=config.temperature, teacher=config.teacher
    )
    held = None if config.teacher_file is None else teacher_files.read(config.teacher_file, about)
    if config.write is None:
        resuming.check(config, allow=MAY_CHANGE)
    teacher, teacher_params = None, None
    if config.teacher and config.teacher_file is None:
        settings = {"dtype": dtype, "compute_dtype": dtype, "quantize": config.quantize_teacher}
        network, teacher_params = hf.load_pretrained(config.teacher, **settings)
        teacher = Teacher(network, divergence)
        if config.write is not None:
            return write(config, teacher, teacher_params, pairs, about)
    policy, params, frozen = config.load(config.model, compute_dtype=dtype, seed=config.seed)
    teacher = Teacher(policy, divergence) if its_own else teacher
    optimizer = optax.adamw(rate, b2=0.99, weight_decay=0.0)
    step = make_train_step(
        policy, optimizer, sampler, loss=loss, advantage=advantage, updates=updates,
        teacher=teacher,
    )  # fmt: skip
    if config.renew_every is not None:
        share = 1.0 if config.renew_share is None else config.renew_share
        renew = functools.partial(sync_reference, every=config.renew_every, mixture=share)
        step = followed_by(step, lambda state, experience: renew(state))
    step = step.jit()
    began_with = digests.of_run(
        tokenizer, bind(params, frozen), prompts=pairs or prompts.prompts, eos_ids=eos_ids, code=named_in(config)
    )
    began_with["the prompts of the teacher"] = digests.of_json(hinted or [])
    state = init_state(params, optimizer, jax.random.key(config.seed), frozen=frozen, reference=its_own)
    if not its_own:
        began_with["the weights of the teacher"] = digests.of_arrays(teacher_params if held is None else held)
        state = state._replace(ref_params=teacher_params)
    del params, teacher_params

    keys = ("divergence", "reverse_kl", "entropy", "length", "grad_norm")
    with run.loop(
        config, state, steps=config.steps, save_every=config.save_every, allow=MAY_CHANGE, digests=began_with,
        initial=("frozen",) if config.renew_every is not None else ("ref_params", "frozen"), keys=keys,
        tensorboard=config.tensorboard, wandb=config.wandb,
    ) as loop:  # fmt: skip
        del state
        for n in loop:
            rows = data.batch_indices(config.seed, n, len(prompts.prompts), config.prompts_per_step)
            if completions is None or np.random.default_rng((config.seed, n)).random() < (config.on_policy or 0.0):
                batch = data.make_prompts([prompts.prompts[row] for row in rows], rows, multiple=config.bucket)
                experience = packing.trim(step.collect(loop.state, batch), multiple=config.completion_bucket)
            else:
                experience = given(config, [pairs[row] for row in rows], None if held is None else (held, rows))
            if hinted is not None:
                read_by_teacher = data.make_prompts([hinted[row] for row in rows], rows, multiple=config.bucket)
                experience = experience._replace(teacher_prompts=read_by_teacher)
            loop.state, statistics = step.learn(loop.state, experience)
            loop.log(statistics | learning_rates.rate_of_step(rate, loop.state, statistics))
        with loop.exporting("model") as folder:
            config.save(
                policy, loop.state, folder, base_model=config.model, tokenizer=tokenizer, eos_ids=sampler.eos_ids
            )
    print(f"model: {folder}")
    return loop.state.params


def read(config: Config, tokenizer: Any) -> tuple[data.PromptSet, list[list[int]] | None, tuple[int, ...]]:
    """The prompts, their completions if they are given, and all that may end one, of which given ones have one."""
    rows = config.read(config.data)
    prompts = config.encode(tokenizer, rows)
    chat = config.has_chats(rows)
    end, eos_ids = hf.completion_end(config.model, tokenizer, chat=chat, template=config.template)
    if config.completion_column is None:
        return prompts, None, eos_ids
    if config.divergence == "sampled":
        raise ValueError("--divergence sampled is of tokens that the policy drew: leave out --completion-column")
    _, completions = data.encode_demonstrations(
        tokenizer, prompts.rows, end=end, prompt_column=config.prompt_column,
        completion_column=config.completion_column,
        chat=config.chat, system=config.system, template=config.template, max_prompt_tokens=config.max_prompt_tokens,
        max_tokens=config.max_tokens,
    )  # fmt: skip
    return prompts, completions, eos_ids


def given(
    config: Config, pairs: Sequence[Pair], held: tuple[teacher_files.TeacherFile, Sequence[int]] | None
) -> Experience:
    """Completions that were given, with the teacher's likeliest tokens of these rows, if they were computed before."""
    rollout = data.make_demonstrations(*zip(*pairs, strict=True), multiple=config.bucket)
    if held is None:
        return Experience(rollout)
    of_teacher, rows = held
    return Experience(rollout, teacher_top=of_teacher.batch(rows, rollout.tokens.shape[-1]))


def write(config: Config, teacher: Teacher, params: Params, pairs: Sequence[Pair], about: dict[str, str]) -> Params:
    """Computes the teacher's likeliest tokens for all completions into a file; returns the teacher's parameters."""
    assert config.write is not None
    assert config.top_k is not None
    with teacher_files.writing(config.write, about) as write_rows:
        for start in range(0, len(pairs), config.prompts_per_step):
            rollout = given(config, pairs[start : start + config.prompts_per_step], None).rollout
            top = likeliest(teacher.policy, params, rollout, config.top_k, temperature=config.temperature)
            write_rows(top, rollout.lengths)
    print(f"the {config.top_k} likeliest tokens of {config.teacher} for {len(pairs)} completions: {config.write}")
    return params


def check(config: Config, *, its_own: bool) -> None:
    """Refuses settings without an effect."""
    if config.on_policy is not None and (config.completion_column is None or not 0 <= config.on_policy <= 1):
        raise ValueError(f"--on-policy {config.on_policy} is a share, from 0 to 1, beside --completion-column")
    if config.renew_every is not None and not its_own:
        raise ValueError(
            f"--renew-every {config.renew_every} is of a model that is its own teacher: give --teacher-column, and "
            "leave out --teacher"
        )
    if config.renew_share is not None and (config.renew_every is None or not 0 < config.renew_share <= 1):
        raise ValueError(f"--renew-share {config.renew_share} is of --renew-every, above 0 and at most 1")
    if config.quantize_teacher is not None and its_own:
        raise ValueError(f"--quantize-teacher {config.quantize_teacher} is of a --teacher: the model is its own here")


def check_file(config: Config) -> None:
    """Refuses what does not go with a file of the teacher's likeliest tokens."""
    flag = "--write" if config.write is not None else "--teacher-file"
    if config.top_k is None or config.completion_column is None or config.divergence == "sampled":
        raise ValueError(f"{flag} holds the likeliest tokens for given completions: --completion-column and --top-k")
    if config.write is not None and (config.teacher_file is not None or not config.teacher):
        raise ValueError("--write needs a --teacher, and no --teacher-file")
    if config.write is not None and not files.is_writable(config.write):
        raise ValueError(f"--write {config.write} cannot be written: name a file, in a folder that can")
    if config.teacher_column is not None or config.on_policy is not None:
        raise ValueError(
            f"{flag} is of a teacher that reads the prompts as they are: leave out --teacher-column and --on-policy"
        )


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
    if config.teacher_file is not None:
        return losses.distill_top(divergence), None, unused
    return losses.distill(), divergence if config.top_k is None else losses.of_top_k(divergence, config.top_k), unused


def unused(experience: Experience) -> tuple[Array, Metrics]:
    """Advantages of 0, so that the teacher is not asked for the tokens drawn beside its whole distribution."""
    return jnp.zeros(experience.rollout.lengths.shape), {}


def smoke(config: Config) -> Config:
    """Two tiny random models and the least of everything."""
    made = config.run_dir / "tiny"
    if not made.exists():
        testing.tiny_checkpoint(made / "student")
        testing.tiny_checkpoint(made / "teacher", seed=1)
    sums = [(f"{a} plus 2 is ", f"{a + 2}.") for a in range(8)]
    lines = [json.dumps({"prompt": sum_, "completion": end, "hint": f"{sum_}{end} {sum_}"}) for sum_, end in sums]
    (made / "prompts.jsonl").write_text("\n".join(lines))
    teacher = "" if config.teacher_file or config.teacher_column else str(made / "teacher")
    return dataclasses.replace(
        config, model=str(made / "student"), teacher=teacher, data=made / "prompts.jsonl", steps=4,
        prompts_per_step=4, max_tokens=8, minibatches=1, micro_batches=2, warmup_steps=0, save_every=2,
        learning_rate=1e-2, compute_dtype="float32", prompt_column="prompt", bucket=16, completion_bucket=8,
    )  # fmt: skip


if __name__ == "__main__":
    run.command(train, Config, __doc__, smoke=smoke)
