"""Verifiers: on text, on the host, and on tokens, inside the program.

    host.py         functions with TRL's signature -> the reward of a rollout; combine; callback
    text.py         verifiers of text: answers, layout, length, repetition, language
    calculations.py the calculations in a text, for worked_steps
    mathematics.py  accuracy: whether two answers are equal as mathematics
    python.py       python_tests: code against unit tests, in a sandbox
    judging.py      judge: a language model behind an HTTP endpoint
    model.py        reward_model: a sequence-classification checkpoint in JAX
    pool.py         WorkerPool, isolated: worker processes that can be killed
    tokens.py       verifiers of tokens, traced into the step

The makers here are those of text; `rewards.tokens` has the traced ones of the same names.
"""

from grpo_jax.rewards import text, tokens
from grpo_jax.rewards.host import HostReward, RewardFunction, callback, combine, host, name_of, skip_failed_batches
from grpo_jax.rewards.judging import judge
from grpo_jax.rewards.mathematics import accuracy
from grpo_jax.rewards.model import reward_model
from grpo_jax.rewards.pool import WorkerPool, in_worker_processes
from grpo_jax.rewards.python import python_tests
from grpo_jax.rewards.text import (
    cosine_length,
    exact_answer,
    format,
    language_consistency,
    reasoning_length,
    repetition_penalty,
    self_consistency,
    soft_overlong,
    strict_format,
    tag_count,
    worked_steps,
)
from grpo_jax.rewards.tokens import TokenReward, traced

__all__ = [
    "HostReward",
    "RewardFunction",
    "TokenReward",
    "WorkerPool",
    "accuracy",
    "callback",
    "combine",
    "cosine_length",
    "exact_answer",
    "format",
    "host",
    "in_worker_processes",
    "judge",
    "language_consistency",
    "name_of",
    "python_tests",
    "reasoning_length",
    "repetition_penalty",
    "reward_model",
    "self_consistency",
    "skip_failed_batches",
    "soft_overlong",
    "strict_format",
    "tag_count",
    "text",
    "tokens",
    "traced",
    "worked_steps",
]
