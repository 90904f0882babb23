"""One step of TRL's `GRPOTrainer`, with transformers' generation, in micro-batches of a given size.

TRL runs its own loop: a callback waits for a request before each step and answers
after it. Seconds of a step: `generate` is `_generate`; `score` is the reference's
log-probs, the forward passes without gradients; `train` is the rest of `whole`.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl

from benchmarks import cells, worker
from benchmarks.cells import Cell

STEPS = 512  # prompts are prepared for so many


class EndsAt(transformers.LogitsProcessor):
    """Ends row `i` with its `lengths[i]`-th token, and not before."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.lengths = torch.zeros(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.lengths == input_ids.shape[1] - self.prompt_tokens + 1
        scores[:, cells.END] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, cells.END] = 0.0
        return scores


def main(
    cell: Cell,
    checkpoint: Path,
    micro_batch: int,
    beta: float = cells.BETA,
    cuda: bool = False,
    lora_rank: int | None = None,
) -> None:
    requests, send = worker.open_channel()
    pending = requests()
    seconds = {"generate": 0.0, "score": 0.0}
    ends_at = EndsAt(cell.prompt_tokens)
    trainer = make_trainer(cell, checkpoint, micro_batch, beta, cuda, lora_rank)
    if cell.mean_length is None:
        never_ends(trainer)
    else:
        generate = trainer.model.generate
        trainer.model.generate = lambda **kw: generate(**kw, logits_processor=[ends_at])
    timed(trainer, "_generate", seconds, "generate")
    timed(trainer, "_get_per_token_logps_and_entropies", seconds, "score", only=lambda: not torch.is_grad_enabled())

    class OnRequest(transformers.TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            request = next(pending, None)
            if request is None:
                raise SystemExit
            ends_at.lengths = torch.tensor(request.get("lengths") or [])
            seconds.update(generate=0.0, score=0.0)
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            whole = time.perf_counter() - self.started
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            wanted = float(torch.clamp(ends_at.lengths, max=cell.completion_tokens).float().mean())
            if abs(length - (cell.completion_tokens if cell.mean_length is None else wanted)) > 1e-3:
                raise RuntimeError(f"completions have {length} tokens on average, which is not what was asked for")
            send(
                {"whole": whole, **seconds, "train": whole - sum(seconds.values())}
                | {"peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else worker.peak_memory()}
                | {"mean_length": length}
            )

    trainer.add_callback(OnRequest())
    send({"ready": True})
    trainer.train()


def make_trainer(
    cell: Cell, checkpoint: Path, micro_batch: int, beta: float, cuda: bool, lora_rank: int | None = None
) -> Any:
    """The trainer of a cell; one generation and one update a step, no gradient checkpointing; on a GPU in bfloat16.

    With `lora_rank`, peft's adapters of all linear layers but the head are trained, of twice that `lora_alpha`.
    """
    prompts = [cells.text(row) for step in range(STEPS) for row in cells.prompt_tokens(cell, step)]

    def even(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [cells.reward(np.array(ids)) for ids in completion_ids]

    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=cell.rows // micro_batch,
        num_generations=cell.group,
        max_completion_length=cell.completion_tokens,
        num_iterations=1,
        beta=beta,
        loss_type="grpo",
        use_bias_correction_kl=False,
        temperature=1.0,
        learning_rate=cells.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        logging_steps=STEPS,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    return trl.GRPOTrainer(
        model=str(checkpoint),
        reward_funcs=even,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=cells.tokenizer(cell.model),
        peft_config=None if lora_rank is None else adapters(lora_rank),
    )


def adapters(rank: int) -> Any:
    """Of all linear layers but the head, without dropout."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def never_ends(trainer: Any) -> None:
    """No token ends a completion; cheaper for TRL than suppressing one."""
    trainer.eos_token_ids = [-1]
    trainer.generation_config.eos_token_id = None
    trainer.generation_kwargs["eos_token_id"] = None
    trainer.model.generation_config.eos_token_id = None


def timed(
    trainer: Any, method: str, seconds: dict[str, float], phase: str, only: Callable[[], bool] = lambda: True
) -> None:
    """Adds the time that a method takes to a phase."""
    original = getattr(trainer, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counted, started = only(), time.perf_counter()
        result = original(*args, **kwargs)
        if counted:
            seconds[phase] += time.perf_counter() - started
        return result

    setattr(trainer, method, wrapped)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    cell, checkpoint = cells.from_json(arguments.pop("cell")), Path(arguments.pop("checkpoint"))
    main(cell, checkpoint, **arguments)
