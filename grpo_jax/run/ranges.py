"""Settings of a script that are refused by themselves, before anything is loaded: numbers out of range, URLs as paths.

ranges.check(config)
ranges.check(config, group_size=0)  # which may be 0 here
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

from grpo_jax.run import writers

COUNTS = {  # at least 1
    *("prompts_per_step", "prompts", "group_size", "eval_group_size", "samples", "max_tokens", "max_prompt_tokens"),
    *("iterations", "minibatches", "micro_batches", "batch_size", "eval_batch", "test_batch", "sft_batch", "bucket"),
    *("completion_bucket", "save_every", "evaluate_every", "export_every", "held_out_every", "renew_every"),
    *("stop_after_skipped", "stop_after_failed", "max_turns", "max_answer_tokens", "processes", "lora_rank", "rows"),
    *("test_rows", "train_rows", "sampled_prompts", "keep", "seeds", "top_k", "warmup_batch", "slots"),
}
FROM_0 = {
    *("seed", "task_seed", "steps", "warmup_steps", "base_steps", "cold_start_steps", "sft_steps", "distill_steps"),
    *(
        "rl_steps",
        "final_steps",
        "eval_rows",
        "validation_rows",
        "show_every",
        "overlap",
        "environment_workers",
        "process_id",
    ),
    *("shown", "learning_rate", "rl_learning_rate", "sft_learning_rate", "base_learning_rate", "warmup_learning_rate"),
    *("weight_decay", "warmup_fraction", "beta", "load_balance", "epsilon", "epsilon_high"),
}
ABOVE_0 = {
    *("temperature", "final_temperature", "epochs", "memory_gib", "max_grad_norm", "lora_alpha", "reward_timeout"),
    *("answer_timeout", "server_timeout", "baseline_half_life"),
}
UNBOUNDED = {"max_grad_norm", "epsilon_high"}  # where infinity means none


def check(config: Any, **least: int) -> None:
    """Refuses numbers that are NaN, infinite or too small, and paths that are URLs: a folder `gs:` would be made.

    Args:
      config: a dataclass. What a setting may be goes by its name, which is the same in all scripts; one that has
        another name need only be a number where it is one.
      least: of settings that may be smaller here.

    Raises:
      ValueError: with the setting as it is written on the command line, and its value.
      ImportError: for `tensorboard` and `wandb` without their extras.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, pathlib.Path) and re.match(r"\w{2,}:/", str(value)):
            raise ValueError(f"{flag} is a path, got {value}: mount the bucket as a folder, and name that")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if math.isnan(number) or (math.isinf(number) and field.name not in UNBOUNDED):
                raise ValueError(f"{flag} is a number, got {number}")
            smallest = least.get(field.name, 1 if field.name in COUNTS else 0 if field.name in FROM_0 else -math.inf)
            if number < smallest:
                raise ValueError(f"{flag} is at least {smallest}, got {number}")
            if field.name in ABOVE_0 and number <= 0:
                raise ValueError(f"{flag} is above 0, got {number}")
    writers.check_installed(tensorboard=getattr(config, "tensorboard", False), wandb=getattr(config, "wandb", None))
