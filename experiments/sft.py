"""Supervised warm-up of a Hugging Face model on prompts and completions.

    python experiments/sft.py --model Qwen/Qwen2.5-0.5B --data demonstrations.jsonl

Each line of the data has a `prompt`, as text or as chat messages, and a `completion`,
as text. The loss counts the completion's tokens and the end of its turn, and nothing
of the prompt. The trained model is exported as a Hugging Face folder, from which
`experiments/grpo.py` goes on; a run that was killed goes on with the same command.
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from grpo_jax import data, losses, scoring, statistics
from grpo_jax.models import hf
from grpo_jax.run import checkpoint, compilation, display, metrics, preemption
from grpo_jax.statistics import Mean
from grpo_jax.train_step import make_learn
from grpo_jax.types import Experience, Params, Rollout
from grpo_jax.updates import init_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    model: str
    data: pathlib.Path
    run_dir: pathlib.Path = pathlib.Path("runs/sft")
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    chat: bool = False  # put prompts that are text through the chat template, as a user's message
    max_prompt_tokens: int = 512
    max_tokens: int = 1024  # of a completion
    bucket: int = 64  # prompts and completions are padded to a multiple of this, so that few programs compile
    epochs: float = 1.0
    batch_size: int = 32
    micro_batches: int = 1  # parts in which an update is computed, to save memory
    learning_rate: float = 1e-5
    warmup_fraction: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # trained weights are float32 in any case
    eval_rows: int = 0  # held out of the data; their loss is measured with each save
    save_every: int = 100


def run(config: Config) -> Params:
    """Trains; returns the trained parameters."""
    tokenizer = hf.load_tokenizer(config.model)
    eos_ids = hf.eos_ids(config.model, tokenizer)
    end = eos_ids[-1] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    pairs = encode(tokenizer, end, config)
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    held_out, pairs = [pairs[i] for i in order[: config.eval_rows]], [pairs[i] for i in order[config.eval_rows :]]
    if len(pairs) < config.batch_size:
        raise ValueError(f"{len(pairs)} rows to train on do not fill a batch of {config.batch_size}")
    steps = int(config.epochs * len(pairs) / config.batch_size)

    def batch(pairs: list[tuple[list[int], list[int]]], rows: np.ndarray) -> Rollout:
        return data.make_demonstrations(*zip(*(pairs[row] for row in rows), strict=True), multiple=config.bucket)

    with preemption.lock(config.run_dir), preemption.graceful_stop() as stop_requested:
        policy, params = hf.load_pretrained(config.model, compute_dtype=jnp.dtype(config.compute_dtype))
        warmup_steps = int(config.warmup_fraction * steps)
        schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup_steps, steps)
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
        settings = {"micro_batches": config.micro_batches, "max_grad_norm": config.max_grad_norm}
        learn = jax.jit(make_learn(policy, optimizer, loss=losses.sft(), **settings), donate_argnums=0)

        @jax.jit
        def held_out_loss(params: Params, demonstrations: Rollout) -> Mean:
            scores = scoring.score(policy, params, demonstrations, entropy=False)
            (term,), _ = losses.sft()(scores, Experience(demonstrations))
            return term

        def evaluate(params: Params) -> dict[str, float]:
            starts = range(0, len(held_out), config.batch_size)
            parts = [np.arange(start, min(start + config.batch_size, len(held_out))) for start in starts]
            terms = [jax.device_get(held_out_loss(params, batch(held_out, rows))) for rows in parts]
            return {"eval/loss": float(sum(term.sum for term in terms) / sum(term.count for term in terms))}

        state = init_state(params, optimizer, jax.random.key(config.seed))
        del params
        saved = {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}
        with checkpoint.manager(config.run_dir / "checkpoints") as checkpoints:
            if (found := checkpoint.restore(checkpoints, state)) is not None:
                state, meta = found
                checkpoint.check_config(meta["config"], saved["config"], allow=("run_dir", "save_every"))
                print(f"resumed at step {int(state.step)} of {steps}")
            first = int(state.step)
            metrics.truncate(config.run_dir, first)
            with display.progress(steps, start=first, keys=("loss", "eval/loss", "grad_norm", "length")) as show:
                for n in range(first, steps):
                    rows = data.batch_indices(config.seed, n, len(pairs), config.batch_size)
                    state, measured = learn(state, Experience(batch(pairs, rows)))
                    measured = jax.device_get(statistics.summary(measured))
                    due = (n + 1) % config.save_every == 0 or n + 1 == steps
                    if due and held_out:
                        measured |= evaluate(state.params)
                    metrics.append(config.run_dir, n, measured)
                    show(n, measured)
                    stopping = stop_requested()
                    if due or stopping:
                        checkpoint.save(checkpoints, state, saved)
                    if stopping and n + 1 < steps:
                        raise SystemExit(f"stopped after step {n + 1}; the same command goes on from there")
        folder = config.run_dir / "model"
        hf.save_pretrained(policy, state.params, folder, tokenizer=tokenizer, eos_ids=eos_ids)
        print(f"model: {folder}")
    return state.params


def encode(tokenizer: Any, end: int, config: Config) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions as tokens, each completion with the token that ends a turn."""
    rows = data.read_jsonl(config.data, [config.prompt_column, config.completion_column])

    def prompt(row: data.Row) -> data.Text:
        text = row[config.prompt_column]
        return [{"role": "user", "content": text}] if config.chat and isinstance(text, str) else text

    prompts = [data.encode_prompt(tokenizer, prompt(row)) for row in rows]
    data.limit_prompts(prompts, config.max_prompt_tokens)
    completions = []
    for number, row in enumerate(rows):
        ids = tokenizer(row[config.completion_column], add_special_tokens=False)["input_ids"] + [end]
        if len(ids) > config.max_tokens:
            raise ValueError(
                f"completion {number} has {len(ids)} tokens and the limit is {config.max_tokens}: raise --max-tokens"
            )
        completions.append(ids)
    return list(zip(prompts, completions, strict=True))


if __name__ == "__main__":
    compilation.enable_compilation_cache()
    run(tyro.cli(Config, description=__doc__))
