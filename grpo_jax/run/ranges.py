"""Settings of a script that are refused by themselves, before anything is loaded: numbers out of range, URLs as paths.

ranges.check(config)
ranges.check(config, group_size=0)  # which may be 0 here
"""

import dataclasses
import math
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.run import writers

COUNTS = {  # at least 1
    *("prompts_per_step", "prompts", "group_size", "eval_group_size", "samples", "max_tokens", "max_prompt_tokens"),
    *("iterations", "minibatches", "micro_batches", "batch_size", "eval_batch", "test_batch", "sft_batch", "bucket"),
    *("completion_bucket", "save_every", "evaluate_every", "export_every", "held_out_every", "renew_every"),
    *("stop_after_skipped", "stop_after_failed", "max_turns", "max_answer_tokens", "processes", "lora_rank", "rows"),
    *("test_rows", "train_rows", "sampled_prompts", "keep", "seeds", "top_k", "warmup_batch", "slots"),
    *("evaluations", "rate_seeds", "rank_seeds", "rank_steps", "rank_evaluations", "demonstrations", "test"),
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
    *("answer_timeout", "server_timeout", "baseline_half_life", "rates"),
}
UNBOUNDED = {"max_grad_norm", "epsilon_high"}  # where infinity means none
# What programs count with is int32, keys are made of 32 bits, and other numbers are computed with as float32.
MOST: dict[str, float] = dict.fromkeys(("seed", "task_seed"), 2**32 - 1)
MOST |= dict.fromkeys(("reward_timeout", "answer_timeout", "server_timeout"), threading.TIMEOUT_MAX)
LEAST, LARGEST = float(np.finfo(np.float32).smallest_normal), float(np.finfo(np.float32).max)
LEAST_RATE = 1e-9  # half of what float32 tells apart beside a weight of 0.02, which is the size of most


def check(config: Any, **least: int) -> None:
    """Refuses numbers that are NaN, infinite, too small or too large, and paths that are URLs: a folder would be made.

    A learning rate of which float32 would lose most updates is told; a weight decay that would take whole weights away
    is refused.

    Too large is what would be another number in a program: a whole one beyond int32, a seed beyond 32 bits, of which
    the rest would be cut off, and one that float32 makes 0 or infinite.

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
        if field.name.endswith("learning_rate") and 0 < (value or 0) < LEAST_RATE:
            print(
                f"warning: {flag} {value} is about what an update of Adam moves a weight by, which is lost beside "
                "weights of a usual size in float32: little is trained"
            )
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
            most = MOST.get(field.name, 2**31 - 1 if isinstance(number, int) else math.inf)
            if number > most:
                raise ValueError(f"{flag} is at most {most}, got {number}")
            if math.isfinite(number) and number and not LEAST <= abs(number) <= LARGEST:
                raise ValueError(
                    f"{flag} is computed with in float32, which goes from {LEAST:.2g} to {LARGEST:.2g} and has no "
                    f"{number}"
                )
    rate, decay = getattr(config, "learning_rate", None), getattr(config, "weight_decay", 0.0)
    if (taken := (1e-6 if rate is None else rate) * decay) >= 1:
        raise ValueError(f"--weight-decay {decay} takes {taken:.3g} of each weight away in an update")
    writers.check_installed(tensorboard=getattr(config, "tensorboard", False), wandb=getattr(config, "wandb", None))


def tell_unused(settings: Any, names: Sequence[str], *, without: str) -> None:
    """Prints a warning of settings that are not their defaults, where they have no effect.

    Args:
      settings: a dataclass.
      names: of some of its fields.
      without: what is not there, as it is written on the command line.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name in names:
        if (value := getattr(settings, name)) != defaults[name]:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            shown = "" if isinstance(value, bool) else f" {value}"
            print(f"warning: {flag}{shown} has no effect without {without}")
