"""Supervised warm-up of a Hugging Face model on prompts and completions.

    python experiments/sft.py --model Qwen/Qwen2.5-0.5B --data demonstrations.jsonl

Each row of the data has a `prompt`, as text or as chat messages, and a `completion`,
as text or as a list of one message. The loss counts the completion's tokens and the end of its turn, and nothing
of the prompt. The trained model is exported as a Hugging Face folder, from which
`experiments/grpo.py` goes on; a run that was killed goes on with the same command.

`--lora-rank 16` trains adapters in place of the weights, and `--quantize nf4` holds the weights in 4 bits meanwhile.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax import data, losses, run, scoring
from grpo_jax.freezing import bind
from grpo_jax.models import hf
from grpo_jax.models.settings import WeightSettings
from grpo_jax.policies import Policy
from grpo_jax.run import digests, inputs, ranges, resuming
from grpo_jax.run.precision import ComputeDtype, compute_dtype
from grpo_jax.schedules import learning_rates
from grpo_jax.statistics import Mean
from grpo_jax.train_step import make_learn
from grpo_jax.types import Experience, Params, Rollout
from grpo_jax.updates import Updates, init_state, jit_learn

Pair = tuple[list[int], list[int]]  # a prompt and its completion


MAY_CHANGE = ("save_every", "data", "micro_batches", "tensorboard", "wandb")  # of a run that is resumed


@dataclasses.dataclass(frozen=True)
class Config(WeightSettings):
    """Settings of a run."""

    model: str
    data: pathlib.Path
    run_dir: pathlib.Path = pathlib.Path("runs/sft")
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    chat: bool = False  # put prompts that are text through the chat template, as a user's message
    system: str | None = None  # a system message before each prompt, which has none of its own; implies --chat
    thinking: bool | None = None  # `enable_thinking` of chat templates that know it, such as Qwen3's
    date_string: str | None = None  # in place of today's date, for chat templates that write it, such as Llama 3.2's
    eos: str | None = None  # the token that ends completions; the chat template's, or the tokenizer's, if not given
    max_prompt_tokens: int = 512
    max_tokens: int = 1024  # of a completion
    bucket: int = 64  # prompts and completions are padded to a multiple of this, so that few programs compile
    epochs: float = 1.0
    batch_size: int = 32
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    learning_rate: float | None = None  # 1e-5 of whole weights and 1e-4 of adapters, if not given
    warmup_fraction: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    compute_dtype: ComputeDtype = "auto"  # float32 on CPUs, else bfloat16; trained weights are float32 in any case
    eval_rows: int = 0  # held out of the data; their loss is measured every `save_every` steps
    save_every: int = 100
    tensorboard: bool = False
    wandb: str | None = None  # the project to log to


def train(config: Config) -> Params:
    """Trains; returns the trained parameters."""
    ranges.check(config)
    resuming.check(config, allow=MAY_CHANGE)
    tokenizer = hf.load_tokenizer(config.model)
    rows, pairs, eos_ids = read(config, tokenizer)
    inputs.check_tokens(config.model, tokenizer, [prompt + completion for prompt, completion in pairs], rows=rows)
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    held_out, pairs = [pairs[i] for i in order[: config.eval_rows]], [pairs[i] for i in order[config.eval_rows :]]
    inputs.tell_repeated([prompt for prompt, _ in pairs], [prompt for prompt, _ in held_out])
    if len(pairs) < config.batch_size:
        raise ValueError(f"{len(pairs)} rows to train on do not fill a batch of {config.batch_size}")
    if (steps := int(config.epochs * len(pairs) / config.batch_size)) < 1:
        raise ValueError(f"--epochs {config.epochs} of {len(pairs)} rows do not fill a batch of {config.batch_size}")
    rate = learning_rates.learning_rate(
        config.rate(config.learning_rate, 1e-5),
        steps,
        warmup_steps=int(config.warmup_fraction * steps),
        decay=learning_rates.cosine,
    )

    policy, params, frozen = config.load(
        config.model, compute_dtype=compute_dtype(config.compute_dtype), seed=config.seed
    )
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay)
    updates = Updates(micro_batches=config.micro_batches, max_grad_norm=config.max_grad_norm)
    learn = make_learn(policy, optimizer, loss=losses.sft(), updates=updates)
    learn = jit_learn(learn)
    evaluate = make_evaluate(policy, held_out, config)
    began_with = digests.of_run(tokenizer, bind(params, frozen), prompts=pairs, held_out=held_out, eos_ids=eos_ids)
    state = init_state(params, optimizer, jax.random.key(config.seed), frozen=frozen)
    del params
    settings = {"keys": ("loss", "eval/loss", "grad_norm", "length"), "allow": MAY_CHANGE}
    with run.loop(
        config, state, steps=steps, save_every=config.save_every, digests=began_with,
        tensorboard=config.tensorboard, wandb=config.wandb, **settings,
    ) as loop:  # fmt: skip
        del state
        for n in loop:
            if held_out and n % config.save_every == 0:
                loop.log(evaluate(bind(loop.state.params, frozen)))
            rows = data.batch_indices(config.seed, n, len(pairs), config.batch_size)
            loop.state, metrics = learn(loop.state, Experience(batch([pairs[row] for row in rows], config)))
            loop.log(metrics | learning_rates.rate_of_step(rate, loop.state, metrics))
        if held_out:
            loop.log(evaluate(bind(loop.state.params, frozen)))
        with loop.exporting("model") as folder:
            config.save(policy, loop.state, folder, base_model=config.model, tokenizer=tokenizer, eos_ids=eos_ids)
    print(f"model: {folder}")
    return loop.state.params


def batch(pairs: Sequence[Pair], config: Config) -> Rollout:
    """Demonstrations as arrays."""
    return data.make_demonstrations(*zip(*pairs, strict=True), multiple=config.bucket)


def make_evaluate(policy: Policy, held_out: Sequence[Pair], config: Config) -> Callable[[Params], dict[str, float]]:
    """`params -> ` the loss on the held-out demonstrations, over all of their tokens."""

    @jax.jit
    def loss(params: Params, demonstrations: Rollout) -> Mean:
        scores = scoring.score(policy, params, demonstrations, entropy=False)
        (term,), _ = losses.sft()(scores, Experience(demonstrations))
        return term

    def evaluate(params: Params) -> dict[str, float]:
        starts = range(0, len(held_out), config.batch_size)
        parts = [batch(held_out[start : start + config.batch_size], config) for start in starts]
        terms = [jax.device_get(loss(params, part)) for part in parts]
        return {"eval/loss": float(sum(term.sum for term in terms) / sum(term.count for term in terms))}

    return evaluate


def read(config: Config, tokenizer: Any) -> tuple[list[data.Row], list[Pair], list[int]]:
    """The rows, the demonstrations as tokens, and the tokens that may end a completion, of which they have one."""
    rows = data.read_problems(config.data, prompt_column=config.prompt_column, columns=[config.completion_column])
    template = {"enable_thinking": config.thinking, "date_string": config.date_string}
    chat = data.has_chats(rows, prompt_column=config.prompt_column, chat=config.chat, system=config.system)
    end, eos_ids = hf.completion_end(config.model, tokenizer, chat=chat, template=template, eos=config.eos)
    prompts, completions = data.encode_demonstrations(
        tokenizer, rows, end=end, prompt_column=config.prompt_column, completion_column=config.completion_column,
        chat=config.chat, system=config.system, template=template, max_prompt_tokens=config.max_prompt_tokens,
        max_tokens=config.max_tokens,
    )  # fmt: skip
    return rows, list(zip(prompts, completions, strict=True)), [*eos_ids]


if __name__ == "__main__":
    run.command(train, Config, __doc__)
